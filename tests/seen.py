"""Passes of the core that somebody looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext import _core

__all__ = ["KINDS", "SITES", "observed_logits", "with_adapter"]

# In the order of computation; the first and the last are of no layer.
SITES = [
    "embedding",
    "residual_before",
    "attention_norm",
    "q",
    "k",
    "v",
    "rotated_q",
    "rotated_k",
    "attended",
    "attention_out",
    "residual_middle",
    "feed_forward_norm",
    "gate",
    "up",
    "activation",
    "feed_forward_out",
    "residual_after",
    "final_norm",
]
KINDS = [
    ("float32", 0, "auto", {}),
    ("bfloat16", 0, "auto", {"tied_head": True}),
    ("bfloat16", 0, "exact", {"attention_bias": False, "ffn_bias": False}),
    ("float16", 0, "auto", {}),
    ("int8", 32, "auto", {"width": 128, "ffn_width": 320}),
    ("int4", 32, "exact", {"width": 128, "ffn_width": 320}),
]


def with_adapter(core: _core.Model) -> tuple[_core.Model, _core.Model, _core.Adapter]:
    """The model, the same with gate and up as two matrices, as adapters need them, and an adapter of that."""
    apart = core.converted(core.types(), True)
    adapter = _core.Adapter(apart, {"layers.0.q": (3, 0.5), "layers.1.down": (2, 1.0), "layers.1.gate": (2, 1.0)})
    for slot, _, _ in adapter.slots():
        for which in "AB":
            values = np.random.default_rng(3).standard_normal(adapter.read(slot, which).shape, np.float32)
            adapter.write(slot, which, values / 8)
    return core, apart, adapter


def observed_logits(
    core: _core.Model,
    ids: npt.NDArray[np.int32],
    places: Sequence[tuple[str, int]],
    see: Any,
    adapter: _core.Adapter | None = None,
) -> npt.NDArray[np.float32]:
    """Logits (T, V) of a whole pass."""
    return _core.ObservedSequence(core, ids, [], adapter).run(places, see)
