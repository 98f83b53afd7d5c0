"""Looking inside a model: what it computes, by TransformerLens' names, and what happens when that is changed."""

from __future__ import annotations

from llama_ext.interpret.attention_maps import AttentionMaps, attention
from llama_ext.interpret.cache import ActivationCache, ResidualStack
from llama_ext.interpret.hooks import run_with_hooks
from llama_ext.interpret.lens import LogitLens, logit_lens
from llama_ext.interpret.names import hook_names, match_names
from llama_ext.interpret.patching import Patching, patch

__all__ = [
    "ActivationCache",
    "AttentionMaps",
    "LogitLens",
    "Patching",
    "ResidualStack",
    "attention",
    "hook_names",
    "logit_lens",
    "match_names",
    "patch",
    "run_with_hooks",
]
