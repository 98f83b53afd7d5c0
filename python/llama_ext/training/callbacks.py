"""What a caller hooks into a training run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llama_ext._options import number, whole
from llama_ext.errors import CheckpointError, OptionError
from llama_ext.training.history import History, StepRecord, Validation
from llama_ext.training.json_numbers import packed

__all__ = ["Callback", "EarlyStopping", "RunView", "states_of"]


class RunView(Protocol):
    """What a callback sees of a run, and what it may do."""

    @property
    def step(self) -> int:
        """Steps done."""
        ...

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        ...

    @property
    def history(self) -> History:
        """So far."""
        ...

    def stop(self, reason: str) -> None:
        """Ends the run after this step; `History.stopped` is the reason."""
        ...


class Callback:
    """Called by `fit`; subclasses override what they need. An exception ends the run and reaches the caller of `fit`."""

    def on_start(self, run: RunView, resumed: bool) -> None:
        """Before the first step of a call of `fit`; `resumed`: it goes on from a checkpoint, and `load_state` has been called.

        What is left of another run is forgotten here. A run that was to end before it was interrupted is ended here once more.
        """

    def on_step_end(self, run: RunView, record: StepRecord) -> None:
        """After each step, the skipped ones included."""

    def on_validation(self, run: RunView, validation: Validation) -> None:
        """After the validation data was scored."""

    def on_epoch_end(self, run: RunView, epoch: int) -> None:
        """After the last step of an epoch, which counts from 1, and its validation."""

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint has to remember, as JSON values; floats may be infinite or no number."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave."""


class EarlyStopping(Callback):
    """Ends a run when the validation loss no longer falls.

    Args:
        patience: How many validations in a row may be no better.
        min_delta: How much lower, in nats, is better.

    Raises:
        OptionError: A value is out of range.
    """

    def __init__(self, patience: int = 3, min_delta: float = 0.0) -> None:
        self.patience = whole("patience", patience, 1)
        self.min_delta = number("min_delta", min_delta, minimum=0.0)
        self.best: float | None = None
        self.waited = 0

    def on_start(self, run: RunView, resumed: bool) -> None:
        if not resumed:
            self.best, self.waited = None, 0
        self._stop(run)

    def on_validation(self, run: RunView, validation: Validation) -> None:
        if self.best is None or validation.loss < self.best - self.min_delta:
            self.best, self.waited = validation.loss, 0
            return
        self.waited += 1
        self._stop(run)

    def _stop(self, run: RunView) -> None:
        if self.waited >= self.patience:
            run.stop(f"early: the validation loss has not fallen below {self.best:.4f} {self.waited} times")

    def state(self) -> Mapping[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state(self, state: Mapping[str, Any]) -> None:
        best, waited = state.get("best"), state.get("waited")
        if not (best is None or isinstance(best, (int, float))) or not isinstance(waited, int):
            raise CheckpointError(f"the state of EarlyStopping is malformed: {str(dict(state))[:80]}")
        self.best, self.waited = best, waited


def states_of(callbacks: Sequence[Callback]) -> list[Any]:
    """The states of callbacks, for a checkpoint.

    Raises:
        OptionError: One is nothing that JSON can hold.
    """
    states = []
    for callback in callbacks:
        try:
            state = dict(callback.state())
            json.dumps(packed(state), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise OptionError(
                f"callbacks: what {type(callback).__name__}.state() returns cannot be saved ({error}); it must be a dict of None, "
                "bool, int, float, str, and lists and dicts (with str keys) of them"
            ) from error
        states.append(state)
    return states
