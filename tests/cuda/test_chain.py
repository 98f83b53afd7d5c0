"""Operations of a recorded token as links of one kernel: the bits are those of kernels one after the other, whatever the weights, shapes,
rows and positions."""

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

VOCABULARY = 61
PROMPTS = [[1, 2, 3, 4, 5], [7, 8], [9, 10, 11, 12, 13], [20, 21, 22], [4] * 9, [5, 6], [17], [30, 31, 32, 33]]
LONG = (np.arange(300) * 7 % VOCABULARY).tolist()
# hidden, intermediate, heads, key/value heads: a chain's products have 16, 8 or 4 warps along k (wide gates and ups), rows of W whose places
# in the ring are whole ones or begin one, and last tiles of fewer rows.
SHAPES = {
    "even": (256, 512, 4, 2),
    "odd": (136, 328, 2, 1),
    "wide-gates": (640, 2120, 8, 1),
    "widest-gates": (64, 4232, 2, 2),
    "heads-of-128": (512, 640, 4, 2),
    "long-rows": (256, 2600, 8, 8),
}


@functools.cache
def tiny(shape: str, kept: str, chained: bool) -> llama_ext.LlamaForCausalLM:
    """kept: a dtype, of whole numbers in groups of 128; with "_min" with minima, and then biases, too."""
    hidden, intermediate, heads, kv_heads = SHAPES[shape]
    dtype, has_min = kept.removesuffix("_min"), kept.endswith("_min")
    config = llama_ext.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1600,
        initializer_range=0.35 * (64 / hidden) ** 0.5,
        attention_bias=has_min,
        mlp_bias=has_min,
    )
    options: dict[str, Any] = {} if dtype == "bfloat16" else {"group_size": 128, "symmetric": not has_min}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_EXT_CUDA_CHAIN", str(int(chained)))
        return llama_ext.LlamaForCausalLM(config, seed=11, device="cuda", dtype=dtype, **options)


def start(model: llama_ext.LlamaForCausalLM, prompts: Sequence[Sequence[int]], tokens: int) -> _core.Generation:
    return _core.Generation(
        model._core,
        [np.array(prompt, np.int32) for prompt in prompts],
        sampling={"temperature": 1.0},
        max_new_tokens=[tokens] * len(prompts),
        eos=[],
        seed=5,
        kv_dtype="bfloat16",
    )


def events(model: llama_ext.LlamaForCausalLM, prompts: Sequence[Sequence[int]], tokens: int) -> list[Any]:
    generation = start(model, prompts, tokens)
    found = []
    while not generation.done:
        found.append(generation.step())
    return found


def launches() -> int:
    """Of kernels, so far, on an emulated GPU."""
    return int(ctypes.CDLL(os.environ["LLAMA_EXT_CUDA_LIBRARY"]).cuda_emulation_launches())


def assert_same(shape: str, kept: str, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    """The chain's events are the others', and it was a chain. tokens: 6 at least, as few are not recorded."""
    found, counts = {}, {}
    for chained in (True, False):
        model = tiny(shape, kept, chained)
        before = launches() if IS_EMULATED else 0
        found[chained] = events(model, prompts, tokens)
        counts[chained] = launches() - before if IS_EMULATED else -int(chained)
    assert found[True] == found[False]
    assert counts[True] < counts[False]


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        *itertools.product(("even", "odd", "long-rows"), ("bfloat16", "int8", "int4", "int8_min", "int4_min")),
        *itertools.product(("wide-gates", "widest-gates", "heads-of-128"), ("bfloat16", "int8", "int4_min")),
    ],
)
def test_a_chain_has_the_bits_of_kernels_one_after_the_other(shape: str, kept: str) -> None:
    assert_same(shape, kept, PROMPTS[:2], 6)


@only_emulated
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
@pytest.mark.parametrize(("shape", "rows"), [("odd", 1), ("even", 4), ("wide-gates", 1)])
def test_a_chain_waits_for_what_it_needs(shape: str, rows: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order of turns, with what the copy engine brings as late as may be; where a block has one part of a cache, or two."""
    monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order)
    assert_same(shape, "int8", PROMPTS[:rows], 6)


@only_emulated
def test_a_token_is_one_chain_between_its_embedding_and_its_last_norm() -> None:
    counts = {}
    for chained in (True, False):
        model = tiny("even", "int8", chained)
        seen = []
        for tokens in (6, 16):
            before = launches()
            events(model, PROMPTS[:1], tokens)
            seen.append(launches() - before)
        counts[chained] = (seen[1] - seen[0]) / 10
    # The embedding, the last norm, the head and two to draw; of each layer five.
    assert counts == {True: 5 + 1, False: 5 + 2 * 5}


@only_emulated
def test_where_its_blocks_do_not_fit_a_chain_is_kernels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found, counts = {}, {}
    for blocks in ("1", "0"):
        monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_BLOCKS", blocks)
        before = launches()
        found[blocks] = events(tiny("odd", "int4", True), PROMPTS[:2], 8)
        counts[blocks] = launches() - before
    before = launches()
    alone = events(tiny("odd", "int4", False), PROMPTS[:2], 8)
    assert found["0"] == found["1"] == alone
    assert counts["0"] == launches() - before > counts["1"]


def test_long_rows_of_x_and_many_parts_of_a_cache_stay_kernels_of_their_own() -> None:
    """8 rows of 4,232 numbers leave no room for the ring; and 8 heads of 140 positions have more parts than an emulated GPU's blocks take."""
    assert_same("widest-gates", "bfloat16", PROMPTS, 6)
    assert_same("long-rows", "bfloat16", [LONG[:140]], 6)


def test_a_block_may_have_several_parts_of_a_cache() -> None:
    assert_same("heads-of-128", "int4", [LONG[:290]], 6)


def test_positions_may_grow_from_one_part_of_a_cache_to_the_next() -> None:
    assert_same("even", "int8", [LONG[:125]], 8)


def test_threads_with_chains_of_one_model_do_not_meet() -> None:
    model = tiny("odd", "int4", True)
    expected = [events(tiny("odd", "int4", False), [prompt], 6) for prompt in PROMPTS[:4]]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            assert list(pool.map(lambda prompt: events(model, [prompt], 6), PROMPTS[:4])) == expected
