"""causal_attention and its gradient: whole sequences without a cache, against float64 and finite differences."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import finite_differences
import numpy_training
from devices import REFERENCE, Device, all_devices, each_isa
from guarded import guarded, guarded_empty, guarded_rows, guarded_rows_empty
from llama_ext import DTypeError, OptionError, ShapeError
from tolerances import TINY, U32, assert_same_bits, assert_within, relative_rms, units

Array = npt.NDArray[Any]
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Case:
    ranges: Ranges  # (first row, tokens)
    rows: int
    heads: int
    kv_heads: int
    dim: int
    dropout: float = 0.0
    gap: int = 0  # elements between the rows of q, k, v, y and their gradients
    seed: int = 12345678901234567

    def __str__(self) -> str:
        options = [f"p{self.dropout}"] * (self.dropout > 0) + ["strided"] * (self.gap > 0)
        lengths = "+".join(str(tokens) for _, tokens in self.ranges) or "none"
        return "-".join(
            [f"T{lengths}", f"M{self.rows}", f"H{self.heads}", f"K{self.kv_heads}", f"D{self.dim}", *options]
        )


def one(tokens: int, heads: int, kv_heads: int, dim: int, **options: Any) -> Case:
    return Case(((0, tokens),), tokens, heads, kv_heads, dim, **options)


SMALL = [
    one(1, 1, 1, 1),
    one(5, 2, 1, 3),
    one(6, 4, 2, 5, dropout=0.3),
    Case(((1, 4), (6, 1), (8, 3)), 13, 6, 3, 4, gap=3),
    Case(((7, 5), (0, 0), (0, 6)), 12, 3, 1, 2, dropout=0.5, gap=1),
]


def _cases() -> list[Case]:
    lengths = [
        1,
        2,
        3,
        5,
        6,
        7,
        8,
        9,
        13,
        14,
        15,
        16,
        17,
        31,
        32,
        33,
        47,
        63,
        64,
        65,
        95,
        96,
        97,
        127,
        128,
        129,
        160,
        161,
    ]
    cases = [one(tokens, [1, 2, 3][i % 3], 1, [5, 8, 16, 33][i % 4]) for i, tokens in enumerate(lengths)]
    dims = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 80, 96, 127, 128, 129, 256]
    cases += [one(37, 2, 1, dim, gap=i % 2 * 3) for i, dim in enumerate(dims)]
    groups = [(1, 1), (2, 2), (7, 7), (8, 2), (6, 3), (8, 1), (15, 1), (20, 2), (32, 8)]
    cases += [one(21, heads, kv_heads, 12, dropout=i % 2 * 0.2) for i, (heads, kv_heads) in enumerate(groups)]
    cases += [
        Case(((0, 9), (9, 17), (26, 1), (27, 40)), 67, 4, 2, 16),
        Case(((30, 40), (3, 20), (24, 1), (75, 0), (76, 4)), 85, 4, 2, 16, dropout=0.1, gap=5),
        Case(((0, 3), *((3 + i, 1) for i in range(20))), 30, 2, 2, 7),
        Case(((5, 130), (140, 65)), 210, 6, 2, 24, dropout=0.9, gap=2),
        one(300, 4, 2, 48),
        one(291, 2, 1, 33, dropout=0.2, gap=7),
        one(257, 1, 1, 64),
        # Sequences of no tokens, beside others and within them.
        Case(((0, 5), (0, 0), (2, 0), (5, 4), (9, 0)), 9, 2, 1, 3),
        # Nothing to do.
        Case((), 4, 2, 1, 3),
        Case(((0, 0),), 0, 2, 1, 3),
        Case(((0, 3),), 3, 0, 1, 4),
        Case(((0, 3),), 3, 2, 1, 0),
    ]
    return cases


class Problem(NamedTuple):
    q: Array
    k: Array
    v: Array
    d_y: Array
    scale: float


class Forward(NamedTuple):
    y: Array
    log_sums: Array


class Gradients(NamedTuple):
    d_q: Array
    d_k: Array
    d_v: Array


@functools.cache
def make_problem(case: Case) -> Problem:
    rng = np.random.default_rng([case.rows, case.heads, case.dim, len(case.ranges)])

    def normal(heads: int) -> Array:
        return rng.standard_normal((case.rows, heads, case.dim)).astype(np.float32)

    # Scores of size 1.5, so that weights differ.
    scale = 1.5 * max(case.dim, 1) ** -0.5
    return Problem(normal(case.heads), normal(case.kv_heads), normal(case.kv_heads), normal(case.heads), scale)


def attend(device: Device, case: Case, compute: str = "exact", p: Problem | None = None) -> Forward:
    """NaN in the rows of no sequence, which are left alone."""
    p = p or make_problem(case)
    y, gaps = guarded_rows_empty(p.q.shape, case.gap)
    log_sums = guarded_empty(p.q.shape[:2])
    q, k, v = (guarded_rows(each, case.gap) for each in p[:3])
    device.backend.causal_attention(case.ranges, q, k, v, p.scale, y, log_sums, case.dropout, case.seed, compute)
    assert np.isnan(gaps).all(), "wrote between the rows"
    return Forward(y, log_sums)


@functools.cache
def saved(case: Case) -> Forward:
    """What every backward gets: of the reference, so that each is judged by itself."""
    return attend(REFERENCE, case)


def differentiate(
    device: Device, case: Case, compute: str = "exact", p: Problem | None = None, forward: Forward | None = None
) -> Gradients:
    p, forward = p or make_problem(case), forward or saved(case)
    (d_q, gaps), (d_k, more), (d_v, most) = (guarded_rows_empty(each.shape, case.gap) for each in p[:3])
    q, k, v, d_y = (guarded_rows(each, case.gap) for each in p[:4])
    y, log_sums = guarded_rows(forward.y, case.gap), guarded(forward.log_sums)
    device.backend.causal_attention_backward(
        case.ranges, q, k, v, p.scale, y, log_sums, d_y, d_q, d_k, d_v, case.dropout, case.seed, compute
    )
    for each in (gaps, more, most):
        assert np.isnan(each).all(), "wrote between the rows"
    return Gradients(d_q, d_k, d_v)


def taken(case: Case) -> npt.NDArray[np.bool_]:
    """Which rows belong to a sequence."""
    mask = np.zeros(case.rows, bool)
    for begin, count in case.ranges:
        mask[begin : begin + count] = True
    return mask


def expected_forward(case: Case) -> numpy_training.Attention:
    p = make_problem(case)
    return numpy_training.causal_attention(p.q, p.k, p.v, case.ranges, p.scale, case.dropout, case.seed)


@functools.cache
def bounds(case: Case) -> numpy_training.AttentionBounds:
    p = make_problem(case)
    return numpy_training.causal_attention_bounds(p.q, p.k, p.v, p.d_y, case.ranges, p.scale, case.dropout, case.seed)


def slopes(case: Case, p: Problem) -> Gradients:
    """By finite differences."""

    def forward(q: Array, k: Array, v: Array) -> Array:
        return numpy_training.causal_attention(q, k, v, case.ranges, p.scale, case.dropout, case.seed).y

    return Gradients(
        finite_differences.gradient(lambda q: forward(q, p.k, p.v), p.q, p.d_y),
        finite_differences.gradient(lambda k: forward(p.q, k, p.v), p.k, p.d_y),
        finite_differences.gradient(lambda v: forward(p.q, p.k, v), p.v, p.d_y),
    )


@pytest.mark.parametrize("case", [*SMALL, *_cases()], ids=str)
@all_devices
def test_causal_attention_matches_float64(device: Device, case: Case) -> None:
    expected, mine = expected_forward(case), taken(case)
    found = attend(device, case)
    bound = units("causal_attention") * expected.spread[mine] + TINY
    assert_within(found.y[mine], expected.y[mine], bound, "y against NumPy")
    sums_bound = units("causal_attention") * (np.abs(expected.log_sums) + expected.scores)[mine]
    assert_within(found.log_sums[mine], expected.log_sums[mine], sums_bound, "log_sums against NumPy")
    assert np.isnan(found.y[~mine]).all(), "wrote to rows of no sequence"
    assert np.isnan(found.log_sums[~mine]).all(), "wrote to rows of no sequence"
    if device.isa:
        reference = saved(case)
        assert_within(found.y[mine], reference.y[mine], bound + U32 * np.abs(reference.y[mine]), "y, the reference")


@pytest.mark.parametrize("case", SMALL, ids=str)
@all_devices
def test_causal_attention_backward_is_the_slope_of_causal_attention(device: Device, case: Case) -> None:
    p = make_problem(case)
    expected, mine = slopes(case, p), taken(case)
    found = differentiate(device, case)
    for name in Gradients._fields:
        ours, theirs = getattr(found, name)[mine], getattr(expected, name)[mine]
        if np.abs(theirs).max() < 1e-8:  # of a single token, whose weight is always 1
            assert np.abs(ours).max() < 1e-6
        else:
            assert relative_rms(ours, theirs) < units("gradients"), name
        assert np.isnan(getattr(found, name)[~mine]).all(), "wrote to rows of no sequence"


@pytest.mark.parametrize("case", _cases(), ids=str)
@all_devices
def test_causal_attention_backward_is_near_the_reference(device: Device, case: Case) -> None:
    """Which finite differences prove, where they are affordable."""
    found, limits, mine = differentiate(device, case), bounds(case), taken(case)
    reference = differentiate(REFERENCE, case)
    for name in Gradients._fields:
        limit = units("causal_attention_backward") * getattr(limits, name) + TINY
        assert_within(getattr(found, name)[mine], getattr(reference, name)[mine].astype(np.float64), limit[mine], name)
        assert np.isnan(getattr(found, name)[~mine]).all(), "wrote to rows of no sequence"


@pytest.mark.parametrize("case", [one(40, 4, 2, 24), one(291, 2, 1, 33, dropout=0.2), SMALL[3]], ids=str)
@all_devices
def test_bfloat16_costs_no_more_than_bfloat16(device: Device, case: Case) -> None:
    forward, backward = attend(device, case, "bfloat16"), differentiate(device, case, "bfloat16")
    expected, limits, mine = expected_forward(case), bounds(case), taken(case)
    reference = differentiate(REFERENCE, case)
    factor = 2 * units("bfloat16-products")  # of the scores, and of their products with the values
    assert_within(forward.y[mine], expected.y[mine], factor * expected.spread[mine])
    for name in Gradients._fields:
        theirs = getattr(reference, name)[mine].astype(np.float64)
        assert_within(getattr(backward, name)[mine], theirs, 1.5 * factor * getattr(limits, name)[mine], name)


@all_devices
def test_gradients_take_the_place_of_queries_keys_and_values(device: Device) -> None:
    for case in (SMALL[3], one(70, 4, 2, 17, dropout=0.2, gap=2)):
        p, forward, plain = make_problem(case), saved(case), differentiate(device, case)
        q, k, v, d_y, y = (guarded_rows(each, case.gap) for each in (*p[:4], forward.y))
        device.backend.causal_attention_backward(
            case.ranges, q, k, v, p.scale, y, guarded(forward.log_sums), d_y, q, k, v, case.dropout, case.seed
        )
        mine = taken(case)
        for name, found, kept in zip(Gradients._fields, (q, k, v), p[:3], strict=True):
            assert_same_bits(found[mine], getattr(plain, name)[mine], name)
            assert_same_bits(found[~mine], kept[~mine], name)


@all_devices
def test_queries_keys_and_values_may_be_slices_of_one_array(device: Device) -> None:
    case = one(33, 4, 2, 8)
    p, forward, plain = make_problem(case), saved(case), differentiate(device, case)
    fused = guarded(np.concatenate([p.q, p.k, p.v], axis=1).reshape(33, -1))
    q = fused[:, :32].reshape(33, 4, 8)
    k, v = fused[:, 32:48].reshape(33, 2, 8), fused[:, 48:].reshape(33, 2, 8)
    assert all(np.shares_memory(each, fused) for each in (q, k, v))
    y, log_sums = guarded_empty(p.q.shape), guarded_empty((33, 4))
    device.backend.causal_attention(case.ranges, q, k, v, p.scale, y, log_sums)
    assert_same_bits(y, attend(device, case).y)
    device.backend.causal_attention_backward(
        case.ranges, q, k, v, p.scale, guarded(forward.y), guarded(forward.log_sums), guarded(p.d_y), q, k, v
    )
    for name, found in zip(Gradients._fields, (q, k, v), strict=True):
        assert_same_bits(np.ascontiguousarray(found), getattr(plain, name), name)


@each_isa
def test_causal_attention_has_the_same_bits_with_any_threads(isa: str) -> None:
    for case in (one(200, 6, 2, 32, dropout=0.1), one(150, 1, 1, 16), Case(((2, 60), (70, 90)), 170, 4, 4, 20)):
        mine = taken(case)
        forward = [attend(Device(isa, threads), case) for threads in (1, 2, 3)]
        backward = [differentiate(Device(isa, threads), case) for threads in (1, 2, 3)]
        for results in (forward, backward):
            for other in (1, 2):
                for ours, theirs in zip(results[other], results[0], strict=True):
                    assert_same_bits(ours[mine], theirs[mine])


@all_devices
def test_a_sequence_has_the_same_bits_among_others(device: Device) -> None:
    # Without dropout, which depends on the rows.
    case = Case(((3, 70), (80, 33), (113, 1), (120, 50)), 180, 4, 2, 24)
    p, forward, backward = make_problem(case), attend(device, case), differentiate(device, case)
    for begin, count in case.ranges:
        own = slice(begin, begin + count)
        alone = one(count, 4, 2, 24)
        part = Problem(p.q[own], p.k[own], p.v[own], p.d_y[own], p.scale)
        for ours, theirs in zip(attend(device, alone, p=part), forward, strict=True):
            assert_same_bits(ours, theirs[own])
        kept = Forward(saved(case).y[own], saved(case).log_sums[own])
        for ours, theirs in zip(differentiate(device, alone, p=part, forward=kept), backward, strict=True):
            assert_same_bits(ours, theirs[own])


@all_devices
def test_a_later_token_changes_nothing(device: Device) -> None:
    case = one(60, 4, 2, 16)
    p, whole = make_problem(case), attend(device, case)
    changed = Problem(*(each.copy() for each in p[:4]), p.scale)
    for each in changed[:3]:
        each[40:] = 1e6
    found = attend(device, case, p=changed)
    assert_same_bits(found.y[:40], whole.y[:40])
    assert_same_bits(found.log_sums[:40], whole.log_sums[:40])
    assert (found.y[40:] != whole.y[40:]).all()


@all_devices
def test_nan_stays_in_its_sequence(device: Device) -> None:
    case = Case(((0, 40), (40, 33), (73, 20)), 93, 4, 2, 16)
    p, forward, backward = make_problem(case), attend(device, case), differentiate(device, case)
    changed = Problem(*(each.copy() for each in p[:4]), p.scale)
    for each in changed[:4]:
        each[40:73] = np.nan
    others = np.r_[0:40, 73:93]
    spoilt = attend(device, case, p=changed)
    for ours, theirs in zip(spoilt, forward, strict=True):
        assert_same_bits(ours[others], theirs[others])
        assert np.isnan(ours[40:73]).all()
    for ours, theirs in zip(differentiate(device, case, p=changed), backward, strict=True):
        assert_same_bits(ours[others], theirs[others])
        assert np.isnan(ours[40:73]).all()


@all_devices
def test_another_seed_drops_other_weights(device: Device) -> None:
    case = one(50, 4, 2, 16, dropout=0.3)
    same, other = attend(device, case), attend(device, replace(case, seed=case.seed + 1))
    high = attend(device, replace(case, seed=case.seed + 2**40))
    assert_same_bits(attend(device, case).y, same.y)
    assert_same_bits(other.log_sums, same.log_sums)
    for each in (other, high):
        assert relative_rms(each.y, same.y.astype(np.float64)) > 0.1


@st.composite
def ragged(draw: st.DrawFn) -> Case:
    """Sequences in any order, with rows of none between them."""
    ranges, row = [], 0
    for _ in range(draw(st.integers(0, 4))):
        row += draw(st.integers(0, 3))
        tokens = draw(st.integers(0, 9))
        ranges.append((row, tokens))
        row += tokens
    rows = row + draw(st.integers(0, 2))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Case(
        tuple(draw(st.permutations(ranges))),
        rows,
        kv_heads * group,
        kv_heads,
        draw(st.integers(1, 5)),
        draw(st.sampled_from([0.0, 0.25, 0.7])),
        draw(st.integers(0, 2)),
        draw(st.integers(0, 2**64 - 1)),
    )


@settings(max_examples=40, deadline=None)
@given(case=ragged())
@all_devices
def test_ragged_sequences_never_meet(device: Device, case: Case) -> None:
    expected, mine = expected_forward(case), taken(case)
    found, gradients, limits = attend(device, case), differentiate(device, case), bounds(case)
    assert_within(found.y[mine], expected.y[mine], units("causal_attention") * expected.spread[mine] + TINY)
    # By directions, as hypothesis runs this often: each moves all of q, k and v at once.
    p = make_problem(case)
    rng = np.random.default_rng(case.seed)
    moves = [rng.standard_normal(each.shape) for each in p[:3]]

    def along(distance: float) -> float:
        moved = [each + distance * move for each, move in zip(p[:3], moves, strict=True)]
        y = numpy_training.causal_attention(*moved, case.ranges, p.scale, case.dropout, case.seed).y
        return float((y * p.d_y).sum())

    slope = finite_differences.derivative(along)
    pairs = list(zip(gradients, moves, limits, strict=True))
    ours = sum(float((gradient[mine].astype(np.float64) * move[mine]).sum()) for gradient, move, _ in pairs)
    room = sum(float((np.abs(move) * limit)[mine].sum()) for _, move, limit in pairs)
    assert abs(ours - slope) <= units("causal_attention_backward") * room + 1e-6 * (1 + abs(slope))
    for each in (*found, *gradients):
        assert np.isnan(each[~mine]).all(), "wrote to rows of no sequence"


@pytest.mark.parametrize("side", ["end", "start"])
@all_devices
def test_causal_attention_touches_no_byte_before_or_after_its_arrays(device: Device, side: Any) -> None:
    for case in (one(1, 1, 1, 1), one(33, 2, 1, 31), one(15, 3, 1, 65), one(65, 2, 2, 9)):
        p = make_problem(case)
        q, k, v, d_y = (guarded(each, side) for each in p[:4])
        y, log_sums = guarded_empty(q.shape, side=side), guarded_empty(q.shape[:2], side=side)
        d_q, d_k, d_v = (guarded_empty(each.shape, side=side) for each in (q, k, v))
        device.backend.causal_attention(case.ranges, q, k, v, p.scale, y, log_sums)
        device.backend.causal_attention_backward(case.ranges, q, k, v, p.scale, y, log_sums, d_y, d_q, d_k, d_v)
        for each in (y, log_sums, d_q, d_k, d_v):
            assert not np.isnan(each).any()


@all_devices
def test_causal_attention_refuses_what_does_not_fit(device: Device) -> None:
    backend, p = device.backend, make_problem(one(4, 4, 2, 3))
    y, log_sums = np.zeros_like(p.q), np.zeros((4, 4), np.float32)

    def run(
        ranges: Any = ((0, 4),), q: Any = p.q, k: Any = p.k, v: Any = p.v, scale: float = 1.0, **options: Any
    ) -> None:
        out = options.pop("out", y)
        sums = options.pop("log_sums", log_sums)
        backend.causal_attention(ranges, q, k, v, scale, out, sums, **options)

    for ranges in [((0, 5),), ((-1, 2),), ((0, -1),), ((0, 3), (2, 2)), ((2, 2), (0, 3)), ((4, 1),), ((2**62, 2**62),)]:
        with pytest.raises(ShapeError, match="sequences"):
            run(ranges)
    with pytest.raises(ShapeError, match="multiple"):
        run(
            q=np.zeros((4, 3, 3), np.float32),
            out=np.zeros((4, 3, 3), np.float32),
            log_sums=np.zeros((4, 3), np.float32),
        )
    with pytest.raises(ShapeError, match="v"):
        run(v=np.zeros((4, 1, 3), np.float32))
    with pytest.raises(ShapeError, match="k"):
        run(k=np.zeros((3, 2, 3), np.float32))
    with pytest.raises(ShapeError, match="log_sums"):
        run(log_sums=np.zeros((4, 2), np.float32))
    with pytest.raises(ShapeError, match="overlap"):
        run(q=y)
    with pytest.raises(DTypeError):
        run(q=p.q.astype(np.float64))
    for dropout in (-0.1, 1.0, float("nan")):
        with pytest.raises(OptionError, match="dropout"):
            run(dropout=dropout)
    for scale in (float("inf"), 1e39):
        with pytest.raises(OptionError, match="scale"):
            run(scale=scale)
    with pytest.raises(OptionError, match="compute"):
        run(compute="fast")
    d_q, d_k, d_v = (np.zeros_like(each) for each in (p.q, p.k, p.v))
    with pytest.raises(ShapeError, match="d_y"):
        backend.causal_attention_backward(((0, 4),), *p[:3], 1.0, y, log_sums, p.d_y[:3], d_q, d_k, d_v)
    with pytest.raises(ShapeError, match="d_q must not overlap d_y"):
        backend.causal_attention_backward(((0, 4),), *p[:3], 1.0, y, log_sums, d_q, d_q, d_k, d_v)
    with pytest.raises(ShapeError, match="d_k"):
        backend.causal_attention_backward(((0, 4),), *p[:3], 1.0, y, log_sums, p.d_y, d_q, d_q, d_v)
    with pytest.raises(ShapeError, match="d_v must not overlap k"):
        backend.causal_attention_backward(((0, 4),), *p[:3], 1.0, y, log_sums, p.d_y, d_q, d_k, p.k)
    with pytest.raises(ShapeError, match="d_k must not overlap d_v"):
        backend.causal_attention_backward(((0, 4),), *p[:3], 1.0, y, log_sums, p.d_y, d_q, d_k, d_k)
