"""The loop of `fit`: what a step is, what it logs, when it validates, saves, skips and stops."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from bigram_runs import VOCABULARY, MakeRun, documents, tokens
from llama_ext.training import Callback, EarlyStopping
from llama_ext.training.batches import IGNORED, Example, Examples, Stream
from llama_ext.training.loop import dropout_seed, evaluate
from llama_ext.training.settings import RunSettings
from llama_ext.training.token_file import ArrayReader
from numpy_trainer import BigramTrainer, BigramWeights


def test_a_run_learns(make_run: MakeRun, stream: Stream) -> None:
    made = make_run(stream, stream, max_steps=200, options={"lr": 0.1, "metrics": ["accuracy", "perplexity"]})
    history = made.run.go()
    assert history.stopped == "done"
    assert len(history.steps) == 200
    # Three of five steps are by one: the entropy of the next token is that of (3/5, 1/5, 1/5).
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.2))
    assert history.loss[0] == pytest.approx(math.log(VOCABULARY), abs=0.1)
    assert entropy - 0.1 < history.val_loss[-1] < entropy + 0.1
    assert history.validations[-1].accuracy == pytest.approx(0.6, abs=0.05)
    assert history.validations[-1].perplexity == pytest.approx(math.exp(history.val_loss[-1]))


@pytest.mark.parametrize(("batch", "parts"), [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)])
def test_the_loss_is_a_mean_over_the_labels_of_the_whole_step(make_run: MakeRun, batch: int, parts: int) -> None:
    # Rows of 1 to 12 labels: a mean of means would weigh them by the part that they fall into.
    made = make_run(batch_size=batch, grad_accum=parts, max_steps=1, options={"clip_norm": None})
    record = made.run.go().steps[0]
    labels = np.concatenate([batch[1] for batch in made.trainer.batches])
    assert made.trainer.scales == [1 / labels.size] * parts
    whole = BigramTrainer(BigramWeights(VOCABULARY))
    ids = np.concatenate([batch[0] for batch in made.trainer.batches])
    loss, counted = whole.accumulate(ids, labels, np.array([ids.size]), scale=1 / labels.size)
    assert record.loss == pytest.approx(loss / counted, rel=1e-12)
    assert record.grad_norm == pytest.approx(whole.gradient_norm(), rel=1e-6)


def test_accumulation_sees_the_same_rows_as_one_batch(make_run: MakeRun) -> None:
    one, parts = make_run(batch_size=8, epochs=2), make_run(batch_size=2, grad_accum=4, epochs=2)
    assert one.run.total_steps == parts.run.total_steps == 6
    np.testing.assert_allclose(one.run.go().loss, parts.run.go().loss, rtol=1e-5)
    seen = [np.concatenate([batch[0] for batch in made.trainer.batches]) for made in (one, parts)]
    assert np.array_equal(*seen)


def test_an_epoch_sees_each_example_once_in_an_order_of_its_own(make_run: MakeRun) -> None:
    made = make_run(epochs=2)
    history = made.run.go()
    assert history.steps_per_epoch == 6
    assert [record.epoch for record in history.steps] == [1] * 6 + [2] * 6
    sizes = [made.trainer.batches[index][2] for index in range(12)]
    epochs = [np.concatenate(sizes[:6]).tolist(), np.concatenate(sizes[6:]).tolist()]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(row[0].tokens.size for row in documents().all_rows())
    assert epochs[0] != epochs[1]


def test_the_seed_decides_order_and_dropout_and_nothing_else_is_random(make_run: MakeRun, stream: Stream) -> None:
    for source in (None, stream):
        runs = [make_run(source, max_steps=9, seed=seed, trainer={"dropout": 0.3}) for seed in (5, 5, 6)]
        losses = [made.run.go().loss for made in runs]
        assert losses[0] == losses[1] != losses[2]
        assert runs[0].weights.bits() == runs[1].weights.bits()
    assert len({dropout_seed(seed, step, part) for seed in (0, 1) for step in (0, 1) for part in (0, 1)}) == 8


def test_gradients_are_clipped_to_the_norm(make_run: MakeRun) -> None:
    scales: list[float] = []
    made = make_run(max_steps=3, options={"clip_norm": 0.01})
    step = made.trainer.step

    def noted(*, lr: float, gradient_scale: float = 1.0) -> None:
        scales.append(gradient_scale)
        step(lr=lr, gradient_scale=gradient_scale)

    made.trainer.step = noted  # type: ignore[method-assign]
    norms = made.run.go().grad_norm
    assert scales == pytest.approx([0.01 / (norm + 1e-6) for norm in norms])
    assert max(scales) < 1


def test_learning_rates_are_those_of_the_schedule(make_run: MakeRun) -> None:
    made = make_run(max_steps=6, options={"lr": 0.4, "schedule": "linear", "warmup": 2, "min_lr": 0.0})
    history = made.run.go()
    assert history.lr == pytest.approx([0.2, 0.4, 0.4, 0.3, 0.2, 0.1])
    assert made.trainer.rates == history.lr


def test_one_batch_can_be_learned_by_heart(make_run: MakeRun) -> None:
    made = make_run(max_steps=4, overfit_batch=True)
    made.run.go()
    first = made.trainer.batches[0]
    for batch in made.trainer.batches[1:]:
        assert all(np.array_equal(*pair) for pair in zip(batch, first, strict=True))


# -- validation -------------------------------------------------------------------------------------------------------


def test_validation_scores_the_whole_split_in_consecutive_windows() -> None:
    ids = tokens(103)
    trainer = BigramTrainer(BigramWeights(VOCABULARY))
    expected, counted, correct = trainer.evaluate(ids[:-1], ids[1:], np.array([102]))
    for context, rows in [(16, 4), (7, 100), (102, 1), (500, 3), (1, 5)]:
        found = evaluate(trainer, Stream(ArrayReader(ids), context), rows)
        assert found.tokens == counted == 102
        assert found.loss == pytest.approx(expected / counted, rel=1e-12)
        assert found.accuracy == correct / counted
        assert found.perplexity == pytest.approx(math.exp(found.loss))


@pytest.mark.parametrize(("every", "expected"), [(None, [6, 12]), (5, [5, 10, 12]), (12, [12]), (100, [12])])
def test_validation_comes_each_epoch_or_so_many_steps_and_at_the_end(
    make_run: MakeRun, every: int | None, expected: list[int]
) -> None:
    history = make_run(None, documents(seed=9), epochs=2, validate_every=every).run.go()
    assert [each.step for each in history.validations] == expected
    assert history.validations[0].perplexity is None
    assert history.epochs[-1]["val_loss"] == history.val_loss[-1]


def test_a_run_ends_early_when_validation_no_longer_falls(make_run: MakeRun) -> None:
    # What is learned is nothing of what is asked.
    rng = np.random.default_rng(0)
    noise = rng.integers(0, VOCABULARY, 200).astype(np.int32)
    made = make_run(
        None, Stream(ArrayReader(noise), 20), epochs=50, options={"lr": 0.3}, callbacks=[EarlyStopping(patience=2)]
    )
    history = made.run.go()
    assert history.stopped.startswith("early: ")
    best = int(np.argmin(history.val_loss))
    assert len(history.val_loss) == best + 3 < 50


def test_a_callback_may_be_used_again(make_run: MakeRun) -> None:
    rng = np.random.default_rng(0)
    noise = Stream(ArrayReader(rng.integers(0, VOCABULARY, 200).astype(np.int32)), 20)
    stopping = EarlyStopping(patience=2)
    settings: dict[str, Any] = {"epochs": 50, "options": {"lr": 0.3}}
    fresh = make_run(None, noise, **settings, callbacks=[EarlyStopping(patience=2)]).run.go()
    for _ in range(2):
        assert make_run(None, noise, **settings, callbacks=[stopping]).run.go().val_loss == fresh.val_loss


def test_a_loss_that_is_no_number_in_validation_raises(make_run: MakeRun) -> None:
    made = make_run(None, documents(), max_steps=1)
    made.weights.values["bias"][0] = np.nan
    with pytest.raises(llama_ext.NumericError, match="validation loss"):
        evaluate(made.trainer, documents(), 4)


# -- outliers ---------------------------------------------------------------------------------------------------------


class Spikes:
    """Makes the gradients of some steps large, or the loss no number."""

    def __init__(self, trainer: BigramTrainer, at: dict[int, float]) -> None:
        self._accumulate = trainer.accumulate
        self._at = at
        self._calls = 0
        trainer.accumulate = self  # type: ignore[assignment]

    def __call__(self, *arguments: Any, scale: float, seed: int) -> tuple[float, int]:
        self._calls += 1
        loss, counted = self._accumulate(*arguments, scale=scale * self._at.get(self._calls, 1.0), seed=seed)
        return loss * self._at.get(self._calls, 1.0), counted


def test_an_outlier_changes_nothing_and_the_run_goes_on(make_run: MakeRun, stream: Stream) -> None:
    made = make_run(stream, max_steps=60, options={"skip_outliers": 5})
    Spikes(made.trainer, {20: 3.0, 40: 1000.0, 50: math.nan})
    bits: list[bytes] = []

    class Note(Callback):
        def on_step_end(self, run: Any, record: Any) -> None:
            bits.append(made.weights.bits() + made.trainer.moment_bits())

    made.run._settings = RunSettings(batch_size=4, max_steps=60, callbacks=[Note()], verbose=0)
    history = made.run.go()
    # Of the first 32 steps none is known to be an outlier.
    assert [record.step for record in history.steps if record.skipped] == [40, 50]
    assert bits[39] == bits[38] != bits[37]
    assert bits[49] == bits[48]
    assert made.trainer.steps == 58
    assert len(history.steps) == 60


def test_without_skipping_a_number_that_is_not_finite_raises_and_changes_nothing(make_run: MakeRun) -> None:
    made = make_run(max_steps=5)
    Spikes(made.trainer, {3: math.nan})
    with pytest.raises(llama_ext.NumericError, match=r"step 3: the loss is nan.*skip_outliers"):
        made.run.go()
    assert made.trainer.steps == 2
    assert made.trainer.gradient_norm() == 0.0
    assert np.isfinite(made.weights.values["table"]).all()


def test_a_run_of_outliers_ends_with_an_error(make_run: MakeRun, stream: Stream) -> None:
    made = make_run(stream, max_steps=200, options={"skip_outliers": 6})
    Spikes(made.trainer, dict.fromkeys(range(40, 200), math.nan))
    with pytest.raises(llama_ext.NumericError, match="32 steps in a row"):
        made.run.go()
    assert made.run.step == 39 + 32


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("accumulate", MemoryError),
        ("accumulate", llama_ext.NumericError),
        ("step", MemoryError),
        ("step", llama_ext.NumericError),
        ("step", KeyboardInterrupt),
    ],
)
def test_a_step_that_fails_leaves_no_gradients(make_run: MakeRun, name: str, error: type[BaseException]) -> None:
    made = make_run(max_steps=5, grad_accum=2)
    function = getattr(made.trainer, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        if made.trainer.steps == 2 and made.trainer.gradient_norm() > 0:
            raise error
        return function(*arguments, **options)

    setattr(made.trainer, name, failing)
    with pytest.raises(error):
        made.run.go()
    assert made.trainer.steps == made.run.step == 2
    assert made.trainer.gradient_norm() == 0.0


# -- callbacks and logs -----------------------------------------------------------------------------------------------


def test_callbacks_are_called_in_order_and_may_stop(make_run: MakeRun) -> None:
    calls: list[Any] = []

    class Note(Callback):
        def on_start(self, run: Any, resumed: bool) -> None:
            calls.append(("start", run.step, run.total_steps, resumed))

        def on_step_end(self, run: Any, record: Any) -> None:
            calls.append(("step", run.step, record.step))
            if record.step == 8:
                run.stop("enough")

        def on_validation(self, run: Any, validation: Any) -> None:
            calls.append(("validation", validation.step))

        def on_epoch_end(self, run: Any, epoch: int) -> None:
            calls.append(("epoch", epoch))

    history = make_run(None, documents(), epochs=3, callbacks=[Note()]).run.go()
    assert history.stopped == "enough"
    steps = [("step", step, step) for step in range(1, 9)]
    assert calls == [("start", 0, 18, False), *steps[:6], ("validation", 6), ("epoch", 1), *steps[6:]]


def test_callbacks_of_a_generator_are_called_as_those_of_a_list(make_run: MakeRun) -> None:
    steps: list[int] = []

    class Note(Callback):
        def on_step_end(self, run: Any, record: Any) -> None:
            steps.append(record.step)

    make_run(max_steps=3, callbacks=(each for each in [Note(), Note()])).run.go()
    assert steps == [1, 1, 2, 2, 3, 3]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_names_the_log(make_run: MakeRun) -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        make_run(max_steps=1, log_file="/dev/full").run.go()


def test_the_log_has_a_json_object_for_each_event(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    made = make_run(
        None, documents(), max_steps=3, log_file=path, checkpoint_dir=tmp_path / "c", peak_flops=1e12, seed=3
    )
    history = made.run.go()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "step", "step", "step", "validation", "checkpoint", "end"]
    assert lines[0]["fit"]["seed"] == 3
    for line, record in zip(lines[1:4], history.steps, strict=True):
        assert line["loss"] == record.loss
        assert line["lr"] == record.lr
        assert line["grad_norm"] == record.grad_norm
        assert line["share_of_peak"] == pytest.approx(line["tokens_per_second"] * 6 * VOCABULARY**2 / 1e12)
        assert line["eta_seconds"] >= 0
    assert lines[1]["smoothed_loss"] == pytest.approx(history.loss[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": 1.5}, "epochs"),
        ({"max_steps": -1}, "max_steps"),
        ({"epochs": 3, "max_steps": 2}, "epochs=3 and max_steps=2 both say how long the run is: give one of them"),
        ({"grad_accum": True}, "grad_accum"),
        ({"seed": -1}, "seed"),
        ({"verbose": "x"}, "verbose"),
        ({"resume": True}, "checkpoint_dir"),
        ({"save_every": 5}, "checkpoint_dir"),
        ({"keep_best": True}, "checkpoint_dir"),
        ({"callbacks": [print]}, "callbacks"),
        ({"callbacks": None}, "callbacks must be a list"),
        ({"peak_flops": 0}, "peak_flops"),
        ({"overfit_batch": "false"}, "overfit_batch must be True or False, got 'false'"),
        ({"keep_best": 1, "checkpoint_dir": "x"}, "keep_best must be True or False, got 1"),
        ({"resume": 0}, "resume must be True, False or the path of a checkpoint, got 0"),
        ({"checkpoint_dir": 5}, "checkpoint_dir must be a path, got 5"),
        ({"checkpoint_dir": ""}, "checkpoint_dir must be a path, got ''"),
        ({"log_file": True}, "log_file must be a path, got True"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(llama_ext.OptionError, match=words):
        RunSettings(**settings)


def test_what_needs_validation_data_says_so(make_run: MakeRun) -> None:
    with pytest.raises(llama_ext.OptionError, match="validation_data"):
        make_run(validate_every=3)


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


def interrupt(_: int = 0) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("at", [1, 4, 9])
def test_ctrl_c_ends_a_run_after_its_last_whole_step(make_run: MakeRun, at: int) -> None:
    whole = make_run(max_steps=at - 1) if at > 1 else None
    if whole is not None:
        whole.run.total_steps = 12
        whole.run._settings = RunSettings(batch_size=4, verbose=0, callbacks=[_StopAt(at - 1)])
        whole.run.go()
    made = make_run(epochs=2)
    made.trainer.before_accumulate = lambda calls: interrupt() if calls == at else None
    history = made.run.go()
    assert history.stopped == "interrupted"
    assert len(history.steps) == made.trainer.steps == at - 1
    assert made.trainer.gradient_norm() == 0.0
    assert made.weights.bits() == (BigramWeights(VOCABULARY) if whole is None else whole.weights).bits()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class _StopAt(Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, run: Any, record: Any) -> None:
        if record.step == self._step:
            run.stop("here")


def test_a_second_ctrl_c_raises(make_run: MakeRun, folder: Path) -> None:
    made = make_run(epochs=2, checkpoint_dir=folder)
    made.trainer.before_accumulate = lambda calls: interrupt() if calls == 3 else None
    save = made.weights.save

    def interrupted(path: Path) -> None:
        interrupt()
        save(path)

    made.weights.save = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        made.run.go()
    assert not folder.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_a_step_of_the_optimiser_waits_for_its_end(make_run: MakeRun) -> None:
    made = make_run(epochs=2)
    step = made.trainer.step

    def interrupted(**options: Any) -> None:
        if made.trainer.steps == 2:
            interrupt()
        step(**options)

    made.trainer.step = interrupted  # type: ignore[method-assign]
    history = made.run.go()
    assert history.stopped == "interrupted"
    assert len(history.steps) == made.trainer.steps == 3


def test_an_interrupt_that_is_no_ctrl_c_is_not_swallowed(make_run: MakeRun) -> None:
    class Raise(Callback):
        def on_step_end(self, run: Any, record: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_run(epochs=2, callbacks=[Raise()]).run.go()


def test_another_thread_trains_without_touching_signals(make_run: MakeRun) -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(make_run(max_steps=2).run.go().stopped))
    thread.start()
    thread.join()
    assert found == ["done"]


@pytest.mark.usefixtures("uncovered")
def test_two_hundred_interrupts_at_any_moment_leave_whole_steps(make_run: MakeRun) -> None:
    """A timer that fires anywhere in a run, also between the lines of the loop."""
    reference: dict[int, bytes] = {}

    class Note(Callback):
        def on_step_end(self, run: Any, record: Any) -> None:
            reference[record.step] = made.weights.bits()

    made = make_run(epochs=4, callbacks=[Note()])
    reference[0] = made.weights.bits()
    made.run.go()
    rng = np.random.default_rng(0)
    interrupted = 0

    def alarm(*_: Any) -> None:
        # Before a run has begun, or after its end, it would be the test that is interrupted.
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            interrupt()

    previous = signal.signal(signal.SIGALRM, alarm)
    try:
        for _ in range(200):
            made = make_run(epochs=4)
            signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(2e-4, 8e-3)))
            history = made.run.go()
            signal.setitimer(signal.ITIMER_REAL, 0)
            interrupted += history.stopped == "interrupted"
            assert made.weights.bits() == reference[len(history.steps)]
            assert made.trainer.gradient_norm() == 0.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted > 20


# -- rows -------------------------------------------------------------------------------------------------------------


def test_examples_without_labels_are_nothing_to_learn_from() -> None:
    with pytest.raises(llama_ext.OptionError, match="nothing to train on"):
        Examples([])


def test_labels_that_do_not_count_do_not_count(make_run: MakeRun) -> None:
    ids = tokens(9)
    labels = ids[1:].copy()
    labels[:5] = IGNORED
    made = make_run(Examples([(Example(ids[:-1], labels),)]), max_steps=1)
    made.run.go()
    assert made.trainer.scales == [1 / 3]
