"""Small models with random weights and awkward sizes, built on the core directly: one for each backend."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from llama_ext import _core

# Chosen so that no dimension is a multiple of a panel, and so that the operations are big enough for several threads to share
# (a decode step's included, with its keys in three or four tiles of 128).
CONFIG: dict[str, Any] = {
    "vocabulary": 501,
    "width": 100,
    "ffn_width": 301,
    "layers": 2,
    "heads": 12,
    "kv_heads": 2,
    "head_dim": 34,
    "context": 450,
    "norm_eps": 1e-5,
    "tied_head": False,
    "attention_bias": True,
    "ffn_bias": True,
    "rope": {"theta": 10000.0},
}


def build(
    backend: _core.Backend,
    dtype: str = "float32",
    compute: str = "auto",
    group: int = 0,
    types: dict[str, tuple[str, int]] | None = None,
    packed: dict[str, Any] | None = None,
    **changes: Any,
) -> _core.Model:
    """A model of CONFIG with `changes`; the same weights for every backend. types: by slot, instead of one for all."""
    model = _core.Model(backend, {**CONFIG, **changes}, types or {"": (dtype, group)}, packed or {}, compute)
    rng = np.random.default_rng(11)
    for name, shape, is_matrix in model.slots():
        values = rng.standard_normal(shape, np.float32)
        if is_matrix:
            values *= 1.0 if name == "embedding" else shape[-1] ** -0.5
        elif name.endswith("norm"):
            values = 1 + values / 10
        if not is_matrix or packed is None:
            model.load(name, values, "float32")
    return model


@functools.cache
def cached(isa: str, threads: int, dtype: str, compute: str = "auto", group: int = 0) -> _core.Model:
    return build(_core.Backend("cpu", threads, isa), dtype, compute, group)


def tokens(length: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, CONFIG["vocabulary"], length).astype(np.int32)


def repeating(model: _core.Model, period: int) -> _core.Model:
    """`model`, changed so that token t is nearly always followed by the next one of its `period` neighbours, cyclically: a text
    that repeats itself at the cost of one that does not.
    """
    rng = np.random.default_rng(5)
    vocabulary, width = next(shape for name, shape, _ in model.slots() if name == "embedding")
    embedding = rng.standard_normal((vocabulary, width), np.float32)
    head = np.zeros_like(embedding)
    for token in range(vocabulary):
        first = token // period * period
        head[first + (token + 1 - first) % min(period, vocabulary - first)] = embedding[token]
    for name, shape, _ in model.slots():
        if name == "embedding":
            model.load(name, embedding, "float32")
        elif name == "head":
            model.load(name, head, "float32")
        elif name.endswith((".o", ".down", ".o.bias", ".down.bias")):
            model.load(name, rng.standard_normal(shape, np.float32) * np.float32(1e-3), "float32")
    return model
