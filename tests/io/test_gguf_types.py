"""GGUF's number formats: values equal to the gguf package's to the bit, by recorded results and beside it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ext.errors import DTypeError, NumericError, ShapeError, UnsupportedError
from llama_ext.io.gguf_types import BY_NAME, GGML_NAMES, SUPPORTED, dequantize, ggml_type, quantize

# Random blocks and their values, and random values and their blocks, recorded from the gguf package, version 0.19.
GOLDEN = np.load(Path(__file__).with_name("gguf_golden.npz"))
WRITTEN = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


def same_bits(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> bool:
    return ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", BY_NAME)
def test_values_are_those_of_the_recorded_blocks(name: str) -> None:
    assert same_bits(dequantize(GOLDEN[f"{name}.data"], BY_NAME[name]), GOLDEN[f"{name}.values"])


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_blocks_are_those_of_the_recorded_values(name: str) -> None:
    assert same_bits(quantize(GOLDEN["quantize.values"], BY_NAME[name]), GOLDEN[f"quantize.{name}"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", BY_NAME)
def test_values_are_those_of_the_package(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the gguf package")
    kind = BY_NAME[name]
    blocks = np.random.default_rng(kind.id).integers(0, 256, (500, 2 * kind.block_bytes), dtype=np.uint8)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind.id)).astype(np.float32)
    ours = dequantize(blocks, kind)
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(np.isfinite(ours), finite)
    assert same_bits(ours[finite], theirs[finite])


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 1.0, 1000.0])
def test_blocks_are_those_of_the_package(name: str, scale: float) -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the gguf package")
    values = (np.random.default_rng(7).standard_normal((64, 256)) * scale).astype(np.float32)
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    assert same_bits(quantize(values, BY_NAME[name]), theirs)


def scalar_q4_k(block: bytes) -> list[float]:
    """Q4_K as its definition reads, one value at a time."""
    d, m = struct.unpack_from("<2e", block)
    s, q = block[4:16], block[16:]
    values = []
    for group in range(8):
        if group < 4:
            scale, minimum = s[group] & 63, s[group + 4] & 63
        else:
            scale = (s[group + 4] & 15) | (s[group - 4] >> 6 << 4)
            minimum = (s[group + 4] >> 4) | (s[group] >> 6 << 4)
        for index in range(32):
            byte = q[group // 2 * 32 + index]
            code = byte & 15 if group % 2 == 0 else byte >> 4
            values.append(
                float(np.float32(d) * np.float32(scale) * np.float32(code) - np.float32(m) * np.float32(minimum))
            )
    return values


def test_q4_k_follows_its_definition() -> None:
    data = GOLDEN["Q4_K.data"][0, :144]
    assert dequantize(data, BY_NAME["Q4_K"]).tolist() == scalar_q4_k(data.tobytes())


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("Q8_0", struct.pack("<e", 0.5) + bytes([0x80, 1]) + bytes(30), {0: -64.0, 1: 0.5, 2: 0.0}),
        ("Q4_0", struct.pack("<e", 2.0) + bytes([0xF0]) + bytes(15), {0: -16.0, 16: 14.0, 17: -16.0}),
        ("Q4_1", struct.pack("<2e", 2.0, 1.0) + bytes([0xF1]) + bytes(15), {0: 3.0, 16: 31.0, 1: 1.0}),
        ("Q5_0", struct.pack("<eI", 1.0, 1 << 31 | 1) + bytes([2]) + bytes(15), {0: 2.0, 1: -16.0, 31: 0.0}),
        ("Q5_1", struct.pack("<2eI", 1.0, -1.0, 1 << 16) + bytes([0x30]) + bytes(15), {0: -1.0, 16: 18.0}),
        ("Q6_K", bytes([0x21]) + bytes(127) + bytes([0b11]) + bytes(63) + bytes([2] * 16) + struct.pack("<e", 1.0),
         {0: 2.0 * (0x31 - 32), 1: -64.0, 32: -64.0, 64: 2.0 * (2 - 32)}),
    ],
)  # fmt: skip
def test_a_block_by_hand(name: str, block: bytes, expected: dict[int, float]) -> None:
    values = dequantize(np.frombuffer(block, np.uint8), BY_NAME[name])
    assert {index: float(values[index]) for index in expected} == expected


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(WRITTEN), st.integers(0, 3), st.integers(1, 4), st.integers(0, 2**32 - 1), st.floats(-6, 4))
def test_what_is_written_reads_as_nearly_the_same(name: str, rows: int, blocks: int, seed: int, power: float) -> None:
    kind = BY_NAME[name]
    values = (np.random.default_rng(seed).standard_normal((rows, blocks * 32)) * 10.0**power).astype(np.float32)
    data = quantize(values, kind)
    assert data.shape == (rows, kind.row_bytes(blocks * 32))
    back = dequantize(data, kind)
    assert back.shape == values.shape
    # Half a step of the format, plus what float16 rounds off the scale; Q4_0's step is whole at the far end of a block.
    share = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.5 / 127 + 2**-10, "Q4_0": 1 / 8 + 2**-10}[name]
    largest = np.abs(values).reshape(rows, blocks, 32).max(axis=-1, keepdims=True) if rows else np.zeros((0, blocks, 1))
    smallest_half = 2**-24 * 127
    error = np.abs(back - values).reshape(rows, blocks, 32)
    assert np.all(error <= largest * share + (0 if name in ("F32", "BF16") else smallest_half))


@pytest.mark.parametrize("name", WRITTEN)
def test_what_was_read_is_written_as_it_was(name: str) -> None:
    values = quantize(np.random.default_rng(1).standard_normal((16, 256), dtype=np.float32), BY_NAME[name])
    again = quantize(dequantize(values, BY_NAME[name]), BY_NAME[name])
    if name == "Q8_0":  # the largest code may be less than 127 of a rounded scale
        assert np.mean(again != values) < 0.1
    else:
        assert np.mean(again != values) < 0.02


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    values = np.zeros((2, 32), np.float32)
    values[1, 3] = value
    with pytest.raises(NumericError, match="infinite values or NaNs"):
        quantize(values, BY_NAME[name])


@pytest.mark.parametrize(("name", "value"), [("F16", 65520.0), ("Q8_0", 1e7), ("Q4_0", 6e5), ("BF16", 3.4e38)])
def test_what_is_too_large_is_refused(name: str, value: float) -> None:
    with pytest.raises(NumericError, match="too large"):
        quantize(np.full((1, 32), value, np.float32), BY_NAME[name])


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-40, 1e-30])
def test_tiny_blocks_become_zero(name: str, value: float) -> None:
    assert not dequantize(quantize(np.full((1, 32), value, np.float32), BY_NAME[name]), BY_NAME[name]).any()


def test_wrong_arrays_are_refused() -> None:
    kind = BY_NAME["Q8_0"]
    with pytest.raises(DTypeError, match="uint8"):
        dequantize(np.zeros(34, np.int8), kind)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="multiple of 34 bytes"):
        dequantize(np.zeros((2, 33), np.uint8), kind)
    with pytest.raises(DTypeError, match="float32"):
        quantize(np.zeros(32), kind)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="multiple of 32 values"):
        quantize(np.zeros(31, np.float32), kind)
    with pytest.raises(ShapeError, match="scalar"):
        quantize(np.float32(1).reshape(()), kind)
    with pytest.raises(UnsupportedError, match="writing Q4_K"):
        quantize(np.zeros(256, np.float32), BY_NAME["Q4_K"])


@pytest.mark.parametrize(
    ("number", "named"), [(17, "type IQ2_XS"), (4, "type Q4_2"), (39, "type MXFP4"), (42, "type number 42")]
)
def test_another_type_is_refused_by_name(number: int, named: str) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"x\.gguf: tensor 'blk\.0' has {named}, .* Supported: F32, F16, .*Q6_K"
    ):
        ggml_type(number, "blk.0", "x.gguf")


def test_the_table_agrees_with_the_package() -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the gguf package")
    for kind in SUPPORTED.values():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.block, kind.block_bytes)
        assert gguf.GGMLQuantizationType[kind.name] == kind.id
    for each in gguf.GGMLQuantizationType:
        assert GGML_NAMES.get(each.value, each.name) == each.name
