"""A Llama checkpoint's tensors find their slots, and one that does not fit is refused with what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from llama_ext.errors import CheckpointError
from llama_ext.io.checkpoint import open_checkpoint
from llama_ext.io.safetensors_file import TensorInfo
from llama_ext.models import llama
from llama_ext.models.config import LlamaConfig
from shared_data import SHARED, requires_shared

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)


def available(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, "F32", shape, 0, 0) for name, shape in shapes.items()}


def shapes_of(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in llama.tensor_specs(config)}


def test_every_tensor_has_its_slot_and_shape() -> None:
    specs = {spec.slot: (spec.name, spec.shape) for spec in llama.tensor_specs(CONFIG)}
    assert specs["embedding"] == ("model.embed_tokens.weight", (32, 8))
    assert specs["layers.1.attention_norm"] == ("model.layers.1.input_layernorm.weight", (8,))
    assert specs["layers.1.q"] == ("model.layers.1.self_attn.q_proj.weight", (24, 8))
    assert specs["layers.1.k"] == ("model.layers.1.self_attn.k_proj.weight", (12, 8))
    assert specs["layers.1.v"] == ("model.layers.1.self_attn.v_proj.weight", (12, 8))
    assert specs["layers.1.o"] == ("model.layers.1.self_attn.o_proj.weight", (8, 24))
    assert specs["layers.1.feed_forward_norm"] == ("model.layers.1.post_attention_layernorm.weight", (8,))
    assert specs["layers.1.gate"] == ("model.layers.1.mlp.gate_proj.weight", (12, 8))
    assert specs["layers.1.up"] == ("model.layers.1.mlp.up_proj.weight", (12, 8))
    assert specs["layers.1.down"] == ("model.layers.1.mlp.down_proj.weight", (8, 12))
    assert specs["final_norm"] == ("model.norm.weight", (8,))
    assert specs["head"] == ("lm_head.weight", (32, 8))
    assert len(specs) == 3 + 2 * 9


def test_a_tied_model_and_a_classifier_have_no_head() -> None:
    assert "head" not in {spec.slot for spec in llama.tensor_specs(TIED)}
    assert "head" not in {spec.slot for spec in llama.tensor_specs(CONFIG, with_head=False)}


def test_biases_have_slots_when_the_config_has_them() -> None:
    config = dataclasses.replace(CONFIG, attention_bias=True, mlp_bias=True)
    specs = {spec.slot: (spec.name, spec.shape) for spec in llama.tensor_specs(config)}
    sizes = {"q": 24, "k": 12, "v": 12, "o": 8, "gate": 12, "up": 12, "down": 8}
    for slot, size in sizes.items():
        part = "mlp" if slot in ("gate", "up", "down") else "self_attn"
        assert specs[f"layers.0.{slot}.bias"] == (f"model.layers.0.{part}.{slot}_proj.bias", (size,))
    assert len(specs) == 3 + 2 * (9 + 7)


@requires_shared
@pytest.mark.parametrize(
    "name",
    ["stories260K"]
    + [f"golden/{name}" for name in ("biases", "gqa-tied-llama3rope", "linear-rope", "mha-untied", "wide-head-dim")],
)
def test_a_real_checkpoint_matches(name: str) -> None:
    config = LlamaConfig.from_pretrained(SHARED / name)
    with open_checkpoint(SHARED / name) as checkpoint:
        specs = llama.match(config, checkpoint.tensors)
        llama.check_tied_head(config, checkpoint)
        offsets = [checkpoint.tensors[spec.name].offset for spec in specs]
        assert offsets == sorted(offsets), "the order is that of the file"
        assert all(checkpoint.read(spec.name).shape == spec.shape for spec in specs)
    assert {spec.slot for spec in specs} == {spec.slot for spec in llama.tensor_specs(config)}


@requires_shared
def test_a_classifier_loads_its_own_head() -> None:
    config = LlamaConfig.from_pretrained(SHARED / "golden/classifier")
    with open_checkpoint(SHARED / "golden/classifier") as checkpoint:
        specs = llama.match(config, checkpoint.tensors, with_head=False, also={"score.weight": (3, 64)})
        assert "score.weight" not in {spec.name for spec in specs}
        with pytest.raises(CheckpointError, match=r"score\.weight must have shape"):
            llama.match(config, checkpoint.tensors, with_head=False, also={"score.weight": (4, 64)})
        assert {spec.name: spec.slot for spec in llama.match(config, checkpoint.tensors)}["score.weight"] == "head"
        with pytest.raises(CheckpointError, match="a classifier"):
            llama.match(dataclasses.replace(config, architectures=["LlamaForCausalLM"]), checkpoint.tensors)


def test_missing_tensors_are_named_and_counted() -> None:
    shapes = {name: shape for name, shape in shapes_of(CONFIG).items() if "layers.1." not in name}
    with pytest.raises(CheckpointError, match=r"9 tensors are missing: model\.layers\.1\.\S+.*\(9 in all\)") as caught:
        llama.match(CONFIG, available(shapes), path="dir")
    assert (caught.value.path, caught.value.field) == ("dir", "model.layers.1.input_layernorm.weight")
    assert len(str(caught.value)) < 1000


def test_a_wrong_shape_is_named_with_both_shapes() -> None:
    shapes = {**shapes_of(CONFIG), "model.embed_tokens.weight": (33, 8)}
    with pytest.raises(CheckpointError) as caught:
        llama.match(CONFIG, available(shapes))
    assert (caught.value.field, caught.value.expected, caught.value.got) == (
        "model.embed_tokens.weight",
        (32, 8),
        (33, 8),
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "attention_bias"),
        ("model.layers.0.mlp.up_proj.bias", "mlp_bias"),
        ("model.layers.0.self_attn.q_proj.qweight", "quantised"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "quantised"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "with load_adapter"),
        ("layers.0.self_attn.q_proj.weight", "LlamaModel"),
        ("model.layers.2.self_attn.q_proj.weight", "of another model"),
        ("score.weight", "a classifier: load it with LlamaForSequenceClassification"),
        ("x" * 100_000, "unexpected"),
    ],
)
def test_an_unexpected_tensor_is_named_with_what_to_do(name: str, advice: str) -> None:
    with pytest.raises(CheckpointError, match="1 tensor is unexpected") as caught:
        llama.match(CONFIG, available({**shapes_of(CONFIG), name: (1,)}))
    assert advice in str(caught.value)
    assert name[:100] in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_missing_head_points_at_the_config() -> None:
    with pytest.raises(CheckpointError, match="tie_word_embeddings: true"):
        llama.match(CONFIG, available(shapes_of(TIED)))


def test_frequency_buffers_of_old_checkpoints_are_ignored() -> None:
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": (3,), "model.rotary_emb.inv_freq": (3,)}
    specs = llama.match(CONFIG, available({**buffers, **shapes_of(CONFIG)}))
    assert {spec.name for spec in specs} == set(shapes_of(CONFIG))
    with pytest.raises(CheckpointError):
        llama.match(CONFIG, available({"model.layers.0.rotary_emb.inv_freq.extra": (3,), **shapes_of(CONFIG)}))


def test_a_tied_checkpoint_may_hold_the_table_under_either_name() -> None:
    both = llama.match(TIED, available({**shapes_of(TIED), "lm_head.weight": (32, 8)}))
    assert "lm_head.weight" not in {spec.name for spec in both}
    shapes = {**shapes_of(TIED), "lm_head.weight": (32, 8)}
    del shapes["model.embed_tokens.weight"]
    only = {spec.name: spec.slot for spec in llama.match(TIED, available(shapes))}
    assert only["lm_head.weight"] == "embedding"
    with pytest.raises(CheckpointError, match=r"lm_head\.weight must have shape"):
        llama.match(TIED, available({**shapes_of(TIED), "lm_head.weight": (31, 8)}))


class Arrays:
    """A checkpoint in memory."""

    def __init__(self, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        self.arrays = arrays
        self.tensors = available({name: array.shape for name, array in arrays.items()})

    def read(self, name: str) -> np.ndarray[Any, Any]:
        return self.arrays[name]


def test_a_tied_head_that_is_no_copy_is_refused() -> None:
    table = np.arange(256, dtype=np.float32).reshape(32, 8)
    table[3, 3] = np.nan
    llama.check_tied_head(TIED, Arrays({"model.embed_tokens.weight": table, "lm_head.weight": table.copy()}))
    other = table.copy()
    other[31, 7] += 1
    with pytest.raises(CheckpointError, match="tie_word_embeddings to false"):
        llama.check_tied_head(TIED, Arrays({"model.embed_tokens.weight": table, "lm_head.weight": other}))
    llama.check_tied_head(CONFIG, Arrays({"model.embed_tokens.weight": table, "lm_head.weight": other}))


def test_the_core_gets_every_default_resolved() -> None:
    core = llama.core_config(dataclasses.replace(CONFIG, rope_parameters={"rope_type": "yarn", "factor": 4.0}))
    assert None not in core.values()
    assert None not in core["rope"].values()
    assert (core["width"], core["head_dim"], core["kv_heads"]) == (8, 6, 2)
    assert (core["rope"]["kind"], core["rope"]["original_context"], core["rope"]["head_dim"]) == ("yarn", 2048, 6)
