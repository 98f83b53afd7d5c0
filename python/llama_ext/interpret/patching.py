"""Activation patching: what of a clean run, put into a corrupted one, brings the answer back.

Source: Meng et al., "Locating and Editing Factual Associations in GPT", 2022; Wang et al., "Interpretability in the Wild", 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llama_ext._arrays import FloatArray, array_by_protocol, token_ids
from llama_ext._options import shown, whole
from llama_ext._plots import new_figure
from llama_ext.errors import DTypeError, NumericError, OptionError, OutOfMemoryError, ShapeError
from llama_ext.interpret.cache import run_with_cache
from llama_ext.interpret.names import Names, layer_of, match_names, shape_of
from llama_ext.interpret.observed import ObservedText, read_text
from llama_ext.interpret.pages import label, shown_text
from llama_ext.interpret.questions import bar

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
        recovery: (names), (names, positions), (names, heads) or (names, positions, heads) float64: 0 is what the corrupted run gives, 1
            the clean one. It may be below 0 or above 1.
        names: What was patched.
        clean: What the metric is of the clean run.
        corrupted: And of the corrupted one.
        clean_tokens, corrupted_tokens: The T tokens of each, as a person reads them.
        positions: Those that were patched one by one, in the order of the table; none where all of them were at once.
        heads: Whether heads were patched one by one.
    """

    recovery: npt.NDArray[np.float64]
    names: list[str]
    clean: float
    corrupted: float
    clean_tokens: list[str]
    corrupted_tokens: list[str]
    positions: list[int]
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
                token = self.positions[int(rest[0])]
                where.append(f"token {token} {shown_text(self.corrupted_tokens[token])!r}")
            if self.heads:
                where.append(f"head {rest[-1]}")
            lines.append(f"  {self.recovery.flat[flat]:8.3f}  {', '.join(where)}")
        return "\n".join(lines)

    def plot(self, name: str | None = None) -> Figure:
        """Draws the table, by matplotlib (extra `plot`): blue brings the clean answer back, red takes it further away.

        The strongest colour is the largest magnitude of what is drawn, which the colour bar says.

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
        across = bool(self.positions)
        count = table.shape[1]
        figure = new_figure("Patching.plot", (min(20.0, 0.4 * count + 4.5), min(30.0, 0.24 * len(rows) + 2)))
        axes = figure.subplots()
        largest = float(np.abs(table).max()) or 1.0
        image = axes.imshow(table, vmin=-largest, vmax=largest, cmap="RdBu", aspect="auto", interpolation="nearest")
        columns = (
            [shown_text(self.corrupted_tokens[token]) for token in self.positions]
            if across
            else [str(head) for head in range(count)]
        )
        if across or self.heads:
            axes.set_xticks(range(count), columns, rotation=60 if across else 0, parse_math=False, fontsize=8)
            axes.set_xlabel("position" if across else "head")
        else:
            axes.set_xticks([])
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_title("Patching" if name is None else f"Patching {name}", fontsize=10)
        scale = figure.colorbar(image, ax=axes, label="recovery (1: clean)")
        # Its ends are numbers: a pale table is told from a small one.
        ticks = [largest * share for share in (-1, -0.5, 0, 0.5, 1)]
        scale.set_ticks(ticks, labels=[f"{tick:+.2g}" if tick else "0" for tick in ticks])
        return figure


# Rows of str().
_LISTED = 10


def patch(
    model: LlamaForCausalLM,
    clean: object,
    corrupted: object,
    names: Names = "blocks.*.hook_resid_pre",
    *,
    positions: bool | Sequence[int] | npt.NDArray[Any] = False,
    heads: bool = False,
    answers: Sequence[Answer] | npt.NDArray[Any] | None = None,
    metric: Metric | None = None,
    verbose: int = 1,
) -> Patching:
    """Runs the corrupted text with one patch after another: a value, a position or a head of it, as it was in the clean run.

    A run begins at the layer of its value, and on a CPU, but for scores and patterns, at the token that is patched; a token before the first
    that differs needs none.

    Args:
        model: Its active adapter, if there is one, applies.
        clean: A text, a list of token ids or an array (T): where the model gives the right answer.
        corrupted: Another with as many tokens, where it does not.
        names: Which values to patch, as in `run_with_cache`.
        positions: Whether to patch each position by itself: tokens, or for scores and patterns of attention the token that looks; or a
            list of those to patch, each by itself, where negative ones count from the last.
        heads: Whether to patch each head by itself; for values of heads alone (q, k, v, z, scores, patterns).
        answers: The right and the wrong next token, texts of one token each or ids: the metric is the difference of their logits at the
            last position. None: the most likely one after each text.
        metric: Instead, a function of logits (T, V), an array of its own, that gives a finite number.
        verbose: 0 shows no progress bar on a terminal.

    Returns:
        The table of recoveries: (metric - corrupted) / (clean - corrupted).

    Raises:
        ShapeError: The texts have different numbers of tokens.
        OptionError: Names that are none, of no heads, or of different numbers of them; answers that are not one token each, or the same;
            answers and a metric; a metric that is no function, or is the same of both texts; positions that are none of the text,
            or twice the same; heads that is no bool.
        DTypeError: A metric gives no number.
        NumericError: Or one that is not finite.
        UnsupportedError, ContextLengthError, TokenIdError, OutOfMemoryError: As `LlamaForCausalLM.run_with_cache`.
    """
    right, wrong = read_text(model, clean, "the clean text"), read_text(model, corrupted, "the corrupted text")
    count = right.ids.size
    if count != wrong.ids.size:
        raise ShapeError(
            f"patch needs texts of equally many tokens, got {count} clean ({' '.join(map(repr, right.tokens[:12]))}) and "
            f"{wrong.ids.size} corrupted ({' '.join(map(repr, wrong.tokens[:12]))}): change words for others that are as long in tokens"
        )
    if not isinstance(heads, (bool, np.bool_)):
        raise OptionError(
            f"patch: heads must be True or False, got {shown(heads)}: a value's heads are patched one by one or all at once"
        )
    tokens = _positions(positions, count)
    if metric is not None and not callable(metric):
        raise OptionError(f"patch: metric must be a function of logits (T, V), got {shown(metric)}")
    if answers is not None and metric is not None:
        raise OptionError("patch takes answers or a metric of your own, not both")
    chosen = match_names(model.config, names)
    several = _heads(model, chosen, count) if heads else 1
    clean_logits, cache = run_with_cache(model, right.ids, chosen)
    text = ObservedText(model, wrong.ids, chosen)
    corrupted_logits = text.run([], lambda name, value: None)
    measure = metric if metric is not None else _difference(model, answers, clean_logits, corrupted_logits)
    # A copy: the rows of tokens before a patch are those of the corrupted run.
    best, worst = _measured(measure, clean_logits), _measured(measure, corrupted_logits.copy())
    if best == worst:
        raise OptionError(
            f"patch: the metric is {best:.6g} of both texts, so there is nothing to recover: choose texts that the model answers differently"
        )
    recovery = np.zeros((len(chosen), *((len(tokens),) if tokens else ()), *((several,) if heads else ())))
    # Before the first token that differs a value is what it is in the clean run.
    first = int((np.cumsum(right.ids != wrong.ids) == 0).sum())
    # On a GPU the last bits hang on a pass's rows: there a pass is of one whole text.
    is_cpu = model.device == "cpu"
    most = max(1, _KEPT_BYTES // text.copy_nbytes)
    with bar("Patching", recovery.size, "runs", shown=bool(verbose)) as advance:
        for row, name in enumerate(chosen):
            patches = [
                _Patch(at, tokens[at[0]] if tokens else None, at[-1] if heads else None)
                for at in np.ndindex(recovery.shape[1:])
            ]
            wanted = [one for one in patches if one.token is None or one.token >= first]
            advance(len(patches) - len(wanted))
            last = is_cpu and metric is None and not name.startswith("ln_final.")
            apart = ([one] for one in wanted)
            for copies in _copies(wanted, first, count, most) if is_cpu and not _is_square(name) else apart:
                logits = _logits(text, name, copies, cache[name], corrupted_logits, last=last)
                for one, each in zip(copies, logits, strict=True):
                    recovery[(row, *one.at)] = (_measured(measure, each) - worst) / (best - worst)
                    advance(1)
    return Patching(recovery, chosen, best, worst, right.tokens, wrong.tokens, tokens, bool(heads))


class _Patch(NamedTuple):
    """A patch of a value: its place in the value's table, and which token and head it changes, where None is all."""

    at: tuple[int, ...]
    token: int | None
    head: int | None
    # The first token that is computed again.
    begin: int = 0

    def __str__(self) -> str:
        token = "all tokens" if self.token is None else f"token {self.token}"
        return token if self.head is None else f"{token}, head {self.head}"


# Rows of a pass over copies of the corrupted text: enough to multiply at full speed.
_ROWS = 256
# Of the keys and values of all copies together, if there is more than one.
_KEPT_BYTES = 256 << 20


def _copies(patches: list[_Patch], first: int, count: int, most: int) -> Iterator[list[_Patch]]:
    """Those that run in one pass, at most so many, each from its token on; where all tokens are patched, from the first that differs."""
    copies: list[_Patch] = []
    rows = 0
    for patch in patches:
        begin = min(first, count - 1) if patch.token is None else patch.token
        if copies and (rows + count - begin > _ROWS or len(copies) == most):
            yield copies
            copies, rows = [], 0
        copies.append(patch._replace(begin=begin))
        rows += count - begin
    if copies:
        yield copies


def _logits(
    text: ObservedText, name: str, copies: list[_Patch], clean: FloatArray, corrupted: FloatArray, *, last: bool
) -> Iterator[FloatArray]:
    """What a metric reads of each patched copy, an array of its own: (T, V), or (1, V) of the last token alone.

    Args:
        text: The corrupted one, which has run.
        name: Of the value that is patched.
        copies: The patches.
        clean: The value in the clean run.
        corrupted: (T, V) logits of the corrupted run, which tokens before a patch keep.
        last: Whether the last token is enough.

    Raises:
        OutOfMemoryError: There is not even enough for one copy.
        NumericError: A logit is not finite; it says of which patch.
    """
    count = len(corrupted)

    def see(of: str, value: FloatArray) -> FloatArray:
        patched = value.copy()
        row = 0
        for _, token, head, begin in copies:
            there, rows = (clean, patched) if _is_square(name) else (clean[begin:], patched[row : row + count - begin])
            place = _place(name, None if token is None else token - begin, head)
            rows[place] = there[place]
            row += count - begin
        return patched

    logits: FloatArray | None = None
    try:
        logits = text.run_from(name, [one.begin for one in copies], see, last=last)
    except OutOfMemoryError:
        if len(copies) == 1:
            raise
    except NumericError as error:
        if len(copies) == 1:
            raise NumericError(f"patch of {name}, {copies[0]}: {error}") from error
    if logits is None:
        # Fewer may fit, and one alone is the one that is not finite.
        for half in (copies[: len(copies) // 2], copies[len(copies) // 2 :]):
            yield from _logits(text, name, half, clean, corrupted, last=last)
        return
    for one in copies:
        rows = 1 if last else count - one.begin
        yield logits[:rows] if last else np.concatenate([corrupted[: one.begin], logits[:rows]])
        logits = logits[rows:]


def _is_square(name: str) -> bool:
    return layer_of(name)[1].endswith(("attn_scores", "hook_pattern"))


def _positions(positions: object, count: int) -> list[int]:
    """Those to patch one by one, in [0, count); none: all at once."""
    if isinstance(positions, (bool, np.bool_)):
        return list(range(count)) if positions else []
    given = array_by_protocol("patch: positions", positions)
    listed = given.tolist() if given is not None and given.ndim == 1 else positions
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Sequence) or not listed:
        raise OptionError(f"patch: positions must be True, False or a list of positions, got {shown(positions)}")
    found = [whole(f"patch: positions[{index}]", each, -count, count - 1) % count for index, each in enumerate(listed)]
    if len(set(found)) < len(found):
        raise OptionError(f"patch: positions must be different ones, got {shown(positions)}")
    return found


def _place(name: str, token: int | None, head: int | None) -> tuple[int | slice, ...]:
    """What of a value is patched, as an index; None: all."""
    tokens = slice(None) if token is None else token
    heads = slice(None) if head is None else head
    if _is_square(name):
        return heads, tokens
    return (tokens,) if head is None else (tokens, head)


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
        given = array_by_protocol("answers", answers)
        two = answers if given is None else given.tolist()
        if not isinstance(two, (tuple, list)) or len(two) != 2:
            raise OptionError(f"answers must be two, the right one and the wrong one, got {shown(answers)}")
        right, wrong = (_answer(model, answer) for answer in two)
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
    given: object = metric(logits)
    try:
        # A text of digits is no number, though Python would read it.
        value = float("none" if isinstance(given, (str, bytes)) else given)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise DTypeError(f"patch: the metric must give a number, got {shown(given)}") from error
    if not math.isfinite(value):
        raise NumericError(f"patch: the metric gave {value}, it must be a finite number")
    return value
