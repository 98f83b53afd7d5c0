"""Rows that decode on the GPU by themselves, some tokens ahead of the one that is told: what is told is what one pass after the other
gives, whatever happens to a row, a session or a logit meanwhile."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import llama_ext
from devices import IS_EMULATED, REFERENCE, only_emulated, requires_cuda
from llama_ext import NumericError, OptionError, _core
from tolerances import relative_rms, units

pytestmark = [requires_cuda, pytest.mark.gpu]

VOCABULARY = 61
PROMPTS = [[1, 2, 3, 4, 5], [7, 8], [9, 10, 11, 12, 13], [20, 21, 22]]
Event = tuple[int, int, float, str]


@functools.cache
def tiny(device: str = "cuda", dtype: str = "float32", compute: str = "auto") -> llama_ext.LlamaForCausalLM:
    config = llama_ext.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=600,
        initializer_range=0.35,
    )
    return llama_ext.LlamaForCausalLM(config, seed=11, device=device, dtype=dtype, compute=compute)


def start(
    model: llama_ext.LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    tokens: int | Sequence[int],
    *,
    sampling: dict[str, Any] | None = None,
    eos: Sequence[int] = (),
    **options: Any,
) -> _core.Generation:
    copies = options.get("copies", 1)
    return _core.Generation(
        model._core,
        [np.array(prompt, np.int32) for prompt in prompts],
        sampling=sampling or {"temperature": 0.0},
        max_new_tokens=[tokens] * len(prompts) * copies if isinstance(tokens, int) else list(tokens),
        eos=list(eos),
        seed=5,
        **{"kv_dtype": "float32", **options},
    )


def steps(generation: _core.Generation) -> list[list[Event]]:
    found = []
    while not generation.done:
        found.append(generation.step())
    return found


def by_row(events: list[list[Event]]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for step in events:
        for row, token, _, _ in step:
            rows.setdefault(row, []).append(token)
    return rows


def one_by_one(
    model: llama_ext.LlamaForCausalLM, prompt: Sequence[int], tokens: int, sampling: dict[str, Any], kv_dtype: str
) -> list[tuple[int, float]]:
    """Passes of the same model, whose logits are read back and sampled on the host."""
    session = _core.Session(model._core, len(prompt) + tokens, kv_dtype)
    output: list[int] = []
    found = []
    logits = session.append(np.array(prompt, np.int32), "last")
    for counter in range(tokens):
        token, logprob = REFERENCE.backend.sample(logits, sampling, list(prompt), output, 5, 0, counter)
        found.append((token, logprob))
        output.append(token)
        logits = session.append(np.array([token], np.int32), "last")
    return found


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("int4", "int8")])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.2, "top_k": 20, "top_p": 0.95, "min_p": 0.01},
        {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "logit_bias": {3: 2.0}},
        {"temperature": 0.0, "presence_penalty": 1.5},
    ],
    ids=["greedy", "filters", "penalties", "greedy-penalties"],
)
def test_each_token_is_the_one_that_its_logits_give(sampling: dict[str, Any], dtype: str, kv_dtype: str) -> None:
    model = tiny(dtype=dtype)
    expected = one_by_one(model, PROMPTS[0], 14, sampling, kv_dtype)
    events = steps(start(model, PROMPTS[:1], 14, sampling=sampling, kv_dtype=kv_dtype))
    assert [len(step) for step in events] == [1] * 14
    assert [step[0][1] for step in events] == [token for token, _ in expected]
    for (_, logprob), step in zip(expected, events, strict=True):
        assert abs(step[0][2] - logprob) <= np.spacing(np.float32(abs(logprob)))


@pytest.mark.parametrize(
    ("rows", "dtype", "kv_dtype"),
    [(33, "float32", "float32"), (33, "bfloat16", "bfloat16"), (70, "int4", "float32"), (70, "int4", "int8")],
    ids=str,
)
def test_large_batches_decode_like_any_others(rows: int, dtype: str, kv_dtype: str) -> None:
    """Keys of 32 rows and more are stored by a kernel of their own, and products of more rows unpack quantised weights."""
    prompts = [[i % VOCABULARY, (7 * i + 1) % VOCABULARY] for i in range(rows)]
    options: dict[str, Any] = {"max_batch_size": rows, "kv_dtype": kv_dtype}
    found, again = (by_row(steps(start(tiny(dtype=dtype), prompts, 5, **options))) for _ in range(2))
    assert found == again
    assert {len(tokens) for tokens in found.values()} == {5}
    exact = tiny("cpu", dtype, "exact")
    gaps = []
    for row, tokens in found.items():
        logits = exact(np.array([prompts[row] + tokens]))[0, 1:-1]
        gaps.append((logits.max(axis=1) - logits[np.arange(5), tokens]) / logits.std())
    # The likeliest token, or one that roundings to 8 bits make the likeliest.
    assert np.max(gaps) < 0.1
    assert np.mean(np.equal(gaps, 0)) > 0.9


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_positions_may_grow_beyond_what_a_recording_is_good_for(kv_dtype: str) -> None:
    prompt = (np.arange(250) * 7 % VOCABULARY).tolist()
    sampling = {"temperature": 1.0}
    expected = one_by_one(tiny(), prompt, 12, sampling, kv_dtype)
    events = steps(start(tiny(), [prompt], 12, sampling=sampling, kv_dtype=kv_dtype))
    assert [step[0][1] for step in events] == [token for token, _ in expected]


@only_emulated
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_tokens_have_the_same_bits_in_any_order_of_turns(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a row's keys grow from one part of decoding attention to the next, of which the last block merges both."""
    prompts = [(np.arange(125) * 7 % VOCABULARY).tolist(), PROMPTS[1]]
    found = []
    for order in ("forward", "backward", "shuffled"):
        monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order)
        found.append(steps(start(tiny(dtype=dtype), prompts, 8, sampling={"temperature": 1.0}, kv_dtype="bfloat16")))
    assert found[1] == found[0]
    assert found[2] == found[0]


@only_emulated
def test_a_token_is_five_kernels_a_layer_and_four_more() -> None:
    """The embedding, the head with the last norm and two to draw; of each layer two products, attention, and two products."""
    library = ctypes.CDLL(os.environ["LLAMA_EXT_CUDA_LIBRARY"])
    model = tiny(dtype="bfloat16")
    counts = []
    for tokens in (6, 16):
        before = library.cuda_emulation_launches()
        steps(start(model, PROMPTS[:1], tokens, sampling={"temperature": 1.0}, kv_dtype="bfloat16"))
        counts.append(library.cuda_emulation_launches() - before)
    assert counts[1] - counts[0] == 10 * (4 + 2 * 5)


def test_rows_that_end_early_make_room_and_change_nothing_for_the_others() -> None:
    sampling = {"temperature": 1.5}
    options: dict[str, Any] = {"sampling": sampling, "eos": range(0, VOCABULARY, 9), "copies": 2}
    expected = by_row(steps(start(tiny("cpu"), PROMPTS, 15, **options)))
    assert len({len(tokens) for tokens in expected.values()}) > 3
    for size in (1, 2, 3, 16):
        assert by_row(steps(start(tiny(), PROMPTS, 15, max_batch_size=size, **options))) == expected


def test_rows_of_different_lengths_end_when_they_should() -> None:
    lengths = [1, 12, 0, 7]
    found = by_row(steps(start(tiny(), PROMPTS, lengths)))
    assert found == by_row(steps(start(tiny("cpu"), PROMPTS, lengths)))
    assert [len(found[row]) for row in range(4)] == [1, 12, 1, 7]  # -1 tells that a row has none


def test_a_row_that_is_stopped_says_no_more() -> None:
    expected = by_row(steps(start(tiny(), PROMPTS, 14)))
    generation = start(tiny(), PROMPTS, 14)
    events = [generation.step() for _ in range(6)]
    generation.stop(1)
    events += steps(generation)
    found = by_row(events)
    assert found.pop(1) == expected.pop(1)[:6]
    assert found == expected


def test_a_generation_may_be_left_at_any_moment() -> None:
    for count in range(1, 7):
        generation = start(tiny(), PROMPTS[:2], 20)
        for _ in range(count):
            generation.step()
        del generation
    assert len(steps(start(tiny(), PROMPTS[:1], 5))) == 5


def test_threads_that_share_a_model_generate_what_each_would_alone() -> None:
    expected = [by_row(steps(start(tiny(), [prompt], 12)))[0] for prompt in PROMPTS]

    def generate(prompt: Sequence[int]) -> list[list[int]]:
        return [by_row(steps(start(tiny(), [prompt], 12)))[0] for _ in range(1 if IS_EMULATED else 20)]

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        for found, tokens in zip(threads.map(generate, PROMPTS), expected, strict=True):
            assert all(each == tokens for each in found)


def test_threads_whose_keys_are_several_parts_generate_what_each_would_alone() -> None:
    """Parts of decoding attention are counted in memory that all of a model's generations share."""
    model = tiny(dtype="bfloat16")
    prompts = [(np.arange(137) * step % VOCABULARY).tolist() for step in (3, 5, 7)]

    def generate(prompt: Sequence[int]) -> list[int]:
        return by_row(steps(start(model, [prompt], 8, kv_dtype="bfloat16")))[0]

    expected = [generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        for _ in range(2 if IS_EMULATED else 20):
            assert list(threads.map(generate, prompts)) == expected


def continued(tokens: int, **options: Any) -> tuple[_core.Session, _core.Generation]:
    session = _core.Session(tiny()._core, 64, "float32")
    session.append(np.array([1, 2, 3], np.int32), "none")
    return session, start(tiny(), [[4, 5]], tokens, session=session, **options)


def test_a_continued_session_holds_what_was_told_but_the_newest_token() -> None:
    session, generation = continued(12)
    told: list[int] = []
    while not generation.done:
        assert session.tokens == [1, 2, 3, 4, 5, *told[:-1]] or not told
        told += [event[1] for event in generation.step()]
    assert session.tokens == [1, 2, 3, 4, 5, *told[:-1]]
    assert told == [token for token, _ in one_by_one(tiny(), [1, 2, 3, 4, 5], 12, {"temperature": 0.0}, "float32")]
    # The cache behind its end is another text's, and is written over.
    again = session.append(np.array([told[-1]], np.int32), "last")
    fresh = _core.Session(tiny()._core, 64, "float32")
    assert relative_rms(again, fresh.append(np.array([1, 2, 3, 4, 5, *told], np.int32), "last")) < units("logits")


def test_somebody_may_go_on_with_a_continued_session_and_come_back() -> None:
    _, undisturbed = continued(14)
    expected = by_row(steps(undisturbed))
    session, generation = continued(14)
    events: list[list[Event]] = []
    while not generation.done:
        events.append(generation.step())
        length = session.length
        if len(events) % 3 == 0:
            session.append(np.array([40, 41, 42, 43], np.int32), "last")
            session.rewind(length)
    assert by_row(events) == expected


def test_a_continued_session_that_was_changed_is_an_error() -> None:
    session, generation = continued(14)
    for _ in range(6):
        generation.step()
    session.rewind(session.length - 1)
    with pytest.raises(OptionError, match="the session was changed"):
        generation.step()


def test_logits_that_are_not_finite_are_the_error_that_a_pass_gives() -> None:
    config = tiny().config
    greedy = by_row(steps(start(tiny(), PROMPTS[:1], 12)))[0]
    # The token that is drawn in the middle has NaN in its embedding, and is met there for the first time.
    at = next(i for i in range(5, 11) if greedy[i] not in [*PROMPTS[0], *greedy[:i]])
    texts = []
    for device in ("cpu", "cuda"):
        model = llama_ext.LlamaForCausalLM(config, seed=11, device=device)
        table = tiny()._core.read("embedding")
        for slot in model._core.slots():
            model._core.load(slot[0], tiny()._core.read(slot[0]), "float32")
        table = np.array(table)
        table[greedy[at]] = np.nan
        model._core.load("embedding", table, "float32")
        generation = start(model, PROMPTS[:1], 12)
        told = [generation.step()[0][1] for _ in range(at + 1)]
        assert told == greedy[: at + 1]
        for _ in range(2):  # nothing has advanced, so the same happens again
            with pytest.raises(NumericError, match=r"forward: sequence 0, position") as caught:
                generation.step()
            texts.append(str(caught.value).replace("-nan", "nan"))
    assert len(set(texts)) == 1


def test_counts_are_of_tokens_that_were_told() -> None:
    generation = start(tiny(), PROMPTS[:2], 9)
    steps(generation)
    other = start(tiny("cpu"), PROMPTS[:2], 9)
    steps(other)
    assert generation.counts == other.counts
    assert [generation.row_counts(row) for row in range(2)] == [other.row_counts(row) for row in range(2)]


@pytest.mark.skipif(IS_EMULATED, reason="an emulated GPU takes its time")
def test_hundreds_of_tokens_of_many_rows_are_those_of_the_cpu() -> None:
    options: dict[str, Any] = {"sampling": {"temperature": 1.1, "top_p": 0.95}, "eos": [3], "copies": 12}
    expected = by_row(steps(start(tiny("cpu"), PROMPTS, 500, **options)))
    assert by_row(steps(start(tiny(), PROMPTS, 500, **options))) == expected
