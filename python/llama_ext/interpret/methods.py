"""The methods of attribution: embeddings in, a score for each token out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llama_ext.interpret.questions import Advance, Question, bar

__all__ = ["Integral", "gradient_x_input", "integrated_gradients", "occlusion", "size"]

F64 = npt.NDArray[np.float64]

# Steps of each half, once a part of the path is halved.
_HALF_STEPS = 12
# What scores of half as many nodes may be away from, as a share of all: they are far coarser, and where gradients are missed altogether
# they are away by a third and more.
_SPREAD = 0.2
# Values are float32: a difference below this share of them says nothing.
_ROUNDING = 1e-5


class Integral(NamedTuple):
    """Integrated gradients.

    Attributes:
        scores: (T,).
        delta: The sum over all parts of the path of |sum(its scores) - the difference of values at its ends|: none makes good for another.
        spread: The sum over all parts and tokens of how far scores by every other node are from those by all.
        steps: Gradients that were taken.
    """

    scores: F64
    delta: float
    spread: float
    steps: int

    def adds_up(self, value: float, baseline_value: float, tolerance: float) -> bool:
        """Whether each part adds up to the difference of its values, as far as float32 can tell."""
        return self.delta <= max(tolerance * abs(value - baseline_value), _rounding(value, baseline_value))

    def agrees(self, value: float, baseline_value: float) -> bool:
        """Whether half of the nodes tells much the same: a sum alone can be right by chance."""
        return self.spread <= max(_SPREAD * size(self.scores, value, baseline_value), _rounding(value, baseline_value))


class _Part(NamedTuple):
    """The path between two of its points, and what was found there."""

    begin: float
    end: float
    begin_value: float
    end_value: float
    scores: F64
    spread: float

    @property
    def delta(self) -> float:
        return abs(float(self.scores.sum()) - (self.end_value - self.begin_value))


def _rounding(value: float, baseline_value: float) -> float:
    return _ROUNDING * max(1.0, abs(value), abs(baseline_value))


def size(scores: F64, value: float, baseline_value: float) -> float:
    """What a spread is a share of: scores of both signs may be far more than what they add up to."""
    return max(abs(value - baseline_value), float(np.abs(scores).sum()))


def _weights(nodes: F64) -> F64:
    """Of the rule on [-1, 1] that is exact for polynomials of a degree below the number of nodes."""
    moments = np.zeros(nodes.size)
    moments[0] = 2
    basis: F64 = np.polynomial.legendre.legvander(nodes, nodes.size - 1).astype(np.float64)
    return np.linalg.solve(basis.T, moments).astype(np.float64)


def integrated_gradients(
    question: Question,
    baseline: F64,
    value: float,
    baseline_value: float,
    *,
    steps: int,
    max_steps: int,
    tolerance: float,
    shows: bool,
) -> Integral:
    """(x - b) times the mean gradient on the straight path from b to x, by Gauss-Legendre quadrature.

    The value at both ends of a part of the path says what its scores must add up to; and as they may do so by chance, every other node
    alone must give much the same. While all parts together are off by more than is allowed, those that are by more than their share are
    halved, as long as `max_steps` allows.

    Args:
        question: The prompt and its target.
        baseline: (T, C).
        value, baseline_value: At both ends of the path.
        steps: Of the first try, on the whole path.
        max_steps: Gradients altogether, at most.
        tolerance: A share of value - baseline_value.
        shows: Whether progress is.

    Source: Sundararajan, Taly & Yan, "Axiomatic Attribution for Deep Networks", 2017.
    """
    difference = question.embeddings - baseline

    def between(begin: float, end: float, count: int, begin_value: float, end_value: float, advance: Advance) -> _Part:
        nodes, weights = np.polynomial.legendre.leggauss(count)
        at = begin + (end - begin) * (nodes + 1) / 2
        # By all nodes, by the first, third, ..., and by the others.
        rules = np.zeros((3, count))
        rules[0] = weights
        for first in range(min(2, count - 1)):
            rules[1 + first, first::2] = _weights(nodes[first::2])
        sums = np.zeros((3, question.tokens))
        for index, gradient in question.gradients(count, lambda place: baseline + at[place] * difference, advance):
            sums += (end - begin) / 2 * rules[:, index, None] * (gradient * difference).sum(axis=1)
        # One node has no half.
        spread = float(np.abs(sums[1:] - sums[0]).sum(axis=1).max()) if count > 1 else float("inf")
        return _Part(begin, end, begin_value, end_value, sums[0], spread)

    def joined() -> Integral:
        scores = np.sum([part.scores for part in parts], axis=0)
        return Integral(scores, sum(part.delta for part in parts), sum(part.spread for part in parts), taken)

    with bar("Integrating gradients", steps, "steps", shown=shows) as advance:
        parts = [between(0.0, 1.0, steps, baseline_value, value, advance)]
    taken = steps
    found = joined()
    with bar("Integrating where gradients change", max_steps - steps, "steps at most", shown=shows) as advance:
        while not (found.adds_up(value, baseline_value, tolerance) and found.agrees(value, baseline_value)):
            share = tolerance * abs(value - baseline_value) / len(parts) / 2
            spread = _SPREAD * size(found.scores, value, baseline_value) / len(parts) / 2
            # In shares of what is allowed; a difference of nothing allows what float32 cannot tell.
            rounding = _rounding(value, baseline_value) / len(parts) / 2
            excess = [max(part.delta / max(share, rounding), part.spread / max(spread, rounding)) for part in parts]
            # The worst, where there is not room for all; from the end, so that indices stay what they are.
            wide = sorted((index for index, each in enumerate(excess) if each > 1), key=lambda index: -excess[index])
            wide = sorted(wide[: (max_steps - taken) // (2 * _HALF_STEPS)], reverse=True)
            if not wide:
                break
            for index in wide:
                old = parts[index]
                middle = (old.begin + old.end) / 2
                middle_value = question.value(baseline + middle * difference)
                parts[index : index + 1] = [
                    between(old.begin, middle, _HALF_STEPS, old.begin_value, middle_value, advance),
                    between(middle, old.end, _HALF_STEPS, middle_value, old.end_value, advance),
                ]
            taken += 2 * _HALF_STEPS * len(wide)
            found = joined()
    return found


def gradient_x_input(question: Question, baseline: F64, advance: Advance) -> F64:
    """(x - b) times the gradient at x: the scores (T,).

    Source: Shrikumar et al., "Not Just a Black Box: Learning Important Features Through Propagating Activation Differences", 2016.
    """
    ((_, gradient),) = question.gradients(1, lambda index: question.embeddings, advance)
    scores: F64 = (gradient * (question.embeddings - baseline)).sum(axis=1)
    return scores


def occlusion(question: Question, baseline: F64, value: float, window: int, advance: Advance) -> F64:
    """How much the value falls when a token gives way to the baseline: the scores (T,).

    With a window of several tokens, the mean over all windows that have the token.

    Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", 2014.
    """
    count = question.tokens - window + 1

    def without(first: int) -> F64:
        embeddings = question.embeddings.copy()
        embeddings[first : first + window] = baseline[first : first + window]
        return embeddings

    drops = value - question.values(count, without, advance)
    sums, windows = np.zeros(question.tokens), np.zeros(question.tokens)
    for offset in range(window):
        sums[offset : offset + count] += drops
        windows[offset : offset + count] += 1
    scores: F64 = sums / windows
    return scores
