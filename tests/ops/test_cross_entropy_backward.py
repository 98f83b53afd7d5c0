"""cross_entropy_backward: losses and gradients in the logits' place, against finite differences and float64."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import finite_differences
import numpy_ops
from devices import REFERENCE, Device, all_devices, each_isa
from guarded import guarded, guarded_empty, guarded_rows_empty
from llama_ext import DTypeError, OptionError, ShapeError, TokenIdError
from tolerances import TINY, U32, assert_same_bits, assert_within, relative_rms, sum_in_lanes, units

Array = npt.NDArray[Any]

WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 512, 1023, 1024, 1025, 2047, 4099, 14336, 128256]
SHAPES = [([1, 3, 5, 17][i % 4] if width < 10**5 else 2, width) for i, width in enumerate(WIDTHS)]
SHAPES += [(0, 5), (700, 33), (301, 257)]
SHAPE_IDS = [f"{rows}x{width}" for rows, width in SHAPES]


@functools.cache
def make_problem(rows: int, width: int, small: bool = False) -> tuple[Array, Array, float]:
    rng = np.random.default_rng([rows, width])
    logits = rng.standard_normal((rows, width)) * (1.0 if small else rng.choice([0.1, 3.0, 30.0], (rows, 1)))
    logits += 0.0 if small else rng.choice([0.0, -50.0, 200.0], (rows, 1))
    labels = rng.integers(0, width, rows)
    labels[1::3] = -100
    labels[::5] = width - 1
    return logits.astype(np.float32), labels.astype(np.int32), 1 / max(int((labels != -100).sum()), 1)


def differentiate(device: Device, logits: Array, labels: Array, scale: float, gap: int = 0) -> tuple[Array, Array]:
    """The losses and the gradient."""
    place, gaps = guarded_rows_empty(logits.shape, gap)
    place[...] = logits
    losses = guarded_empty(len(logits))
    device.backend.cross_entropy_backward(place, guarded(labels), scale, losses)
    assert np.isnan(gaps).all(), "wrote between the rows"
    return losses, place


@functools.cache
def expected_reference(rows: int, width: int) -> tuple[Array, Array]:
    return differentiate(REFERENCE, *make_problem(rows, width))


@pytest.mark.parametrize(("rows", "width", "gap"), [(1, 1, 0), (1, 5, 0), (7, 17, 3)])
@all_devices
def test_cross_entropy_backward_is_the_slope_of_the_scaled_sum_of_losses(
    device: Device, rows: int, width: int, gap: int
) -> None:
    logits, labels, scale = make_problem(rows, width, small=True)
    losses, found = differentiate(device, logits, labels, scale, gap)
    expected = finite_differences.gradient(
        lambda x: numpy_ops.cross_entropy(x, labels), logits[:, :], np.array([scale])
    )
    if width == 1:
        assert (found == 0).all()
    else:
        assert relative_rms(found, expected) < units("gradients")
        assert relative_rms(losses, numpy_ops.cross_entropy(logits, labels)) < units("gradients")
    assert (found[labels == -100] == 0).all()


@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=SHAPE_IDS)
@all_devices
def test_cross_entropy_backward_matches_float64(device: Device, rows: int, width: int) -> None:
    logits, labels, scale = make_problem(rows, width)
    losses, found = differentiate(device, logits, labels, scale, gap=5 if width % 2 else 0)
    p = numpy_ops.softmax(logits)
    counted = labels != -100
    onehot = np.zeros_like(p)
    onehot[np.flatnonzero(counted), labels[counted]] = 1
    expected = np.where(counted[:, None], scale * (p - onehot), 0.0)
    distance = logits.max(axis=1, keepdims=True, initial=-np.inf) - logits
    bound = scale * (units("cross_entropy_backward") * (1 + distance / 4) + sum_in_lanes(width)) * p
    bound = np.where(counted[:, None], bound + 2 * U32 * np.abs(expected) + TINY, 0.0)
    assert_within(found, expected, bound, "against NumPy")
    expected_losses = numpy_ops.cross_entropy(logits, labels)
    losses_bound = units("cross_entropy") * (np.abs(expected_losses) + np.abs(logits.max(axis=1, initial=0.0)) + 1)
    assert_within(losses, expected_losses, losses_bound, "losses against NumPy")
    assert (losses[~counted] == 0).all()
    if device.isa:
        _, reference = expected_reference(rows, width)
        assert_within(found, reference, bound + U32 * np.abs(reference), "against the reference")


@all_devices
def test_its_losses_have_the_bits_of_cross_entropy(device: Device) -> None:
    for rows, width in [(17, 33), (5, 2047), (2, 14336)]:
        logits, labels, scale = make_problem(rows, width)
        plain = guarded_empty(rows)
        device.backend.cross_entropy(guarded(logits), guarded(labels), plain)
        assert_same_bits(differentiate(device, logits, labels, scale)[0], plain)


@all_devices
def test_the_gradient_of_a_row_sums_to_zero(device: Device) -> None:
    logits, labels, scale = make_problem(301, 257)
    _, found = differentiate(device, logits, labels, scale)
    assert_within(found.astype(np.float64).sum(axis=1), np.zeros(301), 1e-6 * scale)


@all_devices
def test_infinities_and_nan_are_what_the_formula_says(device: Device) -> None:
    logits = np.zeros((5, 19), np.float32)
    logits[0, 1:] = -np.inf  # certain, and right: no gradient
    logits[1, 3] = -np.inf  # the label is impossible
    logits[2, 18] = np.nan
    logits[3, 18] = np.nan
    losses, found = differentiate(device, logits, np.array([0, 3, 0, -100, 5], np.int32), 1.0)
    assert (found[0] == 0).all()
    assert losses[1] == np.inf
    assert_within(found[1], np.where(np.arange(19) == 3, -1.0, 1 / 18), 1e-6)
    assert np.isnan(found[2]).any()
    assert (found[3] == 0).all(), "an ignored row counts nothing, whatever it holds"
    assert losses[3] == 0
    assert_within(found[4], np.where(np.arange(19) == 5, -18 / 19, 1 / 19), 1e-6)


@each_isa
def test_cross_entropy_backward_has_the_same_bits_with_any_threads(isa: str) -> None:
    for rows, width in [(700, 33), (3, 14336)]:
        results = [differentiate(Device(isa, threads), *make_problem(rows, width)) for threads in (1, 2, 3)]
        for other in (1, 2):
            assert_same_bits(results[other][0], results[0][0])
            assert_same_bits(results[other][1], results[0][1])


@all_devices
def test_cross_entropy_backward_refuses_what_does_not_fit(device: Device) -> None:
    backend, logits, losses = device.backend, guarded(np.zeros((2, 7), np.float32)), guarded_empty(2)
    labels = np.zeros(2, np.int32)
    for label in (-1, -99, 7, 2**31 - 1):
        with pytest.raises(TokenIdError, match=str(label)):
            backend.cross_entropy_backward(logits, np.array([0, label], np.int32), 1.0, losses)
    for scale in (float("nan"), float("inf"), 1e39):
        with pytest.raises(OptionError, match="scale"):
            backend.cross_entropy_backward(logits, labels, scale, losses)
    with pytest.raises(ShapeError, match="labels"):
        backend.cross_entropy_backward(logits, np.zeros(3, np.int32), 1.0, losses)
    with pytest.raises(ShapeError, match="losses"):
        backend.cross_entropy_backward(logits, labels, 1.0, guarded_empty(3))
    with pytest.raises(DTypeError):
        backend.cross_entropy_backward(logits, labels.astype(np.int64), 1.0, losses)  # type: ignore[arg-type]
    assert (logits == 0).all(), "wrote before it checked"
    assert np.isnan(losses).all()


@pytest.mark.parametrize("shift", [-89.0, -1e4, 1e4])
@pytest.mark.parametrize("width", [1, 2, 61, 1020, 1021, 2000])
@all_devices
def test_losses_and_gradients_of_logits_far_from_zero_are_those_of_their_differences(
    device: Device, width: int, shift: float
) -> None:
    rng = np.random.default_rng(width)
    # Multiples of 1/64, so that a shift costs no digit.
    logits = (np.round(rng.standard_normal((3, width)) * 64) / 64).astype(np.float32)
    logits[1, 4:8] = -np.inf
    logits[2, width // 2 :] = -np.inf if width > 1 else 0
    labels = np.zeros(3, np.int32)
    expected, gradient = differentiate(REFERENCE, logits, labels, 0.5)
    losses, found = differentiate(device, logits + np.float32(shift), labels, 0.5)
    # The loss is the difference of two numbers as large as the shift.
    assert_within(losses, expected, 4 * U32 * (abs(shift) + np.abs(expected) + 1), "losses")
    distance = np.where(np.isfinite(logits), logits.max(axis=1, keepdims=True) - logits, 0)
    bound = units("cross_entropy_backward") * (1 + distance / 4) + sum_in_lanes(width)
    assert_within(found, gradient, bound * np.abs(gradient) + TINY, "gradients")
