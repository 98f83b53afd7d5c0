"""GGUF files put together byte by byte, valid or not: what the reader is tested with must not come from our writer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
FORMATS = {
    UINT8: "B",
    INT8: "b",
    UINT16: "H",
    INT16: "h",
    UINT32: "I",
    INT32: "i",
    FLOAT32: "f",
    BOOL: "?",
    UINT64: "Q",
    INT64: "q",
    FLOAT64: "d",
}
F32, F16, Q4_0, Q8_0, Q4_K = 0, 1, 2, 8, 12


def string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def bare(kind: int, value: Any) -> bytes:
    """A value without its type. An array is (type of its elements, elements)."""
    if kind == STRING:
        return string(value)
    if kind == ARRAY:
        inner, elements = value
        return struct.pack("<IQ", inner, len(elements)) + b"".join(bare(inner, element) for element in elements)
    return struct.pack("<" + FORMATS[kind], value)


def entry(key: str | bytes, kind: int, value: Any) -> bytes:
    return string(key) + struct.pack("<I", kind) + bare(kind, value)


def tensor(name: str | bytes, dimensions: Sequence[int], kind: int = F32, offset: int = 0) -> bytes:
    """A tensor's description; `dimensions` in the file's order, the row first."""
    return string(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


def gguf(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    entry_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file. The counts are the true ones unless they are given."""
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(entries) if entry_count is None else entry_count,
    )
    head += b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data
