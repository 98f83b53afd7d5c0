"""Log-likelihood and perplexity: exact, each token once, nothing cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import llama_ext
from llama_ext.runtime import text_stream
from llama_ext.runtime.progress import ProgressBar
from llama_ext.runtime.scoring import windows
from shared_data import requires_shared

Model = llama_ext.LlamaForCausalLM
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


def logprobs(model: Model, ids: list[int]) -> np.ndarray[Any, Any]:
    """log p of ids[1:], in float64 from the logits of the whole sequence."""
    logits = model([ids])[0].astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted[np.arange(len(ids) - 1), ids[1:]]


# Windows.


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9, 50])
@pytest.mark.parametrize(("context", "stride"), [(2, 1), (8, 7), (8, 1), (8, 4), (100, 99), (100, 3)])
def test_windows_score_each_token_but_the_first_once(tokens: int, context: int, stride: int) -> None:
    scored = []
    for index, (begin, first, end) in enumerate(windows(tokens, context, stride)):
        assert begin == index * stride
        assert end - begin <= context
        assert first - begin >= (context - stride if index else 1)
        scored += range(first, end)
    assert scored == list(range(1, tokens))


# Log-likelihood.


def test_the_likelihood_is_the_sum_of_the_tokens_log_probabilities(stories: Model) -> None:
    ids = stories.tokenizer.encode(STORY)
    expected = logprobs(stories, ids)
    for cut in (1, 5, len(ids) - 1):
        found = stories.loglikelihood(ids[:cut], ids[cut:])
        assert found.logprob == pytest.approx(expected[cut - 1 :].sum(), abs=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.3, "seed": 2}, {"num_beams": 3}], ids=["greedy", "drawn", "beams"]
)
def test_generated_tokens_have_the_bits_of_the_scores_of_their_text(options: dict[str, Any], stories: Model) -> None:
    output = stories.generate(STORY, max_new_tokens=60, return_details=True, **options)
    tokens = np.array(output.prompt_ids + output.token_ids, dtype=np.int32)
    scores, _ = stories._core.score(tokens, len(output.prompt_ids))
    assert scores.tolist() == output.logprobs
    assert stories.loglikelihood(output.prompt_ids, output.token_ids).logprob == math.fsum(output.logprobs)


def test_text_is_encoded_as_one_whatever_side_the_space_is_on(stories: Model) -> None:
    ids = stories.tokenizer.encode("Once upon a time")
    before = stories.tokenizer.encode("Once upon")
    assert ids[: len(before)] == before
    expected = stories.loglikelihood(before, ids[len(before) :])
    assert stories.loglikelihood("Once upon", " a time") == expected
    assert stories.loglikelihood("Once upon ", "a time") == expected


@requires_shared
def test_a_token_across_the_border_is_scored(stories: Model) -> None:
    ids = stories.tokenizer.encode("Once upon a time")
    context = "Once upon a ti"
    before = stories.tokenizer.encode(context)
    first = next(index for index, token in enumerate(before) if token != ids[index])
    assert stories.loglikelihood(context, "me") == stories.loglikelihood(ids[:first], ids[first:])


@requires_shared
def test_an_empty_context_is_the_bos_token(stories: Model) -> None:
    ids = stories.tokenizer.encode("Once upon")
    assert stories.loglikelihood("", "Once upon") == stories.loglikelihood(ids[:1], ids[1:])
    assert stories.loglikelihood("Once", "") == (0.0, True)


def test_is_greedy_means_that_greedy_search_writes_it(stories: Model) -> None:
    written = stories.generate("Once upon", max_new_tokens=10)[len("Once upon") :]
    assert stories.loglikelihood("Once upon", written).is_greedy
    assert not stories.loglikelihood("Once upon", " a dog").is_greedy


@pytest.mark.parametrize(
    ("context", "continuation", "error"),
    [
        ([], [1], llama_ext.OptionError),
        ([1], [67], llama_ext.TokenIdError),
        ("a", [1], llama_ext.DTypeError),
        ("a", "b", llama_ext.OptionError),
        ([1] * 40, [2] * 9, llama_ext.ContextLengthError),
    ],
)
def test_a_wrong_pair_is_a_typed_error(context: Any, continuation: Any, error: type[Exception], tiny: Model) -> None:
    with pytest.raises(error):
        tiny.loglikelihood(context, continuation)


# Perplexity.


@requires_shared
def test_perplexity_of_a_text_in_one_window_is_the_mean_of_its_tokens(stories: Model) -> None:
    found = stories.perplexity(STORY)
    nats = -logprobs(stories, stories.tokenizer.encode(STORY))
    assert found.tokens == nats.size
    assert found.loss == pytest.approx(nats.mean(), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    assert found.bytes == len(STORY)
    assert found.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / len(STORY), rel=1e-5)
    assert f"{found.perplexity:.4f}" in str(found)


def test_windows_of_a_text_are_scored_as_if_each_were_alone(stories: Model) -> None:
    ids = stories.tokenizer.encode(STORY * 3)
    for context, stride in ((16, None), (16, 4), (33, 32), (2, 1)):
        nats = 0.0
        for begin, first, end in windows(len(ids), context, stride or context - 1):
            nats -= logprobs(stories, ids[begin:end])[first - begin - 1 :].sum()
        found = stories.perplexity(STORY * 3, stride=stride, context=context)
        assert found.tokens == len(ids) - 1
        assert found.loss == pytest.approx(nats / (len(ids) - 1), abs=1e-5)


def test_more_to_look_back_at_makes_a_text_likelier(stories: Model) -> None:
    text = stories.generate("O", max_new_tokens=300)
    losses = [stories.perplexity(text, context=64, stride=stride).loss for stride in (None, 32, 8)]
    assert losses == sorted(losses, reverse=True)


def test_several_texts_count_by_their_tokens(stories: Model) -> None:
    texts = [STORY, "The dog.", "Lily was happy because she had a new friend."]
    each = [stories.perplexity(text) for text in texts]
    together = stories.perplexity(texts)
    assert together.tokens == sum(one.tokens for one in each)
    assert together.bytes == sum(one.bytes for one in each)
    assert together.loss == pytest.approx(sum(one.loss * one.tokens for one in each) / together.tokens, rel=1e-6)


def test_ids_can_be_scored_without_a_tokenizer(tiny: Model) -> None:
    ids = list(range(1, 60))
    found = tiny.perplexity(ids)
    assert (found.tokens, found.bytes, found.bits_per_byte) == (58, None, None)
    assert tiny.perplexity([ids]) == found
    assert tiny.perplexity(np.array(ids)) == found
    assert tiny.perplexity([np.array(ids), ids]).tokens == 116


def test_without_bos_the_first_character_does_not_count() -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, bos_token_id=None
    )
    model = Model(config, llama_ext.Tokenizer.characters("abcä"))
    found = model.perplexity("äabc")
    assert (found.tokens, found.bytes) == (3, 3)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))


@pytest.mark.parametrize("text", ["é", "éa", "日本", "ROMEO", "\ufffda"])
def test_a_first_token_that_is_part_of_a_character_counts_as_its_byte(text: str) -> None:
    model = Model.from_pretrained("demo")
    first = text_stream.token_bytes(model.tokenizer, model.tokenizer.encode(text)[0])
    assert text.encode().startswith(first)
    assert model.perplexity(text).bytes == len(text.encode()) - len(first)


@pytest.fixture(scope="module")
def letters() -> Model:
    """A model of characters, whose tokenizer has no BOS token."""
    config = llama_ext.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    return Model(config, llama_ext.Tokenizer.characters(" abcde"))


def test_a_message_names_the_text_that_is_empty(letters: Model) -> None:
    with pytest.raises(llama_ext.OptionError, match=r"texts\[1\] is empty"):
        letters.perplexity(["abc", ""])
    with pytest.raises(llama_ext.OptionError, match="perplexity: the text is empty"):
        letters.perplexity("")
    with pytest.raises(llama_ext.OptionError, match="the context is empty"):
        letters.loglikelihood("", "be")


def test_a_context_of_spaces_stays_a_context(letters: Model) -> None:
    ids = letters.tokenizer.encode(" be")
    assert letters.loglikelihood(" ", "be") == letters.loglikelihood(ids[:1], ids[1:])


def test_numbers_of_numpy_are_whole_numbers(letters: Model) -> None:
    assert letters.perplexity("abc" * 5, np.int64(3), np.uint8(6)) == letters.perplexity("abc" * 5, 3, 6)


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        ([[1, 2, 3]], {"stride": 0}),
        ([[1, 2, 3]], {"stride": 48}),
        ([[1, 2, 3]], {"stride": 10, "context": 10}),
        ([[1, 2, 3]], {"context": 1}),
        ([[1, 2, 3]], {"context": 49}),
        ([[1, 2, 3]], {"context": 10.0}),
        ([[1]], {}),
        ([], {}),
        (["text"], {}),
        ("text", {}),
    ],
)
def test_a_wrong_request_is_an_option_error(texts: Any, options: dict[str, Any], tiny: Model) -> None:
    with pytest.raises(llama_ext.OptionError):
        tiny.perplexity(texts, **options)


@pytest.mark.parametrize(
    ("texts", "error"), [([[1, 67]], llama_ext.TokenIdError), ([1.5], llama_ext.DTypeError), (5, llama_ext.DTypeError)]
)
def test_wrong_texts_are_a_typed_error(texts: Any, error: type[Exception], tiny: Model) -> None:
    with pytest.raises(error):
        tiny.perplexity(texts)


# Progress.


@pytest.fixture(scope="module")
def long_model() -> Model:
    config = llama_ext.LlamaConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2000,
    )
    return Model(config, seed=1)


def test_progress_is_told_within_a_window_and_adds_up(long_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(ProgressBar, "advance", lambda _, amount: told.append(amount))
    ids = [index * 7 % 30 for index in range(1800)]
    expected = long_model.perplexity(ids)
    assert len(told) > 2
    assert sum(told) == expected.tokens == 1799
    told.clear()
    assert long_model.perplexity(ids, context=900, stride=300).tokens == sum(told) == 1799


def test_what_a_progress_bar_raises_ends_the_scoring_and_harms_nothing(long_model: Model) -> None:
    ids = np.arange(1800, dtype=np.int32) % 30
    expected, _ = long_model._core.score(ids, 1)

    def fail(_: int) -> None:
        raise RuntimeError("no terminal")

    with pytest.raises(RuntimeError, match="no terminal"):
        long_model._core.score(ids, 1, fail)
    np.testing.assert_array_equal(long_model._core.score(ids, 1, lambda _: None)[0], expected)
