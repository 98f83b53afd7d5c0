"""The operations once more, in plain NumPy and float64, written from the papers and not from our code.

The C++ reference is tested against these, so that it is not trusted alone. Beside a result most give its `scale`: the sum of
the magnitudes that went into each element, which is what rounding errors are measured against.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]


def bfloat16_bits(values: Array) -> npt.NDArray[np.uint16]:
    """float32 rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(values), nan, rounded).astype(np.uint16)


def from_bfloat16_bits(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_kept(values: Array, dtype: str) -> F64:
    """What is left of float32 values that are kept as `dtype`, as float64."""
    if dtype == "int8":
        return as_int8(values)
    kept = from_bfloat16_bits(bfloat16_bits(values)) if dtype == "bfloat16" else values
    return kept.astype(np.float64)


def as_int8(values: Array) -> F64:
    """The same for int8 with a scale for each last axis: |x|max / 127, rounded up to 16 significant bits."""
    scale = np.abs(values).max(axis=-1, keepdims=True, initial=0.0).astype(np.float32) / np.float32(127)
    scale = ((scale.view(np.uint32) + np.uint32(0xFF)) & ~np.uint32(0xFF)).view(np.float32)
    codes = np.rint(values * (np.float32(1) / np.where(scale > 0, scale, np.float32(1))))
    return np.clip(codes, -127, 127).astype(np.float64) * scale.astype(np.float64)


def matmul(x: Array, weight: Array, bias: Array | None, residual: Array | None) -> tuple[F64, F64]:
    """(M, N) and the sum of |x| |w| with |bias| and |residual|."""
    x64, w64 = x.astype(np.float64), weight.astype(np.float64)
    y, scale = x64 @ w64.T, np.abs(x64) @ np.abs(w64).T
    for term in (bias, residual):
        if term is not None:
            y = y + term.astype(np.float64)
            scale = scale + np.abs(term.astype(np.float64))
    return y, scale


def rms_norm(x: Array, weight: Array, eps: float) -> tuple[F64, F64]:
    """(rows, C) and the inverse root mean squares, (rows)."""
    x64 = x.astype(np.float64)
    inverse = 1.0 / np.sqrt(np.mean(x64 * x64, axis=-1) + eps)
    return x64 * inverse[:, None] * weight.astype(np.float64), inverse


def rope(x: Array, cos: Array, sin: Array) -> tuple[F64, F64]:
    """(T, heads, D), by complex numbers, and |a| |cos| + |b| |sin|."""
    half = x.shape[-1] // 2
    x64 = x.astype(np.float64)
    pairs = x64[..., :half] + 1j * x64[..., half:]
    turned = pairs * (cos.astype(np.float64) + 1j * sin.astype(np.float64))[:, None, :]
    c, s = np.abs(cos.astype(np.float64))[:, None, :], np.abs(sin.astype(np.float64))[:, None, :]
    a, b = np.abs(x64[..., :half]), np.abs(x64[..., half:])
    scale = np.concatenate([a * c + b * s, b * c + a * s], axis=-1)
    return np.concatenate([turned.real, turned.imag], axis=-1), scale


def rope_frequencies(rope: dict[str, Any]) -> F64:
    """Angle per position of each pair: as transformers' modeling_rope_utils, in float64."""
    dim, theta, kind = rope["head_dim"], rope.get("theta", 10000.0), rope.get("kind", "default")
    base = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if kind == "default":
        return base
    factor = rope["factor"]
    if kind == "linear":
        return base / factor
    context = rope["original_context"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = context * base / (2 * math.pi)  # full rotations within the original context
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return base * ((1 - smooth) / factor + smooth)
    assert kind == "yarn"

    def dimension_of(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension_of(rope["beta_fast"]), dimension_of(rope["beta_slow"])
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last = last + 0.001 if first == last else last
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - first) / (last - first), 0, 1)
    return base / factor * ramp + base * (1 - ramp)


def attention(q: Array, k: Array, v: Array, starts: Array, lengths: Array, scale: float) -> tuple[F64, F64]:
    """(B, T, H, D), zeros for padding; and the weighted |v| times how far an error of a score can spread."""
    batch, tokens, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    q, k, v = (each.astype(np.float64) for each in (q, k, v))
    y, spread = np.zeros(q.shape), np.zeros(q.shape)
    places = keys - tokens + np.arange(tokens)
    for b in range(batch):
        begin, end = int(starts[b]), int(starts[b] + lengths[b])
        rows = np.flatnonzero((places >= begin) & (places < end))
        if rows.size == 0:
            continue
        seen = np.arange(begin, end)[None, :] <= places[rows][:, None]
        for head in range(heads):
            source = head // (heads // kv_heads)
            key, value, query = k[b, begin:end, source], v[b, begin:end, source], q[b, rows, head]
            scores = np.where(seen, scale * (query @ key.T), -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            y[b, rows, head] = weights @ value
            magnitude = np.where(seen, abs(scale) * (np.abs(query) @ np.abs(key).T), 0.0).max(axis=1, keepdims=True)
            spread[b, rows, head] = (1.0 + magnitude) * (weights @ np.abs(value))
    return y, spread


def silu(z: F64) -> F64:
    with np.errstate(over="ignore"):
        return z / (1.0 + np.exp(-z))


def softmax(x: Array) -> F64:
    x64 = x.astype(np.float64)
    if x.size == 0:
        return x64
    with np.errstate(invalid="ignore"):
        powers = np.exp(x64 - x64.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)


def cross_entropy(logits: Array, labels: Array) -> F64:
    x64 = logits.astype(np.float64)
    losses = np.zeros(len(labels))
    for row in np.flatnonzero(labels != -100):
        top = x64[row].max()
        losses[row] = top + math.log(np.exp(x64[row] - top).sum()) - x64[row, labels[row]]
    return losses


def philox_uniform(seed: int, stream: int, counter: int) -> float:
    """Philox 4x32-10 (Salmon et al., 2011), with Python's integers; the first 64 bits as a number in [0, 1)."""
    mask = 0xFFFFFFFF
    c = [counter & mask, counter >> 32, stream & mask, stream >> 32]
    k0, k1 = seed & mask, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & mask, (p0 >> 32) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return ((c[1] << 32 | c[0]) >> 11) * 2.0**-53


def processed_logits(logits: Array, options: dict[str, Any], prompt: list[int], output: list[int]) -> F64:
    """logit_bias, then the repetition, presence and frequency penalties."""
    z = logits.astype(np.float64)
    for token, bias in options.get("logit_bias", {}).items():
        z[token] += bias
    repetition = options.get("repetition_penalty", 1.0)
    for token in sorted(set(prompt) | set(output)):
        z[token] = z[token] / repetition if z[token] > 0 else z[token] * repetition
    for token in sorted(set(output)):
        z[token] -= options.get("presence_penalty", 0.0)
        z[token] -= options.get("frequency_penalty", 0.0) * output.count(token)
    return z


def token_weights(logits: Array, options: dict[str, Any], prompt: list[int], output: list[int]) -> F64:
    """The probability of each token, in the order temperature, top_k, top_p, min_p."""
    z = processed_logits(logits, options, prompt, output)
    z = (z - z.max()) / options["temperature"]
    order = np.lexsort((np.arange(len(z)), -z))  # the most likely first, the lowest id among equals
    if options.get("top_k", 0):
        z[order[options["top_k"] :]] = -np.inf
    p = softmax(z[None])[0]
    top_p = options.get("top_p", 1.0)
    if top_p < 1:
        before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])  # the mass of what is likelier
        p[order[before >= top_p]] = 0.0
    p[p < options.get("min_p", 0.0) * p.max()] = 0.0
    return p / p.sum()
