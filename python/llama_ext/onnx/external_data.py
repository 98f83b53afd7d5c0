"""Weights beside a graph: files that are written front to back, one chunk in memory at a time, the same bytes each time.

Large tensors begin at multiples of 64 KiB, so that a runtime can map them, all others at multiples of 64 bytes. A data file is
written under another name and renamed when it is whole; nobody waits for the disk, which would take several times as long as
the export itself, of a file that can be made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from onnx import TensorProto

from llama_ext.errors import OptionError, ShapeError
from llama_ext.io.atomic import atomic_write

__all__ = ["ExternalTensor", "Placement", "place", "reference", "write"]

_LARGE = 1 << 20
_LARGE_ALIGNMENT = 1 << 16
_ALIGNMENT = 64

_BITS: dict[int, int] = {
    TensorProto.FLOAT: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
}


@dataclasses.dataclass(frozen=True)
class ExternalTensor:
    """A tensor to write.

    Args:
        name: Of the initializer.
        element: ONNX's number of its dtype.
        shape: Its shape.
        source: Yields its bytes in order.
    """

    name: str
    element: int
    shape: tuple[int, ...]
    source: Callable[[], Iterable[Any]]

    @property
    def nbytes(self) -> int:
        """Its size; 4-bit elements lie two in a byte, the last byte filled up."""
        return (math.prod(self.shape) * _BITS[self.element] + 7) // 8


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a tensor lies: a file beside the graph, and the bytes in it."""

    file: str
    offset: int
    nbytes: int


def place(tensors: Sequence[ExternalTensor], file: str, most: int | None = None) -> list[Placement]:
    """Decides where each tensor goes.

    Args:
        tensors: In the order they are to lie.
        file: The name of the first data file; the others are called file_1, file_2, ...
        most: Bytes of a file at most. None: one file for all.

    Returns:
        A placement for each tensor.

    Raises:
        OptionError: A tensor is larger than a file may be.
    """
    result: list[Placement] = []
    number, end = 0, 0
    for tensor in tensors:
        nbytes = tensor.nbytes
        if most is not None and nbytes > most:
            raise OptionError(
                f"max_file_bytes is {most}, but {tensor.name} alone has {nbytes} bytes, and a tensor lies in one file. "
                "Export a smaller dtype, or allow larger files"
            )
        alignment = _LARGE_ALIGNMENT if nbytes >= _LARGE else _ALIGNMENT
        offset = -(-end // alignment) * alignment
        if most is not None and offset + nbytes > most:
            number, offset = number + 1, 0
        result.append(Placement(file if number == 0 else f"{file}_{number}", offset, nbytes))
        end = offset + nbytes
    return result


def reference(tensor: ExternalTensor, placement: Placement) -> onnx.TensorProto:
    """The initializer that stands for a tensor in a data file."""
    proto = TensorProto(name=tensor.name, data_type=tensor.element, dims=tensor.shape)
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", placement.file), ("offset", placement.offset), ("length", placement.nbytes)):
        proto.external_data.add(key=key, value=str(value))
    return proto


def write(
    folder: str | os.PathLike[str],
    tensors: Sequence[ExternalTensor],
    placements: Sequence[Placement],
    advance: Callable[[int], None],
) -> list[Path]:
    """Writes the data files, each whole or not at all.

    Args:
        folder: Where the graph will be.
        tensors: Their sources are called one by one, in this order.
        placements: What `place` gave for them.
        advance: Told how many bytes were written, again and again.

    Returns:
        The files.

    Raises:
        ShapeError: A source yields more or fewer bytes than its tensor has.
        OSError: A file cannot be written.
    """
    paths: list[Path] = []
    with contextlib.ExitStack() as stack:
        file: BinaryIO | None = None
        for tensor, placement in zip(tensors, placements, strict=True):
            path = Path(folder) / placement.file
            if file is None or path != paths[-1]:
                stack.close()  # the one before is whole
                file = stack.enter_context(atomic_write(path, sync=False))
                paths.append(path)
            file.write(bytes(placement.offset - file.tell()))
            _write_one(file, tensor, placement.nbytes, advance)
    return paths


def _write_one(file: BinaryIO, tensor: ExternalTensor, nbytes: int, advance: Callable[[int], None]) -> None:
    written = 0
    for part in tensor.source():
        data = memoryview(part).cast("B") if memoryview(part).nbytes else memoryview(b"")
        written += len(data)
        if written > nbytes:
            break
        file.write(data)
        advance(len(data))
    if written != nbytes:
        raise ShapeError(
            f"tensor {tensor.name} of shape {tensor.shape} has {nbytes} bytes, its source yields "
            f"{'more' if written > nbytes else written}. Please report it: this is a mistake of the exporter"
        )
