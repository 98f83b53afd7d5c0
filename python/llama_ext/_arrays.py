"""Checks on the arrays that callers pass in, shared by the operations and the model."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llama_ext._core import DeviceArray
from llama_ext.errors import DTypeError, OutOfMemoryError, ShapeError, TokenIdError

__all__ = [
    "Array",
    "Bfloat16Bits",
    "FloatArray",
    "IntArray",
    "SupportsArray",
    "allocate",
    "array_by_protocol",
    "array_of",
    "as_whole",
    "assign",
    "check_token_range",
    "conversion",
    "destination",
    "finish",
    "flat",
    "float32_array",
    "integers",
    "is_bfloat16",
    "is_whole",
    "is_writable",
    "last",
    "line",
    "on_gpu",
    "require_last",
    "require_shape",
    "share_memory",
    "token_ids",
    "vector",
    "widen_bfloat16",
    "zeros",
]

Array = npt.NDArray[Any]


class SupportsArray(Protocol):
    """An array of NumPy or of another library that gives NumPy its numbers."""

    def __array__(self) -> Array: ...


FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


class Bfloat16Bits(np.ndarray[Any, np.dtype[np.uint16]]):
    """The bits of bfloat16 numbers that are known to be such: what comes from DLPack, as NumPy has no bfloat16."""


def float32_array(op: str, what: str, value: object, inner: int | None = 1) -> FloatArray:
    """`value` itself when it is a C-contiguous float32 array, a contiguous copy when it is strided.

    Nothing is cast: a float64 array is usually an oversight, and rounding it silently would hide that.

    Args:
        inner: Of an array on a GPU, which is never copied: how many of its last axes must be contiguous, the others being one axis
            with a stride of its own; None is all.

    Raises:
        DTypeError: Not an array of float32.
        ShapeError: An array on a GPU with other strides.
    """
    if isinstance(value, DeviceArray):
        if value.dtype != "float32":
            raise DTypeError(f"{op}: {what} must be float32, got {value.dtype}. Convert it first")
        if not value.has_rows(value.ndim if inner is None else inner):
            kept = "C-contiguous" if inner is None else f"contiguous in its last {inner} axes, and strided in one other"
            raise ShapeError(
                f"{op}: {what} must be {kept} where it is on a GPU, got strides {value.strides} of shape {value.shape}. "
                f"Call contiguous() on it: {what}.contiguous()"
            )
        return value  # type: ignore[return-value]
    if not isinstance(value, np.ndarray):
        raise DTypeError(f"{op}: {what} {array_of('float32')}, got {type(value).__name__}")
    if value.dtype != np.float32:
        found = "bfloat16" if isinstance(value, Bfloat16Bits) else value.dtype
        raise DTypeError(f"{op}: {what} must be float32, got {found}. {conversion(what, value)}")
    # Not ascontiguousarray: that turns a scalar array into a vector.
    return np.asarray(value, order="C")


def array_of(kind: str) -> str:
    """The words for what an operation takes: arrays of other libraries have become NumPy's when they are checked."""
    return f"must be a NumPy array of {kind}, or one with __dlpack__ (torch, JAX, CuPy)"


def conversion(what: str, array: Array) -> str:
    """How to make float32 of an array. It may have come from another library, and of bfloat16 without a dtype in NumPy it has."""
    if isinstance(array, Bfloat16Bits):
        return f"Convert it first in its own library: {what}.float() in torch, {what}.astype('float32') in JAX"
    return f"Convert it first: {what}.astype(numpy.float32), or {what}.float() in torch"


def as_whole(value: object) -> int | None:
    """The Python integer that any integer stands for: one of Python, of NumPy, or of a type with __index__.

    Returns:
        The number; None for everything else, True and False among it.
    """
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def is_whole(value: object) -> bool:
    """Whether it is an integer, of Python, NumPy or any other type with __index__; True and False are not."""
    return as_whole(value) is not None


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether it is the bfloat16 of `ml_dtypes`, which need not be installed for this."""
    return dtype.name == "bfloat16" and dtype.itemsize == 2


def widen_bfloat16(bits: Array) -> FloatArray:
    """bfloat16 to float32, exactly.

    Args:
        bits: uint16 bit patterns, or an array of ml_dtypes' bfloat16.
    """
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def array_by_protocol(what: str, value: object) -> Array | None:
    """The NumPy array that an array of any library is, by NumPy's own protocols; None for what is no array, lists and numbers
    among it.

    Raises:
        DTypeError: It does not give NumPy its numbers, as where it lies on a GPU.
    """
    if isinstance(value, np.ndarray):
        return value
    # Texts and numbers of NumPy have the protocols, too.
    if isinstance(value, (str, bytes, bytearray, np.generic, Sequence)):
        return None
    if not any(hasattr(value, name) for name in ("__array__", "__array_interface__", "__array_struct__")):
        return None
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise DTypeError(
            f"{what} must be an array that NumPy can read, got {type(value).__name__}: {reason}. Copy it to the CPU first"
        ) from error


def token_ids(what: str, values: object, vocabulary: int) -> IntArray:
    """Token ids as a one-dimensional int32 array, each checked to be in [0, vocabulary).

    Args:
        what: The name of the ids in messages.
        values: A sequence of integers or a one-dimensional array of any integer type, of NumPy or of another library.
        vocabulary: How many tokens there are.

    Raises:
        DTypeError: The ids are not integers.
        ShapeError: An array that is not one-dimensional.
        TokenIdError: An id outside the vocabulary; the message says which and where.
    """
    array = array_by_protocol(what, values)
    if array is None:
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
            raise DTypeError(f"{what} must be a sequence of integers, got {type(values).__name__}")
        array = _from_sequence(what, values, vocabulary)
    if array.dtype.kind not in "iu":
        raise DTypeError(f"{what} must be integers, got {array.dtype}")
    if array.ndim != 1:
        raise ShapeError(f"{what} must have one dimension, got shape {array.shape}")
    check_token_range(what, array, vocabulary)
    return np.ascontiguousarray(array, dtype=np.int32)


def _from_sequence(what: str, values: Sequence[object], vocabulary: int) -> Array:
    numbers = []
    for index, value in enumerate(values):
        if isinstance(value, bool):
            raise DTypeError(f"{what}[{index}] must be an integer, got {value!r}")
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise DTypeError(f"{what}[{index}] must be an integer, got {type(value).__name__}") from None
        # Checked here too: a Python integer may be beyond any NumPy type.
        if not 0 <= number < vocabulary:
            # Nor does Python write out one of any length.
            found = number if abs(number) < 2**64 else "beyond 64 bits"
            raise TokenIdError(f"{what}[{index}] is {found}; token ids of this model are in [0, {vocabulary})")
        numbers.append(number)
    return np.array(numbers, dtype=np.int64)


def check_token_range(what: str, ids: Array, vocabulary: int, mask: npt.NDArray[np.bool_] | None = None) -> None:
    """Checks that ids of any integer type and shape are in [0, vocabulary), where `mask` is true.

    Raises:
        TokenIdError: The first one that is not, and its place.
    """
    bad = (ids < 0) | (ids >= vocabulary)
    if mask is not None:
        bad &= mask
    if bad.any():
        place = tuple(int(axis[0]) for axis in np.nonzero(bad))
        where = ", ".join(map(str, place))
        raise TokenIdError(f"{what}[{where}] is {int(ids[place])}; token ids of this model are in [0, {vocabulary})")


def on_gpu(*values: object) -> DeviceArray | None:
    """The first of them that is an array on a GPU."""
    return next((value for value in values if isinstance(value, DeviceArray)), None)


def allocate(what: str, shape: tuple[int, ...], like: object = None) -> FloatArray:
    """An uninitialised float32 array; on the GPU of `like` when that is an array on one, and then of zeros.

    Raises:
        OutOfMemoryError: There is not that much memory; the message says how much it is.
    """
    if isinstance(like, DeviceArray):
        return like.zeros(shape)  # type: ignore[return-value]
    try:
        return np.empty(shape, dtype=np.float32)
    except (MemoryError, ValueError):
        nbytes = 4
        for extent in shape:
            nbytes *= extent
        raise OutOfMemoryError(
            f"{what} of shape {shape} needs {nbytes} bytes, which this machine does not give"
        ) from None


def zeros(what: str, shape: tuple[int, ...], like: object = None) -> FloatArray:
    """The same, of zeros.

    Raises:
        OutOfMemoryError: As `allocate`.
    """
    array = allocate(what, shape, like)
    if isinstance(array, np.ndarray):
        array[...] = 0
    return array


def assign(target: object, source: object) -> None:
    """target = source, both in one memory."""
    if isinstance(target, DeviceArray):
        target.assign(source)  # type: ignore[arg-type]
    else:
        target[...] = source  # type: ignore[index]


def is_writable(array: object) -> bool:
    """Whether what is written to it is the caller's to read."""
    return array.writable if isinstance(array, DeviceArray) else bool(array.flags.writeable)  # type: ignore[attr-defined]


def share_memory(a: object, b: object) -> bool:
    """Whether two arrays may overlap; what is no array overlaps nothing."""
    if isinstance(a, DeviceArray) and isinstance(b, DeviceArray):
        return a.overlaps(b)
    return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.may_share_memory(a, b)


def last(op: str, what: str, array: Array) -> int:
    """The extent of the last axis.

    Raises:
        ShapeError: There is no axis.
    """
    if array.ndim == 0:
        raise ShapeError(f"{op}: {what} must have at least one dimension, got a scalar")
    return int(array.shape[-1])


def require_last(op: str, what: str, array: Array, extent: int) -> None:
    """Raises ShapeError unless the last axis has this extent."""
    if array.ndim == 0 or array.shape[-1] != extent:
        raise ShapeError(f"{op}: {what} must have shape (..., {extent}), got {array.shape}")


def require_shape(op: str, what: str, array: Array, shape: tuple[int, ...]) -> None:
    """Raises ShapeError unless the array has exactly this shape."""
    if array.shape != shape:
        raise ShapeError(f"{op}: {what} must have shape {shape}, got {array.shape}")


def vector(op: str, what: str, value: object, extent: int) -> FloatArray:
    """A float32 vector of this extent.

    Raises:
        DTypeError, ShapeError: It is not.
    """
    array = float32_array(op, what, value, None)
    require_shape(op, what, array, (extent,))
    return array


def integers(op: str, what: str, value: object, end: int, *, ignored: int | None = None) -> IntArray:
    """An int32 array of any shape whose numbers are in [0, end) or `ignored`.

    Raises:
        DTypeError: Not an array of integers; a DeviceArray of them is copied.
        TokenIdError: A number out of range.
    """
    if isinstance(value, DeviceArray):
        value = value.numpy() if value.dtype != "bfloat16" else value
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
        found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise DTypeError(f"{op}: {what} {array_of('integers')}, got {found}")
    check_token_range(f"{op}: {what}", value, end, None if ignored is None else value != ignored)
    return np.asarray(value, dtype=np.int32, order="C")


def flat(array: Array, width: int) -> Array:
    """The array as rows of `width`; unlike reshape(-1, width) also when it is empty."""
    return array.reshape((array.size // width if width else int(np.prod(array.shape[:-1])), width))


def line(array: Array) -> Array:
    """The array with one axis."""
    return array.reshape((array.size,))


def destination(op: str, out: object, shape: tuple[int, ...], inputs: tuple[object, ...]) -> FloatArray:
    """Where to compute: `out` when the core can write there, else a new array that `finish` copies from.

    Args:
        op: The operation, for messages.
        out: What the caller passed, or None.
        shape: Of the result.
        inputs: Arrays that must not be overwritten while they are read.

    Raises:
        DTypeError: `out` is not a writable float32 array.
        ShapeError: `out` has another shape.
    """
    like = on_gpu(out, *inputs)
    if out is None:
        return allocate(f"{op}: the result", shape, like)
    if isinstance(out, DeviceArray):
        if out.dtype != "float32" or not out.writable:
            raise DTypeError(
                f"{op}: out must be a writable float32 array, got {'' if out.writable else 'read-only '}{out.dtype}"
            )
        require_shape(op, "out", out, shape)  # type: ignore[arg-type]
        if out.is_contiguous and not any(share_memory(out, array) for array in inputs):
            return out  # type: ignore[return-value]
        return allocate(f"{op}: the result", shape, like)
    if not isinstance(out, np.ndarray) or out.dtype != np.float32 or not out.flags.writeable:
        raise DTypeError(f"{op}: out must be a writable float32 array")
    require_shape(op, "out", out, shape)
    shared = any(share_memory(out, array) for array in inputs)
    return out if out.flags.c_contiguous and not shared else allocate(f"{op}: the result", shape)


def finish(out: FloatArray | None, computed: FloatArray) -> FloatArray:
    """Puts the result where the caller asked for it."""
    if out is None or out is computed:
        return computed
    assign(out, computed)
    return out
