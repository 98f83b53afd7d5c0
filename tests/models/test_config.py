"""LlamaConfig reads every spelling of Hugging Face's configs, and refuses what it cannot compute."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ext.errors import FormatError, LimitError, OptionError, UnsupportedError
from llama_ext.limits import Limits
from llama_ext.models import ARCHITECTURES
from llama_ext.models.config import LlamaConfig, RopeParameters
from shared_data import SHARED, requires_shared
from small_config import LLAMA3, SMALL, config_of

GOLDEN = ["biases", "classifier", "gqa-tied-llama3rope", "linear-rope", "mha-untied", "train-gqa-tied", "wide-head-dim"]
CHECKPOINTS = ["stories260K", *(f"golden/{name}" for name in GOLDEN), "golden/lora-all-linear/base"]


def test_the_defaults_are_those_of_transformers() -> None:
    config = LlamaConfig()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (32000, 4096, 11008)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (32, 32, 32)
    assert (config.head_dim, config.max_position_embeddings, config.hidden_act) == (128, 2048, "silu")
    assert (config.rms_norm_eps, config.initializer_range, config.tie_word_embeddings) == (1e-6, 0.02, False)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    assert config.rope_parameters == RopeParameters(rope_type="default", rope_theta=10000.0)
    assert LlamaConfig.from_dict({}) == config


@requires_shared
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_real_config_survives_reading_and_writing(name: str, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(SHARED / name)
    original = json.loads((SHARED / name / "config.json").read_text(encoding="utf-8"))
    config.save_pretrained(tmp_path / "new" / "folder")
    written = json.loads((tmp_path / "new" / "folder" / "config.json").read_text(encoding="utf-8"))
    assert {key: written.get(key) for key in original} == original
    assert LlamaConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert LlamaConfig.from_pretrained(tmp_path / "new" / "folder" / "config.json") == config


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gemma", "", "LLAMA"])
def test_another_model_type_is_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=f"config.json: model_type '{kind}' .*Supported: llama"):
        config_of(model_type=kind)
    assert set(ARCHITECTURES) == {"llama"}


def test_a_config_without_model_type_goes_by_its_architecture() -> None:
    assert LlamaConfig.from_dict({"architectures": ["LlamaForCausalLM"]}).model_type == "llama"
    with pytest.raises(UnsupportedError, match="MistralForCausalLM"):
        LlamaConfig.from_dict({"architectures": ["MistralForCausalLM"]})


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh", "SiLU"])
def test_another_activation_is_refused_by_name(activation: str) -> None:
    with pytest.raises(UnsupportedError, match=activation):
        config_of(hidden_act=activation)
    assert config_of(hidden_act="swish").hidden_act == "swish"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("compression_config", {"format": "int"}),
        ("sliding_window", 4096),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", "full_attention"),
        ("partial_rotary_factor", 0.25),
        ("attention_multiplier", 0.0078125),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("logits_scaling", 8.0),
        ("logit_scale", 0.0625),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("query_pre_attn_scalar", 256),
        ("use_qk_norm", True),
        ("clip_qkv", 8.0),
        ("num_local_experts", 8),
        ("no_rope_layers", [1, 1, 1, 0]),
        ("is_causal", False),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("per_layer_config", {"0": {}}),
        ("rope_interleaved", True),
        ("alibi", True),
        ("use_parallel_residual", True),
    ],
)
def test_a_key_that_changes_the_arithmetic_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=key):
        config_of(**{key: value})
    with pytest.raises(UnsupportedError, match=key):
        LlamaConfig(extra={key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pretraining_tp", 8),
        ("sliding_window", None),
        ("layer_types", ["full_attention", "full_attention"]),
        ("partial_rotary_factor", 1.0),
        ("attention_multiplier", 8**-0.5),
        ("logits_scaling", 1),
        ("query_pre_attn_scalar", 8),
        ("quantization_config", None),
        ("is_causal", True),
        ("pruned_heads", {}),
        ("attention_dropout", 0.1),
        ("id2label", {"0": "no", "1": "yes"}),
        ("auto_map", {"AutoModel": "x.Y"}),
        ("never_heard_of", [{"a": None}]),
    ],
)
def test_a_key_that_changes_nothing_is_kept(key: str, value: Any) -> None:
    config = config_of(**{key: value})
    assert config.extra[key] == value
    assert config.to_dict()[key] == value


def test_an_unused_window_is_no_window() -> None:
    assert config_of(sliding_window=4096, use_sliding_window=False).extra["sliding_window"] == 4096


INTEGERS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
]


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", [0, -1, True, 4.0, "4", [4], {}, math.nan, -(2**63)])
def test_an_integer_is_a_positive_integer(field: str, value: Any) -> None:
    with pytest.raises(FormatError) as caught:
        config_of(**{field: value})
    assert caught.value.field == field
    assert field in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert "integer" in str(caught.value.expected)
    assert pickle.loads(pickle.dumps(caught.value)).field == field
    with pytest.raises(OptionError, match=field):
        LlamaConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "limit"),
    [
        ("vocab_size", "vocabulary"),
        ("hidden_size", "width"),
        ("intermediate_size", "width"),
        ("num_hidden_layers", "layers"),
        ("num_attention_heads", "width"),
        ("max_position_embeddings", "positions"),
        ("head_dim", "width"),
    ],
)
@pytest.mark.parametrize("beyond", [1, 2**31, 2**63, 10**30])
def test_an_integer_is_within_its_limit(field: str, limit: str, beyond: int) -> None:
    with pytest.raises(LimitError, match=rf"{field}.*Limits\.{limit}"):
        config_of(**{field: getattr(Limits(), limit) + beyond})


def test_a_limit_can_be_raised_by_name() -> None:
    with pytest.raises(LimitError, match="head_dim"):
        config_of(num_attention_heads=1024, num_key_value_heads=1, head_dim=256)
    assert (
        LlamaConfig.from_dict({**SMALL, "num_hidden_layers": 1025}, limits=Limits(layers=2000)).num_hidden_layers
        == 1025
    )
    with pytest.raises(OptionError, match=r"Limits\.layers"):
        Limits(layers=0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 16}, "num_key_value_heads"),
        ({"hidden_size": 65}, "hidden_size"),
        ({"hidden_size": 72}, "head_dim"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": 1e-50}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": math.nan}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"initializer_range": 2.0}, "initializer_range"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"mlp_bias": 0.0}, "mlp_bias"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"torch_dtype": 16}, "torch_dtype"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"bos_token_id": 1.0}, "bos_token_id"),
        ({"bos_token_id": -2}, "bos_token_id"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"eos_token_id": [2, True]}, "eos_token_id.1"),
        ({"eos_token_id": "2"}, "eos_token_id"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(FormatError) as caught:
        config_of(**changes)
    assert caught.value.field == field
    assert caught.value.expected is not None


def test_token_ids_may_be_absent_several_or_beyond_the_vocabulary() -> None:
    config = config_of(bos_token_id=None, eos_token_id=[2, 7], pad_token_id=256)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (2, 7), 256)
    assert config_of(pad_token_id=-1).pad_token_id is None
    assert config_of(eos_token_id=None).eos_token_ids == ()
    assert config_of().eos_token_ids == (2,)


def test_labels_come_in_the_order_of_their_indices() -> None:
    assert config_of(id2label={"1": "yes", "0": "no"}).labels == ["no", "yes"]
    assert config_of(id2label={0: "no"}).labels == ["no"]
    assert config_of().labels is None
    for wrong in ({"0": "a", "2": "b"}, {"0": 1}, ["a"], {}):
        with pytest.raises(FormatError, match="id2label"):
            _ = config_of(id2label=wrong).labels


def test_dtype_is_read_in_both_spellings() -> None:
    assert config_of(torch_dtype="torch.bfloat16").dtype == "bfloat16"
    assert config_of(dtype="float16", torch_dtype="float32").dtype == "float16"


def test_an_unknown_argument_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(OptionError, match=r"hiden_size.*Did you mean hidden_size\?"):
        LlamaConfig(hiden_size=64)
    with pytest.raises(OptionError, match="argument of its own"):
        LlamaConfig(extra={"vocab_size": 3})


def test_numpy_integers_are_integers() -> None:
    assert type(LlamaConfig(vocab_size=np.int64(8)).vocab_size) is int
    with pytest.raises(OptionError):
        LlamaConfig(vocab_size=np.bool_(True))


def test_a_config_does_not_change_but_is_replaced() -> None:
    config = config_of(rope_scaling=LLAMA3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3  # type: ignore[misc]
    changed = dataclasses.replace(config, vocab_size=300)
    assert (changed.vocab_size, changed.rope_parameters) == (300, config.rope_parameters)
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(config_of(rope_scaling=LLAMA3))
    with pytest.raises(OptionError, match="divisor"):
        dataclasses.replace(config, num_key_value_heads=3)


def test_what_json_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    for value in (math.nan, object()):
        with pytest.raises(OptionError, match="JSON"):
            LlamaConfig(extra={"x": value}).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON.*Truncated download"),
        (b'{"a": 1', "Truncated download"),
        (b"[]", "must be a JSON object, got list"),
        (b"null", "must be a JSON object"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"x": {"a": 1, "a": 1}}', "'a' appears twice"),
        (b'{"rms_norm_eps": NaN}', "NaN is not JSON"),
        (b'{"rms_norm_eps": -Infinity}', "-Infinity is not JSON"),
        (b'{"rms_norm_eps": 1e999}', "too large"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b'{"a": "\x01"}', "not valid JSON"),
    ],
)
def test_a_malformed_file_is_a_format_error_with_its_path(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        LlamaConfig.from_pretrained(tmp_path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 70 + "1" + "}" * 70, '{"a":' + "[" * 64])
def test_deep_nesting_is_a_limit_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(LimitError, match="json_depth"):
        LlamaConfig.from_pretrained(tmp_path)


def test_brackets_in_strings_are_not_nesting(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": '["\\' * 1000, **SMALL}), encoding="utf-8")
    assert LlamaConfig.from_pretrained(tmp_path).vocab_size == 256


def test_a_config_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(LimitError, match="config_json_bytes"):
        LlamaConfig.from_pretrained(tmp_path)
    assert LlamaConfig.from_pretrained(tmp_path, limits=Limits(config_json_bytes=1 << 21)) == LlamaConfig()


def test_a_missing_config_is_a_format_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file.json"):
        with pytest.raises(FormatError, match="no such file"):
            LlamaConfig.from_pretrained(path)
    with pytest.raises(FormatError, match=r"path of a model's config\.json is empty"):
        LlamaConfig.from_pretrained("")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(FormatError, match="found a directory"):
        LlamaConfig.from_pretrained(tmp_path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*LlamaConfig.__dataclass_fields__, "rope_theta", "rope_scaling", "torch_dtype", "sliding_window", "id2label"]
ROPE_KEYS = [*RopeParameters.__dataclass_fields__, "type", "partial_rotary_factor", "short_factor"]


@settings(max_examples=500, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, max_size=4),
    st.dictionaries(st.sampled_from(ROPE_KEYS), JSON_VALUES, max_size=4),
    st.sampled_from(["default", "linear", "llama3", "yarn"]),
)
def test_any_values_give_a_config_that_survives_or_a_typed_error(
    values: dict[str, Any], rope: dict[str, Any], kind: str
) -> None:
    values = {**SMALL, "rope_parameters": {**LLAMA3, **rope, "rope_type": kind}, **values}
    try:
        config = LlamaConfig.from_dict(values)
    except (FormatError, LimitError, UnsupportedError):  # no OptionError: a file's mistake is not an argument's
        return
    assert LlamaConfig.from_dict(config.to_dict()).rope_parameters == config.rope_parameters


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = config_of(rope_parameters={**LLAMA3, "rope_theta": 500000.0}, eos_token_id=[2, 3])
    config.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_scaling["factor"] == 8.0
    assert theirs.rope_scaling["rope_type"] == "llama3"
    theirs.save_pretrained(tmp_path)
    again = LlamaConfig.from_pretrained(tmp_path)
    assert dataclasses.replace(again, extra={}) == config
