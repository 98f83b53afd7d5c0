"""Runs of the loop of training on the NumPy bigram model, and data for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llama_ext.training.batches import Example, Examples, Source
from llama_ext.training.loop import Run
from llama_ext.training.options import TrainOptions
from llama_ext.training.settings import RunSettings
from numpy_trainer import BigramTrainer, BigramWeights

VOCABULARY = 11


class Made(NamedTuple):
    """A run that can go, and what it changes."""

    run: Run
    trainer: BigramTrainer
    weights: BigramWeights


MakeRun = Callable[..., Made]


def tokens(length: int, seed: int = 0) -> Any:
    """A stream in which a token says much of the next one."""
    rng = np.random.default_rng(seed)
    steps = rng.choice([1, 1, 1, 2, 5], length)
    return (np.cumsum(steps) % VOCABULARY).astype(np.int32)


def documents(count: int = 22, seed: int = 1) -> Examples:
    """Examples of uneven lengths."""
    rng = np.random.default_rng(seed)
    rows = [tokens(int(length), index) for index, length in enumerate(rng.integers(2, 14, count))]
    return Examples([(Example(row[:-1], row[1:]),) for row in rows])


def bigram_run(
    source: Source | None = None,
    validation: Source | None = None,
    options: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **settings: Any,
) -> Made:
    """A run that has not begun; by default of 22 documents in batches of 4."""
    weights = BigramWeights(VOCABULARY)
    bigram = BigramTrainer(weights, **(trainer or {}))
    data = documents() if source is None else source
    checked = RunSettings(**{"batch_size": 4, "verbose": 0, **settings})
    run = Run(bigram, weights, TrainOptions(**{"lr": 0.05, **(options or {})}), checked, data, validation)
    return Made(run, bigram, weights)
