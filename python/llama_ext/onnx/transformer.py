"""A Llama as a graph: the same sequence of operations as csrc/model/transformer.cpp, each from its component.

A language model takes input_ids, attention_mask, position_ids and the keys and values before this run, and gives logits and the
keys and values after it. A classifier takes input_ids and attention_mask, and gives the scores of its labels.
"""

from __future__ import annotations

from llama_ext.models.config import LlamaConfig
from llama_ext.onnx.components.attention import Cache, Mask, attention, attention_mask, is_grouped
from llama_ext.onnx.components.embedding import embedding
from llama_ext.onnx.components.feed_forward import feed_forward
from llama_ext.onnx.components.head import head, score
from llama_ext.onnx.components.linear import vector
from llama_ext.onnx.components.rms_norm import add_rms_norm, rms_norm
from llama_ext.onnx.components.rope import RopeCache, rope_cache
from llama_ext.onnx.graph import Graph, Value
from llama_ext.onnx.weights import Weights

__all__ = ["transformer"]

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


def transformer(g: Graph, weights: Weights) -> None:
    """Builds the graph of a model.

    Args:
        g: An empty graph.
        weights: The model.
    """
    config = weights.config
    if weights.labels is None:
        _language_model(g, config, weights)
    else:
        _classifier(g, config, weights, weights.labels)


def _language_model(g: Graph, config: LlamaConfig, weights: Weights) -> None:
    input_ids = g.input("input_ids", "int64", [BATCH, SEQUENCE])
    mask = g.input("attention_mask", "int64", [BATCH, TOTAL])
    position_ids = g.input("position_ids", "int64", [BATCH, SEQUENCE])
    g.output("logits", "float32", [BATCH, SEQUENCE, config.vocab_size])
    caches = [_cache(g, config, layer) for layer in range(config.num_hidden_layers)]
    visible = attention_mask(g, input_ids, mask, grouped=is_grouped(g.profile, config))
    x = _blocks(g, config, weights, input_ids, visible, position_ids, caches)
    head(g, x, weights)


def _classifier(g: Graph, config: LlamaConfig, weights: Weights, labels: int) -> None:
    input_ids = g.input("input_ids", "int64", [BATCH, SEQUENCE])
    mask = g.input("attention_mask", "int64", [BATCH, SEQUENCE])
    g.output("logits", "float32", [BATCH, labels])
    with g.scope("position_ids"):
        # A token's position is the number of tokens before it, padding left out.
        before = g.op("Sub", g.op("CumSum", mask, g.constant(1)), g.constant(1))
        position_ids = g.op("Max", before, g.constant(0))
    caches = [Cache()] * config.num_hidden_layers
    visible = attention_mask(g, input_ids, mask, grouped=False)
    x = _blocks(g, config, weights, input_ids, visible, position_ids, caches)
    score(g, x, input_ids, mask, weights)


def _cache(g: Graph, config: LlamaConfig, layer: int) -> Cache:
    names = []
    for kind, length, declare in (("past_key_values", PAST, g.input), ("present", TOTAL, g.output)):
        shape: list[int | str] = [BATCH, config.num_key_value_heads, length, config.head_dim]
        names += [declare(f"{kind}.{layer}.{what}", g.dtype, shape) for what in ("key", "value")]
    return Cache(*names)


def _blocks(
    g: Graph,
    config: LlamaConfig,
    weights: Weights,
    input_ids: Value,
    mask: Mask,
    position_ids: Value,
    caches: list[Cache],
) -> Value:
    """From tokens to what the head takes."""
    eps = config.rms_norm_eps
    angles: RopeCache = rope_cache(g, config, position_ids)
    x = embedding(g, input_ids, weights)
    with g.scope("layers.0"), g.scope("attention_norm"):
        h = rms_norm(g, x, vector(g, weights, "layers.0.attention_norm"), eps)
    for layer, cache in enumerate(caches):
        prefix = f"layers.{layer}."
        with g.scope(f"layers.{layer}"):
            delta = attention(g, h, config, weights, prefix, angles, mask, cache)
            with g.scope("feed_forward_norm"):
                x, h = add_rms_norm(g, x, delta, vector(g, weights, prefix + "feed_forward_norm"), eps)
            delta = feed_forward(g, h, weights, prefix)
        # The second residual of a block goes with the norm behind it: that of the next block, or the last one.
        last = layer + 1 == len(caches)
        with g.scope("final_norm" if last else f"layers.{layer + 1}/attention_norm"):
            norm = vector(g, weights, "final_norm" if last else f"layers.{layer + 1}.attention_norm")
            x, h = add_rms_norm(g, x, delta, norm, eps)
    return h
