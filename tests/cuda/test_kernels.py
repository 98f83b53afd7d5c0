"""What the tests of each operation do not ask of a GPU: arithmetic that may round, bits from run to run, turns of threads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import llama_ext
import numpy_ops
from devices import CUDA, IS_EMULATED, requires_cuda
from guarded import guarded, guarded_empty
from llama_ext import DeviceError, DTypeError, UnsupportedError, _core
from quantized import LAYOUTS, MOST_ROWS_OF_CODES, Kept, each_layout, weights
from tolerances import TINY, assert_same_bits, assert_within

Array = npt.NDArray[Any]
pytestmark = [requires_cuda, pytest.mark.gpu]

ORDERS = ("forward", "backward", "shuffled") if IS_EMULATED else ("",)
FLOATS = [Kept("float32"), Kept("bfloat16"), Kept("float16")]
each_weight = pytest.mark.parametrize("kept", [*FLOATS[:2], *LAYOUTS], ids=str)


def matrix_of(kept: Kept, rng: np.random.Generator, rows: int, columns: int) -> Any:
    if kept.name in ("float32", "bfloat16"):
        return CUDA.backend.matrix(rng.standard_normal((rows, columns)).astype(np.float32), kept.name)
    return weights(kept, rng, rows, kept.columns(columns)).on(CUDA.backend)


def multiply(x: Array, matrix: Any, compute: str) -> Array:
    out = guarded_empty((len(x), matrix.shape[0]))
    CUDA.backend.matmul(guarded(x), matrix, None, out, False, compute)
    return out


@pytest.mark.parametrize("compute", ["auto", "exact"])
@each_weight
def test_a_product_has_the_same_bits_again_and_in_any_order_of_turns(
    kept: Kept, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    matrix = matrix_of(kept, rng, 41, 300)
    for rows in (1, 3, 7, 70):
        x = rng.standard_normal((rows, matrix.shape[1])).astype(np.float32)
        whole = multiply(x, matrix, compute)
        for order in ORDERS * 2:
            monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order)
            assert_same_bits(multiply(x, matrix, compute), whole, f"{rows} rows, {order}")


# The columns of a step of codes, which share a power of two.
STEPS = {"int8": 64, "int4": 128}


@pytest.mark.parametrize(
    "kept",
    [Kept("int8", 64), Kept("int8", 128), Kept("int8_min", 64), Kept("int4", 128), Kept("int4_min", 128)],
    ids=str,
)
def test_few_rows_meet_codes_as_whole_numbers_of_16_bits(kept: Kept) -> None:
    """Half a unit, of which each step's largest has 2^14 at least, but for what 256 127 + 127 is less than 2^15; beside it float32 sums."""
    rng = np.random.default_rng(6)
    step = STEPS[kept.name.removesuffix("_min")]
    for k in (1, 130, 1024, 2500):
        made = weights(kept, rng, 37, k)
        matrix = made.on(CUDA.backend)
        # Steps of other sizes each: of the row's largest alone some would be rounded away; one of zeros, and one of a single number.
        sizes = np.exp2(rng.integers(-20, 21, (8, -(-k // step))))
        sizes[1, 0] = 0
        x = (rng.standard_normal((8, k)) * np.repeat(sizes, step, axis=1)[:, :k]).astype(np.float32)
        x[2, 1:step] = 0
        magnitude = np.abs(made.exact)
        bound = 2.0**-22 * (np.abs(x.astype(np.float64)) @ made.factored_magnitude().T) + TINY
        for first in range(0, k, step):
            largest = np.abs(x[:, first : first + step].astype(np.float64)).max(axis=1, keepdims=True)
            bound += 0.5 / 2**14 * (32768 / 32639) * largest * magnitude[:, first : first + step].sum(axis=1)
        for rows in (1, 2, 5, 8):
            found = multiply(x[:rows], matrix, "auto")
            assert_within(found, x[:rows].astype(np.float64) @ made.exact.T, bound[:rows], f"{rows} x {k}")


@pytest.mark.parametrize("compute", ["auto", "exact"])
@each_weight
def test_a_row_of_a_product_depends_on_whether_there_are_few_rows_and_on_nothing_else(kept: Kept, compute: str) -> None:
    """Few are 4, or 8 for weights that have a kernel for few rows on the tensor cores; many, for quantised weights, more than 32."""
    rng = np.random.default_rng(1)
    matrix = matrix_of(kept, rng, 45, 330)
    x = rng.standard_normal((140, matrix.shape[1])).astype(np.float32)
    many = multiply(x, matrix, compute)
    most = 8 if np.array_equal(multiply(x[:8], matrix, compute)[:1], multiply(x[:1], matrix, compute)) else 4
    if compute == "auto" and kept.name == "bfloat16":
        assert most == 8
    few = multiply(x[:most], matrix, compute)
    for first, rows in itertools.product((0, 1, 2, 5), (1, 2, 3, 4, 7)):
        if first + rows <= most:
            assert_same_bits(multiply(x[first : first + rows], matrix, compute), few[first : first + rows], rows)
    is_unpacked = compute == "auto" and kept not in FLOATS
    for first, rows in ((0, 9), (3, 16), (7, 32), (7, 33), (20, 44), (60, 64), (60, 65), (1, 128)):
        at = slice(first, first + rows)
        if is_unpacked and rows <= MOST_ROWS_OF_CODES:
            begin = min(first, len(x) - MOST_ROWS_OF_CODES)
            expected = multiply(x[begin : begin + MOST_ROWS_OF_CODES], matrix, compute)[first - begin :][:rows]
            assert not np.array_equal(expected, many[at])
        else:
            expected = many[at]
        assert_same_bits(multiply(x[at], matrix, compute), expected, rows)


@each_layout
def test_a_column_of_a_product_has_the_same_bits_among_any_others(kept: Kept) -> None:
    rng = np.random.default_rng(2)
    made = weights(kept, rng, 150, kept.columns(200))
    whole_matrix = made.on(CUDA.backend)
    for rows in (2, 9, 65):
        x = rng.standard_normal((rows, made.exact.shape[1])).astype(np.float32)
        whole = multiply(x, whole_matrix, "auto")
        for columns in (1, 31, 33, 129):
            some = multiply(x, made.rows(3, 3 + columns).on(CUDA.backend), "auto")
            assert_same_bits(some, np.ascontiguousarray(whole[:, 3 : 3 + columns]), f"{columns} columns")


def test_a_product_may_have_more_columns_than_a_grid_has_blocks() -> None:
    """65,535 of 32 columns, and two columns more."""
    columns = 65535 * 32 + 2
    weight = (np.arange(columns, dtype=np.float32) % 251).reshape(-1, 1)
    found = multiply(np.array([[1], [-2]] * 5, np.float32), CUDA.backend.matrix(weight, "bfloat16"), "auto")
    assert np.array_equal(found[8:], np.array([[1], [-2]], np.float32) * weight.T)


# T, S, H, K, D: decoding and prefill; groups of heads; the ends of tiles (64), parts (256) and rows of a block (16, 64).
ATTENTION = [
    (1, 1, 2, 2, 8),
    (1, 63, 4, 1, 64),
    (1, 64, 8, 2, 40),
    (1, 65, 3, 3, 128),
    (1, 257, 4, 2, 80),
    (1, 700, 8, 1, 33),
    (2, 513, 16, 2, 64),
    (5, 5, 4, 2, 16),
    (17, 300, 4, 4, 64),
    (64, 64, 1, 1, 64),
    (65, 65, 2, 1, 100),
    (70, 330, 6, 2, 48),
    (130, 130, 4, 2, 8),
    (9, 270, 40, 1, 24),
    (3, 20, 65, 1, 8),  # more heads in a group than a block has rows
    (3, 70, 4, 2, 160),  # and longer ones than it keeps in registers
]


def attend(case: tuple[int, ...], cache: str, compute: str, size: float = 1.0) -> tuple[Array, Array, Array]:
    tokens, keys, heads, kv_heads, dim = case
    rng = np.random.default_rng(case)
    q = (rng.standard_normal((1, tokens, heads, dim)) * size).astype(np.float32)
    k, v = (rng.standard_normal((1, keys, kv_heads, dim)).astype(np.float32) for _ in range(2))
    starts, lengths = np.zeros(1, np.int32), np.array([keys], np.int32)
    out = guarded_empty(q.shape)
    scale = dim**-0.5
    CUDA.backend.attention(guarded(q), guarded(k), guarded(v), starts, lengths, scale, cache, out, compute)
    kept = (numpy_ops.as_kept(each, cache) for each in (k, v))
    expected, spread = numpy_ops.attention(q, *kept, starts, lengths, scale)
    return out, expected, spread


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_on_tensor_cores_costs_no_more_than_bfloat16(case: tuple[int, ...], cache: str) -> None:
    for size in (1.0, 30.0):
        out, expected, spread = attend(case, cache, "auto", size)
        # Rounding q moves a score by up to 2^-9 of its magnitudes, and weights by as much again.
        assert_within(out, expected, 2.0**-6 * spread + TINY, f"queries of size {size}")


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("compute", ["auto", "exact"])
def test_attention_has_the_same_bits_in_any_order_of_turns(
    compute: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case in ((1, 300, 4, 2, 32), (20, 300, 4, 2, 16), (70, 70, 2, 1, 8)):
        whole = attend(case, cache, compute)[0]
        for order in ORDERS * 2:
            monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order)
            assert_same_bits(attend(case, cache, compute)[0], whole, order)


@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_attention_of_a_token_has_the_same_bits_in_prefill_chunks_batches_and_decode(cache: str, compute: str) -> None:
    rng = np.random.default_rng(3)
    length, heads, kv_heads, dim = 300, 4, 2, 24
    q = rng.standard_normal((1, length, heads, dim)).astype(np.float32)
    k, v = (rng.standard_normal((1, length, kv_heads, dim)).astype(np.float32) for _ in range(2))

    def run(tokens: int, last: int, copies: int = 1) -> Array:
        part = np.ascontiguousarray(np.repeat(q[:, last - tokens : last], copies, axis=0))
        keys, values = (np.ascontiguousarray(np.repeat(each[:, :last], copies, axis=0)) for each in (k, v))
        out = guarded_empty(part.shape)
        starts, lengths = np.zeros(copies, np.int32), np.full(copies, last, np.int32)
        # Keys of the second row are others, which must not matter.
        keys[1:] = -keys[1:]
        CUDA.backend.attention(part, keys, values, starts, lengths, 0.2, cache, out, compute)
        return out[:1]

    whole = run(length, length)
    for last, tokens, copies in itertools.product((1, 64, 65, 257, 300), (1, 3, 20), (1, 2)):
        if tokens <= last:
            assert_same_bits(run(tokens, last, copies), whole[:, last - tokens : last], f"{tokens} of {last}, {copies}")


def one_head_size(heads: int, kv_heads: int, head_dim: int) -> llama_ext.LlamaForCausalLM:
    config = llama_ext.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=80,
        initializer_range=0.3,
    )
    return llama_ext.LlamaForCausalLM(config, seed=5, device="cuda")


# Heads whose numbers a thread takes four at a time, and others; of int8 caches some of these are not taken so; groups that are not full.
HEADS = [(4, 2, 8), (9, 3, 16), (6, 1, 64), (10, 5, 80), (8, 8, 128), (2, 1, 256), (5, 5, 264), (4, 2, 6), (4, 2, 20)]


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_many_tokens_are_rotated_and_stored_with_the_bits_of_few(heads: tuple[int, int, int], cache: str) -> None:
    """From 32 tokens on another kernel does it; queries show in the second layer's keys."""
    model = one_head_size(*heads)
    ids = np.random.default_rng(8).integers(0, 40, 66).astype(np.int32)
    found = []
    for sizes in ([66], [22, 22, 22], [13, 53]):
        session = _core.Session(model._core, 80, cache)
        ends = np.cumsum(sizes)
        logits = [session.append(ids[end - size : end], "all") for size, end in zip(sizes, ends, strict=True)]
        found.append([np.concatenate(logits), *session.read_layer(0), *session.read_layer(1)])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert_same_bits(other, one)


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_where_keys_and_values_lie_does_not_change_what_is_stored(heads: tuple[int, int, int], cache: str) -> None:
    """Rows that do not begin at 16 bytes are read number by number."""
    kv_heads, head_dim = heads[1:]
    tokens, width = 37, kv_heads * head_dim
    rng = np.random.default_rng(9)
    k, v = (rng.standard_normal((tokens, width)).astype(np.float32) for _ in range(2))
    k[3], k[6], v[4, 0], v[5, -1] = 0, k[6] * 1e30, np.nan, np.inf
    session = _core.Session(one_head_size(*heads)._core, 80, cache)

    def stored(between: int, after: int) -> Any:
        """Columns of one array, which goes to the GPU as it is, with gaps beside them."""
        rows = np.full((tokens, width + between + width + after), np.nan, np.float32)
        of_k, of_v = rows[:, :width], rows[:, width + between :][:, :width]
        of_k[...], of_v[...] = k, v
        shape: tuple[int, ...] = (tokens, kv_heads, head_dim)
        views = of_k.reshape(shape), of_v.reshape(shape)
        assert all(np.shares_memory(each, rows) for each in views)
        session.restore(np.arange(tokens, dtype=np.int32), lambda _: views)
        return session.read_layer(1)

    aligned = stored(0, 0)
    for gaps in ((4, 8), (1, 3), (2, 2), (0, 1), (0, 2)):
        for one, other in zip(aligned, stored(*gaps), strict=True):
            assert_same_bits(other, one, gaps)


def test_a_half_precision_product_takes_activations_beyond_float16() -> None:
    rng = np.random.default_rng(4)
    made = weights(Kept("float16"), rng, 20, 96)
    matrix = made.on(CUDA.backend)
    for size in (1e-38, 1e-20, 1.0, 1e5, 1e30):
        x = (rng.standard_normal((9, 96)) * size).astype(np.float32)
        x[3] = 0
        expected, scale = numpy_ops.matmul(x, made.exact, None, None)
        # Half a unit of 11 bits, and of the row's largest number once more at the lower end of float16's range.
        largest = np.abs(x).max(axis=1, keepdims=True) * np.abs(made.exact).sum(axis=1)
        bound = (2.0**-11 + 2.0**-20) * scale + 2.0**-25 * largest + TINY * 96
        assert_within(multiply(x, matrix, "auto"), expected, bound, f"activations of size {size}")


def test_what_a_gpu_does_not_do_says_so(tmp_path: Path) -> None:
    backend = CUDA.backend
    arrays = [np.zeros((1, 1, 1, 2), np.float32) for _ in range(4)]
    with pytest.raises(DTypeError):
        backend.attention(*arrays[:3], np.zeros(1, np.int32), np.ones(1, np.int32), 1.0, "float16", arrays[3])
    matrix = _core.Backend("cpu").matrix(np.zeros((2, 2), np.float32))
    with pytest.raises(DeviceError, match="made by another Backend"):
        backend.matmul(np.zeros((1, 2), np.float32), matrix, None, np.zeros((1, 2), np.float32))
    config = llama_ext.LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"weights on a GPU cannot be saved packed\. Use device='cpu'"):
        llama_ext.LlamaForCausalLM(config, dtype="int8", device="cuda").save_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("columns", [32, 128])
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_few_rows_of_a_narrow_model_with_a_large_vocabulary_are_all_written(columns: int, rows: int) -> None:
    """So many outputs of so few inputs that a block has several tiles at a time."""
    rng = np.random.default_rng(7)
    matrix = rng.standard_normal((34_000, columns)).astype(np.float32)
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    found = multiply(x, CUDA.backend.matrix(matrix, "bfloat16"), "auto")
    rounded = [numpy_ops.from_bfloat16_bits(numpy_ops.bfloat16_bits(each)).astype(np.float64) for each in (x, matrix)]
    expected = rounded[0] @ rounded[1].T
    assert np.abs(found - expected).max() < 1e-4
