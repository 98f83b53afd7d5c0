"""What a pass computed, by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llama_ext import _core
from llama_ext._arrays import FloatArray, IntArray, as_whole
from llama_ext._options import shown
from llama_ext.errors import OptionError, OutOfMemoryError
from llama_ext.interpret.names import Names, match_names, shape_of
from llama_ext.interpret.observed import observe, read_text

if TYPE_CHECKING:
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["ActivationCache", "ResidualStack", "require_memory", "run_with_cache"]


class ResidualStack(NamedTuple):
    """The residual stream through the layers.

    Attributes:
        values: (N, T, C) float32.
        labels: The name of each of the N.
    """

    values: FloatArray
    labels: list[str]

    # Arrays have no single answer to ==, so it asks whether both are the same object; a tuple has its own != as well.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return id(self)


class ActivationCache(Mapping[str, FloatArray]):
    """What a pass computed: a mapping from names to arrays, in the order of computation.

    `cache["blocks.0.attn.hook_z"]` is also `cache["z", 0]` and `cache["z", 0, "attn"]`, as in TransformerLens; a negative layer counts from
    the last one. Two caches are equal where they are the same object.

    Attributes:
        token_ids: (T) int32.
        tokens: Each as a person reads it.
        logits: (T, V) float32.
    """

    def __init__(
        self,
        values: Mapping[str, FloatArray],
        *,
        layers: int,
        token_ids: IntArray,
        tokens: list[str],
        logits: FloatArray,
    ) -> None:
        self._values = dict(values)
        self._layers = layers
        self.token_ids = token_ids
        self.tokens = tokens
        self.logits = logits

    def __getitem__(self, name: str | tuple[str, int] | tuple[str, int, str]) -> FloatArray:
        key = self._full_name(name) if isinstance(name, tuple) else name
        if not isinstance(key, str):
            raise KeyError(f"a name, or a name and a layer, was expected, got {shown(name)}")
        if key not in self._values:
            near = difflib.get_close_matches(key, self._values, 3, cutoff=0.3)
            raise KeyError(f"{shown(key)} was not kept" + (f"; near: {', '.join(near)}" if near else ""))
        return self._values[key]

    def __eq__(self, other: object) -> bool:
        return self is other  # a mapping's would compare arrays, which have no single answer

    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        size = self.nbytes / 2**20
        lines = [f"ActivationCache of {len(self.tokens)} tokens, {len(self)} values, {size:.1f} MiB"]
        shown = list(self.items())
        if len(shown) > _SHOWN:
            shown = shown[:_SHOWN]
        lines += [f"  {name}  {'x'.join(map(str, value.shape))}" for name, value in shown]
        if len(self) > len(shown):
            lines.append(f"  ... and {len(self) - len(shown)} more")
        return "\n".join(lines)

    @property
    def nbytes(self) -> int:
        """Memory of the values."""
        return sum(value.nbytes for value in self._values.values())

    def stack(self, name: str) -> FloatArray:
        """One value of every layer.

        Args:
            name: Without "blocks.{i}." and, if you like, "hook_": "attn.hook_pattern", "pattern", "ln1.hook_scale".

        Returns:
            (layers, ...) float32, a copy.

        Raises:
            KeyError: It was not kept of every layer.
        """
        return np.stack([self[name, layer] for layer in range(self._layers)])

    def residual_stack(self, *, middle: bool = True) -> ResidualStack:
        """The residual stream before, within and after the layers, one on the other.

        Args:
            middle: Whether to have also what each layer leaves between attention and feed-forward.

        Returns:
            `hook_resid_pre` (and `hook_resid_mid`) of every layer and `hook_resid_post` of the last, a copy.

        Raises:
            OptionError: One of them was not kept.
        """
        points = ("hook_resid_pre", "hook_resid_mid") if middle else ("hook_resid_pre",)
        labels = [f"blocks.{layer}.{point}" for layer in range(self._layers) for point in points]
        labels.append(f"blocks.{self._layers - 1}.hook_resid_post")
        missing = [name for name in labels if name not in self._values]
        if missing:
            raise OptionError(
                f"residual_stack needs {len(labels)} values, and {missing[0]!r} was not kept: "
                "run_with_cache(text, 'blocks.*.hook_resid_*') keeps them all"
            )
        return ResidualStack(np.stack([self._values[name] for name in labels]), labels)

    def _full_name(self, short: tuple[object, ...]) -> str:
        """Of ("z", 0), ("attn.hook_z", 0) or ("z", 0, "attn")."""
        name, layer, part = (*short, None)[:3] if len(short) in (2, 3) else (None, None, None)
        number = as_whole(layer)
        if not isinstance(name, str) or number is None or not isinstance(part, str | None):
            raise KeyError(f"a name, a layer's number and, if you like, a part of it were expected, got {shown(short)}")
        prefix = f"blocks.{number + self._layers if number < 0 else number}."
        rest = name if "hook_" in name else f"hook_{name}"
        if part is not None:
            return f"{prefix}{part}.{rest}"
        found = [each for each in self._values if each.startswith(prefix) and each.endswith(f".{rest}")]
        if len(found) != 1:
            which = "is in two norms: say ln1.hook_scale or the like" if found else "was not kept"
            raise KeyError(f"{name!r} of layer {number} {which}")
        return found[0]


# Values that a cache's repr names.
_SHOWN = 24


def run_with_cache(model: LlamaForCausalLM, text: object, names: Names = None) -> tuple[FloatArray, ActivationCache]:
    """The body of `LlamaForCausalLM.run_with_cache`."""
    read = read_text(model, text)
    chosen = match_names(model.config, names)
    require_memory(model, chosen, read.ids.size, "run_with_cache")
    values: dict[str, FloatArray] = {}

    def keep(name: str, value: FloatArray) -> None:
        values[name] = value

    logits = observe(model, read.ids, chosen, keep)
    ordered = {name: values[name] for name in chosen}
    layers = model.config.num_hidden_layers
    return logits, ActivationCache(ordered, layers=layers, token_ids=read.ids, tokens=read.tokens, logits=logits)


def require_memory(model: LlamaForCausalLM, names: list[str], tokens: int, what: str) -> None:
    """Asked before the first is made: each of them alone might still seem to fit.

    Args:
        model, names, tokens: What is to be kept.
        what: Who asks, for the message.

    Raises:
        OutOfMemoryError: All together are more than the machine can give.
    """
    needed = {name: 4 * math.prod(shape_of(model.config, name, tokens)) for name in names}
    total, available = sum(needed.values()), _core.available_memory()
    if total > available:
        largest = max(needed, key=lambda name: needed[name])
        fewer = "layers" if what == "attention" else "names, for example names='blocks.*.hook_resid_post'"
        raise OutOfMemoryError(
            f"{what}: {len(names)} values of {tokens} tokens take {total} bytes, and {available} are available. Choose fewer {fewer}, "
            f"or take a shorter text; the largest is {largest} of {needed[largest]}"
        )
