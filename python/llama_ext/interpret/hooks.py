"""Functions that look at what a pass computes, and change it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ext._arrays import FloatArray
from llama_ext.errors import DTypeError, NumericError, OptionError, ShapeError
from llama_ext.interpret.names import layer_of, match_names
from llama_ext.interpret.observed import observe, read_text

if TYPE_CHECKING:
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["Hook", "run_with_hooks"]

# (value, name) -> what takes its place, or None: the value, as the function left it.
Hook = Callable[[FloatArray, str], FloatArray | None]

# What norms read.
_RESIDUALS = frozenset({"hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post"})


def run_with_hooks(model: LlamaForCausalLM, text: object, hooks: Mapping[Any, Hook]) -> FloatArray:
    """Runs the model on a text while functions look at what it computes, and change it.

    A function is called with a value, a fresh array that is its own to write to, and the value's name. Whether it changed something is
    decided by comparing bits: an array that it wrote to and an array that it returned count alike, and one that has the same bits
    is no change. Where nothing is changed, logits have the bits of an ordinary pass; whatever is computed from a changed value follows.

    Args:
        model: Its active adapter, if there is one, applies.
        text: A text, a list of token ids or an array (T).
        hooks: Functions by name, pattern (`"blocks.*.attn.hook_z"`), function of a name or tuple of these; see `hook_names`. Where several
            fit a name, they are called in their order here, each with what the one before left.

    Returns:
        Logits (T, V) float32.

    Raises:
        OptionError: A name that the model does not have, a pattern that fits none, or something that is no function.
        ShapeError, DTypeError: A function returned another shape, or something else than an array of float32.
        NumericError: A function left a NaN or an infinity (only scores of attention may be -inf, which attends to nothing), or a
            logit is not finite.
        UnsupportedError, ContextLengthError, TokenIdError, OutOfMemoryError: As `LlamaForCausalLM.run_with_cache`.
        Whatever a function raises.

    Source: the hooks of TransformerLens, Nanda & Bloom, 2022.
    """
    if not isinstance(hooks, Mapping):
        raise OptionError(f"hooks must be a mapping of names to functions, got {type(hooks).__name__}")
    read = read_text(model, text)
    by_name: dict[str, list[Hook]] = {}
    for names, hook in hooks.items():
        if not callable(hook):
            raise OptionError(f"hooks[{names!r}] must be a function (value, name), got {type(hook).__name__}")
        for name in match_names(model.config, names, "hooks"):
            by_name.setdefault(name, []).append(hook)

    def see(name: str, value: FloatArray) -> FloatArray | None:
        left = value
        for hook in by_name[name]:
            own = left.copy()
            returned = hook(own, name)
            left = own if returned is None else _checked(returned, value.shape, name)
        if np.array_equal(left.view(np.uint32), value.view(np.uint32)):
            return None
        _require_finite(left, name)
        return left

    return observe(model, read.ids, by_name, see)


def _checked(returned: object, shape: tuple[int, ...], name: str) -> FloatArray:
    """What a function returned, as a contiguous array."""
    if not isinstance(returned, np.ndarray):
        raise DTypeError(
            f"the hook of {name} must return None or a float32 array of shape {shape}, got {type(returned).__name__}"
        )
    if returned.dtype != np.float32:
        raise DTypeError(f"the hook of {name} must return float32, got {returned.dtype}: .astype(np.float32)")
    if returned.shape != shape:
        raise ShapeError(f"the hook of {name} must return shape {shape}, got {returned.shape}")
    return np.ascontiguousarray(returned)


def _require_finite(value: FloatArray, name: str) -> None:
    bad = ~np.isfinite(value)
    if layer_of(name)[1] == "attn.hook_attn_scores":
        bad &= value != -np.inf
    if name.rpartition(".")[2] in _RESIDUALS:
        # A norm squares them in float32: beyond it, it would give zeros, and nobody would know.
        bad |= (np.square(value.astype(np.float64)).sum(axis=-1, keepdims=True) > np.finfo(np.float32).max) & (
            value != 0
        )
    if bad.any():
        place = tuple(int(axis[0]) for axis in np.nonzero(bad))
        raise NumericError(
            f"the hook of {name} left {value[place]} at {list(place)}: values must be finite, and so must the squares of what a norm reads"
        )
