"""What may be given to `generate`, what contradicts what, and what holds when nothing is said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llama_ext.errors import ContextLengthError, LlamaExtError, OptionError, TokenIdError, UnsupportedError
from llama_ext.models.generation_config import GenerationDefaults
from llama_ext.runtime.options import DEFAULT_NEW_TOKENS, GenerateOptions, GenerationPlan, plan_generation

GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def plan(defaults: GenerationDefaults | None = None, **given: Any) -> GenerationPlan:
    return plan_generation(given, defaults or GenerationDefaults(), eos=[2], vocabulary=100)


def sampling(made: GenerationPlan) -> dict[str, object]:
    return {name: made.sampling[name] for name in GREEDY}


def test_nothing_said_is_greedy_and_256_tokens() -> None:
    made = plan()
    assert sampling(made) == GREEDY
    assert made.new_tokens(10, 1000) == DEFAULT_NEW_TOKENS == 256
    assert made.num_beams == made.num_return_sequences == 1
    assert made.eos == (2,)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": 0.8}, {"temperature": 0.8}),
        ({"top_k": 40}, {"temperature": 1.0, "top_k": 40}),
        ({"top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"min_p": 0.1}, {"temperature": 1.0, "min_p": 0.1}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.5, "top_k": 1000}, {"temperature": 0.5, "top_k": 100}),
        ({"temperature": 0}, {}),
        ({"temperature": 0, "top_p": 0.9}, {}),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {}),
        ({"do_sample": False, "temperature": 0.0, "top_p": 1}, {}),
        ({"temperature": None, "top_k": None}, {}),
    ],
)
def test_an_option_that_only_makes_sense_for_sampling_turns_it_on(
    given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert sampling(plan(**given)) == {**GREEDY, **expected}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_length": 5, "max_new_tokens": 5}, "both max_length"),
        ({"do_sample": False, "temperature": 0.7}, r"do_sample=False contradicts temperature=0\.7"),
        ({"do_sample": False, "top_k": 5}, "contradicts top_k=5"),
        ({"do_sample": True, "temperature": 0}, "do_sample=True contradicts temperature=0"),
        ({"num_beams": 4, "temperature": 0.7}, "num_beams=4 contradicts temperature"),
        ({"num_beams": 4, "do_sample": True}, "num_beams=4 contradicts do_sample=True"),
        ({"num_return_sequences": 2}, "under greedy search"),
        ({"num_return_sequences": 2, "temperature": 0}, "under greedy search"),
        ({"num_return_sequences": 5, "num_beams": 4}, "more than num_beams=4"),
        ({"length_penalty": 2.0}, "num_beams > 1"),
        ({"early_stopping": True, "temperature": 1.0}, "num_beams > 1"),
    ],
)
def test_options_that_contradict_each_other_are_an_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan(**given)


@pytest.mark.parametrize(
    "given", [{"stop": "."}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"logit_bias": {1: 1.0}}]
)
def test_beam_search_refuses_what_it_does_not_do(given: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="beam search"):
        plan(num_beams=2, **given)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, "hot", True, [1]]),
        ("top_k", [-1, 1.5, "40", True]),
        ("top_p", [0, -0.5, 1.1, math.nan]),
        ("min_p", [1.0, -0.1]),
        ("repetition_penalty", [0, -1]),
        ("presence_penalty", [math.inf, None if False else "x"]),
        ("frequency_penalty", [math.nan]),
        ("max_new_tokens", [-1, 1.5, True, 2**31, 10**30]),
        ("max_length", [0, -5]),
        ("num_beams", [0, 2.0]),
        ("num_return_sequences", [0]),
        ("seed", [-1, 2**64, 1.0, True]),
        ("do_sample", [1, "yes"]),
        ("stop", ["", ["a", ""], [1], 5, b"x"]),
        ("logit_bias", [[1], {1: math.nan}, {1: math.inf}, {1: 1e39}, {1: 10**400}, {1: "x"}, {"a": 1.0}]),
        ("eos_token_id", ["</s>", 1.5]),
        ("generation_config", [5, "x"]),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_the_option(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(OptionError, match=name):
            plan(**{name: value})


def test_a_logit_bias_may_be_any_number() -> None:
    for bias in (1, 0.5, np.float32(0.5), np.int64(2), np.finfo(np.float32).max, 3.40282347e38, -1e39, -math.inf):
        assert plan(logit_bias={1: bias}).sampling["logit_bias"] == {1: float(bias)}


def test_the_keys_of_a_logit_bias_are_named_as_what_is_wrong() -> None:
    for key in ("1", 1.5, True, None):
        with pytest.raises(
            OptionError, match=f"each key of logit_bias must be a token id, a whole number, got {key!r}"
        ):
            plan(logit_bias={key: 1.0})


@pytest.mark.parametrize("beams", [1025, 10**9])
def test_too_many_beams_are_told_in_the_users_words(beams: int) -> None:
    assert plan(num_beams=1024).num_beams == 1024
    with pytest.raises(OptionError, match=f"^num_beams must be at most 1024, got {beams}$"):
        plan(num_beams=beams)
    with pytest.raises(
        OptionError, match=r"at most 1024.*from the checkpoint's generation_config\.json; pass num_beams=1"
    ):
        plan(GenerationDefaults(num_beams=beams))


# Python converts no more than 4,300 digits to text: a message must not try.
ENDLESS = 10**5000


@pytest.mark.parametrize("name", sorted(set(GenerateOptions.__annotations__) - {"logit_bias"}))
def test_a_number_without_end_is_an_error_that_names_the_option(name: str) -> None:
    for value in (ENDLESS, -ENDLESS):
        with pytest.raises((OptionError, TokenIdError), match=name):
            plan(**{name: value})


@pytest.mark.parametrize(
    "given",
    [
        {"logit_bias": {ENDLESS: 1.0}},
        {"logit_bias": {1: ENDLESS}},
        {"logit_bias": {1: -ENDLESS}},
        {"eos_token_id": [1, ENDLESS]},
        {"stop": [ENDLESS]},
        {"adapter": [ENDLESS]},
        {"generation_config": {"max_length": ENDLESS}},
        {"generation_config": {"repetition_penalty": ENDLESS}},
        {"generation_config": {ENDLESS: 1}},
    ],
)
def test_so_is_one_inside_another_value(given: dict[str, Any]) -> None:
    with pytest.raises((OptionError, TokenIdError), match="|".join([*given, "max_length", "repetition_penalty"])):
        plan(**given)


@pytest.mark.parametrize("given", [{"eos_token_id": 100}, {"eos_token_id": [2, -1]}, {"logit_bias": {100: 1.0}}])
def test_a_token_outside_the_vocabulary_is_an_error(given: dict[str, Any]) -> None:
    with pytest.raises(TokenIdError, match=next(iter(given))):
        plan(**given)


def test_an_unknown_option_lists_close_matches() -> None:
    with pytest.raises(OptionError, match="unknown option 'max_new_token'; did you mean max_new_tokens"):
        plan(max_new_token=5)
    with pytest.raises(
        OptionError, match="unknown option 'zzz'; known: adapter, do_sample, draft_model, early_stopping"
    ):
        plan(zzz=5)


def test_every_option_may_be_none_which_is_not_given() -> None:
    given = dict.fromkeys(GenerateOptions.__annotations__)
    assert sampling(plan(**given)) == GREEDY


# What the checkpoint says.


def test_the_checkpoint_decides_what_the_caller_leaves_open() -> None:
    says = GenerationDefaults(do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=7, repetition_penalty=1.2)
    made = plan(says)
    assert sampling(made) == {**GREEDY, "temperature": 0.6, "top_p": 0.9}
    assert made.sampling["repetition_penalty"] == 1.2
    assert made.new_tokens(10, 1000) == 7


def test_the_caller_overrules_the_checkpoint() -> None:
    says = GenerationDefaults(do_sample=True, temperature=0.6, top_p=0.9, max_length=20)
    assert sampling(plan(says, do_sample=False)) == GREEDY
    assert sampling(plan(says, temperature=0)) == GREEDY
    assert sampling(plan(says, temperature=0.3)) == {**GREEDY, "temperature": 0.3, "top_p": 0.9}
    assert plan(says, num_beams=3).num_beams == 3
    assert plan(says, max_new_tokens=50).new_tokens(10, 1000) == 50
    beams = GenerationDefaults(num_beams=4, length_penalty=0.5, early_stopping=True)
    assert (plan(beams).num_beams, plan(beams).length_penalty, plan(beams).early_stopping) == (4, 0.5, True)
    assert plan(beams, temperature=1.0).num_beams == 1


def test_a_temperature_without_do_sample_in_the_checkpoint_does_not_sample() -> None:
    assert sampling(plan(GenerationDefaults(temperature=0.6, top_p=0.9))) == GREEDY


def test_a_generation_config_replaces_the_checkpoints() -> None:
    says = GenerationDefaults(do_sample=True, temperature=0.6)
    made = plan(says, generation_config={"max_new_tokens": 3})
    assert sampling(made) == GREEDY
    assert made.new_tokens(1, 100) == 3
    with pytest.raises(LlamaExtError, match="temperature"):
        plan(generation_config={"temperature": -1})


# Lengths.


def test_a_default_is_cut_to_the_context_and_a_request_is_not() -> None:
    assert plan().new_tokens(90, 100) == 10
    assert plan().new_tokens(100, 100) == 0
    assert plan(max_new_tokens=10).new_tokens(90, 100) == 10
    with pytest.raises(ContextLengthError, match=r"90 tokens.*max_new_tokens=11.*101.*100.*at most 10"):
        plan(max_new_tokens=11).new_tokens(90, 100)


def test_a_prompt_longer_than_the_context_is_never_cut() -> None:
    for given in ({}, {"max_new_tokens": 0}, {"max_length": 50}):
        with pytest.raises(ContextLengthError, match=r"101 tokens.*room for 100"):
            plan(**given).new_tokens(101, 100)


def test_max_length_counts_the_prompt() -> None:
    made = plan(max_length=50)
    assert made.new_tokens(10, 100) == 40
    assert made.new_tokens(50, 100) == 0
    with pytest.raises(OptionError, match="51 tokens already, more than max_length=50"):
        made.new_tokens(51, 100)
    with pytest.raises(ContextLengthError, match=r"max_length=101.*100"):
        plan(max_length=101).new_tokens(10, 100)


def test_the_checkpoints_max_length_is_cut_to_the_context_and_must_hold_the_prompt() -> None:
    says = GenerationDefaults(max_length=4096)
    assert plan(says).new_tokens(10, 100) == 90
    assert plan(GenerationDefaults(max_length=20)).new_tokens(15, 100) == 5
    with pytest.raises(OptionError, match="max_length=20 of the checkpoint"):
        plan(GenerationDefaults(max_length=20)).new_tokens(25, 100)


# Seeds, ends, stops.


def test_no_seed_is_a_new_one_each_time() -> None:
    assert len({plan(temperature=1.0).seed for _ in range(8)}) == 8
    assert plan(temperature=1.0, seed=2**64 - 1).seed == 2**64 - 1


def test_end_tokens_can_be_replaced_or_removed() -> None:
    assert plan(eos_token_id=5).eos == (5,)
    assert plan(eos_token_id=[5, 6, 5]).eos == (5, 6)
    assert plan(eos_token_id=[]).eos == ()
    # One that a checkpoint names and its vocabulary lacks can never come.
    assert plan_generation({}, GenerationDefaults(), eos=[2, 1000], vocabulary=100).eos == (2,)


def test_stop_takes_one_string_or_several() -> None:
    assert plan(stop="\n").stop == ("\n",)
    assert plan(stop=["a", "b", "a"]).stop == ("a", "b")
    assert plan(stop=[]).stop == ()


@pytest.mark.parametrize(
    ("given", "meant"),
    [("stop_strings", "stop"), ("assistant_model", "draft_model"), ("n_predict", "max_new_tokens")],
)
def test_what_other_libraries_call_otherwise_is_named(given: str, meant: str) -> None:
    with pytest.raises(OptionError, match=rf"^unknown option '{given}'; did you mean {meant}\?$"):
        plan(**{given: 1})
