"""The number formats of GGUF's tensors: sizes, and their values as float32, in NumPy.

A row is a sequence of blocks, each with its own scale; no block crosses a row. The functions here are the definition
that kernels are tested against, and what `convert` writes with: every product and sum is one float32 operation in the
order of the formula, as in ggml's scalar code, so that the results are equal to the bit.

Layouts, in bytes from the start of a block; all numbers are little endian, and d, m are float16:

    Q4_0   32 values: d[2] q[16].           x = d * (q - 8); byte i holds value i (low nibble) and i + 16 (high).
    Q4_1   32 values: d[2] m[2] q[16].      x = d * q + m; nibbles as in Q4_0.
    Q5_0   32 values: d[2] h[4] q[16].      x = d * (q - 16); bit i of the 32-bit word h is the fifth bit of value i.
    Q5_1   32 values: d[2] m[2] h[4] q[16]. x = d * q + m.
    Q8_0   32 values: d[2] q[32].           x = d * q, q signed.
    Q4_K  256 values: d[2] m[2] s[12] q[128].        x = (d * scale) * q - (m * minimum), per group of 32.
                      32 bytes of q hold two groups: low nibbles, then high ones. `_scales_and_minimums` unpacks s.
    Q5_K  256 values: d[2] m[2] s[12] h[32] q[128].  As Q4_K; bit g of h[i] is the fifth bit of value i of group g.
    Q6_K  256 values: l[128] h[64] s[16] d[2].       x = (d * s) * (q - 32), s signed, per group of 16.
                      For each half of 128 values: 64 bytes of l (low nibbles are values 0-63, high ones 64-127) and
                      32 bytes of h (bits 2j, 2j + 1 of byte i belong to value 32 j + i).

Source: ggml, `ggml-common.h` (structs) and `ggml-quants.c` (`dequantize_row_*`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext.errors import DTypeError, NumericError, ShapeError, UnsupportedError

__all__ = ["BY_NAME", "GGML_NAMES", "SUPPORTED", "GgmlType", "dequantize", "ggml_type", "quantize"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class GgmlType:
    """One number format.

    Args:
        id: Its number in a file.
        name: ggml's name: Q4_K.
        block: Values of a block; 1 for plain numbers.
        block_bytes: Bytes of a block.
        file_type: `general.file_type` of a file whose matrices mostly have this format.
    """

    id: int
    name: str
    block: int
    block_bytes: int
    file_type: int

    def row_bytes(self, values: int) -> int:
        """Bytes of a row.

        Args:
            values: Of the row, a multiple of `block`.

        Returns:
            The number of bytes.

        Raises:
            ShapeError: The row is not a whole number of blocks.
        """
        if values < 0 or values % self.block:
            raise ShapeError(f"{self.name}: a row must be a multiple of {self.block} values, got {values}")
        return values // self.block * self.block_bytes


_TYPES = (
    GgmlType(0, "F32", 1, 4, 0),
    GgmlType(1, "F16", 1, 2, 1),
    GgmlType(30, "BF16", 1, 2, 32),
    GgmlType(8, "Q8_0", 32, 34, 7),
    GgmlType(2, "Q4_0", 32, 18, 2),
    GgmlType(3, "Q4_1", 32, 20, 3),
    GgmlType(6, "Q5_0", 32, 22, 8),
    GgmlType(7, "Q5_1", 32, 24, 9),
    GgmlType(12, "Q4_K", 256, 144, 15),
    GgmlType(13, "Q5_K", 256, 176, 17),
    GgmlType(14, "Q6_K", 256, 210, 18),
)
SUPPORTED: dict[int, GgmlType] = {kind.id: kind for kind in _TYPES}
BY_NAME: dict[str, GgmlType] = {kind.name: kind for kind in _TYPES}

# Every number that ggml has given out; a file with another one is from its future, or damaged.
_NAMES = """
    F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K
    IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16
    Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8 IQ4_NL_8_8 MXFP4 NVFP4 Q1_0
"""
GGML_NAMES: dict[int, str] = dict(enumerate(_NAMES.split()))


def ggml_type(number: int, tensor: str, path: str) -> GgmlType:
    """The format with a number.

    Args:
        number: From the file.
        tensor: The tensor it belongs to, for the message.
        path: The file, for the message.

    Returns:
        The format.

    Raises:
        UnsupportedError: It is none that is supported; the message names it.
    """
    kind = SUPPORTED.get(number)
    if kind is None:
        what, advice = f"type number {number}", "Is the file damaged, or of a newer ggml?"
        if number in GGML_NAMES:
            what, advice = f"type {GGML_NAMES[number]}", "Take a file of one of these."
        raise UnsupportedError(
            f"{path}: tensor {tensor[:120]!r} has {what}, which is not supported. Supported: {', '.join(BY_NAME)}. {advice}"
        )
    return kind


def dequantize(data: Bytes, kind: GgmlType) -> Floats:
    """The values of rows of blocks.

    Args:
        data: (rows, row bytes) uint8, or more axes before the last one.
        kind: Their format.

    Returns:
        (rows, values) float32.

    Raises:
        DTypeError: `data` is not uint8.
        ShapeError: A row is not a whole number of blocks.
    """
    if data.dtype != np.uint8:
        raise DTypeError(f"{kind.name}: the blocks must be uint8, got {data.dtype}")
    if data.ndim == 0 or data.shape[-1] % kind.block_bytes:
        raise ShapeError(f"{kind.name}: a row must be a multiple of {kind.block_bytes} bytes, got shape {data.shape}")
    blocks = np.ascontiguousarray(data).reshape(-1, kind.block_bytes)
    # A scale that is infinite or NaN gives such values, as everywhere else, and no warning.
    with np.errstate(all="ignore"):
        values: Floats = _DEQUANTIZERS[kind.name](blocks)
    return values.reshape(*data.shape[:-1], data.shape[-1] // kind.block_bytes * kind.block)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at an offset of each block, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(q: Bytes) -> Bytes:
    """All low nibbles, then all high ones, along the last axis."""
    return np.concatenate([q & 15, q >> 4], axis=-1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """Bit i of the 32-bit word at an offset of each block, as 0 or 16: (blocks, 32)."""
    return np.unpackbits(blocks[:, at : at + 4], axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    q = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (q.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Floats:
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * q.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)


def _scales_and_minimums(s: Bytes) -> tuple[Floats, Floats]:
    """The eight 6-bit scales and eight 6-bit minimums of Q4_K and Q5_K, (blocks, 8, 1) each.

    Bytes 0-3 hold scales 0-3 and bytes 4-7 minimums 0-3 in their low six bits. Scale 4 + i has its low four bits in the
    low nibble of byte 8 + i, minimum 4 + i in the high one; their upper two are the top bits of bytes i and 4 + i.
    """
    first, second, third = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=-1)
    minimums = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    return scales[..., None].astype(np.float32), minimums[..., None].astype(np.float32)


def _k(blocks: Bytes, q: Bytes) -> Floats:
    """Q4_K and Q5_K from the codes q, (blocks, 8, 32)."""
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    scale = _half(blocks, 0)[..., None] * scales
    minimum = _half(blocks, 2)[..., None] * minimums
    return scale * q.astype(np.float32) - minimum


def _q4_k(blocks: Bytes) -> Floats:
    return _k(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> Floats:
    q = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    # Bit g of every byte in plane g: (blocks, 8, 32).
    planes: Bytes = np.unpackbits(blocks[:, 16:48, None], axis=-1, bitorder="little").swapaxes(1, 2)
    return _k(blocks, q | (planes << np.uint8(4)))


def _q6_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64))
    pair = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> pair & 3).reshape(-1, 2, 128)
    q = (low | (high << 4)).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return (_half(blocks, 208) * scales)[..., None] * q


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


_DEQUANTIZERS: dict[str, Callable[[Bytes], Any]] = {
    "F32": lambda blocks: blocks.view("<f4").astype(np.float32),
    "F16": lambda blocks: blocks.view("<f2").astype(np.float32),
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def quantize(values: Floats, kind: GgmlType) -> Bytes:
    """Rows of float32 as blocks: F32, F16, BF16 (both to nearest even), Q8_0 or Q4_0.

    Q8_0: d = max|x| / 127, q = x / d to nearest, halves away from zero. Q4_0: d = x / -8 for the x of the largest
    magnitude (the first one among equals), q = trunc(x / d + 8.5), at most 15. Division is a product with 1 / d in
    float32, d itself is stored as float16.

    Args:
        values: (rows, values) float32, or more axes before the last one.
        kind: The format.

    Returns:
        (rows, row bytes) uint8.

    Raises:
        DTypeError: `values` is not float32.
        NumericError: A value is infinite or NaN, or too large for float16 or for the block's scale.
        ShapeError: A row is not a whole number of blocks.
        UnsupportedError: Another format.
    """
    if values.dtype != np.float32:
        raise DTypeError(f"{kind.name}: the values must be float32, got {values.dtype}")
    if kind.name not in _QUANTIZERS:
        raise UnsupportedError(f"writing {kind.name} is not supported. Supported: {', '.join(_QUANTIZERS)}.")
    if values.ndim == 0:
        raise ShapeError(f"{kind.name}: expected rows of values, got a scalar")
    row_bytes = kind.row_bytes(values.shape[-1])
    blocks = np.ascontiguousarray(values).reshape(-1, kind.block)
    if not np.isfinite(blocks).all():
        raise NumericError(f"{kind.name}: there are infinite values or NaNs among the weights")
    with np.errstate(all="ignore"):
        data = _QUANTIZERS[kind.name](blocks)
    return data.reshape(*values.shape[:-1], row_bytes)


def _to_half(values: Floats) -> Bytes:
    half = values.astype("<f2")
    if np.isinf(half).any():
        largest = float(np.abs(values).max())
        raise NumericError(f"{largest:g} is too large for float16, whose largest number is 65504. Write F32 or BF16.")
    return half.view(np.uint8)


def _to_bf16(values: Floats) -> Bytes:
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    result = (rounded >> np.uint32(16)).astype("<u2")
    if (result & 0x7FFF == 0x7F80).any():
        raise NumericError("a weight is too large for bfloat16. Write F32.")
    return result.view(np.uint8)


def _inverse(d: Floats) -> Floats:
    inverse = np.float32(1) / d
    # Of a block that is zero, or so small that its scale is zero as float16.
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _to_q8_0(blocks: Floats) -> Bytes:
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(d)
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    q = np.copysign(whole + (magnitude - whole >= np.float32(0.5)), scaled)
    return np.concatenate([_to_half(d), q.astype(np.int8).view(np.uint8)], axis=1)


def _to_q4_0(blocks: Floats) -> Bytes:
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    d = largest / np.float32(-8)
    q = np.minimum((blocks * _inverse(d) + np.float32(8.5)).astype(np.uint8), 15)
    return np.concatenate([_to_half(d), q[:, :16] | (q[:, 16:] << 4)], axis=1)


_QUANTIZERS: dict[str, Callable[[Floats], Bytes]] = {
    "F32": lambda values: values.astype("<f4").view(np.uint8),
    "F16": _to_half,
    "BF16": _to_bf16,
    "Q8_0": _to_q8_0,
    "Q4_0": _to_q4_0,
}
