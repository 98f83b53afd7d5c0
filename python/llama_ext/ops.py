"""The kernels by themselves: the operations a Llama is made of, on NumPy arrays.

Every operation computes in float32 and accepts float32 only: nothing is cast silently. Leading dimensions are free
where that is natural: `(..., K)`. On one instruction set, results are bit-identical for every number of threads and rows.

Options that all operations share:
    out: A float32 array of the result's shape to write to. It may be one of the inputs.
    threads: A whole number >= 1; None is the default, `llama_ext.get_num_threads()`.
    isa: An instruction set from `llama_ext.info().available_isas`; None is the best, or what LLAMA_EXT_ISA says.
    device: "cpu", or "reference" for the float64 loops that the fast kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import (
    Array,
    FloatArray,
    destination,
    finish,
    flat,
    float32_array,
    integers,
    last,
    require_last,
    require_shape,
    vector,
)
from llama_ext._packing import Matrix, as_matrix, backend_for, check_packed, pack, pack_gate_up, weight_array
from llama_ext.errors import DTypeError, OptionError, ShapeError
from llama_ext.models.config import LlamaConfig, RopeParameters
from llama_ext.models.llama import core_config

__all__ = [
    "Matrix",
    "attention",
    "cross_entropy",
    "embedding",
    "feed_forward",
    "matmul",
    "pack",
    "pack_gate_up",
    "rms_norm",
    "rope",
    "rope_angles",
    "sample",
    "softmax",
]


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
        dtype: How an array `weight` is kept for this call: "float32" (None) or "bfloat16". A `Matrix` has its own.
        compute: "auto": the fastest arithmetic, which may round `x` to bfloat16 when the weights are bfloat16. "exact":
            float32 products of the stored weights.
        out, threads, isa, device: See the module; a `Matrix` brings the last three with it.

    Returns:
        (..., N) float32. Every sum runs in float32 in one fixed order.

    Raises:
        ShapeError: The shapes do not fit together.
        DTypeError: An array is not float32.
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
    if residual is not None:
        residual = float32_array("matmul", "residual", residual)
        require_shape("matmul", "residual", residual, shape)
        target[...] = residual
    matrix.backend.matmul(flat(x, columns), matrix.handle, bias, flat(target, rows), residual is not None, compute)
    return finish(out, target)


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
        eps: > 0.
        out, threads, isa, device: See the module.

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
    target = destination("rms_norm", out, x.shape, (x, weight))
    backend_for(device, threads, isa).rms_norm(flat(x, width), weight, eps, flat(target, width))
    return finish(out, target)


def rope_angles(
    positions: npt.NDArray[np.integer[Any]] | Sequence[int],
    head_dim: int,
    *,
    theta: float = 10000.0,
    parameters: RopeParameters | Mapping[str, Any] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """The cosines and sines that `rope` rotates by.

    Args:
        positions: (T) integers.
        head_dim: D, even.
        theta: The base of the frequencies; `parameters` bring their own.
        parameters: For scaled frequencies: a `RopeParameters` or transformers' dictionary, {"rope_type": "linear" | "llama3"
            | "yarn", "rope_theta": ..., "factor": ..., ...}.

    Returns:
        cos, sin: (T, D / 2) float32 each, computed in float64 and rounded once.

    Raises:
        DTypeError: `positions` are not integers.
        ShapeError: `positions` does not have one dimension.
        OptionError: A number is out of range.

    Source: Su et al., "RoFormer", 2021; for scaled frequencies see csrc/ops/rope.h.
    """
    array = np.asarray(positions)
    if array.dtype.kind not in "iu":
        raise DTypeError(f"rope_angles: positions must be integers, got {array.dtype}")
    if array.ndim != 1:
        raise ShapeError(f"rope_angles: positions must have shape (T,), got {array.shape}")
    # A config of one head fills in the defaults as a model's would.
    config = LlamaConfig(
        num_attention_heads=1,
        head_dim=head_dim,
        rope_parameters={"rope_theta": theta} if parameters is None else parameters,
    )
    return _core.rope_angles(core_config(config)["rope"], np.ascontiguousarray(array, dtype=np.int64))


def rope(
    x: FloatArray,
    cos: FloatArray,
    sin: FloatArray,
    *,
    out: FloatArray | None = None,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> FloatArray:
    """Rotates each pair (x[i], x[i + D/2]) of every head by the angle of its token.

    This is the "half-split" layout of Hugging Face checkpoints.

    Args:
        x: (..., T, heads, D) float32, D even.
        cos: (T, D / 2) float32, from `rope_angles`; the same for all leading dimensions.
        sin: Likewise.
        out, threads, isa, device: See the module; `out=x` rotates in place.

    Returns:
        The shape of `x`, float32.

    Raises:
        ShapeError: The shapes do not fit together.
        DTypeError: An array is not float32.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    x = float32_array("rope", "x", x)
    if x.ndim < 3:
        raise ShapeError(f"rope: x must have shape (..., T, heads, D), got {x.shape}")
    tokens, heads, head_dim = x.shape[-3:]
    half = (tokens, head_dim // 2)
    cos = float32_array("rope", "cos", cos)
    sin = float32_array("rope", "sin", sin)
    if head_dim % 2:
        raise ShapeError(f"rope: the head dimension must be even, got x of shape {x.shape}")
    require_shape("rope", "cos", cos, half)
    require_shape("rope", "sin", sin, half)
    batch = x.size // max(tokens * heads * head_dim, 1)
    if batch > 1:
        cos, sin = np.tile(cos, (batch, 1)), np.tile(sin, (batch, 1))
    # The core rotates in place; writing x to the target first makes every aliasing of the two right.
    in_place = out is x and x.flags.writeable
    target = x if in_place else destination("rope", out, x.shape, (cos, sin))
    if not in_place:
        target[...] = x
    if x.size:
        backend_for(device, threads, isa).rope(target.reshape(-1, heads, head_dim), cos, sin)
    return finish(out, target)


def attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    *,
    scale: float | None = None,
    starts: npt.NDArray[np.integer[Any]] | None = None,
    lengths: npt.NDArray[np.integer[Any]] | None = None,
    kv_dtype: str = "float32",
    out: FloatArray | None = None,
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> FloatArray:
    """Causal grouped-query attention: y[h] = softmax_j(scale * q[h] . k[j]) v[j].

    Query head h reads key/value head h // (H / K).

    Args:
        q: (T, H, D) or (B, T, H, D) float32: the last T positions of a sequence of S.
        k: (S, K, D) or (B, S, K, D) float32, S >= T, H a multiple of K. Query t sees keys 0 .. S - T + t.
        v: The shape of `k`.
        scale: None is 1 / sqrt(D).
        starts: (B) integers, of padded rows: where the keys of a row begin; None is 0.
        lengths: (B) integers: how many keys a row has from there on; None is all. A query outside its row's keys is
            padding and gives zeros.
        kv_dtype: What keys and values are rounded to, as in a KV cache: "float32" or "bfloat16".
        out, threads, isa, device: See the module.

    Returns:
        The shape of `q`, float32.

    Raises:
        ShapeError: The shapes do not fit together.
        DTypeError: An array is not float32, or an unknown `kv_dtype`.

    Source: Vaswani et al., 2017; Ainslie et al., "GQA", 2023.
    """
    q = float32_array("attention", "q", q)
    k = float32_array("attention", "k", k)
    v = float32_array("attention", "v", v)
    if q.ndim not in (3, 4):
        raise ShapeError(f"attention: q must have shape (T, H, D) or (B, T, H, D), got {q.shape}")
    batch = q.shape[0] if q.ndim == 4 else 1
    tokens, heads, head_dim = q.shape[-3:]
    if k.ndim != q.ndim or k.shape[:-3] != q.shape[:-3] or k.shape[-1] != head_dim:
        raise ShapeError(
            f"attention: k must have shape (S, K, {head_dim}) after the batch of q {q.shape}, got {k.shape}"
        )
    require_shape("attention", "v", v, k.shape)
    keys, kv_heads = k.shape[-3:-1]
    if kv_heads < 1 or heads % kv_heads:
        raise ShapeError(f"attention: {heads} query heads are not a multiple of {kv_heads} key/value heads")
    if keys < tokens:
        raise ShapeError(f"attention: {tokens} queries need at least as many keys, got {keys}")
    target = destination("attention", out, q.shape, (q, k, v))
    if q.size:
        first = np.zeros(batch, dtype=np.int32) if starts is None else integers("attention", "starts", starts, keys + 1)
        count = keys - first if lengths is None else integers("attention", "lengths", lengths, keys + 1)
        backend_for(device, threads, isa).attention(
            q.reshape(batch, tokens, heads, head_dim),
            k.reshape(batch, keys, kv_heads, head_dim),
            v.reshape(batch, keys, kv_heads, head_dim),
            first,
            count,
            head_dim**-0.5 if scale is None else scale,
            kv_dtype,
            target.reshape(batch, tokens, heads, head_dim),
        )
    return finish(out, target)


def feed_forward(
    x: FloatArray,
    gate_up: Matrix | tuple[Array, Array],
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
        gate_up: The result of `pack_gate_up`, or the arrays (gate, up), (F, C) each, packed for this call.
        down: (C, F): the result of `pack`, or an array, packed for this call.
        gate_bias: (F) float32, or None; with `up_bias` or not at all.
        up_bias: (F) float32, or None.
        down_bias: (C) float32, or None.
        residual: (..., C) float32, added to the result; may be `x` or `out`.
        dtype, compute: As in `matmul`.
        out, threads, isa, device: See the module; a `Matrix` brings the last three with it.

    Returns:
        (..., C) float32.

    Raises:
        ShapeError: The shapes do not fit together.
        DTypeError: An array is not float32.
        OptionError: As `matmul`; one of the two matrices was packed for another backend.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    op = "feed_forward"
    if isinstance(gate_up, Matrix):
        pair = check_packed(op, gate_up, dtype, threads, isa, device)
        if not pair.gate_up:
            raise OptionError(f"{op}: gate_up must come from pack_gate_up, got {pair!r}")
    else:
        gate, up = gate_up
        pair = pack_gate_up(gate, up, dtype or "float32", threads=threads, isa=isa, device=device)
    if isinstance(down, Matrix) or not isinstance(gate_up, Matrix):
        down_matrix = as_matrix(op, down, dtype, threads, isa, device)
    else:
        # An array beside a packed pair goes where the pair is.
        source = weight_array(op, "down", down, pair.dtype)
        handle = pair.backend.matrix(source, pair.dtype)
        down_matrix = Matrix(pair.backend, handle, (source.shape[0], source.shape[1]), gate_up=False)
    if pair.backend is not down_matrix.backend:
        raise OptionError(f"{op}: {pair!r} and {down_matrix!r} were packed for different backends; pack both alike")
    inner, width = pair.shape
    if down_matrix.shape != (width, inner):
        raise ShapeError(f"{op}: down must have shape {(width, inner)}, got {down_matrix.shape}")
    x = float32_array(op, "x", x)
    require_last(op, "x", x, width)
    gate_bias = None if gate_bias is None else vector(op, "gate_bias", gate_bias, inner)
    up_bias = None if up_bias is None else vector(op, "up_bias", up_bias, inner)
    down_bias = None if down_bias is None else vector(op, "down_bias", down_bias, width)
    target = destination(op, out, x.shape, (x, gate_bias, up_bias, down_bias, residual))
    if residual is not None:
        residual = float32_array(op, "residual", residual)
        require_shape(op, "residual", residual, x.shape)
        target[...] = residual
    pair.backend.feed_forward(
        flat(x, width),
        pair.handle,
        gate_bias,
        up_bias,
        down_matrix.handle,
        down_bias,
        flat(target, width),
        residual is not None,
        compute,
    )
    return finish(out, target)


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
        out, threads, isa, device: See the module.

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
        out, threads, isa, device: See the module.

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
    target = destination("cross_entropy", out, ids.shape, (logits,))
    backend_for(device, threads, isa).cross_entropy(flat(logits, width), ids.reshape(-1), target.reshape(-1))
    return finish(out, target)


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
    target = destination("embedding", out, (*array.shape, columns), ())
    matrix.backend.embedding(array.reshape(-1), matrix.handle, flat(target, columns))
    return finish(out, target)


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
        threads, isa, device: See the module.

    Returns:
        The token, and its log probability under softmax(logits) before any processing.

    Raises:
        ShapeError: `logits` does not have one dimension.
        OptionError: An option is out of range.
        NumericError: A logit is NaN or +inf, or all are -inf.
    """
    logits = float32_array("sample", "logits", logits)
    if logits.ndim != 1:
        raise ShapeError(f"sample: logits must have shape (V,), got {logits.shape}")
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
    return backend_for(device, threads, isa).sample(logits, options, list(prompt), list(output), seed, stream, counter)
