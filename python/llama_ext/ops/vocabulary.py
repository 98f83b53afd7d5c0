"""Between tokens and vectors: embedding, probabilities, losses and the choice of the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext._arrays import (
    Array,
    FloatArray,
    allocate,
    assign,
    destination,
    finish,
    flat,
    float32_array,
    integers,
    is_writable,
    last,
    line,
    on_gpu,
    require_shape,
    token_ids,
)
from llama_ext._options import shown, whole, whole_seed
from llama_ext.errors import OptionError, ShapeError
from llama_ext.ops.arguments import real
from llama_ext.ops.backends import backend_for
from llama_ext.ops.dense import values_of
from llama_ext.ops.device import takes_dlpack
from llama_ext.ops.matrix import Matrix
from llama_ext.ops.packing import as_matrix

__all__ = ["cross_entropy", "cross_entropy_backward", "embedding", "embedding_backward", "sample", "softmax"]


@takes_dlpack
def embedding(
    ids: npt.NDArray[np.integer[Any]],
    table: Array | Matrix,
    *,
    out: FloatArray | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> FloatArray:
    """y[t] = table[ids[t]]

    Args:
        ids: (...) integers, each in [0, V).
        table: (V, C): an array, packed for this call, or the result of `pack`.
        dtype, out, threads, isa, device: As in `matmul`.

    Returns:
        (..., C) float32.

    Raises:
        ShapeError: `table` does not have two dimensions.
        DTypeError: `ids` are not integers.
        TokenIdError: An id outside [0, V).
        OptionError: As `matmul`.
    """
    matrix = as_matrix("embedding", table, dtype, threads, isa, device)
    rows, columns = matrix.shape
    array = integers("embedding", "ids", ids, rows)
    target = destination("embedding", out, (*array.shape, columns), (array, ids, table))
    matrix.backend.embedding(array.reshape(-1), matrix.handle, flat(target, columns))
    return finish(out, target)


@takes_dlpack
def embedding_backward(
    d_y: FloatArray,
    ids: npt.NDArray[np.integer[Any]],
    vocabulary: int,
    *,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> FloatArray:
    """The gradient of `embedding`: d_table[ids[t]] += d_y[t], for t in ascending order, from zeros.

    Args:
        d_y: (..., C) float32: the gradient of the result.
        ids: (...) integers, each in [0, V).
        vocabulary: V, the rows of the table.
        threads, isa, device: See `llama_ext.ops`.

    Returns:
        d_table: (V, C) float32.

    Raises:
        ShapeError: `ids` does not have the shape of `d_y` less the last axis.
        DTypeError: `d_y` is not float32 or `ids` are not integers.
        TokenIdError: An id outside [0, V).
        OptionError: `vocabulary` is not a whole number of at least 0.
        LimitError: No memory has that many rows.
    """
    op = "embedding_backward"
    rows = whole(f"{op}: vocabulary", vocabulary, 0, 2**63 - 1)
    d_y = float32_array(op, "d_y", d_y)
    width = last(op, "d_y", d_y)
    array = integers(op, "ids", ids, rows)
    require_shape(op, "ids", array, d_y.shape[:-1])
    backend = backend_for(device, threads, isa)
    d_table = backend.zero_matrix(rows, width)
    backend.embedding_backward(array.reshape(-1), flat(d_y, width), d_table)
    return values_of(d_table, d_y)


@takes_dlpack
def softmax(
    x: FloatArray,
    *,
    out: FloatArray | None = None,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> FloatArray:
    """y = exp(x - max(x)) / sum(exp(x - max(x))) over the last axis.

    Args:
        x: (..., N) float32. An entry of -inf gets probability 0; a row with a NaN or a +inf, or of nothing but -inf,
            gives NaN.
        out, threads, isa, device: See `llama_ext.ops`.

    Returns:
        The shape of `x`, float32.

    Raises:
        ShapeError: `x` has no dimension.
        DTypeError: `x` is not float32.
    """
    x = float32_array("softmax", "x", x)
    width = last("softmax", "x", x)
    target = destination("softmax", out, x.shape, (x,))
    backend_for(device, threads, isa).softmax(flat(x, width), flat(target, width))
    return finish(out, target)


@takes_dlpack
def cross_entropy(
    logits: FloatArray,
    labels: npt.NDArray[np.integer[Any]],
    *,
    out: FloatArray | None = None,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> FloatArray:
    """The loss of each token: log(sum_v exp(logits[v])) - logits[label], or 0 where the label is -100.

    Nothing is shifted and nothing averaged: the mean over counted labels is `losses.sum() / (labels != -100).sum()`.

    Args:
        logits: (..., V) float32.
        labels: (...) integers, each in [0, V) or -100 (ignored).
        out, threads, isa, device: See `llama_ext.ops`.

    Returns:
        (...) float32, in nats.

    Raises:
        ShapeError: `labels` does not have the shape of `logits` less the last axis.
        DTypeError: `logits` is not float32 or `labels` are not integers.
        TokenIdError: A label outside [0, V) that is not -100.
    """
    logits = float32_array("cross_entropy", "logits", logits)
    width = last("cross_entropy", "logits", logits)
    ids = integers("cross_entropy", "labels", labels, width, ignored=-100)
    require_shape("cross_entropy", "labels", ids, logits.shape[:-1])
    target = destination("cross_entropy", out, ids.shape, (logits, ids))
    backend_for(device, threads, isa).cross_entropy(flat(logits, width), ids.reshape(-1), line(target))
    return finish(out, target)


@takes_dlpack
def cross_entropy_backward(
    logits: FloatArray,
    labels: npt.NDArray[np.integer[Any]],
    scale: float = 1.0,
    *,
    out: FloatArray | None = None,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> tuple[FloatArray, FloatArray]:
    """The losses of `cross_entropy`, and the gradient of `scale` times their sum.

    d_logits[t] = scale (softmax(logits[t]) - onehot(labels[t])), or 0 where the label is -100.

    Args:
        logits: (..., V) float32.
        labels: (...) integers, each in [0, V) or -100 (ignored).
        scale: Finite; 1 / (labels != -100).sum() gives the gradient of the mean over counted labels.
        out: For the gradient, see `llama_ext.ops`; `out=logits` keeps no second array of that size.
        threads, isa, device: See `llama_ext.ops`.

    Returns:
        losses: (...) float32, in nats, as `cross_entropy` gives them, without `scale`.
        d_logits: (..., V) float32.

    Raises:
        ShapeError: `labels` does not have the shape of `logits` less the last axis.
        DTypeError: `logits` is not float32 or `labels` are not integers.
        TokenIdError: A label outside [0, V) that is not -100.
        OptionError: `scale` is not finite.
    """
    op = "cross_entropy_backward"
    logits = float32_array(op, "logits", logits)
    width = last(op, "logits", logits)
    ids = integers(op, "labels", labels, width, ignored=-100)
    require_shape(op, "labels", ids, logits.shape[:-1])
    scale = real(op, "scale", scale)
    # The core works in place, so what may share memory with the target is the labels alone.
    in_place = out is logits and is_writable(logits)
    target = (
        logits
        if in_place
        else destination(op, out, logits.shape, (ids, logits) if on_gpu(logits) is not None else (ids,))
    )
    if not in_place:
        assign(target, logits)
    losses = allocate(f"{op}: the losses", ids.shape, logits)
    backend = backend_for(device, threads, isa)
    backend.cross_entropy_backward(flat(target, width), ids.reshape(-1), scale, line(losses))
    return losses, finish(out, target)


@takes_dlpack
def sample(
    logits: FloatArray,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    seed: int = 0,
    stream: int = 0,
    counter: int = 0,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> tuple[int, float]:
    """Chooses the next token. The steps run in this order: bias, penalties, temperature, top_k, top_p, min_p, draw.

    Args:
        logits: (V) float32, unchanged.
        temperature: >= 0; 0 takes the largest logit, the lowest id among equals.
        top_k: Keep the k largest; 0 keeps all.
        top_p: Probability, 0 < p <= 1: keep the smallest set of the most likely whose probability reaches it.
        min_p: Share, 0 <= p < 1: keep what is at least this share as likely as the most likely.
        repetition_penalty: > 0, on prompt and output: a positive logit is divided by it, a negative one multiplied.
        presence_penalty: Subtracted once from every token of `output`.
        frequency_penalty: Subtracted per occurrence in `output`.
        logit_bias: Added to a token's logit; -inf forbids it.
        prompt: Ids before the output, for the repetition penalty.
        output: Ids generated so far, for the penalties.
        seed, stream, counter: Whole numbers in [0, 2^64): together they decide the draw, whatever was drawn before.
        threads, isa, device: See `llama_ext.ops`.

    Returns:
        The token, and its log probability under softmax(logits) before any processing.

    Raises:
        ShapeError: `logits` does not have one dimension.
        DTypeError: `logits` is not float32, or `prompt` or `output` are not integers.
        TokenIdError: One of these is outside [0, V), where a penalty reads it, or no int32.
        OptionError: An option is out of range.
        NumericError: A logit is NaN or +inf, or all are -inf.
    """
    if (array := on_gpu(logits)) is not None:
        logits = array.numpy()  # the CPU draws
    logits = float32_array("sample", "logits", logits)
    if logits.ndim != 1:
        raise ShapeError(f"sample: logits must have shape (V,), got {logits.shape}")
    if logit_bias is not None and not isinstance(logit_bias, Mapping):
        raise OptionError(f"sample: logit_bias must map token ids to numbers, got {shown(logit_bias)}")
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": dict(logit_bias or {}),
    }
    backend = backend_for(device, threads, isa)
    try:
        return backend.sample(logits, options, list(prompt), list(output), seed, stream, counter)
    except TypeError:
        # The core did not take them. Looked at only now: to look at thousands of ids before each token would take as long as to draw it.
        whole_seed(seed, "sample")
        whole("sample: stream", stream, 0, 2**64 - 1)
        whole("sample: counter", counter, 0, 2**64 - 1)
        for name, ids in (("prompt", prompt), ("output", output)):
            token_ids(f"sample: {name}", ids, len(logits))
        raise
