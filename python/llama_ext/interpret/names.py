"""The names of what a pass computes, as TransformerLens has them, and how callers choose among them.

Source: Nanda & Bloom, TransformerLens (github.com/TransformerLensOrg/TransformerLens), its hook points.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable

from llama_ext.errors import OptionError
from llama_ext.models.config import LlamaConfig

__all__ = ["Names", "attention_of", "hook_names", "layer_of", "match_names", "norm_of", "shape_of", "site_of"]

# A name, a pattern ("blocks.*.attn.hook_z"), a function that says yes to a name, several of these, or None for all.
Names = str | Callable[[str], bool] | Iterable[str] | None

# What the core shows of a layer (csrc/model/observer.h), by name.
_SITES = {
    "hook_resid_pre": "residual_before",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_rot_q": "rotated_q",
    "attn.hook_rot_k": "rotated_k",
    "attn.hook_z": "attended",
    "hook_attn_out": "attention_out",
    "hook_resid_mid": "residual_middle",
    "mlp.hook_pre": "gate",
    "mlp.hook_pre_linear": "up",
    "mlp.hook_post": "activation",
    "hook_mlp_out": "feed_forward_out",
    "hook_resid_post": "residual_after",
}
# What a layer computes, in that order.
_BLOCK = (
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
_QUERY_HEADS = {"attn.hook_q", "attn.hook_rot_q", "attn.hook_z"}
_KEY_HEADS = {"attn.hook_k", "attn.hook_v", "attn.hook_rot_k"}
_SQUARES = {"attn.hook_attn_scores", "attn.hook_pattern"}
_NORMS = ("hook_scale", "hook_normalized")
_GLOB = frozenset("*?[")
# Names of a message.
_FEW = 3


def hook_names(config: LlamaConfig) -> list[str]:
    """Every name of a model, in the order of computation.

    Args:
        config: The model's.

    Returns:
        "hook_embed"; for each layer i "blocks.{i}." and what a layer computes; "ln_final.hook_scale", "ln_final.hook_normalized".

    Raises:
        OptionError: It is no LlamaConfig.
    """
    if not isinstance(config, LlamaConfig):
        raise OptionError(f"config must be a LlamaConfig, got {type(config).__name__}: a model's is model.config")
    blocks = [f"blocks.{layer}.{name}" for layer in range(config.num_hidden_layers) for name in _BLOCK]
    return ["hook_embed", *blocks, *(f"ln_final.{name}" for name in _NORMS)]


def match_names(config: LlamaConfig, names: Names, what: str = "names") -> list[str]:
    """The names that are meant, each once, in the order of computation.

    Args:
        config: The model's.
        names: A name; a pattern with *, ? or [], where * crosses dots; a function that is called with every name; a list of names and
            patterns; None for all.
        what: Who asks, for messages.

    Returns:
        At least one.

    Raises:
        OptionError: config is no LlamaConfig; a name that the model does not have, a pattern or a function that fits none, or something else.
    """
    every = hook_names(config)
    if names is None:
        return every
    if callable(names):
        chosen = {name for name in every if names(name)}
        if not chosen:
            raise OptionError(f"{what}: the function says yes to none of {len(every)} names, the first is {every[0]!r}")
    else:
        wanted = [names] if isinstance(names, str) else names
        if not isinstance(wanted, Iterable):
            raise OptionError(f"{what} must be a name, a pattern, a function or a list, got {type(names).__name__}")
        chosen = {name for each in wanted for name in _matching(every, each, what)}
        if not chosen:
            raise OptionError(f"{what} is empty: name at least one, for example {every[1]!r}, or None for all")
    return [name for name in every if name in chosen]


def _matching(every: list[str], wanted: object, what: str) -> list[str]:
    if not isinstance(wanted, str):
        raise OptionError(f"{what} must hold names and patterns, got {type(wanted).__name__}")
    if wanted in every:
        return [wanted]
    found = fnmatch.filter(every, wanted) if _GLOB & set(wanted) else []
    if not found:
        near = difflib.get_close_matches(wanted, every, _FEW, cutoff=0.3) or every[:_FEW]
        kind = "the pattern fits no name" if _GLOB & set(wanted) else "there is no such name"
        raise OptionError(
            f"{what}: {wanted!r}: {kind} of this model. Near: {', '.join(near)}; "
            "llama_ext.interpret.hook_names(model.config) lists all"
        )
    return found


def layer_of(name: str) -> tuple[int, str]:
    """A name as its layer and the rest: ("blocks.3.attn.hook_z") -> (3, "attn.hook_z"); what belongs to no layer is in layer 0."""
    if not name.startswith("blocks."):
        return 0, name
    _, layer, rest = name.split(".", 2)
    return int(layer), rest


def site_of(name: str) -> tuple[str, int] | None:
    """Where the core shows a value; None: it is computed here, from others."""
    layer, rest = layer_of(name)
    site = "embedding" if rest == "hook_embed" else _SITES.get(rest)
    return None if site is None else (site, layer)


def norm_of(name: str) -> str | None:
    """The norm that a name belongs to, "blocks.0.ln1" or "ln_final"; None: to none."""
    head, _, tail = name.rpartition(".")
    return head if tail in _NORMS else None


def attention_of(name: str) -> int | None:
    """The layer whose scores or pattern a name is; None: neither."""
    layer, rest = layer_of(name)
    return layer if rest in _SQUARES else None


def shape_of(config: LlamaConfig, name: str, tokens: int) -> tuple[int, ...]:
    """The shape of a value.

    Args:
        config: The model's.
        name: Of a value.
        tokens: T.

    Returns:
        (T, C), (T, F), (T, 1), (T, heads, D) or (H, T, T).
    """
    rest = layer_of(name)[1]
    if rest in _QUERY_HEADS:
        return tokens, config.num_attention_heads, config.head_dim
    if rest in _KEY_HEADS:
        return tokens, config.num_key_value_heads, config.head_dim
    if rest in _SQUARES:
        return config.num_attention_heads, tokens, tokens
    if rest.endswith("hook_scale"):
        return tokens, 1
    return tokens, config.intermediate_size if rest.startswith("mlp.") else config.hidden_size
