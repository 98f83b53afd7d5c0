"""Looking inside a model: what it computes, by TransformerLens' names, and what happens when that is changed."""

from __future__ import annotations

from llama_ext.interpret.cache import ActivationCache, ResidualStack
from llama_ext.interpret.hooks import run_with_hooks
from llama_ext.interpret.names import hook_names, match_names

__all__ = ["ActivationCache", "ResidualStack", "hook_names", "match_names", "run_with_hooks"]
