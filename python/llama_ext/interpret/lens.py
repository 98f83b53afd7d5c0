"""The logit lens: what a model would say next if it ended after each of its layers.

Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
"""

from __future__ import annotations

import html
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llama_ext._arrays import FloatArray, IntArray
from llama_ext._options import whole
from llama_ext._plots import new_figure
from llama_ext.errors import NumericError
from llama_ext.interpret.cache import run_with_cache
from llama_ext.interpret.pages import in_notebook, label, page, shown_text, write_page
from llama_ext.interpret.token_texts import pieces
from llama_ext.runtime.progress import ProgressBar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["LogitLens", "logit_lens"]

# Rows whose probabilities are in memory at once, in float64.
_ROWS = 64
# Positions that str() and pictures have room for.
_SHOWN = 6
_DRAWN = 32
_CELL = 13

_STYLE = """
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 2px; }
th { font-weight: 500; color: var(--faint); text-align: left; padding: 0 .4rem; position: sticky; left: 0; background: var(--ground); }
td { padding: .1rem .4rem; border-radius: 3px; min-width: 3rem; max-width: 9rem; overflow: hidden; text-overflow: ellipsis; }
td.same { outline: 1px solid var(--mark); outline-offset: -1px; }
"""


@dataclass(frozen=True, repr=False)
class LogitLens:
    """What the model would say next after each layer, at each position.

    Attributes:
        tokens: The T tokens of the text as a person reads them.
        token_ids: (T) int32.
        final: (T): the id that the whole model finds the most likely next.
        rank: (L, T): how many tokens each layer finds more likely than that; 0 is the first.
        entropy: (L, T) float64: of each layer's distribution, in nats.
        kl: (L, T) float64: the Kullback-Leibler divergence of each layer's distribution from the last one's, KL(last || layer), in nats;
            0 for the last layer.
        top_ids: (L, T, k): the most likely tokens, the first one first.
        top_probabilities: (L, T, k) float64.
        top_tokens: The text of every id in `top_ids`.
    """

    tokens: list[str]
    token_ids: IntArray
    final: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    entropy: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]
    top_ids: npt.NDArray[np.int64]
    top_probabilities: npt.NDArray[np.float64]
    top_tokens: dict[int, str]
    _model: LlamaForCausalLM = field(repr=False)
    _states: FloatArray = field(repr=False)

    def logits(self, layer: int) -> FloatArray:
        """The logits of a layer, computed anew; those of the last have the bits of the model's own.

        Args:
            layer: Its number; a negative one counts from the last.

        Returns:
            (T, V) float32.

        Raises:
            OptionError: There is no such layer.
        """
        layers = len(self._states)
        return self._model._core.read_out(self._states[whole("layer", layer, -layers, layers - 1)])

    def top(self, k: int = 5) -> list[list[list[tuple[str, float]]]]:
        """The most likely next tokens.

        Args:
            k: How many, at most as many as `logit_lens` was asked for.

        Returns:
            For each layer, for each position, k pairs of a token and its probability.

        Raises:
            OptionError: k is out of range.
        """
        kept = self.top_ids.shape[-1]
        k = whole("k", k, 1, kept)  # logit_lens(model, text, k=...) keeps more
        return [
            [
                [(self.top_tokens[int(token)], float(share)) for token, share in zip(ids[:k], shares[:k], strict=True)]
                for ids, shares in zip(all_ids, all_shares, strict=True)
            ]
            for all_ids, all_shares in zip(self.top_ids, self.top_probabilities, strict=True)
        ]

    def __str__(self) -> str:
        layers, count = self.rank.shape
        first = max(0, count - _SHOWN)
        lines = [
            f"Logit lens of {count} tokens, {layers} layers: the most likely next token and its probability"
            + (f", at the last {count - first} positions" if first else ""),
            "layer  " + "  ".join(_cell(shown_text(token)) for token in self.tokens[first:]),
        ]
        best = self.top(1)
        for layer in range(layers):
            cells = [f"{_cell(shown_text(cell[0][0]), _CELL - 5)} {cell[0][1]:.2f}" for cell in best[layer][first:]]
            lines.append(f"{layer:5}  " + "  ".join(cells))
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        layers, count = self.rank.shape
        return f"LogitLens of {count} tokens ({label(self.tokens)!r}), {layers} layers"

    def _repr_html_(self) -> str:
        return in_notebook(self._page())

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a table for a browser: one file, which loads nothing else. Pointing at a cell shows more of it.

        Args:
            path: The file; one that is there is replaced.

        Raises:
            OSError: It cannot be written.
        """
        write_page(path, self._page())

    def _page(self) -> str:
        layers = len(self.rank)
        rows = []
        best = self.top(self.top_ids.shape[-1])
        for layer in reversed(range(layers)):
            cells = "".join(self._html_cell(layer, place, ranked) for place, ranked in enumerate(best[layer]))
            rows.append(f"<tr><th>layer {layer}</th>{cells}</tr>")
        names = "".join(f'<td class="token">{html.escape(shown_text(token))}</td>' for token in self.tokens)
        body = (
            "<p>What the model would say next if it ended after each layer, the last one at the top; deeper colour is more probable, and a "
            "frame marks what the whole model says. Point at a cell for more.</p>\n"
            f'<div class="scroll"><table>\n{chr(10).join(rows)}\n<tr><th>text</th>{names}</tr>\n</table></div>'
        )
        return page(f"Logit lens: {label(self.tokens)}", body, _STYLE)

    def _html_cell(self, layer: int, place: int, ranked: list[tuple[str, float]]) -> str:
        lines = [f"{shown_text(token)}  {share:.4f}" for token, share in ranked]
        lines.append(
            f"rank of the final token {self.rank[layer, place]}, entropy {self.entropy[layer, place]:.3f} nats, "
            f"KL from the last layer {self.kl[layer, place]:.3f} nats"
        )
        frame = " same" if self.rank[layer, place] == 0 else ""
        share = 70 * ranked[0][1]
        return (
            f'<td class="token{frame}" title="{html.escape(chr(10).join(lines), quote=True)}" '
            f'style="background: color-mix(in srgb, var(--accent) {share:.1f}%, var(--ground))">'
            f"{html.escape(shown_text(ranked[0][0]))}</td>"
        )

    def plot(self) -> Figure:
        """Draws the most likely token of each layer at the last positions, coloured by its probability, by matplotlib (extra `plot`).

        Returns:
            A figure: it is shown by a notebook, and saved by `savefig`.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        layers, count = self.rank.shape
        first = max(0, count - _DRAWN)
        figure = new_figure("LogitLens.plot", (min(20.0, 0.75 * (count - first) + 2), 0.32 * layers + 1.6))
        axes = figure.subplots()
        shares = self.top_probabilities[:, first:, 0]
        image = axes.imshow(
            shares, vmin=0, vmax=1, cmap="Blues", origin="lower", aspect="auto", interpolation="nearest"
        )
        for layer, cells in enumerate(self.top(1)):
            for place, ((token, share),) in enumerate(cells[first:]):
                colour = "white" if share > 0.6 else "black"
                text = shown_text(token)[:8]
                axes.text(place, layer, text, ha="center", va="center", fontsize=7, color=colour, parse_math=False)
        names = [shown_text(token) for token in self.tokens[first:]]
        axes.set_xticks(range(count - first), names, rotation=60, parse_math=False, fontsize=8)
        axes.set_yticks(range(layers))
        axes.set_xlabel("after this token")
        axes.set_ylabel("layer")
        axes.set_title("Logit lens: the most likely next token", fontsize=10)
        figure.colorbar(image, ax=axes, label="probability")
        return figure


def logit_lens(model: LlamaForCausalLM, text: object, k: int = 10) -> LogitLens:
    """Applies the model's final norm and head to the residual stream after each layer.

    Args:
        model: Its active adapter, if there is one, applies.
        text: A text, a list of token ids or an array (T).
        k: How many of the most likely tokens to keep, in [1, V].

    Returns:
        Ranks, entropies, divergences and the most likely tokens, with views: `str()`, `to_html`, `plot`, and itself in a notebook.

    Raises:
        OptionError: k is out of range.
        NumericError: A logit of a layer is not finite.
        UnsupportedError, ShapeError, ContextLengthError, TokenIdError, OutOfMemoryError: As `LlamaForCausalLM.run_with_cache`.
    """
    number = whole("k", k, 1, model.config.vocab_size)
    _, cache = run_with_cache(model, text, "blocks.*.hook_resid_post")
    states = cache.stack("hook_resid_post")
    layers, count = states.shape[:2]
    final = cache.logits.argmax(axis=-1)
    rank = np.empty((layers, count), np.int64)
    entropy, kl = np.empty((layers, count)), np.empty((layers, count))
    top_ids, shares = np.empty((layers, count, number), np.int64), np.empty((layers, count, number))
    with ProgressBar("Reading layers", layers * count, "rows") as bar:
        for layer in range(layers):
            for begin in range(0, count, _ROWS):
                rows = slice(begin, begin + _ROWS)
                logits = model._core.read_out(states[layer, rows])
                if not np.isfinite(logits).all():
                    raise NumericError(
                        f"logit_lens: a logit of layer {layer} is not finite: its states are beyond float32"
                    )
                logs, last = _log_softmax(logits), _log_softmax(cache.logits[rows])
                rank[layer, rows] = (logits > np.take_along_axis(logits, final[rows, None], 1)).sum(axis=1)
                entropy[layer, rows] = -(np.exp(logs) * logs).sum(axis=1)
                kl[layer, rows] = (np.exp(last) * (last - logs)).sum(axis=1)
                top_ids[layer, rows] = _largest(logits, number)
                shares[layer, rows] = np.exp(np.take_along_axis(logs, top_ids[layer, rows], 1))
                bar.advance(len(logits))
    every = np.unique(top_ids).tolist()
    names = dict(zip(every, pieces(model.tokenizer, every), strict=True))
    return LogitLens(
        cache.tokens, cache.token_ids, final, rank, entropy, kl, top_ids, shares, names, _model=model, _states=states
    )


def _log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs


def _largest(logits: FloatArray, k: int) -> npt.NDArray[np.int64]:
    """The ids of the k largest of each row, the largest first, lower ids first among equals."""
    ids = np.sort(np.argpartition(-logits, k - 1, axis=-1)[:, :k], axis=-1)
    order = np.argsort(-np.take_along_axis(logits, ids, 1), axis=-1, kind="stable")
    # The first is the model's own choice, which among equals is the lowest id of all.
    found = np.take_along_axis(ids, order, 1)
    best = logits.argmax(axis=-1)
    for row in np.flatnonzero(found[:, 0] != best):
        rest = [token for token in found[row] if token != best[row]]
        found[row] = [best[row], *rest][:k]
    return found


def _cell(text: str, width: int = _CELL) -> str:
    return (text if len(text) <= width else text[: width - 1] + "\u2026").ljust(width)
