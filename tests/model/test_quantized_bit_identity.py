"""Logits of quantised models have the same bits for any threads, batch and chunks, and are those of the exact weights.

As test_bit_identity.py, with plans that keep the matrices of a block in different ways: Q, K, V and gate, up each alone or together.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from devices import each_isa
from llama_ext import _core
from quantized import blocks
from random_models import CONFIG, build, tokens
from tolerances import assert_same_bits, relative_rms

LENGTH = 197  # keys in two tiles of 128
each_compute = pytest.mark.parametrize("compute", ["auto", "exact"])

Plan = dict[str, tuple[str, int]]

# By the last word of a slot; "" for the others.
PLANS: dict[str, Plan] = {
    "int8": {"": ("int8", 128)},
    "int4": {"": ("int4", 64), "embedding": ("int8", 64), "head": ("int8", 64)},
    "int4_min": {"": ("int4_min", 32)},
    "mixed": {
        "": ("int5", 32),
        "embedding": ("int8_min", 64),
        "head": ("int8", 32),
        "q": ("int4", 64),
        "k": ("int4", 64),
        "v": ("int8", 32),
        "gate": ("int4_min", 32),
        "up": ("int8", 128),
        "down": ("int5_min", 64),
    },
    "apart": {
        "": ("float16", 0),
        "q": ("int8", 32),
        "k": ("float32", 0),
        "v": ("bfloat16", 0),
        "gate": ("float16", 0),
        "up": ("int4", 32),
    },
}
each_plan = pytest.mark.parametrize("plan", PLANS)


def slots_of(plan: Plan, layers: int) -> Plan:
    """A plan by the full names of slots."""
    named = {name: kept for name, kept in plan.items() if name in ("", "embedding", "head")}
    for layer in range(layers):
        named |= {f"layers.{layer}.{name}": kept for name, kept in plan.items() if name not in named}
    return named


@functools.cache
def model(isa: str, threads: int, plan: str, compute: str) -> _core.Model:
    return fill(_core.Backend("cpu", threads, isa), plan, compute)


def fill(backend: _core.Backend, plan: str, compute: str = "auto") -> _core.Model:
    return build(backend, compute=compute, types=slots_of(PLANS[plan], CONFIG["layers"]))


@functools.cache
def baseline(isa: str, plan: str, compute: str) -> Any:
    """All logits of `tokens(LENGTH)`, by one thread and all at once."""
    return _core.Session(model(isa, 1, plan, compute), LENGTH, "float32").append(tokens(LENGTH), "all")


def in_chunks(chosen: _core.Model, size: int) -> Any:
    session = _core.Session(chosen, LENGTH, "float32")
    ids = tokens(LENGTH)
    return np.concatenate([session.append(ids[begin : begin + size], "all") for begin in range(0, LENGTH, size)])


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@each_compute
@each_plan
@each_isa
def test_quantized_logits_have_the_same_bits_for_any_threads_and_chunks(
    isa: str, plan: str, compute: str, threads: int
) -> None:
    chosen = model(isa, threads, plan, compute)
    for size in (1, 7, 64, LENGTH):
        assert_same_bits(in_chunks(chosen, size), baseline(isa, plan, compute), f"chunks of {size}")


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@each_compute
@each_plan
@each_isa
def test_quantized_logits_of_a_row_have_the_same_bits_in_a_ragged_batch_of_8(
    isa: str, plan: str, compute: str, threads: int
) -> None:
    chosen, alone = model(isa, threads, plan, compute), model(isa, 1, plan, compute)
    sequences = [tokens(length, seed=index) for index, length in enumerate([LENGTH, 1, 17, 128, 129, 5, 64, 16])]
    batch = chosen.logits(sequences)
    assert_same_bits(batch[0], baseline(isa, plan, compute))
    for index in range(1, 8):
        assert_same_bits(batch[index], alone.logits([sequences[index]])[0], f"row {index}")
    assert_same_bits(chosen.logits(sequences[::-1])[-1], batch[0], "in another order")


@each_compute
@each_plan
@each_isa
def test_quantized_logits_have_the_same_bits_twenty_times_over(isa: str, plan: str, compute: str) -> None:
    for repetition in range(20):
        chosen = model(isa, 1 + repetition % 4, plan, compute)
        logits = chosen.logits([tokens(LENGTH)[:20]])[0]
        assert_same_bits(logits, baseline(isa, plan, compute)[:20], f"repetition {repetition}")


@each_plan
def test_the_tiers_agree_with_the_reference_to_a_tolerance(plan: str) -> None:
    ids = tokens(60)
    reference = fill(_core.Backend("reference"), plan).logits([ids])[0]
    for isa in _core.available_isas():
        assert relative_rms(baseline(isa, plan, "exact")[:60], reference) < 2e-6, isa
        # Products 1e-2 off, one after another through two layers.
        assert relative_rms(baseline(isa, plan, "auto")[:60], reference) < 5e-2, isa


@each_plan
@each_isa
def test_packed_matrices_give_the_same_bits_where_they_lie(isa: str, plan: str) -> None:
    backend = _core.Backend("cpu", 2, isa)
    original = fill(backend, plan)
    types = original.types()
    packed = {name: aligned(original.packed(name)) for name in original.matrices()}
    mapped = build(backend, types=types, packed=packed)
    assert mapped.types() == types
    ids = tokens(30)
    assert_same_bits(mapped.logits([ids])[0], original.logits([ids])[0])


def aligned(values: Any) -> Any:
    """A copy that starts on a cache line, as in a file that is mapped."""
    memory = np.empty(values.size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    copy = memory[begin : begin + values.size]
    copy[...] = values
    return copy


BLOCK_PLANS: dict[str, dict[str, str]] = {
    # As llama.cpp mixes them: V and down finer than the rest.
    "Q4_K_M": {"": "Q4_K", "embedding": "Q6_K", "head": "Q6_K", "v": "Q6_K", "down": "Q6_K"},
    "Q5_K_S": {"": "Q5_K", "gate": "Q4_K", "k": "Q8_0"},
    "Q8_0": {"": "Q8_0"},
    "Q4_0": {"": "Q4_0", "up": "Q4_1", "q": "Q5_0", "v": "Q5_1"},
}
WHOLE = {"width": 256, "ffn_width": 512, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocabulary": 101}


def block_model(backend: _core.Backend, mix: str, compute: str) -> _core.Model:
    """A model whose matrices are random blocks; on the reference these are float64 numbers."""
    by_name = BLOCK_PLANS[mix]
    plain = _core.Model(_core.Backend("reference"), {**CONFIG, **WHOLE}, {"": ("float32", 0)})
    names = {
        slot: by_name.get(slot.rsplit(".", 1)[-1], by_name[""]) for slot, _, is_matrix in plain.slots() if is_matrix
    }
    types = {slot: _core.type_of_blocks(name) for slot, name in names.items()}
    made = _core.Model(backend, {**CONFIG, **WHOLE}, types, compute=compute)
    rng = np.random.default_rng(12)
    for slot, shape, is_matrix in made.slots():
        if is_matrix:
            rows, columns = shape
            size = 1.0 if slot == "embedding" else columns**-0.5
            made.load_blocks(slot, blocks(names[slot], rng, rows, columns, size), names[slot])
        else:
            made.load(
                slot, np.ones(shape, np.float32) if slot.endswith("norm") else np.zeros(shape, np.float32), "float32"
            )
    assert not made.missing()
    return made


@pytest.mark.parametrize("mix", BLOCK_PLANS)
@each_isa
def test_models_of_gguf_blocks_are_those_of_their_exact_weights(isa: str, mix: str) -> None:
    ids = np.random.default_rng(0).integers(0, 101, 40).astype(np.int32)
    expected = block_model(_core.Backend("reference"), mix, "auto").logits([ids])[0]
    found = block_model(_core.Backend("cpu", 2, isa), mix, "exact").logits([ids])[0]
    assert relative_rms(found, expected) < 2e-6
    fast = [block_model(_core.Backend("cpu", threads, isa), mix, "auto") for threads in (1, 3)]
    whole = fast[0].logits([ids])[0]
    assert relative_rms(whole, expected) < 5e-2
    session = _core.Session(fast[1], 40, "float32")
    assert_same_bits(np.concatenate([session.append(ids[i : i + 1], "all") for i in range(40)]), whole)
