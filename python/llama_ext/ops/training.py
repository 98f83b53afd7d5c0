"""What only training does to numbers one by one: dropout, and the steps of optimisers."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama_ext._arrays import (
    FloatArray,
    as_whole,
    destination,
    finish,
    flat,
    float32_array,
    last,
    line,
    on_gpu,
    require_shape,
    share_memory,
)
from llama_ext._options import shown, whole_seed
from llama_ext.errors import DTypeError, OptionError, ShapeError
from llama_ext.ops.arguments import flag, real
from llama_ext.ops.backends import backend_for
from llama_ext.ops.device import takes_dlpack

__all__ = ["adam", "dropout", "sgd"]


@takes_dlpack
def dropout(
    x: FloatArray,
    p: float,
    seed: int,
    *,
    scale: float = 1.0,
    out: FloatArray | None = None,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> FloatArray:
    """y = 0 with probability p, else scale x / (1 - p).

    Whether an element is dropped depends on nothing but `seed` and its place in the flattened array. So the gradient is the same
    operation with the same seed and scale on d_y, and nothing is saved.

    Args:
        x: (..., N) float32.
        p: Probability, 0 <= p < 1.
        seed: A whole number in [0, 2^64).
        scale: Finite; such as a LoRA adapter's, whose input is dropped.
        out, threads, isa, device: See `llama_ext.ops`.

    Returns:
        The shape of `x`, float32.

    Raises:
        ShapeError: `x` has no dimension.
        DTypeError: `x` is not float32.
        OptionError: `p`, `seed` or `scale` is out of range.

    Source: Srivastava et al., "Dropout", 2014; the random bits: csrc/ops/dropout.h.
    """
    op = "dropout"
    x = float32_array(op, "x", x)
    width = last(op, "x", x)
    number = whole_seed(seed, op)
    p, scale = real(op, "p", p), real(op, "scale", scale)
    target = destination(op, out, x.shape, (x,))
    backend_for(device, threads, isa).dropout(flat(x, width), p, number, flat(target, width), scale=scale)
    return finish(out, target)


@takes_dlpack
def adam(
    parameter: FloatArray,
    gradient: FloatArray,
    first: FloatArray,
    second: FloatArray,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    gradient_scale: float = 1.0,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> None:
    """One step of Adam, in place, with g = gradient_scale * gradient.

    first = beta1 first + (1 - beta1) g; second = beta2 second + (1 - beta2) g^2;
    parameter -= lr (first / (1 - beta1^step)) / (sqrt(second / (1 - beta2^step)) + eps)

    Args:
        parameter: Any shape, float32, C-contiguous: overwritten.
        gradient: Its shape, float32.
        first: Its shape, float32, C-contiguous: the mean of gradients, zeros before the first step; overwritten.
        second: Likewise, the mean of their squares.
        step: Counts from 1.
        lr: Learning rate, finite.
        betas: beta1 and beta2, each in [0, 1).
        eps: >= 0.
        weight_decay: Finite. With `decoupled` (AdamW) the parameter is first multiplied by 1 - lr * weight_decay, without (Adam
            with L2) g += weight_decay * parameter.
        gradient_scale: Finite; such as what clips the norm of all gradients.
        threads, isa, device: See `llama_ext.ops`.

    Raises:
        ShapeError: The arrays do not have one shape, or one that is overwritten is not C-contiguous.
        DTypeError: An array is not float32, or one that is overwritten cannot be written to.
        OptionError: A number is out of range.

    Source: Kingma & Ba, "Adam", 2015; Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    op = "adam"
    states = [_state(op, "parameter", parameter), _state(op, "first", first), _state(op, "second", second)]
    gradient = float32_array(op, "gradient", gradient, None)
    for name, each in (("gradient", gradient), ("first", first), ("second", second)):
        require_shape(op, name, each, parameter.shape)
    _require_apart(op, parameter=parameter, gradient=gradient, first=first, second=second)
    number = as_whole(step)
    if number is None or not 1 <= number < 2**63:
        raise OptionError(f"{op}: step counts from 1, got {shown(step)}")
    beta1, beta2 = _betas(op, betas)
    backend = backend_for(device, threads, isa)
    flat_parameter, flat_first, flat_second = states
    backend.adam(
        flat_parameter,
        line(gradient),
        flat_first,
        flat_second,
        number,
        real(op, "lr", lr),
        beta1,
        beta2,
        real(op, "eps", eps),
        real(op, "weight_decay", weight_decay),
        flag(op, "decoupled", decoupled),
        real(op, "gradient_scale", gradient_scale),
    )


@takes_dlpack
def sgd(
    parameter: FloatArray,
    gradient: FloatArray,
    velocity: FloatArray | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    gradient_scale: float = 1.0,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> None:
    """One step of stochastic gradient descent, in place, with g = gradient_scale * gradient + weight_decay * parameter.

    velocity = momentum velocity + g; parameter -= lr velocity, or with `nesterov` parameter -= lr (g + momentum velocity).

    Args:
        parameter: Any shape, float32, C-contiguous: overwritten.
        gradient: Its shape, float32.
        velocity: Its shape, float32, C-contiguous, zeros before the first step: overwritten. None when `momentum` is 0.
        lr: Learning rate, finite.
        momentum: In [0, 1).
        weight_decay: Finite.
        nesterov: Look ahead along the velocity.
        gradient_scale: Finite; such as what clips the norm of all gradients.
        threads, isa, device: See `llama_ext.ops`.

    Raises:
        ShapeError: The arrays do not have one shape, or one that is overwritten is not C-contiguous.
        DTypeError: An array is not float32, or one that is overwritten cannot be written to.
        OptionError: A number is out of range, or `momentum` comes without `velocity`.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.
    """
    op = "sgd"
    flat_parameter = _state(op, "parameter", parameter)
    flat_velocity = None if velocity is None else _state(op, "velocity", velocity)
    gradient = float32_array(op, "gradient", gradient, None)
    require_shape(op, "gradient", gradient, parameter.shape)
    momentum = real(op, "momentum", momentum)
    if velocity is None:
        if momentum != 0:
            raise OptionError(f"{op}: momentum {momentum} needs a velocity: pass zeros of the parameter's shape")
        _require_apart(op, parameter=parameter, gradient=gradient)
    else:
        require_shape(op, "velocity", velocity, parameter.shape)
        _require_apart(op, parameter=parameter, gradient=gradient, velocity=velocity)
    backend = backend_for(device, threads, isa)
    backend.sgd(
        flat_parameter,
        line(gradient),
        flat_velocity,
        real(op, "lr", lr),
        momentum,
        real(op, "weight_decay", weight_decay),
        flag(op, "nesterov", nesterov),
        real(op, "gradient_scale", gradient_scale),
    )


def _betas(op: str, betas: Any) -> tuple[float, float]:
    try:
        first, second = betas  # no more and no fewer: the numbers after them have places of their own
    except (TypeError, ValueError):
        raise OptionError(f"{op}: betas must be two numbers in [0, 1), got {shown(betas)}") from None
    return real(op, "betas[0]", first), real(op, "betas[1]", second)


def _state(op: str, name: str, value: object) -> FloatArray:
    """An array that is overwritten, as a vector of the same memory."""
    if (array := on_gpu(value)) is not None:
        if array.dtype != "float32" or not array.writable:
            found = array.dtype if array.writable else f"read-only {array.dtype}"
            raise DTypeError(f"{op}: {name} must be a writable float32 array, got {found}")
        return line(float32_array(op, name, array, None))
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or not value.flags.writeable:
        found = type(value).__name__ if not isinstance(value, np.ndarray) else f"{value.dtype}"
        raise DTypeError(f"{op}: {name} must be a writable float32 array, got {found}")
    if not value.flags.c_contiguous:
        raise ShapeError(f"{op}: {name} must be C-contiguous, as it is overwritten. Pass a contiguous copy")
    return value.reshape(-1)


def _require_apart(op: str, **arrays: FloatArray) -> None:
    """The core reads and writes element by element, so arrays that share memory would be a mixture of both."""
    names = list(arrays)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            if share_memory(arrays[name], arrays[other]):
                raise ShapeError(f"{op}: {name} must not overlap {other}. Pass a copy")
