"""Codes of quantised matrices as arrays: w = scale (code - zero) + min gives back exactly what the matrix reads as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gguf_models
import llama_ext
from llama_ext import _core
from llama_ext.errors import CheckpointError, DTypeError, ShapeError, UnsupportedError
from llama_ext.io.gguf_types import BY_NAME, dequantize
from llama_ext.limits import DEFAULT_LIMITS
from llama_ext.runtime.gguf_files import GgufFiles
from random_models import build

# What is subtracted from a code; with minima, nothing.
ZEROS = {"int8": 128, "int5": 16, "int4": 8, "q6_k": 32}


def widened(codes: object, scales: object, mins: object, encoding: str, group: int) -> np.ndarray:
    """In float64, rounded once: every product and sum before is exact there."""
    codes, scales = np.asarray(codes, np.float64), np.asarray(scales, np.float64)
    columns = codes.shape[1]
    spread = np.repeat(scales, group, axis=1)[:, :columns]
    values = spread * (codes - ZEROS.get(encoding, 0))
    if mins is not None:
        values += np.repeat(np.asarray(mins, np.float64), group, axis=1)[:, :columns]
    return values.astype(np.float32)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("encoding", ["int8", "int8_min", "int4", "int4_min"])
def test_codes_are_the_matrix(encoding: str, group: int) -> None:
    """With rows that the groups do not divide, and Q, K and V in one matrix."""
    model = build(_core.Backend("cpu", 2), encoding, group=group)
    for name, shape, is_matrix in model.slots():
        if not is_matrix:
            continue
        codes, scales, mins = model.read_codes(name)
        assert codes.shape == shape
        assert codes.dtype == np.uint8
        assert scales.shape == (shape[0], -(-shape[1] // group))
        assert (mins is not None) == encoding.endswith("_min")
        assert np.array_equal(widened(codes, scales, mins, encoding, group), model.read(name))


@pytest.mark.parametrize("kind", gguf_models.BLOCKS)
def test_blocks_of_gguf_are_the_codes_of_their_matrix(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_models.write(path, gguf_models.config(), kind)
    core = llama_ext.LlamaForCausalLM.from_pretrained(path)._core
    files = GgufFiles(path, DEFAULT_LIMITS)
    for tensor in files.tensors:
        if len(tensor.shape) == 1:
            continue
        encoding, group = core.types()[tensor.slot]
        found, kept = files.read_codes(tensor), core.read_codes(tensor.slot)
        for one, other in zip(found, kept, strict=True):
            assert (one is None and other is None) or np.array_equal(one, other)
        assert np.array_equal(widened(*found, encoding, group), core.read(tensor.slot))
    files.close()


@pytest.mark.parametrize("kind", gguf_models.BLOCKS)
def test_decoded_blocks_are_what_ggml_defines(kind: str) -> None:
    blocks = gguf_models.random_rows((5, 512), BY_NAME[kind], np.random.default_rng(3))
    encoding, group = _core.type_of_blocks(kind)
    values = widened(*_core.decode_blocks(blocks, kind, 512), encoding, group)
    # ggml rounds each product to float32; here they are rounded together.
    np.testing.assert_allclose(values, dequantize(blocks, BY_NAME[kind]), rtol=1e-6, atol=1e-7)


def test_what_has_no_codes_is_refused() -> None:
    model = build(_core.Backend("cpu", 1))
    for slot in ("layers.0.q", "final_norm"):
        with pytest.raises(DTypeError, match="not quantised"):
            model.read_codes(slot)
    with pytest.raises(CheckpointError, match=r"no slot 'layers\.9\.q'"):
        model.read_codes("layers.9.q")
    reference = build(_core.Backend("reference"), "int8", group=32)
    with pytest.raises(UnsupportedError, match="reference backend"):
        reference.read_codes("layers.0.q")
    with pytest.raises(ShapeError, match="rows of 64 Q8_0"):
        _core.decode_blocks(np.zeros(67, np.uint8), "Q8_0", 64)
    with pytest.raises(DTypeError, match="Q3_K"):
        _core.decode_blocks(np.zeros(68, np.uint8), "Q3_K", 64)
    bad = np.zeros((1, 34), np.uint8)
    bad[0, :2] = np.array([np.inf], "<f2").view(np.uint8)
    with pytest.raises(CheckpointError, match="not a finite number"):
        _core.decode_blocks(bad, "Q8_0", 32)
