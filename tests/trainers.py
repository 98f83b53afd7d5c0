"""Trainers of the core on random models of awkward sizes, and their batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import random_models
from devices import ISAS, REFERENCE, Device, requires_cuda
from llama_ext import _core

Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]]

ADAMW: dict[str, Any] = {"kind": "adamw", "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}

on_cuda = pytest.param("cuda", marks=[pytest.mark.gpu, requires_cuda])

each_backend = pytest.mark.parametrize("isa", ["", *ISAS, on_cuda], ids=lambda isa: isa or "reference")


def backend(isa: str, threads: int = 2) -> _core.Backend:
    return (Device(isa, threads) if isa else REFERENCE).backend


def build(isa: str, threads: int = 2, **changes: Any) -> _core.Model:
    """A random model of awkward sizes, as training wants it."""
    model = random_models.build(backend(isa, threads), **{"layers": 2, "heads": 6, **changes})
    return model.converted({"": ("float32", 0)}, True)


def batch(lengths: list[int], seed: int = 0, vocabulary: int = 501) -> Batch:
    """Random sequences; about a third of the labels is ignored."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, sum(lengths)).astype(np.int32)
    labels = rng.integers(0, vocabulary, sum(lengths)).astype(np.int32)
    labels[rng.random(len(labels)) < 0.3] = -100
    return tokens, labels, np.array(lengths, np.int64)


def gradients(trainer: _core.Trainer) -> dict[str, npt.NDArray[np.float32]]:
    return {name: trainer.gradient(name) for name, _ in trainer.parameters()}


def run(trainer: _core.Trainer, data: Batch, scale: float = 1.0, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    trainer.zero_gradients()
    trainer.accumulate(*data, scale=scale, seed=seed)
    return gradients(trainer)
