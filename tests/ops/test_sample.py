"""sample: an independent NumPy sampler draws the same tokens, and the frequencies are the probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import numpy_ops
from devices import REFERENCE, Device, each_isa
from guarded import guarded
from llama_ext import NumericError, OptionError, ShapeError, TokenIdError, _core
from sample_options import OPTIONS
from tolerances import U32

VOCABULARIES = [3, 7, 64, 65, 1000, 32003]


def draw(logits: Any, options: dict[str, Any], *, prompt: Any = (), output: Any = (), key: Any = (0, 0, 0)) -> int:
    token, _ = REFERENCE.backend.sample(guarded(logits), options, list(prompt), list(output), *key)
    return token


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_sample_draws_the_token_that_numpy_draws(name: str, vocabulary: int) -> None:
    options = OPTIONS[name]
    rng = np.random.default_rng([vocabulary, len(name)])
    for trial in range(8 if vocabulary > 1000 else 25):
        logits = (rng.standard_normal(vocabulary) * rng.choice([0.5, 3.0, 10.0])).astype(np.float32)
        if trial % 3 == 1:
            logits = np.round(logits)  # many ties
        prompt = rng.integers(0, vocabulary, 6).tolist()
        output = rng.integers(0, min(vocabulary, 40), 12).tolist()
        key = (int(rng.integers(2**63)), trial, int(rng.integers(2**40)))
        weights = numpy_ops.token_weights(logits, options, prompt, output)
        expected = int(np.searchsorted(np.cumsum(weights), numpy_ops.philox_uniform(*key), side="right"))
        expected = min(expected, int(np.flatnonzero(weights)[-1]))
        assert draw(logits, options, prompt=prompt, output=output, key=key) == expected, f"trial {trial}"


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_sample_at_temperature_0_takes_the_largest_processed_logit(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    for name, given in OPTIONS.items():
        options = {**given, "temperature": 0.0}
        logits = np.round(rng.standard_normal(vocabulary) * 3).astype(np.float32)
        prompt, output = [0, 1], rng.integers(0, vocabulary, 9).tolist()
        processed = numpy_ops.processed_logits(logits, options, prompt, output)
        assert draw(logits, options, prompt=prompt, output=output) == int(np.argmax(processed)), name


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 8, 9, 255, 256, 257, 32000, 128256])
@each_isa
def test_sample_gives_the_log_probability_before_any_processing(isa: str, vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = (rng.standard_normal(vocabulary) * 5 + 100).astype(np.float32)
    options = {"temperature": 0.5, "top_k": 2, "repetition_penalty": 3.0}
    token, logprob = Device(isa, 1).backend.sample(guarded(logits), options, [0], [0], 1, 2, 3)
    z = logits.astype(np.float64)
    expected = z[token] - z.max() - np.log(np.exp(z - z.max()).sum())
    assert abs(logprob - expected) <= U32 * abs(expected) + 1e-14 * 100


def test_greedy_takes_the_lowest_id_among_equals_wherever_they_are() -> None:
    for vocabulary in (1, 2, 8, 17, 1000):
        for first in {0, vocabulary // 2, vocabulary - 1}:
            logits = np.zeros(vocabulary, np.float32)
            logits[first:] = 1.0
            assert draw(logits, {}) == first
            assert draw(logits, {"temperature": 1.0, "top_k": 1}) == first
            assert draw(logits, {"temperature": 1.0, "top_p": 1e-9}) == first


@pytest.mark.parametrize("name", ["plain", "filters", "min_p", "everything"])
def test_sample_draws_as_often_as_the_probabilities_say(name: str) -> None:
    options = OPTIONS[name]
    logits = (np.random.default_rng(5).standard_normal(12) * 1.5).astype(np.float32)
    prompt, output = [1, 2, 3], [3, 3, 4]
    p = numpy_ops.token_weights(logits, options, prompt, output)
    draws = 20_000
    backend = REFERENCE.backend
    counts = np.zeros(12)
    for counter in range(draws):
        counts[backend.sample(logits, options, prompt, output, 42, 7, counter)[0]] += 1
    assert (counts[p == 0] == 0).all()
    kept = p > 0
    chi_squared = ((counts[kept] - draws * p[kept]) ** 2 / (draws * p[kept])).sum()
    freedom = kept.sum() - 1
    # Mean `freedom`, variance 2 `freedom`: five standard deviations. The draws are fixed, so this passes or fails for good.
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5


def test_random_numbers_are_philox_and_depend_on_each_part_of_the_key() -> None:
    # Known answer of Random123 for zero counter and key: words 6627e8d5 e169c58d ...
    assert _core.random_uniform(0, 0, 0) == ((0xE169C58D << 32 | 0x6627E8D5) >> 11) * 2.0**-53
    big = 2**64 - 1
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (0, 2**32, 0), (0, 0, 2**32), (big, big, big)]
    numbers = [_core.random_uniform(*key) for key in keys]
    assert numbers == [numpy_ops.philox_uniform(*key) for key in keys]
    assert len(set(numbers)) == len(keys)


def test_random_numbers_are_uniform_along_every_part_of_the_key() -> None:
    for axis in range(3):
        keys = np.zeros((20_000, 3), dtype=int)
        keys[:, axis] = np.arange(20_000)
        numbers = np.array([_core.random_uniform(*map(int, key)) for key in keys])
        assert 0 <= numbers.min() <= numbers.max() < 1
        counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 99 + 5 * (2 * 99) ** 0.5
        correlation = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
        assert abs(correlation) < 5 / 20_000**0.5


def test_sample_depends_on_its_key_alone() -> None:
    logits = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    first = [draw(logits, {"temperature": 1.0}, key=(9, 1, n)) for n in range(50)]
    again = [draw(logits, {"temperature": 1.0}, key=(9, 1, n)) for n in reversed(range(50))][::-1]
    assert first == again
    assert first != [draw(logits, {"temperature": 1.0}, key=(9, 2, n)) for n in range(50)]


def test_sample_does_not_change_its_logits() -> None:
    logits = guarded(np.random.default_rng(0).standard_normal(100).astype(np.float32))
    before = logits.copy()
    draw(logits, OPTIONS["everything"], prompt=[1, 2], output=[3, 3])
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100])
def test_sample_refuses_logits_that_are_not_numbers(size: int) -> None:
    for poison in (np.nan, np.inf):
        for place in {0, size // 2, size - 1}:
            logits = np.zeros(size, np.float32)
            logits[place] = poison
            for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2, "top_p": 0.5}):
                with pytest.raises(NumericError, match=str(place)):
                    draw(logits, options)
    with pytest.raises(NumericError):
        draw(np.full(size, -np.inf, np.float32), {})


def test_sample_refuses_when_bias_forbids_everything() -> None:
    forbidden = {"logit_bias": {0: float("-inf"), 1: float("-inf")}}
    for temperature in (0.0, 1.0):
        with pytest.raises(NumericError, match="logit_bias"):
            draw(np.zeros(2, np.float32), {**forbidden, "temperature": temperature})


def test_sample_never_draws_what_is_forbidden() -> None:
    logits = np.zeros(5, np.float32)
    logits[1] = -np.inf
    options = {"temperature": 1.0, "logit_bias": {3: float("-inf")}}
    assert {draw(logits, options, key=(0, 0, n)) for n in range(400)} == {0, 2, 4}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"logit_bias": {5: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {0: float("nan")}},
        {"logit_bias": {0: float("inf")}},
        {"typical_p": 0.5},
    ],
    ids=str,
)
def test_sample_refuses_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        draw(np.zeros(5, np.float32), wrong)


def test_sample_refuses_token_ids_and_shapes_that_do_not_fit() -> None:
    with pytest.raises(TokenIdError):
        draw(np.zeros(5, np.float32), {"repetition_penalty": 2.0}, prompt=[5])
    with pytest.raises(TokenIdError):
        draw(np.zeros(5, np.float32), {"presence_penalty": 2.0}, output=[-1])
    with pytest.raises(ShapeError):
        draw(np.zeros(0, np.float32), {})
