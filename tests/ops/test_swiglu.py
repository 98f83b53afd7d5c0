"""swiglu and swiglu_backward: against float64 and finite differences, with gates of every size."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

import finite_differences
import numpy_training
from devices import REFERENCE, Device, all_devices, each_isa
from guarded import guarded, guarded_rows, guarded_rows_empty
from llama_ext import DTypeError, ShapeError
from tolerances import TINY, U32, assert_same_bits, assert_within, relative_rms, units

Array = npt.NDArray[Any]

WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 129, 257, 1023, 4099]
SHAPES = [([1, 3, 17, 5][index % 4], width) for index, width in enumerate(WIDTHS)]
SHAPES += [(0, 5), (3, 0), (700, 65), (257, 301)]
SHAPE_IDS = [f"{rows}x{width}" for rows, width in SHAPES]


class Problem(NamedTuple):
    gate: Array
    up: Array
    d_y: Array


class Gradients(NamedTuple):
    d_gate: Array
    d_up: Array
    y: Array


@functools.cache
def make_problem(rows: int, width: int, size: float = 30.0) -> Problem:
    rng = np.random.default_rng([rows, width])
    scales = rng.choice([0.1, 1.0, 5.0, size], (rows, width)) if size > 1 else 1.0
    gate = (rng.standard_normal((rows, width)) * scales).astype(np.float32)
    up, d_y = rng.standard_normal((2, rows, width)).astype(np.float32)
    return Problem(gate, up, d_y)


def activate(device: Device, p: Problem, gap: int = 0) -> Array:
    y, gaps = guarded_rows_empty(p.gate.shape, gap)
    device.backend.swiglu(guarded_rows(p.gate, gap), guarded_rows(p.up, gap), y)
    assert np.isnan(gaps).all(), "wrote between the rows"
    return y


def differentiate(device: Device, p: Problem, gap: int = 0) -> Gradients:
    (d_gate, gaps), (d_up, more), (y, most) = (guarded_rows_empty(p.gate.shape, gap) for _ in range(3))
    inputs = (guarded_rows(each, gap) for each in p)
    device.backend.swiglu_backward(*inputs, d_gate, d_up, y)
    assert np.isnan([gaps, more, most]).all(), "wrote between the rows"
    return Gradients(d_gate, d_up, y)


def expected_numpy(p: Problem) -> tuple[Gradients, Gradients]:
    """The gradients and what rounding errors are measured against."""
    gate, up, d_y = (each.astype(np.float64) for each in p)
    s = numpy_training.sigmoid(gate)
    rest = numpy_training.sigmoid(-gate)  # 1 - s without its cancellation
    y = numpy_training.swiglu(p.gate, p.up)
    found = Gradients(d_y * up * (s + gate * s * rest), d_y * gate * s, y)
    # 1 - s keeps the rounding of s, two units, until s is 1 in float32.
    open_gates = np.abs(gate) * rest + np.minimum(np.abs(gate), 18) * s / 6
    scale = Gradients(np.abs(d_y * up * s) * (1 + open_gates), np.abs(d_y * gate * s), np.abs(y))
    return found, scale


def bound_of(op: str, scale: Array, p: Problem) -> Array:
    # A sigmoid below the smallest normal number may count as zero.
    size = (1 + np.abs(p.gate)) * (1 + np.abs(p.gate)) * (1 + np.abs(p.up)) * (1 + np.abs(p.d_y))
    return units(op) * scale + TINY * size.astype(np.float64)


@functools.cache
def expected_reference(rows: int, width: int) -> Gradients:
    return differentiate(REFERENCE, make_problem(rows, width))


@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=SHAPE_IDS)
@all_devices
def test_swiglu_matches_float64(device: Device, rows: int, width: int) -> None:
    p = make_problem(rows, width)
    expected = numpy_training.swiglu(p.gate, p.up)
    found = activate(device, p, gap=5 if width % 2 else 0)
    assert_within(found, expected, bound_of("swiglu", np.abs(expected), p), "against NumPy")


@pytest.mark.parametrize(("rows", "width", "gap"), [(1, 1, 0), (5, 17, 0), (4, 9, 3)])
@all_devices
def test_swiglu_backward_is_the_slope_of_swiglu(device: Device, rows: int, width: int, gap: int) -> None:
    p = make_problem(rows, width, 1.0)
    found = differentiate(device, p, gap)
    d_gate = finite_differences.gradient(lambda gate: numpy_training.swiglu(gate, p.up), p.gate, p.d_y)
    d_up = finite_differences.gradient(lambda up: numpy_training.swiglu(p.gate, up), p.up, p.d_y)
    assert relative_rms(found.d_gate, d_gate) < units("gradients")
    assert relative_rms(found.d_up, d_up) < units("gradients")


@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=SHAPE_IDS)
@all_devices
def test_swiglu_backward_matches_float64_and_gives_y_once_more(device: Device, rows: int, width: int) -> None:
    p = make_problem(rows, width)
    expected, scale = expected_numpy(p)
    found = differentiate(device, p, gap=3 if width % 2 else 0)
    for name in Gradients._fields:
        bound = bound_of("swiglu_backward", getattr(scale, name), p)
        assert_within(getattr(found, name), getattr(expected, name), bound, f"{name} against NumPy")
        if device.isa:
            reference = getattr(expected_reference(rows, width), name)
            assert_within(getattr(found, name), reference, bound + U32 * np.abs(reference), f"{name}, the reference")


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (40, 65), (600, 33)])
@all_devices
def test_swiglu_in_the_place_of_its_inputs_has_the_same_bits(device: Device, rows: int, width: int) -> None:
    p = make_problem(rows, width)
    plain, gradients = activate(device, p), differentiate(device, p)
    for place in (0, 1):
        gate, up = guarded(p.gate), guarded(p.up)
        target = (gate, up)[place]
        device.backend.swiglu(gate, up, target)
        assert_same_bits(target, plain)
    gate, up, d_y = (guarded(each) for each in p)
    device.backend.swiglu_backward(gate, up, d_y, gate, up, d_y)
    assert_same_bits(gate, gradients.d_gate)
    assert_same_bits(up, gradients.d_up)
    assert_same_bits(d_y, gradients.y)
    gate, up, d_y = (guarded(each) for each in p)
    device.backend.swiglu_backward(gate, up, d_y, gate, up)
    assert_same_bits(gate, gradients.d_gate)
    assert_same_bits(d_y, p.d_y)


@each_isa
def test_swiglu_has_the_same_bits_with_any_threads(isa: str) -> None:
    p = make_problem(700, 65)
    forward = [activate(Device(isa, threads), p) for threads in (1, 2, 3)]
    backward = [differentiate(Device(isa, threads), p) for threads in (1, 2, 3)]
    for other in (1, 2):
        assert_same_bits(forward[other], forward[0])
        for name in Gradients._fields:
            assert_same_bits(getattr(backward[other], name), getattr(backward[0], name), name)


@all_devices
def test_gates_far_from_zero_are_open_or_shut(device: Device) -> None:
    gate = np.array([[1e4, -1e4, 100, -100, 88.8, -88.8, 0, -0.0]] * 3, np.float32)
    ones = np.ones_like(gate)
    found = differentiate(device, Problem(gate, ones, ones))
    assert np.isfinite(found).all()
    assert_within(found.d_gate[0, :4], np.array([1.0, 0.0, 1.0, 0.0]), 1e-30)
    assert_within(found.d_up[0, :4], np.array([1e4, 0.0, 100.0, 0.0]), 1e-30)
    assert_within(found.d_gate[0, 6:], np.array([0.5, 0.5]), U32)


@all_devices
def test_swiglu_refuses_what_does_not_fit(device: Device) -> None:
    backend = device.backend
    gate, up, y, d_gate = (np.ones((2, 4), np.float32) for _ in range(4))
    with pytest.raises(ShapeError, match="up"):
        backend.swiglu(gate, np.ones((2, 5), np.float32), y)
    with pytest.raises(ShapeError, match="y"):
        backend.swiglu(gate, up, np.ones((3, 4), np.float32))
    with pytest.raises(DTypeError):
        backend.swiglu(gate.astype(np.float64), up, y)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="d_gate must not overlap up"):
        backend.swiglu_backward(gate, up, y, up, gate)
    with pytest.raises(ShapeError, match="overlap d_y"):
        backend.swiglu_backward(gate, up, y, y, up)
    with pytest.raises(ShapeError, match="d_up must not overlap d_gate"):
        backend.swiglu_backward(gate, up, y, d_gate, d_gate)
    with pytest.raises(ShapeError, match="y must not overlap gate"):
        backend.swiglu_backward(gate, up, y, d_gate, up, gate)
    wide = np.ones((2, 9), np.float32)
    with pytest.raises(ShapeError):
        backend.swiglu(wide[:, :8], wide[:, 1:], wide[:, :8])
