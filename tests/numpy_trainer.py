"""A bigram model in NumPy that the loop of training can drive: what it does is then tested without the compiled core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

IGNORED = -100
_MOMENTS = ("first", "second")


class BigramWeights:
    """The logits of what follows a token are a row of a table, plus a bias; implements `training.driver.Weights`."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.values: dict[str, npt.NDArray[np.float32]] = {
            "table": rng.standard_normal((vocabulary, vocabulary)).astype(np.float32) / 10,
            "bias": np.zeros(vocabulary, np.float32),
        }
        self.name = "bigram"

    def read(self, slot: str) -> npt.NDArray[np.float32]:
        return self.values[slot].copy()

    def write(self, slot: str, array: npt.NDArray[np.float32]) -> None:
        self.values[slot][...] = array

    def save(self, folder: Path) -> None:
        save_file(self.values, folder / "bigram.safetensors")

    def load(self, folder: Path) -> None:
        for slot, array in load_file(folder / "bigram.safetensors").items():
            self.write(slot, array)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.name, "vocabulary": int(self.values["bias"].size)}

    def flops_per_token(self, context: int) -> float | None:
        return 6.0 * self.values["table"].size + 0 * context

    def bits(self) -> bytes:
        return b"".join(self.values[slot].tobytes() for slot in sorted(self.values))


class BigramTrainer:
    """Gradients and AdamW; implements `training.driver.Trainer`.

    Attributes:
        before_accumulate: Called first in each `accumulate`, with how many there were: to interrupt it, or to count.
        dropout: Drops rows of the table, so that the seed matters.
    """

    def __init__(
        self, weights: BigramWeights, *, beta1: float = 0.9, beta2: float = 0.95, dropout: float = 0.0
    ) -> None:
        self.weights = weights
        self.steps = 0
        self.dropout = dropout
        self.calls = 0
        self.batches: list[tuple[Any, Any, Any]] = []
        self.scales: list[float] = []
        self.rates: list[float] = []
        self.before_accumulate: Any = None
        self._betas = (beta1, beta2)
        self._gradients = {slot: np.zeros_like(value) for slot, value in weights.values.items()}
        self._moments = {
            name: {slot: np.zeros_like(value) for slot, value in weights.values.items()} for name in _MOMENTS
        }

    def _logits(self, tokens: Any) -> npt.NDArray[np.float64]:
        return (self.weights.values["table"][tokens] + self.weights.values["bias"]).astype(np.float64)

    def _losses(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        peak = logits.max(axis=1, keepdims=True)
        exponentials = np.exp(logits - peak)
        shares = exponentials / exponentials.sum(axis=1, keepdims=True)
        return -np.log(shares[np.arange(labels.size), labels]), shares

    def accumulate(self, tokens: Any, labels: Any, lengths: Any, *, scale: float, seed: int = 0) -> tuple[float, int]:
        assert tokens.dtype == labels.dtype == np.int32
        assert lengths.dtype == np.int64
        assert int(lengths.sum()) == tokens.size == labels.size
        self.batches.append((tokens.copy(), labels.copy(), lengths.copy()))
        self.scales.append(scale)
        self.calls += 1
        if self.before_accumulate is not None:
            self.before_accumulate(self.calls)
        keep = labels != IGNORED
        tokens, labels = tokens[keep], labels[keep]
        logits = self._logits(tokens)
        if self.dropout:
            logits = logits * (np.random.default_rng(seed).random(logits.shape) >= self.dropout)
        losses, shares = self._losses(logits, labels)
        shares[np.arange(labels.size), labels] -= 1.0
        shares *= scale
        np.add.at(self._gradients["table"], tokens, shares.astype(np.float32))
        self._gradients["bias"] += shares.sum(axis=0).astype(np.float32)
        return float(losses.sum()), int(labels.size)

    def evaluate(self, tokens: Any, labels: Any, lengths: Any) -> tuple[float, int, int]:
        assert int(lengths.sum()) == tokens.size
        keep = labels != IGNORED
        logits = self._logits(tokens[keep])
        losses, _ = self._losses(logits, labels[keep])
        return float(losses.sum()), int(keep.sum()), int((logits.argmax(axis=1) == labels[keep]).sum())

    def gradient_norm(self) -> float:
        return float(np.sqrt(sum(float(np.square(g, dtype=np.float64).sum()) for g in self._gradients.values())))

    def step(self, *, lr: float, gradient_scale: float = 1.0) -> None:
        self.steps += 1
        self.rates.append(lr)
        beta1, beta2 = self._betas
        for slot, gradient in self._gradients.items():
            g = gradient * np.float32(gradient_scale)
            first, second = self._moments["first"][slot], self._moments["second"][slot]
            first[...] = beta1 * first + (1 - beta1) * g
            second[...] = beta2 * second + (1 - beta2) * g * g
            change = (first / (1 - beta1**self.steps)) / (np.sqrt(second / (1 - beta2**self.steps)) + 1e-8)
            self.weights.values[slot] -= np.float32(lr) * change.astype(np.float32)
        self.zero_gradients()

    def zero_gradients(self) -> None:
        for gradient in self._gradients.values():
            gradient[...] = 0

    def parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(slot, value.shape) for slot, value in self.weights.values.items()]

    def gradient(self, slot: str) -> npt.NDArray[np.float32]:
        return self._gradients[slot].copy()

    def moments(self, slot: str) -> list[str]:
        return list(_MOMENTS)

    def read_moment(self, name: str, slot: str) -> npt.NDArray[np.float32]:
        return self._moments[name][slot].copy()

    def write_moment(self, name: str, slot: str, array: npt.NDArray[np.float32]) -> None:
        self._moments[name][slot][...] = array

    def moment_bits(self) -> bytes:
        return b"".join(self._moments[name][slot].tobytes() for name in _MOMENTS for slot in self.weights.values)
