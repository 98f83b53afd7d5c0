"""attention: softmax(q k^T / sqrt(D)) v over the keys of this run and those of the cache, each query head with its group's keys.

Which key a query sees is explicit, (B, 1, S, T): the keys up to its own slot that the attention mask does not hide, and its own
in any case. So a row of padding is no row without keys, whose softmax would be a NaN and spoil what it touches.

GroupQueryAttention, of the profile `ort`, is told that every slot holds a token, and gets the mask as a bias: by itself it would
take padding on the left for tokens. It does not rotate, though it could: in a prefill it takes the positions of the first row
for all rows, and no heads whose dimension is no multiple of 16. Where it is none of 8, and without a cache, `ort` has Attention.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from llama_ext.models.config import LlamaConfig
from llama_ext.onnx.components.linear import linear, packed_linear
from llama_ext.onnx.components.rope import RopeCache, rope
from llama_ext.onnx.graph import MICROSOFT, Graph, Value
from llama_ext.onnx.profiles import Profile
from llama_ext.onnx.weights import Weights

__all__ = ["Cache", "Mask", "attention", "attention_mask", "is_grouped"]


@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of a layer: those before this run, and the names of all after it.

    Args:
        past_key, past_value: (B, K, P, D), or "" without a cache.
        present_key, present_value: Names of outputs, (B, K, T, D), or "".
    """

    past_key: Value = ""
    past_value: Value = ""
    present_key: Value = ""
    present_value: Value = ""


@dataclasses.dataclass(frozen=True)
class Mask:
    """Who sees whom, in the form that the profile takes.

    Args:
        visible: `standard`: (B, 1, S, T) bool.
        added: 0 or the least number; `portable`: (B, 1, 1, S, T), `ort`: (B, 1, S, T).
        last_key: `ort`: (B,) int32, T - 1 for each row.
        total: `ort`: () int32, T.
    """

    visible: Value = ""
    added: Value = ""
    last_key: Value = ""
    total: Value = ""


def is_grouped(profile: Profile, config: LlamaConfig) -> bool:
    """Whether a language model's attention is GroupQueryAttention, whose past and present may be one buffer."""
    return profile.contrib and config.head_dim % 8 == 0


def attention_mask(g: Graph, input_ids: Value, mask: Value, *, grouped: bool) -> Mask:
    """What all layers share.

    Args:
        g: The graph.
        input_ids: (B, S).
        mask: (B, T) int64, 1 for a token and 0 for padding, those of the cache first.
        grouped: Whether it is for GroupQueryAttention.

    Returns:
        The mask.
    """
    with g.scope("attention_mask"):
        total = g.op("Gather", g.op("Shape", mask), g.constant(1), axis=0)
        count = g.op("Gather", g.op("Shape", input_ids), g.constant(1), axis=0)
        key = g.op("Range", g.constant(0), total, g.constant(1))
        query = g.op("Range", g.op("Sub", total, count), total, g.constant(1))
        query = g.op("Unsqueeze", query, g.constant([1]))
        real = g.op("Unsqueeze", g.cast(mask, "bool"), g.constant([1, 2]))
        shown = g.op("Or", real, g.op("Equal", key, query))
        visible = g.op("And", g.op("LessOrEqual", key, query), shown)
        if g.profile.fused and not grouped:
            return Mask(visible=visible)
        least = float(np.finfo(np.float16 if g.dtype == "float16" else np.float32).min)
        added = g.op("Where", visible, g.scalar(0.0), g.scalar(least))
        if grouped:
            batch = g.op("Slice", g.op("Shape", mask), g.constant([0]), g.constant([1]))
            last = g.cast(g.op("Expand", g.op("Sub", total, g.constant(1)), batch), "int32")
            return Mask(added=added, last_key=last, total=g.cast(total, "int32"))
        return Mask(added=g.op("Unsqueeze", added, g.constant([1])))


def attention(
    g: Graph,
    x: Value,
    config: LlamaConfig,
    weights: Weights,
    prefix: str,
    rope_cache: RopeCache,
    mask: Mask,
    cache: Cache,
) -> Value:
    """The attention of a layer, with its four projections.

    Args:
        g: The graph.
        x: (B, S, C), normalised.
        config: The model.
        weights: Of the model.
        prefix: Of the layer's slots: "layers.3.".
        rope_cache: The angles.
        mask: Who sees whom.
        cache: The layer's keys and values.

    Returns:
        (B, S, C).
    """
    with g.scope("attention"):
        if mask.last_key:
            y = _grouped(g, x, config, weights, prefix, rope_cache, mask, cache)
        else:
            q, k, v = (linear(g, x, weights, prefix + name) for name in "qkv")
            if g.profile.fused:
                y = _fused(g, q, k, v, config, rope_cache, mask, cache)
            else:
                y = _decomposed(g, q, k, v, config, rope_cache, mask, cache)
        return linear(g, y, weights, prefix + "o")


def _rotated(g: Graph, q: Value, k: Value, config: LlamaConfig, cache: RopeCache) -> tuple[Value, Value]:
    with g.scope("rope"):
        return (
            rope(g, q, config.num_attention_heads, config.head_dim, cache),
            rope(g, k, config.num_key_value_heads, config.head_dim, cache),
        )


def _fused(
    g: Graph, q: Value, k: Value, v: Value, config: LlamaConfig, rope_cache: RopeCache, mask: Mask, cache: Cache
) -> Value:
    q, k = _rotated(g, q, k, config, rope_cache)
    cached = bool(cache.present_key)
    return g.ops(
        "Attention",
        *(q, k, v, mask.visible),
        *((cache.past_key, cache.past_value) if cached else ()),
        outputs=(None, cache.present_key, cache.present_value) if cached else (None,),
        q_num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        scale=1 / math.sqrt(config.head_dim),
        softmax_precision=g.element("float32"),
    )[0]


def _decomposed(
    g: Graph, q: Value, k: Value, v: Value, config: LlamaConfig, rope_cache: RopeCache, mask: Mask, cache: Cache
) -> Value:
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    group = heads // kv_heads
    with g.scope("heads"):
        q, k, v = (
            g.op("Transpose", g.reshape(each, [0, 0, count, head_dim]), perm=[0, 2, 1, 3])
            for each, count in ((q, heads), (k, kv_heads), (v, kv_heads))
        )
    q, k = _rotated(g, q, k, config, rope_cache)
    if cache.present_key:
        k = g.op("Concat", cache.past_key, k, output=cache.present_key, axis=2)
        v = g.op("Concat", cache.past_value, v, output=cache.present_value, axis=2)
    # The queries of a group, one below the other, against the group's keys: nothing is repeated.
    q = g.op("Mul", q, g.scalar(1 / math.sqrt(head_dim)))
    folded = g.reshape(q, [0, kv_heads, -1, head_dim])
    scores = g.op("MatMul", folded, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    with g.scope("softmax"):
        # (B, K, group * S, T) -> (B, K, group, S, T): S and T are the mask's.
        sizes = g.once(("scores", mask.added), lambda: _unfolded_shape(g, mask.added, kv_heads, group))
        shape = g.op("Shape", scores)
        weights = g.op("Softmax", g.op("Add", g.op("Reshape", scores, sizes), mask.added), axis=-1)
        weights = g.op("Reshape", weights, shape)
    y = g.reshape(g.op("MatMul", weights, v), [0, heads, -1, head_dim])
    return g.reshape(g.op("Transpose", y, perm=[0, 2, 1, 3]), [0, 0, heads * head_dim])


def _unfolded_shape(g: Graph, added: Value, kv_heads: int, group: int) -> Value:
    shape = g.op("Shape", added)
    batch = g.op("Slice", shape, g.constant([0]), g.constant([1]))
    rows = g.op("Slice", shape, g.constant([3]), g.constant([5]))
    return g.op("Concat", batch, g.constant([kv_heads, group]), rows, axis=0)


def _grouped(
    g: Graph,
    x: Value,
    config: LlamaConfig,
    weights: Weights,
    prefix: str,
    rope_cache: RopeCache,
    mask: Mask,
    cache: Cache,
) -> Value:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, k, v = packed_linear(g, x, weights, [prefix + name for name in "qkv"])
    q, k = _rotated(g, q, k, config, rope_cache)
    y, *_ = g.ops(
        "GroupQueryAttention",
        *(q, k, v, cache.past_key, cache.past_value, mask.last_key, mask.total, "", "", "", mask.added),
        outputs=(None, cache.present_key, cache.present_value),
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=kv_heads,
        do_rotary=0,
        scale=1 / math.sqrt(config.head_dim),
    )
    return g.declare(y, g.dtype, ["batch_size", "sequence_length", heads * config.head_dim])
