"""matmul with float16 and quantised weights: every encoding on every tier, against the exact weights in float64."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import numpy_ops
from devices import CPU, CUDA, ISAS, REFERENCE, Device, all_devices, each_isa, each_tier_and_thread_count, requires_cuda
from guarded import guarded, guarded_empty, guarded_rows, guarded_rows_empty
from llama_ext import _core
from quantized import (
    ALL,
    LAYOUTS,
    MOST_ROWS_OF_CODES,
    Kept,
    Weights,
    each_kept,
    each_layout,
    gpu_rounding_bound,
    largest,
    rounding_bound,
    weights,
)
from tolerances import TINY, U32, assert_same_bits, assert_within, relative_rms, units

Array = npt.NDArray[Any]
each_compute = pytest.mark.parametrize("compute", ["auto", "exact"])


@dataclass(frozen=True)
class Shape:
    n: int
    k: int
    rows: tuple[int, ...]  # each of these many rows of x


def _shapes() -> list[Shape]:
    # Tiles have up to 16 rows; a task at most 512.
    shapes = [Shape(67, 161, (*range(20), 23, 24, 25, 31, 32, 33, 49, 64, 168, 513))]
    columns = (0, 1, 2, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 95, 97, 127, 129, 257)
    shapes += [Shape(n, 70, (1, 3)) for n in columns]
    # Strips of 32, groups of up to 128, superblocks of 256, blocks of 512.
    depths = (0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 130, 191, 193)
    depths += (255, 256, 257, 383, 384, 385, 511, 512, 513, 767, 769, 1023, 1024, 1025, 1537, 2053)
    shapes += [Shape(33, k, (1, 2, 5)) for k in depths]
    shapes += [Shape(14336, 5, (1, 2)), Shape(17, 14336, (2, 5, 17)), Shape(131, 1061, (1, 17, 40))]
    return shapes


SHAPES = _shapes()


@functools.lru_cache(maxsize=len(SHAPES))
def problem(kept: Kept, shape: Shape) -> tuple[Array, Weights, Array, Array, Array]:
    """x for the most rows there are, the weights, the exact product and the bounds of float32 sums and of int8 rounding."""
    rng = np.random.default_rng([shape.n, shape.k])
    k = kept.columns(shape.k)
    made = weights(kept, rng, shape.n, k)
    x = rng.standard_normal((max(shape.rows), k)).astype(np.float32)
    expected, scale = numpy_ops.matmul(x, made.exact, None, None)
    return x, made, expected, units("matmul") * scale + TINY * k, rounding_bound(x, made.exact)


def multiply(
    backend: _core.Backend, x: Array, matrix: _core.Matrix, compute: str, gap: int = 0, out: Array | None = None
) -> Array:
    """Into NaNs, unless there is an `out` to add to; nothing may be touched beside the arrays."""
    target, gaps = guarded_rows_empty((len(x), matrix.shape[0]), gap)
    if out is not None:
        target[...] = out
    backend.matmul(guarded_rows(x, gap), matrix, None, target, out is not None, compute)
    assert np.isnan(gaps).all(), "wrote between the rows"
    return target


def exact_claim(k: int) -> float:
    """What the package claims of float32 products; a chain of sums drifts with sqrt(K), whatever its weights are kept as."""
    return 2e-6 if k <= 8192 else 4e-6


def check_shapes(device: Device, kept: Kept, shapes: list[Shape]) -> None:
    backend = device.backend
    # Of all results that came of rounded activations: a few numbers by themselves may all be near zero.
    error, size = 0.0, 0.0
    for index, shape in enumerate(shapes):
        if kept.is_gguf and (shape.k == 0 or shape.n > 1000):
            continue  # no block, or too many of those that are mostly padding
        x, made, expected, sums, rounding = problem(kept, shape)
        if device.is_cuda:
            # A group's codes are summed as whole numbers, and scaled then.
            sums = units("matmul") * (np.abs(x.astype(np.float64)) @ made.factored_magnitude().T) + TINY * x.shape[1]
        matrix = made.on(backend)
        assert matrix.shape == made.exact.shape
        for compute, rows in itertools.product(("auto", "exact"), shape.rows):
            rounds = kept.rounds_activations(device.isa, compute)
            what = f"{compute}, {rows} x {made.exact.shape}"
            result = multiply(backend, x[:rows], matrix, compute, gap=index % 3)
            rounded = gpu_rounding_bound(kept, x[:rows], made.exact) if device.is_cuda else rounding[:rows]
            limit = sums[:rows] + rounded if rounds else sums[:rows]
            assert_within(result, expected[:rows], limit, what)
            if result.size < 32 or x.shape[1] == 0:
                continue
            if rounds:
                error += float(np.sum((result - expected[:rows]) ** 2)) / x.shape[1]
                size += float(np.sum(expected[:rows] ** 2)) / x.shape[1]
            else:
                assert relative_rms(result, expected[:rows]) < exact_claim(x.shape[1]), what
    assert error <= 1e-2**2 * size


@each_tier_and_thread_count
@each_layout
def test_quantized_matmul_matches_float64(device: Device, kept: Kept) -> None:
    check_shapes(device, kept, SHAPES)


@pytest.mark.gpu
@requires_cuda
@each_kept
def test_quantized_matmul_of_a_gpu_matches_float64(kept: Kept) -> None:
    # All rows of the first shape, and of the others every fifth, so that an emulated GPU is done in time.
    first = SHAPES[0]
    rows = first.rows if kept in LAYOUTS else first.rows[::4]
    offset = ALL.index(kept) % 5
    check_shapes(CUDA, kept, [Shape(first.n, first.k, rows), *SHAPES[1 + offset :: 5]])


# M, N, K: the first number of rows with which weights are unpacked, a strip of 256 rows (or, where K is small, of 512) at a time in the
# emulator; a last strip of a few rows, of one; a K of part of a group, of one group, and of some.
UNPACKED = [(33, 9, 5), (66, 1, 32), (129, 257, 70), (65, 600, 130), (70, 1030, 33), (67, 521, 300)]


@pytest.mark.gpu
@requires_cuda
@each_kept
def test_many_rows_of_a_gpu_meet_weights_rounded_to_bfloat16(kept: Kept) -> None:
    if kept.name == "float16":
        pytest.skip("float16 weights are multiplied as they are")
    for index, (m, n, k) in enumerate(UNPACKED):
        if index > 1 and kept not in LAYOUTS and index % 3 != ALL.index(kept) % 3:
            continue  # other groups and blocks: so that an emulated GPU is done in time
        rng = np.random.default_rng([m, n, k])
        made = weights(kept, rng, n, kept.columns(k))
        x = rng.standard_normal((m, made.exact.shape[1])).astype(np.float32)
        bias = rng.standard_normal(n).astype(np.float32)
        before = rng.standard_normal((m, n)).astype(np.float32)
        matrix = made.on(CUDA.backend)
        rounded = numpy_ops.as_kept(x, "bfloat16")
        expected, size = numpy_ops.matmul(rounded, made.unpacked(), None, None)
        found = multiply(CUDA.backend, x, matrix, "auto", gap=index % 3)
        assert_within(found, expected, units("matmul") * size + TINY * k, f"{m} x {n} x {k}")
        assert_same_bits(multiply(CUDA.backend, x, matrix, "bfloat16"), found, "as in training")
        # A row and a column have the same bits among any others, if rows are many.
        assert_same_bits(multiply(CUDA.backend, x[-33:], matrix, "auto"), found[-33:], "fewer rows")
        first = n // 2
        some = multiply(CUDA.backend, x, made.rows(first, n).on(CUDA.backend), "auto")
        assert_same_bits(some, np.ascontiguousarray(found[:, first:]), "fewer columns")
        # And up to 32 rows meet the codes as they are.
        few = multiply(CUDA.backend, x[:MOST_ROWS_OF_CODES], matrix, "auto")
        sums = units("matmul") * (np.abs(rounded) @ made.factored_magnitude().T) + TINY * k
        as_they_are = (rounded @ made.exact.T)[:MOST_ROWS_OF_CODES]
        assert_within(few, as_they_are, sums[:MOST_ROWS_OF_CODES], f"{MOST_ROWS_OF_CODES} x {n} x {k}")

        out = guarded(before)
        CUDA.backend.matmul(guarded(x), matrix, guarded(bias), out, True, "auto")
        expected, size = numpy_ops.matmul(rounded, made.unpacked(), bias, before)
        assert_within(out, expected, units("matmul") * size + TINY * k, f"a bias and a residual, {m} x {n} x {k}")


@each_layout
@pytest.mark.parametrize("device", [REFERENCE, *CPU[::3]], ids=str)
def test_quantized_matmul_of_training_is_exact_on_a_cpu(device: Device, kept: Kept) -> None:
    """Gradients are those of the numbers that codes stand for."""
    if kept.name == "float16":
        pytest.skip("no codes")
    rng = np.random.default_rng(11)
    made = weights(kept, rng, 35, kept.columns(200))
    x = rng.standard_normal((9, made.exact.shape[1])).astype(np.float32)
    matrix = made.on(device.backend)
    exact = multiply(device.backend, x, matrix, "exact")
    assert_same_bits(multiply(device.backend, x, matrix, "bfloat16"), exact)


@each_isa
@pytest.mark.parametrize("kept", [kept for kept in ALL if kept not in LAYOUTS], ids=str)
def test_quantized_matmul_matches_float64_with_any_group_and_block(isa: str, kept: Kept) -> None:
    check_shapes(Device(isa, 2), kept, SHAPES[::3])


@each_kept
def test_quantized_matmul_of_the_reference_matches_float64(kept: Kept) -> None:
    check_shapes(REFERENCE, kept, [shape for shape in SHAPES[1:] if shape.n * shape.k < 20_000][::4])


@each_layout
@all_devices
def test_quantized_matmul_adds_a_bias_and_a_residual(device: Device, kept: Kept) -> None:
    rng = np.random.default_rng(1)
    made = weights(kept, rng, 67, kept.columns(150))
    x = rng.standard_normal((9, made.exact.shape[1])).astype(np.float32)
    bias = rng.standard_normal(67).astype(np.float32)
    before = rng.standard_normal((9, 67)).astype(np.float32)
    matrix = made.on(device.backend)
    for compute in ("auto", "exact"):
        expected, scale = numpy_ops.matmul(x, made.exact, bias, before)
        out = guarded(before)
        device.backend.matmul(guarded(x), matrix, guarded(bias), out, True, compute)
        bound = units("matmul") * scale
        if kept.rounds_activations(device.isa, compute):
            bound = bound + rounding_bound(x, made.exact)
        assert_within(out, expected, bound, compute)


@each_compute
@each_layout
@each_isa
def test_quantized_matmul_of_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(
    isa: str, kept: Kept, compute: str
) -> None:
    rng = np.random.default_rng(7)
    made = weights(kept, rng, 131, kept.columns(700))
    x = rng.standard_normal((181, made.exact.shape[1])).astype(np.float32)
    alone = Device(isa, 1).backend
    whole = multiply(alone, x, made.on(alone), compute)
    for threads in (1, 2, 3, 4):
        backend = Device(isa, threads).backend
        matrix = made.on(backend)
        assert_same_bits(multiply(backend, x, matrix, compute), whole, f"{threads} threads")
        for rows in (*range(1, 18), 24, 33, 168):
            first = 3 * (rows % 2)
            result = multiply(backend, x[first : first + rows], matrix, compute)
            assert_same_bits(result, whole[first : first + rows], f"{rows} rows, {threads} threads")


@each_compute
@each_layout
@each_isa
def test_quantized_matmul_of_a_column_has_the_same_bits_among_any_others(isa: str, kept: Kept, compute: str) -> None:
    rng = np.random.default_rng(8)
    made = weights(kept, rng, 140, kept.columns(300))
    x = rng.standard_normal((5, made.exact.shape[1])).astype(np.float32)
    one, two = Device(isa, 1).backend, Device(isa, 2).backend
    whole = multiply(one, x, made.on(one), compute)
    for columns in (1, 15, 16, 17, 31, 32, 33, 129):
        some = multiply(two, x, made.rows(3, 3 + columns).on(two), compute)
        assert_same_bits(some, np.ascontiguousarray(whole[:, 3 : 3 + columns]), f"{columns} columns")


@each_compute
@each_kept
@pytest.mark.skipif("avx2-vnni" not in ISAS, reason="this machine does not have avx2-vnni")
def test_quantized_matmul_has_the_same_bits_with_and_without_vpdpbusd(kept: Kept, compute: str) -> None:
    """Vectors are equally wide, whole numbers have one sum, and float32 totals are made in one order."""
    rng = np.random.default_rng(10)
    made = weights(kept, rng, 71, kept.columns(700))
    x = rng.standard_normal((40, made.exact.shape[1])).astype(np.float32)
    without, with_it = Device("avx2", 2).backend, Device("avx2-vnni", 2).backend
    for rows in (*range(1, 8), 40):
        expected = multiply(without, x[:rows], made.on(without), compute)
        assert_same_bits(multiply(with_it, x[:rows], made.on(with_it), compute), expected, f"{rows} rows")


@each_compute
@each_layout
@each_isa
def test_quantized_matmul_never_makes_nan_or_infinity_finite(isa: str, kept: Kept, compute: str) -> None:
    rng = np.random.default_rng(9)
    backend = Device(isa, 2).backend
    made = weights(kept, rng, 37, kept.columns(300))
    last = made.exact.shape[1] - 1
    x = rng.standard_normal((35, last + 1)).astype(np.float32)
    x[4, last], x[5, 0], x[20, 130], x[34, 31] = np.nan, np.nan, np.inf, -np.inf
    matrix = made.on(backend)
    marred = {4: last, 5: 0, 20: 130, 34: 31}
    result = multiply(backend, x, matrix, compute)
    for row, column in marred.items():
        lost = np.isfinite(result[row]) & (made.exact[:, column] != 0)
        assert not lost.any(), row
        assert_same_bits(multiply(backend, x[row : row + 1], matrix, compute)[0], result[row], row)
    others = np.delete(np.arange(35), list(marred))
    assert_same_bits(result[others], multiply(backend, np.ascontiguousarray(x[others]), matrix, compute))


def _activations(name: str, rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    x = rng.standard_normal(shape).astype(np.float32)
    if name == "zero":
        x[...] = 0
    elif name == "an outlier":
        x[:, 77] = 1e6
    elif name == "an outlier alone":
        x[...] = 0
        x[:, 5] = -3e30
    elif name == "denormals":
        x *= np.float32(1e-40)
    elif name == "next to nothing":
        x *= np.float32(1e-29)
    elif name == "one number":
        x[...] = np.float32(0.3)
    return x


@pytest.mark.parametrize(
    "name", ["zero", "an outlier", "an outlier alone", "denormals", "next to nothing", "one number"]
)
@each_layout
@each_isa
def test_quantized_matmul_of_uncommon_activations_stays_within_half_a_step(isa: str, kept: Kept, name: str) -> None:
    rng = np.random.default_rng(10)
    device = Device(isa, 1)
    made = weights(kept, rng, 35, kept.columns(200))
    x = _activations(name, rng, (7, made.exact.shape[1]))
    expected, scale = numpy_ops.matmul(x, made.exact, None, None)
    matrix = made.on(device.backend)
    for compute in ("auto", "exact"):
        # The bound that holds for any numbers: here roundings may all go one way.
        bound = (x.shape[1] + 4) * U32 * scale + TINY * x.shape[1] * np.abs(made.exact).max()
        if kept.rounds_activations(device.isa, compute):
            bound = bound + rounding_bound(x, made.exact)
        result = multiply(device.backend, x, matrix, compute)
        assert_within(result, expected, bound, compute)
        assert name != "zero" or not result.any()


@pytest.mark.parametrize("sign", [1, -1])
@each_kept
@each_isa
def test_quantized_matmul_of_the_largest_codes_and_activations_does_not_overflow(
    isa: str, kept: Kept, sign: int
) -> None:
    device = Device(isa, 1)
    made = largest(kept, 35, kept.columns(256))
    x = np.full((8, made.exact.shape[1]), sign * 0.3, np.float32)  # 127 when rounded
    expected, scale = numpy_ops.matmul(x, made.exact, None, None)
    result = multiply(device.backend, x, made.on(device.backend), "auto")
    assert_within(result, expected, (x.shape[1] + 4) * U32 * scale, str(kept))


@pytest.mark.parametrize("side", ["end", "start"])
@each_kept
@pytest.mark.parametrize("device", [REFERENCE, *CPU[::3]], ids=str)
def test_quantized_matmul_touches_no_byte_before_or_after_its_arrays(device: Device, kept: Kept, side: Any) -> None:
    rng = np.random.default_rng(3)
    backend = device.backend
    for m, n, k in [(1, 1, 1), (1, 17, 33), (6, 33, 31), (14, 31, 65), (15, 65, 129), (33, 3, 7)]:
        made = weights(kept, rng, n, kept.columns(k))
        source = guarded(made.source, side)
        if kept.is_gguf:
            matrix = backend.block_matrix(source, kept.name, made.exact.shape[1])
        else:
            matrix = backend.matrix(source, kept.name, kept.group)
        x = guarded(rng.random((m, made.exact.shape[1]), np.float32), side)
        for compute in ("auto", "exact"):
            out = guarded_empty((m, n), side=side)
            backend.matmul(x, matrix, guarded(rng.random(n, np.float32), side), out, False, compute)
            assert not np.isnan(out).any()
