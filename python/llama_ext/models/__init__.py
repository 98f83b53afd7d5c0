"""Architectures: what a checkpoint's config means and what its tensors are called.

A sibling with the same arithmetic is one module with the functions of `llama_ext.models.llama`, and a line here.
"""

from __future__ import annotations

from types import ModuleType

from llama_ext.models import llama

__all__ = ["ARCHITECTURES"]

# By `model_type` of config.json.
ARCHITECTURES: dict[str, ModuleType] = {"llama": llama}
