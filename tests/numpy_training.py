"""What only training needs, in plain NumPy and float64, as numpy_ops: forward functions for finite differences, and how far an
error of float32 may spread in gradients. Written from the formulas and the papers, not from our code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from numpy_ops import silu

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]
Ranges = Sequence[tuple[int, int]]


def sigmoid(z: Array) -> F64:
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-z.astype(np.float64)))


def swiglu(gate: Array, up: Array) -> F64:
    return silu(gate.astype(np.float64)) * up.astype(np.float64)


def dropout_bits(seed: int, index: Array) -> npt.NDArray[np.uint64]:
    """The contract's 32 random bits of each index, with integers of 64 bits that are cut by hand."""
    mask = np.uint64(0xFFFFFFFF)
    index = index.astype(np.uint64)
    low, high = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    x = (index & mask) ^ low
    x ^= x >> np.uint64(16)
    x = (x * np.uint64(0x7FEB352D)) & mask
    x ^= (x >> np.uint64(15)) ^ high ^ (index >> np.uint64(32))
    x = (x * np.uint64(0x846CA68B)) & mask
    return x ^ (x >> np.uint64(16))


def kept(p: float, seed: int, index: Array) -> F64:
    """What dropout multiplies the elements of these indices by: 0 or 1 / (1 - p)."""
    threshold = np.uint64(math.floor(p * 2.0**32))
    return np.where(dropout_bits(seed, index) >= threshold, 1.0 / (1.0 - p), 0.0)


def dropout(x: Array, p: float, seed: int) -> F64:
    return x.astype(np.float64) * kept(p, seed, np.arange(x.size).reshape(x.shape))


class Attention(NamedTuple):
    y: F64  # (M, H, D)
    log_sums: F64  # (M, H)
    spread: F64  # (M, H, D): the weighted |v| times how far an error of a score can spread
    scores: F64  # (M, H): 1 + the largest sum of magnitudes of a score


def causal_attention(
    q: Array, k: Array, v: Array, ranges: Ranges, scale: float, p: float = 0.0, seed: int = 0
) -> Attention:
    """Whole sequences, one after the other; zeros in the rows of none."""
    q, k, v = (each.astype(np.float64) for each in (q, k, v))
    rows, heads, _ = q.shape
    y, log_sums = np.zeros(q.shape), np.zeros((rows, heads))
    spread, scores = np.zeros(q.shape), np.zeros((rows, heads))
    for begin, count in ranges:
        own = slice(begin, begin + count)
        for head in range(heads):
            part = _weights(q, k, own, head, scale, p, seed)
            value = v[own, head // (heads // k.shape[1])]
            y[own, head] = (part.weights * part.factors) @ value
            log_sums[own, head] = part.log_sums
            scores[own, head] = part.magnitude
            spread[own, head] = part.magnitude[:, None] * ((part.weights * part.factors) @ np.abs(value))
    return Attention(y, log_sums, spread, scores)


class _Weights(NamedTuple):
    weights: F64  # (T, T), before dropout
    factors: F64  # (T, T), of dropout
    log_sums: F64  # (T)
    magnitude: F64  # (T)


def _weights(q: F64, k: F64, own: slice, head: int, scale: float, p: float, seed: int) -> _Weights:
    heads = q.shape[1]
    query, key = q[own, head], k[own, head // (heads // k.shape[1])]
    count = len(query)
    seen = np.tril(np.ones((count, count), bool))
    scores = np.where(seen, scale * (query @ key.T), -np.inf)
    top = scores.max(axis=1, keepdims=True, initial=-np.inf)
    powers = np.exp(scores - top) if count else scores
    total = powers.sum(axis=1, keepdims=True)
    index = ((own.start + np.arange(count)) * heads + head)[:, None] * 2**20 + np.arange(count)[None, :]
    factors = kept(p, seed, index) if p > 0 else np.ones((count, count))
    magnitude = 1 + np.where(seen, abs(scale) * (np.abs(query) @ np.abs(key).T), 0.0).max(axis=1, initial=0.0)
    return _Weights(powers / total, factors, (top + np.log(total))[:, 0], magnitude)


class AttentionGradients(NamedTuple):
    d_q: F64
    d_k: F64
    d_v: F64


def causal_attention_gradients(
    q: Array, k: Array, v: Array, d_y: Array, ranges: Ranges, scale: float, p: float = 0.0, seed: int = 0
) -> AttentionGradients:
    """By the formulas of the operation, in float64."""
    q, k, v, d_y = (each.astype(np.float64) for each in (q, k, v, d_y))
    group = q.shape[1] // k.shape[1]
    found = AttentionGradients(np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape))
    for begin, count in ranges:
        own = slice(begin, begin + count)
        for head in range(q.shape[1]):
            source = head // group
            part = _weights(q, k, own, head, scale, p, seed)
            d_weights = part.factors * (d_y[own, head] @ v[own, source].T)
            d_scores = part.weights * (d_weights - (part.weights * d_weights).sum(axis=1, keepdims=True))
            found.d_q[own, head] += scale * d_scores @ k[own, source]
            found.d_k[own, source] += scale * d_scores.T @ q[own, head]
            found.d_v[own, source] += (part.weights * part.factors).T @ d_y[own, head]
    return found


class AttentionBounds(NamedTuple):
    d_q: F64
    d_k: F64
    d_v: F64


def causal_attention_bounds(
    q: Array, k: Array, v: Array, d_y: Array, ranges: Ranges, scale: float, p: float = 0.0, seed: int = 0
) -> AttentionBounds:
    """The sums of magnitudes that go into each gradient, times how far an error of a score can spread."""
    q, k, v, d_y = (each.astype(np.float64) for each in (q, k, v, d_y))
    heads, kv_heads = q.shape[1], k.shape[1]
    bounds = AttentionBounds(np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape))
    for begin, count in ranges:
        own = slice(begin, begin + count)
        for head in range(heads):
            source = head // (heads // kv_heads)
            part = _weights(q, k, own, head, scale, p, seed)
            weights = part.weights * part.magnitude[:, None]
            d_weights = part.factors * (np.abs(d_y[own, head]) @ np.abs(v[own, source]).T)
            # |delta| <= sum_d |d_y| |y| <= |d_y| (the weighted |v|)
            delta = (part.weights * d_weights).sum(axis=1, keepdims=True)
            d_scores = abs(scale) * weights * (d_weights + delta)
            bounds.d_q[own, head] += d_scores @ np.abs(k[own, source])
            bounds.d_k[own, source] += d_scores.T @ np.abs(q[own, head])
            bounds.d_v[own, source] += (weights * part.factors).T @ np.abs(d_y[own, head])
    return bounds


def adam_step(
    parameter: F64,
    gradient: F64,
    first: F64,
    second: F64,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    gradient_scale: float = 1.0,
) -> tuple[F64, F64, F64]:
    """Algorithm 2 of Loshchilov & Hutter; the new parameter and moments."""
    gradient = gradient_scale * gradient + (0.0 if decoupled else weight_decay) * parameter
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient**2
    mean, variance = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
    decay = lr * weight_decay * parameter if decoupled else 0.0
    return parameter - decay - lr * mean / (np.sqrt(variance) + eps), first, second


def sgd_step(
    parameter: F64,
    gradient: F64,
    velocity: F64,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    gradient_scale: float = 1.0,
) -> tuple[F64, F64]:
    """The new parameter and velocity."""
    gradient = gradient_scale * gradient + weight_decay * parameter
    velocity = momentum * velocity + gradient
    direction = gradient + momentum * velocity if nesterov else velocity
    return parameter - lr * direction, velocity
