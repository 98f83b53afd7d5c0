"""Continuous batching: rows take turns, share what their prompts share, and give what each gives alone."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_ext
from devices import each_isa
from llama_ext import _core
from random_models import build, cached, tokens

Model = llama_ext.LlamaForCausalLM
Event = tuple[int, int, float, str]
STARTS = ["Once upon a time", "The", "Lily and Tom went to the park. They", "One day, a big dog", "Tom said"]


def generation(model: _core.Model, prompts: Sequence[Any], new: int | Sequence[int], **options: Any) -> Any:
    copies = options.get("copies", 1)
    given = {"sampling": {}, "eos": [], "seed": 0, "kv_dtype": "float32", **options}
    lengths = [new] * (len(prompts) * copies) if isinstance(new, int) else list(new)
    return _core.Generation(model, [np.asarray(p, np.int32) for p in prompts], max_new_tokens=lengths, **given)


def by_row(events: Sequence[Event], rows: int) -> list[list[tuple[int, float, str]]]:
    found: list[list[tuple[int, float, str]]] = [[] for _ in range(rows)]
    for row, token, logprob, finish in events:
        found[row].append((token, logprob, finish))
    return found


def everything(made: Any) -> list[list[tuple[int, float, str]]]:
    events = []
    while not made.done:
        events += made.run(1000)
    return by_row(events, made.rows)


@pytest.fixture(scope="module")
def small() -> _core.Model:
    return build(_core.Backend("cpu", 2), width=40, ffn_width=90, heads=4, head_dim=10, context=2000)


# What comes out.


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_ragged_list_gives_what_each_prompt_gives_alone(size: int, stories: Model) -> None:
    prompts = [start + " and" * (index % 4) for index, start in enumerate(STARTS * 3)]
    options: dict[str, Any] = {"max_new_tokens": 40, "stop": ["ll", "."], "return_details": True}
    alone = [stories.generate(prompt, **options) for prompt in prompts]
    assert len({len(output.token_ids) for output in alone}) > 3, "the rows should end at different times"
    for output, expected in zip(stories.generate(prompts, max_batch_size=size, **options), alone, strict=True):
        assert (output.text, output.token_ids) == (expected.text, expected.token_ids)
        assert (output.logprobs, output.finish_reason) == (expected.logprobs, expected.finish_reason)


@pytest.mark.parametrize("options", [{"seed": 5}, {"seed": 5, "num_return_sequences": 3}])
def test_samples_do_not_depend_on_how_many_run_at_once(options: dict[str, Any], stories: Model) -> None:
    given = {"max_new_tokens": 30, "temperature": 1.1, "repetition_penalty": 1.2, **options}
    expected = stories.generate(STARTS, max_batch_size=1, **given)
    assert len(set(expected)) == len(expected)
    for size in (2, 5, 64):
        assert stories.generate(STARTS, max_batch_size=size, **given) == expected


@each_isa
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_a_batch_are_those_of_each_prompt_bit_for_bit(dtype: str, isa: str) -> None:
    model = cached(isa, 2, dtype)
    system = tokens(37, 1)
    prompts = [
        tokens(3, 2),
        [*system, *tokens(4, 3)],
        tokens(150, 4),
        [*system, *tokens(9, 5)],
        system,
        [*system[:20], 7],
    ]
    lengths = [5, 2, 7, 9, 1, 4]
    alone = [
        everything(generation(model, [prompt], length, kv_dtype=dtype))[0]
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    for size in (1, 2, 16):
        found = generation(model, prompts, lengths, kv_dtype=dtype, max_batch_size=size)
        assert everything(found) == alone, size


# Who runs when.


def test_a_row_that_ends_makes_room_for_the_next_at_once(small: _core.Model) -> None:
    prompts = [tokens(4, seed) for seed in range(5)]
    made = generation(small, prompts, [2, 5, 1, 2, 1], max_batch_size=2)
    steps = []
    while not made.done:
        steps.append(sorted(event[0] for event in made.step()))
    # Two at a time; the prompt of a newcomer runs with the tokens of the other.
    assert steps == [[0, 1], [0, 1], [1, 2], [1, 3], [1, 3], [4]]
    assert made.counts["passes"] == len(steps)


def test_a_long_prompt_does_not_hold_up_the_others(small: _core.Model) -> None:
    prompts = [tokens(4, 0), tokens(3, 1), tokens(1500, 2)]
    made = generation(small, prompts, [12, 1, 2], max_batch_size=2)
    steps = [[event[0] for event in made.step()] for _ in range(6)]
    # 1500 tokens in pieces of at most 512 rows a pass: the first row gets its token in each of them.
    assert steps == [[0, 1], [0], [0], [0, 2], [0, 2], [0]]
    assert everything(generation(small, prompts, [12, 1, 2]))[2] == everything(generation(small, prompts[2:], 2))[0]


def test_rows_without_new_tokens_are_told_and_cost_nothing(small: _core.Model) -> None:
    made = generation(small, [tokens(4, 0), tokens(9, 1), tokens(5, 2)], [0, 2, 0], max_batch_size=1)
    assert sorted(event[:2] for event in made.step() if event[3]) == [(0, -1), (2, -1)]
    assert [event[0] for event in made.step()] == [1]
    assert made.done
    assert made.counts["tokens_run"] == 10


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_are_stopped_from_outside_leave_the_others_alone(seed: int, small: _core.Model) -> None:
    rng = random.Random(seed)
    system = tokens(40, 1).tolist()
    prompts = [
        rng.choice([system, system[:30], []]) + tokens(rng.randint(1, 5), rng.randint(0, 3)).tolist() for _ in range(12)
    ]
    expected = everything(generation(small, prompts, 6))
    made = generation(small, prompts, 6, max_batch_size=3)
    stopped: dict[int, int] = {}
    found: list[list[Any]] = [[] for _ in prompts]
    while not made.done:
        if rng.random() < 0.4:
            row = rng.randrange(len(prompts))
            made.stop(row)
            stopped.setdefault(row, len(found[row]))
        for row, *rest in made.step():
            found[row].append(tuple(rest))
    for row, told in enumerate(found):
        assert told == expected[row][: stopped.get(row, 6)]


def test_what_does_not_fit_into_memory_together_runs_one_after_the_other() -> None:
    model = build(
        _core.Backend("cpu", 1), width=32, ffn_width=8, layers=1, heads=64, kv_heads=64, head_dim=32, context=1 << 30
    )

    def fits(capacity: int) -> bool:
        try:
            _core.Session(model, capacity, "float32")
        except llama_ext.OutOfMemoryError:
            return False
        return True

    low, high = 1, 1 << 30
    while high - low > low // 50 + 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    # One takes 7 tenths of the memory that there is. Pages are only used as tokens come, so nothing of it is.
    new = low // 10 * 7
    made = generation(model, [[1, 2], [3, 4]], new, max_batch_size=2)
    assert [event[0] for event in made.run(3)] == [0, 0, 0]
    made.stop(0)
    assert [event[0] for event in made.run(2)] == [1, 1]
    with pytest.raises(llama_ext.OutOfMemoryError, match="one sequence"):
        generation(model, [[1, 2], [3, 4]], [1, min(2 * high, (1 << 30) - 2)])


# What is shared.


@pytest.mark.parametrize("size", [1, 2, 16])
def test_a_common_prefix_is_computed_once(size: int, small: _core.Model) -> None:
    system = tokens(100, 1).tolist()
    prompts = [system + tokens(5, seed).tolist() for seed in range(2, 10)]
    made = generation(small, prompts, 1, max_batch_size=size)
    everything(made)
    assert made.counts["tokens_run"] == 100 + 8 * 5
    counts = [made.row_counts(row) for row in range(8)]
    assert sorted(count["prompt_shared"] for count in counts) == [0] + [100] * 7
    assert sorted(count["prompt_run"] for count in counts) == [5] * 7 + [105]


def test_the_copies_of_a_prompt_are_computed_once(small: _core.Model) -> None:
    prompt = tokens(60, 1)
    made = generation(small, [prompt], 2, copies=8, sampling={"temperature": 1.0})
    everything(made)
    assert made.counts["tokens_run"] == 60 + 8
    made = generation(small, [prompt, tokens(3, 2), prompt], 2, max_batch_size=2)
    rows = everything(made)
    assert rows[0] == rows[2]
    assert made.counts["tokens_run"] == 60 + 3 + 3
    # Those that begin later only run the last token of the prompt, together: that is where their logits come from.
    made = generation(small, [prompt], 3, copies=6, max_batch_size=2, sampling={"temperature": 1.0})
    everything(made)
    assert made.counts["tokens_run"] == 60 + 2 + 6 * 2


def test_short_prefixes_are_not_waited_for(small: _core.Model) -> None:
    made = generation(small, [[1, 2, 3], [1, 2, 4], [1, 2, 5]], 1)
    assert len(made.step()) == 3


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_tree_of_prompts_is_computed_node_by_node(data: st.DataObject) -> None:
    # Edges of 16 tokens and more, which is what is worth waiting for. Each edge of the tree runs once, whatever the order
    # in which the prompts come and however many run at once.
    count = data.draw(st.integers(2, 10))
    prompts: list[list[int]] = []
    edges = 0
    for index in range(count):
        parent = data.draw(st.sampled_from([[], *prompts]))
        edge = [index + 1, *tokens(data.draw(st.integers(15, 20)), index).tolist()]
        prompts.append(parent + edge)
        edges += len(edge)
    order = data.draw(st.permutations(range(count)))
    model = _tree_model()
    # No prompt is the beginning of another: that one would run its last token again.
    leaves = [prompts[index] + [400 + index] for index in order]
    made = generation(model, leaves, 2, max_batch_size=data.draw(st.integers(1, 6)))
    found = everything(made)
    assert made.counts["tokens_run"] == edges + count + count
    for leaf, rows in zip(leaves, found, strict=True):
        assert everything(generation(model, [leaf], 2))[0] == rows


_TREE: list[_core.Model] = []


def _tree_model() -> _core.Model:
    if not _TREE:
        _TREE.append(build(_core.Backend("cpu", 1), width=24, ffn_width=40, heads=2, kv_heads=1, head_dim=12))
    return _TREE[0]


def test_the_output_says_how_much_of_a_prompt_was_shared(stories: Model) -> None:
    system = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    shared = len(stories.tokenizer.encode(system)) - 2
    outputs = stories.generate([system + "One", system + "Tom"], max_new_tokens=3, return_details=True)
    first, second = sorted(outputs, key=lambda output: output.shared_prompt_tokens)
    assert first.shared_prompt_tokens == 0
    assert shared <= second.shared_prompt_tokens < len(second.prompt_ids)


# Being interrupted.


def interrupted_everything(made: Any, seconds: Callable[[], float]) -> tuple[list[list[Any]], int]:
    """Runs to the end through any number of Ctrl-Cs, which must cost and change nothing."""

    def handler(*_: object) -> None:
        try:
            _ = made.done
        except (
            llama_ext.LlamaExtError
        ):  # in use: the core is at work. Anywhere else it would be Python that loses events
            raise KeyboardInterrupt from None

    events: list[Event] = []
    interrupts = 0
    before = signal.signal(signal.SIGINT, handler)
    try:
        while not made.done:
            timer = threading.Timer(seconds(), signal.raise_signal, [signal.SIGINT])
            timer.start()
            try:
                events += made.run(5)
            except KeyboardInterrupt:
                interrupts += 1
            timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    return by_row(events, made.rows), interrupts


@pytest.mark.parametrize("draft", [0, 4])
def test_after_ctrl_c_a_batch_goes_on_where_it_was(draft: int) -> None:
    model = build(_core.Backend("cpu", 2), width=256, ffn_width=700, layers=4, head_dim=32)
    system = tokens(120, 1).tolist()
    prompts = [(system if seed % 2 else []) + tokens(20 + seed, seed).tolist() for seed in range(12)]
    options: dict[str, Any] = {"sampling": {"temperature": 0.5, "frequency_penalty": -2.0}, "draft_tokens": draft}
    expected = everything(generation(model, prompts, 12, **options))
    rng = random.Random(1)
    interrupts = 0
    attempts = 0
    while interrupts <= 3:
        # The clock decides what is interrupted: a quick run may be over before its signal.
        attempts += 1
        assert attempts <= 60, f"{interrupts} interrupts in 60 runs"
        made = generation(model, prompts, 12, max_batch_size=5, **options)
        found, seen = interrupted_everything(made, lambda: rng.uniform(0.001, 0.02))
        assert found == expected
        interrupts += seen


# Options.


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, 2**31])
def test_a_wrong_batch_size_is_an_option_error(value: Any, tiny: Model) -> None:
    with pytest.raises(llama_ext.OptionError, match="max_batch_size"):
        tiny.generate([[1], [2]], max_batch_size=value)
    assert tiny.generate([[1], [2]], max_batch_size=None, max_new_tokens=1)


def test_beam_search_has_no_batch_size(tiny: Model) -> None:
    with pytest.raises(llama_ext.UnsupportedError, match="max_batch_size"):
        tiny.generate([1], num_beams=2, max_batch_size=2)


def test_the_rows_of_a_stream_begin_as_others_end(tiny: Model) -> None:
    prompts = [[1 + index] for index in range(5)]
    pieces = list(tiny.stream_generate(prompts, max_new_tokens=3, max_batch_size=2))
    assert [piece.row for piece in pieces] == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 4, 4, 4]
    for row, prompt in enumerate(prompts):
        found = [piece.token_id for piece in pieces if piece.row == row]
        assert prompt + found == tiny.generate(prompt, max_new_tokens=3)
