"""The rotation is read in the spellings of transformers 4 and 5, written in both, and refused when it is another one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from llama_ext.errors import FormatError, OptionError, UnsupportedError
from llama_ext.models.config import LlamaConfig
from llama_ext.models.rope_parameters import RopeParameters
from small_config import LLAMA3, config_of


# transformers 4.40, 4.57 and 5.23 were given files written so, and read each of them as the same rotation.
@pytest.mark.parametrize(
    ("rope", "rope_scaling"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, None),
        ({"rope_type": "linear", "rope_theta": 2e4, "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        ({**LLAMA3, "rope_theta": 5e5}, LLAMA3),
    ],
    ids=["default", "linear", "llama3"],
)
def test_a_rotation_is_written_in_the_spelling_of_each_version(rope: dict[str, Any], rope_scaling: Any) -> None:
    written = config_of(rope_parameters=rope).to_dict()
    assert written["rope_parameters"] == rope
    assert written["rope_theta"] == rope["rope_theta"]
    assert written["rope_scaling"] == rope_scaling


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2}, {"rope_type": "linear", "factor": 2.0}])
def test_both_spellings_of_a_rotation_mean_the_same(scaling: dict[str, Any]) -> None:
    new = config_of(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0})
    assert config_of(rope_theta=20000, rope_scaling=scaling) == new
    assert config_of(rope_theta=20000, rope_scaling=scaling, rope_parameters=new.rope_parameters.to_dict()) == new


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
        {"original_max_position_embeddings": 128, "rope_scaling": LLAMA3},
    ],
)
def test_spellings_that_contradict_each_other_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="the same as"):
        config_of(**changes)


def test_yarn_has_the_defaults_of_transformers() -> None:
    rope = config_of(rope_scaling={"type": "yarn", "factor": 4.0, "beta_slow": 0, "finetuned": True}).rope_parameters
    assert (rope.beta_fast, rope.beta_slow, rope.truncate, rope.original_max_position_embeddings) == (32, 1, True, 512)
    assert rope.effective_attention_factor == pytest.approx(0.1 * math.log(4.0) + 1.0)
    assert rope.to_dict()["finetuned"] is True
    both = dataclasses.replace(rope, mscale=1.0, mscale_all_dim=0.5)
    ratio = (0.1 * math.log(4.0) + 1.0) / (0.05 * math.log(4.0) + 1.0)
    assert both.effective_attention_factor == pytest.approx(ratio)
    assert dataclasses.replace(both, attention_factor=1.25).effective_attention_factor == 1.25


def test_a_null_truncate_of_yarn_is_false_as_in_transformers() -> None:
    """It reads it with a default for what is absent, and then asks whether it is true."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    found = [config_of(rope_parameters={**yarn, "truncate": value}).rope_parameters for value in (None, False, True)]
    assert [rope.truncate for rope in found] == [False, False, True]
    assert config_of(rope_parameters=found[0]).rope_parameters == found[0]
    assert config_of(rope_parameters=yarn).rope_parameters == found[2]


def test_yarn_takes_a_null_factor_for_the_ratio_of_the_contexts() -> None:
    rope = config_of(rope_parameters={"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128})
    assert rope.rope_parameters.factor == 4.0


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", "proportional", "nonsense", "Linear"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_any_other_rope_type_is_refused_by_name(kind: str, key: str) -> None:
    with pytest.raises(UnsupportedError, match=f"rope_type '{kind}'.*default, linear, llama3, yarn"):
        config_of(**{key: {"rope_type": kind, "factor": 2.0}})


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0.5}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        ({"factor": 2.0}, "rope_type"),
        ({"rope_type": 3}, "rope_type"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "high_freq_factor"),
        ({**LLAMA3, "low_freq_factor": 0.0}, "low_freq_factor"),
        ({**LLAMA3, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({**LLAMA3, "high_freq_factor": None}, "high_freq_factor"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast"),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "rope_theta"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.0}, "attention_factor"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate"),
        ({"rope_type": "default", "rope_theta": 0}, "rope_theta"),
        ({"rope_type": "default", "rope_theta": math.nan}, "rope_theta"),
        ({"rope_type": "default", "rope_theta": 10**400}, "rope_theta"),
    ],
)
def test_a_wrong_rope_field_is_named(rope: dict[str, Any], field: str) -> None:
    with pytest.raises(FormatError) as caught:
        config_of(rope_parameters=rope)
    assert caught.value.field == f"rope_parameters.{field}"
    assert caught.value.path == "config.json"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "default", "mrope_section": [16, 24, 24]},
        {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}},
    ],
)
def test_a_rotation_that_is_not_implemented_is_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        config_of(rope_parameters=rope)


def test_a_rotation_made_by_hand_is_checked_as_well() -> None:
    rope = RopeParameters(rope_type="linear", factor=2)
    assert LlamaConfig(rope_parameters=rope).rope_parameters is not None
    assert (rope.factor, rope.low_freq_factor, rope.rope_theta) == (2.0, None, 10000.0)
    assert rope == RopeParameters(rope_type="linear", factor=2.0, low_freq_factor=3.0), (
        "another type's field is ignored"
    )
    with pytest.raises(OptionError, match="factor"):
        RopeParameters(rope_type="linear")
    with pytest.raises(UnsupportedError, match="dynamic"):
        RopeParameters(rope_type="dynamic", factor=2.0)
