"""Attributions to look at: HTML and figures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llama_ext._plots import new_figure
from llama_ext.interpret.pages import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure", "fragment", "quoted"]

F64 = npt.NDArray[np.float64]
# Blue for, orange against: told apart also without red and green.
_FOR, _AGAINST = (31, 119, 220), (230, 110, 0)
# Text keeps the page's colour, light or dark, so what lies behind it must not hide it.
_STRONGEST = 0.6
_MOST_BARS = 80
_LINE_END = "\u23ce"
# Of the page, where there is one: a notebook has its own.
_TEXT = "white-space:pre-wrap;line-height:1.9;overflow-wrap:anywhere;margin:.25rem 0 .75rem;color:var(--ink,inherit)"


def fragment(heading: str, notes: Sequence[str], parts: Sequence[tuple[str, float, list[int]]]) -> str:
    """A text with colours behind it.

    Args:
        heading, notes: Plain text; a heading may be empty.
        parts: Text, score and token ids of what is coloured as one.
    """
    largest = max((abs(score) for _, score, _ in parts), default=0.0) or 1.0
    spans = "".join(_span(text, score, ids, largest) for text, score, ids in parts)
    title = f"<div><b>{html.escape(heading)}</b></div>" if heading else ""
    small = "".join(f'<div style="font-size:85%;opacity:.8">{html.escape(note)}</div>' for note in notes)
    return (
        f'<div class="llama-ext-attribution">{title}{small}'
        f'<div class="text" style="{_TEXT}">{spans}</div>'
        f'<div style="font-size:85%">{_legend(largest)}</div></div>'
    )


def _span(text: str, score: float, ids: list[int], largest: float) -> str:
    title = f"{score:+.4g} ({'token' if len(ids) == 1 else 'tokens'} {', '.join(map(str, ids))})"
    seen = html.escape(_visible(text, _LINE_END + "\n"))
    return f'<span title="{html.escape(title)}" style="background:{_colour(score / largest)};border-radius:3px">{seen}</span>'


def _visible(text: str, end: str) -> str:
    """Characters that a browser would swallow, act on or not draw, as escapes; `end` in the place of a line's end."""
    return end.join(visible(line) for line in text.split("\n"))


def quoted(text: str) -> str:
    """A token on one line, in quotes."""
    return f"'{_visible(text, _LINE_END)}'"


def _colour(share: float) -> str:
    red, green, blue = _FOR if share >= 0 else _AGAINST
    return f"rgba({red},{green},{blue},{_STRONGEST * min(abs(share), 1.0):.3f})"


def _legend(largest: float) -> str:
    steps = "".join(
        f'<span style="background:{_colour(share)};padding:0 .6em">&nbsp;</span>' for share in (-1, -0.5, 0, 0.5, 1)
    )
    return f"against {-largest:+.3g} {steps} {largest:+.3g} for"


def figure(heading: str, tokens: Sequence[str], scores: F64) -> Figure:
    """A bar for each token, or for those that count most where there are many.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    listed = sorted(np.argsort(-np.abs(scores), kind="stable")[:_MOST_BARS].tolist())
    drawing = new_figure("Attribution.plot", (8, max(2.0, 0.22 * len(listed) + 1.2)))
    axes = drawing.subplots()
    colours = [tuple(part / 255 for part in (_FOR if scores[index] >= 0 else _AGAINST)) for index in listed]
    places = range(len(listed))
    axes.barh(places, scores[listed], color=colours)
    # A dollar would begin a formula.
    axes.set_yticks(places, [quoted(tokens[index]).replace("$", r"\$") for index in listed])
    axes.invert_yaxis()
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_xlabel("score in nats")
    left = len(scores) - len(listed)
    named = heading + (f", the {len(listed)} of {len(scores)} tokens that count most" if left else "")
    axes.set_title(named.replace("$", r"\$"), fontsize=10)
    axes.margins(y=0.01)
    return drawing
