"""Looking inside a model: what it computes, by TransformerLens' names, what happens when that is changed, and how much each token counts."""

from __future__ import annotations

from llama_ext.interpret.attention_maps import AttentionMaps, attention
from llama_ext.interpret.attribution import Attribution, attribute
from llama_ext.interpret.cache import ActivationCache, ResidualStack
from llama_ext.interpret.hooks import run_with_hooks
from llama_ext.interpret.lens import LogitLens, logit_lens
from llama_ext.interpret.measures import Faithfulness, Measure, faithfulness
from llama_ext.interpret.names import hook_names, match_names
from llama_ext.interpret.patching import Patching, patch
from llama_ext.interpret.questions import Target
from llama_ext.interpret.token_texts import Word

__all__ = [
    "ActivationCache",
    "AttentionMaps",
    "Attribution",
    "Faithfulness",
    "LogitLens",
    "Measure",
    "Patching",
    "ResidualStack",
    "Target",
    "Word",
    "attention",
    "attribute",
    "faithfulness",
    "hook_names",
    "logit_lens",
    "match_names",
    "patch",
    "run_with_hooks",
]
