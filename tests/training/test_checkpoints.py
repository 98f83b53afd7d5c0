"""Checkpoints: whole or absent, and a run that goes on from one ends with the same bits as one that was not interrupted."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from bigram_runs import Made, MakeRun, bigram_run, documents
from llama_ext.training import Callback, EarlyStopping
from llama_ext.training.batches import Stream
from llama_ext.training.checkpoints import load_checkpoint, restore, save_best
from llama_ext.training.token_file import ArrayReader

COMMON: dict[str, Any] = {
    "options": {"warmup": 4, "skip_outliers": 6},
    "trainer": {"dropout": 0.2},
    "grad_accum": 2,
    "batch_size": 2,
    "max_steps": 20,
}


class StopAt(Callback):
    """Ends a run after a step; a run without has the same callbacks' names when it never stops."""

    def __init__(self, step: int = -1) -> None:
        self._step = step

    def on_step_end(self, run: Any, record: Any) -> None:
        if record.step == self._step:
            run.stop("here")


def same(first: Made, second: Made) -> None:
    assert first.weights.bits() == second.weights.bits()
    assert first.trainer.moment_bits() == second.trainer.moment_bits()
    assert first.trainer.steps == second.trainer.steps
    histories = [made.run.history for made in (first, second)]
    for name in ("loss", "lr", "grad_norm", "val_loss"):
        ours, theirs = (getattr(history, name) for history in histories)
        assert ours == theirs, name
    assert [each.epoch for each in histories[0].steps] == [each.epoch for each in histories[1].steps]


@pytest.mark.parametrize("at", [1, 5, 6, 10, 19])
@pytest.mark.parametrize("kind", ["documents", "stream"])
def test_ten_and_ten_steps_are_twenty(make_run: MakeRun, folder: Path, stream: Stream, at: int, kind: str) -> None:
    source = stream if kind == "stream" else None
    whole = make_run(source, documents(seed=7), **COMMON, callbacks=[StopAt()], validate_every=5)
    assert whole.run.go().stopped == "done"
    begun = make_run(
        source, documents(seed=7), **COMMON, callbacks=[StopAt(at)], validate_every=5, checkpoint_dir=folder
    )
    assert begun.run.go().stopped == "here"
    ended = make_run(
        source,
        documents(seed=7),
        **COMMON,
        callbacks=[StopAt()],
        validate_every=5,
        checkpoint_dir=folder,
        resume=True,
    )
    assert ended.run.go().stopped == "done"
    assert len(ended.trainer.rates) == 20 - at
    same(whole, ended)


@pytest.mark.parametrize("at", [1, 7, 24])
def test_an_interrupted_run_goes_on_with_the_same_bits(make_run: MakeRun, folder: Path, at: int) -> None:
    whole = make_run(**COMMON)
    whole.run.go()
    begun = make_run(**COMMON, checkpoint_dir=folder)
    begun.trainer.before_accumulate = lambda calls: os.kill(os.getpid(), signal.SIGINT) if calls == at else None
    assert begun.run.go().stopped == "interrupted"
    assert [path.name for path in folder.iterdir()][-1].startswith("step-")
    ended = make_run(**COMMON, resume=folder)
    ended.run.go()
    same(whole, ended)


def test_a_validation_that_was_interrupted_is_made_up_for(make_run: MakeRun, folder: Path) -> None:
    settings = {**COMMON, "validate_every": 5}
    whole = make_run(None, documents(seed=7), **settings, callbacks=[EarlyStopping(100)])
    whole.run.go()
    begun = make_run(None, documents(seed=7), **settings, callbacks=[EarlyStopping(100)], checkpoint_dir=folder)
    validate = begun.trainer.evaluate

    def interrupted(*arguments: Any) -> Any:
        if begun.run.step == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return validate(*arguments)

    begun.trainer.evaluate = interrupted  # type: ignore[method-assign]
    history = begun.run.go()
    assert (history.stopped, len(history.steps), len(history.validations)) == ("interrupted", 10, 1)
    stopping = EarlyStopping(100)
    ended = make_run(None, documents(seed=7), **settings, callbacks=[stopping], checkpoint_dir=folder, resume=True)
    ended.run.go()
    same(whole, ended)
    assert stopping.state() == whole.run._settings.callbacks[0].state()


def begin_unfinished(folder: Path, **settings: Any) -> None:
    """A run of 20 steps that is interrupted in the validation after its last step."""
    begun = bigram_run(None, documents(seed=7), **COMMON, **settings, checkpoint_dir=folder)
    validate = begun.trainer.evaluate

    def interrupted(*arguments: Any) -> Any:
        if begun.run.step == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return validate(*arguments)

    begun.trainer.evaluate = interrupted  # type: ignore[method-assign]
    assert begun.run.go().stopped == "interrupted"
    assert load_checkpoint(folder).state["unfinished"] is True


def test_a_checkpoint_whose_validation_was_made_up_for_says_so(make_run: MakeRun, folder: Path) -> None:
    settings: dict[str, Any] = {"save_every": 5, "validate_every": 10, "keep_last": 1}
    begin_unfinished(folder, **settings)
    for again in range(2):
        ended = make_run(None, documents(seed=7), **COMMON, **settings, checkpoint_dir=folder, resume=True)
        validations = ended.run.go().validations
        assert [each.step for each in validations] == [10, 20]
        assert ended.trainer.calls == 0, again
        state = load_checkpoint(folder).state
        assert state["unfinished"] is False
        assert [each["loss"] for each in state["validations"]] == [each.loss for each in validations]
    # Nothing was left to make up for the second time.
    whole = make_run(None, documents(seed=7), **COMMON, validate_every=10)
    whole.run.go()
    same(whole, ended)


def test_a_checkpoint_that_is_finished_is_never_lost_in_doing_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The only one that the run has: a kill at any moment must leave it, as it was or finished.
    settings: dict[str, Any] = {"save_every": 100, "keep_last": 1}
    found = []
    for count in range(20):
        folder = tmp_path / str(count)
        begin_unfinished(folder, **settings)
        made = bigram_run(None, documents(seed=7), **COMMON, **settings, checkpoint_dir=folder, resume=True)
        ended = True
        with monkeypatch.context() as patched:
            Crash(count, patched)
            try:
                made.run.go()
            except OSError:
                ended = False
        again = bigram_run()
        restore(load_checkpoint(folder), again.trainer, again.weights)
        assert again.weights.bits() == made.weights.bits()
        assert load_checkpoint(folder).step == 20
        found.append(load_checkpoint(folder).state["unfinished"])
        if ended:
            break
    assert list(dict.fromkeys(found)) == [True, False]


# -- numbers that are not finite --------------------------------------------------------------------------------------


def test_an_infinite_perplexity_is_saved_and_comes_back(make_run: MakeRun, folder: Path) -> None:
    settings: dict[str, Any] = {**COMMON, "validate_every": 5, "callbacks": [StopAt(10)]}
    settings["options"] = {**COMMON["options"], "metrics": ["perplexity"]}

    def run(**more: Any) -> Made:
        made = make_run(None, documents(seed=7), **{**settings, **more})
        validate = made.trainer.evaluate

        def evaluate(*arguments: Any) -> tuple[float, int, int]:
            # 800 nats a label, of which exp is more than a float64 holds; from step 15 on what it is.
            loss, counted, correct = validate(*arguments)
            return loss + (800.0 * counted if made.run.step < 15 else 0.0), counted, correct

        made.trainer.evaluate = evaluate  # type: ignore[method-assign]
        return made

    run(checkpoint_dir=folder, save_every=1).run.go()
    assert "Infinity" not in (folder / "step-00000010" / "training.json").read_text()
    whole, ended = run(callbacks=[StopAt()]), run(callbacks=[StopAt()], checkpoint_dir=folder, resume=True)
    whole.run.go()
    history = ended.run.go()
    same(whole, ended)
    assert history.validations == whole.run.history.validations
    assert [each.perplexity == math.inf for each in history.validations] == [True, True, False, False]
    assert [each.accuracy for each in history.validations] == [None] * 4


class Lowest(Callback):
    """A callback that begins with an infinity, as many do."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"lowest": math.inf, "all": [-math.inf, {"none": math.nan}], "steps": 0}

    def on_step_end(self, run: Any, record: Any) -> None:
        self.seen["steps"] += 1

    def state(self) -> dict[str, Any]:
        return self.seen

    def load_state(self, state: Any) -> None:
        self.seen = dict(state)


def test_a_callback_may_remember_an_infinity(make_run: MakeRun, folder: Path) -> None:
    make_run(**COMMON, callbacks=[Lowest(), StopAt(5)], checkpoint_dir=folder).run.go()
    assert "Infinity" not in (folder / "step-00000005" / "training.json").read_text()
    lowest = Lowest()
    lowest.seen = {}
    make_run(**COMMON, callbacks=[lowest, StopAt(7)], resume=folder).run.go()
    assert repr(lowest.seen) == "{'all': [-inf, {'none': nan}], 'lowest': inf, 'steps': 7}"


def test_a_callback_that_cannot_be_saved_is_refused_before_the_first_step(make_run: MakeRun, folder: Path) -> None:
    lowest = Lowest()
    for state in ({"array": np.zeros(2)}, {"complex": 1j}, None):
        lowest.seen = state  # type: ignore[assignment]
        lowest.on_step_end = lambda run, record: None  # type: ignore[method-assign]
        made = make_run(**COMMON, callbacks=[lowest], checkpoint_dir=folder)
        with pytest.raises(llama_ext.OptionError, match=r"Lowest\.state\(\) returns cannot be saved"):
            made.run.go()
        assert made.trainer.calls == 0
        # Where nothing is saved it does not matter.
        make_run(**{**COMMON, "max_steps": 1}, callbacks=[lowest]).run.go()


def test_early_stopping_goes_on_counting(make_run: MakeRun, folder: Path) -> None:
    rng = np.random.default_rng(0)
    noise = Stream(ArrayReader(rng.integers(0, 11, 200).astype(np.int32)), 20)
    settings: dict[str, Any] = {"epochs": 50, "options": {"lr": 0.3, "schedule": "constant"}}
    whole = make_run(None, noise, **settings, callbacks=[EarlyStopping(3)])
    stopped = whole.run.go()
    for epochs in range(1, len(stopped.val_loss)):
        path = folder / str(epochs)
        make_run(
            None, noise, **{**settings, "epochs": epochs}, callbacks=[EarlyStopping(3)], checkpoint_dir=path
        ).run.go()
        ended = make_run(None, noise, **settings, callbacks=[EarlyStopping(3)], resume=path)
        assert ended.run.go().stopped == stopped.stopped
        same(whole, ended)


def test_the_last_checkpoints_stay_and_the_best_weights(make_run: MakeRun, folder: Path) -> None:
    made = make_run(None, documents(seed=7), epochs=5, checkpoint_dir=folder, save_every=4, keep_last=2, keep_best=True)
    history = made.run.go()
    best = history.validations[int(np.argmin(history.val_loss))].step
    assert sorted(os.listdir(folder)) == [f"best-{best:08d}", "step-00000028", "step-00000030"]
    assert load_checkpoint(folder).step == 30
    assert load_checkpoint(folder / "step-00000028").step == 28


def test_a_run_may_go_on_elsewhere_and_from_an_earlier_checkpoint(make_run: MakeRun, folder: Path) -> None:
    whole = make_run(**COMMON, checkpoint_dir=folder, save_every=5, keep_last=10)
    whole.run.go()
    for source in sorted(folder.glob("step-*")):
        other = make_run(**COMMON, resume=source, checkpoint_dir=folder.with_name("other-" + source.name), save_every=5)
        other.run.go()
        same(whole, other)
        assert load_checkpoint(folder.with_name("other-" + source.name)).step == 20
    again = make_run(**COMMON, resume=folder / "step-00000010", checkpoint_dir=folder, save_every=5, keep_last=10)
    again.run.go()
    same(whole, again)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CONSTANT: dict[str, Any] = {"options": {"schedule": "constant", "warmup": 2}, "batch_size": 2}


def test_a_run_that_went_back_keeps_its_new_checkpoint_and_its_later_ones(make_run: MakeRun, folder: Path) -> None:
    make_run(**CONSTANT, max_steps=6, checkpoint_dir=folder, save_every=2).run.go()
    assert names(folder) == ["step-00000002", "step-00000004", "step-00000006"]
    back: dict[str, Any] = {**CONSTANT, "checkpoint_dir": folder, "save_every": 1, "keep_last": 1}
    make_run(**back, max_steps=3, resume=folder / "step-00000002").run.go()
    assert names(folder) == ["step-00000003", "step-00000004", "step-00000006"]
    # The last step is the last step: what went back ended earlier, and says what to do.
    with pytest.raises(llama_ext.CheckpointError, match=r"6 steps are done, this run has 3\. .*resume="):
        make_run(**back, max_steps=3, resume=True).run.go()
    # Where it comes to steps that are there, they are its own, and the older ones go as ever.
    make_run(**back, max_steps=5, resume=folder / "step-00000003").run.go()
    assert names(folder) == ["step-00000005", "step-00000006"]
    ended = make_run(**back, max_steps=8, resume=True)
    ended.run.go()
    assert names(folder) == ["step-00000008"]
    whole = make_run(**CONSTANT, max_steps=8)
    whole.run.go()
    same(whole, ended)


def test_a_run_goes_back_to_before_a_damaged_checkpoint_and_replaces_it(make_run: MakeRun, folder: Path) -> None:
    settings: dict[str, Any] = {**CONSTANT, "max_steps": 6, "checkpoint_dir": folder, "save_every": 2}
    make_run(**settings).run.go()
    for name, damaged in [("bigram.safetensors", "step-00000004"), ("training.json", "step-00000006")]:
        path = folder / damaged / name
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(llama_ext.FormatError, match="step-00000006"):
        make_run(**settings, resume=True).run.go()
    make_run(**settings, resume=folder / "step-00000002").run.go()
    for step in (2, 4, 6):
        whole, made = make_run(**CONSTANT, max_steps=step), make_run()
        whole.run.go()
        restore(load_checkpoint(folder / f"step-{step:08d}"), made.trainer, made.weights)
        assert made.weights.bits() == whole.weights.bits()


def test_another_runs_folder_is_refused_and_nothing_in_it_is_touched(make_run: MakeRun, folder: Path) -> None:
    other = folder.with_name("other")
    make_run(**COMMON, checkpoint_dir=folder, save_every=5).run.go()
    make_run(**{**COMMON, "seed": 1}, checkpoint_dir=other, save_every=5).run.go()
    before = contents(other)
    made = make_run(**COMMON, checkpoint_dir=other, save_every=5, keep_last=1, resume=folder / "step-00000010")
    bits = made.weights.bits()
    with pytest.raises(
        llama_ext.OptionError, match=r"not of the run of .*step-00000010, such as step-.*: name another"
    ):
        made.run.go()
    assert made.weights.bits() == bits
    # Nor is one that nobody can tell the run of.
    for path in other.glob("*/training.json"):
        path.write_text("{}")
    with pytest.raises(llama_ext.OptionError, match="not of the run of"):
        make_run(**COMMON, checkpoint_dir=other, resume=folder / "step-00000010").run.go()
    assert set(contents(other)) == set(before)
    # A copy of the run's own folder is its own.
    shutil.rmtree(other)
    shutil.copytree(folder, other)
    make_run(**COMMON, checkpoint_dir=other, save_every=5, keep_last=1, resume=folder / "step-00000010").run.go()
    assert names(other) == ["step-00000020"]
    assert names(folder) == ["step-00000010", "step-00000015", "step-00000020"]


def test_what_comes_into_the_folder_meanwhile_is_not_removed(make_run: MakeRun, folder: Path) -> None:
    other = folder.with_name("other")
    make_run(**{**COMMON, "seed": 1}, checkpoint_dir=other, save_every=3, keep_last=10).run.go()

    class Copy(Callback):
        def on_step_end(self, run: Any, record: Any) -> None:
            if record.step == 8:
                shutil.copytree(other / "step-00000003", folder / "step-00000003")
                (folder / "step-00000001").mkdir()

    make_run(**COMMON, checkpoint_dir=folder, save_every=5, keep_last=2, callbacks=[Copy()]).run.go()
    assert names(folder) == ["step-00000001", "step-00000003", "step-00000015", "step-00000020"]
    assert contents(folder / "step-00000003") == contents(other / "step-00000003")


def test_the_best_weights_are_this_runs(make_run: MakeRun, folder: Path) -> None:
    # Of a run that was killed before its first checkpoint.
    stale = make_run(seed=9, max_steps=1)
    stale.run.go()
    save_best(folder, stale.weights, 6)
    bits: dict[int, bytes] = {}

    class Note(Callback):
        def on_validation(self, run: Any, validation: Any) -> None:
            bits[validation.step] = made.weights.bits()

    made = make_run(None, documents(seed=7), max_steps=6, checkpoint_dir=folder, keep_best=True, callbacks=[Note()])
    made.run.go()
    assert names(folder) == ["best-00000006", "step-00000006"]
    best = make_run()
    best.weights.load(folder / "best-00000006")
    assert best.weights.bits() == bits[6] != stale.weights.bits()


def test_a_replacement_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = bigram_run(max_steps=1), bigram_run(max_steps=2)
    for made in (first, second):
        made.run.go()
    path = save_best(folder, first.weights, 6)
    before = contents(folder)
    rename = os.rename

    def refused(source: Any, target: Any) -> None:
        if target == path and failures:
            raise OSError(failures.pop())
        rename(source, target)

    failures = ["no"]
    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(OSError, match="no"):
        save_best(folder, second.weights, 6)
    assert contents(folder) == before


def test_resume_true_begins_where_there_is_nothing(make_run: MakeRun, folder: Path) -> None:
    made = make_run(**COMMON, checkpoint_dir=folder, resume=True)
    assert len(made.run.go().steps) == 20
    # And does nothing where all is done.
    again = make_run(**COMMON, checkpoint_dir=folder, resume=True)
    assert len(again.run.go().steps) == 20
    assert again.trainer.calls == 0
    same(made, again)


def test_a_run_with_a_constant_rate_may_become_longer(make_run: MakeRun, folder: Path) -> None:
    settings: dict[str, Any] = {**COMMON, "options": {"schedule": "constant", "warmup": 3}}
    whole = make_run(**settings)
    whole.run.go()
    make_run(**{**settings, "max_steps": 10}, checkpoint_dir=folder).run.go()
    longer = make_run(**settings, resume=folder)
    longer.run.go()
    same(whole, longer)


def test_a_run_shorter_than_its_warm_up_may_not_become_longer(make_run: MakeRun, folder: Path) -> None:
    # Its learning rate rose within the steps that it had.
    settings: dict[str, Any] = {**COMMON, "options": {"schedule": "constant", "warmup": 12}}
    short = make_run(**{**settings, "max_steps": 10}, checkpoint_dir=folder).run.go()
    assert short.lr[:10] != make_run(**settings).run.go().lr[:10]
    with pytest.raises(llama_ext.CheckpointError, match=r"fit\.total_steps was 10"):
        make_run(**settings, resume=folder).run.go()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": {"warmup": 4, "skip_outliers": 6, "lr": 0.06}}, r"compile\.lr was 0\.05 and is 0\.06"),
        ({"options": {"warmup": 4, "skip_outliers": 6, "betas": (0.9, 0.99)}}, r"compile\.betas was \[0\.9, 0\.95\]"),
        ({"batch_size": 4}, r"fit\.batch_size was 2 and is 4"),
        ({"grad_accum": 1}, r"fit\.grad_accum was 2 and is 1"),
        ({"seed": 1}, r"fit\.seed was 0 and is 1"),
        ({"max_steps": 21}, r"fit\.total_steps was 20 and is 21"),
        ({"source": documents(seed=3)}, r"data was \"[0-9a-f.]+ and is"),
        ({"validation": documents(seed=3)}, r"validation_data was null and is"),
        ({"callbacks": [StopAt()]}, r"fit\.callbacks was \[\] and is \[\"StopAt\"\]"),
    ],
)
def test_a_run_with_other_settings_or_data_is_refused(
    make_run: MakeRun, folder: Path, change: dict[str, Any], words: str
) -> None:
    make_run(**COMMON, checkpoint_dir=folder, save_every=10).run.go()
    made = make_run(**{**COMMON, **change}, resume=folder / "step-00000010")
    before = made.weights.bits()
    with pytest.raises(llama_ext.CheckpointError, match=words):
        made.run.go()
    assert made.weights.bits() == before


def test_another_model_is_refused(make_run: MakeRun, folder: Path) -> None:
    make_run(**COMMON, checkpoint_dir=folder).run.go()
    made = make_run(**COMMON, resume=folder)
    made.weights.name = "trigram"
    with pytest.raises(llama_ext.CheckpointError, match=r"model\.kind"):
        made.run.go()


def test_a_folder_with_checkpoints_of_another_run_is_not_mixed_with_this_one(make_run: MakeRun, folder: Path) -> None:
    make_run(**COMMON, checkpoint_dir=folder).run.go()
    with pytest.raises(llama_ext.OptionError, match="resume=True"):
        make_run(**COMMON, checkpoint_dir=folder).run.go()


def test_no_checkpoint_is_an_error(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(llama_ext.CheckpointError, match="no checkpoint here"):
        make_run(**COMMON, resume=tmp_path).run.go()
    (tmp_path / "file").write_text("x")
    with pytest.raises(llama_ext.FormatError, match="found a file"):
        make_run(**COMMON, resume=tmp_path / "file").run.go()


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(folder: Path) -> Path:
    bigram_run(**{**COMMON, "max_steps": 3}, checkpoint_dir=folder).run.go()
    return folder / "step-00000003"


def _resume(saved: Path) -> None:
    bigram_run(**{**COMMON, "max_steps": 3}, resume=saved).run.go()


def test_every_truncation_of_a_checkpoint_is_a_typed_error(saved: Path) -> None:
    for name in ("training.json", "training.safetensors"):
        data = (saved / name).read_bytes()
        for size in {0, 1, 7, 8, 9, *range(10, len(data) - 2, max(1, len(data) // 60)), len(data) - 2}:
            (saved / name).write_bytes(data[:size])
            with pytest.raises((llama_ext.FormatError, llama_ext.LimitError)):
                _resume(saved)
        (saved / name).unlink()
        with pytest.raises((llama_ext.FormatError, llama_ext.LimitError)):
            _resume(saved)
        (saved / name).write_bytes(data)
    _resume(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"step": -1},
        {"step": "3"},
        {"step": True},
        {"step": 10**30},
        {"step": 2},
        {"optimizer_steps": None},
        {"run": 5},
        {"settings": []},
        {"state": {}},
        {"state": {"validations": 3, "callbacks": [], "unfinished": False}},
        {"state": {"validations": [{"loss": 1}], "callbacks": [], "unfinished": False}},
        {"state": {"validations": [{"step": 1, "loss": "1"}], "callbacks": [], "unfinished": False}},
        {"state": {"validations": [{"step": 1, "loss": 1.0, "bleu": 1.0}], "callbacks": [], "unfinished": False}},
        {"state": {"validations": [], "callbacks": [{}], "unfinished": False}},
        {"state": {"validations": [], "unfinished": False}},
    ],
)
def test_a_malformed_state_is_a_typed_error(saved: Path, change: dict[str, Any]) -> None:
    path = saved / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(llama_ext.CheckpointError):
        _resume(saved)


def test_moments_of_other_names_or_shapes_are_refused(saved: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = saved / "training.safetensors"
    tensors = load_file(path)
    checkpoint = load_checkpoint(saved)
    for change, words in [
        ({"first/bias": None}, "first/bias is missing"),
        ({"third/bias": np.zeros(11, np.float32)}, "third/bias is not one"),
        ({"second/bias": np.zeros(12, np.float32)}, r"second/bias must be F32 \(11,\), got F32 \(12,\)"),
        ({"second/bias": np.zeros(11, np.float64)}, "got F64"),
    ]:
        changed = {name: each for name, each in {**tensors, **change}.items() if each is not None}
        save_file(changed, path)
        made = bigram_run()
        with pytest.raises(llama_ext.CheckpointError, match=words):
            restore(checkpoint, made.trainer, made.weights)


# -- kills ------------------------------------------------------------------------------------------------------------

_SAVER = """
import sys
import numpy as np
sys.path[:0] = {paths!r}
from bigram_runs import bigram_run
made = bigram_run(max_steps=100000, checkpoint_dir=sys.argv[1], save_every=1, keep_last=2, resume=True,
                  options={{"schedule": "constant"}})
print("begun", flush=True)
made.run.go()
"""


@pytest.mark.slow
def test_a_kill_while_saving_leaves_whole_checkpoints(folder: Path) -> None:
    """kill -9 at random moments of a run that does little else than save: what is there can be gone on from, step after step."""
    paths = [str(Path(__file__).parents[1]), *[path for path in sys.path if path]]
    rng = random.Random(0)
    step = 0
    for _ in range(25):
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVER.format(paths=paths), str(folder)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.12))
        process.kill()
        process.wait()
        process.stdout.close()
        if not folder.exists() or not list(folder.glob("step-*")):
            assert step == 0
            continue
        # Each one that is visible is whole, and none was lost.
        for path in folder.glob("step-*"):
            made = bigram_run()
            restore(load_checkpoint(path), made.trainer, made.weights)
            assert made.trainer.steps == load_checkpoint(path).step
        assert load_checkpoint(folder).step >= step
        step = load_checkpoint(folder).step
    assert step > 25
    straight = bigram_run(max_steps=step, options={"schedule": "constant"})
    straight.run.go()
    made = bigram_run()
    restore(load_checkpoint(folder), made.trainer, made.weights)
    assert made.weights.bits() == straight.weights.bits()
    # What kills left behind goes with the next save.
    bigram_run(
        max_steps=step + 1, checkpoint_dir=folder, resume=True, keep_last=2, options={"schedule": "constant"}
    ).run.go()
    assert all(name.startswith("step-") for name in os.listdir(folder))


class Crash:
    """Lets a number of renames and removals happen; from then on none does, as if the process had been killed."""

    def __init__(self, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left = steps
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise OSError("killed")
            return function(*arguments, **options)

        return call


def test_a_save_that_is_cut_short_at_any_step_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for count in range(60):
        folder = tmp_path / str(count)
        begun = bigram_run(**COMMON, checkpoint_dir=folder, callbacks=[StopAt(4)], keep_last=1, save_every=100)
        begun.run.go()
        made = bigram_run(
            **COMMON, checkpoint_dir=folder, resume=True, callbacks=[StopAt(8)], keep_last=1, save_every=100
        )
        ended = True
        with monkeypatch.context() as patched:
            Crash(count, patched)
            try:
                made.run.go()
            except OSError:
                ended = False
        checkpoint = load_checkpoint(folder)
        again = bigram_run()
        restore(checkpoint, again.trainer, again.weights)
        found.append(checkpoint.step)
        if ended:
            break
    assert list(dict.fromkeys(found)) == [4, 8]


def test_a_run_that_went_back_is_cut_short_at_any_step_and_still_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {**CONSTANT, "max_steps": 6, "save_every": 2}
    whole = bigram_run(**settings, checkpoint_dir=tmp_path / "whole")
    whole.run.go()
    for count in range(200):
        folder = tmp_path / str(count)
        shutil.copytree(tmp_path / "whole", folder)
        settings = {**settings, "checkpoint_dir": folder, "keep_last": 1}
        ended = True
        with monkeypatch.context() as patched:
            Crash(count, patched)
            try:
                bigram_run(**settings, resume=folder / "step-00000002").run.go()
            except OSError:
                ended = False
        again = bigram_run(**settings, resume=True)
        again.run.go()
        same(whole, again)
        if ended:
            break
    assert count > 20
    assert ended
    assert [name for name in names(folder) if name[0] != "."] == ["step-00000006"]
