"""Which matrices a LoRA means, and with what rank and scale: as PEFT says."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest

from llama_ext.errors import OptionError, UnsupportedError
from llama_ext.models.lora import LoRA
from small_config import config_of

CONFIG = config_of(num_hidden_layers=3)
SEVEN = ("q", "k", "v", "o", "gate", "up", "down")


def slots(**options: Any) -> list[str]:
    return list(LoRA(**options).resolve(CONFIG))


def test_all_linear_means_the_seven_matrices_of_each_layer() -> None:
    assert slots() == [f"layers.{layer}.{name}" for layer in range(3) for name in SEVEN]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["layers.0.q", "layers.1.q", "layers.2.q"]),
        (["self_attn.v_proj"], ["layers.0.v", "layers.1.v", "layers.2.v"]),
        (["model.layers.1.mlp.up_proj"], ["layers.1.up"]),
        (["layers.1.mlp.up_proj", "layers.2.self_attn.k_proj"], ["layers.1.up", "layers.2.k"]),
        (r".*layers\.[02]\..*(q|k)_proj", ["layers.0.q", "layers.0.k", "layers.2.q", "layers.2.k"]),
        (r"model\.layers\.0\.mlp\.\w+", ["layers.0.gate", "layers.0.up", "layers.0.down"]),
    ],
)
def test_targets_are_ends_of_names_or_one_expression_for_whole_names(targets: Any, expected: list[str]) -> None:
    assert slots(targets=targets) == expected


def test_an_end_of_a_name_begins_after_a_dot() -> None:
    with pytest.raises(OptionError, match="no matrix"):
        slots(targets=["proj"])
    with pytest.raises(OptionError, match=r"no matrix .* regular expression of the whole name .* names are a list"):
        slots(targets="q_proj")


def test_exclude_and_layers_take_away() -> None:
    assert slots(targets=["q_proj", "v_proj"], exclude=["v_proj"], layers=[1]) == ["layers.1.q"]
    assert slots(exclude=r".*\.mlp\..*", targets=["q_proj", "up_proj"], layers=2) == ["layers.2.q"]


def test_a_module_named_whole_is_meant_whatever_the_layers_are() -> None:
    assert slots(targets=["q_proj", "model.layers.0.self_attn.k_proj"], layers=[2]) == ["layers.0.k", "layers.2.q"]


def test_scale_is_alpha_over_r_or_its_root() -> None:
    assert LoRA(r=16, alpha=32, targets=["q_proj"]).resolve(CONFIG)["layers.0.q"] == (16, 2.0)
    assert LoRA(r=9, alpha=6, targets=["q_proj"], rslora=True).resolve(CONFIG)["layers.0.q"] == (9, 2.0)


def test_patterns_give_ranks_and_alphas_and_the_first_that_matches_counts() -> None:
    lora = LoRA(
        r=4,
        alpha=8,
        targets=["q_proj", "v_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 3, r".*\.1\..*": 5},
        alpha_pattern={r".*\.2\..*q_proj": 32, "v_proj": 6},
        rslora=True,
    )
    assert lora.resolve(CONFIG) == {
        "layers.0.q": (3, 8 / math.sqrt(3)),
        "layers.0.v": (4, 3.0),
        "layers.1.q": (2, 8 / math.sqrt(2)),
        "layers.1.v": (5, 6 / math.sqrt(5)),
        "layers.2.q": (3, 32 / math.sqrt(3)),
        "layers.2.v": (4, 3.0),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"r": 0},
        {"r": True},
        {"r": 2.0},
        {"r": 1 << 40},
        {"alpha": math.inf},
        {"alpha": "8"},
        {"alpha": 10**400},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"rslora": 1},
        {"targets": []},
        {"targets": 3},
        {"targets": ["q_proj", 3]},
        {"targets": ""},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": 2.5}},
        {"rank_pattern": [("q_proj", 2)]},
        {"alpha_pattern": {"q_proj": math.nan}},
        {"layers": [0]},
        {"layers": [-1], "targets": ["q_proj"]},
    ],
)
def test_a_value_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"LoRA: ({'|'.join([*options, 'targets'])})"):
        LoRA(**options)


@pytest.mark.parametrize(
    ("targets", "advice"),
    [
        (["q_prj"], "q_proj"),
        (["c_attn"], "gate_proj"),
        (["q_proj", "qkv"], "no matrix 'qkv'"),
        ("(", "regular expression"),
    ],
)
def test_a_target_that_the_model_lacks_is_named(targets: Any, advice: str) -> None:
    with pytest.raises(OptionError) as caught:
        slots(targets=targets)
    assert advice in str(caught.value)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"], ["score"], r".*"])
def test_tables_and_heads_are_not_adapted(targets: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"embed_tokens|lm_head|score"):
        slots(targets=targets)


def test_numbers_of_numpy_are_numbers() -> None:
    lora = LoRA(r=np.int64(4), alpha=np.float32(8), rank_pattern={"q_proj": np.int8(2)})  # type: ignore[arg-type,dict-item]
    assert (type(lora.r), type(lora.alpha), type(lora.rank_pattern["q_proj"])) == (int, float, int)
    assert LoRA(alpha=16).alpha.__class__ is int
    assert pickle.loads(pickle.dumps(lora)) == lora
