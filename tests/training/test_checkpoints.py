"""A run that goes on from a checkpoint ends with the same bits as one that was not interrupted."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from bigram_runs import Made, MakeRun, documents
from checkpoint_runs import COMMON, begin_unfinished, interrupt_validation, same
from llama_ext.training import Callback, EarlyStopping
from llama_ext.training.batches import Stream
from llama_ext.training.checkpoints import load_checkpoint
from llama_ext.training.token_file import ArrayReader
from stop_at import StopAt


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
    interrupt_validation(begun, 10)
    history = begun.run.go()
    assert (history.stopped, len(history.steps), len(history.validations)) == ("interrupted", 10, 1)
    stopping = EarlyStopping(100)
    ended = make_run(None, documents(seed=7), **settings, callbacks=[stopping], checkpoint_dir=folder, resume=True)
    ended.run.go()
    same(whole, ended)
    assert stopping.state() == whole.run._settings.callbacks[0].state()


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
    for state in ({"array": np.zeros(2)}, {"complex": 1j}, {"seen": {1: 2}}, {"seen": {1: 2, "a": 3}}, None):
        lowest.seen = state  # type: ignore[assignment]
        lowest.on_step_end = lambda run, record: None  # type: ignore[method-assign]
        made = make_run(**COMMON, callbacks=[lowest], checkpoint_dir=folder)
        with pytest.raises(llama_ext.OptionError, match=r"Lowest\.state\(\) returns cannot be saved"):
            made.run.go()
        assert made.trainer.calls == 0
        # Where nothing is saved it does not matter.
        make_run(**{**COMMON, "max_steps": 1}, callbacks=[lowest]).run.go()


@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError, AttributeError, llama_ext.CheckpointError])
def test_what_a_callback_raises_when_it_is_given_its_state_reaches_the_caller(
    make_run: MakeRun, folder: Path, kind: type[Exception]
) -> None:
    class Broken(Lowest):
        def load_state(self, state: Any) -> None:
            raise kind("a mistake in a callback")

    make_run(**COMMON, callbacks=[Broken(), StopAt(5)], checkpoint_dir=folder).run.go()
    made = make_run(**COMMON, callbacks=[Broken(), StopAt(7)], resume=folder)
    before = made.weights.bits()
    with pytest.raises(kind, match="a mistake in a callback") as caught:
        made.run.go()
    assert type(caught.value) is kind
    assert "malformed" not in str(caught.value)
    assert made.weights.bits() == before


def test_a_state_that_is_no_object_is_refused_before_a_callback_sees_it(make_run: MakeRun, folder: Path) -> None:
    make_run(**COMMON, callbacks=[EarlyStopping(), StopAt(5)], checkpoint_dir=folder).run.go()
    path = folder / "step-00000005" / "training.json"
    values = json.loads(path.read_text())
    values["state"]["callbacks"][0] = ["best"]
    path.write_text(json.dumps(values))
    with pytest.raises(llama_ext.CheckpointError, match=r"the state of a callback is \['best'\], expected an object"):
        make_run(**COMMON, callbacks=[EarlyStopping(), StopAt(7)], resume=folder).run.go()


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


@pytest.mark.parametrize("save_every", [None, 2])
def test_a_run_that_ended_early_has_ended_when_it_is_resumed(
    make_run: MakeRun, folder: Path, save_every: int | None
) -> None:
    rng = np.random.default_rng(0)
    noise = Stream(ArrayReader(rng.integers(0, 11, 200).astype(np.int32)), 20)
    settings: dict[str, Any] = {"epochs": 50, "options": {"lr": 0.3, "schedule": "constant"}}
    saves: dict[str, Any] = {"checkpoint_dir": folder, "save_every": save_every}
    ended = make_run(None, noise, **settings, **saves, callbacks=[EarlyStopping(2)])
    stopped = ended.run.go().stopped
    assert stopped.startswith("early: ")
    for _ in range(2):
        again = make_run(None, noise, **settings, **saves, callbacks=[EarlyStopping(2)], resume=True)
        assert again.run.go().stopped == stopped
        assert again.trainer.calls == 0
        same(ended, again)
    # With more patience it goes on as if it had had that from the beginning.
    settings["epochs"] = 8
    whole = make_run(None, noise, **settings, callbacks=[EarlyStopping(40)])
    whole.run.go()
    longer = make_run(None, noise, **settings, **saves, callbacks=[EarlyStopping(40)], resume=True)
    assert longer.run.go().stopped == "done"
    same(whole, longer)


def test_a_stop_before_a_validation_that_was_interrupted_is_not_forgotten(make_run: MakeRun, folder: Path) -> None:
    settings: dict[str, Any] = {**COMMON, "validate_every": 5}
    whole = make_run(None, documents(seed=7), **settings, callbacks=[StopAt(10)])
    assert whole.run.go().stopped == "here"
    begun = make_run(None, documents(seed=7), **settings, callbacks=[StopAt(10)], checkpoint_dir=folder)
    interrupt_validation(begun, 10)
    assert begun.run.go().stopped == "interrupted"
    ended = make_run(None, documents(seed=7), **settings, callbacks=[StopAt(10)], checkpoint_dir=folder, resume=True)
    assert ended.run.go().stopped == "here"
    same(whole, ended)


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


def test_no_checkpoint_is_an_error(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(llama_ext.CheckpointError, match="no checkpoint here"):
        make_run(**COMMON, resume=tmp_path).run.go()
    (tmp_path / "file").write_text("x")
    with pytest.raises(llama_ext.FormatError, match="found a file"):
        make_run(**COMMON, resume=tmp_path / "file").run.go()
