"""rms_norm_backward: against finite differences and float64, at widths around every vector length."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

import finite_differences
import numpy_ops
from devices import REFERENCE, Device, all_devices, each_isa
from guarded import guarded, guarded_rows, guarded_rows_empty
from llama_ext import DTypeError, OptionError, ShapeError
from tolerances import TINY, U32, assert_same_bits, assert_within, relative_rms, sum_in_lanes, units

Array = npt.NDArray[Any]

WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 127, 129, 255, 257, 1023, 4099]
SHAPES = [(rows, width) for rows, width in zip([1, 2, 3, 17, 5] * 5, WIDTHS, strict=True)]
SHAPES += [(0, 5), (3, 0), (1000, 65), (301, 257), (33, 2049)]
SHAPE_IDS = [f"{rows}x{width}" for rows, width in SHAPES]
EPS = (1e-5, 1e-6, 0.5)


class Problem(NamedTuple):
    x: Array
    weight: Array
    eps: float
    d_y: Array
    d_x: Array  # what is there before
    d_weight: Array


class Gradients(NamedTuple):
    d_x: Array
    d_weight: Array


@functools.cache
def make_problem(rows: int, width: int, spread: float = 4.0) -> Problem:
    rng = np.random.default_rng([rows, width])

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    # Rows of very different size, as hidden states have.
    size = 10.0 ** rng.uniform(-spread, spread, (rows, 1))
    x = (rng.standard_normal((rows, width)) * size).astype(np.float32)
    return Problem(x, normal(width), EPS[width % 3], normal(rows, width), normal(rows, width), normal(width))


def differentiate(device: Device, p: Problem, accumulate: bool = False, gap: int = 0) -> Gradients:
    d_x, gaps = guarded_rows_empty(p.x.shape, gap)
    if accumulate:
        d_x[...] = p.d_x
    d_weight = guarded(p.d_weight)
    x, d_y = guarded_rows(p.x, gap), guarded_rows(p.d_y, gap)
    device.backend.rms_norm_backward(x, guarded(p.weight), p.eps, d_y, d_x, accumulate, d_weight)
    assert np.isnan(gaps).all(), "wrote between the rows"
    return Gradients(d_x, d_weight)


def expected_numpy(p: Problem, accumulate: bool) -> tuple[Gradients, Gradients]:
    """By the quotient rule, term by term; and the sums of magnitudes."""
    x, weight, d_y = (each.astype(np.float64) for each in (p.x, p.weight, p.d_y))
    width = max(x.shape[1], 1)
    inverse = 1 / np.sqrt((x * x).sum(axis=1, keepdims=True) / width + p.eps)
    direct, dots = d_y * weight * inverse, d_y * weight * x
    spread = x * inverse**3 / width
    before = p.d_x.astype(np.float64) if accumulate else np.zeros_like(x)
    terms = d_y * x * inverse
    found = Gradients(before + direct - spread * dots.sum(axis=1, keepdims=True), p.d_weight + terms.sum(axis=0))
    scale = Gradients(
        np.abs(before) + np.abs(direct) + np.abs(spread) * np.abs(dots).sum(axis=1, keepdims=True),
        np.abs(p.d_weight) + np.abs(terms).sum(axis=0),
    )
    return found, scale


@functools.cache
def expected_reference(rows: int, width: int, accumulate: bool) -> Gradients:
    return differentiate(REFERENCE, make_problem(rows, width), accumulate)


@pytest.mark.parametrize(("rows", "width", "accumulate", "gap"), [(1, 1, False, 0), (3, 7, True, 2), (5, 33, False, 1)])
@all_devices
def test_rms_norm_backward_is_the_slope_of_rms_norm(
    device: Device, rows: int, width: int, accumulate: bool, gap: int
) -> None:
    p = make_problem(rows, width, 0.3)
    found = differentiate(device, p, accumulate, gap)
    d_x = finite_differences.gradient(lambda x: numpy_ops.rms_norm(x, p.weight, p.eps)[0], p.x, p.d_y)
    d_weight = finite_differences.gradient(lambda w: numpy_ops.rms_norm(p.x, w, p.eps)[0], p.weight, p.d_y)
    if width > 1 or device is REFERENCE:  # of one number the terms cancel but for eps
        assert relative_rms(found.d_x, d_x + (p.d_x if accumulate else 0)) < units("gradients")
    assert relative_rms(found.d_weight, d_weight + p.d_weight) < units("gradients")


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=SHAPE_IDS)
@all_devices
def test_rms_norm_backward_matches_float64(device: Device, rows: int, width: int, accumulate: bool) -> None:
    p = make_problem(rows, width)
    expected, scale = expected_numpy(p, accumulate)
    found = differentiate(device, p, accumulate, gap=3 if width % 2 else 0)
    factors = Gradients(
        units("rms_norm_backward") + 2 * sum_in_lanes(width), units("rms_norm_backward") + sum_in_lanes(width)
    )
    for name in Gradients._fields:
        bound = getattr(factors, name) * getattr(scale, name) + TINY
        assert_within(getattr(found, name), getattr(expected, name), bound, f"{name} against NumPy")
        if device.isa:
            reference = getattr(expected_reference(rows, width, accumulate), name)
            assert_within(getattr(found, name), reference, bound + U32 * np.abs(reference), f"{name}, the reference")


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (40, 65), (600, 31)])
@all_devices
def test_rms_norm_backward_in_place_of_d_y_and_without_d_weight_has_the_same_bits(
    device: Device, rows: int, width: int
) -> None:
    p = make_problem(rows, width)
    plain = differentiate(device, p)
    same, d_weight = guarded(p.d_y), guarded(p.d_weight)
    device.backend.rms_norm_backward(guarded(p.x), guarded(p.weight), p.eps, same, same, False, d_weight)
    assert_same_bits(same, plain.d_x)
    assert_same_bits(d_weight, plain.d_weight)
    frozen = guarded(p.d_y)
    device.backend.rms_norm_backward(guarded(p.x), guarded(p.weight), p.eps, frozen, frozen)
    assert_same_bits(frozen, plain.d_x)


@each_isa
def test_rms_norm_backward_has_the_same_bits_with_any_threads(isa: str) -> None:
    for rows, width in [(700, 129), (3, 1000), (2000, 17)]:
        p = make_problem(rows, width)
        one, two, three = (differentiate(Device(isa, threads), p, True) for threads in (1, 2, 3))
        for name in Gradients._fields:
            assert_same_bits(getattr(two, name), getattr(one, name), name)
            assert_same_bits(getattr(three, name), getattr(one, name), name)


@all_devices
def test_rms_norm_backward_of_zeros_is_finite_and_nan_stays_in_its_row(device: Device) -> None:
    p = make_problem(3, 37)
    x = np.zeros_like(p.x)
    x[1, 36] = np.nan
    found = differentiate(device, p._replace(x=x, eps=1e-5))
    assert_within(found.d_x[0], p.d_y[0].astype(np.float64) * p.weight / np.sqrt(1e-5), 1e-3)
    assert np.isfinite(found.d_x[2]).all()
    assert np.isnan(found.d_x[1]).all()


# The last two are 0 and infinity in float32.
@pytest.mark.parametrize("eps", [0.0, -1e-6, float("nan"), float("inf"), 1e-60, 1e39])
def test_rms_norm_backward_needs_a_positive_eps(eps: float) -> None:
    x = np.ones((1, 2), np.float32)
    with pytest.raises(OptionError, match="eps"):
        REFERENCE.backend.rms_norm_backward(x, np.ones(2, np.float32), eps, x.copy(), x.copy())


@all_devices
def test_rms_norm_backward_refuses_what_does_not_fit(device: Device) -> None:
    backend, x, weight = device.backend, np.ones((2, 4), np.float32), np.ones(4, np.float32)
    d_y, d_x = x.copy(), x.copy()
    with pytest.raises(ShapeError, match="weight"):
        backend.rms_norm_backward(x, np.ones(3, np.float32), 1e-5, d_y, d_x)
    with pytest.raises(ShapeError, match="d_y"):
        backend.rms_norm_backward(x, weight, 1e-5, np.ones((2, 5), np.float32), d_x)
    with pytest.raises(ShapeError, match="d_weight"):
        backend.rms_norm_backward(x, weight, 1e-5, d_y, d_x, False, np.ones(3, np.float32))
    with pytest.raises(ShapeError, match="overlap x"):
        backend.rms_norm_backward(x, weight, 1e-5, d_y, x)
    with pytest.raises(ShapeError, match="overlap d_y"):
        backend.rms_norm_backward(x, weight, 1e-5, d_y, d_y, True)
    with pytest.raises(DTypeError):
        backend.rms_norm_backward(x.astype(np.float16), weight, 1e-5, d_y, d_x)  # type: ignore[arg-type]
