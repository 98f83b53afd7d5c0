"""embedding_backward: rows are added to rows, as often as an id comes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import finite_differences
from devices import REFERENCE, Device, all_devices, each_isa
from guarded import guarded
from llama_ext import DTypeError, LlamaExtError, ShapeError, TokenIdError, _core
from tolerances import TINY, U32, assert_same_bits, assert_within, relative_rms, units

Array = npt.NDArray[Any]

# T, V, C
SHAPES = [
    (0, 5, 3),
    (1, 1, 1),
    (3, 5, 0),
    (2, 31, 7),
    (50, 3, 8),
    (7, 33, 31),
    (33, 64, 32),
    (4, 65, 33),
    (300, 29, 65),
]
SHAPES += [(2, 2, 4099), (300, 257, 101), (17, 1000, 16), (64, 32003, 5), (1000, 2, 17)]


def make_problem(tokens: int, vocabulary: int, width: int) -> tuple[Array, Array, Array]:
    """ids, d_y, and what is in the table before."""
    rng = np.random.default_rng([tokens, vocabulary, width])
    ids = rng.integers(0, vocabulary, tokens).astype(np.int32)
    ids[:1], ids[-1:] = vocabulary - 1, 0
    d_y, before = rng.standard_normal((tokens, width)), rng.standard_normal((vocabulary, width))
    return ids, d_y.astype(np.float32), before.astype(np.float32)


def differentiate(device: Device, ids: Array, d_y: Array, before: Array) -> Array:
    d_table = device.backend.matrix(before)
    device.backend.embedding_backward(guarded(ids), guarded(d_y), d_table)
    return d_table.to_array()


def expected_numpy(ids: Array, d_y: Array, before: Array) -> tuple[Array, Array]:
    """The sums, and the sums of magnitudes times how many terms there are."""
    found, scale = before.astype(np.float64), np.abs(before.astype(np.float64))
    np.add.at(found, ids, d_y.astype(np.float64))
    np.add.at(scale, ids, np.abs(d_y.astype(np.float64)))
    terms = np.bincount(ids, minlength=len(before))[:, None]
    return found, scale * np.minimum(terms, 4 + np.sqrt(terms))


def test_the_reference_is_the_slope_of_embedding() -> None:
    ids, d_y, before = make_problem(9, 5, 4)
    assert len(set(ids.tolist())) < len(ids)
    expected = finite_differences.gradient(lambda table: table[ids], before, d_y)
    assert relative_rms(differentiate(REFERENCE, ids, d_y, np.zeros_like(before)), expected) < units("gradients")
    assert relative_rms(differentiate(REFERENCE, ids, d_y, before), before + expected) < units("gradients")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "T{}-V{}-C{}".format(*shape))
@all_devices
def test_embedding_backward_matches_float64(device: Device, shape: tuple[int, int, int]) -> None:
    problem = make_problem(*shape)
    expected, scale = expected_numpy(*problem)
    found = differentiate(device, *problem)
    assert_within(found, expected, U32 * scale + TINY, "against NumPy")
    untouched = np.bincount(problem[0], minlength=shape[1]) == 0
    assert_same_bits(found[untouched], problem[2][untouched], "rows of no id")


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 4), max_size=40), width=st.integers(1, 20), seed=st.integers(0, 2**32))
@all_devices
def test_equal_ids_add_up_in_any_order_of_others(device: Device, ids: list[int], width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Whole numbers, whose sums are exact.
    d_y = rng.integers(-1000, 1000, (len(ids), width)).astype(np.float32)
    found = differentiate(device, np.array(ids, np.int32), d_y, np.zeros((5, width), np.float32))
    expected = np.zeros((5, width), np.float32)
    for token, row in zip(ids, d_y, strict=True):
        expected[token] += row
    np.testing.assert_array_equal(found, expected)


@each_isa
def test_embedding_backward_has_the_same_bits_with_any_threads(isa: str) -> None:
    for shape in [(1000, 7, 65), (300, 257, 101)]:
        problem = make_problem(*shape)
        results = [differentiate(Device(isa, threads), *problem) for threads in (1, 2, 3)]
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("token", [-1, 5, 2**31 - 1, -(2**31)])
@all_devices
def test_embedding_backward_refuses_an_id_outside_the_vocabulary(device: Device, token: int) -> None:
    d_table = device.backend.matrix(np.zeros((5, 3), np.float32))
    with pytest.raises(TokenIdError, match=str(token)):
        device.backend.embedding_backward(np.array([0, token], np.int32), np.ones((2, 3), np.float32), d_table)
    assert (d_table.to_array() == 0).all(), "wrote before it checked"


@all_devices
def test_embedding_backward_refuses_what_does_not_fit(device: Device) -> None:
    backend, ids, d_y = device.backend, np.zeros(2, np.int32), np.zeros((2, 3), np.float32)
    d_table = backend.matrix(np.zeros((5, 3), np.float32))
    with pytest.raises(ShapeError):
        backend.embedding_backward(ids, np.zeros((2, 4), np.float32), d_table)
    with pytest.raises(ShapeError):
        backend.embedding_backward(ids, np.zeros((3, 3), np.float32), d_table)
    with pytest.raises(DTypeError, match="d_table must be float32"):
        backend.embedding_backward(ids, d_y, backend.matrix(np.zeros((5, 3), np.float32), "bfloat16"))
    with pytest.raises(DTypeError):
        backend.embedding_backward(ids.astype(np.int64), d_y, d_table)  # type: ignore[arg-type]
    with pytest.raises(LlamaExtError, match="another Backend"):
        _core.Backend("reference").embedding_backward(ids, d_y, d_table)
