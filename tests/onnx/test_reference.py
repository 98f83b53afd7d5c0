"""The float64 reference of `verify` against transformers in float64, and its operations by their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_ext
from llama_ext import _core
from llama_ext.models.llama import core_config
from llama_ext.models.rope_parameters import RopeParameters
from llama_ext.onnx.reference import F64, Reference, rope_frequencies, weights_of_core, weights_of_files
from llama_ext.runtime.loading import open_model
from shared_data import SHARED, requires_shared
from tolerances import relative_rms

NAMES = ["mha-untied", "gqa-tied-llama3rope", "wide-head-dim", "linear-rope", "biases"]


@requires_shared
@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_transformers_does(name: str) -> None:
    golden = load_file(SHARED / "golden" / name / "golden.safetensors")
    seen: dict[str, F64] = {}
    with open_model(SHARED / "golden" / name) as files:
        reference = Reference(files.config, weights_of_files(files))
        logits = reference.logits(list(golden["input_ids"]))
        hidden = golden["hidden_states"][:, 0]
        reference.logits(list(golden["hidden_ids"]), probe=lambda key, _, value: seen.update({key: value}))
    # transformers' tables of angles are float32: 1e-7 of the logits at these lengths.
    assert relative_rms(np.stack(logits), golden["logits"]) < 5e-7
    assert relative_rms(seen["embedding"], hidden[0]) < 1e-12
    for layer in range(len(hidden) - 2):
        assert relative_rms(seen[f"layers.{layer}.feed_forward_residual"], hidden[layer + 1]) < 5e-7
    assert relative_rms(seen["final_norm"], hidden[-1]) < 5e-7


@pytest.fixture(scope="module")
def small() -> llama_ext.LlamaForCausalLM:
    config = llama_ext.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=40,
        initializer_range=0.2,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    return llama_ext.LlamaForCausalLM(config, seed=5)


def test_it_agrees_with_the_reference_backend(small: llama_ext.LlamaForCausalLM) -> None:
    """Whose loops are float64, too, with activations of float32 between them."""
    model = llama_ext.LlamaForCausalLM(small.config, seed=5, device="reference")
    ids = np.arange(30, dtype=np.int32) * 7 % 61
    (logits,) = Reference(model.config, weights_of_core(model._core)).logits([ids])
    assert relative_rms(model(ids[None])[0], logits) < 3e-7


def test_logits_are_a_matter_of_distances_not_of_positions(small: llama_ext.LlamaForCausalLM) -> None:
    reference = Reference(small.config, weights_of_core(small._core))
    ids = np.arange(9) * 5 % 61
    (here,), (there,) = reference.logits([ids]), reference.logits([ids], positions=[np.arange(31, 40)])
    np.testing.assert_allclose(there, here, rtol=1e-10, atol=1e-12)


def test_a_token_sees_nothing_behind_it(small: llama_ext.LlamaForCausalLM) -> None:
    reference = Reference(small.config, weights_of_core(small._core))
    ids = np.arange(20) * 3 % 61
    whole, part = reference.logits([ids, ids[:13]])
    np.testing.assert_allclose(whole[:13], part, rtol=1e-12, atol=1e-13)


def test_long_sequences_are_attended_to_in_blocks(
    small: llama_ext.LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Reference(small.config, weights_of_core(small._core))
    ids = np.arange(37) * 3 % 61
    (whole,) = reference.logits([ids])
    monkeypatch.setattr("llama_ext.onnx.reference._QUERY_BLOCK", 8)
    np.testing.assert_allclose(reference.logits([ids])[0], whole, rtol=1e-12, atol=1e-13)


def test_it_reads_a_quantised_model_as_what_its_codes_stand_for() -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = llama_ext.LlamaForCausalLM(config, seed=1, dtype="int8")
    original = llama_ext.LlamaForCausalLM(config, seed=1)
    values = original._core.read("layers.0.down").astype(np.float32)
    group = model._core.types()["layers.0.down"][1]
    codes, scales, _ = _core.quantize(values, "int8", group)
    exact = codes.astype(np.float64) * np.repeat(scales.astype(np.float64), group, axis=1)[:, : codes.shape[1]]
    np.testing.assert_array_equal(weights_of_core(model._core)("layers.0.down"), exact)


@pytest.mark.parametrize(
    "rope",
    [
        RopeParameters(),
        RopeParameters(rope_type="linear", factor=3.0),
        RopeParameters(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        RopeParameters(rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
        RopeParameters(rope_type="yarn", factor=4.0, original_max_position_embeddings=128, truncate=False),
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn-not-truncated"],
)
def test_angles_are_those_of_the_core(rope: RopeParameters) -> None:
    """Two programs from the same papers; the core's are rounded to float32."""
    config = llama_ext.LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=512, rope_parameters=rope
    )
    positions = np.arange(512)
    cos, sin = _core.rope_angles(core_config(config)["rope"], positions)
    angles = positions[:, None] * rope_frequencies(config.rope_parameters, config.head_dim)
    amplitude = config.rope_parameters.effective_attention_factor
    np.testing.assert_allclose(cos, np.cos(angles) * amplitude, atol=1.5e-7)
    np.testing.assert_allclose(sin, np.sin(angles) * amplitude, atol=1.5e-7)
