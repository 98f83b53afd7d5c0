"""Every figure of a report follows from the confusion matrix by its definition."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llama_ext import ClassificationReport
from llama_ext.errors import OptionError, ShapeError

LABELS = ["a", "b", "c"]
RIGHT = [0, 0, 0, 0, 1, 1, 1, 2]
GIVEN = [0, 0, 1, 2, 1, 1, 0, 1]


def test_scores_by_definition() -> None:
    report = ClassificationReport.from_indices(LABELS, RIGHT, GIVEN)
    assert report.confusion.tolist() == [[2, 1, 1], [1, 2, 0], [0, 1, 0]]
    assert report.accuracy == 4 / 8
    a, b, c = report.per_label
    assert (a.precision, a.recall, a.support) == (2 / 3, 2 / 4, 4)
    assert a.f1 == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert (b.precision, b.recall, b.support) == (2 / 4, 2 / 3, 3)
    assert (c.precision, c.recall, c.f1, c.support) == (0.0, 0.0, 0.0, 1)
    assert report.macro.recall == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert report.weighted.recall == pytest.approx(report.accuracy), "weighted recall is accuracy"
    assert report.weighted.f1 == pytest.approx((4 * a.f1 + 3 * b.f1) / 8)


def test_against_sums_over_single_texts() -> None:
    rng = np.random.default_rng(0)
    right, given = rng.integers(0, 5, 300), rng.integers(0, 5, 300)
    report = ClassificationReport.from_indices(list("vwxyz"), right.tolist(), given.tolist())
    for index, score in enumerate(report.per_label):
        true = int(np.sum((right == index) & (given == index)))
        assert score.precision == true / np.sum(given == index)
        assert score.recall == true / np.sum(right == index)
        assert score.f1 == pytest.approx(2 * true / (np.sum(given == index) + np.sum(right == index)))
    assert report.accuracy == np.mean(right == given)


def test_a_label_that_nobody_has_counts_in_no_macro_average() -> None:
    report = ClassificationReport.from_indices(["a", "b", "never"], [0, 1], [0, 1])
    assert report.macro.f1 == 1.0
    assert report.per_label[2].f1 == 0.0


def test_the_table_and_the_json_say_the_same() -> None:
    report = ClassificationReport.from_indices(LABELS, RIGHT, GIVEN, loss=0.75)
    values = json.loads(report.to_json())
    assert values["accuracy"] == 0.5
    assert values["confusion"] == report.confusion.tolist()
    assert [entry["label"] for entry in values["labels"]] == LABELS
    lines = str(report).splitlines()
    assert lines[1].split() == ["a", "0.6667", "0.5000", "0.5714", "4"]
    assert lines[-1] == "accuracy 0.5000 of 8 texts, loss 0.7500"


def test_what_makes_no_report_is_refused() -> None:
    with pytest.raises(OptionError, match="nothing to report"):
        ClassificationReport.from_indices(LABELS, [], [])
    with pytest.raises(ShapeError, match="one length"):
        ClassificationReport.from_indices(LABELS, [0], [0, 1])
    with pytest.raises(OptionError, match=r"\[0, 3\)"):
        ClassificationReport.from_indices(LABELS, [3], [0])


def test_a_plot_shows_every_count() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = ClassificationReport.from_indices(LABELS, RIGHT, GIVEN).plot()
    assert [text.get_text() for text in figure.axes[0].texts] == ["2", "1", "1", "1", "2", "0", "0", "1", "0"]
