"""What happened in a training run, step by step and epoch by epoch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llama_ext._plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Evaluation", "History", "StepRecord", "Validation", "perplexity_of", "smoothed"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a model predicts labels.

    Attributes:
        loss: Mean negative log-likelihood in nats a label.
        accuracy: The share of labels that are the greedy choice.
        perplexity: exp(loss), infinite where that overflows.
        tokens: How many labels counted.
    """

    loss: float
    accuracy: float
    perplexity: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step.

    Attributes:
        step: Counts from 1.
        epoch: The epoch it belongs to, from 1.
        loss: Mean over the counted labels of the step, in nats, before the weights changed.
        lr: Learning rate.
        grad_norm: Of all gradients together, before clipping.
        tokens: Tokens that ran.
        tokens_per_second: Of the step, without validation and saving.
        skipped: The step was an outlier, and the weights did not change.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    skipped: bool = False


@dataclasses.dataclass(frozen=True)
class Validation:
    """The validation data's score after a step.

    Attributes:
        step: Steps done.
        loss: As in `Evaluation`.
        accuracy: As in `Evaluation`, or None when `compile` did not ask for it.
        perplexity: As in `Evaluation`, or None when `compile` did not ask for it.
    """

    step: int
    loss: float
    accuracy: float | None = None
    perplexity: float | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Validation:
        """The validation with these fields, as a checkpoint has them.

        Raises:
            TypeError: A field is unknown, missing or no number.
        """
        for name, value in fields.items():
            may_miss = name in ("accuracy", "perplexity") and value is None
            if not may_miss and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(f"{name} of a validation is {str(value)[:40]!r}, expected a number")
        return cls(**fields)


@dataclasses.dataclass(repr=False)
class History:
    """A training run; `repr` is a line about it.

    Attributes:
        steps: A record of each step, those before a resumption included.
        validations: Scores of the validation data, in order.
        steps_per_epoch: Steps of an epoch.
        stopped: Why it ended: "done", "interrupted" (Ctrl-C) or what a callback said.
    """

    steps: list[StepRecord] = dataclasses.field(default_factory=list)
    validations: list[Validation] = dataclasses.field(default_factory=list)
    steps_per_epoch: int = 1
    stopped: str = "done"

    @property
    def loss(self) -> list[float]:
        """The loss of each step."""
        return [record.loss for record in self.steps]

    @property
    def lr(self) -> list[float]:
        """The learning rate of each step."""
        return [record.lr for record in self.steps]

    @property
    def grad_norm(self) -> list[float]:
        """The norm of the gradients of each step."""
        return [record.grad_norm for record in self.steps]

    @property
    def tokens_per_second(self) -> list[float]:
        """The speed of each step."""
        return [record.tokens_per_second for record in self.steps]

    @property
    def seconds(self) -> float:
        """The time of all steps, without validation and saving."""
        return sum(record.tokens / record.tokens_per_second for record in self.steps if record.tokens_per_second)

    @property
    def val_loss(self) -> list[float]:
        """The validation loss, each time it was measured."""
        return [validation.loss for validation in self.validations]

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """By epoch: its number, the mean of its steps' losses, tokens a second, and the last validation in it."""
        result = []
        for epoch in sorted({record.epoch for record in self.steps}):
            records = [record for record in self.steps if record.epoch == epoch]
            seconds = History(records).seconds
            tokens = sum(record.tokens for record in records)
            inside = [each for each in self.validations if records[0].step <= each.step <= records[-1].step]
            entry: dict[str, Any] = {
                "epoch": epoch,
                "loss": sum(record.loss for record in records) / len(records),
                "tokens_per_second": tokens / seconds if seconds else 0.0,
            }
            if inside:
                entry["val_loss"] = inside[-1].loss
                if inside[-1].accuracy is not None:
                    entry["val_accuracy"] = inside[-1].accuracy
                if inside[-1].perplexity is not None:
                    entry["val_perplexity"] = inside[-1].perplexity
            result.append(entry)
        return result

    def __repr__(self) -> str:
        if not self.steps:
            return f"<History no steps{self._ended()}>"
        count = len(self.steps)
        parts = [
            f"{count:,} step{'' if count == 1 else 's'} in {self.seconds:.1f} s",
            f"loss {self.steps[0].loss:.4f} -> {self.steps[-1].loss:.4f}",
        ]
        if self.validations:
            best = min(self.validations, key=lambda each: each.loss)
            parts.append(f"best validation {best.loss:.4f} after step {best.step:,}")
        return f"<History {', '.join(parts)}{self._ended()}>"

    def _ended(self) -> str:
        return "" if self.stopped == "done" else f", stopped: {self.stopped}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values."""
        return dataclasses.asdict(self)

    def table(self) -> npt.NDArray[np.float64]:
        """The steps, a row each, in the order of the fields of `StepRecord`."""
        rows = [dataclasses.astuple(record) for record in self.steps]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(dataclasses.fields(StepRecord)))

    @staticmethod
    def records(table: npt.NDArray[np.float64]) -> list[StepRecord]:
        """What `table` was made of.

        Raises:
            ValueError: It has other columns.
        """
        kinds = {"int": int, "bool": bool, "float": float}
        fields = dataclasses.fields(StepRecord)
        if table.ndim != 2 or table.shape[1] != len(fields):
            raise ValueError(f"a history has {len(fields)} columns, got an array of shape {table.shape}")
        casts = [kinds[str(field.type)] for field in fields]
        return [StepRecord(*(cast(value) for cast, value in zip(casts, row, strict=True))) for row in table.tolist()]

    def plot(self) -> Figure:
        """Draws losses, and below them learning rate and norm of the gradients, over steps.

        Returns:
            The figure: `figure.savefig("history.png")`.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        figure = new_figure("History.plot", (8, 6))
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        steps = [record.step for record in self.steps]
        losses.plot(steps, self.loss, color="tab:blue", alpha=0.3, label="loss")
        losses.plot(steps, smoothed(self.loss), color="tab:blue", label="loss, smoothed")
        if self.validations:
            losses.plot(
                [each.step for each in self.validations], self.val_loss, "o-", color="tab:orange", label="validation"
            )
        losses.set_ylabel("nats a token")
        losses.legend()
        rates.plot(steps, self.lr, color="tab:green")
        rates.set_ylabel("learning rate", color="tab:green")
        rates.set_xlabel("step")
        norms = rates.twinx()
        norms.plot(steps, self.grad_norm, color="tab:red", alpha=0.4)
        norms.set_ylabel("gradient norm", color="tab:red")
        return figure


def perplexity_of(loss: float) -> float:
    """exp, infinite where that overflows."""
    return math.inf if loss >= 700 else math.exp(loss)


def smoothed(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """An exponential mean that is not drawn towards where it began.

    Args:
        values: In order.
        weight: Of what came before, in [0, 1).

    Returns:
        As many numbers.
    """
    result = []
    total = mass = 0.0
    for value in values:
        total = weight * total + (1.0 - weight) * value
        mass = weight * mass + (1.0 - weight)
        result.append(total / mass)
    return result
