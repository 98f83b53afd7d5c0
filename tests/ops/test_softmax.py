"""softmax: rows around every vector length, and the infinities that masks are made of."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import numpy_ops
from devices import REFERENCE, Device, all_devices, each_isa
from guarded import guarded, guarded_empty, guarded_rows, guarded_rows_empty
from llama_ext import ShapeError
from tolerances import TINY, assert_same_bits, assert_within, sum_in_lanes, units

Array = npt.NDArray[Any]

WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 128, 129, 257, 1023, 4099, 14336, 128256]
SHAPES = [([1, 2, 3, 17][i % 4] if width < 10**5 else 1, width) for i, width in enumerate(WIDTHS)]
SHAPES += [(0, 5), (3, 0), (0, 0), (700, 33), (301, 257)]
SHAPE_IDS = [f"{rows}x{width}" for rows, width in SHAPES]


@functools.cache
def make_problem(rows: int, width: int) -> Array:
    rng = np.random.default_rng([rows, width])
    x = rng.standard_normal((rows, width)) * rng.choice([0.1, 3.0, 30.0], (rows, 1))
    x += rng.choice([0.0, -1000.0, 1e6], (rows, 1))
    if width > 2:
        x[rng.random((rows, width)) < 0.1] = -np.inf
        x[:, width // 2] = x[:, width // 2].clip(-2000)  # so that no row is -inf alone
    return x.astype(np.float32)


@functools.cache
def expected_reference(rows: int, width: int) -> Array:
    x = make_problem(rows, width)
    out = np.full_like(x, np.nan)
    REFERENCE.backend.softmax(x, out)
    return out


@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=SHAPE_IDS)
@all_devices
def test_softmax_matches_float64(device: Device, rows: int, width: int) -> None:
    x = make_problem(rows, width)
    expected = numpy_ops.softmax(x)
    out = guarded_empty(x.shape)
    device.backend.softmax(guarded(x), out)
    with np.errstate(invalid="ignore"):
        distance = np.where(expected > 0, x.max(axis=-1, keepdims=True, initial=-np.inf) - x, 0.0)
    bound = (units("softmax") * (1 + distance / 4) + sum_in_lanes(width)) * expected + TINY
    assert_within(out, expected, bound, "against NumPy")
    assert (out[x == -np.inf] == 0).all()
    if device.isa:
        assert_within(out, expected_reference(rows, width), bound, "against the reference")


@pytest.mark.parametrize("width", [1, 3, 8, 16, 17, 40, 200])
@all_devices
def test_softmax_of_a_row_that_has_no_answer_is_nan_and_spoils_no_other(device: Device, width: int) -> None:
    x = np.zeros((5, width), np.float32)
    x[0] = -np.inf
    x[1, -1] = np.nan
    x[2, 0] = np.nan
    x[3, width // 2] = np.inf
    out = guarded_empty(x.shape)
    device.backend.softmax(guarded(x), out)
    assert np.isnan(out[:4]).all()
    assert_within(out[4], np.full(width, 1 / width), units("softmax") / width)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (40, 65), (700, 33)])
@all_devices
def test_softmax_of_strided_rows_and_in_place_has_the_same_bits(device: Device, rows: int, width: int) -> None:
    x = make_problem(rows, width)
    plain = guarded_empty(x.shape)
    device.backend.softmax(guarded(x), plain)
    strided, gaps = guarded_rows_empty(x.shape, 5)
    device.backend.softmax(guarded_rows(x, 2), strided)
    assert_same_bits(strided, plain)
    assert np.isnan(gaps).all()
    same = guarded(x)
    device.backend.softmax(same, same)
    assert_same_bits(same, plain)


@each_isa
def test_softmax_of_a_row_has_the_same_bits_with_any_threads(isa: str) -> None:
    x = make_problem(700, 33)
    results = []
    for threads in (1, 2, 3):
        out = guarded_empty(x.shape)
        Device(isa, threads).backend.softmax(x, out)
        results.append(out)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_softmax_refuses_another_shape() -> None:
    with pytest.raises(ShapeError):
        REFERENCE.backend.softmax(np.ones((2, 3), np.float32), np.ones((3, 2), np.float32))
    whole = np.ones((3, 3), np.float32)
    with pytest.raises(ShapeError, match="overlap"):
        REFERENCE.backend.softmax(whole[:2], whole[1:])
