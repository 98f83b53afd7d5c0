"""Runs that save checkpoints, and kills of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigram_runs import Made, bigram_run, documents
from llama_ext.training import checkpoints
from llama_ext.training.checkpoints import load_checkpoint

COMMON: dict[str, Any] = {
    "options": {"warmup": 4, "skip_outliers": 6},
    "trainer": {"dropout": 0.2},
    "grad_accum": 2,
    "batch_size": 2,
    "max_steps": 20,
}


def same(first: Made, second: Made) -> None:
    assert first.weights.bits() == second.weights.bits()
    assert first.trainer.moment_bits() == second.trainer.moment_bits()
    assert first.trainer.steps == second.trainer.steps
    histories = [made.run.history for made in (first, second)]
    for name in ("loss", "lr", "grad_norm", "val_loss"):
        ours, theirs = (getattr(history, name) for history in histories)
        assert ours == theirs, name
    assert [each.epoch for each in histories[0].steps] == [each.epoch for each in histories[1].steps]


def interrupt_validation(made: Made, step: int) -> None:
    """Has Ctrl-C come in the validation after a step."""
    validate = made.trainer.evaluate

    def interrupted(*arguments: Any) -> Any:
        if made.run.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return validate(*arguments)

    made.trainer.evaluate = interrupted  # type: ignore[method-assign]


def begin_unfinished(folder: Path, **settings: Any) -> None:
    """A run of 20 steps that is interrupted in the validation after its last step."""
    begun = bigram_run(None, documents(seed=7), **COMMON, **settings, checkpoint_dir=folder)
    interrupt_validation(begun, 20)
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


def ends_within(steps: int, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether something ends with so many renames and removals; otherwise it is cut short at the next one."""
    with monkeypatch.context() as patched:
        Crash(steps, patched)
        try:
            work()
        except OSError:
            return False
    return True
