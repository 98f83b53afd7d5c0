"""Options of `compile`, the schedules they make, and the history of a run."""

from __future__ import annotations

import builtins
import math
from typing import Any

import numpy as np
import pytest

import llama_ext
from bigram_runs import MakeRun, documents
from llama_ext.training import PRESETS, History, LearningRates
from llama_ext.training.history import StepRecord, Validation, smoothed
from llama_ext.training.options import TrainOptions
from llama_ext.training.schedules import learning_rate, usual_lr
from llama_ext.training.settings import RunSettings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "adamax"}, "optimizer must be one of adamw, adam, sgd, muon"),
        ({"schedule": "step"}, "schedule"),
        ({"decay": "none"}, "decay"),
        ({"precision": "float16"}, "precision"),
        ({"lr": 0}, "lr must be a number > 0"),
        ({"lr": math.inf}, "lr"),
        ({"lr": "1e-3"}, "lr"),
        ({"lr": True}, "lr"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"eps": 0}, "eps"),
        ({"warmup": -1}, "warmup"),
        ({"warmup": 1.5}, "warmup"),
        ({"clip_norm": 0}, "None does not clip"),
        ({"metrics": ["f1"]}, "metrics"),
        ({"metrics": "accuracy"}, "metrics"),
        ({"min_lr": 1e-4, "lr": 1e-3, "decay_fraction": 0}, "decay_fraction"),
        ({"min_lr": 2}, "share of lr"),
        ({"momentum": 0.9}, "momentum belongs to optimizer='sgd' or 'muon', got optimizer='adamw'"),
        ({"optimizer": "sgd", "momentum": 1.0}, "momentum"),
        ({"optimizer": "sgd", "momentum": 0.0, "nesterov": True}, "nesterov"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"checkpoint_activations": 1}, "checkpoint_activations"),
        ({"skip_outliers": 0.5}, "standard deviations"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(llama_ext.OptionError, match=words):
        TrainOptions(**options)


@pytest.mark.parametrize("value", ["word\nword" * 10_000, np.zeros((3, 3)), 10**5000], ids=["text", "array", "int"])
def test_a_value_in_a_message_is_short_and_in_one_line(value: Any) -> None:
    for name in ("optimizer", "betas", "metrics", "nesterov", "checkpoint_activations"):
        with pytest.raises(llama_ext.OptionError) as caught:
            TrainOptions(**{"optimizer": "sgd", name: value})
        assert str(caught.value).count("\n") == 0
        assert len(str(caught.value)) < 200
    for name in ("keep_best", "overfit_batch", "checkpoint_dir", "log_file", "resume"):
        if isinstance(value, str) and name in ("checkpoint_dir", "log_file", "resume"):
            continue
        with pytest.raises(llama_ext.OptionError) as caught:
            RunSettings(**{name: value})
        assert str(caught.value).count("\n") == 0
        assert len(str(caught.value)) < 200
    with pytest.raises(llama_ext.OptionError, match="both say how long"):
        RunSettings(epochs=10**5000, max_steps=2)


def test_momentum_has_a_default_for_each_optimiser_that_has_one() -> None:
    assert (TrainOptions(optimizer="sgd").momentum, TrainOptions(optimizer="sgd").nesterov) == (0.9, False)
    assert (TrainOptions(optimizer="muon").momentum, TrainOptions(optimizer="muon").nesterov) == (0.95, True)
    assert "momentum" not in TrainOptions().core_optimizer()


def rates(total: int, **options: Any) -> list[float]:
    checked = TrainOptions(lr=1.0, **options)
    return [learning_rate(checked, step, total) for step in range(total)]


def test_the_usual_learning_rate_falls_with_the_width() -> None:
    assert usual_lr(64, adapts=False) == usual_lr(192, adapts=False) == usual_lr(192, adapts=True) == 1e-3
    assert usual_lr(2048, adapts=False) == pytest.approx(9.375e-5)
    assert usual_lr(4096, adapts=False) == pytest.approx(4.6875e-5)
    assert usual_lr(4096, adapts=True) == pytest.approx(4.6875e-4)


def test_schedules_have_their_shapes() -> None:
    assert rates(4, schedule="constant") == [1.0] * 4
    assert rates(5, schedule="constant", warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(4, schedule="constant", warmup=0.5) == [0.5, 1.0, 1.0, 1.0]
    # 0.07 * 100 is a little more than 7.
    assert rates(100, schedule="constant", warmup=0.07)[6:8] == [1.0, 1.0]
    assert rates(100, schedule="constant", warmup=0.07)[5] < 1.0
    assert rates(4, schedule="linear", min_lr=0.0) == [1.0, 0.75, 0.5, 0.25]
    assert rates(10, schedule="wsd", warmup=2, min_lr=0.0, decay_fraction=0.4) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0]
    )
    # A warm-up that is longer than the run is cut.
    assert rates(2, warmup=100) == [0.5, 1.0]


def test_the_cosine_is_that_of_nanogpt() -> None:
    found = rates(2000, warmup=100, min_lr=0.1)
    for step in (0, 50, 99, 100, 101, 1000, 1999):
        expected = (
            (step + 1) / 100
            if step < 100
            else 0.1 + 0.5 * 0.9 * (1 + math.cos(math.pi * (step - 100) / max(1, 2000 - 100)))
        )
        assert found[step] == pytest.approx(expected, rel=1e-12)
    assert found[100] == 1.0
    assert found[-1] == pytest.approx(0.1, abs=1e-4)


def test_a_smoothed_loss_is_not_drawn_to_zero() -> None:
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([1.0, 2.0], 0.5) == pytest.approx([1.0, 5 / 3])


def test_a_history_survives_its_table() -> None:
    records = [StepRecord(1, 1, 2.5, 1e-3, 0.7, 64, 1e4), StepRecord(2, 1, math.nan, 2e-3, math.inf, 64, 9e3, True)]
    history = History(records)
    again = History.records(history.table())
    assert again[0] == records[0]
    assert again[1].skipped is True
    assert math.isnan(again[1].loss)
    assert History.records(History().table()) == []
    with pytest.raises(ValueError, match="columns"):
        History.records(np.zeros((2, 3)))


def test_a_history_is_summed_up_in_a_line() -> None:
    records = [StepRecord(step, 1, 3.0 / step, 1e-3, 1.0, 1000, 500.0) for step in range(1, 201)]
    history = History(records)
    assert repr(history) == "<History 200 steps in 400.0 s, loss 3.0000 -> 0.0150>"
    history.validations = [Validation(100, 2.5), Validation(150, 2.25), Validation(200, 2.75)]
    history.stopped = "interrupted"
    assert repr(history) == (
        "<History 200 steps in 400.0 s, loss 3.0000 -> 0.0150, best validation 2.2500 after step 150, stopped: interrupted>"
    )
    assert repr(History(records[:1])) == "<History 1 step in 2.0 s, loss 3.0000 -> 3.0000>"
    assert repr(History()) == "<History no steps>"
    assert history.epochs[0]["tokens_per_second"] == 500.0


def test_epochs_sum_up_their_steps(make_run: MakeRun) -> None:
    history = make_run(None, documents(seed=5), epochs=2).run.go()
    first, second = history.epochs
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert first["loss"] == pytest.approx(np.mean(history.loss[:6]))
    assert second["val_accuracy"] == history.validations[1].accuracy
    assert first["tokens_per_second"] > 0
    assert history.to_dict()["steps"][0]["loss"] == history.loss[0]


def test_a_history_can_be_drawn(make_run: MakeRun, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    history = make_run(None, documents(seed=5), epochs=2).run.go()
    figure = history.plot()
    figure.savefig(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes()[:4] == b"\x89PNG"
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["loss", "loss, smoothed", "validation"]


def test_rates_and_their_losses_can_be_drawn(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    found = LearningRates([1e-3, 1e-2, 1e-1, 1.0], [3.0, 2.0, 1.0, 5.0], 1e-2)
    figure = found.plot()
    figure.savefig(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert axes.lines[0].get_xydata().tolist() == [list(pair) for pair in zip(found.lr, found.loss, strict=True)]
    assert axes.lines[2].get_xdata() == [1e-2, 1e-2]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["loss", "loss, smoothed", "suggestion 0.01"]


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("not there")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(llama_ext.UnsupportedError, match=r"llama_ext\[plot\]"):
        History().plot()
    with pytest.raises(llama_ext.UnsupportedError, match=r"llama_ext\[plot\]"):
        LearningRates([1.0], [1.0], 1.0).plot()


def test_presets_are_settings_that_are_accepted() -> None:
    tokenizer = llama_ext.Tokenizer.characters("abc")
    for preset in PRESETS.values():
        TrainOptions(**preset.compile)
        config = preset.config(tokenizer, rms_norm_eps=1e-5)
        assert (config.vocab_size, config.max_position_embeddings) == (3, preset.context)
        assert config.rms_norm_eps == 1e-5
    assert PRESETS["cpu"].config(tokenizer).eos_token_id is None
