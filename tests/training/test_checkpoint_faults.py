"""Checkpoints that are damaged are typed errors, and a kill at any moment leaves whole ones."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from bigram_runs import Made, bigram_run, documents
from checkpoint_runs import COMMON, CONSTANT, begin_unfinished, ends_within, names, same
from llama_ext.io.atomic import exchange
from llama_ext.training import checkpoints
from llama_ext.training.checkpoints import load_checkpoint, restore, save_checkpoint
from stop_at import StopAt


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
        ended = ends_within(count, made.run.go, monkeypatch)
        again = bigram_run()
        restore(load_checkpoint(folder), again.trainer, again.weights)
        assert again.weights.bits() == made.weights.bits()
        assert load_checkpoint(folder).step == 20
        found.append(load_checkpoint(folder).state["unfinished"])
        if ended:
            break
    assert list(dict.fromkeys(found)) == [True, False]


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
        {"format": 1},
        {"crc32": []},
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
        {"state": {"validations": [], "callbacks": 3, "unfinished": False}},
        {"state": {"validations": [], "unfinished": False}},
        {"state": {"validations": [], "callbacks": [], "unfinished": False, "stop": 3}},
    ],
)
def test_a_malformed_state_is_a_typed_error(saved: Path, change: dict[str, Any]) -> None:
    path = saved / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    made = bigram_run(**{**COMMON, "max_steps": 3}, resume=saved)
    before = made.weights.bits()
    with pytest.raises(llama_ext.CheckpointError):
        made.run.go()
    assert made.weights.bits() == before


@pytest.mark.parametrize("name", ["bigram.safetensors", "training.safetensors"])
def test_a_byte_that_has_changed_is_told_and_nothing_is_taken(saved: Path, name: str) -> None:
    data = bytearray((saved / name).read_bytes())
    data[len(data) * 3 // 4] ^= 1
    (saved / name).write_bytes(data)
    made = bigram_run(**{**COMMON, "max_steps": 3}, resume=saved)
    before = made.weights.bits()
    with pytest.raises(
        llama_ext.CheckpointError, match=f"{name} is damaged: its checksum is [0-9a-f]{{8}}. Remove this checkpoint"
    ):
        made.run.go()
    assert made.weights.bits() == before


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
    step = kills = 0
    # On a busy machine a process does not come far before it is killed: there are more of them then.
    while kills < 25 or step <= 25:
        kills += 1
        assert kills < 250
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
        ended = ends_within(count, made.run.go, monkeypatch)
        checkpoint = load_checkpoint(folder)
        again = bigram_run()
        restore(checkpoint, again.trainer, again.weights)
        found.append(checkpoint.step)
        if ended:
            break
    assert list(dict.fromkeys(found)) == [4, 8]


def _save_third_step(folder: Path, made: Made, *, run: str) -> None:
    save_checkpoint(folder, made.trainer, made.weights, step=3, run=run, settings={}, state={}, arrays={}, keep_last=1)


def test_a_step_saved_again_is_there_whatever_cuts_the_save_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    found = []
    for count in range(60):
        folder = tmp_path / str(count)
        made = bigram_run()
        _save_third_step(folder, made, run="first")
        ended = ends_within(count, functools.partial(_save_third_step, folder, made, run="second"), monkeypatch)
        restore(load_checkpoint(folder), made.trainer, made.weights)
        found.append(load_checkpoint(folder).run)
        if ended:
            break
    assert list(dict.fromkeys(found)) == ["first", "second"]


def test_a_step_is_saved_again_where_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "exchange", lambda *paths: False)
    for run in ("first", "second"):
        _save_third_step(tmp_path, bigram_run(), run=run)
        assert load_checkpoint(tmp_path).run == run
        assert names(tmp_path) == ["step-00000003"]


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
        made = bigram_run(**settings, resume=folder / "step-00000002")
        ended = ends_within(count, made.run.go, monkeypatch)
        again = bigram_run(**settings, resume=True)
        again.run.go()
        same(whole, again)
        if ended:
            break
    assert count > 20
    assert ended
    assert [name for name in names(folder) if name[0] != "."] == ["step-00000006"]
