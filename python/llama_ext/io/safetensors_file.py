"""One safetensors file, memory-mapped: tensors are views of the file, and their pages can be given back.

The `safetensors` package decides what a valid file is; only what it accepted is looked at here. That leaves the two
things it does not offer: where each tensor lies, so that a view needs no copy, and releasing the pages of what has
been loaded already.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

from llama_ext.errors import FormatError, LimitError, UnsupportedError
from llama_ext.io.json_file import open_regular
from llama_ext.io.mapped_file import MappedFile
from llama_ext.limits import DEFAULT_LIMITS, Limits, check_limits

__all__ = ["DTYPES", "SafetensorsFile", "TensorInfo"]

# The format's name -> (the core's name, how NumPy views it). NumPy has no bfloat16: its bits are read as uint16.
DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "F64": ("float64", np.dtype("<f8")),
    "F32": ("float32", np.dtype("<f4")),
    "F16": ("float16", np.dtype("<f2")),
    "BF16": ("bfloat16", np.dtype("<u2")),
}

_LENGTH_BYTES = 8
# A smaller header cannot hold enough entries to matter, and is not scanned before it is parsed.
_SCAN_ABOVE = 1 << 20
_SCAN_DIMENSIONS = 16  # more than any tensor has on average


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a file says about one tensor.

    Args:
        name: Its name.
        dtype: The format's word: F32, BF16, ...
        shape: Its shape.
        offset: Bytes from the start of the file.
        nbytes: Its size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def core_dtype(self) -> str:
        """The core's word for the dtype: float64 | float32 | float16 | bfloat16.

        Raises:
            UnsupportedError: It is another one.
        """
        if self.dtype not in DTYPES:
            words = ", ".join(DTYPES)
            raise UnsupportedError(
                f"tensor {self.name[:120]} has dtype {self.dtype}, which is not supported. Supported: {words}."
            )
        return DTYPES[self.dtype][0]


class SafetensorsFile:
    """A safetensors file that is open for reading; a context manager.

    Its size is checked when it is opened and again at every read. Nothing can protect a memory map from a file that
    is cut short *while* it is being read, so do not write over a file that is loaded: replace it, as `save_pretrained`
    does.

    Args:
        path: The file.
        limits: The bounds.

    Raises:
        FormatError: There is no such file, or it is not a valid safetensors file.
        LimitError: Its header, or what the header counts, is beyond the limits.
    """

    def __init__(self, path: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> None:
        check_limits(limits)
        self.path = os.fspath(path)
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        with open_regular(path, what="a safetensors file") as file:
            opened = os.fstat(file.fileno())
            header_bytes = _header_length(file.read(_LENGTH_BYTES), opened.st_size, self.path, limits)
            self._file = MappedFile(file, self.path)
        try:
            header = self._file.bytes(_LENGTH_BYTES, header_bytes)
            _check_entries(header, self.path, limits)
            _validate(self.path, opened)
            self._parse(header, limits)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor as a read-only view of the file; BF16 as uint16, which holds its bits.

        A tensor that the file did not align to its element size is copied. A view stays valid after `close`.

        Args:
            name: The tensor.

        Returns:
            The array, of the tensor's shape.

        Raises:
            FormatError: There is no such tensor, or the file has shrunk since it was opened.
            UnsupportedError: Its dtype is not F64, F32, F16 or BF16, or NumPy has no such shape.
        """
        info = self._info(name)
        if info.dtype not in DTYPES:
            raise UnsupportedError(
                f"{self.path}: tensor {name[:120]} has dtype {info.dtype}, which is not supported. "
                f"Supported: {', '.join(DTYPES)}. Convert it, or load the original checkpoint."
            )
        self._file.check(name)
        dtype = DTYPES[info.dtype][1]
        try:
            if info.nbytes == 0:
                return np.empty(info.shape, dtype)
            array = self._file.array(dtype, info.nbytes // dtype.itemsize, info.offset).reshape(info.shape)
        except ValueError as error:  # valid, but beyond NumPy: more than 64 dimensions, or (0, 2**63)
            raise UnsupportedError(f"{self.path}: tensor {name[:120]} of shape {info.shape}: {error}.") from error
        return array if array.flags.aligned else array.copy()

    def read_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's bytes as they lie in the file, whatever its dtype; the view stays valid after `close`.

        Args:
            name: The tensor.

        Returns:
            (bytes,) uint8, read-only and never a copy.

        Raises:
            FormatError: There is no such tensor, or the file has shrunk since it was opened.
        """
        info = self._info(name)
        self._file.check(name)
        return self._file.array(np.uint8, info.nbytes, info.offset) if info.nbytes else np.empty(0, np.uint8)

    def release(self, name: str) -> None:
        """Gives the memory of a tensor's pages back to the system; reading it again reads the file again.

        Only whole pages inside the tensor: its neighbours keep theirs. Nothing happens where a system cannot do it.

        Args:
            name: The tensor.

        Raises:
            FormatError: There is no such tensor.
        """
        info = self._info(name)
        self._file.release(info.offset, info.nbytes)

    def close(self) -> None:
        """Closes the file. The memory map goes when the last view of it does."""
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(
                f"there is no tensor {name[:120]!r} among the {len(self.tensors)}.", path=self.path, field=name
            )
        return info

    def _parse(self, header: bytes, limits: Limits) -> None:
        start = _LENGTH_BYTES + len(header)
        try:
            entries = json.loads(header.decode("utf-8"))
            metadata = entries.pop("__metadata__", None) or {}
            # Rust's deserialiser takes a struct as an array as well; both are what the package accepts.
            fields = [
                (name, entry if isinstance(entry, list) else [entry["dtype"], entry["shape"], entry["data_offsets"]])
                for name, entry in entries.items()
            ]
            infos = [
                TensorInfo(name, str(dtype), tuple(shape), start + begin, end - begin)
                for name, (dtype, shape, (begin, end)) in fields
            ]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(f"the header cannot be read: {error}.", path=self.path, offset=_LENGTH_BYTES) from error
        for count, limit in ((len(infos), "tensors"), (len(metadata), "metadata_entries")):
            _within(count, limit, self.path, limits)
        for text in (part for pair in metadata.items() for part in pair):
            _within(len(text), "string_bytes", self.path, limits)
        for info in infos:
            self._check(info, start)
        # The order of the file: loading then reads it from front to back.
        self.tensors = {info.name: info for info in sorted(infos, key=lambda info: (info.offset, info.name))}
        self.metadata = metadata

    def _check(self, info: TensorInfo, start: int) -> None:
        """What every read relies on, checked here whatever the package checked."""
        numbers: tuple[Any, ...] = (*info.shape, info.offset, info.nbytes)
        sound = all(isinstance(number, int) and number >= 0 for number in numbers)
        sound = sound and info.offset >= start and info.offset + info.nbytes <= self._file.size
        if sound and info.dtype in DTYPES:
            sound = math.prod(info.shape) * DTYPES[info.dtype][1].itemsize == info.nbytes
        if not sound:
            raise FormatError(
                f"tensor {info.name[:120]!r} of shape {info.shape} and dtype {info.dtype} does not fit its {info.nbytes} bytes "
                f"in a file of {self._file.size}. Truncated download?",
                path=self.path,
                offset=max(info.offset, 0),
                field=info.name,
            )


def _header_length(first: bytes, size: int, path: str, limits: Limits) -> int:
    """Checked before anything is allocated for it."""
    if len(first) < _LENGTH_BYTES:
        raise FormatError(
            f"a safetensors file has at least {_LENGTH_BYTES} bytes, this one has {size}. Truncated download?",
            path=path,
            expected=_LENGTH_BYTES,
            got=size,
        )
    (length,) = struct.unpack("<Q", first)
    if length > limits.safetensors_header_bytes:
        limit = limits.safetensors_header_bytes
        if first.startswith((b"version ", b"PK\x03\x04", b"GGUF", b"\x80\x02", b"<!DOCTYP", b"<html")):
            raise FormatError(
                f"this is no safetensors file: it begins with {first!r}. A Git LFS pointer, an error page or another "
                "format under this name? Download it again.",
                path=path,
                offset=0,
                got=first,
            )
        raise LimitError(
            f"{path}: the header claims {length} bytes, the limit is {limit} (Limits.safetensors_header_bytes). "
            "Not a safetensors file, or a damaged one?"
        )
    if length > size - _LENGTH_BYTES:
        raise FormatError(
            f"the header claims {length} bytes, the file has {size - _LENGTH_BYTES} after its first {_LENGTH_BYTES}. "
            "Truncated download?",
            path=path,
            offset=0,
            field="header length",
            expected=size - _LENGTH_BYTES,
            got=length,
        )
    return int(length)


def _check_entries(header: bytes, path: str, limits: Limits) -> None:
    """Counts a large header's entries before it is parsed: parsed, each costs far more than its bytes."""
    if len(header) <= _SCAN_ABOVE:
        return
    colons = commas = 0
    inside = np.uint8(0)
    plain = header.replace(b"\\\\", b"").replace(b'\\"', b"")
    for start in range(0, len(plain), _SCAN_ABOVE):
        part = np.frombuffer(plain, np.uint8, min(_SCAN_ABOVE, len(plain) - start), start)
        # 1 from a string's opening quote up to its closing one
        strings = np.bitwise_xor.accumulate(part == ord('"'), dtype=np.uint8) ^ inside
        inside = strings[-1]
        colons += int(np.count_nonzero((part == ord(":")) & (strings == 0)))
        commas += int(np.count_nonzero((part == ord(",")) & (strings == 0)))
    # Of a tensor: four colons (its name, dtype, shape, data_offsets), and five commas and one for each dimension.
    most_colons = 4 * limits.tensors + limits.metadata_entries + 1
    most_commas = (5 + _SCAN_DIMENSIONS) * limits.tensors + limits.metadata_entries
    if colons > most_colons or commas > most_commas:
        raise LimitError(
            f"{path}: the header has {colons} keys and {commas} commas, more than {limits.tensors} tensors "
            f"(Limits.tensors) and {limits.metadata_entries} entries of metadata (Limits.metadata_entries) need. "
            "Pass a larger Limits if you trust the file."
        )


def _within(value: int, limit: str, path: str, limits: Limits) -> None:
    most: int = getattr(limits, limit)
    if value > most:
        raise LimitError(
            f"{path}: {value} is beyond Limits.{limit}, {most}. Pass a larger Limits if you trust the file."
        )


def _validate(path: str, opened: os.stat_result) -> None:
    """Has the `safetensors` package judge the file, and makes sure that it judged the one that is mapped."""
    try:
        with safetensors.safe_open(path, framework="np"):
            pass
        now = os.stat(path)
    except safetensors.SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")[:300]  # it may quote the file
        # Wordings of several releases: "MetadataIncompleteBuffer", "incomplete metadata, file not fully covered".
        hint = " Truncated download?" if "incomplete" in reason.lower() else ""
        raise FormatError(f"not a valid safetensors file: {reason}.{hint}", path=path) from error
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror or error}.", path=path) from error
    if (now.st_dev, now.st_ino, now.st_size) != (opened.st_dev, opened.st_ino, opened.st_size):
        raise FormatError("the file was replaced while it was being opened. Try again.", path=path)
