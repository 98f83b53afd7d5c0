"""Products of one row and attention of a recorded token as links of one kernel: the bits are those of kernels one after the other, whatever the
weights, shapes and positions."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import llama_ext
from devices import IS_EMULATED, only_emulated, only_hopper, requires_cuda
from llama_ext import _core

pytestmark = [requires_cuda, only_hopper, pytest.mark.gpu]

VOCABULARY = 64
LONG = (np.arange(300) * 7 % VOCABULARY).tolist()
# hidden, intermediate, heads, key/value heads. Rows of W come by sixteens, and groups of a row by twos.
SHAPES = {
    "even": (256, 512, 4, 2),
    "many-units": (512, 3072, 8, 1),
    "heads-of-128": (512, 768, 4, 2),
    "heads-of-32": (256, 1024, 8, 8),
}
# More rows for each of an emulated GPU's four blocks than have room: gates and ups stay a kernel of their own.
TOO_MANY_ROWS = (1792, 3072, 14, 2)


@functools.cache
def tiny(shape: str, kept: str, chained: bool) -> llama_ext.LlamaForCausalLM:
    """kept: a dtype, in groups of 128; with "_min" with minima, and then biases, too."""
    hidden, intermediate, heads, kv_heads = SHAPES.get(shape, TOO_MANY_ROWS)
    dtype, has_min = kept.removesuffix("_min"), kept.endswith("_min")
    config = llama_ext.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=3 if shape in SHAPES else 1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1600,
        initializer_range=0.35 * (64 / hidden) ** 0.5,
        attention_bias=has_min,
        mlp_bias=has_min,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_EXT_CUDA_CHAIN", str(int(chained)))
        return llama_ext.LlamaForCausalLM(
            config, seed=11, device="cuda", dtype=dtype, group_size=128, symmetric=not has_min
        )


def events(model: llama_ext.LlamaForCausalLM, prompts: Sequence[Sequence[int]], tokens: int) -> list[Any]:
    generation = _core.Generation(
        model._core,
        [np.array(prompt, np.int32) for prompt in prompts],
        sampling={"temperature": 1.0},
        max_new_tokens=[tokens] * len(prompts),
        eos=[],
        seed=5,
        kv_dtype="bfloat16",
    )
    found = []
    while not generation.done:
        found.append(generation.step())
    return found


def launches() -> int:
    """Of kernels, so far, on an emulated GPU."""
    return int(ctypes.CDLL(os.environ["LLAMA_EXT_CUDA_LIBRARY"]).cuda_emulation_launches())


def assert_same(shape: str, kept: str, prompt: Sequence[int], tokens: int) -> None:
    """The chain's events are the others', and it was a chain. tokens: 6 at least, as few are not recorded."""
    found, counts = {}, {}
    for chained in (True, False):
        model = tiny(shape, kept, chained)
        before = launches() if IS_EMULATED else 0
        found[chained] = events(model, [prompt], tokens)
        counts[chained] = launches() - before if IS_EMULATED else -int(chained)
    assert found[True] == found[False]
    assert counts[True] < counts[False]


@pytest.mark.parametrize(("shape", "kept"), [*itertools.product(SHAPES, ("int8", "int4", "int8_min", "int4_min"))])
def test_a_chain_has_the_bits_of_kernels_one_after_the_other(shape: str, kept: str) -> None:
    assert_same(shape, kept, LONG[:5], 6)


def test_what_has_no_room_in_a_chain_stays_kernels_of_its_own() -> None:
    found = [events(tiny("too-many-rows", "int8", chained), [LONG[:2]], 6) for chained in (True, False)]
    assert found[0] == found[1]


@only_emulated
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
@pytest.mark.parametrize("shape", ["even", "many-units"])
def test_a_chain_waits_for_what_it_needs(shape: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order)
    assert_same(shape, "int4", LONG[:3], 6)


@only_emulated
def test_a_token_is_one_chain_between_its_embedding_and_what_draws() -> None:
    counts = {}
    for chained in (True, False):
        model = tiny("even", "int8", chained)
        seen = []
        for tokens in (6, 16):
            before = launches()
            events(model, [LONG[:5]], tokens)
            seen.append(launches() - before)
        counts[chained] = (seen[1] - seen[0]) / 10
    # The embedding and two to draw; a small head of the same kind is a link; of each layer five.
    assert counts == {True: 3 + 1, False: 3 + 1 + 3 * 5}


@only_emulated
def test_where_its_blocks_do_not_fit_a_chain_is_kernels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found, counts = {}, {}
    for blocks in ("1", "0"):
        monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_BLOCKS", blocks)
        before = launches()
        found[blocks] = events(tiny("even", "int4", True), [LONG[:9]], 8)
        counts[blocks] = launches() - before
    assert found["0"] == found["1"] == events(tiny("even", "int4", False), [LONG[:9]], 8)
    assert counts["0"] > counts["1"]


def test_several_rows_are_kernels_of_their_own() -> None:
    prompts = [LONG[:5], LONG[20:22]]
    assert events(tiny("even", "int4", True), prompts, 8) == events(tiny("even", "int4", False), prompts, 8)


@pytest.mark.parametrize("length", [125, 140, 290])
def test_positions_may_grow_from_one_part_of_a_cache_to_the_next(length: int) -> None:
    """Blocks have one part each, or two."""
    assert_same("even", "int8", LONG[:length], 8)


def test_threads_with_chains_of_one_model_do_not_meet() -> None:
    prompts = [LONG[i : i + 5 + i] for i in range(4)]
    model = tiny("even", "int4", True)
    expected = [events(tiny("even", "int4", False), [prompt], 6) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            assert list(pool.map(lambda prompt: events(model, [prompt], 6), prompts)) == expected
