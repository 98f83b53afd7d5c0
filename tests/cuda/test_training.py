"""Training on a GPU where it may round: which operands do, the bits from run to run, attention on the tensor cores, sums over rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import numpy_ops
import numpy_training
from devices import CUDA, IS_EMULATED, only_emulated, requires_cuda
from guarded import guarded, guarded_empty, guarded_rows, guarded_rows_empty
from llama_ext import _core
from quantized import LAYOUTS, Kept, weights
from tolerances import TINY, assert_same_bits, assert_within, relative_rms, units

Array = npt.NDArray[Any]
pytestmark = [requires_cuda, pytest.mark.gpu]

ORDERS = ("forward", "backward", "shuffled") if IS_EMULATED else ("",)


@dataclass(frozen=True)
class Products:
    """y = x W^T + b and its gradients, all that was there before and what comes of it."""

    y: Array
    d_x: Array
    d_weight: Array
    d_bias: Array


@functools.cache
def operands(m: int, n: int, k: int) -> dict[str, Array]:
    rng = np.random.default_rng([m, n, k])
    shapes = {
        "x": (m, k), "weight": (n, k), "bias": (n,), "d_y": (m, n), "y": (m, n), "d_x": (m, k), "d_weight": (n, k),
        "d_bias": (n,),
    }  # fmt: skip
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def multiply(m: int, n: int, k: int, accumulate: bool, gap: int, kept: str = "float32") -> Products:
    p, backend = operands(m, n, k), CUDA.backend
    (y, y_gaps), (d_x, d_x_gaps) = guarded_rows_empty((m, n), gap), guarded_rows_empty((m, k), gap)
    if accumulate:
        y[...], d_x[...] = p["y"], p["d_x"]
    x, d_y = guarded_rows(p["x"], gap), guarded_rows(p["d_y"], gap)
    weight = backend.matrix(guarded(p["weight"]), kept)
    d_weight, d_bias = backend.matrix(p["d_weight"]), guarded(p["d_bias"])
    backend.matmul(x, weight, guarded(p["bias"]), y, accumulate, "bfloat16")
    backend.matmul_backward(d_y, weight, x, d_x, d_weight, d_bias, accumulate, "bfloat16")
    for gaps in (y_gaps, d_x_gaps):
        assert np.isnan(gaps).all(), "wrote between the rows"
    return Products(y, d_x, d_weight.to_array(), d_bias)


SHAPES = [
    (1, 1, 1), (1, 40, 70), (3, 33, 64), (4, 130, 31), (5, 31, 33), (32, 64, 96), (63, 65, 127), (64, 128, 32),
    (65, 66, 67), (129, 31, 200), (200, 130, 257), (7, 515, 40),
]  # fmt: skip


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_round_both_operands_once_and_sum_in_float32(shape: tuple[int, int, int], kept: str) -> None:
    m, n, k = shape
    accumulate, gap = (m + n) % 2 == 0, k % 4
    found = multiply(m, n, k, accumulate, gap, kept)
    p = operands(m, n, k)
    x, weight, d_y = (numpy_ops.as_kept(p[name], "bfloat16") for name in ("x", "weight", "d_y"))
    y, size = numpy_ops.matmul(x, weight, p["bias"], p["y"] if accumulate else None)
    assert_within(found.y, y, units("matmul") * size + TINY * k, "y")
    d_x, size = numpy_ops.matmul(d_y, weight.T, None, p["d_x"] if accumulate else None)
    assert_within(found.d_x, d_x, units("matmul_backward") * size + TINY * n, "d_x")
    d_weight, size = numpy_ops.matmul(d_y.T, x.T, None, p["d_weight"])
    assert_within(found.d_weight, d_weight, units("matmul_backward") * size + TINY * m, "d_weight")
    # A sum without products is not rounded.
    d_bias, size = p["d_bias"] + p["d_y"].sum(0, dtype=np.float64), np.abs(p["d_bias"]) + np.abs(p["d_y"]).sum(0)
    assert_within(found.d_bias, d_bias, units("matmul_backward") * size + TINY * m, "d_bias")


# M, N, K: one row, few and many; an N of no whole tile; a K of part of a group, and of several strips (of 256 in the emulator).
THROUGH_CODES = [(1, 1, 1), (3, 70, 33), (64, 130, 65), (65, 257, 5), (70, 33, 600), (9, 200, 521)]


@pytest.mark.parametrize("kept", [kept for kept in LAYOUTS if kept.name != "float16"], ids=str)
def test_products_of_training_with_frozen_codes_round_both_operands(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, (m, n, k) in enumerate(THROUGH_CODES):
        rng = np.random.default_rng([m, n, k])
        made = weights(kept, rng, n, kept.columns(k))
        width = made.exact.shape[1]
        matrix = made.on(CUDA.backend)
        d_y, before = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, n), (m, width)))
        accumulate, gap = index % 2 == 1, index % 4

        def gradient(  # of the values of this turn
            d_y: Array = d_y,
            matrix: Any = matrix,
            before: Array = before,
            accumulate: bool = accumulate,
            gap: int = gap,
        ) -> Array:
            d_x, gaps = guarded_rows_empty((len(d_y), matrix.shape[1]), gap)
            if accumulate:
                d_x[...] = before[: len(d_y)]
            CUDA.backend.matmul_backward(guarded_rows(d_y, gap), matrix, None, d_x, None, None, accumulate, "bfloat16")
            assert np.isnan(gaps).all(), "wrote between the rows"
            return d_x

        found = gradient()
        expected, size = numpy_ops.matmul(
            numpy_ops.as_kept(d_y, "bfloat16"), made.unpacked().T, None, before if accumulate else None
        )
        assert_within(found, expected, units("matmul_backward") * size + TINY * n, f"d_x of {m} x {n} x {width}")
        assert_same_bits(gradient(d_y[: m // 2 + 1]), np.ascontiguousarray(found[: m // 2 + 1]), "fewer rows")
        for order in ORDERS:
            monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order)
            assert_same_bits(gradient(), found, order)


def test_products_have_the_same_bits_again_and_in_any_order_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((3, 70, 33), (70, 130, 65)):
        whole = multiply(*shape, True, 1)
        for order in ORDERS * 2:
            monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order)
            found = multiply(*shape, True, 1)
            for name in ("y", "d_x", "d_weight", "d_bias"):
                assert_same_bits(getattr(found, name), getattr(whole, name), f"{name} of {shape}, {order}")


def test_a_row_of_a_rounded_product_depends_on_nothing_but_itself() -> None:
    p, backend = operands(140, 45, 330), CUDA.backend
    weight = backend.matrix(p["weight"])

    def run(first: int, rows: int) -> Array:
        out = guarded_empty((rows, 45))
        backend.matmul(guarded(p["x"][first : first + rows]), weight, None, out, False, "bfloat16")
        return out

    whole = run(0, 140)
    for first, rows in ((0, 1), (2, 3), (0, 4), (0, 5), (3, 16), (60, 64), (60, 65), (1, 128)):
        assert_same_bits(run(first, rows), whole[first : first + rows], f"{rows} rows")


def test_each_gradient_of_a_product_may_be_asked_for_alone() -> None:
    m, n, k = 37, 66, 50
    p, backend, all_of_them = operands(m, n, k), CUDA.backend, multiply(37, 66, 50, False, 0)
    d_x, d_weight = guarded_empty((m, k)), backend.matrix(p["d_weight"])
    backend.matmul_backward(guarded(p["d_y"]), backend.matrix(p["weight"]), None, d_x, None, None, False, "bfloat16")
    assert_same_bits(d_x, all_of_them.d_x)
    backend.matmul_backward(guarded(p["d_y"]), None, guarded(p["x"]), None, d_weight, None, False, "bfloat16")
    assert_same_bits(d_weight.to_array(), all_of_them.d_weight)


# Attention on the tensor cores. Ranges, rows, heads, key/value heads, dimensions, dropout: the ends of tiles (64 tokens; 32 queries of
# heads beyond 64), of heads in registers (64, 128), groups of heads, several sequences, and a head that is too wide for it.
Attention = tuple[tuple[tuple[int, int], ...], int, int, int, int, float]
ATTENTION: list[Attention] = [
    (((0, 1),), 1, 1, 1, 1, 0.0),
    (((0, 63),), 63, 2, 1, 64, 0.0),
    (((0, 64),), 64, 4, 2, 16, 0.0),
    (((0, 65),), 65, 2, 1, 65, 0.0),
    (((0, 129),), 129, 3, 1, 40, 0.3),
    (((0, 97),), 97, 2, 2, 128, 0.0),
    (((0, 130),), 130, 2, 1, 80, 0.2),
    (((3, 70), (80, 33), (113, 1), (120, 50)), 180, 4, 2, 24, 0.0),
    (((100, 65), (0, 0), (2, 66)), 170, 6, 3, 8, 0.5),
    (tuple((3 * i, 2) for i in range(140)), 420, 1, 1, 4, 0.0),
    (((0, 40),), 40, 2, 1, 160, 0.0),
]


def attend(case: Attention, gap: int = 3, backend: _core.Backend | None = None) -> list[Array]:
    """y, d_q, d_k and d_v; NaN in the rows of no sequence."""
    backend = backend or CUDA.backend
    ranges, rows, heads, _, dim, dropout = case
    q, k, v, d_y = attention_operands(case)
    scale = 1.5 * dim**-0.5
    outputs = [guarded_rows_empty(shape, gap) for shape in (q.shape, q.shape, k.shape, k.shape)]
    (y, _), (d_q, _), (d_k, _), (d_v, _) = outputs
    log_sums = guarded_empty((rows, heads))
    q, k, v, d_y = (guarded_rows(each, gap) for each in (q, k, v, d_y))
    backend.causal_attention(ranges, q, k, v, scale, y, log_sums, dropout, 99, "bfloat16")
    backend.causal_attention_backward(ranges, q, k, v, scale, y, log_sums, d_y, d_q, d_k, d_v, dropout, 99, "bfloat16")
    for _, gaps in outputs:
        assert np.isnan(gaps).all(), "wrote between the rows"
    return [y, d_q, d_k, d_v]


@functools.cache
def attention_operands(case: Attention) -> tuple[Array, Array, Array, Array]:
    ranges, rows, heads, kv_heads, dim, _ = case
    rng = np.random.default_rng([rows, heads, kv_heads, dim, len(ranges)])
    q, k, v, d_y = (
        rng.standard_normal((rows, count, dim)).astype(np.float32) for count in (heads, kv_heads, kv_heads, heads)
    )
    return q, k, v, d_y


def exact_attention(case: Attention) -> list[Array]:
    """The same in float64, of operands that nobody rounded."""
    ranges, _, _, _, dim, dropout = case
    q, k, v, d_y = attention_operands(case)
    scale = 1.5 * dim**-0.5
    y = numpy_training.causal_attention(q, k, v, ranges, scale, dropout, 99).y
    return [y, *numpy_training.causal_attention_gradients(q, k, v, d_y, ranges, scale, dropout, 99)]


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_and_its_gradients_on_tensor_cores_cost_no_more_than_bfloat16(case: Attention) -> None:
    mine = np.zeros(case[1], bool)
    for begin, count in case[0]:
        mine[begin : begin + count] = True
    for name, found, exact in zip(("y", "d_q", "d_k", "d_v"), attend(case), exact_attention(case), strict=True):
        assert np.isnan(found[~mine]).all(), f"{name}: wrote to rows of no sequence"
        if np.abs(exact[mine]).max() < 1e-9:  # of a single token, whose weight is always 1
            assert np.abs(found[mine]).max() < 2.0**-7 * case[4]
        else:
            # Four operands of 8 bits in each sum; wrong masks, tiles or heads are off by as much as the numbers themselves.
            assert relative_rms(found[mine], exact[mine]) < 2.0**-6, name


def test_attention_has_the_same_bits_again_in_any_order_of_turns_and_among_other_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for case in (ATTENTION[7], ATTENTION[6]):
        whole = attend(case)
        for order in ORDERS * 2:
            monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order)
            for name, found, expected in zip(["y", "d_q", "d_k", "d_v"], attend(case, gap=0), whole, strict=True):
                assert_same_bits(np.ascontiguousarray(found), np.ascontiguousarray(expected), f"{name}, {order}")


@only_emulated
@pytest.mark.parametrize("capability", [80, 86, 120])
def test_cards_with_less_shared_memory_give_the_same_gradients_of_attention(
    monkeypatch: pytest.MonkeyPatch, capability: int
) -> None:
    cases = (ATTENTION[5], ATTENTION[6], ATTENTION[7])
    expected = [attend(case) for case in cases]
    monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_CAPABILITY", str(capability))
    other = _core.Backend("cuda")
    for case, whole in zip(cases, expected, strict=True):
        for name, found, same in zip(["y", "d_q", "d_k", "d_v"], attend(case, backend=other), whole, strict=True):
            assert_same_bits(np.ascontiguousarray(found), np.ascontiguousarray(same), name)


def test_rounding_heads_reads_and_writes_no_byte_beyond_its_arrays() -> None:
    for side in ("end", "start"):
        for tokens, heads, kv_heads, dim in ((1, 1, 1, 1), (33, 2, 1, 31), (65, 2, 2, 9), (20, 4, 2, 100)):
            rng = np.random.default_rng(dim)
            shapes = ((tokens, heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, dim), (tokens, heads, dim))
            q, k, v, d_y = (guarded(rng.random(shape, np.float32), side) for shape in shapes)
            y, d_q = (guarded_empty(q.shape, side=side) for _ in range(2))
            d_k, d_v = (guarded_empty(k.shape, side=side) for _ in range(2))
            log_sums = guarded_empty((tokens, heads), side=side)
            ranges = ((0, tokens),)
            CUDA.backend.causal_attention(ranges, q, k, v, 0.3, y, log_sums, 0.0, 0, "bfloat16")
            CUDA.backend.causal_attention_backward(
                ranges, q, k, v, 0.3, y, log_sums, d_y, d_q, d_k, d_v, 0.0, 0, "bfloat16"
            )
            for each in (y, log_sums, d_q, d_k, d_v):
                assert np.isfinite(each).all()


@pytest.mark.parametrize("width", [1, 3, 32, 100, 1000, 1028, 2048, 4096, 4100, 8192, 8196])
def test_gradients_of_a_norm_are_right_at_every_width_that_registers_hold(width: int) -> None:
    rng = np.random.default_rng(width)
    for rows in (1, 15, 16, 17, 35):
        x, d_y, d_x = (rng.standard_normal((rows, width)).astype(np.float32) for _ in range(3))
        weight, d_weight = (rng.standard_normal(width).astype(np.float32) for _ in range(2))
        for accumulate in (False, True):
            out, sums = guarded(d_x), guarded(d_weight)
            CUDA.backend.rms_norm_backward(guarded(x), guarded(weight), 1e-5, guarded(d_y), out, accumulate, sums)
            wide = x.astype(np.float64)
            inverse = 1 / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5)
            product = weight.astype(np.float64) * d_y
            before = d_x if accumulate else np.zeros_like(d_x)
            mean = (product * wide).mean(axis=1, keepdims=True)
            size = np.abs(before) + inverse * (
                np.abs(product) + np.abs(wide) * inverse**2 * np.abs(product * wide).mean()
            )
            bound = (units("rms_norm_backward") + width**0.5 * 2.0**-24) * (size + np.abs(before)) + TINY
            assert_within(out, before + inverse * (product - wide * inverse**2 * mean), bound, f"d_x of {rows} rows")
            parts = d_y * wide * inverse
            bound = units("rms_norm_backward") * (np.abs(d_weight) + np.abs(parts).sum(axis=0)) * (1 + width**0.5 / 8)
            assert_within(sums, d_weight + parts.sum(axis=0), bound + TINY, f"d_weight of {rows} rows")


@pytest.mark.parametrize("rows", [1, 8, 255, 256, 257, 700])
def test_a_bias_gets_the_sum_of_all_rows(rows: int) -> None:
    for width in (1, 31, 33):
        d_y = np.random.default_rng(rows).standard_normal((rows, width)).astype(np.float32)
        d_bias = guarded(np.ones(width, np.float32))
        CUDA.backend.matmul_backward(guarded(d_y), None, None, None, None, d_bias)
        bound = units("matmul_backward") * (1 + np.abs(d_y).sum(axis=0))
        assert_within(d_bias, 1 + d_y.sum(axis=0, dtype=np.float64), bound)


def test_rows_of_the_same_id_are_added_in_their_order() -> None:
    rng = np.random.default_rng(5)
    for count, vocabulary in ((1, 3), (40, 5), (600, 7), (1100, 2000)):
        ids = rng.integers(0, vocabulary, count).astype(np.int32)
        d_y = (rng.standard_normal((count, 70)) * 10.0 ** rng.integers(-3, 4, (count, 1))).astype(np.float32)
        start = rng.standard_normal((vocabulary, 70)).astype(np.float32)
        table = CUDA.backend.matrix(start)
        CUDA.backend.embedding_backward(guarded(ids), guarded(d_y), table)
        expected = start.copy()
        for t, token in enumerate(ids):
            expected[token] += d_y[t]
        assert_same_bits(table.to_array(), expected, f"{count} tokens")
