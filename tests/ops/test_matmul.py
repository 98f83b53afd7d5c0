"""matmul: every row, column and depth at which a tile, a panel or a block of k ends, against float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import numpy_ops
from devices import CPU, ISAS, REFERENCE, Device, all_devices, each_isa, each_mode
from guarded import guarded, guarded_empty, guarded_rows, guarded_rows_empty
from llama_ext import DTypeError, LlamaExtError, ShapeError, _core
from tolerances import TINY, U32, assert_same_bits, assert_within, units

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    bias: bool = False
    accumulate: bool = False
    gap: int = 0  # elements between the rows of x and of y

    def __str__(self) -> str:
        options = [name for name in ("bias", "accumulate") if getattr(self, name)] + ["strided"] * (self.gap > 0)
        return "-".join([f"M{self.m}", f"N{self.n}", f"K{self.k}", *options])


def _cases() -> list[Case]:
    # AVX-512 tiles have 14 rows, the others 6, AMX 16 + 16; a block of a task 168 or 160 rows; a pass 512.
    rows = [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17, 18, 27, 28, 29, 31, 32, 33, 47, 48, 49, 160, 161]
    rows += [167, 168, 169, 337, 511, 512, 513]
    columns = [0, 1, 2, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 96, 127, 128, 129, 161, 257, 14336]
    # Blocks of k: 512 for float32, 1,024 for bfloat16.
    depths = [0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 34, 63, 64, 65, 127, 129, 255, 257, 511, 512, 513]
    depths += [1023, 1024, 1025, 2049, 4099, 14336]
    shapes = [(m, 35, 37) for m in rows] + [(2, n, 19) for n in columns] + [(3, 33, k) for k in depths]
    shapes += [(20, 33, 1025), (1, 14336, 65), (5, 65, 14336), (33, 257, 1023), (170, 130, 300), (64, 64, 64)]
    shapes += [(0, 0, 0), (1, 1, 0), (1, 1, 1), (0, 33, 17), (3, 0, 5), (17, 100, 2048)]
    variants = [(False, False, 0), (True, False, 5), (False, True, 0), (True, True, 3), (True, False, 0)]
    return [Case(*shape, *variants[index % 5]) for index, shape in enumerate(shapes)]


CASES = _cases()


@dataclass(frozen=True)
class Problem:
    x: Array
    weight: Array
    bias: Array | None
    y: Array | None  # what the result is added to


@functools.cache
def make_problem(case: Case) -> Problem:
    rng = np.random.default_rng([case.m, case.n, case.k])

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    return Problem(
        x=normal(case.m, case.k),
        weight=normal(case.n, case.k),
        bias=normal(case.n) if case.bias else None,
        y=normal(case.m, case.n) if case.accumulate else None,
    )


@functools.cache
def expected_numpy(case: Case, dtype: str, rounded: bool) -> tuple[Array, Array]:
    """The result and the sums of magnitudes; `rounded`: of activations that were rounded to bfloat16 first."""
    problem = make_problem(case)
    weight = numpy_ops.as_kept(problem.weight, dtype)
    x = numpy_ops.as_kept(problem.x, "bfloat16" if rounded else "float32")
    return numpy_ops.matmul(x, weight, problem.bias, problem.y)


@functools.cache
def expected_reference(case: Case, dtype: str, rounded: bool) -> Array:
    problem = make_problem(case)
    x = numpy_ops.as_kept(problem.x, "bfloat16" if rounded else "float32").astype(np.float32)
    return multiply(REFERENCE, Problem(x, problem.weight, problem.bias, problem.y), dtype, "auto")


def multiply(device: Device, problem: Problem, dtype: str, compute: str, gap: int = 0) -> Array:
    backend = device.backend
    matrix = backend.matrix(guarded(problem.weight), dtype)
    out, gaps = guarded_rows_empty((len(problem.x), len(problem.weight)), gap)
    if problem.y is not None:
        out[...] = problem.y
    bias = None if problem.bias is None else guarded(problem.bias)
    backend.matmul(guarded_rows(problem.x, gap), matrix, bias, out, problem.y is not None, compute)
    assert np.isnan(gaps).all(), "wrote between the rows"
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
@each_mode
@all_devices
def test_matmul_matches_float64(device: Device, dtype: str, compute: str, case: Case) -> None:
    rounded = device.rounds_activations(dtype, compute)
    expected, scale = expected_numpy(case, dtype, rounded)
    bound = units("matmul") * scale + TINY * case.k
    result = multiply(device, make_problem(case), dtype, compute, case.gap)
    assert_within(result, expected, bound, "against NumPy")
    if device.isa:
        reference = expected_reference(case, dtype, rounded)
        assert_within(result, reference, bound + U32 * np.abs(reference), "against the reference")


@functools.cache
def positive_problem(k: int, dtype: str, rounded: bool) -> tuple[Problem, Array, Array]:
    rng = np.random.default_rng(k)
    x, weight = rng.random((3, k), np.float32), rng.random((33, k), np.float32)
    kept = numpy_ops.as_kept(x, "bfloat16" if rounded else "float32")
    return Problem(x, weight, None, None), *numpy_ops.matmul(kept, numpy_ops.as_kept(weight, dtype), None, None)


@pytest.mark.parametrize("k", [1, 31, 512, 513, 1025, 14336])
@each_mode
@all_devices
def test_matmul_of_positive_numbers_stays_accurate(device: Device, dtype: str, compute: str, k: int) -> None:
    problem, expected, scale = positive_problem(k, dtype, device.rounds_activations(dtype, compute))
    result = multiply(device, problem, dtype, compute)
    assert_within(result, expected, units("matmul-positive") * (4 + k**0.5) * scale)


@each_mode
@each_isa
def test_matmul_of_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(
    isa: str, dtype: str, compute: str
) -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((521, 1061)).astype(np.float32)
    weight = rng.standard_normal((131, 1061)).astype(np.float32)
    whole = multiply(Device(isa, 1), Problem(x, weight, None, None), dtype, compute)
    for threads in (1, 2, 3):
        device = Device(isa, threads)
        assert_same_bits(multiply(device, Problem(x, weight, None, None), dtype, compute), whole, f"{threads} threads")
        backend = device.backend
        matrix = backend.matrix(weight, dtype)
        for rows in (1, 2, 5, 6, 13, 14, 15, 16, 17, 33, 168, 500):
            for first in (0, 3):
                out = guarded_empty((rows, 131))
                backend.matmul(guarded(x[first : first + rows]), matrix, None, out, False, compute)
                assert_same_bits(out, whole[first : first + rows], f"{rows} rows, {threads} threads")


@each_mode
@each_isa
def test_matmul_of_a_column_has_the_same_bits_among_any_others(isa: str, dtype: str, compute: str) -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_normal((5, 700)).astype(np.float32)
    weight = rng.standard_normal((200, 700)).astype(np.float32)
    whole = multiply(Device(isa, 1), Problem(x, weight, None, None), dtype, compute)
    for columns in (1, 15, 16, 17, 31, 32, 33, 127, 129):
        some = multiply(Device(isa, 2), Problem(x, weight[3 : 3 + columns], None, None), dtype, compute)
        assert_same_bits(some, np.ascontiguousarray(whole[:, 3 : 3 + columns]), f"{columns} columns")


@each_mode
@all_devices
def test_matmul_passes_nan_and_infinity_on_to_their_row_and_no_other(device: Device, dtype: str, compute: str) -> None:
    x = np.ones((35, 70), np.float32)
    x[4, 69] = np.nan
    x[20, 3] = np.inf
    result = multiply(device, Problem(x, np.ones((37, 70), np.float32), None, None), dtype, compute)
    assert np.isnan(result[4]).all()
    assert np.isposinf(result[20]).all()
    assert (np.delete(result, [4, 20], axis=0) == 70).all()


@pytest.mark.parametrize("side", ["end", "start"])
@pytest.mark.parametrize("device", [REFERENCE, *CPU[::3]], ids=str)
def test_matmul_touches_no_byte_before_or_after_its_arrays(device: Device, side: Any) -> None:
    rng = np.random.default_rng(3)
    for dtype in ("float32", "bfloat16"):
        for m, n, k in [(1, 1, 1), (1, 17, 33), (6, 33, 31), (14, 31, 65), (15, 65, 15), (33, 3, 7)]:
            matrix = device.backend.matrix(guarded(rng.random((n, k), np.float32), side), dtype)
            out = guarded_empty((m, n), side=side)
            x = guarded(rng.random((m, k), np.float32), side)
            device.backend.matmul(x, matrix, guarded(rng.random(n, np.float32), side), out)
            assert not np.isnan(out).any()


def test_every_instruction_set_of_the_machine_is_tested() -> None:
    assert {device.isa for device in CPU} == set(_core.available_isas()) == set(ISAS)
    assert ISAS, "not even x86-64-v2"


@all_devices
def test_matmul_refuses_what_does_not_fit(device: Device) -> None:
    backend = device.backend
    matrix = backend.matrix(np.zeros((3, 4), np.float32))
    x, out = np.zeros((2, 4), np.float32), np.zeros((2, 3), np.float32)
    with pytest.raises(ShapeError):
        backend.matmul(x[:, :3].copy(), matrix, None, out)
    with pytest.raises(ShapeError):
        backend.matmul(x, matrix, None, out[:, :2].copy())
    with pytest.raises(ShapeError):
        backend.matmul(x, matrix, None, out[:1])
    with pytest.raises(ShapeError):
        backend.matmul(x, matrix, np.zeros(4, np.float32), out)
    with pytest.raises(DTypeError):
        backend.matmul(x.astype(np.float64), matrix, None, out)  # type: ignore[arg-type]
    square = backend.matrix(np.eye(4, dtype=np.float32))
    with pytest.raises(ShapeError, match="overlap"):
        backend.matmul(x, square, None, x)
    with pytest.raises(LlamaExtError, match="compute"):
        backend.matmul(x, matrix, None, out, False, "fast")
    with pytest.raises(LlamaExtError, match="another Backend"):
        _core.Backend("reference").matmul(x, matrix, None, out)
