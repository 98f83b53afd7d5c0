"""Arrays beside memory that nobody may touch: one byte too far, and the process dies of SIGSEGV.

A sanitizer sees the memory of C++; this sees what kernels do to the memory of NumPy arrays, in any build.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Side = Literal["end", "start"]

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded_empty(shape: tuple[int, ...] | int, dtype: npt.DTypeLike = np.float32, side: Side = "end") -> Array:
    """A C-contiguous array whose last byte (`side="end"`) or first byte touches a forbidden page.

    Floats are NaN, so that whatever an operation forgets to write shows. The array owns its pages.
    """
    shape = (shape,) if isinstance(shape, int) else shape
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    usable = -(-nbytes // _PAGE) * _PAGE
    memory = mmap.mmap(-1, usable + _PAGE)
    offset, forbidden = (usable - nbytes, usable) if side == "end" else (_PAGE, 0)
    array: Array = np.ndarray(shape, dtype, buffer=memory, offset=offset)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _LIBC.mprotect(begin + forbidden, _PAGE, _PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if dtype.kind == "f":
        array.fill(np.nan)
    return array


def guarded(values: npt.ArrayLike, side: Side = "end") -> Array:
    """A copy of `values` beside a forbidden page."""
    values = np.asarray(values)
    copy = guarded_empty(values.shape, values.dtype, side)
    copy[...] = values
    return copy


def guarded_rows_empty(
    shape: tuple[int, ...], gap: int, dtype: npt.DTypeLike = np.float32, side: Side = "end"
) -> tuple[Array, Array]:
    """An array with `gap` elements between its rows (axis 0), the last row touching the forbidden page.

    Returns the array and the elements in the gaps, (rows - 1, gap): they are NaN and have to stay so.
    """
    inner = math.prod(shape[1:])
    stride = inner + gap
    rows = shape[0]
    flat = guarded_empty(max(rows - 1, 0) * stride + (inner if rows else 0), dtype, side)
    item = flat.itemsize
    inner_strides = tuple(math.prod(shape[axis + 1 :]) * item for axis in range(1, len(shape)))
    array: Array = np.ndarray(shape, flat.dtype, buffer=flat, strides=(stride * item, *inner_strides))
    gaps: Array = flat[: max(rows - 1, 0) * stride].reshape(max(rows - 1, 0), stride)[:, inner:]
    return array, gaps


def guarded_rows(values: Array, gap: int, side: Side = "end") -> Array:
    """A copy of `values` with `gap` NaNs between its rows."""
    copy, _ = guarded_rows_empty(values.shape, gap, values.dtype, side)
    copy[...] = values
    return copy
