"""How far scores of tokens can be trusted: what becomes of the target when the tokens they name are gone, or are all there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llama_ext._options import shown, whole, whole_seed
from llama_ext.errors import OptionError
from llama_ext.interpret.attribution import Attribution
from llama_ext.interpret.baselines import embedding_of
from llama_ext.interpret.questions import Advance, Question, Target, ask, bar, loaded

__all__ = ["Faithfulness", "Measure", "faithfulness"]

F64 = npt.NDArray[np.float64]
Better = Literal["higher", "lower"]

FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)
# Values that are the same: of another device or batch they are this near, as a share of at least 1.
_SAME = 1e-3
# Points of a curve, at most: a long text loses several tokens between two of them.
_POINTS = 50
_MOST_ORDERS = 10_000


@dataclass(frozen=True)
class Measure:
    """A number, beside what orders of tokens by chance give.

    Attributes:
        value: Of the attribution.
        random: The mean of the random orders.
        random_error: The standard error of that mean.
        better: Whether "higher" or "lower" is more faithful.
    """

    value: float
    random: float
    random_error: float
    better: Better

    @property
    def beats_random(self) -> bool:
        """Whether it is better than the random orders by more than twice the error of their mean."""
        gain = self.value - self.random if self.better == "higher" else self.random - self.value
        return gain > 2 * self.random_error


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """What `faithfulness` found.

    Attributes:
        comprehensiveness: How much the probability falls without the tokens that count most; the mean over `fractions`.
        sufficiency: How much it falls with nothing but those; the mean over `fractions`.
        deletion_auc: The area under the probability while tokens go, those that count most first.
        insertion_auc: And while they come.
        by_fraction: Comprehensiveness and sufficiency for each fraction.
        removed: (points,) shares of the tokens, 0 to 1.
        deletion, insertion: (points,) the probability with so many gone, or come.
        random_deletion, random_insertion: (points,) the same, the mean of the random orders.
        probability: Of the target for the whole text.
        target: What was explained.
        method: Of the attribution.
        tokens: How many there are.
        permutations: Random orders.
    """

    comprehensiveness: Measure
    sufficiency: Measure
    deletion_auc: Measure
    insertion_auc: Measure
    by_fraction: dict[float, tuple[Measure, Measure]]
    removed: F64 = field(repr=False)
    deletion: F64 = field(repr=False)
    insertion: F64 = field(repr=False)
    random_deletion: F64 = field(repr=False)
    random_insertion: F64 = field(repr=False)
    probability: float
    target: Target
    method: str
    tokens: int
    permutations: int

    def __str__(self) -> str:
        rows = []
        for fraction, (comprehensive, sufficient) in self.by_fraction.items():
            rows += [(f"comprehensiveness {fraction:.0%}", comprehensive), (f"sufficiency {fraction:.0%}", sufficient)]
        # One after the other, not by turns.
        rows = [*rows[::2], ("comprehensiveness, mean", self.comprehensiveness), *rows[1::2]]
        rows += [("sufficiency, mean", self.sufficiency)]
        rows += [("deletion AUC", self.deletion_auc), ("insertion AUC", self.insertion_auc)]
        width = max(len(name) for name, _ in rows)
        heading = (
            f"{self.method} for {self.target.text}: probability {self.probability:.4f}, {self.tokens} tokens, "
            f"{self.permutations} random orders"
        )
        lines = [heading, f"{'':<{width}}  attribution  random order      better"]
        lines += [
            f"{name:<{width}}  {each.value:>11.4f}  {each.random:.4f} +- {each.random_error:.4f}  {each.better}"
            for name, each in rows
        ]
        return "\n".join(lines)


def faithfulness(
    model: Any,
    attribution: Attribution,
    *,
    fractions: Sequence[float] = FRACTIONS,
    permutations: int = 10,
    baseline: Any = "mean",
    seed: int = 0,
    batch_size: int | None = None,
    verbose: int = 1,
) -> Faithfulness:
    """Measures whether the tokens with high scores are those that the model's answer hangs on.

    All numbers are of the target's probability p: of a contrast the probability against the other alone, of a continuation the
    geometric mean of its tokens'. A token is removed by putting the baseline's embedding in its place. With r_q the share q of the
    tokens that count most, rounded up, and x the text:

        comprehensiveness(q) = p(x) - p(x without r_q)        sufficiency(q) = p(x) - p(r_q alone)

    and the mean over the fractions. Deletion and insertion take tokens away from x, or add them to a text of baselines, in the order
    of their scores; the area under p over the share of tokens, by trapezoids. A number alone says little, as every text loses by being
    cut: each stands beside the same for random orders.

    Args:
        model: The one that was attributed.
        attribution: What `attribute` gave.
        fractions: Shares of the tokens, each in (0, 1].
        permutations: Random orders, >= 2.
        baseline: What stands for a removed token, as for `attribute`. The same for all methods, so that they can be compared.
        seed: Of the random orders, in [0, 2^64).
        batch_size, verbose: As `attribute`.

    Returns:
        The measures; `str` of them is a table.

    Raises:
        OptionError: An option is out of range, or the attribution is of another model, or of this one before it was changed.
        TokenIdError, ShapeError, DTypeError, NumericError, OutOfMemoryError: As `attribute`.

    Source: DeYoung et al., "ERASER: A Benchmark to Evaluate Rationalized NLP Models", 2020 (comprehensiveness, sufficiency); Petsiuk,
    Das & Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", 2018 (deletion, insertion).
    """
    if not isinstance(attribution, Attribution):
        raise OptionError(f"faithfulness: attribution must be what `attribute` gave, got {type(attribution).__name__}")
    shares = _shares(fractions)
    count = whole("faithfulness: permutations", permutations, 2, _MOST_ORDERS)
    number = whole_seed(seed, "faithfulness")
    found = loaded(model)
    target: Any = attribution.target
    wanted = list(target.ids) if target.against is None else (target.ids[0], target.against)
    if target.against is None and found.config.is_classifier:
        wanted = target.ids[0]
    asked: dict[str, Any] = {"adapter": [attribution.adapter], "batch_size": batch_size, "what": "faithfulness"}
    with ask(found, attribution.token_ids, wanted, output=target.output, **asked) as question:
        value = question.value(question.embeddings)
        if not abs(value - attribution.value) <= _SAME * max(1.0, abs(value)):
            raise OptionError(
                f"faithfulness: the {target} is {value:.6g} in this model, and was {attribution.value:.6g} in the one that was attributed: "
                "it is another model, or has been changed since. Attribute it anew"
            )
    with ask(found, attribution.token_ids, wanted, output="logprob", **asked) as question:
        tokens = question.tokens
        replaced = embedding_of(baseline, found, question, "faithfulness")
        # How many tokens are gone, or there, at each point.
        sizes = {share: math.ceil(round(share * tokens, 9)) for share in shares}
        points = np.unique(
            [*np.linspace(0, tokens, min(tokens, _POINTS) + 1).round().astype(int).tolist(), *sizes.values()]
        )
        rng = np.random.Generator(np.random.Philox(key=number))
        orders = [np.argsort(-attribution.scores, kind="stable"), *(rng.permutation(tokens) for _ in range(count))]
        total = 2 * len(points) * len(orders)
        with bar("Measuring", total, "texts", shown=bool(verbose)) as advance:
            curves = _curves(question, replaced, orders, points, advance)
    return _report(attribution, shares, sizes, points, curves, tokens)


def _shares(fractions: object) -> list[float]:
    given = list(fractions) if isinstance(fractions, Sequence) and not isinstance(fractions, (str, bytes)) else []
    if not given or not all(
        isinstance(each, (int, float)) and not isinstance(each, bool) and 0 < each <= 1 for each in given
    ):
        raise OptionError(f"faithfulness: fractions must be numbers in (0, 1], got {shown(fractions)}")
    return sorted({float(each) for each in given})


def _curves(
    question: Question, baseline: F64, orders: Sequence[npt.NDArray[Any]], points: npt.NDArray[Any], advance: Advance
) -> F64:
    """The probability (orders, 2, points) without, and with nothing but, the first tokens of each order."""

    def prompt(index: int) -> F64:
        order, rest = divmod(index, 2 * len(points))
        inserts, point = divmod(rest, len(points))
        first = np.zeros(question.tokens, bool)
        first[orders[order][: points[point]]] = True
        kept: F64 = np.where((first if inserts else ~first)[:, None], question.embeddings, baseline)
        return kept

    values = question.values(len(orders) * 2 * len(points), prompt, advance)
    return _probability(values, question.target).reshape(len(orders), 2, len(points))


def _probability(values: F64, target: Target) -> F64:
    if target.against is not None:
        # Of a difference of logits, without overflow.
        return np.exp(-np.logaddexp(0.0, -values))
    return np.exp(values / len(target.ids))


def _report(
    attribution: Attribution,
    shares: Sequence[float],
    sizes: dict[float, int],
    points: npt.NDArray[Any],
    curves: F64,
    tokens: int,
) -> Faithfulness:
    whole = float(curves[0, 0, 0])
    removed = points / tokens
    place = {int(size): index for index, size in enumerate(points)}
    # (orders, fractions)
    falls = np.stack([whole - curves[:, :, place[sizes[share]]] for share in shares], axis=-1)
    # By trapezoids: NumPy's own has another name in each major version.
    areas: F64 = ((curves[..., 1:] + curves[..., :-1]) / 2 * np.diff(removed)).sum(axis=-1)
    return Faithfulness(
        comprehensiveness=_measure(falls[:, 0].mean(axis=-1), "higher"),
        sufficiency=_measure(falls[:, 1].mean(axis=-1), "lower"),
        deletion_auc=_measure(areas[:, 0], "lower"),
        insertion_auc=_measure(areas[:, 1], "higher"),
        by_fraction={
            share: (_measure(falls[:, 0, index], "higher"), _measure(falls[:, 1, index], "lower"))
            for index, share in enumerate(shares)
        },
        removed=removed,
        deletion=curves[0, 0],
        insertion=curves[0, 1],
        random_deletion=curves[1:, 0].mean(axis=0),
        random_insertion=curves[1:, 1].mean(axis=0),
        probability=whole,
        target=attribution.target,
        method=attribution.method,
        tokens=tokens,
        permutations=len(curves) - 1,
    )


def _measure(values: F64, better: Better) -> Measure:
    """Of the attribution, which comes first, beside the random orders."""
    random = values[1:]
    error = float(random.std(ddof=1) / math.sqrt(random.size))
    return Measure(float(values[0]), float(random.mean()), error, better)
