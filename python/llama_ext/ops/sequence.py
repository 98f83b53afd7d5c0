"""What looks along a sequence: rotary positions and attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import (
    FloatArray,
    array_by_protocol,
    as_whole,
    assign,
    destination,
    finish,
    float32_array,
    integers,
    is_writable,
    on_gpu,
    require_shape,
    zeros,
)
from llama_ext._options import shown, whole_seed
from llama_ext.errors import DTypeError, OptionError, ShapeError
from llama_ext.models.config import LlamaConfig, RopeParameters
from llama_ext.models.llama import core_config
from llama_ext.ops.arguments import flag, real, word
from llama_ext.ops.backends import backend_for
from llama_ext.ops.device import takes_dlpack

__all__ = ["attention", "causal_attention", "causal_attention_backward", "rope", "rope_angles"]

Sequences = Sequence[tuple[int, int]]


def rope_angles(
    positions: npt.NDArray[np.integer[Any]] | Sequence[int],
    head_dim: int,
    *,
    theta: float = 10000.0,
    parameters: RopeParameters | Mapping[str, Any] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """The cosines and sines that `rope` rotates by.

    Args:
        positions: (T) integers, within int64.
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
    array = _positions(positions)
    # A config of one head fills in the defaults as a model's would.
    config = LlamaConfig(
        num_attention_heads=1,
        head_dim=head_dim,
        rope_parameters={"rope_theta": theta} if parameters is None else parameters,
    )
    return _core.rope_angles(core_config(config)["rope"], array)


def _positions(positions: object) -> npt.NDArray[np.int64]:
    """An array of them as the core takes it."""
    what = "rope_angles: positions"
    array = array_by_protocol(what, positions)
    if array is None:
        try:
            array = np.asarray(positions)
        except (TypeError, ValueError) as error:  # lists of lists of several lengths
            raise DTypeError(f"{what} must be integers, got {shown(positions)}") from error
        if not array.size:
            array = array.astype(np.int64)  # NumPy takes a list of nothing for floats
    if array.dtype.kind not in "iu":
        raise DTypeError(f"{what} must be integers, got {array.dtype}")
    if array.ndim != 1:
        raise ShapeError(f"{what} must have shape (T,), got {array.shape}")
    if array.dtype == np.uint64 and array.size and (largest := int(array.max())) >= 2**63:
        raise OptionError(f"{what} must be below 2^63, got {largest}")
    return np.ascontiguousarray(array, dtype=np.int64)


@takes_dlpack
def rope(
    x: FloatArray,
    cos: FloatArray,
    sin: FloatArray,
    *,
    inverse: bool = False,
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
        inverse: Rotate by the opposite angle, as the gradient needs: d_x = rope(d_y, cos, sin, inverse=True).
        out, threads, isa, device: See `llama_ext.ops`; `out=x` rotates in place.

    Returns:
        The shape of `x`, float32.

    Raises:
        ShapeError: The shapes do not fit together.
        DTypeError: An array is not float32.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    x = float32_array("rope", "x", x, 2)
    if x.ndim < 3:
        raise ShapeError(f"rope: x must have shape (..., T, heads, D), got {x.shape}")
    tokens, heads, head_dim = x.shape[-3:]
    half = (tokens, head_dim // 2)
    cos = float32_array("rope", "cos", cos, None)
    sin = float32_array("rope", "sin", sin, None)
    if head_dim % 2:
        raise ShapeError(f"rope: the head dimension must be even, got x of shape {x.shape}")
    require_shape("rope", "cos", cos, half)
    require_shape("rope", "sin", sin, half)
    inverse = flag("rope", "inverse", inverse)
    batch = x.size // max(tokens * heads * head_dim, 1)
    if batch > 1:
        cos, sin = _repeated(cos, batch), _repeated(sin, batch)
    # The core rotates in place; writing x to the target first makes every aliasing of the two right.
    in_place = out is x and is_writable(x)
    target = x if in_place else destination("rope", out, x.shape, (cos, sin) if on_gpu(x) is None else (cos, sin, x))
    if not in_place:
        assign(target, x)
    if x.size:
        backend_for(device, threads, isa).rope(target.reshape((batch * tokens, heads, head_dim)), cos, sin, inverse)
    return finish(out, target)


@takes_dlpack
def attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    *,
    scale: float | None = None,
    starts: npt.NDArray[np.integer[Any]] | None = None,
    lengths: npt.NDArray[np.integer[Any]] | None = None,
    kv_dtype: str = "float32",
    compute: str = "auto",
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
        kv_dtype: What keys and values are rounded to, as in a KV cache: "float32", "bfloat16", or "int8"
            with a scale for each position and head.
        compute: "auto" may round q and the softmax's weights to bfloat16 when `kv_dtype` is not float32; "exact" does not.
        out, threads, isa, device: See `llama_ext.ops`.

    Returns:
        The shape of `q`, float32.

    Raises:
        ShapeError: The shapes do not fit together.
        DTypeError: An array is not float32, or an unknown `kv_dtype`.
        OptionError: An unknown `compute`.

    Source: Vaswani et al., 2017; Ainslie et al., "GQA", 2023.
    """
    q = float32_array("attention", "q", q, None)
    k, v = (float32_array("attention", name, each, None) for name, each in (("k", k), ("v", v)))
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
            q.reshape((batch, tokens, heads, head_dim)),
            k.reshape((batch, keys, kv_heads, head_dim)),
            v.reshape((batch, keys, kv_heads, head_dim)),
            first,
            count,
            head_dim**-0.5 if scale is None else real("attention", "scale", scale),
            word(kv_dtype),
            target.reshape((batch, tokens, heads, head_dim)),
            word(compute),
        )
    return finish(out, target)


@takes_dlpack
def causal_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    *,
    sequences: Sequences | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    compute: str = "exact",
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> tuple[FloatArray, FloatArray]:
    """Causal grouped-query attention of whole sequences, for training: what `causal_attention_backward` needs comes with it.

    y[h, i] = sum_j drop(p[h, i, j]) v[j] with p[h, i, j] = softmax_j(scale * q[h, i] . k[j]) over the tokens j = 0 .. i of
    the sequence; query head h reads key/value head h // (H / K).

    Args:
        q: (M, H, D) float32: the tokens of all sequences.
        k: (M, K, D) float32, H a multiple of K.
        v: The shape of `k`.
        sequences: (first row, tokens) of each sequence: ranges of the M rows that do not overlap, of at most 2^20 tokens; None:
            all rows are one sequence.
        scale: None is 1 / sqrt(D).
        dropout: Probability, 0 <= p < 1, that a weight is dropped; the others are divided by 1 - p.
        seed: A whole number in [0, 2^64): with the row, head and key it decides what is dropped.
        compute: "exact": float32. "bfloat16": factors may be rounded to bfloat16 where the CPU multiplies it.
        threads, isa, device: See `llama_ext.ops`.

    Returns:
        y: (M, H, D) float32.
        log_sums: (M, H) float32: log sum_j exp(scale * q[h, i] . k[j]).
        Both are zero in the rows of no sequence.

    Raises:
        ShapeError: The shapes do not fit together, or `sequences` overlap or leave the rows.
        DTypeError: An array is not float32, or `sequences` are not pairs of whole numbers.
        OptionError: `dropout` or `seed` is out of range, or an unknown `compute`.

    Source: Vaswani et al., 2017; Ainslie et al., "GQA", 2023; Srivastava et al., "Dropout", 2014.
    """
    op = "causal_attention"
    q, k, v = (float32_array(op, name, each, 2) for name, each in (("q", q), ("k", k), ("v", v)))
    ranges = _ranges(op, q, sequences)
    y, log_sums = zeros(f"{op}: y", q.shape, q), zeros(f"{op}: log_sums", q.shape[:2], q)
    scale, dropout = _scale(op, q, scale), real(op, "dropout", dropout)
    backend = backend_for(device, threads, isa)
    backend.causal_attention(ranges, q, k, v, scale, y, log_sums, dropout, whole_seed(seed, op), word(compute))
    return y, log_sums


@takes_dlpack
def causal_attention_backward(
    d_y: FloatArray,
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    y: FloatArray,
    log_sums: FloatArray,
    *,
    sequences: Sequences | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    compute: str = "exact",
    threads: int | None = None,
    isa: str | None = None,
    device: str = "cpu",
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The gradients of `causal_attention`, whose weights are computed once more and never stored.

    Args:
        d_y: (M, H, D) float32: the gradient of the result.
        q, k, v: As `causal_attention` got them.
        y, log_sums: As it gave them.
        sequences, scale, dropout, seed, compute: As it got them.
        threads, isa, device: See `llama_ext.ops`.

    Returns:
        d_q: (M, H, D) float32.
        d_k, d_v: (M, K, D) float32 each, summed over the query heads that share a key/value head.
        All are zero in the rows of no sequence.

    Raises:
        ShapeError, DTypeError, OptionError: As `causal_attention`.

    Source: Dao et al., "FlashAttention", 2022, appendix B.
    """
    op = "causal_attention_backward"
    named = (("d_y", d_y), ("q", q), ("k", k), ("v", v), ("y", y), ("log_sums", log_sums))
    d_y, q, k, v, y, log_sums = (float32_array(op, name, each, 1 if name == "log_sums" else 2) for name, each in named)
    ranges = _ranges(op, q, sequences)
    d_q, d_k, d_v = (zeros(f"{op}: d_{name}", each.shape, q) for name, each in (("q", q), ("k", k), ("v", v)))
    scale, dropout = _scale(op, q, scale), real(op, "dropout", dropout)
    backend = backend_for(device, threads, isa)
    backend.causal_attention_backward(
        ranges, q, k, v, scale, y, log_sums, d_y, d_q, d_k, d_v, dropout, whole_seed(seed, op), word(compute)
    )
    return d_q, d_k, d_v


def _ranges(op: str, q: FloatArray, sequences: Sequences | None) -> list[tuple[int, int]]:
    """The ranges of rows as the core takes them; it checks that they fit."""
    if q.ndim != 3:
        raise ShapeError(f"{op}: q must have shape (M, H, D), got {q.shape}")
    if sequences is None:
        return [(0, q.shape[0])]
    ranges = []
    try:
        given: list[object] = list(sequences)
    except TypeError:
        found = type(sequences).__name__
        raise DTypeError(f"{op}: sequences must be pairs (first row, tokens), or None, got {found}") from None
    for index, pair in enumerate(given):
        numbers = [as_whole(each) for each in pair] if isinstance(pair, (tuple, list)) else []
        if len(numbers) != 2 or numbers[0] is None or numbers[1] is None:
            raise DTypeError(f"{op}: sequences[{index}] must be (first row, tokens), two whole numbers, got {pair!r}")
        first, tokens = numbers[0], numbers[1]
        if not (-(2**63) <= first < 2**63 and -(2**63) <= tokens < 2**63):
            raise ShapeError(f"{op}: sequences[{index}] must be a range within {q.shape[0]} rows, got {shown(pair)}")
        ranges.append((first, tokens))
    return ranges


def _scale(op: str, q: FloatArray, scale: float | None) -> float:
    return float(max(q.shape[2], 1) ** -0.5) if scale is None else real(op, "scale", scale)


def _repeated(angles: FloatArray, times: int) -> FloatArray:
    """The rows of `angles` so many times, one after another."""
    array = on_gpu(angles)
    return np.tile(angles, (times, 1)) if array is None else array.repeated(times)  # type: ignore[return-value]
