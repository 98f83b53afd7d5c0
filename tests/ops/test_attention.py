"""attention: heads in groups, ragged and padded batches, and every place at which a panel of 32 or a tile of 128 keys ends."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import numpy_ops
from devices import REFERENCE, Device, all_devices, each_isa
from guarded import guarded, guarded_empty
from llama_ext import DTypeError, OptionError, ShapeError
from tolerances import TINY, U32, assert_same_bits, assert_within, units

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    tokens: int  # T
    keys: int  # S
    heads: int  # H
    kv_heads: int  # K
    dim: int  # D
    rows: tuple[tuple[int, int], ...] | None = None  # (start, length) of each row of the batch; None: one, all keys

    def __str__(self) -> str:
        batch = "" if self.rows is None else "-rows_" + "_".join(f"{start}+{length}" for start, length in self.rows)
        return f"T{self.tokens}-S{self.keys}-H{self.heads}-K{self.kv_heads}-D{self.dim}{batch}"


def _cases() -> list[Case]:
    # Decode and prefill at each end of a panel (32) and a tile (128) of keys.
    lengths = [1, 2, 7, 31, 32, 33, 63, 64, 65, 127, 128, 129, 159, 160, 161, 255, 256, 257, 383, 385, 513]
    cases = [Case(1, keys, 4, 2, 16) for keys in lengths]
    cases += [Case(keys, keys, 3, 1, 10) for keys in lengths[:18]]
    # Chunks that begin within a tile.
    cases += [Case(7, keys, 2, 2, 24) for keys in (8, 39, 64, 129, 135, 263)]
    # Head dimensions, odd ones too: values lie in panels of 32.
    dims = [1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 80, 96, 127, 128, 129, 192, 256]
    cases += [Case(3, 37, 2, 1, dim) for dim in dims]
    # MHA, GQA and MQA; groups up to beyond a tile of rows.
    groups = [(1, 1), (2, 2), (7, 7), (8, 2), (6, 3), (8, 1), (14, 1), (15, 1), (20, 2), (32, 8), (71, 1)]
    cases += [Case(5, 21, heads, kv_heads, 12) for heads, kv_heads in groups]
    # Rows of queries around the tile heights (6, 14) and four of them.
    cases += [Case(tokens, 150, 1, 1, 8) for tokens in (5, 6, 7, 13, 14, 15, 23, 24, 25, 55, 56, 57)]
    # Left padding, right padding, both, and rows without a key or a query.
    cases += [
        Case(9, 9, 4, 2, 16, ((0, 9), (4, 5), (8, 1))),
        Case(9, 9, 4, 2, 16, ((0, 9), (0, 5), (0, 1))),
        Case(9, 9, 2, 1, 7, ((2, 5), (9, 0), (0, 0), (3, 6))),
        Case(4, 11, 2, 1, 7, ((0, 11), (3, 8), (0, 9), (9, 2), (0, 3))),
        Case(1, 140, 4, 2, 16, ((0, 140), (100, 40), (12, 128), (11, 129))),
        Case(150, 150, 2, 1, 16, ((0, 150), (20, 130), (0, 129), (22, 128))),
        Case(40, 300, 2, 2, 33, ((0, 300), (171, 129), (5, 290))),
    ]
    # Few heads and many keys: several threads share the key axis.
    cases += [Case(1, 1501, 2, 1, 64), Case(1, 4000, 1, 1, 128), Case(2, 1025, 1, 1, 128), Case(3, 1300, 8, 1, 80)]
    cases += [Case(1, 2049, 3, 1, 100, ((0, 2049), (1500, 549))), Case(16, 1100, 2, 1, 65)]
    # Much to do.
    cases += [Case(300, 300, 4, 2, 48), Case(130, 700, 8, 2, 32)]
    # Nothing to do.
    cases += [Case(0, 5, 2, 1, 4), Case(0, 0, 2, 1, 4), Case(3, 3, 0, 1, 4), Case(2, 2, 2, 1, 4, ())]
    return cases


@dataclass(frozen=True)
class Problem:
    q: Array
    k: Array
    v: Array
    starts: Array
    lengths: Array
    scale: float


@functools.cache
def make_problem(case: Case) -> Problem:
    rng = np.random.default_rng([case.tokens, case.keys, case.heads, case.dim])
    rows = ((0, case.keys),) if case.rows is None else case.rows

    def normal(*shape: int) -> Array:
        return rng.standard_normal((len(rows), *shape)).astype(np.float32)

    bounds = np.array(rows, np.int32).reshape(len(rows), 2)
    return Problem(
        q=normal(case.tokens, case.heads, case.dim),
        k=normal(case.keys, case.kv_heads, case.dim),
        v=normal(case.keys, case.kv_heads, case.dim),
        starts=np.ascontiguousarray(bounds[:, 0]),
        lengths=np.ascontiguousarray(bounds[:, 1]),
        scale=1.5 * case.dim**-0.5,
    )


@functools.cache
def expected_numpy(case: Case, cache_dtype: str) -> tuple[Array, Array]:
    p = make_problem(case)
    k, v = numpy_ops.as_kept(p.k, cache_dtype), numpy_ops.as_kept(p.v, cache_dtype)
    return numpy_ops.attention(p.q, k, v, p.starts, p.lengths, p.scale)


@functools.cache
def expected_reference(case: Case, cache_dtype: str) -> Array:
    return attend(REFERENCE, make_problem(case), cache_dtype)


CACHES = ["float32", "bfloat16", "int8"]
# What rounding the queries and the weights to bfloat16 may cost, of the sum of magnitudes.
BFLOAT16_ROUNDING = 2.0**-6


def attend(device: Device, p: Problem, cache_dtype: str, compute: str = "exact") -> Array:
    out = guarded_empty(p.q.shape)
    arrays = [guarded(each) for each in (p.q, p.k, p.v, p.starts, p.lengths)]
    device.backend.attention(*arrays, p.scale, cache_dtype, out, compute)
    return out


@pytest.mark.parametrize("case", _cases(), ids=str)
@pytest.mark.parametrize("cache_dtype", CACHES)
@all_devices
def test_attention_matches_float64(device: Device, cache_dtype: str, case: Case) -> None:
    expected, spread = expected_numpy(case, cache_dtype)
    bound = units("attention") * spread + TINY
    result = attend(device, make_problem(case), cache_dtype)
    assert_within(result, expected, bound, "against NumPy")
    assert (result[spread == 0] == 0).all(), "padding must give zeros"
    if device.isa:
        reference = expected_reference(case, cache_dtype)
        assert_within(result, reference, bound + U32 * np.abs(reference), "against the reference")


@pytest.mark.parametrize("case", _cases(), ids=str)
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
@each_isa
def test_automatic_arithmetic_of_attention_costs_no_more_than_bfloat16(isa: str, cache_dtype: str, case: Case) -> None:
    expected, spread = expected_numpy(case, cache_dtype)
    result = attend(Device(isa, 2), make_problem(case), cache_dtype, "auto")
    assert_within(result, expected, BFLOAT16_ROUNDING * spread + TINY)
    assert (result[spread == 0] == 0).all(), "padding must give zeros"


@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize("cache_dtype", CACHES)
@each_isa
def test_attention_of_a_token_has_the_same_bits_in_prefill_chunks_and_decode(
    isa: str, cache_dtype: str, compute: str
) -> None:
    keys, heads, kv_heads, dim = 400, 6, 2, 40
    p = make_problem(Case(keys, keys, heads, kv_heads, dim))
    whole = attend(Device(isa, 1), p, cache_dtype, compute)
    for threads in (1, 2, 3):
        assert_same_bits(attend(Device(isa, threads), p, cache_dtype, compute), whole, f"prefill, {threads} threads")
        for last in (1, 2, 31, 32, 33, 127, 128, 129, 130, 255, 256, 257, 385, 400):
            for tokens in (1, 2, 15, 64):
                if tokens > last:
                    continue
                # Row 1 of the batch is something else: it must not matter.
                chunk = Problem(
                    q=np.concatenate([p.q[:, last - tokens : last], p.q[:, :tokens]]),
                    k=np.concatenate([p.k[:, :last], p.v[:, :last]]),
                    v=np.concatenate([p.v[:, :last], p.k[:, :last]]),
                    starts=np.array([0, last // 2], np.int32),
                    lengths=np.array([last, last - last // 2], np.int32),
                    scale=p.scale,
                )
                result = attend(Device(isa, threads), chunk, cache_dtype, compute)
                what = f"{tokens} tokens of {last}, {threads} threads"
                assert_same_bits(result[:1], whole[:, last - tokens : last], what)


@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize("cache_dtype", CACHES)
@each_isa
def test_attention_over_a_split_key_axis_has_the_same_bits(isa: str, cache_dtype: str, compute: str) -> None:
    for case in (Case(1, 4000, 1, 1, 128), Case(3, 1300, 8, 1, 80), Case(1, 1501, 2, 1, 64)):
        p = make_problem(case)
        alone = attend(Device(isa, 1), p, cache_dtype, compute)
        for threads in (2, 3, 8):
            assert_same_bits(attend(Device(isa, threads), p, cache_dtype, compute), alone, f"{case}, {threads} threads")


@all_devices
def test_attention_of_a_token_ignores_what_comes_after_it(device: Device) -> None:
    p = make_problem(Case(200, 200, 4, 2, 20))
    before = attend(device, p, "float32")
    k, v = p.k.copy(), p.v.copy()
    k[:, 150:] = 1e4
    v[:, 150:] = -1e30
    after = attend(device, Problem(p.q, k, v, p.starts, p.lengths, p.scale), "float32")
    assert_same_bits(after[:, :150], before[:, :150])


@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("first", [150, 151], ids=str)
@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=["nan", "inf"])
@each_isa
def test_attention_of_a_token_ignores_even_a_later_token_that_is_not_finite(
    isa: str, poison: float, first: int, cache_dtype: str, compute: str
) -> None:
    # As decode would have it, where the later token does not exist yet.
    p = make_problem(Case(200, 200, 4, 2, 20))
    before = attend(Device(isa, 1), p, cache_dtype, compute)
    k, v = p.k.copy(), p.v.copy()
    k[:, first:] = poison
    v[:, first:] = poison
    poisoned = Problem(p.q, k, v, p.starts, p.lengths, p.scale)
    after = attend(Device(isa, 1), poisoned, cache_dtype, compute)
    assert_same_bits(after[:, :first], before[:, :first])
    assert np.isnan(after[:, first:]).all()


@all_devices
def test_attention_copes_with_scores_far_apart(device: Device) -> None:
    # Scores of +-5,000: all the weight is on one key, and it changes from tile to tile.
    case = Case(300, 300, 2, 1, 8)
    p = make_problem(case)
    p = Problem(p.q * 30, p.k * 30, p.v, p.starts, p.lengths, 2.0)
    expected, spread = numpy_ops.attention(p.q, p.k, p.v, p.starts, p.lengths, p.scale)
    assert_within(attend(device, p, "float32"), expected, units("attention") * spread + TINY)


def test_attention_refuses_what_does_not_fit() -> None:
    backend = REFERENCE.backend
    p = make_problem(Case(3, 5, 4, 2, 8))
    out = np.empty_like(p.q)

    def attempt(**changes: Any) -> None:
        given = {"q": p.q, "k": p.k, "v": p.v, "starts": p.starts, "lengths": p.lengths, **changes}
        arrays = [given[name] for name in ("q", "k", "v", "starts", "lengths")]
        backend.attention(*arrays, given.get("scale", 1.0), given.get("cache_dtype", "float32"), out)

    attempt()
    three_heads = np.ones((1, 5, 3, 8), np.float32)
    for changes in (
        {"k": p.k[..., :4].copy()},
        {"v": p.v[:, :4].copy()},
        {"k": three_heads, "v": three_heads},
        {"k": p.k[:, :2].copy(), "v": p.v[:, :2].copy()},
        {"starts": np.zeros(2, np.int32)},
        {"starts": np.array([-1], np.int32)},
        {"starts": np.array([1], np.int32)},
        {"lengths": np.array([6], np.int32)},
        {"lengths": np.array([-1], np.int32)},
        {"starts": np.array([2**31 - 1], np.int32)},
    ):
        with pytest.raises(ShapeError):
            attempt(**changes)
    with pytest.raises(OptionError, match="scale must be finite"):
        attempt(scale=1e39)
    with pytest.raises(DTypeError):
        attempt(cache_dtype="float16")
