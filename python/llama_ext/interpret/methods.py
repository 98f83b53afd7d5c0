"""The methods of attribution: embeddings in, a score for each token out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llama_ext.interpret.questions import Advance, Question, bar

__all__ = ["Integral", "gradient_x_input", "integrated_gradients", "is_close", "occlusion"]

F64 = npt.NDArray[np.float64]

# Steps of each half, once a part of the path is halved.
_HALF_STEPS = 12
# Values are float32: a difference below this share of them says nothing.
_ROUNDING = 1e-5


class Integral(NamedTuple):
    """Integrated gradients.

    Attributes:
        scores: (T,).
        delta: |sum(scores) - (value - baseline value)|.
        steps: Gradients that were taken.
    """

    scores: F64
    delta: float
    steps: int


class _Part(NamedTuple):
    """The path between two of its points, and what was found there."""

    begin: float
    end: float
    begin_value: float
    end_value: float
    scores: F64

    @property
    def delta(self) -> float:
        return float(self.scores.sum()) - (self.end_value - self.begin_value)


def is_close(delta: float, value: float, baseline_value: float, tolerance: float) -> bool:
    """Whether scores add up to the difference of two values, as far as float32 can tell."""
    rounding = _ROUNDING * max(1.0, abs(value), abs(baseline_value))
    return abs(delta) <= max(tolerance * abs(value - baseline_value), rounding)


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

    The value at both ends of a part of the path says what its scores must add up to. While the sum of all that parts are off is above
    the tolerance, those that are off by more than their share are halved, as long as `max_steps` allows.

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
        total = np.zeros_like(difference)
        for index, gradient in question.gradients(count, lambda place: baseline + at[place] * difference, advance):
            total += weights[index] / 2 * gradient
        return _Part(begin, end, begin_value, end_value, (end - begin) * (total * difference).sum(axis=1))

    with bar("Integrating gradients", steps, "steps", shown=shows) as advance:
        parts = [between(0.0, 1.0, steps, baseline_value, value, advance)]
    taken = steps
    with bar("Integrating where gradients change", max_steps - steps, "steps at most", shown=shows) as advance:
        while not is_close(sum(abs(part.delta) for part in parts), value, baseline_value, tolerance):
            share = tolerance * abs(value - baseline_value) / len(parts) / 2
            wide = [index for index, part in enumerate(parts) if abs(part.delta) > share]
            # The worst, where there is not room for all; from the end, so that indices stay what they are.
            wide.sort(key=lambda index: -abs(parts[index].delta))
            wide = sorted(wide[: (max_steps - taken) // (2 * _HALF_STEPS)], reverse=True)
            if not wide:
                break
            for index in wide:
                old = parts[index]
                middle = (old.begin + old.end) / 2
                found = question.value(baseline + middle * difference)
                parts[index : index + 1] = [
                    between(old.begin, middle, _HALF_STEPS, old.begin_value, found, advance),
                    between(middle, old.end, _HALF_STEPS, found, old.end_value, advance),
                ]
            taken += 2 * _HALF_STEPS * len(wide)
    scores = np.sum([part.scores for part in parts], axis=0)
    return Integral(scores, abs(float(scores.sum()) - (value - baseline_value)), taken)


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
