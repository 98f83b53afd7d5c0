"""A file that is memory-mapped for reading: views of it without a copy, and its pages given back when they were used."""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from llama_ext.errors import FormatError

__all__ = ["MappedFile"]


class MappedFile:
    """A memory map of a whole file, and a handle to see whether the file was cut short since.

    Nothing can protect a memory map from a file that is cut short *while* it is being read.

    Args:
        file: An open file that is not empty. It may be closed afterwards.
        path: Its name, for messages.

    Attributes:
        size: Bytes of the file when it was mapped.
    """

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        self._descriptor = os.dup(file.fileno())

    def bytes(self, offset: int, count: int) -> bytes:
        """A copy of a part of the file; shorter where the file ends."""
        return self._map[offset : offset + count]

    def check(self, name: str) -> None:
        """Raises unless the file can still be read as far as it could when it was mapped.

        Args:
            name: The tensor that is about to be read, for the message.

        Raises:
            FormatError: It was closed, or has become shorter.
        """
        if self._descriptor < 0:
            raise FormatError(f"tensor {name[:120]} cannot be read: the file was closed.", path=self.path, field=name)
        size = os.fstat(self._descriptor).st_size
        if size < self.size:
            raise FormatError(
                f"the file shrank from {self.size} to {size} bytes since it was opened.",
                path=self.path,
                field=name,
                expected=self.size,
                got=size,
            )

    def array(self, dtype: npt.DTypeLike, count: int, offset: int) -> npt.NDArray[Any]:
        """A read-only view of a part of the file; it stays valid after `close`.

        Args:
            dtype: Of the elements.
            count: Elements, at least one.
            offset: Bytes from the start of the file; the view is unaligned when this is.

        Returns:
            (count,) of `dtype`.
        """
        return np.frombuffer(self._map, dtype, count, offset)

    def release(self, offset: int, nbytes: int) -> None:
        """Gives the memory of whole pages inside a part back to the system; reading it again reads the file again.

        Nothing happens where a system cannot do it, or after `close`.
        """
        advice = getattr(mmap, "MADV_DONTNEED", None)
        page = mmap.PAGESIZE
        start = -(-offset // page) * page
        end = (offset + nbytes) // page * page
        if advice is not None and end > start and self._descriptor >= 0:
            with contextlib.suppress(OSError):  # advice only
                self._map.madvise(advice, start, end - start)

    def close(self) -> None:
        """Closes the file. The memory map goes when the last view of it does."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            with contextlib.suppress(BufferError):  # views of it are alive
                self._map.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()
