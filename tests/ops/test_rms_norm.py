"""rms_norm: widths around every vector length, with and without the saved inverse."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import numpy_ops
from devices import REFERENCE, Device, all_devices, each_isa
from guarded import guarded, guarded_empty, guarded_rows, guarded_rows_empty
from llama_ext import DTypeError, OptionError, ShapeError
from tolerances import TINY, assert_same_bits, assert_within, sum_in_lanes, units

Array = npt.NDArray[Any]

WIDTHS = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    23,
    31,
    32,
    33,
    47,
    63,
    64,
    65,
    127,
    129,
    255,
    257,
    1023,
    4096,
    4099,
    14336,
]
SHAPES = [(rows, width) for rows, width in zip([1, 2, 3, 17, 5] * 6, WIDTHS, strict=False)]
SHAPES += [(0, 5), (1000, 65), (301, 257), (16, 2048), (33, 4097), (1, 300_001), (2, 262_144)]
SHAPE_IDS = [f"{rows}x{width}" for rows, width in SHAPES]
EPS = (1e-5, 1e-6, 0.5)


@functools.cache
def make_problem(rows: int, width: int) -> tuple[Array, Array, float]:
    rng = np.random.default_rng([rows, width])
    # Rows of very different size, as hidden states have.
    size = 10.0 ** rng.uniform(-4, 4, (rows, 1))
    x = (rng.standard_normal((rows, width)) * size).astype(np.float32)
    return x, rng.standard_normal(width).astype(np.float32), EPS[width % 3]


@functools.cache
def expected_reference(rows: int, width: int) -> Array:
    x, weight, eps = make_problem(rows, width)
    out = np.full_like(x, np.nan)
    REFERENCE.backend.rms_norm(x, weight, eps, out)
    return out


@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=SHAPE_IDS)
@all_devices
def test_rms_norm_matches_float64(device: Device, rows: int, width: int) -> None:
    x, weight, eps = make_problem(rows, width)
    expected, inverse = numpy_ops.rms_norm(x, weight, eps)
    out, inv_rms = guarded_empty(x.shape), guarded_empty(rows)
    device.backend.rms_norm(guarded(x), guarded(weight), eps, out, inv_rms)
    factor = units("rms_norm") + sum_in_lanes(width)
    bound = factor * np.abs(expected) + TINY
    assert_within(out, expected, bound, "against NumPy")
    assert_within(inv_rms, inverse, factor * inverse, "inv_rms against NumPy")
    if device.isa:
        assert_within(out, expected_reference(rows, width), bound, "against the reference")


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (40, 65), (600, 31), (5, 64), (2, 5000)])
@all_devices
def test_rms_norm_of_strided_rows_and_in_place_has_the_same_bits(device: Device, rows: int, width: int) -> None:
    x, weight, eps = make_problem(rows, width)
    plain = guarded_empty(x.shape)
    device.backend.rms_norm(guarded(x), guarded(weight), eps, plain)
    strided, gaps = guarded_rows_empty(x.shape, 7)
    device.backend.rms_norm(guarded_rows(x, 3), guarded(weight), eps, strided)
    assert_same_bits(strided, plain)
    assert np.isnan(gaps).all()
    same = guarded(x)
    device.backend.rms_norm(same, guarded(weight), eps, same)
    assert_same_bits(same, plain)


@each_isa
def test_rms_norm_of_a_row_has_the_same_bits_with_any_threads(isa: str) -> None:
    x, weight, eps = make_problem(700, 129)
    results = []
    for threads in (1, 2, 3):
        out = guarded_empty(x.shape)
        Device(isa, threads).backend.rms_norm(x, weight, eps, out)
        results.append(out)
    alone = guarded_empty((1, 129))
    Device(isa, 1).backend.rms_norm(x[350:351], weight, eps, alone)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
    assert_same_bits(alone, results[0][350:351])


@all_devices
def test_rms_norm_of_zeros_is_zero_and_of_nan_is_nan(device: Device) -> None:
    x = np.zeros((3, 37), np.float32)
    x[1, 36] = np.nan
    out = guarded_empty(x.shape)
    device.backend.rms_norm(guarded(x), np.ones(37, np.float32), 1e-5, out)
    assert (out[[0, 2]] == 0).all()
    assert np.isnan(out[1]).all()


@all_devices
def test_rms_norm_of_zeros_is_zero_with_the_smallest_eps_of_float32(device: Device) -> None:
    out = guarded_empty((2, 37))
    device.backend.rms_norm(np.zeros((2, 37), np.float32), np.ones(37, np.float32), 1.5e-45, out)
    assert (out == 0).all()


# The last two are 0 and infinity in float32.
@pytest.mark.parametrize("eps", [0.0, -1e-6, float("nan"), float("inf"), 1e-60, 1e39])
def test_rms_norm_needs_a_positive_eps(eps: float) -> None:
    x = np.ones((1, 2), np.float32)
    with pytest.raises(OptionError, match="eps"):
        REFERENCE.backend.rms_norm(x, np.ones(2, np.float32), eps, x)


def test_rms_norm_refuses_what_does_not_fit() -> None:
    backend, x = REFERENCE.backend, np.ones((2, 4), np.float32)
    with pytest.raises(ShapeError, match="weight"):
        backend.rms_norm(x, np.ones(3, np.float32), 1e-5, x)
    with pytest.raises(ShapeError):
        backend.rms_norm(x, np.ones(4, np.float32), 1e-5, np.ones((2, 5), np.float32))
    with pytest.raises(ShapeError):
        backend.rms_norm(x, np.ones(4, np.float32), 1e-5, x.copy(), np.ones(3, np.float32))
    with pytest.raises(DTypeError):
        backend.rms_norm(x.astype(np.float16), np.ones(4, np.float32), 1e-5, x)  # type: ignore[arg-type]
