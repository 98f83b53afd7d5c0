"""Runs that save checkpoints, and kills of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bigram_runs import Made, bigram_run, documents
from llama_ext.training import Callback, checkpoints
from llama_ext.training.checkpoints import load_checkpoint

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


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CONSTANT: dict[str, Any] = {"options": {"schedule": "constant", "warmup": 2}, "batch_size": 2}


class Crash:
    """Lets a number of renames and removals happen; from then on none does, as if the process had been killed."""

    def __init__(self, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left = steps
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(checkpoints, "exchange", self._counted(checkpoints.exchange))

    def _counted(self, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise OSError("killed")
            return function(*arguments, **options)

        return call
