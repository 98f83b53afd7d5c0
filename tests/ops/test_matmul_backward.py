"""matmul_backward: each gradient against finite differences, at every edge of a tile against float64, through any weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import finite_differences
import numpy_ops
from devices import REFERENCE, Device, all_devices, each_isa, each_tier_and_thread_count
from guarded import guarded, guarded_empty, guarded_rows, guarded_rows_empty
from llama_ext import DTypeError, LlamaExtError, OptionError, ShapeError, _core
from quantized import Kept, each_layout, weights
from tolerances import TINY, U32, assert_same_bits, assert_within, relative_rms, units

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    accumulate: bool = False  # d_x; d_weight and d_bias always do
    gap: int = 0  # elements between the rows of x, d_y and d_x

    def __str__(self) -> str:
        options = ["accumulate"] * self.accumulate + ["strided"] * (self.gap > 0)
        return "-".join([f"M{self.m}", f"N{self.n}", f"K{self.k}", *options])


def _cases() -> list[Case]:
    edges = [1, 2, 3, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 129]
    shapes = [(m, 35, 37) for m in [0, *edges, 160, 167, 169, 257, 511, 513]]
    shapes += [(3, n, 19) for n in [*edges, 257, 511, 513, 1025]]
    shapes += [(3, 33, k) for k in [*edges, 257, 511, 513, 1025]]
    shapes += [(0, 0, 0), (3, 0, 5), (3, 5, 0), (0, 33, 17), (1, 1, 1), (300, 100, 130), (1030, 7, 33), (64, 64, 64)]
    variants = [(False, 0), (True, 5), (False, 3), (True, 0)]
    return [Case(*shape, *variants[index % 4]) for index, shape in enumerate(shapes)]


@dataclass(frozen=True)
class Problem:
    d_y: Array
    weight: Array
    x: Array
    d_x: Array  # what is there before
    d_weight: Array
    d_bias: Array


@dataclass(frozen=True)
class Gradients:
    d_x: Array
    d_weight: Array
    d_bias: Array


@functools.cache
def make_problem(case: Case) -> Problem:
    rng = np.random.default_rng([case.m, case.n, case.k])

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    m, n, k = case.m, case.n, case.k
    return Problem(normal(m, n), normal(n, k), normal(m, k), normal(m, k), normal(n, k), normal(n))


def differentiate(
    device: Device,
    case: Case,
    *,
    compute: str = "exact",
    matrix: _core.Matrix | None = None,
    problem: Problem | None = None,
) -> Gradients:
    """What is not accumulated is NaN before."""
    p = problem or make_problem(case)
    backend = device.backend
    weight = backend.matrix(guarded(p.weight)) if matrix is None else matrix
    d_x, gaps = guarded_rows_empty((case.m, weight.shape[1]), case.gap)
    if case.accumulate:
        d_x[...] = p.d_x
    d_weight, d_bias = backend.matrix(p.d_weight), guarded(p.d_bias)
    d_y, x = guarded_rows(p.d_y, case.gap), guarded_rows(p.x, case.gap)
    backend.matmul_backward(d_y, weight, x, d_x, d_weight, d_bias, case.accumulate, compute)
    assert np.isnan(gaps).all(), "wrote between the rows"
    return Gradients(d_x, d_weight.to_array(), d_bias)


def expected_numpy(case: Case) -> tuple[Gradients, Gradients]:
    """The gradients and the sums of magnitudes that go into them."""
    p = make_problem(case)
    d_y, weight, x = (each.astype(np.float64) for each in (p.d_y, p.weight, p.x))
    d_x = p.d_x.astype(np.float64) if case.accumulate else np.zeros_like(x)
    a, b, c = np.abs(d_y), np.abs(weight), np.abs(x)
    found = Gradients(d_x + d_y @ weight, p.d_weight + d_y.T @ x, p.d_bias + d_y.sum(axis=0))
    scale = Gradients(np.abs(d_x) + a @ b, np.abs(p.d_weight) + a.T @ c, np.abs(p.d_bias) + a.sum(axis=0))
    return found, scale


@functools.cache
def expected_reference(case: Case) -> Gradients:
    return differentiate(REFERENCE, case)


@pytest.mark.parametrize("case", [Case(3, 5, 4), Case(7, 3, 6, True, 2), Case(1, 4, 1, False, 3)], ids=str)
@all_devices
def test_matmul_backward_is_the_slope_of_matmul(device: Device, case: Case) -> None:
    p = make_problem(case)
    bias = np.ones(case.n)
    found = differentiate(device, case)
    d_x = finite_differences.gradient(lambda x: numpy_ops.matmul(x, p.weight, bias, None)[0], p.x, p.d_y)
    d_weight = finite_differences.gradient(lambda w: numpy_ops.matmul(p.x, w, bias, None)[0], p.weight, p.d_y)
    d_bias = finite_differences.gradient(lambda b: numpy_ops.matmul(p.x, p.weight, b, None)[0], bias, p.d_y)
    assert relative_rms(found.d_x, d_x + (p.d_x if case.accumulate else 0)) < units("gradients")
    assert relative_rms(found.d_weight, d_weight + p.d_weight) < units("gradients")
    assert relative_rms(found.d_bias, d_bias + p.d_bias) < units("gradients")


@pytest.mark.parametrize("case", _cases(), ids=str)
@all_devices
def test_matmul_backward_matches_float64(device: Device, case: Case) -> None:
    expected, scale = expected_numpy(case)
    found = differentiate(device, case)
    for name in ("d_x", "d_weight", "d_bias"):
        terms = {"d_x": case.n, "d_weight": case.m, "d_bias": case.m}[name]
        bound = units("matmul_backward") * getattr(scale, name) + TINY * (terms + 1)
        assert_within(getattr(found, name), getattr(expected, name), bound, f"{name} against NumPy")
        if device.isa:
            reference = getattr(expected_reference(case), name)
            assert_within(getattr(found, name), reference, bound + U32 * np.abs(reference), f"{name}, the reference")


@pytest.mark.parametrize(
    ("wants_x", "wants_weight", "wants_bias"),
    [(True, False, False), (False, True, False), (False, False, True), (False, True, True), (False, False, False)],
)
@all_devices
def test_matmul_backward_gives_as_many_gradients_as_are_asked_for(
    device: Device, wants_x: bool, wants_weight: bool, wants_bias: bool
) -> None:
    case = Case(17, 35, 33)
    p, all_of_them = make_problem(case), differentiate(device, case)
    backend = device.backend
    d_x = guarded_empty(p.x.shape)
    d_weight, d_bias = backend.matrix(p.d_weight), guarded(p.d_bias)
    backend.matmul_backward(
        guarded(p.d_y),
        backend.matrix(p.weight) if wants_x else None,
        guarded(p.x) if wants_weight else None,
        d_x if wants_x else None,
        d_weight if wants_weight else None,
        d_bias if wants_bias else None,
    )
    if wants_x:
        assert_same_bits(d_x, all_of_them.d_x)
    assert_same_bits(d_weight.to_array(), all_of_them.d_weight if wants_weight else p.d_weight)
    assert_same_bits(d_bias, all_of_them.d_bias if wants_bias else p.d_bias)


@pytest.mark.parametrize("kept", [Kept("bfloat16"), Kept("float32")], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 65), (40, 130, 257)])
@all_devices
def test_the_gradient_passes_through_weights_of_floats(device: Device, shape: tuple[int, int, int], kept: Kept) -> None:
    case = Case(*shape)
    p = make_problem(case)
    matrix = device.backend.matrix(guarded(p.weight), kept.name)
    exact = numpy_ops.as_kept(p.weight, kept.name)
    expected, scale = numpy_ops.matmul(p.d_y, exact.T, None, None)
    bound = units("matmul_backward") * scale + TINY * case.n
    assert_within(differentiate(device, case, matrix=matrix).d_x, expected, bound)


@each_layout
@all_devices
def test_the_gradient_passes_through_frozen_quantised_weights(device: Device, kept: Kept) -> None:
    rng = np.random.default_rng(9)
    for m, n, k in [(1, 1, 1), (5, 33, 65), (17, 65, 130), (3, 130, 257)]:
        w = weights(kept, rng, n, kept.columns(k))
        width = w.exact.shape[1]
        case = Case(m, n, width)
        exact = w.exact.astype(np.float32)
        expected, scale = numpy_ops.matmul(make_problem(case).d_y, exact.T, None, None)
        found = differentiate(device, case, matrix=w.on(device.backend))
        bound = units("matmul_backward") * scale + TINY * n
        # A minimum or a scale of a scale may be rounded once more on the way to float32.
        assert_within(found.d_x, expected, bound + 4 * U32 * scale, f"{m} x {n} x {width}")
        if not device.is_cuda and kept.name != "float16":
            trained = differentiate(device, case, matrix=w.on(device.backend), compute="bfloat16")
            assert_same_bits(trained.d_x, found.d_x, "a CPU never rounds them")


@pytest.mark.parametrize(
    "case", [Case(1, 1, 1), Case(5, 33, 65, True, 3), Case(200, 130, 257), Case(33, 64, 96)], ids=str
)
@all_devices
def test_bfloat16_products_cost_no_more_than_bfloat16(device: Device, case: Case) -> None:
    expected, scale = expected_numpy(case)
    found = differentiate(device, case, compute="bfloat16")
    for name in ("d_x", "d_weight", "d_bias"):
        bound = (units("bfloat16-products") + units("matmul_backward")) * getattr(scale, name) + TINY
        assert_within(getattr(found, name), getattr(expected, name), bound, name)


@pytest.mark.parametrize("compute", ["exact", "bfloat16"])
@each_isa
def test_matmul_backward_has_the_same_bits_with_any_threads(isa: str, compute: str) -> None:
    for case in (Case(521, 131, 261), Case(3, 700, 65), Case(1100, 33, 40, True)):
        one, two, three = (differentiate(Device(isa, threads), case, compute=compute) for threads in (1, 2, 3))
        for name in ("d_x", "d_weight", "d_bias"):
            assert_same_bits(getattr(two, name), getattr(one, name), name)
            assert_same_bits(getattr(three, name), getattr(one, name), name)


@each_tier_and_thread_count
def test_d_x_of_a_row_has_the_same_bits_in_any_batch(device: Device) -> None:
    case = Case(169, 131, 70)
    p, whole = make_problem(case), differentiate(device, case)
    matrix = device.backend.matrix(p.weight)
    for rows in (1, 2, 5, 14, 33):
        d_x = guarded_empty((rows, case.k))
        device.backend.matmul_backward(guarded(p.d_y[3 : 3 + rows]), matrix, None, d_x, None, None)
        assert_same_bits(d_x, whole.d_x[3 : 3 + rows], f"{rows} rows")


@all_devices
def test_nan_stays_in_its_row_of_d_x_and_its_row_of_d_weight(device: Device) -> None:
    case = Case(35, 37, 70)
    p = make_problem(case)
    d_y = np.ones_like(p.d_y)
    d_y[4, 36] = np.nan
    found = differentiate(device, case, problem=Problem(d_y, np.ones_like(p.weight), p.x, p.d_x, p.d_weight, p.d_bias))
    assert np.isnan(found.d_x[4]).all()
    assert (np.delete(found.d_x, 4, axis=0) == 37).all()
    assert np.isnan(found.d_weight[36]).all()
    assert np.isfinite(found.d_weight[:36]).all()
    assert np.isnan(found.d_bias[36])
    assert np.isfinite(found.d_bias[:36]).all()


@pytest.mark.parametrize("side", ["end", "start"])
@all_devices
def test_matmul_backward_touches_no_byte_before_or_after_its_arrays(device: Device, side: Any) -> None:
    rng = np.random.default_rng(3)
    for m, n, k in [(1, 1, 1), (1, 17, 33), (6, 33, 31), (14, 31, 65), (15, 65, 15), (33, 3, 7)]:
        backend = device.backend
        weight, d_weight = backend.matrix(rng.random((n, k), np.float32)), backend.matrix(np.zeros((n, k), np.float32))
        d_y, x = guarded(rng.random((m, n), np.float32), side), guarded(rng.random((m, k), np.float32), side)
        d_x, d_bias = guarded_empty((m, k), side=side), guarded(np.zeros(n, np.float32), side)
        backend.matmul_backward(d_y, weight, x, d_x, d_weight, d_bias)
        assert not np.isnan(d_x).any()
        assert not np.isnan(d_weight.to_array()).any()
        assert not np.isnan(d_bias).any()


@all_devices
def test_matmul_backward_refuses_what_does_not_fit(device: Device) -> None:
    backend = device.backend
    weight, d_weight = backend.matrix(np.zeros((3, 4), np.float32)), backend.matrix(np.zeros((3, 4), np.float32))
    d_y, x, d_x = np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)
    d_bias = np.zeros(3, np.float32)
    with pytest.raises(ShapeError, match="weight"):
        backend.matmul_backward(x, weight, None, d_x, None, None)
    with pytest.raises(ShapeError, match="d_x"):
        backend.matmul_backward(d_y, weight, None, d_y, None, None)
    with pytest.raises(ShapeError, match="x"):
        backend.matmul_backward(d_y, None, x[:, :3].copy(), None, d_weight, None)
    with pytest.raises(ShapeError, match="d_bias"):
        backend.matmul_backward(d_y, None, None, None, None, np.zeros(4, np.float32))
    with pytest.raises(DTypeError, match="d_weight must be float32"):
        backend.matmul_backward(d_y, None, x, None, backend.matrix(np.zeros((3, 4), np.float32), "bfloat16"), None)
    with pytest.raises(DTypeError):
        backend.matmul_backward(d_y.astype(np.float64), weight, x, d_x, d_weight, d_bias)  # type: ignore[arg-type]
    square = backend.matrix(np.zeros((3, 3), np.float32))
    with pytest.raises(ShapeError, match="overlap"):
        backend.matmul_backward(d_y, square, None, d_y, None, None)
    with pytest.raises(OptionError, match="compute"):
        backend.matmul_backward(d_y, weight, x, d_x, d_weight, d_bias, False, "fast")
    with pytest.raises(LlamaExtError, match="another Backend"):
        _core.Backend("reference").matmul_backward(d_y, weight, x, d_x, d_weight, d_bias)
    read_only = np.zeros((2, 4), np.float32)
    read_only.flags.writeable = False
    with pytest.raises(OptionError, match="read-only"):
        backend.matmul_backward(d_y, weight, None, read_only, None, None)
