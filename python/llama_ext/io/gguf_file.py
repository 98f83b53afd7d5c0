"""One GGUF file, memory-mapped: its metadata as Python values, its tensors as views of the packed blocks.

A file is: magic, version, number of tensors, number of entries; the entries (key, type, value); for each tensor its
name, dimensions (the row first), type and offset; then, from the next multiple of the alignment, the tensors. Every
number of it is compared with what is left of the file before anything is allocated or read by it.

Source: ggml, `docs/gguf.md`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import struct
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from llama_ext.errors import FormatError, LimitError, UnsupportedError
from llama_ext.io.gguf_types import Bytes, Floats, GgmlType, dequantize, ggml_type
from llama_ext.io.json_file import open_regular
from llama_ext.io.mapped_file import MappedFile
from llama_ext.limits import DEFAULT_LIMITS, Limits, check_limits

__all__ = ["ALIGNMENT_KEY", "DEFAULT_ALIGNMENT", "MAX_DIMENSIONS", "GgufFile", "GgufTensor", "ValueType"]

MAGIC = b"GGUF"
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_DIMENSIONS = 4

_HEADER = struct.Struct("<4sIQQ")
_U64 = struct.Struct("<Q")
# What an entry takes at least: the length of its key, its type, a value of one byte. A tensor: the length of its name,
# the number of its dimensions, its type, its offset.
_LEAST_ENTRY = 8 + 4 + 1
_LEAST_TENSOR = 8 + 4 + 4 + 8
_BUFFER_BYTES = 1 << 18
_OLDER_FORMATS = (b"ggml", b"lmgg", b"ggmf", b"fmgg", b"ggjt", b"tjgg", b"ggla", b"algg")


class ValueType(enum.IntEnum):
    """The type of a value in the metadata."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


NUMBERS: dict[ValueType, np.dtype[Any]] = {
    ValueType.UINT8: np.dtype("u1"),
    ValueType.INT8: np.dtype("i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}
# In the account of `Limits.array_elements`: what takes more memory and time than a number.
_COSTS = {ValueType.STRING: 2, ValueType.ARRAY: 64}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor of an open file.

    Args:
        name: Its name.
        type: The format of its numbers.
        shape: Its shape in NumPy's order: rows of the last axis are contiguous.
        offset: Bytes from the start of the file.
        nbytes: Its size.
        file: The file.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: MappedFile = dataclasses.field(repr=False, compare=False)

    @property
    def data(self) -> Bytes:
        """The packed rows, (rows, row bytes) uint8: a read-only view of the file, valid after the file was closed.

        Raises:
            FormatError: The file was closed, or has shrunk since it was opened.
        """
        self.file.check(self.name)
        rows = math.prod(self.shape[:-1])
        view: Bytes = self.file.array(np.uint8, self.nbytes, self.offset).reshape(rows, self.nbytes // rows)
        return view

    def dequantize(self) -> Floats:
        """Its values as float32, exactly, in its shape."""
        return dequantize(self.data, self.type).reshape(self.shape)

    def release(self) -> None:
        """Gives the memory of its pages back to the system; reading it again reads the file again."""
        self.file.release(self.offset, self.nbytes)


class GgufFile:
    """A GGUF file that is open for reading, version 2 or 3, little endian; a context manager.

    Args:
        path: The file.
        limits: The bounds.

    Attributes:
        version: 2 or 3.
        metadata: The entries in the file's order. A number is an int or a float, an array of numbers a read-only NumPy
            array of its type, an array of strings or of arrays a list.
        value_types: The type of each entry.
        tensors: By name, in the order of the file's bytes.
        alignment: What every offset is a multiple of.

    Raises:
        FormatError: There is no such file, or it is not a valid GGUF file.
        LimitError: A number of it is beyond the limits.
        UnsupportedError: Another version or byte order, or a tensor of a type that is not supported.
    """

    def __init__(self, path: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> None:
        check_limits(limits)
        self.path = os.fspath(path)
        with open_regular(path, what="a GGUF file") as file:
            first = file.read(_HEADER.size)
            self.version, tensors, entries = _read_first(first, os.fstat(file.fileno()).st_size, self.path)
            self._file = MappedFile(file, self.path)
        try:
            cursor = _Cursor(self._file, _HEADER.size, limits)
            self.metadata, self.value_types = _read_metadata(cursor, entries)
            self.alignment = _alignment(cursor, self.metadata, self.value_types)
            self.tensors = _read_tensors(cursor, tensors, self.alignment)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file. The memory map goes when the last view of it does."""
        self._file.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _read_first(first: bytes, size: int, path: str) -> tuple[int, int, int]:
    """The version, and how many tensors and entries there are."""
    magic = first[: len(MAGIC)]
    if magic != MAGIC[: len(magic)]:
        if magic in _OLDER_FORMATS:
            raise UnsupportedError(
                f"{path}: a file of a format older than GGUF ({magic!r}). Convert the original model."
            )
        raise FormatError(
            f"this is no GGUF file: it begins with {first[:8]!r}, not {MAGIC!r}. A Git LFS pointer, an error page or "
            "another format under this name? Download it again.",
            path=path,
            offset=0,
            expected=MAGIC,
            got=magic,
        )
    if len(first) >= 8:
        version = int.from_bytes(first[4:8], "little")
        swapped = int.from_bytes(first[4:8], "big")
        if version not in (2, 3):
            if swapped in (1, 2, 3):
                what = f"big-endian GGUF, version {swapped}, is not supported"
            else:
                what = f"GGUF version {version} is not supported"
            raise UnsupportedError(
                f"{path}: {what}. Supported: versions 2 and 3, little endian. Convert the original model again."
            )
    if len(first) < _HEADER.size:
        raise FormatError(
            f"a GGUF file has at least {_HEADER.size} bytes, this one has {size}. Truncated download?",
            path=path,
            expected=_HEADER.size,
            got=size,
        )
    _, version, tensors, entries = _HEADER.unpack(first)
    return version, tensors, entries


class _Cursor:
    """Reads the header front to back; the bytes left are checked before every read."""

    def __init__(self, file: MappedFile, at: int, limits: Limits) -> None:
        self.file = file
        self.path = file.path
        self.limits = limits
        self.at = at
        # One copy of what can be the header: from it, small reads are fast.
        self.end = min(file.size, limits.gguf_header_bytes)
        self.elements = 0
        self.buffer = b""
        self.start = at

    def fail(self, message: str, *, field: str | None = None, expected: object = None, got: object = None) -> NoReturn:
        raise FormatError(message, path=self.path, offset=self.at, field=field, expected=expected, got=got)

    def need(self, count: int, what: str) -> None:
        """Raises unless `count` more bytes are there."""
        if count > self.end - self.at:
            left = self.file.size - self.at
            if count <= left:
                raise LimitError(
                    f"{self.path}: the header goes on after {self.end} bytes (Limits.gguf_header_bytes), at {what}. "
                    "Pass a larger Limits if you trust the file."
                )
            self.fail(
                f"{what} needs {count} bytes, the file has {left} more. Truncated download?", expected=count, got=left
            )

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        offset = self.at - self.start
        if offset + count > len(self.buffer):
            # Never more than the file has: the map ends there.
            self.start, offset = self.at, 0
            self.buffer = self.file.bytes(self.at, max(count, _BUFFER_BYTES))
        self.at += count
        return self.buffer[offset : offset + count]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str) -> str:
        length = self.u64(f"the length of {what}")
        self.need(length, what)
        self.within(length, "string_bytes", what)
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not valid UTF-8: {error.reason} at its byte {error.start}.")

    def strings(self, count: int, what: str) -> list[str]:
        """As `string`, many of them: a vocabulary has hundreds of thousands."""
        result: list[str] = []
        append, unpack = result.append, _U64.unpack_from
        limit = self.limits.string_bytes
        buffer, at, stop = self.buffer, self.at - self.start, 0  # nothing is known to be in the buffer yet
        for index in range(count):
            if at + 8 <= stop:
                length = unpack(buffer, at)[0]
                end = at + 8 + length
                if end <= stop and length <= limit:
                    try:
                        append(buffer[at + 8 : end].decode())
                        at = end
                        continue
                    except UnicodeDecodeError:
                        pass  # below, with a message
            self.at = self.start + at
            append(self.string(f"element {index} of {what}"))
            buffer, at = self.buffer, self.at - self.start
            stop = min(len(buffer), self.end - self.start)
        self.at = self.start + at
        return result

    def within(self, value: int, limit: str, what: str) -> None:
        most: int = getattr(self.limits, limit)
        if value > most:
            raise LimitError(
                f"{self.path} @0x{self.at:x}: {what}: {value} is beyond Limits.{limit}, {most}. "
                "Pass a larger Limits if you trust the file."
            )

    def value_type(self, what: str) -> ValueType:
        number = self.u32(f"the type of {what}")
        if number > max(ValueType):
            self.fail(
                f"{what} has the type {number}; GGUF has the types 0 to {int(max(ValueType))}. A damaged file?",
                expected=f"0 to {int(max(ValueType))}",
                got=number,
            )
        return ValueType(number)

    def value(self, kind: ValueType, what: str, depth: int = 0) -> Any:
        if kind is ValueType.STRING:
            return self.string(what)
        if kind is ValueType.ARRAY:
            return self.array(what, depth + 1)
        return self.numbers(kind, 1, what)[0].item()

    def numbers(self, kind: ValueType, count: int, what: str) -> npt.NDArray[Any]:
        dtype = NUMBERS[kind]
        data = self.take(count * dtype.itemsize, what)
        array = np.frombuffer(data, dtype, count)
        if kind is ValueType.BOOL and count and array.view(np.uint8).max() > 1:
            self.fail(f"{what} must be 0 or 1, got {array.view(np.uint8).max()}. A damaged file?")
        return array

    def array(self, what: str, depth: int) -> Any:
        if depth > self.limits.json_depth:
            raise LimitError(f"{self.path} @0x{self.at:x}: {what} is nested deeper than {self.limits.json_depth}.")
        kind = self.value_type(f"the elements of {what}")
        count = self.u64(f"the length of {what}")
        least = {ValueType.STRING: 8, ValueType.ARRAY: 12}.get(kind) or NUMBERS[kind].itemsize
        self.need(count * least, f"{what} of {count} elements")
        self.elements += count * _COSTS.get(kind, 1)
        self.within(self.elements, "array_elements", what)
        if kind is ValueType.STRING:
            return self.strings(count, what)
        if kind is ValueType.ARRAY:
            return [self.array(what, depth + 1) for _ in range(count)]
        return self.numbers(kind, count, what)


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, ValueType]]:
    cursor.need(count * _LEAST_ENTRY, f"metadata of {count} entries")
    cursor.within(count, "metadata_entries", "entries of metadata")
    values: dict[str, Any] = {}
    types: dict[str, ValueType] = {}
    for index in range(count):
        key = cursor.string(f"the key of entry {index}")
        if not key:
            cursor.fail(f"the key of entry {index} is empty. A damaged file?")
        if key in values:
            cursor.fail(f"the key {key[:80]!r} appears twice.", field=key[:80])
        what = f"the value of {key[:80]!r}"
        types[key] = cursor.value_type(what)
        values[key] = cursor.value(types[key], what)
    return values, types


def _alignment(cursor: _Cursor, metadata: dict[str, Any], types: dict[str, ValueType]) -> int:
    if ALIGNMENT_KEY not in metadata:
        return DEFAULT_ALIGNMENT
    value = metadata[ALIGNMENT_KEY]
    expected = f"an UINT32 that is a power of two up to {MAX_ALIGNMENT}"
    if types[ALIGNMENT_KEY] is not ValueType.UINT32 or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        shown = repr(value)[:40]
        cursor.fail(
            f"{ALIGNMENT_KEY} must be {expected}, got {shown}.", field=ALIGNMENT_KEY, expected=expected, got=shown
        )
    return int(value)


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    cursor.need(count * _LEAST_TENSOR, f"a list of {count} tensors")
    cursor.within(count, "tensors", "tensors")
    found: dict[str, GgufTensor] = {}
    for index in range(count):
        tensor = _read_tensor(cursor, index, alignment)
        if tensor.name in found:
            cursor.fail(f"the tensor {tensor.name[:120]!r} appears twice.", field=tensor.name)
        found[tensor.name] = tensor
    start = -(-cursor.at // alignment) * alignment
    placed = sorted(
        (dataclasses.replace(tensor, offset=start + tensor.offset) for tensor in found.values()),
        key=lambda tensor: tensor.offset,
    )
    end, before = start, ""
    for tensor in placed:
        if tensor.offset < end:
            raise FormatError(
                f"tensor {tensor.name[:120]!r} begins at {tensor.offset}, inside tensor {before[:120]!r}, which ends at "
                f"{end}. A damaged file?",
                path=cursor.path,
                field=tensor.name,
            )
        end, before = tensor.offset + tensor.nbytes, tensor.name
        if end > cursor.file.size:
            raise FormatError(
                f"tensor {tensor.name[:120]!r} needs {tensor.nbytes} bytes at {tensor.offset}, the file has "
                f"{cursor.file.size}. Truncated download?",
                path=cursor.path,
                offset=tensor.offset,
                field=tensor.name,
                expected=end,
                got=cursor.file.size,
            )
    return {tensor.name: tensor for tensor in placed}


def _read_tensor(cursor: _Cursor, index: int, alignment: int) -> GgufTensor:
    """One tensor's description; its offset is still the file's own, from the start of the tensors."""
    name = cursor.string(f"the name of tensor {index}")
    if not name:
        cursor.fail(f"the name of tensor {index} is empty. A damaged file?")
    shown = f"tensor {name[:120]!r}"
    axes = cursor.u32(f"the number of dimensions of {shown}")
    if axes > MAX_DIMENSIONS:
        cursor.fail(f"{shown} has {axes} dimensions, at most {MAX_DIMENSIONS} are valid. A damaged file?", field=name)
    dimensions = [cursor.u64(f"dimension {axis} of {shown}") for axis in range(axes)]
    if 0 in dimensions:
        cursor.fail(f"{shown} has a dimension of 0: {dimensions}. A damaged file?", field=name)
    kind = ggml_type(cursor.u32(f"the type of {shown}"), name, cursor.path)
    offset = cursor.u64(f"the offset of {shown}")
    if offset % alignment:
        cursor.fail(
            f"{shown} begins at {offset}, which is no multiple of the alignment, {alignment}. A damaged file?",
            field=name,
        )
    row = dimensions[0] if dimensions else 1
    if row % kind.block:
        cursor.fail(f"{shown} has rows of {row} values, but {kind.name} has blocks of {kind.block}.", field=name)
    # Python's integers do not wrap, and a shape that the file cannot hold ends here, before anyone multiplies it again.
    nbytes = math.prod(dimensions) // kind.block * kind.block_bytes
    if offset + nbytes > cursor.file.size - cursor.at:
        cursor.fail(
            f"{shown} of shape {tuple(reversed(dimensions))} and type {kind.name} needs {nbytes} bytes at {offset} after "
            f"the header, the file has {cursor.file.size - cursor.at} after this one. Truncated download?",
            field=name,
            expected=offset + nbytes,
            got=cursor.file.size - cursor.at,
        )
    return GgufTensor(name, kind, tuple(reversed(dimensions)), offset, nbytes, cursor.file)
