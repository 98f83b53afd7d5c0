"""A whole Llama in plain NumPy and float64, with the names of a Hugging Face checkpoint: what gradients of models are held against.

Written from the papers and transformers' conventions, without our code. Nothing is batched: a sequence is run by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import numpy_ops

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]
Weights = Mapping[str, F64]
Config = Mapping[str, Any]

IGNORED = -100


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config


def _frequencies(config: Config) -> F64:
    parameters = dict(config.get("rope_parameters") or {})
    kind = parameters.pop("rope_type", "default")
    theta = parameters.pop("rope_theta", config.get("rope_theta", 10000.0))
    rope = {"kind": kind, "head_dim": _head_dim(config), "theta": theta, **parameters}
    if "original_max_position_embeddings" in rope:
        rope["original_context"] = rope.pop("original_max_position_embeddings")
    return numpy_ops.rope_frequencies(rope)


def _head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _norm(x: F64, weight: F64, config: Config) -> F64:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config["rms_norm_eps"]) * weight


def _linear(x: F64, weights: Weights, name: str) -> F64:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _rotate(x: F64, frequencies: F64) -> F64:
    """(T, heads, D), by the angles of positions 0 .. T - 1."""
    angle = (np.arange(len(x))[:, None] * frequencies)[:, None, :]
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(x: F64, weights: Weights, layer: str, config: Config, frequencies: F64) -> F64:
    tokens, dim = len(x), _head_dim(config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q = _rotate(_linear(x, weights, f"{layer}.q_proj").reshape(tokens, heads, dim), frequencies)
    k = _rotate(_linear(x, weights, f"{layer}.k_proj").reshape(tokens, kv_heads, dim), frequencies)
    v = _linear(x, weights, f"{layer}.v_proj").reshape(tokens, kv_heads, dim)
    k, v = (np.repeat(each, heads // kv_heads, axis=1) for each in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(dim)
    scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    y = np.einsum("hij,jhd->ihd", powers / powers.sum(axis=-1, keepdims=True), v)
    return _linear(y.reshape(tokens, heads * dim), weights, f"{layer}.o_proj")


def hidden_states(weights: Weights, config: Config, tokens: Array) -> F64:
    """(T) ids of one sequence to (T, C), after the last norm."""
    frequencies = _frequencies(config)
    x = weights["model.embed_tokens.weight"][tokens]
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        normed = _norm(x, weights[f"{layer}.input_layernorm.weight"], config)
        x = x + _attention(normed, weights, f"{layer}.self_attn", config, frequencies)
        normed = _norm(x, weights[f"{layer}.post_attention_layernorm.weight"], config)
        gate = _linear(normed, weights, f"{layer}.mlp.gate_proj")
        up = _linear(normed, weights, f"{layer}.mlp.up_proj")
        x = x + _linear(numpy_ops.silu(gate) * up, weights, f"{layer}.mlp.down_proj")
    return _norm(x, weights["model.norm.weight"], config)


def logits(weights: Weights, config: Config, tokens: Array) -> F64:
    """(T) ids of one sequence to (T, V)."""
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return hidden_states(weights, config, tokens) @ head.T


def loss(weights: Weights, config: Config, tokens: Array, labels: Array, lengths: Array) -> float:
    """The mean loss over all counted labels of all sequences.

    Args:
        weights: Float64 arrays by their Hugging Face names; without "lm_head.weight" the embedding is the head as well.
        config: What config.json says.
        tokens: The ids of all sequences, one after the other, without padding.
        labels: The shape of `tokens`: what each row should predict, or IGNORED. Not shifted here.
        lengths: How many tokens each sequence has.
    """
    assert tokens.shape == labels.shape == (sum(lengths),)
    total, counted, begin = 0.0, 0, 0
    for length in lengths:
        own = slice(begin, begin + length)
        begin += length
        if length == 0:
            continue
        total += float(numpy_ops.cross_entropy(logits(weights, config, tokens[own]), labels[own]).sum())
        counted += int((labels[own] != IGNORED).sum())
    return total / counted


def shifted(labels: Array) -> Array:
    """(B, T) labels that lie at their own tokens, as transformers takes them, to what each row predicts."""
    return np.concatenate([labels[:, 1:], np.full((len(labels), 1), IGNORED, labels.dtype)], axis=1)
