"""Whose checkpoints a folder holds: which of them go, which stay, and what another run may not touch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from bigram_runs import MakeRun, bigram_run, documents
from checkpoint_runs import COMMON, CONSTANT, contents, names, same
from llama_ext.training import Callback, checkpoints
from llama_ext.training.checkpoints import load_checkpoint, locked, restore, save_best


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


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_replacement_that_fails_leaves_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    first, second = bigram_run(max_steps=1), bigram_run(max_steps=2)
    for made in (first, second):
        made.run.go()
    path = save_best(folder, first.weights, 6)
    before = contents(folder)
    rename = os.rename
    failures = ["no"]

    def refused(source: Any, target: Any) -> None:
        if target == path and failures:
            raise OSError(failures.pop())
        rename(source, target)

    def exchange(source: Any, target: Any) -> bool:
        if exchanges:
            raise OSError(failures.pop())
        return False

    monkeypatch.setattr(os, "rename", refused)
    monkeypatch.setattr(checkpoints, "exchange", exchange)
    with pytest.raises(OSError, match="no"):
        save_best(folder, second.weights, 6)
    assert contents(folder) == before


def test_a_folder_has_one_run_at_a_time_and_a_kill_lets_the_next_one_in(make_run: MakeRun, folder: Path) -> None:
    words = f"checkpoint_dir {folder}: another run is saving there now"
    with locked(folder), pytest.raises(llama_ext.OptionError, match=words):
        make_run(**COMMON, checkpoint_dir=folder).run.go()
    assert not folder.exists()
    script = """
    import sys, time
    from pathlib import Path
    from llama_ext.training.checkpoints import locked
    with locked(Path(sys.argv[1])):
        print("locked", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(llama_ext.OptionError, match=words):
        make_run(**COMMON, checkpoint_dir=folder).run.go()
    process.kill()
    process.wait()
    process.stdout.close()
    make_run(**COMMON, checkpoint_dir=folder).run.go()
    assert names(folder)[-1] == "step-00000020"


def test_a_folder_with_checkpoints_of_another_run_is_not_mixed_with_this_one(make_run: MakeRun, folder: Path) -> None:
    make_run(**COMMON, checkpoint_dir=folder).run.go()
    with pytest.raises(llama_ext.OptionError, match="resume=True"):
        make_run(**COMMON, checkpoint_dir=folder).run.go()
