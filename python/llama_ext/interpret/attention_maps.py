"""Who looks at whom: the patterns of attention of a text."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from llama_ext._arrays import FloatArray, IntArray, as_whole
from llama_ext._options import shown
from llama_ext._plots import new_figure
from llama_ext.errors import LimitError, OptionError
from llama_ext.interpret.attention_page import attention_page
from llama_ext.interpret.cache import require_memory
from llama_ext.interpret.observed import observe, read_text
from llama_ext.interpret.pages import in_notebook, label, shown_text, whole_text, write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["AttentionMaps", "attention"]

# What a browser still opens without trouble.
_PAGE_BYTES = 64 << 20
# Tokens whose names still have room at the side of a map.
_NAMED = 48


@dataclass(frozen=True, repr=False, eq=False)
class AttentionMaps:
    """The patterns of attention of a text.

    Attributes:
        patterns: (L, H, T, T) float32: layer, head, the token that looks, the token that is looked at. Rows sum to 1; what comes later
            is 0.
        tokens: The T tokens as a person reads them.
        token_ids: (T) int32.
        layers: The number of each of the L layers.
        text: What the tokens say together; empty: the tokens one after the other.
    """

    patterns: FloatArray
    tokens: list[str]
    token_ids: IntArray = field(repr=False)
    layers: list[int] = field(default_factory=list)
    text: str = field(default="", repr=False)

    def __repr__(self) -> str:
        layers, heads, tokens, _ = self.patterns.shape
        return f"AttentionMaps of {tokens} tokens ({label(self.text or self.tokens)!r}), {layers} layers, {heads} heads"

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page for a browser: one file, which loads nothing else.

        Args:
            path: The file; one that is there is replaced.

        Raises:
            LimitError: It would have more than 64 MiB: choose layers, or a shorter text.
            OSError: It cannot be written.
        """
        write_page(path, self._page())

    def _repr_html_(self) -> str:
        return in_notebook(self._page())

    def _page(self) -> str:
        layers, heads, tokens, _ = self.patterns.shape
        nbytes = layers * heads * tokens * (tokens + 1) * 4 // 3  # two bytes for each, in base64
        if nbytes > _PAGE_BYTES:
            raise LimitError(
                f"a page of {layers} layers, {heads} heads and {tokens} tokens would have {nbytes >> 20} MiB, at most "
                f"{_PAGE_BYTES >> 20} are written: choose layers, attention(model, text, layers=[0, 1]), or a shorter text"
            )
        return attention_page(self.patterns, self.layers, self.tokens, self.text)

    def plot(self, layer: int | None = None, head: int | None = None) -> Figure:
        """Draws patterns, by matplotlib (extra `plot`).

        Args:
            layer: The number of a layer; None: all.
            head: Of a head; None: all.

        Returns:
            A figure of one map with its tokens, or of one small map for each head; it is shown by a notebook, and saved by `savefig`.

        Raises:
            OptionError: There is no such layer or head.
            UnsupportedError: matplotlib is not installed.
        """
        rows = self._chosen("layer", layer, self.layers)
        columns = self._chosen("head", head, list(range(self.patterns.shape[1])))
        if layer is not None and head is not None:
            return self._plot_one(rows[0], columns[0])
        places = [(row, column) for row in rows for column in columns]
        across = len(columns) if layer is None and head is None else math.ceil(math.sqrt(len(places)))
        down = math.ceil(len(places) / across)
        figure = new_figure("AttentionMaps.plot", (1.1 * across + 0.6, 1.25 * down + 0.7))
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, (row, column) in zip(grid, places, strict=False):
            self._image(axes, row, column)
            axes.set_title(f"{self.layers[row]}.{column}", fontsize=7, pad=2)
        figure.suptitle("Attention, layer.head: rows look at columns", fontsize=9)
        return figure

    def _plot_one(self, row: int, column: int) -> Figure:
        count = len(self.tokens)
        size = min(12.0, max(3.5, 0.28 * count + 1.8))
        figure = new_figure("AttentionMaps.plot", (size + 0.8, size))
        axes = figure.subplots()
        figure.colorbar(self._image(axes, row, column), ax=axes, shrink=0.8)
        if count <= _NAMED:
            names = [shown_text(token) for token in self.tokens]
            axes.set_xticks(range(count), names, rotation=90, parse_math=False, fontsize=8)
            axes.set_yticks(range(count), names, parse_math=False, fontsize=8)
        axes.set_xlabel("looks at")
        axes.set_ylabel("token")
        axes.set_title(f"Attention of layer {self.layers[row]}, head {column}", fontsize=10)
        return figure

    def _image(self, axes: Axes, row: int, column: int) -> AxesImage:
        return axes.imshow(self.patterns[row, column], vmin=0, vmax=1, cmap="Blues", interpolation="nearest")

    def _chosen(self, what: str, number: int | None, there: list[int]) -> list[int]:
        if number is None:
            return list(range(len(there)))
        found = as_whole(number)
        if found is None or found not in there:
            first, last = there[0], there[-1]
            whole_range = there == list(range(first, last + 1))
            are = f"{first} to {last}" if whole_range else ", ".join(map(str, there))
            raise OptionError(f"{what} must be one of {are}, got {shown(number)}")
        return [there.index(found)]


def attention(model: LlamaForCausalLM, text: object, layers: Sequence[int] | None = None) -> AttentionMaps:
    """The patterns of attention of a text.

    Args:
        model: Its active adapter, if there is one, applies.
        text: A text, a list of token ids or an array (T).
        layers: Their numbers, in any order; None: all.

    Returns:
        Patterns with views: `to_html`, `plot`, and itself in a notebook.

    Raises:
        OptionError: There is no such layer, or one is named twice.
        UnsupportedError, ShapeError, ContextLengthError, TokenIdError, OutOfMemoryError: As `LlamaForCausalLM.run_with_cache`.
    """
    read = read_text(model, text)
    numbers = _numbers(layers, model.config.num_hidden_layers)
    names = {f"blocks.{layer}.attn.hook_pattern": row for row, layer in enumerate(numbers)}
    count = read.ids.size
    require_memory(model, list(names), count, "attention")
    patterns = np.empty((len(numbers), model.config.num_attention_heads, count, count), np.float32)

    def keep(name: str, value: FloatArray) -> None:
        patterns[names[name]] = value  # at once: a cache of them all and a stack of that would be twice the memory

    observe(model, read.ids, names, keep)
    return AttentionMaps(patterns, read.tokens, read.ids, numbers, text=whole_text(model.tokenizer, read.ids.tolist()))


def _numbers(layers: object, count: int) -> list[int]:
    """The layers that are meant, in the model's order.

    Raises:
        OptionError: They are not different numbers of layers.
    """
    if layers is None:
        return list(range(count))
    try:
        given = [as_whole(layer) for layer in layers]  # type: ignore[attr-defined]
    except TypeError:
        given = []
    numbers = sorted(layer for layer in set(given) if layer is not None and 0 <= layer < count)
    if not numbers or len(numbers) < len(given):
        raise OptionError(f"layers must be different numbers from 0 to {count - 1}, got {shown(layers)}")
    return numbers
