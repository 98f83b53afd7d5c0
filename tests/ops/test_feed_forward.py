"""feed_forward: both products and SiLU between them, at the ends of gate groups, panels, tiles and passes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import numpy_ops
from devices import REFERENCE, Device, all_devices, each_isa, each_mode
from guarded import guarded, guarded_rows, guarded_rows_empty
from llama_ext import LlamaExtError, ShapeError
from tolerances import TINY, U32, U_BF16, assert_same_bits, assert_within, units

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    m: int
    c: int
    f: int
    biases: str = ""  # of "g", "u", "d"
    accumulate: bool = False
    gap: int = 0

    def __str__(self) -> str:
        options = [f"bias_{self.biases}"] * bool(self.biases) + ["accumulate"] * self.accumulate
        return "-".join([f"M{self.m}", f"C{self.c}", f"F{self.f}", *options, *["strided"] * (self.gap > 0)])


def _cases() -> list[Case]:
    shapes = [(m, 33, 50) for m in (0, 1, 2, 6, 7, 13, 14, 15, 16, 17, 29, 33, 168, 169, 513)]
    shapes += [(3, 24, f) for f in (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 100, 257, 14336)]
    shapes += [(2, c, 20) for c in (1, 3, 15, 16, 17, 31, 32, 33, 63, 65, 129, 1025)]
    shapes += [(1, 14336, 17), (40, 130, 300), (7, 257, 1031)]
    variants = [("", False, 0), ("gud", False, 3), ("", True, 0), ("g", True, 2), ("ud", False, 0)]
    return [Case(*shape, *variants[index % 5]) for index, shape in enumerate(shapes)]


@dataclass(frozen=True)
class Problem:
    x: Array
    gate: Array
    up: Array
    down: Array
    gate_bias: Array | None
    up_bias: Array | None
    down_bias: Array | None
    y: Array | None


@functools.cache
def make_problem(case: Case) -> Problem:
    rng = np.random.default_rng([case.m, case.c, case.f])

    def normal(*shape: int, size: float = 1.0) -> Array:
        return (rng.standard_normal(shape) * size).astype(np.float32)

    return Problem(
        x=normal(case.m, case.c),
        gate=normal(case.f, case.c, size=2 * case.c**-0.5),
        up=normal(case.f, case.c, size=case.c**-0.5),
        down=normal(case.c, case.f, size=case.f**-0.5),
        gate_bias=normal(case.f) if "g" in case.biases else None,
        up_bias=normal(case.f) if "u" in case.biases else None,
        down_bias=normal(case.c) if "d" in case.biases else None,
        y=normal(case.m, case.c) if case.accumulate else None,
    )


@functools.cache
def expected_numpy(case: Case, dtype: str, rounded: bool) -> tuple[Array, Array]:
    """The result and its bound, propagated to first order through the three steps."""
    p = make_problem(case)
    unit = units("feed_forward")
    x = numpy_ops.as_kept(p.x, "bfloat16" if rounded else "float32")
    gate, gate_scale = numpy_ops.matmul(x, numpy_ops.as_kept(p.gate, dtype), p.gate_bias, None)
    up, up_scale = numpy_ops.matmul(x, numpy_ops.as_kept(p.up, dtype), p.up_bias, None)
    hidden = numpy_ops.silu(gate) * up
    # SiLU's slope is at most 1.1.
    hidden_bound = unit * (1.1 * gate_scale * np.abs(up) + np.abs(numpy_ops.silu(gate)) * up_scale + np.abs(hidden))
    if rounded:
        # Which way a hidden value rounds may hang on its last bit, so this is bounded, not reproduced.
        hidden_bound = hidden_bound + U_BF16 * np.abs(hidden)
    down = numpy_ops.as_kept(p.down, dtype)
    y, scale = numpy_ops.matmul(hidden, down, p.down_bias, p.y)
    return y, hidden_bound @ np.abs(down).T + unit * scale + TINY * (case.c + case.f)


@functools.cache
def expected_reference(case: Case, dtype: str, rounded: bool) -> Array:
    p = make_problem(case)
    x = numpy_ops.as_kept(p.x, "bfloat16" if rounded else "float32").astype(np.float32)
    return run(REFERENCE, Problem(x, p.gate, p.up, p.down, p.gate_bias, p.up_bias, p.down_bias, p.y), dtype, "auto")


def run(device: Device, p: Problem, dtype: str, compute: str, gap: int = 0) -> Array:
    backend = device.backend
    gate_up = backend.gate_up_matrix(guarded(p.gate), guarded(p.up), dtype)
    down = backend.matrix(guarded(p.down), dtype)
    out, gaps = guarded_rows_empty(p.x.shape, gap)
    if p.y is not None:
        out[...] = p.y
    biases = [None if bias is None else guarded(bias) for bias in (p.gate_bias, p.up_bias, p.down_bias)]
    x = guarded_rows(p.x, gap)
    backend.feed_forward(x, gate_up, biases[0], biases[1], down, biases[2], out, p.y is not None, compute)
    assert np.isnan(gaps).all(), "wrote between the rows"
    return out


@pytest.mark.parametrize("case", _cases(), ids=str)
@each_mode
@all_devices
def test_feed_forward_matches_float64(device: Device, dtype: str, compute: str, case: Case) -> None:
    rounded = device.rounds_activations(dtype, compute)
    expected, bound = expected_numpy(case, dtype, rounded)
    result = run(device, make_problem(case), dtype, compute, case.gap)
    assert_within(result, expected, bound, "against NumPy")
    if device.isa:
        reference = expected_reference(case, dtype, rounded)
        assert_within(result, reference, bound + U32 * np.abs(reference), "against the reference")


@each_mode
@each_isa
def test_feed_forward_of_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(
    isa: str, dtype: str, compute: str
) -> None:
    p = make_problem(Case(530, 100, 301, "gud"))
    whole = run(Device(isa, 1), p, dtype, compute)
    for threads in (1, 2, 3):
        for first, rows in ((0, 530), (0, 1), (3, 1), (5, 7), (100, 33), (17, 513)):
            some = Problem(p.x[first : first + rows], p.gate, p.up, p.down, p.gate_bias, p.up_bias, p.down_bias, None)
            result = run(Device(isa, threads), some, dtype, compute)
            assert_same_bits(result, whole[first : first + rows], f"{rows} rows, {threads} threads")


@all_devices
def test_feed_forward_saturates_where_silu_does(device: Device) -> None:
    # One feature: gate = x, up = 1 (a bias), down = 1.
    one = np.ones((1, 1), np.float32)
    x = np.array([[-200.0], [-88.0], [-30.0], [0.0], [30.0], [1e30]], np.float32)
    p = Problem(x, one, 0 * one, one, None, np.ones(1, np.float32), None, None)
    expected = numpy_ops.silu(x.astype(np.float64))
    # e^88 is as far as our exponential goes: silu(-200) is -200 e^-88, not -200 e^-200.
    assert_within(run(device, p, "float32", "auto"), expected, 8 * U32 * np.abs(expected) + 1e-35)


@all_devices
def test_feed_forward_refuses_what_does_not_fit(device: Device) -> None:
    backend = device.backend
    gate_up = backend.gate_up_matrix(np.ones((5, 3), np.float32), np.ones((5, 3), np.float32))
    down = backend.matrix(np.ones((3, 5), np.float32))
    x, out = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    five = np.ones(5, np.float32)
    backend.feed_forward(x, gate_up, five, five, down, None, out)
    with pytest.raises(ShapeError):
        backend.feed_forward(x, gate_up, five, five, down, five, out)
    with pytest.raises(ShapeError):
        backend.feed_forward(x, gate_up, five[:4].copy(), five, down, None, out)
    with pytest.raises(ShapeError):
        backend.feed_forward(x, down, None, None, down, None, out)
    with pytest.raises(ShapeError):
        backend.feed_forward(x, gate_up, None, None, gate_up, None, out)
    both = np.ones((3, 3), np.float32)
    with pytest.raises(ShapeError, match="overlap"):
        backend.feed_forward(both[:2], gate_up, None, None, down, None, both[1:])
    with pytest.raises(LlamaExtError, match="compute"):
        backend.feed_forward(x, gate_up, None, None, down, None, out, False, "best")
