"""Speculation: guesses change how many steps a text takes, and nothing else."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_ext
from devices import each_isa
from llama_ext import _core
from random_models import CONFIG, build, repeating, tokens

Model = llama_ext.LlamaForCausalLM
LOOKUP = {"prompt_lookup_num_tokens": 6}


@functools.cache
def model(seed: int = 3, **changes: Any) -> Model:
    """A random model without a tokenizer whose greedy texts soon repeat themselves, more or less."""
    config = llama_ext.LlamaConfig(
        vocab_size=23,
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        eos_token_id=None,
        bos_token_id=None,
        **{"max_position_embeddings": 96, "initializer_range": 0.1, **changes},
    )
    return Model(config, seed=seed)


def plain(output: Any) -> Any:
    """What must not depend on speculation."""
    outputs = output if isinstance(output, list) else [output]
    return [(one.token_ids, one.logprobs, one.finish_reason, one.text) for one in outputs]


def guessed(options: dict[str, Any], how: str, k: int) -> dict[str, Any]:
    if how == "lookup":
        return {**options, "prompt_lookup_num_tokens": k}
    return {**options, "draft_model": model() if how == "itself" else model(4), "num_assistant_tokens": k}


# The same text.

sampling = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.2, 0.7, 1.5]),
        "repetition_penalty": st.sampled_from([0.5, 0.8, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 0.5]),
        "frequency_penalty": st.sampled_from([-0.5, 0.25]),
        "logit_bias": st.sampled_from([{3: 2.0}, {5: -np.inf, 7: 1.0}]),
        "eos_token_id": st.sampled_from([[4], [1, 9, 17]]),
        "max_new_tokens": st.integers(0, 40),
        "max_batch_size": st.integers(1, 4),
    },
)


@given(
    prompts=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=50), min_size=1, max_size=5),
    options=sampling,
    seed=st.integers(0, 2**64 - 1),
    k=st.integers(1, 9),
    how=st.sampled_from(["lookup", "itself", "another"]),
)
@settings(max_examples=150, deadline=None)
def test_speculation_changes_nothing(
    prompts: list[list[int]], options: dict[str, Any], seed: int, k: int, how: str
) -> None:
    given = {"max_new_tokens": 40, "seed": seed, "return_details": True, **options}
    expected = plain(model().generate(prompts, **given))
    found = model().generate(prompts, **guessed(given, how, k))
    assert plain(found) == expected
    for output in found:
        assert 0 <= output.accepted_tokens <= output.drafted_tokens


@each_isa
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.3, "top_k": 40}])
def test_speculation_changes_nothing_on_any_instruction_set(sampling: Any, dtype: str, isa: str) -> None:
    cores = [repeating(build(_core.Backend("cpu", threads, isa), dtype), period=7) for threads in (1, 2)]
    prompts = [tokens(130, 1), np.array([3, 4], np.int32), tokens(40, 2)]

    def events(core: _core.Model, **options: Any) -> list[Any]:
        made = _core.Generation(
            core, prompts, sampling=sampling, max_new_tokens=[40, 60, 30], eos=[], seed=9, kv_dtype=dtype, **options
        )
        told: list[list[Any]] = [[], [], []]
        while not made.done:
            for row, *rest in made.step():
                told[row].append(rest)
        assert not options or made.counts["passes"] < 60
        return told

    expected = events(cores[0])
    for k in (1, 5, 16):
        assert events(cores[1], draft_tokens=k) == expected
    assert events(cores[0], draft_tokens=5, draft_model=cores[1], draft_kv_dtype="float32") == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.1}])
@pytest.mark.parametrize("stop", [[], ["the"], ["she", "was", "."]])
def test_texts_streams_and_stop_strings_are_the_same(stop: list[str], options: dict[str, Any], stories: Model) -> None:
    prompt = "The dog and the cat. The dog and the cat. The dog"
    given = {"max_new_tokens": 80, "stop": stop, **options}
    expected = list(stories.stream_generate(prompt, **given))
    text = stories.generate(prompt, **given)
    for guess in (LOOKUP, {"draft_model": stories}):
        assert list(stories.stream_generate(prompt, **given, **guess)) == expected
        assert stories.generate(prompt, **given, **guess) == text
    several = [prompt, prompt + " and the", "One day"]
    assert stories.generate(several, **given, **LOOKUP) == stories.generate(several, **given)


def test_the_context_can_be_filled_to_its_end() -> None:
    prompt = [1, 2, 3] * 20
    expected = model().generate(prompt, max_new_tokens=36, return_details=True)
    for how in ("lookup", "itself", "another"):
        found = model().generate(prompt, **guessed({"max_new_tokens": 36, "return_details": True}, how, 9))
        assert plain(found) == plain(expected)
        assert len(found.token_ids) == 36


@pytest.mark.parametrize("context", [1, 10, 40, 65])
def test_a_draft_model_of_a_smaller_context_guesses_as_far_as_it_goes(context: int) -> None:
    short = model(3, max_position_embeddings=context)
    given = {"max_new_tokens": 50, "temperature": 0.4, "seed": 1, "return_details": True}
    expected = model().generate([[1] * 12, [1] * 12 + [2], [5, 6]], **given)
    found = model().generate([[1] * 12, [1] * 12 + [2], [5, 6]], draft_model=short, **given)
    assert plain(found) == plain(expected)
    assert (found[0].drafted_tokens > 0) == (context > 12)
    assert found[2].drafted_tokens <= max(context - 2, 0)


# Fewer steps.


def test_a_text_that_repeats_itself_takes_a_fraction_of_the_passes() -> None:
    core = repeating(build(_core.Backend("cpu", 1)), period=12)

    def made(k: int) -> Any:
        return _core.Generation(
            core, [tokens(1)], sampling={}, max_new_tokens=[200], eos=[], seed=0, kv_dtype="float32", draft_tokens=k
        )

    one, several = made(0), made(10)
    assert one.run(1000) == several.run(1000)
    assert one.counts["passes"] == 200
    # Once around the period nothing can be known; from then on 11 tokens a pass.
    assert several.counts["passes"] < 14 + 200 / 11 + 3
    counts = several.row_counts(0)
    assert counts["accepted"] == 200 - several.counts["passes"]
    assert counts["accepted"] >= counts["drafted"] - 10


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 4, "frequency_penalty": 0.3}])
def test_a_draft_model_that_is_the_model_is_always_right(options: dict[str, Any]) -> None:
    # Under sampling, too: it draws with the same random numbers.
    output = model().generate([1, 2], max_new_tokens=50, draft_model=model(), return_details=True, **options)
    assert output.drafted_tokens == output.accepted_tokens
    assert output.accepted_tokens >= 50 - 50 // 9 - 2


def test_a_better_draft_is_accepted_more_often_and_a_bad_one_soon_left_alone(stories: Model) -> None:
    def output(draft: Model) -> Any:
        return stories.generate(
            "Once upon a time", max_new_tokens=120, temperature=0.6, seed=2, return_details=True, draft_model=draft
        )

    config = llama_ext.LlamaConfig.from_dict({**stories.config.to_dict(), "num_hidden_layers": 1})
    bad = output(Model(config, seed=1))
    # The same weights, rounded: nearly of one opinion.
    rounded = Model(stories.config)
    for slot, _, _ in stories._core.slots():
        values = stories._core.read(slot)
        rounded._core.load(slot, np.asarray(values * (1 + 1e-3), np.float32), "float32")
    good = output(rounded)
    assert plain(good) == plain(bad)
    assert good.accepted_tokens > 0.8 * good.drafted_tokens > 0.5 * 120
    assert bad.accepted_tokens < 0.2 * bad.drafted_tokens
    assert bad.drafted_tokens < 30


def test_the_draft_of_a_shared_prefix_is_computed_once() -> None:
    core = build(_core.Backend("cpu", 1))
    system = tokens(100, 1).tolist()
    prompts = [np.array([*system, index], np.int32) for index in range(6)]
    made = _core.Generation(
        core,
        prompts,
        sampling={},
        max_new_tokens=[2] * 6,
        eos=[],
        seed=0,
        kv_dtype="float32",
        draft_tokens=4,
        draft_model=core,
    )
    made.run(100)
    assert made.counts["tokens_run"] == made.counts["draft_tokens_run"] + 6 == 100 + 6 + 6


def test_the_draft_of_copies_of_a_prompt_is_computed_once() -> None:
    core = build(_core.Backend("cpu", 1))
    made = _core.Generation(
        core,
        [tokens(100, 1)],
        sampling={"temperature": 1.0},
        max_new_tokens=[3] * 6,
        eos=[],
        seed=0,
        kv_dtype="float32",
        copies=6,
        draft_tokens=4,
        draft_model=core,
    )
    made.run(100)
    # The prompt, then for each row the token drawn from it and one guess: both are right.
    assert made.counts["tokens_run"] == 100 + 6 * 2
    assert made.counts["draft_tokens_run"] == 100 + 6


# Sessions.


@pytest.mark.parametrize("guess", [{"prompt_lookup_num_tokens": 8}, {"draft_model": None}])
@pytest.mark.parametrize("taken", [1, 2, 3, 7, 20])
def test_a_closed_stream_leaves_the_tokens_of_its_pieces(taken: int, guess: dict[str, Any]) -> None:
    guess = {"draft_model": model()} if "draft_model" in guess else guess
    prompt = [1, 2, 3, 4] * 5
    expected = model().generate(prompt, max_new_tokens=20)
    session = model().session()
    stream: Iterator[Any] = session.stream_generate(prompt, max_new_tokens=20, **guess)
    for count in range(taken):
        next(stream)
        # Between two pieces as well: what was guessed beyond them is nobody's business.
        assert session.tokens == expected[: len(prompt) + count]
    stream.close()  # type: ignore[attr-defined]
    assert session.tokens == expected[: len(prompt) + taken]
    more = session.append([9])
    np.testing.assert_array_equal(more, model()([[*expected[: len(prompt) + taken], 9]])[0, -1])


def test_a_session_that_was_used_in_between_and_rewound_goes_on_as_if_it_was_not() -> None:
    prompt = [1, 2, 3, 4] * 5
    expected = model().generate(prompt, max_new_tokens=24)
    for at in range(1, 12):
        session = model().session()
        stream = session.stream_generate(prompt, max_new_tokens=24, prompt_lookup_num_tokens=8)
        pieces = [next(stream).token_id for _ in range(at)]
        length = session.length
        session.append([7, 7, 7])
        session.rewind(length)
        assert prompt + pieces + [piece.token_id for piece in stream] == expected
    session = model().session()
    stream = session.stream_generate(prompt, max_new_tokens=24, prompt_lookup_num_tokens=8)
    next(stream)
    session.append([7])
    with pytest.raises(llama_ext.OptionError, match="changed"):
        list(stream)


def test_turn_after_turn_a_session_says_what_it_would_say(stories: Model) -> None:
    plain_session, session = stories.session(), stories.session()
    for prompt in ("The dog and the cat. The dog and", " One day the dog", " and the"):
        given = {"max_new_tokens": 40, "temperature": 0.5, "seed": 1}
        assert session.generate(prompt, **LOOKUP, **given) == plain_session.generate(prompt, **given)
        assert session.tokens == plain_session.tokens


def test_chat_answers_the_same(stories: Model) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    given: dict[str, Any] = {"chat_template": template, "max_new_tokens": 40}
    messages = [{"role": "user", "content": "The dog and the cat, the dog and the cat."}]
    assert stories.chat(messages, **given, **LOOKUP) == stories.chat(messages, **given)


# Options.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_lookup_num_tokens": -1}, llama_ext.OptionError, "prompt_lookup_num_tokens"),
        ({"prompt_lookup_num_tokens": 65}, llama_ext.OptionError, "at most 64"),
        ({"prompt_lookup_num_tokens": 1.5}, llama_ext.OptionError, "whole number"),
        ({"num_assistant_tokens": 3}, llama_ext.OptionError, "draft_model"),
        ({"draft_model": "demo"}, llama_ext.OptionError, "from_pretrained"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, llama_ext.UnsupportedError, "beam search"),
    ],
)
def test_a_wrong_option_is_a_typed_error(options: Any, error: type[Exception], message: str, tiny: Model) -> None:
    with pytest.raises(error, match=message):
        tiny.generate([1], **options)


def test_a_draft_model_must_fit(tiny: Model, stories: Model) -> None:
    with pytest.raises(llama_ext.OptionError, match=r"vocabulary of 23 tokens and the model one of 67"):
        tiny.generate([1], draft_model=model())
    with pytest.raises(llama_ext.OptionError, match="both"):
        tiny.generate([1], draft_model=tiny, prompt_lookup_num_tokens=2)
    for value in (0, 65, True):
        with pytest.raises(llama_ext.OptionError, match="num_assistant_tokens"):
            tiny.generate([1], draft_model=tiny, num_assistant_tokens=value)
    with pytest.raises(llama_ext.UnsupportedError, match="draft_model"):
        tiny.generate([1], draft_model=tiny, num_beams=2)
    characters = "".join(chr(0x4E00 + index) for index in range(stories.config.vocab_size))
    other = Model(stories.config, llama_ext.Tokenizer.characters(characters))
    with pytest.raises(llama_ext.OptionError, match="another tokenizer"):
        stories.generate("The", draft_model=other)
    with pytest.raises(llama_ext.OptionError, match="draft model has a vocabulary"):
        _core.Generation(
            tiny._core, [tokens(1)], sampling={}, max_new_tokens=[1], eos=[], seed=0, kv_dtype="float32",
            draft_tokens=1, draft_model=model()._core,
        )  # fmt: skip


def test_the_checkpoint_may_ask_for_prompt_lookup() -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "return_details": True}
    config = {"prompt_lookup_num_tokens": 100}  # more than there is, which is only a hint
    prompt = [1, 2, 3] * 8
    found = model().generate(prompt, generation_config=config, **options)
    assert found.drafted_tokens > 0
    assert plain(found) == plain(model().generate(prompt, **options))
    off = model().generate(prompt, generation_config=config, prompt_lookup_num_tokens=0, **options)
    assert off.drafted_tokens == 0
    assert model().generate(prompt, generation_config=config, num_beams=2, max_new_tokens=3)


def test_a_draft_model_with_a_fault_is_named() -> None:
    broken = Model(model().config, seed=1)
    slot, shape, _ = next(entry for entry in broken._core.slots() if entry[0] == "final_norm")
    broken._core.load(slot, np.full(shape, np.nan, np.float32), "float32")
    with pytest.raises(llama_ext.NumericError, match="draft model"):
        model().generate([1, 2], draft_model=broken)


# Company.


def test_threads_share_a_model_and_its_draft() -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.6, "draft_model": model(4)}
    expected = [model().generate([[1, 2], [3]], seed=seed, **options) for seed in range(8)]
    found: dict[int, Any] = {}

    def work(seed: int) -> None:
        for _ in range(5):
            found[seed] = model().generate([[1, 2], [3]], seed=seed, **options)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[seed] for seed in range(8)] == expected


def test_the_period_of_the_repeating_model_is_what_it_is_said_to_be() -> None:
    core = repeating(build(_core.Backend("cpu", 1)), period=12)
    made = _core.Generation(
        core, [np.array([25], np.int32)], sampling={}, max_new_tokens=[30], eos=[], seed=0, kv_dtype="float32"
    )
    assert [event[1] for event in made.run(40)] == [24 + (2 + index) % 12 for index in range(30)]
    assert CONFIG["vocabulary"] > 36
