"""dropout: the mask is the contract's, bit by bit, and keeps as many elements as it says."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import finite_differences
import numpy_training
from devices import REFERENCE, Device, all_devices, each_isa
from guarded import guarded, guarded_rows, guarded_rows_empty
from llama_ext import DTypeError, OptionError, ShapeError
from tolerances import TINY, U32, assert_same_bits, assert_within, relative_rms, units

Array = npt.NDArray[Any]

WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 129, 257, 1023, 4099]
SHAPES = [([1, 3, 17, 5][index % 4], width) for index, width in enumerate(WIDTHS)]
SHAPES += [(0, 5), (3, 0), (700, 65), (257, 301)]
SHAPE_IDS = [f"{rows}x{width}" for rows, width in SHAPES]
SEEDS = [0, 1, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**64 - 1]
SHARES = [0.1, 0.5, 0.9, 0.2]


@functools.cache
def make_problem(rows: int, width: int) -> tuple[Array, Array]:
    """x, and what is there before."""
    x, before = np.random.default_rng([rows, width]).standard_normal((2, rows, width)).astype(np.float32)
    return x, before


def drop(device: Device, x: Array, p: float, seed: int, before: Array | None = None, gap: int = 0) -> Array:
    y, gaps = guarded_rows_empty(x.shape, gap)
    if before is not None:
        y[...] = before
    device.backend.dropout(guarded_rows(x, gap), p, seed, y, before is not None)
    assert np.isnan(gaps).all(), "wrote between the rows"
    return y


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=SHAPE_IDS)
@all_devices
def test_dropout_is_the_formula_of_the_contract(device: Device, rows: int, width: int, accumulate: bool) -> None:
    x, before = make_problem(rows, width)
    p, seed = SHARES[width % 4], SEEDS[width % 6]
    expected = numpy_training.dropout(x, p, seed) + (before if accumulate else 0)
    found = drop(device, x, p, seed, before if accumulate else None, gap=3 if width % 2 else 0)
    bound = units("dropout") * (np.abs(x) / (1 - p) + (np.abs(before) if accumulate else 0)) + TINY
    assert_within(found, expected, bound)
    if not accumulate:
        np.testing.assert_array_equal(found == 0, (expected == 0))
        reference = drop(REFERENCE, x, p, seed)
        assert_within(found, reference.astype(np.float64), bound + U32 * np.abs(reference), "against the reference")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.75, 0.99])
@all_devices
def test_dropout_keeps_its_share_and_the_mean(device: Device, p: float, seed: int) -> None:
    x = np.ones((250, 401), np.float32)
    y = drop(device, x, p, seed)
    count = y.size
    deviation = (p * (1 - p) / count) ** 0.5
    assert abs(np.count_nonzero(y) / count - (1 - p)) < 5 * deviation
    assert abs(y.mean(dtype=np.float64) - 1) < 5 * deviation / (1 - p)
    # Neighbours along a row and a column are dropped independently.
    kept = y != 0
    for pairs in (kept[:, 1:] & kept[:, :-1], kept[1:] & kept[:-1]):
        share = (1 - p) ** 2
        assert abs(pairs.mean() - share) < 8 * (share * (1 - share) / pairs.size) ** 0.5


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("scale", [0.0, -1.75, 0.3, 1e3])
@pytest.mark.parametrize("p", [0.0, 0.4])
@all_devices
def test_dropout_scales_what_it_keeps(device: Device, p: float, scale: float, accumulate: bool) -> None:
    x, before = make_problem(17, 65)
    y = before.copy() if accumulate else np.full_like(x, np.nan)
    device.backend.dropout(x, p, 11, y, accumulate=accumulate, scale=scale)
    expected = scale * numpy_training.dropout(x, p, 11) + (before if accumulate else 0)
    bound = units("dropout") * (np.abs(scale * x) / (1 - p) + (np.abs(before) if accumulate else 0)) + TINY
    assert_within(y, expected, bound)


@all_devices
def test_the_gradient_is_the_same_operation_with_the_same_seed(device: Device) -> None:
    x, d_y = make_problem(7, 9)
    expected = finite_differences.gradient(lambda values: numpy_training.dropout(values, 0.4, 77), x, d_y)
    found = drop(device, d_y, 0.4, 77)
    assert relative_rms(found, expected) < units("gradients")
    np.testing.assert_array_equal(found == 0, drop(device, x, 0.4, 77) == 0)


@all_devices
def test_no_dropout_copies_or_adds(device: Device) -> None:
    x, before = make_problem(17, 33)
    assert_same_bits(drop(device, x, 0.0, 5), x)
    assert_same_bits(drop(device, x, 0.0, 5, before), before + x)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 7), (40, 65), (600, 33)])
@all_devices
def test_dropout_in_place_and_of_strided_rows_has_the_same_bits(device: Device, rows: int, width: int) -> None:
    x, _ = make_problem(rows, width)
    plain = drop(device, x, 0.3, 9)
    assert_same_bits(drop(device, x, 0.3, 9, gap=5), plain)
    same = guarded(x)
    device.backend.dropout(same, 0.3, 9, same)
    assert_same_bits(same, plain)


@each_isa
def test_dropout_has_the_same_bits_with_any_threads(isa: str) -> None:
    x, before = make_problem(700, 65)
    results = [drop(Device(isa, threads), x, 0.3, 2**63, before) for threads in (1, 2, 3)]
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@all_devices
def test_dropout_refuses_what_does_not_fit(device: Device) -> None:
    backend, x, y = device.backend, np.ones((2, 4), np.float32), np.ones((2, 4), np.float32)
    for p in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(OptionError, match="dropout"):
            backend.dropout(x, p, 0, y)
    for scale in (float("inf"), float("nan")):
        with pytest.raises(OptionError, match="scale must be finite"):
            backend.dropout(x, 0.5, 0, y, scale=scale)
    # Too large for float32, where it would be infinity, or only over 1 - p.
    for scale in (1e39, -1e300, 3e38):
        with pytest.raises(OptionError, match="scale must be finite in float32"):
            backend.dropout(np.zeros((2, 4), np.float32), 0.5, 0, y, scale=scale)
    backend.dropout(np.zeros((2, 4), np.float32), 0.5, 0, y, scale=1e38)
    np.testing.assert_array_equal(y, 0)
    with pytest.raises(ShapeError, match="y"):
        backend.dropout(x, 0.5, 0, np.ones((2, 5), np.float32))
    with pytest.raises(ShapeError, match="overlap"):
        backend.dropout(x, 0.5, 0, x, True)
    with pytest.raises(DTypeError):
        backend.dropout(x.astype(np.float64), 0.5, 0, y)  # type: ignore[arg-type]
