"""GGUF's Llama: metadata to config and back, names, row order, rope factors; what is not supported is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_ext
from llama_ext.errors import CheckpointError, FormatError, LimitError, LlamaExtError, UnsupportedError
from llama_ext.io.gguf_file import GgufFile, GgufTensor
from llama_ext.io.gguf_types import BY_NAME
from llama_ext.io.gguf_writer import TensorToWrite, write_gguf
from llama_ext.limits import Limits
from llama_ext.models.config import LlamaConfig
from llama_ext.models.gguf_llama import (
    config_from_gguf,
    config_to_gguf,
    gguf_tensor_specs,
    half_split_rows,
    interleaved_rows,
    match_gguf,
    stored_type,
)
from llama_ext.models.gguf_rope import ROPE_FACTORS, llama3_factors
from llama_ext.models.rope_parameters import RopeParameters
from shared_data import SHARED, requires_shared

BASE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "another base": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 8192},
    "llama3.2": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    "short llama3": {**LLAMA3, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn with more": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
}


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**BASE, **changes})


def write(path: Path, model: LlamaConfig, **changes: Any) -> None:
    """A file of zeros with this model's metadata, changed, None taking an entry away."""
    entries, factors = config_to_gguf(model)
    for name, index in (("bos", model.bos_token_id), ("padding", model.pad_token_id)):
        if index is not None:
            entries[f"tokenizer.ggml.{name}_token_id"] = index
    if isinstance(model.eos_token_id, int):
        entries["tokenizer.ggml.eos_token_id"] = model.eos_token_id
    entries.update(changes)
    entries = {key: value for key, value in entries.items() if value is not None}
    f32 = BY_NAME["F32"]
    tensors = [zeros(spec.gguf_name, spec.shape) for spec in gguf_tensor_specs(model)]
    if factors is not None:
        tensors.append(TensorToWrite(ROPE_FACTORS, f32, factors.shape, lambda: [factors]))
    write_gguf(path, entries, tensors)


def zeros(name: str, shape: tuple[int, ...]) -> TensorToWrite:
    return TensorToWrite(name, BY_NAME["F32"], shape, lambda: [np.zeros(shape, np.float32)])


def read(path: Path, limits: Limits | None = None) -> LlamaConfig:
    with GgufFile(path) as file:
        return config_from_gguf(file.metadata, file.tensors, path=str(path), limits=limits or Limits())


def back(path: Path, model: LlamaConfig, **changes: Any) -> LlamaConfig:
    write(path, model, **changes)
    return read(path)


def plain(model: LlamaConfig) -> dict[str, Any]:
    values = model.to_dict()
    return {name: values[name] for name in values if name not in ("initializer_range", "dtype", "torch_dtype")}


@pytest.mark.parametrize("rope", ROPES)
def test_a_config_survives_the_way_through_gguf(rope: str, tmp_path: Path) -> None:
    model = config(rope_parameters=ROPES[rope])
    again = back(tmp_path / "x.gguf", model)
    if rope == "yarn with more":
        assert again.rope_parameters.attention_factor == pytest.approx(1.25, rel=1e-6)
        return
    assert again.rope_parameters == model.rope_parameters
    assert plain(again) == plain(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 16},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4, "hidden_act": "silu"},
        {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 3},
        {"rms_norm_eps": 1e-6, "num_hidden_layers": 1},
    ],
    ids=str,
)
def test_other_shapes_survive_too(changes: dict[str, Any], tmp_path: Path) -> None:
    model = config(**changes)
    assert plain(back(tmp_path / "x.gguf", model)) == plain(model)


def test_defaults_of_absent_keys(tmp_path: Path) -> None:
    model = config(num_key_value_heads=4)
    absent = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size")
    absent += ("rope.dimension_count", "rope.freq_base")
    assert plain(back(tmp_path / "x.gguf", model, **{f"llama.{name}": None for name in absent})) == plain(model)


def test_values_for_each_layer_that_agree_are_one(tmp_path: Path) -> None:
    model = config()
    same = np.array([4, 4], np.uint32)
    assert back(tmp_path / "x.gguf", model, **{"llama.attention.head_count": same}).num_attention_heads == 4
    write(tmp_path / "x.gguf", model, **{"llama.attention.head_count": np.array([4, 2], np.uint32)})
    with pytest.raises(UnsupportedError, match=r"llama\.attention\.head_count = .* layers of different shapes"):
        read(tmp_path / "x.gguf")


def test_linear_scaling_of_old_files(tmp_path: Path) -> None:
    again = back(tmp_path / "x.gguf", config(), **{"llama.rope.scale_linear": 4.0})
    assert again.rope_parameters == RopeParameters(rope_type="linear", factor=4.0)


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general.architecture": "qwen2"}, "architecture 'qwen2' is not supported. Supported: llama"),
    "adapter": ({"general.type": "adapter"}, "general.type 'adapter'"),
    "split": ({"split.count": 3}, "one of 3 parts of a split model"),
    "experts": ({"llama.expert_count": 8}, r"llama\.expert_count = 8 is not supported: a mixture of experts"),
    "window": ({"llama.attention.sliding_window": 64}, "sliding_window = 64 .*sliding-window attention"),
    "clamp": ({"llama.attention.clamp_kqv": 8.0}, "clamp_kqv = 8.0"),
    "not causal": ({"llama.attention.causal": False}, "causal = False"),
    "logits": ({"llama.logit_scale": 0.5}, "scaled logits"),
    "embedding": ({"llama.embedding_scale": 2.0}, "scaled embeddings"),
    "scale": ({"llama.attention.scale": 0.5}, r"attention\.scale = 0.5"),
    "values": ({"llama.attention.value_length": 16}, r"value_length = 16 is not supported: it has to be 8"),
    "partial": ({"llama.rope.dimension_count": 4}, r"rope\.dimension_count = 4 is not supported"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope'"),
    "ext": (
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 2.0,
            "llama.rope.scaling.yarn_ext_factor": 0.5,
        },
        "yarn_ext_factor = 0.5",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_named(name: str, tmp_path: Path) -> None:
    changes, message = UNSUPPORTED[name]
    write(tmp_path / "x.gguf", config(), **changes)
    with pytest.raises(UnsupportedError, match=message) as caught:
        read(tmp_path / "x.gguf")
    assert "x.gguf" in str(caught.value)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"general.architecture": None}, "general.architecture must be 'llama', got None"),
    "no context": ({"llama.context_length": None}, r"llama\.context_length must be an integer >= 1, got None"),
    "no heads": ({"llama.attention.head_count": None}, r"llama\.attention\.head_count must be"),
    "no width": ({"llama.embedding_length": None}, r"llama\.embedding_length must be"),
    "zero layers": ({"llama.block_count": 0}, r"llama\.block_count must be an integer >= 1, got 0"),
    "zero heads": ({"llama.attention.head_count": 0}, "must be an integer >= 1, got 0"),
    "text": ({"llama.feed_forward_length": "64"}, "must be an integer >= 1, got '64'"),
    "negative": ({"llama.feed_forward_length": np.int32(-1)}, "must be an integer >= 1, got -1"),
    "uneven heads": ({"llama.attention.head_count": 3, "llama.attention.key_length": None}, "must be a multiple of"),
    "heads that do not divide": ({"llama.attention.head_count_kv": 3}, "num_key_value_heads must be a divisor"),
    "eps": ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "must be a finite number > 7"),
    "eps nan": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "must be a finite number"),
    "theta": ({"llama.rope.freq_base": -1.0}, r"rope\.freq_base must be a finite number > 0"),
    "factor": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.5}, "must be a number >= 1"),
    "bos": ({"tokenizer.ggml.bos_token_id": "x"}, "bos_token_id must be an integer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_metadata_is_a_format_error(name: str, tmp_path: Path) -> None:
    changes, message = WRONG[name]
    write(tmp_path / "x.gguf", config(), **changes)
    with pytest.raises(FormatError, match=message):
        read(tmp_path / "x.gguf")


@pytest.mark.parametrize("name", ["block_count", "embedding_length", "feed_forward_length", "context_length"])
def test_numbers_are_limited(name: str, tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", config(), **{f"llama.{name}": np.uint64((1 << 64) - 1)})
    with pytest.raises(LimitError, match=rf"llama\.{name}"):
        read(tmp_path / "x.gguf")


def test_a_window_as_wide_as_the_context_is_none(tmp_path: Path) -> None:
    assert back(tmp_path / "x.gguf", config(), **{"llama.attention.sliding_window": 128, "llama.expert_count": 0})


def tensors_of(model: LlamaConfig, path: Path, change: Any = None) -> dict[str, GgufTensor]:
    specs = {spec.gguf_name: spec.shape for spec in gguf_tensor_specs(model)}
    if change is not None:
        change(specs)
    write_gguf(path, {}, [zeros(name, shape) for name, shape in specs.items()])
    with GgufFile(path) as file:
        return file.tensors


def test_names_of_tensors(tmp_path: Path) -> None:
    model = config(attention_bias=True)
    specs = match_gguf(model, tensors_of(model, tmp_path / "x.gguf"))
    found = {spec.gguf_name: (spec.name, spec.slot, spec.rope_heads) for spec in specs}
    assert found["token_embd.weight"] == ("model.embed_tokens.weight", "embedding", None)
    assert found["output_norm.weight"] == ("model.norm.weight", "final_norm", None)
    assert found["output.weight"] == ("lm_head.weight", "head", None)
    assert found["blk.1.attn_q.weight"] == ("model.layers.1.self_attn.q_proj.weight", "layers.1.q", 4)
    assert found["blk.1.attn_k.weight"] == ("model.layers.1.self_attn.k_proj.weight", "layers.1.k", 2)
    assert found["blk.0.attn_k.bias"] == ("model.layers.0.self_attn.k_proj.bias", "layers.0.k.bias", 2)
    assert found["blk.0.attn_v.weight"][2] is None
    assert found["blk.0.ffn_norm.weight"][0] == "model.layers.0.post_attention_layernorm.weight"
    assert len(found) == 3 + 2 * (9 + 4)


def test_names_agree_with_the_package() -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the gguf package")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for spec in gguf_tensor_specs(config(attention_bias=True, mlp_bias=True)):
        assert names.get_name(spec.name, try_suffixes=(".weight", ".bias")) == spec.gguf_name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda specs: specs.pop("blk.1.ffn_up.weight"), r"missing: blk\.1\.ffn_up\.weight"),
        (lambda specs: specs.update({"blk.0.attn_q_norm.weight": (8,)}), r"unexpected: blk\.0\.attn_q_norm\.weight"),
        (lambda specs: specs.update({"output_norm.weight": (31,)}), r"output_norm\.weight must have shape \(32,\)"),
    ],
)
def test_other_tensors_are_a_checkpoint_error(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        match_gguf(config(), tensors_of(config(), tmp_path / "x.gguf", change))


def test_a_file_without_an_embedding(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", config_to_gguf(config())[0], [])
    with pytest.raises(CheckpointError, match=r"there is no tensor token_embd\.weight"):
        read(tmp_path / "x.gguf")


@given(st.integers(1, 8), st.integers(1, 16))
def test_row_orders_are_inverse(heads: int, half: int) -> None:
    ours, theirs = half_split_rows(heads, 2 * half), interleaved_rows(heads, 2 * half)
    np.testing.assert_array_equal(ours[theirs], np.arange(2 * heads * half))
    np.testing.assert_array_equal(theirs[ours], np.arange(2 * heads * half))


def test_row_order_by_its_definition() -> None:
    heads, head_dim = 3, 8
    ours = half_split_rows(heads, head_dim)
    for head in range(heads):
        for pair in range(head_dim // 2):
            for part in range(2):
                in_file, in_ours = head * head_dim + 2 * pair + part, head * head_dim + part * head_dim // 2 + pair
                assert ours[in_ours] == in_file


FACTORS = st.tuples(
    st.sampled_from([2, 4, 6, 16, 64, 128]),
    st.sampled_from([10000.0, 500000.0]),
    st.sampled_from([2.0, 8.0, 32.0]),
    st.floats(0.5, 4.0),
    st.floats(1.1, 8.0),
    st.integers(100, 20000),
)


@settings(max_examples=200, deadline=None)
@given(FACTORS)
def test_factors_of_any_llama3_scaling_are_read_as_one_that_is_equal(
    numbers: tuple[int, float, float, float, float, int],
) -> None:
    from llama_ext.models.fields import FieldReader
    from llama_ext.models.gguf_rope import _from_factors

    head_dim, theta, factor, low, ratio, original = numbers
    factors = llama3_factors(head_dim, theta, factor, low, low * ratio, original).astype(np.float32).astype(np.float64)
    found = _from_factors(factors, head_dim, theta, FieldReader({}))
    if found["rope_type"] == "default":
        assert (factors == 1).all()
        return
    again = llama3_factors(
        head_dim,
        theta,
        found["factor"],
        found["low_freq_factor"],
        found["high_freq_factor"],
        found["original_max_position_embeddings"],
    )
    np.testing.assert_allclose(again, factors, rtol=1.1e-5)
    RopeParameters(**found)


@pytest.mark.parametrize(
    ("factors", "error"),
    [
        (np.array([1, 5, 2, 3], np.float32), UnsupportedError),
        (np.array([0.5] * 4, np.float32), UnsupportedError),
        (np.array([1, 0, 1, 1], np.float32), FormatError),
        (np.array([1, np.nan, 1, 1], np.float32), FormatError),
        (np.ones(3, np.float32), FormatError),
    ],
)
def test_factors_that_are_no_scaling_are_refused(
    factors: np.ndarray[Any, Any], error: type[LlamaExtError], tmp_path: Path
) -> None:
    model = config()
    tensors = [zeros(spec.gguf_name, spec.shape) for spec in gguf_tensor_specs(model)]
    tensors.append(TensorToWrite(ROPE_FACTORS, BY_NAME["F32"], factors.shape, lambda: [factors]))
    write_gguf(tmp_path / "x.gguf", config_to_gguf(model)[0], tensors)
    with pytest.raises(error, match=r"rope_freqs\.weight"):
        read(tmp_path / "x.gguf")


def test_a_rotation_that_gguf_cannot_express_is_refused() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False}
    with pytest.raises(UnsupportedError, match="truncate"):
        config_to_gguf(config(rope_parameters=yarn))


def test_a_classifier_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        UnsupportedError, match=r"this is a LlamaForSequenceClassification, .* Convert it to a directory"
    ):
        config_to_gguf(config().as_classifier(["a", "b"]))


@requires_shared
@pytest.mark.parametrize("source", ["floats", "int8"])
def test_converting_a_classifier_writes_nothing(source: str, tmp_path: Path) -> None:
    """Failure elsewhere: a KeyError, 'score'."""
    path = SHARED / "golden" / "classifier"
    if source == "int8":
        llama_ext.LlamaForSequenceClassification.from_pretrained(path, dtype="int8").save_pretrained(tmp_path / "int8")
        path = tmp_path / "int8"
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedError, match=r"head \(score\.weight\) has no place in one"):
        llama_ext.convert(path, tmp_path / "out" / "x.gguf")
    assert not list((tmp_path / "out").iterdir())
    llama_ext.convert(path, tmp_path / "out" / "directory", dtype="float32")
    again = llama_ext.LlamaForSequenceClassification.from_pretrained(tmp_path / "out" / "directory", compute="exact")
    before = llama_ext.LlamaForSequenceClassification.from_pretrained(path, compute="exact")
    ids = [[5, 6, 7], [8, 9]]
    np.testing.assert_allclose(again.scores(ids), before.scores(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "wanted", "expected"),
    [((64,), "Q8_0", "F32"), ((8, 64), "Q8_0", "Q8_0"), ((8, 48), "Q4_0", "F16"), ((8, 48), "BF16", "BF16")],
)
def test_formats_to_write(shape: tuple[int, ...], wanted: str, expected: str) -> None:
    assert stored_type(shape, BY_NAME[wanted]).name == expected


@requires_shared
@pytest.mark.parametrize("name", ["mha-untied", "gqa-tied-llama3rope", "wide-head-dim", "linear-rope", "biases"])
def test_golden_configs_survive(name: str, tmp_path: Path) -> None:
    model = LlamaConfig.from_pretrained(SHARED / "golden" / name)
    again = back(tmp_path / "x.gguf", model)
    assert json.loads(json.dumps(again.rope_parameters.to_dict())) == model.rope_parameters.to_dict()
    fields = ("vocab_size", "hidden_size", "head_dim", "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps")
    assert all(getattr(again, field) == getattr(model, field) for field in (*fields, "attention_bias", "mlp_bias"))
