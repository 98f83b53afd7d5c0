"""Weight matrices in the layout of a backend, and the backends that the operations run on."""

from __future__ import annotations

import functools
import os
import threading

import numpy as np

from llama_ext import _core
from llama_ext._arrays import Array, FloatArray, is_bfloat16
from llama_ext.errors import DTypeError, OptionError, ShapeError
from llama_ext.runtime.threads import checked_threads, get_num_threads

__all__ = ["Matrix", "as_matrix", "backend_for", "check_packed", "pack", "pack_for", "pack_gate_up"]

_CREATING = threading.Lock()
_WEIGHT_DTYPES = ("float32", "bfloat16")


class Matrix:
    """A weight matrix in the layout that its backend likes best: made once by `pack`, used any number of times.

    It belongs to the device, threads and instruction set it was packed for. Immutable, so threads may share it.
    """

    def __init__(self, backend: _core.Backend, handle: _core.Matrix, shape: tuple[int, int], *, gate_up: bool) -> None:
        self.backend = backend
        self.handle = handle
        self._shape = shape
        self.gate_up = gate_up

    @property
    def shape(self) -> tuple[int, int]:
        """(output features, input features); of a gate-up pair, (F, C)."""
        return self._shape

    @property
    def dtype(self) -> str:
        """How the weights are kept: "float32" or "bfloat16"."""
        return self.handle.dtype

    @property
    def nbytes(self) -> int:
        """The memory it occupies, padding included."""
        return self.handle.nbytes

    @property
    def device(self) -> str:
        """The device it was packed for."""
        return self.backend.device

    def to_array(self) -> FloatArray:
        """The weights as float32, (rows, columns); of a gate-up pair, the interleaved rows.

        Returns:
            A new array; bfloat16 widens exactly.
        """
        return self.handle.to_array()

    def __repr__(self) -> str:
        kind = "gate-up Matrix" if self.gate_up else "Matrix"
        return f"<{kind} {self._shape[0]} x {self._shape[1]} {self.dtype} on {self.device} ({self.backend.isa})>"


def pack(
    weight: Array,
    dtype: str = "float32",
    *,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> Matrix:
    """Puts a weight matrix into the layout of the fastest kernel.

    Args:
        weight: (N, K) float32 or float16; with dtype="bfloat16" also bfloat16, as ml_dtypes' or as uint16 bit patterns.
        dtype: How to keep it: "float32", or "bfloat16" (rounded to nearest, ties to even).
        threads, isa, device: See `llama_ext.ops`.

    Returns:
        A matrix to pass to `matmul`, `embedding` or `feed_forward`.

    Raises:
        ShapeError: `weight` does not have two dimensions.
        DTypeError: Another element type, or an unknown `dtype`.
        DeviceError: There is no such device or instruction set here.
    """
    return pack_for(backend_for(device, threads, isa), "pack", "weight", weight, dtype)


def pack_gate_up(
    gate: Array,
    up: Array,
    dtype: str = "float32",
    *,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> Matrix:
    """Packs the two input matrices of `feed_forward` as the one that its kernel reads.

    Args:
        gate: (F, C), element types as in `pack`.
        up: (F, C), likewise.
        dtype: "float32" or "bfloat16".
        threads, isa, device: See `llama_ext.ops`.

    Returns:
        A matrix to pass to `feed_forward`.

    Raises:
        ShapeError: The two are not matrices of one shape.
        DTypeError, DeviceError: As `pack`.
    """
    backend = backend_for(device, threads, isa)
    gate_source = _weight_array("pack_gate_up", "gate", gate, dtype)
    up_source = _weight_array("pack_gate_up", "up", up, dtype)
    if gate_source.shape != up_source.shape:
        raise ShapeError(
            f"pack_gate_up: gate and up must have one shape, got {gate_source.shape} and {up_source.shape}"
        )
    handle = backend.gate_up_matrix(gate_source, up_source, dtype)
    return Matrix(backend, handle, (gate_source.shape[0], gate_source.shape[1]), gate_up=True)


def pack_for(backend: _core.Backend, op: str, what: str, weight: Array, dtype: str) -> Matrix:
    """The body of `pack`, for a backend that is there already.

    Raises:
        ShapeError, DTypeError: As `pack`; the message names `op` and `what`.
    """
    source = _weight_array(op, what, weight, dtype)
    return Matrix(backend, backend.matrix(source, dtype), (source.shape[0], source.shape[1]), gate_up=False)


def as_matrix(
    op: str, weight: Array | Matrix, dtype: str | None, threads: int | None, isa: str | None, device: str
) -> Matrix:
    """`weight` itself when it is packed already, else packed for this call.

    Raises:
        OptionError: An option contradicts what `weight` was packed for, or it is a gate-up pair.
    """
    if not isinstance(weight, Matrix):
        return pack_for(backend_for(device, threads, isa), op, "weight", weight, dtype or "float32")
    if weight.gate_up:
        raise OptionError(f"{op}: needs a matrix from pack, got {weight!r}")
    return check_packed(op, weight, dtype, threads, isa, device)


def check_packed(
    op: str, matrix: Matrix, dtype: str | None, threads: int | None, isa: str | None, device: str
) -> Matrix:
    """Checks that no option contradicts what `matrix` was packed for.

    Raises:
        OptionError: One does; the message names it.
    """
    asked: list[tuple[str, object, object]] = [("dtype", dtype, matrix.dtype)]
    asked.append(("threads", threads, matrix.backend.threads))
    asked.append(("isa", isa, matrix.backend.isa))
    # "cpu" is also what a caller gets who says nothing, so it contradicts nothing.
    asked.append(("device", None if device == "cpu" else device, matrix.backend.device))
    for name, wanted, packed in asked:
        if wanted is not None and wanted != packed:
            raise OptionError(
                f"{op}: {name}={wanted!r}, but the matrix was packed with {name}={packed!r}. Pack it again"
            )
    return matrix


def backend_for(device: str, threads: int | None, isa: str | None) -> _core.Backend:
    """The backend that operations with these options share; its threads start once.

    Raises:
        DeviceError: There is no such device or instruction set here.
        OptionError: `threads` is out of range.
    """
    # A backend takes its default threads and LLAMA_EXT_ISA when it is made, so both belong to the key.
    count = checked_threads(threads) or get_num_threads()
    # The lock, because two threads that come first at once would each get a backend of their own.
    with _CREATING:
        return _cached_backend(device, count, isa or "", "" if isa else os.environ.get("LLAMA_EXT_ISA", ""))


@functools.lru_cache(maxsize=16)
def _cached_backend(device: str, threads: int, isa: str, forced: str) -> _core.Backend:
    """`forced` only tells backends apart: the core reads the environment itself, and names it in its errors."""
    if device == "reference":
        return _core.Backend(device)
    return _core.Backend(device, threads, isa)


def _weight_array(op: str, what: str, value: object, dtype: str) -> Array:
    """A weight as the core takes it: a contiguous (N, K) array of float32, float16 or the bits of bfloat16.

    Raises:
        DTypeError: `dtype` is unknown, or the array holds neither.
        ShapeError: Not two dimensions.
    """
    if dtype not in _WEIGHT_DTYPES:
        raise DTypeError(
            f"{op}: weights are kept as {' or '.join(_WEIGHT_DTYPES)} in this version, got dtype={dtype!r}"
        )
    if not isinstance(value, np.ndarray):
        raise DTypeError(f"{op}: {what} must be a NumPy array or a packed Matrix, got {type(value).__name__}")
    if value.ndim != 2:
        raise ShapeError(f"{op}: {what} must have shape (rows, columns), got {value.shape}")
    if value.dtype in (np.float32, np.float16):
        return np.ascontiguousarray(value)
    if is_bfloat16(value.dtype) or value.dtype == np.uint16:
        if dtype == "bfloat16":
            return np.ascontiguousarray(value).view(np.uint16)
        raise DTypeError(f"{op}: {what} is {value.dtype}; pass dtype='bfloat16' if these are bfloat16 numbers")
    raise DTypeError(
        f"{op}: {what} must be float32, float16 or bfloat16, got {value.dtype}. "
        f"Convert it first: {what}.astype(numpy.float32)"
    )
