"""What a training run drives: the arithmetic, and the weights that it changes. The loop knows nothing else of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llama_ext._arrays import FloatArray, IntArray

__all__ = ["LengthArray", "Trainer", "Weights"]

LengthArray = npt.NDArray[np.int64]


class Trainer(Protocol):
    """Gradients and an optimiser for weights that it was made with; `_core.Trainer` is one.

    A batch is ragged: tokens (n,), labels (n,), lengths (sequences,) whose sum is n. Each sequence begins at position 0 and sees
    itself alone. labels[t] is what position t is to predict, or -100.
    """

    steps: int

    def accumulate(
        self, tokens: IntArray, labels: IntArray, lengths: LengthArray, *, scale: float, seed: int = 0
    ) -> tuple[float, int]:
        """Adds the gradient of scale * (sum of losses); gives the sum of losses and how many labels counted."""
        ...

    def evaluate(self, tokens: IntArray, labels: IntArray, lengths: LengthArray) -> tuple[float, int, int]:
        """The sum of losses, how many labels counted, and how many of them are the greedy choice."""
        ...

    def gradient_norm(self) -> float:
        """The root of the sum of squares of all gradients."""
        ...

    def step(self, *, lr: float, gradient_scale: float = 1.0) -> None:
        """One step of the optimiser with gradient_scale * gradients, which are zero afterwards."""
        ...

    def zero_gradients(self) -> None:
        """Forgets the gradients."""
        ...

    def parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        """What is trained: slots and shapes, in a fixed order."""
        ...

    def gradient(self, slot: str) -> FloatArray:
        """The gradient of a parameter."""
        ...

    def moments(self, slot: str) -> list[str]:
        """The names of the optimiser's states of a parameter."""
        ...

    def read_moment(self, name: str, slot: str) -> FloatArray:
        """A state of the optimiser."""
        ...

    def write_moment(self, name: str, slot: str, array: FloatArray) -> None:
        """Sets a state of the optimiser."""
        ...


class Weights(Protocol):
    """Where the trained parameters are, and how they become files."""

    def save(self, folder: Path) -> None:
        """Writes them, exactly, with what is needed to use them, into a folder that exists."""
        ...

    def load(self, folder: Path) -> None:
        """Sets them to what `save` wrote.

        Raises:
            CheckpointError: The files hold other tensors, or miss one.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must agree with to go on: JSON values, such as the config."""
        ...

    def flops_per_token(self, context: int) -> float | None:
        """Floating-point operations of forward and backward a token, in sequences of `context`; None: unknown."""
        ...
