"""Checks on the arrays that callers pass in, shared by the operations and the model."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext.errors import DTypeError, OutOfMemoryError, ShapeError, TokenIdError

__all__ = [
    "Array",
    "FloatArray",
    "IntArray",
    "allocate",
    "as_whole",
    "check_token_range",
    "destination",
    "finish",
    "flat",
    "float32_array",
    "integers",
    "is_bfloat16",
    "is_whole",
    "last",
    "require_last",
    "require_shape",
    "token_ids",
    "vector",
    "widen_bfloat16",
]

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


def float32_array(op: str, what: str, value: object) -> FloatArray:
    """`value` itself when it is a C-contiguous float32 array, a contiguous copy when it is strided.

    Nothing is cast: a float64 array is usually an oversight, and rounding it silently would hide that.

    Raises:
        DTypeError: Not a NumPy array of float32.
    """
    if not isinstance(value, np.ndarray):
        raise DTypeError(f"{op}: {what} must be a NumPy array of float32, got {type(value).__name__}")
    if value.dtype != np.float32:
        raise DTypeError(
            f"{op}: {what} must be float32, got {value.dtype}. Convert it first: {what}.astype(numpy.float32)"
        )
    # Not ascontiguousarray: that turns a scalar array into a vector.
    return np.asarray(value, order="C")


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


def token_ids(what: str, values: object, vocabulary: int) -> IntArray:
    """Token ids as a one-dimensional int32 array, each checked to be in [0, vocabulary).

    Args:
        what: The name of the ids in messages.
        values: A sequence of integers or a one-dimensional array of any integer type.
        vocabulary: How many tokens there are.

    Raises:
        DTypeError: The ids are not integers.
        ShapeError: An array that is not one-dimensional.
        TokenIdError: An id outside the vocabulary; the message says which and where.
    """
    if isinstance(values, np.ndarray):
        array = values
    else:
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
            raise TokenIdError(f"{what}[{index}] is {number}; token ids of this model are in [0, {vocabulary})")
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


def allocate(what: str, shape: tuple[int, ...]) -> FloatArray:
    """An uninitialised float32 array.

    Raises:
        OutOfMemoryError: There is not that much memory; the message says how much it is.
    """
    try:
        return np.empty(shape, dtype=np.float32)
    except (MemoryError, ValueError):
        nbytes = 4
        for extent in shape:
            nbytes *= extent
        raise OutOfMemoryError(
            f"{what} of shape {shape} needs {nbytes} bytes, which this machine does not give"
        ) from None


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
    array = float32_array(op, what, value)
    require_shape(op, what, array, (extent,))
    return array


def integers(op: str, what: str, value: object, end: int, *, ignored: int | None = None) -> IntArray:
    """An int32 array of any shape whose numbers are in [0, end) or `ignored`.

    Raises:
        DTypeError: Not a NumPy array of integers.
        TokenIdError: A number out of range.
    """
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
        found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise DTypeError(f"{op}: {what} must be a NumPy array of integers, got {found}")
    check_token_range(f"{op}: {what}", value, end, None if ignored is None else value != ignored)
    return np.asarray(value, dtype=np.int32, order="C")


def flat(array: Array, width: int) -> Array:
    """The array as rows of `width`; unlike reshape(-1, width) also when it is empty."""
    return array.reshape(array.size // width if width else int(np.prod(array.shape[:-1])), width)


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
    if out is None:
        return allocate(f"{op}: the result", shape)
    if not isinstance(out, np.ndarray) or out.dtype != np.float32 or not out.flags.writeable:
        raise DTypeError(f"{op}: out must be a writable float32 array")
    require_shape(op, "out", out, shape)
    shared = any(isinstance(array, np.ndarray) and np.may_share_memory(out, array) for array in inputs)
    return out if out.flags.c_contiguous and not shared else allocate(f"{op}: the result", shape)


def finish(out: FloatArray | None, computed: FloatArray) -> FloatArray:
    """Puts the result where the caller asked for it."""
    if out is None or out is computed:
        return computed
    out[...] = computed
    return out
