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
def model(spread: float, seed: int, tokens: int = 12) -> Model:
    """Twelve tokens, so that the end comes in the middle of most searches, at a different place for each beam."""
    config = llama_ext.LlamaConfig(
        vocab_size=tokens,
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
    source: Model,
    prompt: list[int],
    beams: int,
    eos: tuple[int, ...],
    penalty: float,
    early: bool,
    new_tokens: int = NEW_TOKENS,
) -> Found:
    """The complete sequences and their scores, best first."""
    running: Found = [([], 0.0)]
    complete: Found = []
    for length in range(1, new_tokens + 1):
        candidates = [
            ([*tokens, token], total + logprob)
            for tokens, total in running
            for token, logprob in enumerate(logprobs(source, prompt + tokens).tolist())
        ]
        candidates.sort(key=lambda candidate: -candidate[1])
        candidates = candidates[: max(2, 1 + len(eos)) * beams]
        ended = [tokens[-1] in eos or length == new_tokens for tokens, _ in candidates]
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


# -- all there is ------------------------------------------------------------------------------------------------------

# Of five tokens and at most four new ones there are few enough to write all down. Models (initializer_range, seed) and their ends.
TOKENS, MOST = 5, 4
SMALL = [((0.4, 2), (4,)), ((0.2, 1), (0,)), ((0.2, 1), (1, 3))]
SMALL_PROMPTS = [[1], [2, 0, 3]]


@functools.cache
def every_continuation(drawn: tuple[float, int], eos: tuple[int, ...], prompt: tuple[int, ...]) -> list[Any]:
    """(tokens, sum of log p) of every sequence that ends with an end or with MOST tokens; each prefix is scored by itself."""
    source = model(*drawn, TOKENS)
    done, open_ = [], [((), 0.0)]
    while open_:
        tokens, total = open_.pop()
        for token, logprob in enumerate(logprobs(source, [*prompt, *tokens]).tolist()):
            longer = ((*tokens, token), total + logprob)
            (done if token in eos or len(longer[0]) == MOST else open_).append(longer)
    return done


@pytest.mark.parametrize("prompt", SMALL_PROMPTS, ids=str)
@pytest.mark.parametrize(("drawn", "eos"), SMALL, ids=str)
@pytest.mark.parametrize("penalty", [0.0, 0.5, 1.0, 2.0])
def test_a_beam_of_full_width_finds_everything_there_is(
    penalty: float, drawn: tuple[float, int], eos: tuple[int, ...], prompt: list[int]
) -> None:
    expected = {
        tokens: total / len(tokens) ** penalty for tokens, total in every_continuation(drawn, eos, tuple(prompt))
    }
    going = TOKENS - len(eos)
    assert len(expected) == sum(len(eos) * going**length for length in range(MOST)) + going**MOST
    assert np.exp([total for _, total in every_continuation(drawn, eos, tuple(prompt))]).sum() == pytest.approx(1.0)
    found = model(*drawn, TOKENS).generate(
        prompt,
        max_new_tokens=MOST,
        num_beams=len(expected),
        num_return_sequences=len(expected),
        length_penalty=penalty,
        eos_token_id=list(eos),
        return_details=True,
    )
    scores = {tuple(output.token_ids): output.score for output in found}
    assert scores.keys() == expected.keys()
    np.testing.assert_allclose([scores[tokens] for tokens in expected], list(expected.values()), atol=1e-5)
    assert [output.score for output in found] == sorted(scores.values(), reverse=True)
    assert tuple(found[0].token_ids) == max(expected, key=lambda tokens: expected[tokens])


def test_the_best_of_all_is_not_found_step_by_step_and_depends_on_the_penalty() -> None:
    """Else a search that is merely greedy, or one that forgets lengths, would find it as well."""
    greedy_is_best, winners = [], []
    for (drawn, eos), prompt in itertools.product(SMALL, SMALL_PROMPTS):
        everything = every_continuation(drawn, eos, tuple(prompt))
        best = {
            max(everything, key=lambda each: each[1] / len(each[0]) ** penalty)[0] for penalty in (0.0, 0.5, 1.0, 2.0)
        }
        winners.append(len(best))
        plain = plain_beam_search(model(*drawn, TOKENS), prompt, 1, eos, 1.0, False, MOST)
        greedy_is_best.append(tuple(plain[0][0]) in best)
    assert not all(greedy_is_best)
    assert max(winners) > 1
    lengths = {len(tokens) for tokens, _ in everything}
    assert lengths == set(range(1, MOST + 1))


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_log_probabilities_add_up_to_the_score_whatever_the_cache_keeps(kv_dtype: str) -> None:
    source = Model(model(0.4, 1).config, seed=1, kv_dtype=kv_dtype)
    outputs = source.generate([3, 4], num_beams=4, num_return_sequences=4, max_new_tokens=8, return_details=True)
    for output in outputs:
        assert sum(output.logprobs) == pytest.approx(output.score * len(output.token_ids), abs=2e-6)
    if kv_dtype != "float32":
        exact = [source.loglikelihood([3, 4], output.token_ids).logprob for output in outputs]
        assert max(abs(sum(each.logprobs) - one) for each, one in zip(outputs, exact, strict=True)) > 1e-4


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
@pytest.mark.parametrize(("drawn", "eos"), CASES, ids=str)
def test_a_beam_of_one_is_greedy(drawn: tuple[float, int], eos: tuple[int, ...], prompt: list[int]) -> None:
    greedy: list[int] = []
    while len(greedy) < NEW_TOKENS and not (greedy and greedy[-1] in eos):
        greedy.append(int(logprobs(model(*drawn), prompt + greedy).argmax()))
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_token_id": list(eos), "return_details": True}
    assert model(*drawn).generate(prompt, num_beams=1, do_sample=False, **options).token_ids == greedy
    # `generate` goes another way there; the search itself has to agree.
    (found,) = model(*drawn)._core.beam_search(
        np.array(prompt, dtype=np.int32),
        beams=1,
        returned=1,
        max_new_tokens=NEW_TOKENS,
        length_penalty=1.0,
        early_stopping=False,
        eos=list(eos),
        kv_dtype="float32",
    )
    assert found[0] == greedy
