"""Whole models on a GPU: golden logits and tokens, and every way to generate, beside the CPU."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_ext
from devices import IS_EMULATED, requires_cuda
from shared_data import SHARED, requires_shared
from tolerances import relative_rms, units

pytestmark = [requires_cuda, pytest.mark.gpu]

NAMES = ["mha-untied", "gqa-tied-llama3rope", "wide-head-dim", "linear-rope", "biases"]
each_name = pytest.mark.parametrize("name", NAMES)
# Emulation takes its time.
TOKENS = 12 if IS_EMULATED else 24


@functools.cache
def load(name: str, device: str = "cuda", **options: Any) -> llama_ext.LlamaForCausalLM:
    path = SHARED / name if name == "stories260K" else SHARED / "golden" / name
    return llama_ext.LlamaForCausalLM.from_pretrained(path, device=device, **options)


@functools.cache
def golden(name: str) -> dict[str, Any]:
    return load_file(SHARED / "golden" / name / "golden.safetensors")


@requires_shared
@each_name
def test_float32_logits_match_transformers(name: str) -> None:
    logits = load(name)(golden(name)["input_ids"])
    assert relative_rms(logits, golden(name)["logits"]) < units("logits")


@requires_shared
@pytest.mark.parametrize("compute", ["auto", "exact"])
@each_name
def test_bfloat16_logits_are_close_to_transformers(name: str, compute: str) -> None:
    model = load(name, dtype="bfloat16", compute=compute)
    assert relative_rms(model(golden(name)["input_ids"]), golden(name)["logits"]) < units("logits-bfloat16")


@requires_shared
@each_name
def test_greedy_ids_are_those_of_transformers(name: str) -> None:
    expected = golden(name)["greedy_ids"][:, : 8 + TOKENS]
    found = load(name).generate(expected[:, :8], max_new_tokens=TOKENS, do_sample=False, eos_token_id=[])
    np.testing.assert_array_equal(found, expected)


@requires_shared
@pytest.mark.parametrize("size", [1, 7, 64])
@each_name
def test_a_session_fed_in_chunks_gives_the_logits_of_the_whole(name: str, size: int) -> None:
    length = 24 if IS_EMULATED else 40
    ids, expected = golden(name)["input_ids"][:1, :length], golden(name)["logits"][:1, :length]
    session = load(name).session(kv_dtype="float32")
    parts = [session.append(ids[0, i : i + size], logits="all") for i in range(0, ids.shape[1], size)]
    assert relative_rms(np.concatenate(parts), expected[0]) < units("logits")


@requires_shared
def test_stories260k_tells_the_story_that_llama2_c_tells() -> None:
    model = load("stories260K", dtype="float32")
    expected = (SHARED / "stories260K" / "greedy-256.txt").read_text(encoding="utf-8")
    assert model.tokenizer is not None
    count = 40 if IS_EMULATED else 255
    text = model.generate("", max_new_tokens=count, do_sample=False)
    assert isinstance(text, str)
    assert len(text) > count
    assert expected.startswith(text.strip()[: len(expected)]) or text.strip().startswith(expected.strip())


# A model small enough for an emulated GPU; the same on the CPU is what its results are compared with.


@functools.cache
def tiny(device: str, **options: Any) -> llama_ext.LlamaForCausalLM:
    config = llama_ext.LlamaConfig(
        vocab_size=53,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.3,
    )
    return llama_ext.LlamaForCausalLM(config, seed=3, device=device, **options)


PROMPTS = [[1, 2, 3, 4, 5], [7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17]]


def both(call: Any, **options: Any) -> tuple[Any, Any]:
    return call(tiny("cpu", **options)), call(tiny("cuda", **options))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_logits_are_those_of_the_cpu(dtype: str) -> None:
    for symmetric in (None, False) if dtype.startswith("int") else (None,):
        options = {"dtype": dtype, "compute": "exact", "symmetric": symmetric}
        expected, found = both(lambda model: model(np.arange(40)[None] % 53), **options)
        assert relative_rms(found, expected) < 5e-6
        # The CPU rounds activations in its own way: what both are near to is its exact arithmetic.
        found = tiny("cuda", **{**options, "compute": "auto"})(np.arange(40)[None] % 53)
        assert relative_rms(found, expected) < 3e-2


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_long_prompt_of_quantised_weights_costs_no_more_than_bfloat16_weights(dtype: str) -> None:
    """Of more than 32 rows: their products round the weights to bfloat16."""
    ids = np.arange(90)[None] * 7 % 53
    for symmetric in (None, False):
        model = {device: tiny(device, dtype=dtype, symmetric=symmetric, compute="exact") for device in ("cpu", "cuda")}
        expected = model["cpu"](ids)
        assert relative_rms(model["cuda"](ids), expected) < 5e-6
        found = tiny("cuda", dtype=dtype, symmetric=symmetric)(ids)
        assert relative_rms(found, expected) < 3e-2
        np.testing.assert_array_equal(tiny("cuda", dtype=dtype, symmetric=symmetric)(ids), found)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 5},
        {"do_sample": True, "temperature": 1.3, "repetition_penalty": 1.2, "seed": 6},
        {"do_sample": False, "num_beams": 3},
    ],
    ids=["greedy", "sampled", "penalised", "beams"],
)
def test_batches_generate_the_tokens_of_the_cpu(options: dict[str, Any]) -> None:
    def call(model: llama_ext.LlamaForCausalLM) -> Any:
        return model.generate(PROMPTS, max_new_tokens=9, eos_token_id=[], **options)

    expected, found = both(call)
    assert found == expected


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_sessions_fork_rewind_save_and_load(kv_dtype: str, tmp_path: Any) -> None:
    model = tiny("cuda")
    session = model.session(kv_dtype=kv_dtype)
    session.append(PROMPTS[0])
    fork = session.fork()
    tail = session.append([20, 21, 22])
    np.testing.assert_array_equal(fork.append([20, 21, 22]), tail)
    session.rewind(5)
    np.testing.assert_array_equal(session.append([20, 21, 22]), tail)
    session.rewind(5)
    session.save(tmp_path / "session")
    loaded = model.load_session(tmp_path / "session")
    np.testing.assert_array_equal(loaded.append([20, 21, 22]), tail)


def test_speculation_and_scores_are_those_of_the_cpu() -> None:
    expected, found = both(lambda m: m.generate([[1, 2, 3, 1, 2, 3, 1]], max_new_tokens=12, eos_token_id=[]))
    assert found == expected
    _, drafted = both(
        lambda m: m.generate([[1, 2, 3, 1, 2, 3, 1]], max_new_tokens=12, eos_token_id=[], prompt_lookup_num_tokens=4)
    )
    assert drafted == expected
    expected, found = both(lambda m: m.loglikelihood(PROMPTS[0], PROMPTS[2]))
    assert found.is_greedy == expected.is_greedy
    assert abs(found.logprob - expected.logprob) < 2e-5 * abs(expected.logprob)


def test_conversion_and_weights_come_back_as_they_are_on_the_cpu() -> None:
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        cpu, gpu = tiny("cpu", dtype=dtype), tiny("cuda", dtype=dtype)
        for slot in cpu._core.slots():
            np.testing.assert_array_equal(gpu._core.read(slot[0]), cpu._core.read(slot[0]), err_msg=str(slot))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 2, 16), (8, 1, 40), (3, 3, 128)], ids=["gqa-16", "mqa-40", "mha-128"]
)
def test_tokens_one_by_one_give_the_logits_of_a_whole_prompt_with_a_bfloat16_cache(
    heads: int, kv_heads: int, head_dim: int
) -> None:
    """Across the ends of the parts (128 keys) that decoding attention leaves to different blocks."""
    config = llama_ext.LlamaConfig(
        vocab_size=37,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=300,
        initializer_range=0.2,
    )
    # Exact: a CPU that multiplies bfloat16 rounds queries and weights of attention, too, in its own way.
    models = {
        "cpu": llama_ext.LlamaForCausalLM(config, seed=4, compute="exact"),
        "cuda": llama_ext.LlamaForCausalLM(config, seed=4, device="cuda"),
    }
    ids = np.random.default_rng(0).integers(0, 37, 262)
    expected = models["cpu"].session(kv_dtype="bfloat16").append(ids, logits="all")
    session = models["cuda"].session(kv_dtype="bfloat16")
    session.append(ids[:120])
    found = np.stack([session.append(ids[i : i + 1]) for i in range(120, 135)])
    assert relative_rms(found, expected[120:135]) < 5e-3
    session.append(ids[135:254])
    found = np.stack([session.append(ids[i : i + 1]) for i in range(254, 262)])
    assert relative_rms(found, expected[254:262]) < 5e-3
    other = models["cuda"].session(kv_dtype="bfloat16")
    other.append(ids[:254])
    again = np.stack([other.append(ids[i : i + 1]) for i in range(254, 262)])
    assert relative_rms(again, found) < 5e-3


def test_rows_of_one_batch_decode_as_each_does_alone_with_a_bfloat16_cache() -> None:
    model = tiny("cuda")
    together = model.generate(PROMPTS, max_new_tokens=6, eos_token_id=[], do_sample=False)
    assert together == [model.generate(each, max_new_tokens=6, eos_token_id=[], do_sample=False) for each in PROMPTS]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_directory_that_a_cpu_has_packed_loads_with_the_same_weights(
    dtype: str, symmetric: bool, tmp_path: Any
) -> None:
    packed = tiny("cpu", dtype=dtype, symmetric=symmetric)
    packed.save_pretrained(tmp_path)
    gpu = llama_ext.LlamaForCausalLM.from_pretrained(tmp_path, device="cuda")
    assert gpu.dtype == packed.dtype
    for slot in packed._core.slots():
        np.testing.assert_array_equal(gpu._core.read(slot[0]), packed._core.read(slot[0]), err_msg=str(slot))


def test_the_model_in_the_box_goes_on_as_on_the_cpu() -> None:
    models = [
        llama_ext.LlamaForCausalLM.from_pretrained("demo", device=device, compute="exact") for device in ("cpu", "cuda")
    ]
    expected, found = (model.generate("ROMEO:", max_new_tokens=8, do_sample=False) for model in models)
    assert found == expected
