"""embedding: rows of a table, copied."""

from __future__ import annotations

import numpy as np
import pytest

import numpy_ops
from devices import REFERENCE, Device, all_devices
from guarded import guarded, guarded_empty
from llama_ext import DTypeError, ShapeError, TokenIdError
from quantized import Kept, each_kept, weights

# T, V, C
SHAPES = [
    (0, 5, 3),
    (1, 1, 1),
    (3, 5, 0),
    (2, 31, 7),
    (5, 32, 8),
    (7, 33, 31),
    (33, 64, 32),
    (4, 65, 33),
    (100, 129, 65),
]
SHAPES += [(1, 2, 14336), (300, 257, 101), (17, 1000, 16), (64, 32003, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "T{}-V{}-C{}".format(*shape))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@all_devices
def test_embedding_copies_rows(device: Device, dtype: str, shape: tuple[int, int, int]) -> None:
    count, vocabulary, width = shape
    rng = np.random.default_rng(shape)
    table = rng.standard_normal((vocabulary, width)).astype(np.float32)
    ids = rng.integers(0, vocabulary, count).astype(np.int32)
    ids[:1], ids[-1:] = vocabulary - 1, 0
    out = guarded_empty((count, width))
    device.backend.embedding(guarded(ids), device.backend.matrix(guarded(table), dtype), out)
    np.testing.assert_array_equal(out, numpy_ops.as_kept(table, dtype)[ids])


@each_kept
@all_devices
def test_embedding_widens_the_rows_of_quantised_tables_and_rounds_once(device: Device, kept: Kept) -> None:
    rng = np.random.default_rng(4)
    for count, vocabulary, width in [(1, 1, 1), (7, 33, 31), (33, 65, 130), (3, 40, 257), (2, 3, 14336)]:
        table = weights(kept, rng, vocabulary, kept.columns(width))
        ids = rng.integers(0, vocabulary, count).astype(np.int32)
        ids[-1] = vocabulary - 1
        out = guarded_empty((count, table.exact.shape[1]))
        matrix = table.on(device.backend)
        device.backend.embedding(guarded(ids), matrix, out)
        np.testing.assert_array_equal(out, table.exact[ids].astype(np.float32))
        np.testing.assert_array_equal(matrix.to_array(), table.exact.astype(np.float32))


@pytest.mark.parametrize("token", [-1, 5, 2**31 - 1, -(2**31)])
@all_devices
def test_embedding_refuses_an_id_outside_the_vocabulary(device: Device, token: int) -> None:
    table = device.backend.matrix(np.zeros((5, 3), np.float32))
    out = guarded_empty((2, 3))
    with pytest.raises(TokenIdError, match=str(token)):
        device.backend.embedding(np.array([0, token], np.int32), table, out)
    assert np.isnan(out).all(), "wrote before it checked"


def test_embedding_refuses_what_does_not_fit() -> None:
    backend = REFERENCE.backend
    table = backend.matrix(np.zeros((5, 3), np.float32))
    with pytest.raises(ShapeError):
        backend.embedding(np.zeros(2, np.int32), table, np.zeros((2, 4), np.float32))
    with pytest.raises(ShapeError):
        backend.embedding(np.zeros(2, np.int32), table, np.zeros((3, 3), np.float32))
    with pytest.raises(DTypeError):
        backend.embedding(np.zeros(2, np.int64), table, np.zeros((2, 3), np.float32))  # type: ignore[arg-type]
