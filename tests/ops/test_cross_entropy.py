"""cross_entropy: losses per token, ignored labels, and vocabularies around every vector length."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import numpy_ops
from devices import REFERENCE, Device, all_devices, each_isa
from guarded import guarded, guarded_empty, guarded_rows
from llama_ext import DTypeError, ShapeError, TokenIdError
from tolerances import U32, assert_same_bits, assert_within, units

Array = npt.NDArray[Any]

WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 512, 1023, 1024, 1025, 2047, 4099, 14336, 128256]
SHAPES = [([1, 3, 5, 17][i % 4] if width < 10**5 else 2, width) for i, width in enumerate(WIDTHS)]
SHAPES += [(0, 5), (700, 33), (301, 257)]
SHAPE_IDS = [f"{rows}x{width}" for rows, width in SHAPES]


@functools.cache
def make_problem(rows: int, width: int) -> tuple[Array, Array]:
    rng = np.random.default_rng([rows, width])
    logits = rng.standard_normal((rows, width)) * rng.choice([0.1, 3.0, 30.0], (rows, 1))
    logits += rng.choice([0.0, -50.0, 200.0], (rows, 1))
    labels = rng.integers(0, width, rows)
    labels[1::3] = -100
    labels[::5] = width - 1
    return logits.astype(np.float32), labels.astype(np.int32)


@functools.cache
def expected_reference(rows: int, width: int) -> Array:
    logits, labels = make_problem(rows, width)
    out = np.full(rows, np.nan, np.float32)
    REFERENCE.backend.cross_entropy(logits, labels, out)
    return out


@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=SHAPE_IDS)
@all_devices
def test_cross_entropy_matches_float64(device: Device, rows: int, width: int) -> None:
    logits, labels = make_problem(rows, width)
    expected = numpy_ops.cross_entropy(logits, labels)
    out = guarded_empty(rows)
    device.backend.cross_entropy(guarded(logits), guarded(labels), out)
    bound = units("cross_entropy") * (np.abs(expected) + np.abs(logits.max(axis=1, initial=0.0)) + 1)
    assert_within(out, expected, bound, "against NumPy")
    assert (out[labels == -100] == 0).all()
    if device.isa:
        assert_within(out, expected_reference(rows, width), bound + U32 * np.abs(expected), "against the reference")


@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=SHAPE_IDS)
@all_devices
def test_a_label_is_a_hit_where_it_is_the_first_of_the_largest_logits(device: Device, rows: int, width: int) -> None:
    logits, labels = make_problem(rows, width)
    logits, labels = logits.copy(), labels.copy()
    for t in range(rows):
        if t % 2 == 0:
            largest = int(logits[t].argmax())
            logits[t, min(width - 1, largest + 5)] = logits[t, largest]  # an equal one behind it
            labels[t] = [largest, min(width - 1, largest + 5), -100][t // 2 % 3]
    out, hits, plain = guarded_empty(rows), guarded_empty(rows), guarded_empty(rows)
    device.backend.cross_entropy(guarded(logits), guarded(labels), out, hits)
    device.backend.cross_entropy(guarded(logits), guarded(labels), plain)
    assert_same_bits(out, plain)
    assert np.array_equal(hits, (logits.argmax(axis=1) == labels).astype(np.float32))


@all_devices
def test_cross_entropy_of_strided_logits_has_the_same_bits(device: Device) -> None:
    logits, labels = make_problem(17, 33)
    plain, strided = guarded_empty(17), guarded_empty(17)
    device.backend.cross_entropy(guarded(logits), guarded(labels), plain)
    device.backend.cross_entropy(guarded_rows(logits, 9), guarded(labels), strided)
    assert_same_bits(strided, plain)


@all_devices
def test_cross_entropy_with_infinities_is_what_the_formula_says(device: Device) -> None:
    logits = np.zeros((5, 19), np.float32)
    logits[0, 1:] = -np.inf  # certain, and right: 0
    logits[1, 3] = -np.inf  # the label is impossible: inf
    logits[2, 18] = np.nan
    logits[3, 18] = np.nan
    labels = np.array([0, 3, 0, -100, 5], np.int32)
    out = guarded_empty(5)
    device.backend.cross_entropy(guarded(logits), guarded(labels), out)
    assert out[0] == 0
    assert out[1] == np.inf
    assert np.isnan(out[2])
    assert out[3] == 0, "an ignored row counts nothing, whatever it holds"
    assert_within(out[4:], np.log([19.0]), 4 * U32 * np.log(19))


@each_isa
def test_cross_entropy_has_the_same_bits_with_any_threads(isa: str) -> None:
    logits, labels = make_problem(700, 33)
    results = []
    for threads in (1, 2, 3):
        out = guarded_empty(700)
        Device(isa, threads).backend.cross_entropy(logits, labels, out)
        results.append(out)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("label", [-1, -99, -101, 7, 2**31 - 1])
@all_devices
def test_cross_entropy_refuses_a_label_outside_the_vocabulary(device: Device, label: int) -> None:
    out = guarded_empty(2)
    with pytest.raises(TokenIdError, match=str(label)):
        device.backend.cross_entropy(np.zeros((2, 7), np.float32), np.array([0, label], np.int32), out)
    assert np.isnan(out).all(), "wrote before it checked"


def test_cross_entropy_refuses_what_does_not_fit() -> None:
    backend, logits = REFERENCE.backend, np.zeros((2, 7), np.float32)
    with pytest.raises(ShapeError):
        backend.cross_entropy(logits, np.zeros(3, np.int32), np.zeros(2, np.float32))
    with pytest.raises(ShapeError):
        backend.cross_entropy(logits, np.zeros(2, np.int32), np.zeros(3, np.float32))
    with pytest.raises(DTypeError):
        backend.cross_entropy(logits, np.zeros(2, np.int64), np.zeros(2, np.float32))  # type: ignore[arg-type]
