"""A norm that goes before a product: matmul and feed_forward take it along, with the bits of rms_norm by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from devices import Device, all_devices
from guarded import guarded, guarded_empty, guarded_rows
from llama_ext import OptionError, ShapeError, _core
from quantized import Kept
from tolerances import assert_same_bits

Array = npt.NDArray[Any]

EPS = 1e-5
# The rows of a tile are 6, 9, 14 or 16, those of a pass 512.
ROWS = (0, 1, 2, 5, 6, 7, 9, 13, 17, 40, 513)
KEPT = [Kept("float32"), Kept("bfloat16"), Kept("float16"), Kept("int8", 64), Kept("int4", 32)]
each_weight = pytest.mark.parametrize("kept", KEPT, ids=str)
each_compute = pytest.mark.parametrize("compute", ["auto", "exact"])


def _matrix(backend: _core.Backend, rng: np.random.Generator, rows: int, columns: int, kept: Kept) -> _core.Matrix:
    values = (rng.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)
    return backend.matrix(values, kept.name, kept.group) if kept.group else backend.matrix(values, kept.name)


def _normalized(backend: _core.Backend, x: Array, weight: Array) -> Array:
    y = guarded_empty(x.shape)
    backend.rms_norm(x, weight, EPS, y)
    return y


@each_compute
@each_weight
@all_devices
def test_matmul_with_a_norm_gives_the_bits_of_rms_norm_and_then_matmul(
    device: Device, kept: Kept, compute: str
) -> None:
    backend = device.backend
    for index, rows in enumerate(ROWS):
        rng = np.random.default_rng(rows)
        columns = (33, 130, 257)[index % 3]
        matrix = _matrix(backend, rng, 67, columns, kept)
        weight = guarded(rng.standard_normal(columns).astype(np.float32))
        x = guarded_rows(rng.standard_normal((rows, columns)).astype(np.float32) * 3, 5)
        expected, found = guarded_empty((rows, 67)), guarded_empty((rows, 67))
        backend.matmul(_normalized(backend, x, weight), matrix, None, expected, False, compute)
        backend.matmul(x, matrix, None, found, False, compute, weight, EPS)
        assert_same_bits(found, expected, f"{rows} rows")


@each_compute
@each_weight
@all_devices
def test_feed_forward_with_a_norm_adds_to_its_own_input_what_it_would_add_apart(
    device: Device, kept: Kept, compute: str
) -> None:
    backend = device.backend
    for rows in ROWS:
        rng = np.random.default_rng(rows)
        gate, up = (_matrix(backend, rng, 50, 66, kept) for _ in range(2))
        down = _matrix(backend, rng, 66, 50, kept)
        weight = guarded(rng.standard_normal(66).astype(np.float32))
        x = guarded(rng.standard_normal((rows, 66)).astype(np.float32))
        expected = guarded(x)
        normed = _normalized(backend, x, weight)
        backend.feed_forward(normed, (gate, up), None, None, down, None, expected, True, compute)
        backend.feed_forward(x, (gate, up), None, None, down, None, x, True, compute, weight, EPS)
        assert_same_bits(x, expected, f"{rows} rows")


@all_devices
def test_a_norm_of_another_width_or_without_an_epsilon_is_refused(device: Device) -> None:
    backend = device.backend
    matrix = _matrix(backend, np.random.default_rng(0), 4, 8, Kept("float32"))
    x, out = np.ones((2, 8), np.float32), np.empty((2, 4), np.float32)
    with pytest.raises(ShapeError, match=r"matmul: the norm's weight must have shape \(8,\), got \(7,\)"):
        backend.matmul(x, matrix, None, out, False, "auto", np.ones(7, np.float32), EPS)
    with pytest.raises(OptionError, match=r"matmul: eps must be a number above 0.*, got 0"):
        backend.matmul(x, matrix, None, out, False, "auto", np.ones(8, np.float32), 0.0)


@pytest.mark.parametrize("columns", [1028, 2048, 2052, 4096, 4100, 5120, 9216])
@pytest.mark.parametrize("kept", [Kept("float32"), Kept("bfloat16"), Kept("int8", 128)], ids=str)
@all_devices
def test_rows_that_kernels_hold_in_parts_have_the_same_bits(device: Device, kept: Kept, columns: int) -> None:
    backend = device.backend
    rng = np.random.default_rng(columns)
    matrix = _matrix(backend, rng, 20, columns, kept)
    weight = guarded(rng.standard_normal(columns).astype(np.float32))
    for rows in (1, 3, 40):
        x = guarded_rows(rng.standard_normal((rows, columns)).astype(np.float32) * 3, 5)
        expected, found = guarded_empty((rows, 20)), guarded_empty((rows, 20))
        backend.matmul(_normalized(backend, x, weight), matrix, None, expected, False, "auto")
        backend.matmul(x, matrix, None, found, False, "auto", weight, EPS)
        assert_same_bits(found, expected, f"{rows} rows")
