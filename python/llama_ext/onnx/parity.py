"""How far logits are from the reference's, in numbers; and how far they may be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext.onnx.reference import F64, Ids

__all__ = ["GATES", "Gates", "LogitFigures", "Nearness", "compare_logits", "gates_for", "nearness"]

Array = npt.NDArray[Any]

_TOP = 10
_FEW = 32


@dataclasses.dataclass(frozen=True)
class Gates:
    """The most that logits may be off.

    Attributes:
        name: Of the arithmetic that they are for.
        relative_rms: Root mean square of the difference as a share of the reference's, over all positions.
        worst_position: The same share for the one position that is off the most: a fault at the end of the context, or in one
            row of a batch, would drown in a mean.
        kl_mean: Kullback-Leibler divergence from the reference's distribution, in nats, mean over positions; None: no gate.
    """

    name: str
    relative_rms: float
    worst_position: float
    kl_mean: float | None

    def for_numbers(self, count: int) -> Gates:
        """The gates of so few logits that a mean over them is no surer than a position: a classifier's for one token or two."""
        if count >= _FEW:
            return self
        return dataclasses.replace(self, relative_rms=self.worst_position)


# What onnxruntime 1.32's noise was measured at: float32 1e-6 and 1e-11; float16 2e-3; int8 activations 3e-2 and 5e-3.
GATES = {
    gates.name: gates
    for gates in (
        Gates("float32", 1e-4, 1e-4, 1e-8),
        Gates("float16", 1e-2, 3e-2, None),
        Gates("int8 activations", 6e-2, 1.8e-1, 2e-2),
    )
}


def gates_for(arithmetic: str) -> Gates:
    """The gates of an arithmetic: "float32", "float16" (which bfloat16 shares) or "int8 activations"."""
    return GATES["float16" if arithmetic == "bfloat16" else arithmetic]


@dataclasses.dataclass(frozen=True)
class Nearness:
    """How near one array is to another.

    Attributes:
        max_abs: The largest difference.
        relative_rms: Root mean square of the difference as a share of the expected one's.
        worst_position: The largest share of a row.
        where: The index of that row.
    """

    max_abs: float
    relative_rms: float
    worst_position: float
    where: int

    def passes(self, gates: Gates) -> bool:
        """Whether it is within the gates; a NaN is not."""
        return self.relative_rms <= gates.relative_rms and self.worst_position <= gates.worst_position


def nearness(actual: Sequence[Array], expected: Sequence[Array]) -> Nearness:
    """Compares rows.

    Args:
        actual: (rows, N) arrays; a NaN or an infinity makes every figure infinite.
        expected: Their partners, of the same shapes.

    Returns:
        The figures over all of them. A row's share is of its own root mean square, or of that of all rows where it is less.
    """
    squares: list[F64] = []
    expected_squares: list[F64] = []
    largest = 0.0
    for ours, theirs in zip(actual, expected, strict=True):
        difference = ours.astype(np.float64) - theirs
        if not np.isfinite(difference).all():
            bad = int(np.argmin(np.isfinite(difference).all(axis=-1))) + sum(len(each) for each in squares)
            return Nearness(math.inf, math.inf, math.inf, bad)
        largest = max(largest, float(np.abs(difference).max(initial=0.0)))
        squares.append(np.sum(difference * difference, axis=-1))
        expected_squares.append(np.sum(theirs.astype(np.float64) ** 2, axis=-1))
    errors, sizes = np.concatenate(squares), np.concatenate(expected_squares)
    total = float(sizes.sum())
    if total == 0.0:
        exact = float(errors.sum()) == 0.0
        return Nearness(largest, 0.0 if exact else math.inf, 0.0 if exact else math.inf, int(errors.argmax()))
    shares = np.sqrt(errors / np.maximum(sizes, total / len(sizes)))
    where = int(shares.argmax())
    return Nearness(largest, math.sqrt(float(errors.sum()) / total), float(shares[where]), where)


@dataclasses.dataclass(frozen=True)
class LogitFigures:
    """Logits against the reference's, over the tokens of texts.

    Attributes:
        positions: How many rows were compared.
        max_abs, relative_rms, worst_position: See `Nearness`.
        worst_at: The row of the worst position, counted over all texts.
        kl_mean, kl_p99, kl_max: Divergence of the softmax from the reference's, in nats.
        top1: Share of positions whose most likely token is the reference's.
        top10: Mean share of the reference's ten most likely tokens that are among the ten most likely.
        perplexity: Of the texts under these logits; None when no text has a second token.
        perplexity_reference: Under the reference's.
    """

    positions: int
    max_abs: float
    relative_rms: float
    worst_position: float
    worst_at: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    top10: float
    perplexity: float | None
    perplexity_reference: float | None

    @property
    def perplexity_difference(self) -> float | None:
        """As a share of the reference's."""
        if self.perplexity is None or self.perplexity_reference is None:
            return None
        return self.perplexity / self.perplexity_reference - 1.0

    def passes(self, gates: Gates) -> bool:
        """Whether all gates hold; a NaN is beyond any."""
        near = self.relative_rms <= gates.relative_rms and self.worst_position <= gates.worst_position
        return near and (gates.kl_mean is None or self.kl_mean <= gates.kl_mean)


def compare_logits(actual: Sequence[Array], expected: Sequence[F64], ids: Sequence[Ids]) -> LogitFigures:
    """Compares the logits of texts.

    Args:
        actual: (T, V) for each text.
        expected: The reference's.
        ids: (T) the tokens of each text: those after the first have a probability.

    Returns:
        The figures.
    """
    near = nearness(actual, expected)
    divergences: list[F64] = []
    same, overlap, count = 0, 0.0, 0
    losses: list[F64] = []
    losses_reference: list[F64] = []
    if not math.isfinite(near.relative_rms):
        rows = sum(map(len, expected))
        worst = math.inf
        return LogitFigures(rows, worst, worst, worst, near.where, worst, worst, worst, 0.0, 0.0, None, None)
    for ours, theirs, tokens in zip(actual, expected, ids, strict=True):
        log_p, log_q = _log_softmax(theirs), _log_softmax(ours.astype(np.float64))
        divergences.append(np.maximum(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1), 0.0))
        same += int(np.count_nonzero(theirs.argmax(axis=-1) == ours.argmax(axis=-1)))
        top = min(_TOP, theirs.shape[-1])
        for row_ours, row_theirs in zip(_top(ours, top), _top(theirs, top), strict=True):
            overlap += len(set(row_ours.tolist()) & set(row_theirs.tolist())) / top
        count += len(tokens)
        following = np.asarray(tokens)[1:, None]
        losses.append(-np.take_along_axis(log_q[:-1], following, axis=-1)[:, 0])
        losses_reference.append(-np.take_along_axis(log_p[:-1], following, axis=-1)[:, 0])
    kl = np.concatenate(divergences)
    return LogitFigures(
        positions=count,
        max_abs=near.max_abs,
        relative_rms=near.relative_rms,
        worst_position=near.worst_position,
        worst_at=near.where,
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1=same / count,
        top10=overlap / count,
        perplexity=_perplexity(losses),
        perplexity_reference=_perplexity(losses_reference),
    )


def _log_softmax(logits: F64) -> F64:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: F64 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _top(logits: Array, count: int) -> npt.NDArray[np.intp]:
    return np.argpartition(logits, -count, axis=-1)[:, -count:]


def _perplexity(losses: Sequence[F64]) -> float | None:
    together = np.concatenate(losses)
    return math.exp(min(float(together.mean()), 700.0)) if together.size else None
