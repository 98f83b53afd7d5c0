"""rope: each pair (i, i + D/2) of a head is rotated by the angle of its position and frequency."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from llama_ext import _core
from llama_ext.models.config import LlamaConfig
from llama_ext.models.llama import core_config
from llama_ext.onnx.graph import Graph, Value
from llama_ext.onnx.weights import narrowed

__all__ = ["RopeCache", "rope", "rope_cache"]

# Positions whose angles are computed at a time.
_CHUNK = 8192


@dataclasses.dataclass(frozen=True)
class RopeCache:
    """Cosines and sines.

    Args:
        cos: (positions, D/2) in the data file; of `portable`, (B, 1, S, D/2) of the tokens of this run.
        sin: The same.
        position_ids: (B, S) int64.
    """

    cos: Value
    sin: Value
    position_ids: Value


def rope_cache(g: Graph, config: LlamaConfig, position_ids: Value) -> RopeCache:
    """The angles of every position of the context, computed in float64.

    Args:
        g: The graph.
        config: The model.
        position_ids: (B, S) int64, each below the context.

    Returns:
        What `rope` takes.
    """
    shape = (config.max_position_embeddings, config.head_dim // 2)

    def source(index: int) -> Iterator[Any]:
        settings = core_config(config)["rope"]
        for first in range(0, shape[0], _CHUNK):
            positions = np.arange(first, min(first + _CHUNK, shape[0]), dtype=np.int64)
            yield narrowed(_core.rope_angles(settings, positions)[index], g.dtype)

    cos = g.weight("rope.cos_cache", g.dtype, shape, lambda: source(0))
    sin = g.weight("rope.sin_cache", g.dtype, shape, lambda: source(1))
    if not g.profile.fused:
        with g.scope("rope_cache"):
            axis = g.constant([1])
            cos = g.op("Unsqueeze", g.op("Gather", cos, position_ids, axis=0), axis)
            sin = g.op("Unsqueeze", g.op("Gather", sin, position_ids, axis=0), axis)
    return RopeCache(cos, sin, position_ids)


def rope(g: Graph, x: Value, heads: int, head_dim: int, cache: RopeCache) -> Value:
    """Rotates.

    Args:
        g: The graph.
        x: (B, S, heads * D); of `portable`, (B, heads, S, D).
        heads: How many.
        head_dim: D.
        cache: The angles.

    Returns:
        As x.
    """
    if g.profile.fused:
        return g.op("RotaryEmbedding", x, cache.cos, cache.sin, cache.position_ids, num_heads=heads)
    half = head_dim // 2
    first, second = g.ops("Split", x, g.constant([half, half]), outputs=(None, None), axis=-1)
    return g.op(
        "Concat",
        g.op("Sub", g.op("Mul", first, cache.cos), g.op("Mul", second, cache.sin)),
        g.op("Add", g.op("Mul", second, cache.cos), g.op("Mul", first, cache.sin)),
        axis=-1,
    )
