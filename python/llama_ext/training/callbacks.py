"""What a caller hooks into a training run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llama_ext.errors import CheckpointError, OptionError
from llama_ext.training.history import History, StepRecord, Validation
from llama_ext.training.options import number, whole

__all__ = ["Callback", "EarlyStopping", "RunView", "load_states", "states_of"]

# JSON has no number that is not finite: an object with this one key, and the number's name.
_NOT_FINITE = "llama_ext.float"
_NAMES = ("inf", "-inf", "nan")


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

    def on_validation(self, run: RunView, validation: Validation) -> None:
        if self.best is None or validation.loss < self.best - self.min_delta:
            self.best, self.waited = validation.loss, 0
            return
        self.waited += 1
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
    """The states of callbacks, as a checkpoint keeps them.

    Raises:
        OptionError: One is nothing that JSON can hold.
    """
    states = []
    for callback in callbacks:
        try:
            state = _packed(dict(callback.state()))
            json.dumps(state, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise OptionError(
                f"callbacks: what {type(callback).__name__}.state() returns cannot be saved ({error}); it must be a dict of None, "
                "bool, int, float, str, and lists and dicts of them"
            ) from error
        states.append(state)
    return states


def load_states(callbacks: Sequence[Callback], states: Sequence[Any]) -> None:
    """Gives callbacks back what `states_of` found.

    Raises:
        ValueError: There are more or fewer of them.
    """
    for callback, state in zip(callbacks, states, strict=True):
        callback.load_state(_unpacked(state))


def _packed(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_NOT_FINITE: str(float(value))}
    if isinstance(value, dict):
        return {name: _packed(each) for name, each in value.items()}
    return [_packed(each) for each in value] if isinstance(value, (list, tuple)) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_NOT_FINITE} and value[_NOT_FINITE] in _NAMES:
            return float(value[_NOT_FINITE])
        return {name: _unpacked(each) for name, each in value.items()}
    return [_unpacked(each) for each in value] if isinstance(value, list) else value
