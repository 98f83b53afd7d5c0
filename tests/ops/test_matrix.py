"""Weight matrices: every element comes back out of the layout of its backend, rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import numpy_ops
from devices import REFERENCE, Device, all_devices
from guarded import guarded
from llama_ext import DTypeError, ShapeError

SHAPES = [(0, 0), (1, 1), (1, 33), (2, 0), (31, 32), (32, 31), (33, 33), (64, 65), (97, 7), (3, 1025)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@all_devices
def test_a_float32_matrix_comes_back_bit_for_bit(device: Device, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    matrix = device.backend.matrix(guarded(values))
    assert (matrix.shape, matrix.dtype) == (shape, "float32")
    np.testing.assert_array_equal(matrix.to_array(), values)


@pytest.mark.parametrize("source", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(33, 33), (5, 130)], ids=lambda shape: "x".join(map(str, shape)))
@all_devices
def test_a_matrix_rounds_every_source_once(device: Device, shape: tuple[int, int], dtype: str, source: str) -> None:
    exact = np.random.default_rng(1).standard_normal(shape)
    values: npt.NDArray[Any]
    if source == "bfloat16":
        values = numpy_ops.bfloat16_bits(exact.astype(np.float32))
        wide = numpy_ops.from_bfloat16_bits(values)
    else:
        values = exact.astype(source)
        wide = values.astype(np.float32)
    matrix = device.backend.matrix(guarded(values), dtype)
    np.testing.assert_array_equal(matrix.to_array(), numpy_ops.as_kept(wide, dtype).astype(np.float32))


@all_devices
def test_rounding_to_bfloat16_is_to_nearest_even_with_the_special_numbers_kept(device: Device) -> None:
    bits = np.concatenate(
        [
            np.arange(0x3F7F_0000, 0x3F81_0000, 0x101, dtype=np.uint32),
            np.array([0x3F80_8000, 0x3F81_8000, 0x3F80_7FFF, 0x3F80_8001], np.uint32),  # ties and their neighbours
            np.array([0x7F80_0000, 0xFF80_0000, 0x7F7F_FFFF, 0x8000_0000, 0, 1, 0x0000_8001], np.uint32),
        ]
    )
    values = np.ascontiguousarray(bits).view(np.float32)[None]
    kept = device.backend.matrix(values, "bfloat16").to_array()
    expected = numpy_ops.from_bfloat16_bits(numpy_ops.bfloat16_bits(values))
    np.testing.assert_array_equal(kept.view(np.uint32), expected.view(np.uint32))
    nans = np.array([[0x7F80_0001, 0x7FC0_0000, 0xFFFF_FFFF]], np.uint32).view(np.float32)
    assert np.isnan(device.backend.matrix(nans, "bfloat16").to_array()).all()


@pytest.mark.parametrize("width", [1, 15, 16, 17, 40])
@all_devices
def test_a_gate_up_matrix_interleaves_groups_of_16_rows(device: Device, width: int) -> None:
    rng = np.random.default_rng(width)
    gate = rng.standard_normal((width, 5)).astype(np.float32)
    up = rng.standard_normal((width, 5)).astype(np.float32)
    rows = device.backend.gate_up_matrix(guarded(gate), guarded(up)).to_array()
    groups = -(-width // 16)
    assert rows.shape == (32 * groups, 5)
    pairs = rows.reshape(groups, 2, 16, 5)
    np.testing.assert_array_equal(pairs[:, 0].reshape(-1, 5)[:width], gate)
    np.testing.assert_array_equal(pairs[:, 1].reshape(-1, 5)[:width], up)
    assert not pairs[:, 0].reshape(-1, 5)[width:].any()
    assert not pairs[:, 1].reshape(-1, 5)[width:].any()


def test_a_matrix_refuses_what_is_no_matrix_of_numbers() -> None:
    backend = REFERENCE.backend
    with pytest.raises(ShapeError):
        backend.matrix(np.zeros(3, np.float32))
    with pytest.raises(ShapeError):
        backend.matrix(np.zeros((4, 6), np.float32)[:, ::2])
    with pytest.raises(DTypeError):
        backend.matrix(np.zeros((2, 2), np.int32))
    with pytest.raises(DTypeError):
        backend.matrix(np.zeros((2, 2), np.float32), "float128")
    with pytest.raises(ShapeError):
        backend.gate_up_matrix(np.zeros((2, 2), np.float32), np.zeros((3, 2), np.float32))
