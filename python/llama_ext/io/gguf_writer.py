"""Writes GGUF files, version 3: metadata first, then each tensor as it is produced, with no second copy of it."""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from llama_ext.errors import CheckpointError, OptionError
from llama_ext.io.atomic import atomic_write
from llama_ext.io.gguf_file import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMENSIONS,
    NUMBERS,
    ValueType,
)
from llama_ext.io.gguf_types import GgmlType

__all__ = ["MetadataValue", "TensorToWrite", "write_gguf"]

VERSION = 3
# ggml keeps a name in 64 bytes, the last of them a zero.
MAX_NAME_BYTES = 63

MetadataValue = bool | int | float | str | np.generic | npt.NDArray[Any] | Sequence[str]


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """One tensor of a file to be written.

    Args:
        name: Its name.
        type: The format of its numbers.
        shape: Its shape in NumPy's order.
        chunks: Makes its bytes, row after row, in pieces of any size: bytes or arrays. Called when its turn comes.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | npt.NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        rows = 1
        for extent in self.shape[:-1]:
            rows *= extent
        return rows * self.type.row_bytes(self.shape[-1] if self.shape else 1)


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, MetadataValue],
    tensors: Sequence[TensorToWrite],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a file, whole or not at all: until it is complete, what was at `path` before stays there.

    Args:
        path: The file; its folder must exist.
        metadata: The entries, in order. A Python int is written as UINT32, a float as FLOAT32; a NumPy scalar or array
            as its own type; a list has to be of strings.
        tensors: The tensors, in order.
        alignment: Bytes that every tensor's start is a multiple of, a power of two.
        progress: Called with the number of bytes after each piece of a tensor.

    Raises:
        CheckpointError: A tensor's chunks have more or fewer bytes than its shape.
        OptionError: A name is used twice or too long, a value has no type in GGUF, or the alignment is not valid.
        ShapeError: A row is not a whole number of blocks.
        OSError: The file cannot be written.
    """
    if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise OptionError(f"alignment must be a power of two up to {MAX_ALIGNMENT}, got {alignment}")
    entries = dict(metadata)
    if alignment != DEFAULT_ALIGNMENT or ALIGNMENT_KEY in entries:
        entries[ALIGNMENT_KEY] = alignment
    parts = [struct.pack("<4sIQQ", MAGIC, VERSION, len(tensors), len(entries))]
    for key, value in entries.items():
        if not key:
            raise OptionError("a key of the metadata is empty")
        parts += [_string(key, key), *_value(key, value)]
    offset = 0
    seen: set[str] = set()
    for tensor in tensors:
        _check(tensor, seen)
        parts += [
            _string(tensor.name, tensor.name),
            struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape)),
            struct.pack("<IQ", tensor.type.id, offset),
        ]
        offset += _padded(tensor.nbytes, alignment)
    header = b"".join(parts)
    with atomic_write(path, follow_links=True) as file:
        file.write(header.ljust(_padded(len(header), alignment), b"\0"))
        for tensor in tensors:
            written = _write_tensor(file, tensor, progress)
            file.write(bytes(_padded(written, alignment) - written))


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def _check(tensor: TensorToWrite, seen: set[str]) -> None:
    if tensor.name in seen:
        raise OptionError(f"the tensor {tensor.name!r} is there twice")
    seen.add(tensor.name)
    size = len(tensor.name.encode("utf-8", "surrogatepass"))
    if not 1 <= size <= MAX_NAME_BYTES:
        raise OptionError(f"tensor {tensor.name[:120]!r}: a name has 1 to {MAX_NAME_BYTES} bytes, this one {size}")
    if len(tensor.shape) > MAX_DIMENSIONS or any(extent < 1 for extent in tensor.shape):
        raise OptionError(
            f"tensor {tensor.name!r}: GGUF has at most {MAX_DIMENSIONS} dimensions of at least 1, got {tensor.shape}"
        )


def _write_tensor(file: BinaryIO, tensor: TensorToWrite, progress: Callable[[int], None] | None) -> int:
    written, expected = 0, tensor.nbytes
    for chunk in tensor.chunks():
        # A NumPy array of any type has the bytes that the file has: both are little endian.
        view: Any = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8) if isinstance(chunk, np.ndarray) else chunk
        written += len(view)
        if written > expected:
            break
        file.write(view)
        if progress is not None:
            progress(len(view))
    if written != expected:
        more = "more than" if written > expected else "only"
        raise CheckpointError(
            f"tensor {tensor.name!r} of shape {tensor.shape} and type {tensor.type.name} needs {expected} bytes, "
            f"its source gave {more} {min(written, expected)}.",
            field=tensor.name,
            expected=expected,
            got=written,
        )
    return written


def _string(text: str, key: str) -> bytes:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OptionError(f"{key[:80]!a}: the text has half of a surrogate pair at index {error.start}") from error
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: object) -> list[bytes]:
    if isinstance(value, str):
        return [_type(ValueType.STRING), _string(value, key)]
    if isinstance(value, np.generic):  # before float, which float64 is one of
        return [_type(_of(key, value.dtype)), _little(np.asarray(value)).tobytes()]
    if isinstance(value, (bool, int, float)):
        return _number(key, value)
    if isinstance(value, np.ndarray):
        if value.ndim != 1:
            raise OptionError(f"{key}: an array must have one dimension, got shape {value.shape}")
        head = [_type(ValueType.ARRAY), _type(_of(key, value.dtype)), struct.pack("<Q", value.size)]
        return [*head, _little(value).tobytes()]
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        head = [_type(ValueType.ARRAY), _type(ValueType.STRING), struct.pack("<Q", len(value))]
        return [*head, *(_string(item, key) for item in value)]
    raise OptionError(
        f"{key}: {type(value).__name__} has no type in GGUF. Pass a number, a text, a NumPy array, or a list of texts"
    )


def _number(key: str, value: float) -> list[bytes]:
    if isinstance(value, bool):
        return [_type(ValueType.BOOL), bytes([value])]
    if isinstance(value, int):
        if not 0 <= value < 1 << 32:
            raise OptionError(f"{key}: {value} is no UINT32; pass a NumPy scalar of the type that the file should have")
        return [_type(ValueType.UINT32), struct.pack("<I", value)]
    return [_type(ValueType.FLOAT32), np.float32(value).tobytes()]


def _of(key: str, dtype: np.dtype[Any]) -> ValueType:
    for kind, known in NUMBERS.items():
        if dtype.newbyteorder("<") == known:
            return kind
    raise OptionError(f"{key}: {dtype} has no type in GGUF")


def _little(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _type(kind: ValueType) -> bytes:
    return struct.pack("<I", kind)
