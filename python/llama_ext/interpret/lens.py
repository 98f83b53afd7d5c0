"""The logit lens: what a model would say next if it ended after each of its layers.

Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
"""

from __future__ import annotations

import html
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from llama_ext._arrays import FloatArray, IntArray
from llama_ext._options import whole
from llama_ext._plots import new_figure
from llama_ext.errors import NumericError, OptionError
from llama_ext.interpret.cache import run_with_cache
from llama_ext.interpret.observed import read_text
from llama_ext.interpret.pages import in_notebook, label, page, shown_text, whole_text, write_page
from llama_ext.interpret.token_texts import pieces
from llama_ext.runtime.progress import ProgressBar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["LogitLens", "logit_lens"]

F64 = npt.NDArray[np.float64]
# Rows whose probabilities are in memory at once, in float64; as many as the core reads out at once, so that a GPU takes the same kernels.
_ROWS = 128
# And rows that the arithmetic of one layer goes through at once.
_FEW = 4
# Positions that str() and pictures have room for.
_SHOWN = 6
_DRAWN = 32
_CELL = 13
# Tokens of each position that are kept, and that `top` tells, when nobody says how many.
_KEPT, _TOLD = 10, 5

_STYLE = """
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 2px; }
th { font-weight: 500; color: var(--faint); text-align: left; padding: 0 .4rem; position: sticky; left: 0; background: var(--ground); }
td { padding: .1rem .4rem; border-radius: 3px; min-width: 3rem; max-width: 9rem; overflow: hidden; text-overflow: ellipsis; }
td.same { outline: 1px solid var(--mark); outline-offset: -1px; }
"""


@dataclass(frozen=True, repr=False, eq=False)
class LogitLens:
    """What the model would say next after each layer, at each position.

    It can be pickled, and copied, without the model; `logits` is then an error, and everything else stays.

    Attributes:
        text: What the tokens say together.
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

    text: str
    tokens: list[str]
    token_ids: IntArray
    final: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    entropy: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]
    top_ids: npt.NDArray[np.int64]
    top_probabilities: npt.NDArray[np.float64]
    top_tokens: dict[int, str]
    _model: LlamaForCausalLM | None = field(repr=False)
    _states: FloatArray = field(repr=False)

    def logits(self, layer: int) -> FloatArray:
        """The logits of a layer, computed anew; those of the last have the bits of the model's own.

        They are of the states that were kept and the final norm and head as they are now: after training, or a write to these weights,
        no longer those that `rank`, `kl` and the others are of.

        Args:
            layer: Its number; a negative one counts from the last.

        Returns:
            (T, V) float32.

        Raises:
            OptionError: There is no such layer; or the lens was pickled or copied, and has no model.
        """
        layers = len(self._states)
        states = self._states[whole("layer", layer, -layers, layers - 1)]
        if self._model is None:
            raise OptionError(
                "LogitLens.logits needs the model, which a pickle or a copy does not hold: call logit_lens(model, text) again"
            )
        return self._model._core.read_out(states)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_model": None}

    def top(self, k: int | None = None) -> list[list[list[tuple[str, float]]]]:
        """The most likely next tokens.

        Args:
            k: How many, at most as many as `logit_lens` kept; None: 5, or all that it kept where these are fewer.

        Returns:
            For each layer, for each position, k pairs of a token and its probability.

        Raises:
            OptionError: k is out of range.
        """
        kept = self.top_ids.shape[-1]
        k = min(_TOLD, kept) if k is None else whole("k", k, 1, kept)  # logit_lens(model, text, k=...) keeps more
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
        return f"LogitLens of {count} tokens ({label(self.text)!r}), {layers} layers"

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
        return page(f"Logit lens: {label(self.text)}", body, _STYLE)

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


def logit_lens(model: LlamaForCausalLM, text: object, k: int | None = None) -> LogitLens:
    """Applies the model's final norm and head to the residual stream after each layer.

    Args:
        model: Its active adapter, if there is one, applies.
        text: A text, a list of token ids or an array (T).
        k: How many of the most likely tokens to keep, in [1, V]; None: 10, or V where there are fewer.

    Returns:
        Ranks, entropies, divergences and the most likely tokens, with views: `str()`, `to_html`, `plot`, and itself in a notebook.

    Raises:
        OptionError: k is out of range.
        NumericError: A logit of a layer is not finite.
        UnsupportedError, ShapeError, ContextLengthError, TokenIdError, OutOfMemoryError: As `LlamaForCausalLM.run_with_cache`.
    """
    read = read_text(model, text)
    vocabulary = model.config.vocab_size
    number = min(_KEPT, vocabulary) if k is None else whole("k", k, 1, vocabulary)
    _, cache = run_with_cache(model, read.ids, "blocks.*.hook_resid_post")
    states = cache.stack("hook_resid_post")
    layers, count = states.shape[:2]
    final = cache.logits.argmax(axis=-1)
    rank = np.empty((layers, count), np.int64)
    entropy, kl = np.empty((layers, count)), np.empty((layers, count))
    top_ids, shares = np.empty((layers, count, number), np.int64), np.empty((layers, count, number))
    with ProgressBar("Reading layers", layers * count, "rows") as bar:
        for begin in range(0, count, _ROWS):
            rows = slice(begin, begin + _ROWS)
            last: _Figures | None = None
            for layer in reversed(range(layers)):  # the last one first: all others are compared with it
                logits = model._core.read_out(states[layer, rows])
                if not np.isfinite(logits).all():
                    raise NumericError(
                        f"logit_lens: a logit of layer {layer} is not finite: its states are beyond float32"
                    )
                best = logits[np.arange(len(logits)), final[rows]]
                rank[layer, rows] = np.count_nonzero(logits > best[:, None], axis=1)
                top_ids[layer, rows] = ids = _largest(logits, number)
                found = _figures(logits, ids, None if last is None else last.all)
                last = last or found
                entropy[layer, rows], shares[layer, rows] = found.entropy, found.top
                # Sums of the same numbers in the same order: the last layer's is 0, and no other's below it but by rounding.
                kl[layer, rows] = np.maximum(last.cross - found.cross, 0)
                bar.advance(len(logits))
    every = np.unique(top_ids).tolist()
    names = dict(zip(every, pieces(model.tokenizer, every), strict=True))
    written = whole_text(model.tokenizer, read.ids.tolist())
    return LogitLens(
        written, read.tokens, read.ids, final, rank, entropy, kl, top_ids, shares, names, _model=model, _states=states
    )


class _Figures(NamedTuple):
    """What there is to say of rows of logits.

    Attributes:
        all: (R, V): the probabilities of the last layer.
        cross: (R): the sum of these times this layer's log-probabilities.
        entropy: (R): in nats.
        top: (R, k): the probabilities of the tokens that were asked for.
    """

    all: F64
    cross: F64
    entropy: F64
    top: F64


def _figures(logits: FloatArray, ids: npt.NDArray[np.int64], last: F64 | None) -> _Figures:
    """In float64, a few rows at a time, which stay in the processor's cache; exp, which costs the most, is taken once.

    Args:
        logits: (R, V).
        ids: (R, k), of the tokens whose probabilities are wanted.
        last: The probabilities (R, V) of the last layer; None: this is the last layer.
    """
    probabilities = np.empty(logits.shape) if last is None else last
    cross, entropy, top = np.empty(len(logits)), np.empty(len(logits)), np.empty(ids.shape)
    for begin in range(0, len(logits), _FEW):
        rows = slice(begin, begin + _FEW)
        shifted = logits[rows].astype(np.float64)
        shifted -= shifted.max(axis=-1, keepdims=True)
        powers = np.exp(shifted)
        total = powers.sum(axis=-1)
        if last is None:
            np.divide(powers, total[:, None], out=probabilities[rows])
        entropy[rows] = np.log(total) - np.einsum("rv,rv->r", powers, shifted) / total
        cross[rows] = np.einsum("rv,rv->r", probabilities[rows], shifted) - np.log(total)
        top[rows] = np.take_along_axis(powers, ids[rows], 1) / total[:, None]
    return _Figures(probabilities, cross, entropy, top)


def _largest(logits: FloatArray, k: int) -> npt.NDArray[np.int64]:
    """The ids of the k largest of each row, the largest first, lower ids first among equals, as argmax has it."""
    count, vocabulary = logits.shape
    least = np.partition(logits, vocabulary - k, axis=-1)[:, vocabulary - k]
    # More than k of a row where several are equal to the least.
    rows, ids = np.divmod(np.flatnonzero(logits >= least[:, None]), vocabulary)
    order = np.lexsort((ids, -logits[rows, ids], rows))
    first = np.searchsorted(rows, np.arange(count))
    found: npt.NDArray[np.int64] = ids[order[first[:, None] + np.arange(k)]]
    return found


def _cell(text: str, width: int = _CELL) -> str:
    return (text if len(text) <= width else text[: width - 1] + "\u2026").ljust(width)
