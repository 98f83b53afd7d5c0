"""rope: rotations against complex numbers, and the frequencies of every kind of scaling."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import finite_differences
import numpy_ops
from devices import REFERENCE, Device, all_devices, each_isa
from guarded import guarded, guarded_rows, guarded_rows_empty
from llama_ext import OptionError, ShapeError, _core
from tolerances import TINY, assert_same_bits, assert_within, relative_rms, units

Array = npt.NDArray[Any]

DIMS = [2, 4, 6, 8, 14, 16, 18, 30, 32, 34, 62, 64, 66, 94, 96, 126, 128, 130, 254, 256]
# T, heads, D
SHAPES = [([1, 3, 17][i % 3], [1, 2, 5][i // 2 % 3], dim) for i, dim in enumerate(DIMS)]
SHAPES += [(0, 2, 8), (5, 0, 8), (300, 9, 34), (129, 32, 128), (1, 64, 128)]
SHAPE_IDS = ["T{}-H{}-D{}".format(*shape) for shape in SHAPES]


@functools.cache
def make_problem(tokens: int, heads: int, dim: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng([tokens, heads, dim])
    angle = rng.uniform(-np.pi, np.pi, (tokens, dim // 2))
    x = rng.standard_normal((tokens, heads, dim)).astype(np.float32)
    return x, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@functools.cache
def expected_reference(tokens: int, heads: int, dim: int) -> Array:
    x, cos, sin = make_problem(tokens, heads, dim)
    result = x.copy()
    REFERENCE.backend.rope(result, cos, sin)
    return result


@pytest.mark.parametrize(("tokens", "heads", "dim"), SHAPES, ids=SHAPE_IDS)
@all_devices
def test_rope_matches_float64(device: Device, tokens: int, heads: int, dim: int) -> None:
    x, cos, sin = make_problem(tokens, heads, dim)
    expected, scale = numpy_ops.rope(x, cos, sin)
    result = guarded(x)
    device.backend.rope(result, guarded(cos), guarded(sin))
    bound = units("rope") * scale + TINY
    assert_within(result, expected, bound, "against NumPy")
    if device.isa:
        assert_within(result, expected_reference(tokens, heads, dim), bound, "against the reference")


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(3, 2, 6), (17, 5, 34), (300, 9, 34)])
@all_devices
def test_rope_of_strided_rows_leaves_what_is_between_them(device: Device, tokens: int, heads: int, dim: int) -> None:
    x, cos, sin = make_problem(tokens, heads, dim)
    plain = guarded(x)
    device.backend.rope(plain, cos, sin)
    strided, gaps = guarded_rows_empty(x.shape, 11)
    strided[...] = x
    device.backend.rope(strided, cos, sin)
    assert_same_bits(strided, plain)
    assert np.isnan(gaps).all()


@pytest.mark.parametrize(("tokens", "heads", "dim"), SHAPES, ids=SHAPE_IDS)
@all_devices
def test_the_inverse_rotates_by_the_opposite_angle(device: Device, tokens: int, heads: int, dim: int) -> None:
    x, cos, sin = make_problem(tokens, heads, dim)
    expected, scale = numpy_ops.rope(x, cos, -sin)
    result, gaps = guarded_rows_empty(x.shape, 3 if dim % 4 else 0)
    result[...] = x
    device.backend.rope(result, guarded(cos), guarded(sin), True)
    assert_within(result, expected, units("rope") * scale + TINY)
    assert np.isnan(gaps).all()


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (3, 2, 6), (5, 1, 8)])
@all_devices
def test_the_inverse_is_the_slope_of_rope(device: Device, tokens: int, heads: int, dim: int) -> None:
    x, cos, sin = make_problem(tokens, heads, dim)
    d_x = np.random.default_rng(dim).standard_normal(x.shape).astype(np.float32)
    expected = finite_differences.gradient(lambda at: numpy_ops.rope(at, cos, sin)[0], x, d_x)
    device.backend.rope(d_x, cos, sin, True)
    assert relative_rms(d_x, expected) < units("gradients")


@each_isa
def test_rope_has_the_same_bits_with_any_threads(isa: str) -> None:
    x, cos, sin = make_problem(300, 9, 34)
    results = [guarded(x) for _ in range(3)]
    for threads, result in enumerate(results, start=1):
        Device(isa, threads).backend.rope(result, cos, sin)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_rope_refuses_what_does_not_fit() -> None:
    backend = REFERENCE.backend
    half = np.ones((3, 2), np.float32)
    with pytest.raises(ShapeError):
        backend.rope(np.ones((3, 1, 5), np.float32), half, half)
    with pytest.raises(ShapeError):
        backend.rope(np.ones((2, 1, 4), np.float32), half, half)
    with pytest.raises(ShapeError):
        backend.rope(np.ones((3, 1, 4), np.float32), half, guarded_rows(half, 1))


ROPES: dict[str, dict[str, Any]] = {
    "default": {"head_dim": 64},
    "theta": {"head_dim": 128, "theta": 500000.0},
    "smallest": {"head_dim": 2},
    "linear": {"kind": "linear", "head_dim": 80, "factor": 4.0},
    "llama3": {
        "kind": "llama3",
        "head_dim": 128,
        "theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_context": 8192,
    },
    "yarn": {
        "kind": "yarn",
        "head_dim": 64,
        "theta": 10000.0,
        "factor": 16.0,
        "original_context": 2048,
        "attention_factor": 1.2772588722239782,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "yarn-untruncated": {
        "kind": "yarn",
        "head_dim": 96,
        "theta": 150000.0,
        "factor": 32.0,
        "original_context": 4096,
        "attention_factor": 1.5,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_angles_are_those_of_float64_rounded_once(name: str) -> None:
    rope = ROPES[name]
    positions = np.array([0, 1, 2, 3, 31, 32, 1000, 8191, 131071, 1048575], np.int64)
    cos, sin = _core.rope_angles(rope, positions)
    angle = positions[:, None] * numpy_ops.rope_frequencies(rope)
    factor = rope.get("attention_factor", 1.0)
    # The frequency's own rounding, times the position, is all that two float64 computations may differ by.
    bound = factor * (units("rope_angles") + 1e-15 * angle)
    assert_within(cos, factor * np.cos(angle), bound, "cos")
    assert_within(sin, factor * np.sin(angle), bound, "sin")
    assert cos.shape == sin.shape == (len(positions), rope["head_dim"] // 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"head_dim": 3},
        {"head_dim": 0},
        {"head_dim": -2},
        {"head_dim": 4, "theta": 0.0},
        {"head_dim": 4, "theta": float("nan")},
        {"head_dim": 4, "kind": "linear", "factor": 0.0},
        {"head_dim": 4, "kind": "dynamic"},
        {"head_dim": 4, "unknown": 1},
    ],
    ids=str,
)
def test_rope_angles_refuse_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        _core.rope_angles(wrong, np.zeros(1, np.int64))
