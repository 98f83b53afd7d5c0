"""Rows of float32 matrices as tensors of the device, and transposed matrices: copies, bit for bit, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from devices import Device, all_devices
from guarded import guarded_rows, guarded_rows_empty
from llama_ext import DTypeError, ShapeError
from tolerances import assert_same_bits

Array = npt.NDArray[Any]

SHAPES = [(1, 1), (1, 70), (70, 1), (3, 5), (31, 33), (33, 64), (64, 32), (130, 67), (67, 257), (0, 4), (4, 0)]
# Rows of a matrix of 100: (how many, begin, group, stride), the last two as RowMap has them; 0: all together.
MAPS = [(100, 0, 0, 0), (1, 99, 0, 0), (37, 31, 0, 0), (32, 64, 0, 0), (40, 16, 16, 32), (17, 5, 3, 8), (0, 0, 0, 0)]


def numbers(shape: tuple[int, int], seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def places(count: int, begin: int, group: int, stride: int) -> Array:
    i = np.arange(count)
    return begin + (i // group * stride + i % group if group else i)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@all_devices
def test_a_transposed_matrix_has_the_same_numbers(device: Device, shape: tuple[int, int]) -> None:
    values = numbers(shape)
    target = device.backend.matrix(numbers(shape[::-1], seed=1))
    device.backend.transpose(target, device.backend.matrix(values))
    assert_same_bits(target.to_array(), np.ascontiguousarray(values.T))


@pytest.mark.parametrize("transposes", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@all_devices
def test_a_whole_matrix_goes_to_a_tensor_and_comes_back(
    device: Device, shape: tuple[int, int], transposes: bool
) -> None:
    values = numbers(shape)
    expected = np.ascontiguousarray(values.T) if transposes else values
    for gap in (0, 3):
        out, gaps = guarded_rows_empty(expected.shape, gap)
        device.backend.load_rows(device.backend.matrix(values), out, transposes)
        assert_same_bits(out, expected)
        assert np.isnan(gaps).all(), "wrote between the rows"
        target = device.backend.matrix(numbers(shape, seed=1))
        device.backend.store_rows(target, guarded_rows(expected, gap), transposes)
        assert_same_bits(target.to_array(), values)


@pytest.mark.parametrize("transposes", [False, True])
@pytest.mark.parametrize("where", MAPS, ids=str)
@all_devices
def test_some_rows_go_to_a_tensor_and_come_back_and_no_others_change(
    device: Device, where: tuple[int, int, int, int], transposes: bool
) -> None:
    _, begin, group, stride = where
    rows = places(*where)
    for cols in (1, 33, 130):
        values, others = numbers((100, cols)), numbers((100, cols), seed=1)
        expected = np.ascontiguousarray(values[rows].T) if transposes else values[rows]
        out, gaps = guarded_rows_empty(expected.shape, 5)
        device.backend.load_rows(device.backend.matrix(values), out, transposes, begin, group, stride)
        assert_same_bits(out, expected)
        assert np.isnan(gaps).all(), "wrote between the rows"
        target = device.backend.matrix(others)
        device.backend.store_rows(target, guarded_rows(expected, 5), transposes, begin, group, stride)
        others[rows] = values[rows]
        assert_same_bits(target.to_array(), others)


@all_devices
def test_nothing_is_written_beside_the_rows_of_a_matrix(device: Device) -> None:
    """Padding is zero and stays so: a product whose sums would meet it finds none."""
    for rows, cols in ((33, 5), (5, 33), (40, 70)):
        values = numbers((rows, cols))
        stored, transposed = (device.backend.zero_matrix(rows, cols) for _ in range(2))
        device.backend.store_rows(stored, values)
        device.backend.store_rows(transposed, np.ascontiguousarray(values.T), True)
        turned = device.backend.zero_matrix(rows, cols)
        device.backend.transpose(turned, device.backend.matrix(np.ascontiguousarray(values.T)))
        d_y = numbers((3, rows), seed=2)
        expected = np.empty((3, cols), np.float32)
        device.backend.matmul_backward(
            d_y, device.backend.matrix(values), None, expected, None, None, False, "bfloat16"
        )
        for matrix in (stored, transposed, turned):
            found = np.empty_like(expected)
            device.backend.matmul_backward(d_y, matrix, None, found, None, None, False, "bfloat16")
            assert_same_bits(found, expected)


@all_devices
def test_rows_that_are_not_there_and_tensors_of_other_shapes_are_refused(device: Device) -> None:
    backend = device.backend
    matrix = backend.matrix(numbers((100, 33)))
    for call in (backend.load_rows, backend.store_rows):
        with pytest.raises(ShapeError, match=r"row 10 belongs at row 100 of a matrix with 100 rows"):
            call(matrix, np.zeros((11, 33), np.float32), False, 90)
        with pytest.raises(ShapeError, match=r"belongs at row 100 of a matrix with 100 rows"):
            call(matrix, np.zeros((33, 11), np.float32), True, 90)
        with pytest.raises(ShapeError, match=r"belongs at row 102"):
            call(matrix, np.zeros((7, 33), np.float32), False, 0, 3, 51)
        with pytest.raises(ShapeError, match=r"groups of 4 rows that start 3 apart"):
            call(matrix, np.zeros((7, 33), np.float32), False, 0, 4, 3)
        with pytest.raises(ShapeError, match=r"must not be negative, got begin -1"):
            call(matrix, np.zeros((7, 33), np.float32), False, -1)
        with pytest.raises(ShapeError, match=r"the tensor must have shape \(any, 33\), got \(33, 7\)"):
            call(matrix, np.zeros((33, 7), np.float32))
        with pytest.raises(ShapeError, match=r"the transposed tensor must have shape \(33, any\), got \(7, 33\)"):
            call(matrix, np.zeros((7, 33), np.float32), True)
        with pytest.raises(DTypeError, match="the matrix must be float32, got bfloat16"):
            call(backend.matrix(numbers((4, 33)), "bfloat16"), np.zeros((4, 33), np.float32))
    with pytest.raises(ShapeError, match="target must have shape"):
        backend.transpose(matrix, matrix)
    with pytest.raises(DTypeError, match="both matrices must be float32"):
        backend.transpose(backend.matrix(numbers((3, 4)), "bfloat16"), backend.matrix(numbers((4, 3))))
