"""feed_forward with float16 and quantised weights: gate and up as one matrix, or apart and each kept in its own way."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import numpy_ops
from devices import CUDA, Device, all_devices, each_isa, requires_cuda
from guarded import guarded, guarded_rows, guarded_rows_empty
from llama_ext import DTypeError, ShapeError, _core
from quantized import ALL, OURS, Kept, Weights, weights
from tolerances import assert_same_bits, relative_rms

Array = npt.NDArray[Any]

# Three products in a row, each of which may be 1e-2 off, and activations whose outliers SwiGLU makes larger.
CLAIM = {"auto": 3e-2, "exact": 3e-6}


@dataclass(frozen=True)
class Kinds:
    """How gate, up and down are kept."""

    gate: Kept
    up: Kept
    down: Kept

    def __str__(self) -> str:
        return f"{self.gate}+{self.up}+{self.down}"


APART = [
    Kinds(Kept("int4", 32), Kept("int8", 64), Kept("int4_min", 128)),
    Kinds(Kept("int8_min", 32), Kept("int8", 32), Kept("int8", 128)),
    Kinds(Kept("Q4_K"), Kept("Q6_K"), Kept("Q5_K")),
    Kinds(Kept("Q5_1"), Kept("Q4_0"), Kept("Q8_0")),
    Kinds(Kept("Q4_1"), Kept("Q5_0"), Kept("float16")),
    Kinds(Kept("int5", 64), Kept("float16"), Kept("Q6_K")),
    Kinds(Kept("int5_min", 128), Kept("int4", 128), Kept("int5", 32)),
]
# M, C, F: rows around the height of a tile, F around gate groups and panels.
SHAPES = [(m, 33, 50) for m in (0, 1, 2, 3, 5, 6, 7, 8, 12, 13, 16, 17, 33, 169)]
SHAPES += [(3, 70, f) for f in (1, 15, 16, 17, 31, 32, 33, 49, 65, 257)]
SHAPES += [(2, 9, 14336), (40, 130, 300), (5, 257, 531), (513, 20, 40)]
SMALL_SHAPES = [(1, 33, 50), (7, 257, 300), (17, 300, 33), (3, 256, 512)]


@dataclass(frozen=True)
class Problem:
    x: Array
    gate: Weights
    up: Weights
    down: Weights
    gate_bias: Array
    up_bias: Array
    residual: Array
    expected: Array


@functools.lru_cache(maxsize=64)
def problem(kinds: Kinds, shape: tuple[int, int, int]) -> Problem:
    rng = np.random.default_rng(shape)
    m, wanted_c, wanted_f = shape
    c = max(kinds.gate.columns(wanted_c), kinds.up.columns(wanted_c))
    f = kinds.down.columns(wanted_f)
    x = rng.standard_normal((m, c)).astype(np.float32)
    gate, up = (weights(kind, rng, f, c, c**-0.5) for kind in (kinds.gate, kinds.up))
    down = weights(kinds.down, rng, c, f, f**-0.5)
    gate_bias, up_bias = rng.standard_normal((2, f)).astype(np.float32)
    residual = rng.standard_normal((m, c)).astype(np.float32)
    z, _ = numpy_ops.matmul(x, gate.exact, gate_bias, None)
    hidden = numpy_ops.silu(z) * numpy_ops.matmul(x, up.exact, up_bias, None)[0]
    expected, _ = numpy_ops.matmul(hidden, down.exact, None, residual)
    return Problem(x, gate, up, down, gate_bias, up_bias, residual, expected)


def run(backend: _core.Backend, p: Problem, compute: str, *, is_one: bool, rows: slice = slice(None)) -> Array:
    gate_up: Any
    if is_one:
        gate_up = backend.gate_up_matrix(
            guarded(p.gate.source), guarded(p.up.source), p.gate.kept.name, p.gate.kept.group
        )
    else:
        gate_up = (p.gate.on(backend), p.up.on(backend))
    x = p.x[rows]
    out, gaps = guarded_rows_empty(x.shape, 3)
    out[...] = p.residual[rows]
    biases = guarded(p.gate_bias), guarded(p.up_bias)
    backend.feed_forward(guarded_rows(x, 2), gate_up, *biases, p.down.on(backend), None, out, True, compute)
    assert np.isnan(gaps).all(), "wrote between the rows"
    return out


def check(device: Device, kinds: Kinds, shape: tuple[int, int, int], *, is_one: bool) -> None:
    p = problem(kinds, shape)
    for compute in ("auto", "exact"):
        result = run(device.backend, p, compute, is_one=is_one)
        assert result.shape == p.expected.shape
        assert np.isfinite(result).all()
        if result.size:
            rounds = any(each.kept.rounds_activations(device.isa, compute) for each in (p.gate, p.up, p.down))
            assert relative_rms(result, p.expected) < CLAIM["auto" if rounds else "exact"], (compute, shape)


@each_isa
@pytest.mark.parametrize("kept", [kept for kept in OURS if kept.group in (0, 64)], ids=str)
def test_quantized_feed_forward_matches_float64(isa: str, kept: Kept) -> None:
    for index, shape in enumerate(SHAPES):
        check(Device(isa, 1 + index % 3), Kinds(kept, kept, kept), shape, is_one=True)


@all_devices
@pytest.mark.parametrize("kept", [kept for kept in OURS if kept.group not in (0, 64)], ids=str)
def test_quantized_feed_forward_matches_float64_with_any_group(device: Device, kept: Kept) -> None:
    for shape in SMALL_SHAPES:
        check(device, Kinds(kept, kept, kept), shape, is_one=True)


@all_devices
@pytest.mark.parametrize("kinds", APART, ids=str)
def test_feed_forward_takes_gate_and_up_apart_and_kept_in_different_ways(device: Device, kinds: Kinds) -> None:
    for shape in (*SMALL_SHAPES, (0, 64, 64), (33, 64, 257)):
        check(device, kinds, shape, is_one=False)


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize("kept", [kept for kept in ALL if kept.group in (0, 64) and kept.name != "float16"], ids=str)
def test_many_rows_of_a_gpu_meet_feed_forward_weights_rounded_to_bfloat16(kept: Kept) -> None:
    """Also in strips, whose hidden numbers are columns of one array, and with hidden numbers that end within a scale."""
    for shape in ((65, 33, 50), (70, 130, 531), (66, 256, 300)):
        p = problem(Kinds(kept, kept, kept), shape)
        x = numpy_ops.as_kept(p.x, "bfloat16")
        z, _ = numpy_ops.matmul(x, p.gate.unpacked(), p.gate_bias, None)
        hidden = numpy_ops.silu(z) * numpy_ops.matmul(x, p.up.unpacked(), p.up_bias, None)[0]
        rounded = numpy_ops.as_kept(hidden.astype(np.float32), "bfloat16")
        expected, _ = numpy_ops.matmul(rounded, p.down.unpacked(), None, p.residual)
        for is_one in (False,) if kept.is_gguf else (True, False):
            found = run(CUDA.backend, p, "auto", is_one=is_one)
            # A hidden number in a thousand lies so near to the middle of two that a float32 sum decides: 2^-8 sqrt(1e-3).
            assert relative_rms(found, expected) < 1.3e-4, (shape, is_one)
            assert 4e-4 < relative_rms(found, p.expected) < CLAIM["auto"]
            assert_same_bits(run(CUDA.backend, p, "auto", is_one=is_one), found, "again")
            fewer = run(CUDA.backend, p, "auto", is_one=is_one, rows=slice(shape[0] - 65, None))
            assert_same_bits(fewer, found[-65:], "fewer rows")


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize(
    "kept", [Kept("int8", 128), Kept("int8_min", 64), Kept("int4", 128), Kept("int4_min", 128)], ids=str
)
def test_few_rows_of_a_gpu_meet_gates_so_wide_that_a_block_has_several_tiles_at_a_time(kept: Kept) -> None:
    """Two and four, whose sums fewer warps have; the last tiles are not whole."""
    for shape in ((1, 130, 2120), (5, 130, 2120), (1, 64, 4232), (6, 64, 4232)):
        p = problem(Kinds(kept, kept, kept), shape)
        found = run(CUDA.backend, p, "auto", is_one=True)
        assert relative_rms(found, p.expected) < 1e-4, shape
        for row in range(shape[0]):
            alone = run(CUDA.backend, p, "auto", is_one=True, rows=slice(row, row + 1))
            assert_same_bits(alone, found[row : row + 1], row)


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize("kinds", APART, ids=str)
def test_many_rows_of_a_gpu_meet_gate_up_and_down_kept_in_different_ways(kinds: Kinds) -> None:
    for shape in ((65, 64, 257), (80, 33, 50)):
        check(CUDA, kinds, shape, is_one=False)


@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize("kinds", [Kinds(Kept("int4", 64), Kept("int4", 64), Kept("int8", 64)), *APART[:3]], ids=str)
@each_isa
def test_quantized_feed_forward_of_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(
    isa: str, kinds: Kinds, compute: str
) -> None:
    p = problem(kinds, (530, 100, 301))
    is_one = kinds.gate == kinds.up
    whole = run(Device(isa, 1).backend, p, compute, is_one=is_one)
    for threads in (1, 2, 3, 4):
        for first, rows in ((0, 530), (3, 1), (5, 7), (6, 9), (17, 513)):
            part = slice(first, first + rows)
            result = run(Device(isa, threads).backend, p, compute, is_one=is_one, rows=part)
            assert_same_bits(result, whole[part], f"{rows} rows, {threads} threads")


@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize("kept", [Kept("int8", 64), Kept("int4_min", 32)], ids=str)
@each_isa
def test_gate_and_up_apart_give_what_the_two_give_as_one(isa: str, kept: Kept, compute: str) -> None:
    p = problem(Kinds(kept, kept, kept), (19, 200, 333))
    backend = Device(isa, 2).backend
    together, apart = (run(backend, p, compute, is_one=is_one) for is_one in (True, False))
    assert relative_rms(apart, together) < 1e-6


@all_devices
def test_feed_forward_refuses_a_gate_and_an_up_that_do_not_fit(device: Device) -> None:
    backend = device.backend
    x, out = np.ones((2, 32), np.float32), np.ones((2, 32), np.float32)
    gate = backend.matrix(np.ones((5, 32), np.float32), "int8", 32)
    up = backend.matrix(np.ones((6, 32), np.float32), "int4", 32)
    down = backend.matrix(np.ones((32, 5), np.float32), "int4", 32)
    five, six = np.ones(5, np.float32), np.ones(6, np.float32)
    backend.feed_forward(x, (gate, gate), five, None, down, None, out)
    with pytest.raises(ShapeError, match="up must have shape"):
        backend.feed_forward(x, (gate, up), None, None, down, None, out)
    with pytest.raises(ShapeError, match="gate must have shape"):
        backend.feed_forward(x, (up, gate), None, None, down, None, out)
    with pytest.raises(ShapeError, match="up_bias"):
        backend.feed_forward(x, (gate, gate), five, six, down, None, out)
    with pytest.raises(DTypeError, match="up must be a Matrix"):
        backend.feed_forward(x, (gate, None), five, None, down, None, out)  # type: ignore[arg-type]
