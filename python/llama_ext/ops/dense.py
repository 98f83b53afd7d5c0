"""Products with weight matrices, and the normalisation in front of them."""

from __future__ import annotations

from typing import Any

from llama_ext import _core
from llama_ext._arrays import (
    Array,
    FloatArray,
    allocate,
    assign,
    destination,
    finish,
    flat,
    float32_array,
    last,
    on_gpu,
    require_last,
    require_shape,
    vector,
    zeros,
)
from llama_ext.errors import DTypeError, OptionError, ShapeError
from llama_ext.ops.arguments import real, word
from llama_ext.ops.backends import backend_for
from llama_ext.ops.device import takes_dlpack
from llama_ext.ops.matrix import Matrix
from llama_ext.ops.packing import as_matrix, check_packed, pack_for, pack_gate_up

__all__ = ["feed_forward", "matmul", "matmul_backward", "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward"]


@takes_dlpack
def matmul(
    x: FloatArray,
    weight: Array | Matrix,
    bias: FloatArray | None = None,
    *,
    residual: FloatArray | None = None,
    out: FloatArray | None = None,
    dtype: str | None = None,
    compute: str = "auto",
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> FloatArray:
    """y = x W^T + bias, plus `residual` when there is one.

    Args:
        x: (..., K) float32.
        weight: (N, K): an array, packed for this call, or the result of `pack`.
        bias: (N) float32, or None.
        residual: (..., N) float32, added to the product; may be `out`.
        dtype: How an array `weight` is kept for this call: as in `pack`, "float32" when None. A `Matrix` has its own.
        compute: "auto": the fastest arithmetic, which may round `x` to bfloat16 when the weights are bfloat16, and to int8 with
            one scale for 128 numbers when they are whole numbers; on a GPU to 16-bit integers (few rows) or bfloat16 then, and with more than 32 rows the
            weights as well. "exact": float32 products of the stored weights. "bfloat16": float32 weights are rounded to
            bfloat16 on the way, and `x` as well where the CPU multiplies bfloat16; whole numbers are "exact" on a CPU, "auto"
            on a GPU.
        out, threads, isa, device: See `llama_ext.ops`; a `Matrix` brings the last three with it.

    Returns:
        (..., N) float32. Every sum runs in float32 in one fixed order.

    Raises:
        ShapeError: The shapes do not fit together.
        DTypeError: An array is not float32, or an unknown `dtype`.
        NumericError: As `pack`, for an array `weight`.
        OptionError: `dtype`, `threads`, `isa` or `device` contradict a `Matrix`; unknown `compute`.
    """
    matrix = as_matrix("matmul", weight, dtype, threads, isa, device)
    rows, columns = matrix.shape
    x = float32_array("matmul", "x", x)
    require_last("matmul", "x", x, columns)
    shape = (*x.shape[:-1], rows)
    if bias is not None:
        bias = vector("matmul", "bias", bias, rows)
    target = destination("matmul", out, shape, (x, bias) if residual is None else (x, bias, residual))
    accumulate = _begin_with(residual, target, "matmul")
    matrix.backend.matmul(flat(x, columns), matrix.handle, bias, flat(target, rows), accumulate, word(compute))
    return finish(out, target)


@takes_dlpack
def matmul_backward(
    d_y: FloatArray,
    weight: Array | Matrix | None = None,
    x: FloatArray | None = None,
    *,
    dtype: str | None = None,
    compute: str = "exact",
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> tuple[FloatArray | None, FloatArray | None, FloatArray]:
    """The gradients of `matmul`: d_x = d_y W, d_weight = d_y^T x, d_bias = the sum of the rows of d_y.

    Args:
        d_y: (..., N) float32: the gradient of the product.
        weight: (N, K), for `d_x`: as in `matmul`. Quantised weights count as the numbers they stand for, which a GPU rounds with
            "bfloat16".
        x: (..., K) float32, for `d_weight`: what was multiplied.
        dtype: As in `matmul`.
        compute: "exact": float32 products. "bfloat16": factors may be rounded to bfloat16, as in `matmul`.
        threads, isa, device: See `llama_ext.ops`; a `Matrix` brings them with it.

    Returns:
        d_x: (..., K) float32; None without `weight`.
        d_weight: (N, K) float32; None without `x`.
        d_bias: (N) float32.
        Sums run in one fixed order that does not depend on threads.

    Raises:
        ShapeError: The shapes do not fit together.
        DTypeError: An array is not float32, or an unknown `dtype`.
        NumericError: As `pack`, for an array `weight`.
        OptionError: `dtype`, `threads`, `isa` or `device` contradict a `Matrix`; unknown `compute`.
    """
    op = "matmul_backward"
    d_y = float32_array(op, "d_y", d_y)
    outputs = last(op, "d_y", d_y)
    matrix = None if weight is None else as_matrix(op, weight, dtype, threads, isa, device)
    backend = backend_for(device, threads, isa) if matrix is None else matrix.backend
    d_x = d_weight = None
    if matrix is not None:
        if matrix.shape[0] != outputs:
            raise ShapeError(f"{op}: weight must have shape ({outputs}, K) for d_y {d_y.shape}, got {matrix.shape}")
        d_x = allocate(f"{op}: d_x", (*d_y.shape[:-1], matrix.shape[1]), d_y)
    if x is not None:
        x = float32_array(op, "x", x)
        width = last(op, "x", x) if matrix is None else matrix.shape[1]
        require_shape(op, "x", x, (*d_y.shape[:-1], width))
        x = flat(x, width)
        d_weight = backend.zero_matrix(outputs, width)
    d_bias = zeros(f"{op}: d_bias", (outputs,), d_y)
    backend.matmul_backward(
        flat(d_y, outputs),
        None if matrix is None else matrix.handle,
        x,
        None if d_x is None else flat(d_x, d_x.shape[-1]),
        d_weight,
        d_bias,
        False,
        word(compute),
    )
    return d_x, None if d_weight is None else values_of(d_weight, d_y), d_bias


@takes_dlpack
def rms_norm(
    x: FloatArray,
    weight: FloatArray,
    eps: float = 1e-6,
    *,
    out: FloatArray | None = None,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> FloatArray:
    """y = x * rsqrt(mean(x^2, last axis) + eps) * weight

    Args:
        x: (..., C) float32.
        weight: (C) float32.
        eps: > 0, as float32, too.
        out, threads, isa, device: See `llama_ext.ops`.

    Returns:
        (..., C) float32. The mean accumulates in float32.

    Raises:
        ShapeError: `weight` is not (C,).
        DTypeError: An array is not float32.
        OptionError: `eps` is not positive.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    x = float32_array("rms_norm", "x", x)
    width = last("rms_norm", "x", x)
    weight = vector("rms_norm", "weight", weight, width)
    eps = real("rms_norm", "eps", eps)
    target = destination("rms_norm", out, x.shape, (x, weight))
    backend_for(device, threads, isa).rms_norm(flat(x, width), weight, eps, flat(target, width))
    return finish(out, target)


@takes_dlpack
def rms_norm_backward(
    d_y: FloatArray,
    x: FloatArray,
    weight: FloatArray,
    eps: float = 1e-6,
    *,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> tuple[FloatArray, FloatArray]:
    """The gradients of `rms_norm`, with r = rsqrt(mean(x^2, last axis) + eps).

    d_x = r (weight d_y - x r^2 mean(weight d_y x, last axis)); d_weight = the sum over rows of d_y x r.

    Args:
        d_y: (..., C) float32: the gradient of the result.
        x: (..., C) float32: what was normalised.
        weight: (C) float32.
        eps: > 0, as in `rms_norm`.
        threads, isa, device: See `llama_ext.ops`.

    Returns:
        d_x: (..., C) float32.
        d_weight: (C) float32.

    Raises:
        ShapeError: `d_y` does not have the shape of `x`, or `weight` is not (C,).
        DTypeError: An array is not float32.
        OptionError: `eps` is not positive.
    """
    op = "rms_norm_backward"
    x = float32_array(op, "x", x)
    width = last(op, "x", x)
    weight = vector(op, "weight", weight, width)
    d_y = float32_array(op, "d_y", d_y)
    require_shape(op, "d_y", d_y, x.shape)
    eps = real(op, "eps", eps)
    d_x = allocate(f"{op}: d_x", x.shape, x)
    d_weight = zeros(f"{op}: d_weight", (width,), x)
    backend = backend_for(device, threads, isa)
    backend.rms_norm_backward(flat(x, width), weight, eps, flat(d_y, width), flat(d_x, width), False, d_weight)
    return d_x, d_weight


@takes_dlpack
def swiglu(
    gate: FloatArray,
    up: FloatArray,
    *,
    out: FloatArray | None = None,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> FloatArray:
    """y = silu(gate) * up, silu(z) = z / (1 + exp(-z)): what `feed_forward` does between its products.

    Args:
        gate: (..., F) float32.
        up: (..., F) float32.
        out, threads, isa, device: See `llama_ext.ops`.

    Returns:
        (..., F) float32.

    Raises:
        ShapeError: `up` does not have the shape of `gate`.
        DTypeError: An array is not float32.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    op = "swiglu"
    gate = float32_array(op, "gate", gate)
    width = last(op, "gate", gate)
    up = float32_array(op, "up", up)
    require_shape(op, "up", up, gate.shape)
    target = destination(op, out, gate.shape, (gate, up))
    backend_for(device, threads, isa).swiglu(flat(gate, width), flat(up, width), flat(target, width))
    return finish(out, target)


@takes_dlpack
def swiglu_backward(
    d_y: FloatArray,
    gate: FloatArray,
    up: FloatArray,
    *,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> tuple[FloatArray, FloatArray]:
    """The gradients of `swiglu`, with s = 1 / (1 + exp(-gate)).

    d_gate = d_y up s (1 + gate (1 - s)); d_up = d_y gate s.

    Args:
        d_y: (..., F) float32: the gradient of the result.
        gate: (..., F) float32.
        up: (..., F) float32.
        threads, isa, device: See `llama_ext.ops`.

    Returns:
        d_gate, d_up: (..., F) float32 each.

    Raises:
        ShapeError: The three arrays do not have one shape.
        DTypeError: An array is not float32.
    """
    op = "swiglu_backward"
    gate = float32_array(op, "gate", gate)
    width = last(op, "gate", gate)
    up = float32_array(op, "up", up)
    d_y = float32_array(op, "d_y", d_y)
    require_shape(op, "up", up, gate.shape)
    require_shape(op, "d_y", d_y, gate.shape)
    d_gate, d_up = (allocate(f"{op}: {name}", gate.shape, gate) for name in ("d_gate", "d_up"))
    backend_for(device, threads, isa).swiglu_backward(
        flat(gate, width), flat(up, width), flat(d_y, width), flat(d_gate, width), flat(d_up, width)
    )
    return d_gate, d_up


@takes_dlpack
def feed_forward(
    x: FloatArray,
    gate_up: Matrix | tuple[Array | Matrix, Array | Matrix],
    down: Matrix | Array,
    *,
    gate_bias: FloatArray | None = None,
    up_bias: FloatArray | None = None,
    down_bias: FloatArray | None = None,
    residual: FloatArray | None = None,
    out: FloatArray | None = None,
    dtype: str | None = None,
    compute: str = "auto",
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> FloatArray:
    """SwiGLU: y = (silu(x G^T + b_g) * (x U^T + b_u)) D^T + b_d, plus `residual` when there is one.

    Args:
        x: (..., C) float32.
        gate_up: The result of `pack_gate_up`; or (gate, up), (F, C) each: arrays, packed for this call, or two results of
            `pack`, which may be kept in different ways.
        down: (C, F): the result of `pack`, or an array, packed for this call.
        gate_bias: (F) float32, or None; with `up_bias` or not at all.
        up_bias: (F) float32, or None.
        down_bias: (C) float32, or None.
        residual: (..., C) float32, added to the result; may be `x` or `out`.
        dtype, compute: As in `matmul`.
        out, threads, isa, device: See `llama_ext.ops`; a `Matrix` brings the last three with it.

    Returns:
        (..., C) float32.

    Raises:
        ShapeError: The shapes do not fit together.
        DTypeError: An array is not float32, or `gate_up` is not what it may be.
        OptionError: As `matmul`; one of the two matrices was packed for another backend.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    op = "feed_forward"
    if not isinstance(gate_up, Matrix):
        gate_up = _two(op, gate_up)
    pair, first, inner, width = _gate_and_up(op, gate_up, dtype, threads, isa, device)
    if isinstance(down, Matrix) or not (isinstance(gate_up, Matrix) or isinstance(gate_up[0], Matrix)):
        down_matrix = as_matrix(op, down, dtype, threads, isa, device)
    else:
        # An array beside a packed pair goes where the pair is.
        down_matrix = pack_for(first.backend, op, "down", down, first.dtype)
    if first.backend is not down_matrix.backend:
        raise OptionError(f"{op}: {first!r} and {down_matrix!r} were packed for different backends; pack both alike")
    if down_matrix.shape != (width, inner):
        raise ShapeError(f"{op}: down must have shape {(width, inner)}, got {down_matrix.shape}")
    x = float32_array(op, "x", x)
    require_last(op, "x", x, width)
    gate_bias = None if gate_bias is None else vector(op, "gate_bias", gate_bias, inner)
    up_bias = None if up_bias is None else vector(op, "up_bias", up_bias, inner)
    down_bias = None if down_bias is None else vector(op, "down_bias", down_bias, width)
    target = destination(op, out, x.shape, (x, gate_bias, up_bias, down_bias, residual))
    accumulate = _begin_with(residual, target, op)
    first.backend.feed_forward(
        flat(x, width),
        pair,
        gate_bias,
        up_bias,
        down_matrix.handle,
        down_bias,
        flat(target, width),
        accumulate,
        word(compute),
    )
    return finish(out, target)


def _gate_and_up(
    op: str,
    gate_up: Matrix | tuple[Array | Matrix, Array | Matrix],
    dtype: str | None,
    threads: int | None,
    isa: str | None,
    device: str,
) -> tuple[_core.Matrix | tuple[_core.Matrix, _core.Matrix], Matrix, int, int]:
    """What the core takes; a matrix of it, which knows the backend; F and C."""
    if isinstance(gate_up, Matrix):
        pair = check_packed(op, gate_up, dtype, threads, isa, device)
        if not pair.gate_up:
            raise OptionError(f"{op}: gate_up must come from pack_gate_up, got {pair!r}")
        return pair.handle, pair, *pair.shape
    gate, up = gate_up
    if isinstance(gate, Matrix) and isinstance(up, Matrix):
        gate, up = (as_matrix(op, each, dtype, threads, isa, device) for each in (gate, up))
        if gate.backend is not up.backend:
            raise OptionError(f"{op}: {gate!r} and {up!r} were packed for different backends; pack both alike")
        if gate.shape != up.shape:
            raise ShapeError(f"{op}: gate and up must have one shape, got {gate.shape} and {up.shape}")
        return (gate.handle, up.handle), gate, *gate.shape
    if isinstance(gate, Matrix) or isinstance(up, Matrix):
        raise OptionError(f"{op}: gate and up must both be arrays, or both be packed")
    pair = pack_gate_up(gate, up, dtype or "float32", threads=threads, isa=isa, device=device)
    return pair.handle, pair, *pair.shape


def _two(op: str, gate_up: Any) -> tuple[Array | Matrix, Array | Matrix]:
    """The two matrices, unless they are something else."""
    try:
        gate, up = gate_up
    except (TypeError, ValueError) as error:
        found = f"{type(gate_up).__name__} ({error})"
        raise DTypeError(
            f"{op}: gate_up must come from pack_gate_up, or be two matrices (gate, up), got {found}"
        ) from error
    return gate, up


def _begin_with(residual: FloatArray | None, target: FloatArray, op: str) -> bool:
    """Puts the residual, if there is one, where the product is added to it; returns whether to add."""
    if residual is None:
        return False
    residual = float32_array(op, "residual", residual)
    require_shape(op, "residual", residual, target.shape)
    assign(target, residual)
    return True


def values_of(gradient: _core.Matrix, like: object) -> FloatArray:
    """What has been added up: in the GPU's memory, where `like` is an array there, without what fills up its rows."""
    return gradient.to_array() if on_gpu(like) is None else gradient.values().contiguous()  # type: ignore[return-value]
