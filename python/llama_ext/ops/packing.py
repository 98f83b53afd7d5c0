"""Putting weights into the layout of a backend."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import (
    Array,
    Bfloat16Bits,
    FloatArray,
    array_of,
    as_whole,
    conversion,
    is_bfloat16,
    on_gpu,
    vector,
    widen_bfloat16,
)
from llama_ext._options import shown
from llama_ext.errors import DTypeError, OptionError, ShapeError
from llama_ext.ops.arguments import word
from llama_ext.ops.backends import backend_for
from llama_ext.ops.device import takes_dlpack
from llama_ext.ops.matrix import WITH_MINIMA, Matrix
from llama_ext.runtime.weight_types import GROUP_SIZES, group_for

__all__ = [
    "Matrix",
    "as_matrix",
    "backend_for",
    "check_packed",
    "pack",
    "pack_blocks",
    "pack_for",
    "pack_gate_up",
    "quantize",
]

_FLOATS = ("float32", "bfloat16", "float16")
_CODES = ("int8", "int5", "int4")


@takes_dlpack
def pack(
    weight: Array,
    dtype: str = "float32",
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    importance: FloatArray | None = None,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> Matrix:
    """Puts a weight matrix into the layout of the fastest kernel.

    Args:
        weight: (N, K) float32, float16, or bfloat16 as ml_dtypes'; with dtype="bfloat16" also its bits as uint16.
        dtype: How to keep it: "float32"; "bfloat16" or "float16", rounded to nearest, ties to even; or as whole numbers with a
            float16 scale per group: "int8", "int5" or "int4".
        group_size: Of whole numbers: how many weights of a row share a scale, 128, 64 or 32. None: 128, or the largest that
            divides K, and 32 when none does.
        symmetric: Of whole numbers: True (None) for weight = scale * code, False for scale * code + minimum, which costs two
            bytes a group more and fits weights that do not lie around zero.
        importance: Of whole numbers: (K) float32, finite, not negative: how much the squared error of each column counts,
            such as the mean square of what it is multiplied with. None: all columns alike.
        threads, isa, device: See `llama_ext.ops`.

    Returns:
        A matrix to pass to `matmul`, `embedding` or `feed_forward`.

    Raises:
        ShapeError: `weight` does not have two dimensions, or `importance` is not (K,).
        DTypeError: Another element type, or an unknown `dtype`.
        OptionError: Another group size, or one of the options of whole numbers with floating-point weights.
        NumericError: A weight is to be rounded to whole numbers and is not finite, or too large for a float16 scale.
        DeviceError: There is no such device or instruction set here.
    """
    backend = backend_for(device, threads, isa)
    return pack_for(backend, "pack", "weight", weight, dtype, group_size, symmetric, importance)


@takes_dlpack
def pack_gate_up(
    gate: Array,
    up: Array,
    dtype: str = "float32",
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    importance: FloatArray | None = None,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> Matrix:
    """Packs the two input matrices of `feed_forward` as the one that its kernel reads.

    Args:
        gate: (F, C), element types as in `pack`.
        up: (F, C), likewise.
        dtype, group_size, symmetric, importance: As in `pack`, for both; importance is (C).
        threads, isa, device: See `llama_ext.ops`.

    Returns:
        A matrix to pass to `feed_forward`.

    Raises:
        ShapeError: The two are not matrices of one shape, or `importance` is not (C,).
        DTypeError, OptionError, NumericError, DeviceError: As `pack`.
    """
    op = "pack_gate_up"
    backend = backend_for(device, threads, isa)
    gate_source = _weight_array(op, "gate", gate, dtype)
    up_source = _weight_array(op, "up", up, dtype)
    if gate_source.shape != up_source.shape:
        raise ShapeError(f"{op}: gate and up must have one shape, got {gate_source.shape} and {up_source.shape}")
    name, group = _encoding(op, dtype, gate_source.shape[1], group_size, symmetric, importance)
    handle = backend.gate_up_matrix(gate_source, up_source, name, group, _importance(op, importance, gate_source))
    return Matrix(backend, handle, (gate_source.shape[0], gate_source.shape[1]), gate_up=True)


@takes_dlpack
def pack_blocks(
    blocks: npt.NDArray[np.uint8],
    ggml_type: str,
    columns: int,
    *,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> Matrix:
    """Packs a quantised tensor of a GGUF file, whose codes and scales are kept as they are.

    Args:
        blocks: uint8 of any shape: the bytes of N rows, one after another.
        ggml_type: Their format: "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K" or "Q6_K".
        columns: K, the weights of a row: a multiple of the format's block, 32 or, with _K, 256.
        threads, isa, device: See `llama_ext.ops`.

    Returns:
        A matrix to pass to `matmul`, `embedding` or `feed_forward`. Its dtype is the one that holds the format: "int8" with groups
        of 32 for Q8_0, "q4_k" for Q4_K, and so on.

    Raises:
        ShapeError: `columns` is not a number of blocks, or the bytes are not a number of rows.
        DTypeError: `blocks` is not uint8, or an unknown format.
        CheckpointError: A scale is not a finite number.
        DeviceError: There is no such device or instruction set here.
    """
    op = "pack_blocks"
    given: object = blocks if on_gpu(blocks) is None else blocks.numpy()  # type: ignore[attr-defined]
    if not isinstance(given, np.ndarray) or given.dtype != np.uint8:
        found = given.dtype if isinstance(given, np.ndarray) else type(given).__name__
        raise DTypeError(f"{op}: blocks {array_of('uint8')}, got {found}")
    width = as_whole(columns)
    if width is None:
        raise DTypeError(f"{op}: columns must be a whole number, got {columns!r}")
    if not 0 < width < 2**63:
        raise ShapeError(f"{op}: columns must be in [1, 2^63), got {shown(width)}")
    backend = backend_for(device, threads, isa)
    handle = backend.block_matrix(np.ascontiguousarray(given), word(ggml_type), width)
    return Matrix(backend, handle, handle.shape)


@takes_dlpack
def quantize(
    weight: Array,
    dtype: str,
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    importance: FloatArray | None = None,
) -> tuple[Array, npt.NDArray[np.float16], npt.NDArray[np.float16] | None]:
    """Rounds weights to whole numbers with scales, as `pack` does, into plain arrays.

    Args:
        weight, group_size, symmetric, importance: As in `pack`.
        dtype: "int8", "int5" or "int4".

    Returns:
        codes: (N, K) int8, or with symmetric=False uint8.
        scales: (N, ceil(K / group_size)) float16.
        minima: The same shape, or None when symmetric.
        A weight is scale * code, plus the minimum of its group where there is one.

    Raises:
        ShapeError, OptionError, NumericError: As `pack`.
        DTypeError: As `pack`, and for a `dtype` of no whole numbers.
    """
    op = "quantize"
    if word(dtype) not in _CODES:
        raise DTypeError(f"{op}: dtype must be one of {', '.join(_CODES)}, got {dtype!r}")
    source = _weight_array(op, "weight", weight, dtype).astype(np.float32, copy=False)
    name, group = _encoding(op, dtype, source.shape[1], group_size, symmetric, importance)
    return _core.quantize(source, name, group, _importance(op, importance, source))


def pack_for(
    backend: _core.Backend,
    op: str,
    what: str,
    weight: Array,
    dtype: str,
    group_size: int | None = None,
    symmetric: bool | None = None,
    importance: FloatArray | None = None,
) -> Matrix:
    """The body of `pack`, for a backend that is there already.

    Raises:
        ShapeError, DTypeError, OptionError, NumericError: As `pack`; the message names `op` and `what`.
    """
    source = _weight_array(op, what, weight, dtype)
    name, group = _encoding(op, dtype, source.shape[1], group_size, symmetric, importance)
    handle = backend.matrix(source, name, group, _importance(op, importance, source))
    return Matrix(backend, handle, (source.shape[0], source.shape[1]))


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
    wanted = {"cpu": None, "cuda": "cuda:0"}.get(word(device), device)
    asked.append(("device", wanted, matrix.backend.device))
    for name, option, packed in asked:
        if option is not None and option != packed:
            raise OptionError(
                f"{op}: {name}={option!r}, but the matrix was packed with {name}={packed!r}. Pack it again"
            )
    return matrix


def _weight_array(op: str, what: str, value: object, dtype: str) -> Array:
    """A weight as the core takes it: a contiguous (N, K) array of float32, float16 or the bits of bfloat16.

    Raises:
        DTypeError: `dtype` is unknown, or the array holds neither.
        ShapeError: Not two dimensions.
    """
    # NumPy's own dtypes equal their names, and are no words.
    if word(dtype) not in _FLOATS + _CODES:
        raise DTypeError(f"{op}: dtype must be one of {', '.join(_FLOATS + _CODES)}, got {dtype!r}")
    if (array := on_gpu(value)) is not None:
        # The layout is made by the CPU.
        value = array.numpy().view(Bfloat16Bits) if array.dtype == "bfloat16" else array.numpy()
    if not isinstance(value, np.ndarray):
        kinds = "float32, float16 or bfloat16"
        raise DTypeError(f"{op}: {what} {array_of(kinds)}, or a packed Matrix, got {type(value).__name__}")
    if value.ndim != 2:
        raise ShapeError(f"{op}: {what} must have shape (rows, columns), got {value.shape}")
    if value.dtype in (np.float32, np.float16):
        return np.ascontiguousarray(value)
    if isinstance(value, Bfloat16Bits):
        bits = np.ascontiguousarray(value).view(np.ndarray)
        return bits if dtype == "bfloat16" else widen_bfloat16(bits)
    if is_bfloat16(value.dtype):
        return np.ascontiguousarray(value).view(np.uint16) if dtype == "bfloat16" else widen_bfloat16(value)
    if value.dtype == np.uint16:
        if dtype == "bfloat16":
            return np.ascontiguousarray(value)
        raise DTypeError(f"{op}: {what} is {value.dtype}; pass dtype='bfloat16' if these are bfloat16 numbers")
    raise DTypeError(f"{op}: {what} must be float32, float16 or bfloat16, got {value.dtype}. {conversion(what, value)}")


def _encoding(
    op: str, dtype: str, columns: int, group_size: int | None, symmetric: bool | None, importance: object
) -> tuple[str, int]:
    """The core's name for a way to keep weights, and its group.

    Raises:
        OptionError: An option that `dtype` does not have, or no group size.
    """
    if dtype in _FLOATS:
        for name, value in (("group_size", group_size), ("symmetric", symmetric), ("importance", importance)):
            if value is not None:
                raise OptionError(
                    f"{op}: {name} belongs to dtype={' or '.join(map(repr, _CODES))}, got dtype={dtype!r}"
                )
        return dtype, 0
    group = group_for(columns) if group_size is None else as_whole(group_size)
    if group not in GROUP_SIZES:
        raise OptionError(f"{op}: group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size!r}")
    return dtype + ("" if symmetric in (None, True) else WITH_MINIMA), group


def _importance(op: str, importance: FloatArray | None, weight: Array) -> FloatArray | None:
    if (array := on_gpu(importance)) is not None:
        importance = array.numpy()
    return None if importance is None else vector(op, "importance", importance, weight.shape[1])
