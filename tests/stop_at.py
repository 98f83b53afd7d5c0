"""A callback that ends a run of training."""

from __future__ import annotations

from typing import Any

from llama_ext.training import Callback


class StopAt(Callback):
    """Ends a run after a step; a run without has the same callbacks' names when it never stops."""

    def __init__(self, step: int = -1) -> None:
        self._step = step

    def on_step_end(self, run: Any, record: Any) -> None:
        if record.step == self._step:
            run.stop("here")
