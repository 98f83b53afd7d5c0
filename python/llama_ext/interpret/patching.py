"""Activation patching: what of a clean run, put into a corrupted one, brings the answer back.

Source: Meng et al., "Locating and Editing Factual Associations in GPT", 2022; Wang et al., "Interpretability in the Wild", 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llama_ext._arrays import FloatArray, token_ids
from llama_ext._plots import new_figure
from llama_ext.errors import NumericError, OptionError, ShapeError
from llama_ext.interpret.cache import run_with_cache
from llama_ext.interpret.names import Names, layer_of, match_names, shape_of
from llama_ext.interpret.observed import observe, read_text
from llama_ext.interpret.pages import label, shown_text
from llama_ext.runtime.progress import ProgressBar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["Patching", "patch"]

Metric = Callable[[FloatArray], float]
# An answer: a text of one token, or its id.
Answer = str | int


@dataclass(frozen=True, repr=False)
class Patching:
    """How much of the clean run's answer each patch brings back.

    Attributes:
        recovery: (names), (names, T), (names, heads) or (names, T, heads) float64: 0 is what the corrupted run gives, 1 the clean one.
            It may be below 0 or above 1.
        names: What was patched.
        clean: What the metric is of the clean run.
        corrupted: And of the corrupted one.
        clean_tokens, corrupted_tokens: The T tokens of each, as a person reads them.
        positions, heads: Whether positions, and heads, were patched one by one.
    """

    recovery: npt.NDArray[np.float64]
    names: list[str]
    clean: float
    corrupted: float
    clean_tokens: list[str]
    corrupted_tokens: list[str]
    positions: bool
    heads: bool

    def __repr__(self) -> str:
        return (
            f"Patching of {label(self.corrupted_tokens)!r} with {label(self.clean_tokens)!r}: recovery of shape "
            f"{self.recovery.shape}, metric {self.corrupted:.4g} corrupted, {self.clean:.4g} clean"
        )

    def __str__(self) -> str:
        lines = [repr(self)]
        order = np.argsort(-self.recovery, axis=None, kind="stable")[:_LISTED]
        for flat in order:
            name, *rest = np.unravel_index(flat, self.recovery.shape)
            where = [self.names[int(name)]]
            if self.positions:
                where.append(f"token {rest[0]} {shown_text(self.corrupted_tokens[int(rest[0])])!r}")
            if self.heads:
                where.append(f"head {rest[-1]}")
            lines.append(f"  {self.recovery.flat[flat]:8.3f}  {', '.join(where)}")
        return "\n".join(lines)

    def plot(self, name: str | None = None) -> Figure:
        """Draws the table, by matplotlib (extra `plot`): blue brings the clean answer back, red takes it further away.

        Args:
            name: Of a value: its own table of positions and heads. Needed where both were patched one by one, and only there.

        Returns:
            A figure: it is shown by a notebook, and saved by `savefig`.

        Raises:
            OptionError: No name where there must be one, one where there is none, or one that was not patched.
            UnsupportedError: matplotlib is not installed.
        """
        if (name is not None) != (self.recovery.ndim == 3):
            raise OptionError(
                f"plot: a table of shape {self.recovery.shape} is drawn "
                + ("one name at a time: plot(name=...)" if name is None else "whole: plot()")
            )
        if name is not None and name not in self.names:
            raise OptionError(f"plot: {name!r} was not patched; patched were {', '.join(self.names[:3])}, ...")
        table = self.recovery if name is None else self.recovery[self.names.index(name)].T
        rows = self.names if name is None else [f"head {head}" for head in range(len(table))]
        table = table[:, None] if table.ndim == 1 else table
        across = self.positions
        count = table.shape[1]
        figure = new_figure("Patching.plot", (min(20.0, 0.4 * count + 4.5), min(30.0, 0.24 * len(rows) + 2)))
        axes = figure.subplots()
        largest = max(1.0, float(np.abs(table).max()))
        image = axes.imshow(table, vmin=-largest, vmax=largest, cmap="RdBu", aspect="auto", interpolation="nearest")
        columns = (
            [shown_text(token) for token in self.corrupted_tokens] if across else [str(head) for head in range(count)]
        )
        if across or self.heads:
            axes.set_xticks(range(count), columns, rotation=60 if across else 0, parse_math=False, fontsize=8)
            axes.set_xlabel("position" if across else "head")
        else:
            axes.set_xticks([])
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_title("Patching" if name is None else f"Patching {name}", fontsize=10)
        figure.colorbar(image, ax=axes, label="recovery")
        return figure


# Rows of str().
_LISTED = 10


def patch(
    model: LlamaForCausalLM,
    clean: object,
    corrupted: object,
    names: Names = "blocks.*.hook_resid_pre",
    *,
    positions: bool = False,
    heads: bool = False,
    answers: tuple[Answer, Answer] | None = None,
    metric: Metric | None = None,
) -> Patching:
    """Runs the corrupted text once for each patch: a value, a position or a head of it, as it was in the clean run.

    Args:
        model: Its active adapter, if there is one, applies.
        clean: A text, a list of token ids or an array (T): where the model gives the right answer.
        corrupted: Another with as many tokens, where it does not.
        names: Which values to patch, as in `run_with_cache`.
        positions: Whether to patch each position by itself: tokens, or for scores and patterns of attention the token that looks.
        heads: Whether to patch each head by itself; for values of heads alone (q, k, v, z, scores, patterns).
        answers: The right and the wrong next token, texts of one token each or ids: the metric is the difference of their logits at the
            last position. None: the most likely one after each text.
        metric: Instead, a function of logits (T, V) that gives a finite number.

    Returns:
        The table of recoveries: (metric - corrupted) / (clean - corrupted).

    Raises:
        ShapeError: The texts have different numbers of tokens.
        OptionError: Names that are none, of no heads, or of different numbers of them; answers that are not one token each, or the same;
            answers and a metric; a metric that is the same of both texts.
        NumericError: A metric is not finite.
        UnsupportedError, ContextLengthError, TokenIdError, OutOfMemoryError: As `LlamaForCausalLM.run_with_cache`.
    """
    right, wrong = read_text(model, clean, "the clean text"), read_text(model, corrupted, "the corrupted text")
    count = right.ids.size
    if count != wrong.ids.size:
        raise ShapeError(
            f"patch needs texts of equally many tokens, got {count} clean ({' '.join(map(repr, right.tokens[:12]))}) and "
            f"{wrong.ids.size} corrupted ({' '.join(map(repr, wrong.tokens[:12]))}): change words for others that are as long in tokens"
        )
    if answers is not None and metric is not None:
        raise OptionError("patch takes answers or a metric of your own, not both")
    chosen = match_names(model.config, names)
    several = _heads(model, chosen, count) if heads else 1
    clean_logits, cache = run_with_cache(model, right.ids, chosen)
    corrupted_logits = observe(model, wrong.ids, [], lambda name, value: None)
    measure = metric if metric is not None else _difference(model, answers, clean_logits, corrupted_logits)
    best, worst = _measured(measure, clean_logits), _measured(measure, corrupted_logits)
    if best == worst:
        raise OptionError(
            f"patch: the metric is {best:.6g} of both texts, so there is nothing to recover: choose texts that the model answers differently"
        )
    shape = (len(chosen), *((count,) if positions else ()), *((several,) if heads else ()))
    recovery = np.empty(shape)
    with ProgressBar("Patching", recovery.size, "runs") as bar:
        for index in np.ndindex(shape):
            name, *rest = index
            place = _place(chosen[name], rest, positions=positions, heads=heads)

            def see(of: str, value: FloatArray, place: tuple[int | slice, ...] = place) -> FloatArray | None:
                there = cache[of][place]
                if value[place].tobytes() == there.tobytes():
                    return None
                patched = value.copy()
                patched[place] = there
                return patched

            logits = observe(model, wrong.ids, [chosen[name]], see)
            recovery[index] = (_measured(measure, logits) - worst) / (best - worst)
            bar.advance(1)
    return Patching(recovery, chosen, best, worst, right.tokens, wrong.tokens, positions, heads)


def _is_square(name: str) -> bool:
    return layer_of(name)[1].endswith(("attn_scores", "hook_pattern"))


def _place(name: str, rest: Sequence[int], *, positions: bool, heads: bool) -> tuple[int | slice, ...]:
    """What of a value is patched, as an index."""
    token: int | slice = rest[0] if positions else slice(None)
    head: int | slice = rest[-1] if heads else slice(None)
    if _is_square(name):
        return head, token
    return (token, head) if heads else (token,)


def _heads(model: LlamaForCausalLM, names: list[str], count: int) -> int:
    """How many heads all of these have."""
    found: dict[str, int] = {}
    for name in names:
        shape = shape_of(model.config, name, count)
        if len(shape) != 3:
            raise OptionError(
                f"patch(heads=True) is for values of heads (q, k, v, z, scores, patterns), and {name} has none"
            )
        found[name] = shape[0] if _is_square(name) else shape[1]
    if len(set(found.values())) > 1:
        first, second = min(found, key=lambda name: found[name]), max(found, key=lambda name: found[name])
        raise OptionError(
            f"patch(heads=True): {first} has {found[first]} heads and {second} has {found[second]}: patch them in two calls"
        )
    return next(iter(found.values()))


def _difference(model: LlamaForCausalLM, answers: object, clean: FloatArray, corrupted: FloatArray) -> Metric:
    """The logit of the right answer less that of the wrong one."""
    if answers is None:
        right, wrong = int(clean[-1].argmax()), int(corrupted[-1].argmax())
        if right == wrong:
            raise OptionError(
                f"patch: the most likely next token is {right} after both texts: give the right and the wrong one, answers=(..., ...)"
            )
    else:
        if not isinstance(answers, (tuple, list)) or len(answers) != 2:
            raise OptionError(f"answers must be two, the right one and the wrong one, got {answers!r}")
        right, wrong = (_answer(model, answer) for answer in answers)
        if right == wrong:
            raise OptionError(f"answers must be two different tokens, both are {right}")

    def difference(logits: FloatArray) -> float:
        return float(logits[-1, right]) - float(logits[-1, wrong])

    return difference


def _answer(model: LlamaForCausalLM, answer: object) -> int:
    if not isinstance(answer, str):
        return int(token_ids("answers", [answer], model.config.vocab_size)[0])
    if model.tokenizer is None:
        raise OptionError("this model has no tokenizer: give answers as token ids")
    ids = model.tokenizer.encode(answer, add_special_tokens=False)
    if len(ids) != 1:
        raise OptionError(
            f"the answer {answer!r} is {len(ids)} tokens: give one token, for example with its leading space, or an id"
        )
    return int(ids[0])


def _measured(metric: Metric, logits: FloatArray) -> float:
    value = float(metric(logits))
    if not math.isfinite(value):
        raise NumericError(f"patch: the metric gave {value}, it must be a finite number")
    return value
