"""How good a classifier is: every figure from one confusion matrix."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llama_ext._plots import new_figure
from llama_ext.errors import OptionError, ShapeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Average", "ClassificationReport", "LabelScore"]


@dataclasses.dataclass(frozen=True)
class LabelScore:
    """The scores of one label.

    Attributes:
        label: Its name.
        precision: Of the texts that were given this label, the share that has it; 0 when it was given to none.
        recall: Of the texts that have this label, the share that was given it; 0 when none has it.
        f1: The harmonic mean of the two; 0 when both are.
        support: How many texts have it.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclasses.dataclass(frozen=True)
class Average:
    """Scores averaged over labels: macro counts each label once, weighted as often as texts have it."""

    precision: float
    recall: float
    f1: float


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationReport:
    """Accuracy, and precision, recall and F1 of each label and on average; `str()` is a table.

    Attributes:
        labels: Names, by index.
        confusion: (labels, labels) int64: confusion[i, j] texts have label i and were given label j.
        loss: Mean negative log-likelihood of the right labels in nats; None when it is not known.
    """

    labels: list[str]
    confusion: npt.NDArray[np.int64]
    loss: float | None = None

    @classmethod
    def from_indices(
        cls, labels: Sequence[str], right: Sequence[int], given: Sequence[int], loss: float | None = None
    ) -> ClassificationReport:
        """A report of single decisions.

        Args:
            labels: Names, by index.
            right: The index of each text's label.
            given: The index that was given to it.
            loss: See the class.

        Raises:
            ShapeError: `right` and `given` differ in length.
            OptionError: There is none, or an index is out of range.
        """
        rows, columns = np.asarray(right, dtype=np.int64), np.asarray(given, dtype=np.int64)
        if rows.shape != columns.shape or rows.ndim != 1:
            raise ShapeError(f"right and given must be of one length, got {rows.shape} and {columns.shape}")
        size = len(labels)
        if not rows.size:
            raise OptionError("there is nothing to report: no text was given")
        if min(rows.min(), columns.min()) < 0 or max(rows.max(), columns.max()) >= size:
            raise OptionError(f"an index of a label must be in [0, {size})")
        confusion = np.bincount(rows * size + columns, minlength=size * size).reshape(size, size).astype(np.int64)
        return cls(list(labels), confusion, loss)

    @property
    def accuracy(self) -> float:
        """The share of texts that were given their label."""
        return float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def per_label(self) -> list[LabelScore]:
        """The scores of each label, by index."""
        right = np.diag(self.confusion).astype(np.float64)
        support, given = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        precision, recall = _share(right, given), _share(right, support)
        f1 = _share(2 * right, support + given)
        return [
            LabelScore(label, float(precision[i]), float(recall[i]), float(f1[i]), int(support[i]))
            for i, label in enumerate(self.labels)
        ]

    @property
    def macro(self) -> Average:
        """Over labels that some text has or was given, each once."""
        support, given = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        return self._average(((support + given) > 0).astype(np.float64))

    @property
    def weighted(self) -> Average:
        """Over labels, each as often as texts have it."""
        return self._average(self.confusion.sum(axis=1).astype(np.float64))

    def _average(self, weights: npt.NDArray[np.float64]) -> Average:
        scores = self.per_label
        values = [[score.precision, score.recall, score.f1] for score in scores]
        precision, recall, f1 = (float(value) for value in weights @ np.array(values) / weights.sum())
        return Average(precision, recall, f1)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "labels": [dataclasses.asdict(score) for score in self.per_label],
            "macro": dataclasses.asdict(self.macro),
            "weighted": dataclasses.asdict(self.weighted),
            "confusion": self.confusion.tolist(),
        }

    def to_json(self) -> str:
        """The report as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def plot(self) -> Figure:
        """The confusion matrix as a picture.

        Returns:
            A matplotlib figure, not shown yet.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        size = max(3.0, 0.7 * len(self.labels) + 1.5)
        figure = new_figure("ClassificationReport.plot", (size, size))
        axes = figure.add_subplot()
        share = _share(self.confusion, self.confusion.sum(axis=1, keepdims=True))
        axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
        for (row, column), count in np.ndenumerate(self.confusion):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
        axes.set_xticks(range(len(self.labels)), self.labels, rotation=45, ha="right")
        axes.set_yticks(range(len(self.labels)), self.labels)
        axes.set_xlabel("given")
        axes.set_ylabel("right")
        axes.set_title(f"accuracy {self.accuracy:.1%}")
        return figure

    def __str__(self) -> str:
        width = max(8, *(len(label) for label in self.labels))
        head = f"{'':{width}}  precision  recall      f1  support"
        lines = [head]
        total = int(self.confusion.sum())
        rows = [(score.label, score, score.support) for score in self.per_label]
        lines += [_line(name, scores, count, width) for name, scores, count in rows]
        lines += [_line(name, getattr(self, name), total, width) for name in ("macro", "weighted")]
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        lines.append(f"accuracy {self.accuracy:.4f} of {total} texts{loss}")
        return "\n".join(lines)


def _line(name: str, scores: LabelScore | Average, count: int, width: int) -> str:
    return f"{name:{width}}  {scores.precision:9.4f}  {scores.recall:6.4f}  {scores.f1:6.4f}  {count:7d}"


def _share(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """part / whole, 0 where there is nothing."""
    wide = np.broadcast_to(np.asarray(whole, dtype=np.float64), np.shape(part))
    result = np.zeros(np.shape(part), dtype=np.float64)
    np.divide(part, wide, out=result, where=wide > 0)
    return result
