"""Whole models against transformers in float64, and llama2.c's own text: on every instruction set, by every way in."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_ext
from devices import ISAS, each_isa
from shared_data import SHARED, requires_shared
from tolerances import assert_same_bits, relative_rms, units

pytestmark = requires_shared

NAMES = ["mha-untied", "gqa-tied-llama3rope", "wide-head-dim", "linear-rope", "biases"]
each_name = pytest.mark.parametrize("name", NAMES)


@functools.cache
def load(isa: str, name: str, **options: Any) -> llama_ext.LlamaForCausalLM:
    """A checkpoint on one instruction set, which is chosen when a model is made."""
    path = SHARED / name if name == "stories260K" else SHARED / "golden" / name
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_EXT_ISA", isa)
        model = llama_ext.LlamaForCausalLM.from_pretrained(path, **options)
    assert model.isa == isa
    return model


@functools.cache
def golden(name: str) -> dict[str, Any]:
    return load_file(SHARED / "golden" / name / "golden.safetensors")


@each_name
@each_isa
def test_float32_logits_match_transformers(isa: str, name: str) -> None:
    expected = golden(name)["logits"]
    logits = load(isa, name)(golden(name)["input_ids"])
    assert relative_rms(logits, expected) < units("logits")


@pytest.mark.parametrize("compute", ["auto", "exact"])
@each_name
@each_isa
def test_bfloat16_logits_are_close_to_transformers(isa: str, name: str, compute: str) -> None:
    model = load(isa, name, dtype="bfloat16", compute=compute)
    logits = model(golden(name)["input_ids"])
    assert relative_rms(logits, golden(name)["logits"]) < units("logits-bfloat16")


@pytest.mark.parametrize("threads", [1, 2, 3])
@each_name
@each_isa
def test_greedy_ids_are_those_of_transformers(isa: str, name: str, threads: int) -> None:
    expected = golden(name)["greedy_ids"]
    model = load(isa, name, threads=threads)
    found = model.generate(expected[:, :8], max_new_tokens=24, do_sample=False, eos_token_id=[])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [1, 7, 32, 64])
@each_name
@each_isa
def test_a_session_fed_in_chunks_gives_the_logits_of_the_whole(isa: str, name: str, size: int) -> None:
    model = load(isa, name)
    ids = golden(name)["input_ids"]
    whole = model(ids)
    for row in range(len(ids)):
        session = model.session(kv_dtype="float32")
        parts = [session.append(ids[row, i : i + size], logits="all") for i in range(0, ids.shape[1], size)]
        assert_same_bits(np.concatenate(parts), whole[row], f"row {row}")
    assert relative_rms(whole, golden(name)["logits"]) < units("logits")


@pytest.mark.parametrize("side", ["left", "right", "both"])
@each_name
@each_isa
def test_padding_does_not_change_the_logits(isa: str, name: str, side: str) -> None:
    model = load(isa, name)
    ids, expected = golden(name)["input_ids"], golden(name)["logits"]
    before, after = {"left": (9, 0), "right": (0, 9), "both": (4, 5)}[side]
    shorter = ids.shape[1] - 13
    # Row 2 is row 0 without its end, so a prefix's logits are known as well.
    width = before + ids.shape[1] + after
    padded, mask = np.full((3, width), 3, ids.dtype), np.zeros((3, width), np.int64)
    for row, text in enumerate([ids[0], ids[1], ids[0, :shorter]]):
        padded[row, before : before + len(text)] = text
        mask[row, before : before + len(text)] = 1
    logits = model(padded, attention_mask=mask)
    plain = model(ids)
    end = before + ids.shape[1]
    assert_same_bits(logits[:2, before:end], plain)
    assert_same_bits(logits[2, before : before + shorter], plain[0, :shorter])
    assert relative_rms(logits[:2, before:end], expected) < units("logits")
    assert (logits[mask == 0] == 0).all()


@each_name
@each_isa
def test_greedy_ids_do_not_depend_on_a_padded_neighbour(isa: str, name: str) -> None:
    expected = golden(name)["greedy_ids"][0]
    other = golden(name)["input_ids"][1, :20]
    batch = load(isa, name).generate(
        [other.tolist(), expected[:8].tolist()], max_new_tokens=24, do_sample=False, eos_token_id=[]
    )
    assert batch[1] == expected.tolist()
    assert len(batch[0]) == 44


@pytest.mark.parametrize("threads", [1, 2])
@each_isa
def test_stories260k_tells_the_story_that_llama2_c_tells(isa: str, threads: int) -> None:
    model = load(isa, "stories260K", dtype="float32", threads=threads)
    expected = (SHARED / "stories260K" / "greedy-256.txt").read_text(encoding="utf-8")
    assert model.tokenizer is not None
    assert model.bos_token_id is not None
    ids = model.generate([model.bos_token_id], max_new_tokens=256, do_sample=False, eos_token_id=[])
    assert len(ids) == 257
    assert model.tokenizer.decode(ids[1:]).strip() == expected.strip()


@each_isa
def test_stories260k_in_bfloat16_is_close_to_float32(isa: str) -> None:
    text = (SHARED / "stories260K" / "greedy-256.txt").read_text(encoding="utf-8")
    exact = load(isa, "stories260K", dtype="float32")
    assert exact.tokenizer is not None
    ids = [exact.tokenizer.encode(text)[:250]]
    logits = load(isa, "stories260K", dtype="bfloat16")(ids)
    assert relative_rms(logits, exact(ids)) < units("logits-bfloat16")


def test_the_reference_matches_transformers_too() -> None:
    for name in NAMES:
        model = llama_ext.LlamaForCausalLM.from_pretrained(SHARED / "golden" / name, device="reference")
        assert relative_rms(model(golden(name)["input_ids"]), golden(name)["logits"]) < units("logits") / 2
    assert ISAS
