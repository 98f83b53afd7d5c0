"""sample_next: on the GPU, the tokens that sample chooses on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from devices import CUDA, IS_EMULATED, REFERENCE, requires_cuda
from guarded import guarded
from llama_ext import OptionError, ShapeError, TokenIdError, UnsupportedError, _core
from sample_options import OPTIONS

pytestmark = [requires_cuda, pytest.mark.gpu]

# A block takes 1024 logits, and 256 blocks are joined at a time.
VOCABULARIES = [1, 3, 65, 1025] if IS_EMULATED else [1, 3, 65, 1000, 1024, 1025, 5003, 128_256, 300_001]


def draw(
    logits: Any, options: dict[str, Any], prompts: Any, outputs: Any, keys: tuple[int, list[int], list[int]]
) -> list[tuple[int, float] | None]:
    return CUDA.backend.sample_next(guarded(logits), options, prompts, outputs, *keys)


def on_host(
    logits: Any, options: dict[str, Any], prompts: Any, outputs: Any, keys: tuple[int, list[int], list[int]]
) -> list[tuple[int, float]]:
    seed, streams, counters = keys
    return [
        REFERENCE.backend.sample(row, options, list(prompts[i]), list(outputs[i]), seed, streams[i], counters[i])
        for i, row in enumerate(logits)
    ]


def within(options: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Without the biases of tokens that the vocabulary lacks, and never with all of them forbidden."""
    bias = {token: value for token, value in options.get("logit_bias", {}).items() if token < vocabulary}
    if vocabulary == 1:
        bias = {token: value for token, value in bias.items() if value > float("-inf")}
    return {**options, "logit_bias": bias}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", [*OPTIONS, "greedy", "greedy_everything"])
def test_sample_next_chooses_the_tokens_of_sample(name: str, vocabulary: int) -> None:
    options = OPTIONS.get(name, {"temperature": 0.0})
    if name == "greedy_everything":
        options = {**OPTIONS["everything"], "temperature": 0.0}
    options = within(options, vocabulary)
    rng = np.random.default_rng([vocabulary, len(name)])
    for trial in range(2 if IS_EMULATED else 6):
        rows = 1 + trial
        logits = (rng.standard_normal((rows, vocabulary)) * rng.choice([0.5, 3.0, 10.0])).astype(np.float32)
        if trial % 2 == 1:
            logits = np.round(logits)  # many ties, 0 and -0 among them
        prompts = rng.integers(0, vocabulary, (rows, 6)).tolist()
        outputs = rng.integers(0, min(vocabulary, 40), (rows, 12)).tolist()
        streams, counters = rng.integers(2**40, size=rows).tolist(), rng.integers(2**40, size=rows).tolist()
        keys = (int(rng.integers(2**63)), streams, counters)
        found = draw(logits, options, prompts, outputs, keys)
        expected = on_host(logits, options, prompts, outputs, keys)
        for (token, logprob), result in zip(expected, found, strict=True):
            assert result is not None
            assert result[0] == token, f"trial {trial}"
            assert abs(result[1] - logprob) <= np.spacing(np.float32(abs(logprob)))


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}])
def test_many_draws_from_the_same_logits_are_those_of_sample(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(9)
    rows = 16 if IS_EMULATED else 500
    logits = np.repeat(rng.standard_normal((1, 300)).astype(np.float32) * 2, rows, axis=0)
    keys = (3, list(range(rows)), [7] * rows)
    empty: list[list[int]] = [[]] * rows
    found = [result[0] for result in draw(logits, options, empty, empty, keys) if result is not None]
    assert found == [token for token, _ in on_host(logits, options, empty, empty, keys)]
    assert len(set(found)) > 4


def test_equal_logits_are_cut_by_their_ids() -> None:
    logits = np.zeros((8, 2000), np.float32)
    keys = (5, list(range(8)), [0] * 8)
    empty: list[list[int]] = [[]] * 8
    # The last of these are more equals than a block keeps by heart; the second, too few tokens to choose from.
    for options in (
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_k": 3, "logit_bias": dict.fromkeys(range(2, 2000), float("-inf"))},
        {"temperature": 1.0, "top_k": 300, "min_p": 0.5, "logit_bias": dict.fromkeys(range(4, 2000), -9.0)},
        {"temperature": 1.0, "top_p": 0.002},
    ):
        found = [result[0] for result in draw(logits, options, empty, empty, keys) if result is not None]
        assert found == [token for token, _ in on_host(logits, options, empty, empty, keys)]
        assert max(found) < 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1500])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_a_logit_that_is_not_finite_is_not_valid_and_others_are(
    value: float, at: int, temperature: float
) -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((3, 1600)).astype(np.float32)
    logits[1, at] = value
    for more in ({}, {"top_k": 7, "top_p": 0.5}):
        options = {"temperature": temperature, **more}
        found = draw(logits, options, [[]] * 3, [[]] * 3, (1, [0, 1, 2], [0, 0, 0]))
        assert found[1] is None
        assert found[0] is not None
        assert found[2] is not None


def test_a_row_of_which_every_token_is_forbidden_is_not_valid() -> None:
    bias = dict.fromkeys(range(5), float("-inf"))
    for temperature in (0.0, 1.0):
        options = {"temperature": temperature, "logit_bias": bias}
        assert draw(np.zeros((1, 5), np.float32), options, [[]], [[]], (0, [0], [0])) == [None]


def test_arguments_are_checked() -> None:
    logits = np.zeros((1, 5), np.float32)
    key = (0, [0], [0])
    with pytest.raises(OptionError, match="top_p must be a probability"):
        draw(logits, {"top_p": 0.0}, [[]], [[]], key)
    with pytest.raises(ShapeError, match="one entry for each of 1 rows"):
        draw(logits, {}, [[], []], [[]], key)
    with pytest.raises(TokenIdError, match="token id 5"):
        draw(logits, {"repetition_penalty": 2.0}, [[5]], [[]], key)
    with pytest.raises(UnsupportedError, match="cpu has no sampler of its own"):
        _core.Backend("cpu").sample_next(logits, {}, [[]], [[]], *key)
