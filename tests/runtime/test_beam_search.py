"""Beam search against a plain one: transformers' rules, written down once more on whole sequences and without a cache."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest

import llama_ext

Model = llama_ext.LlamaForCausalLM
Found = list[tuple[list[int], float]]
PROMPTS = [[1], [3, 4], [10, 0, 2, 7]]
NEW_TOKENS = 9
# Models (initializer_range, seed), one flat and one peaked, with their ends: chosen so that each rule of the search changes
# some result. In the second, both ends of a beam are often among its likeliest tokens.
CASES = [((0.2, 6), (5,)), ((0.2, 6), (5, 8)), ((0.4, 1), (3,)), ((0.4, 1), (1, 3))]
BEAMS = [2, 4]
PENALTIES = [0.0, 1.0, 2.0]


@functools.cache
def model(spread: float, seed: int) -> Model:
    """Twelve tokens, so that the end comes in the middle of most searches, at a different place for each beam."""
    config = llama_ext.LlamaConfig(
        vocab_size=12,
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=spread,
        eos_token_id=None,
        bos_token_id=None,
    )
    return Model(config, seed=seed)


def logprobs(source: Model, ids: list[int]) -> Any:
    """log p of each next token, in float64."""
    logits = source([ids])[0, -1].astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def plain_beam_search(
    source: Model, prompt: list[int], beams: int, eos: tuple[int, ...], penalty: float, early: bool
) -> Found:
    """The complete sequences and their scores, best first."""
    running: Found = [([], 0.0)]
    complete: Found = []
    for length in range(1, NEW_TOKENS + 1):
        candidates = [
            ([*tokens, token], total + logprob)
            for tokens, total in running
            for token, logprob in enumerate(logprobs(source, prompt + tokens).tolist())
        ]
        candidates.sort(key=lambda candidate: -candidate[1])
        candidates = candidates[: max(2, 1 + len(eos)) * beams]
        ended = [tokens[-1] in eos or length == NEW_TOKENS for tokens, _ in candidates]
        # An end counts only if it is among the best `beams` candidates; the others make room for those that go on.
        complete += [
            (tokens, total / length**penalty)
            for (tokens, total), end in zip(candidates[:beams], ended, strict=False)
            if end
        ]
        complete = sorted(complete, key=lambda sequence: -sequence[1])[:beams]
        running = [candidate for candidate, end in zip(candidates, ended, strict=True) if not end][:beams]
        if len(complete) == beams and running:
            best_to_come = running[0][1] / length**penalty
            if early or best_to_come <= complete[-1][1]:
                break
    return complete


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
@pytest.mark.parametrize(("drawn", "eos"), CASES, ids=str)
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("beams", BEAMS)
def test_sequences_and_scores_are_those_of_a_plain_search(
    beams: int, penalty: float, early: bool, drawn: tuple[float, int], eos: tuple[int, ...], prompt: list[int]
) -> None:
    found = model(*drawn).generate(
        prompt,
        max_new_tokens=NEW_TOKENS,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=penalty,
        early_stopping=early,
        eos_token_id=list(eos),
        return_details=True,
    )
    expected = plain_beam_search(model(*drawn), prompt, beams, eos, penalty, early)
    assert [output.token_ids for output in found] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([output.score for output in found], [score for _, score in expected], atol=1e-4)
    ends = ["stop" if tokens[-1] in eos else "length" for tokens, _ in expected]
    assert [output.finish_reason for output in found] == ends


def test_the_searches_compared_are_not_all_alike() -> None:
    """Each option changes some result, and sequences end early as well as late: else the comparison would say little."""
    found = {
        (prompt, beams, case, penalty, early): [
            tokens
            for tokens, _ in plain_beam_search(
                model(*CASES[case][0]), PROMPTS[prompt], beams, CASES[case][1], penalty, early
            )
        ]
        for prompt, beams, case, penalty, early in itertools.product(
            range(len(PROMPTS)), BEAMS, range(len(CASES)), PENALTIES, [False, True]
        )
    }
    lengths = {len(tokens) for sequences in found.values() for tokens in sequences}
    assert len(lengths) >= 4
    assert NEW_TOKENS in lengths
    for option in (1, 3, 4):
        groups: dict[Any, list[Any]] = {}
        for case, sequences in found.items():
            groups.setdefault(case[:option] + case[option + 1 :], []).append(sequences[:2])
        assert any(one != group[0] for group in groups.values() for one in group), option
