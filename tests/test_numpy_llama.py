"""numpy_llama, which gradients of whole models are held against, is right itself: it agrees with transformers in float64."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import finite_differences
import numpy_llama
from shared_data import SHARED, requires_shared
from tolerances import relative_rms

pytestmark = requires_shared

GOLDEN = SHARED / "golden"
TRAINED = "train-gqa-tied"


@functools.cache
def checkpoint(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The config, the weights in float64, and what transformers computed."""
    weights = load_file(GOLDEN / name / "model.safetensors")
    config = numpy_llama.read_config(GOLDEN / name)
    return (
        config,
        {key: each.astype(np.float64) for key, each in weights.items()},
        load_file(GOLDEN / name / "golden.safetensors"),
    )


@functools.cache
def first_step() -> tuple[Any, Any, Any]:
    """tokens, labels and lengths of the first batch."""
    _, _, golden = checkpoint(TRAINED)
    tokens, labels = golden["batches"][0], golden["labels"][0]
    return tokens.reshape(-1), numpy_llama.shifted(labels).reshape(-1), np.full(len(tokens), tokens.shape[1])


@pytest.mark.parametrize("name", ["mha-untied", "gqa-tied-llama3rope", "wide-head-dim", "linear-rope", "biases"])
def test_logits_are_those_of_transformers(name: str) -> None:
    config, weights, golden = checkpoint(name)
    for tokens, expected in zip(golden["input_ids"], golden["logits"], strict=True):
        # transformers normalises and computes its rotary angles in float32; the golden files are float64 beside that.
        assert relative_rms(numpy_llama.logits(weights, config, tokens), expected) < 1e-6


def test_the_loss_is_that_of_transformers() -> None:
    config, weights, golden = checkpoint(TRAINED)
    found = numpy_llama.loss(weights, config, *first_step())
    # transformers normalises in float32 even in a float64 model, which moves this loss by 8e-9. With its norm and its rotary
    # angles in float64 it gives the loss found here to 2e-16.
    assert found == pytest.approx(golden["losses"][0], rel=2e-8)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_transformers_along_random_directions_of_every_tensor(seed: int) -> None:
    config, weights, golden = checkpoint(TRAINED)
    rng = np.random.default_rng(seed)
    for name, values in weights.items():
        direction = rng.standard_normal(values.shape)
        direction *= 10 / np.linalg.norm(direction)

        def loss_at(distance: float, name: str = name, direction: Any = direction) -> float:
            moved = {**weights, name: weights[name] + distance * direction}
            return numpy_llama.loss(moved, config, *first_step())

        expected = golden[f"grad.{name}"].astype(np.float64)
        found = finite_differences.derivative(loss_at)
        # The golden gradients were rounded to float32.
        tolerance = 1e-6 * float(np.linalg.norm(expected))
        assert found == pytest.approx(float((expected * direction).sum()), abs=tolerance), name


def test_lengths_keep_sequences_apart() -> None:
    config, weights, _ = checkpoint(TRAINED)
    tokens, labels, _ = first_step()
    lengths = [5, 0, 1, 17]
    ends = np.cumsum(lengths)
    parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    counts = [int((labels[own] != numpy_llama.IGNORED).sum()) for own in parts]
    assert 0 in counts
    alone = [
        numpy_llama.loss(weights, config, tokens[own], labels[own], [length]) * count
        for own, length, count in zip(parts, lengths, counts, strict=True)
        if count
    ]
    together = numpy_llama.loss(weights, config, tokens[: ends[-1]], labels[: ends[-1]], lengths)
    assert together == pytest.approx(sum(alone) / sum(counts), rel=1e-12)
