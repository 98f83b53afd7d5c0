"""Which values a name, a pattern or a function means; and what is said where it means none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import letter_models
import llama_ext
from llama_ext.interpret import hook_names, match_names
from small_config import config_of

CONFIG = config_of(num_hidden_layers=12)
EVERY = hook_names(CONFIG)


def test_names_are_those_of_transformer_lens_in_the_order_of_computation() -> None:
    assert len(EVERY) == len(set(EVERY)) == 12 * 20 + 3
    assert EVERY[:3] == ["hook_embed", "blocks.0.hook_resid_pre", "blocks.0.ln1.hook_scale"]
    assert EVERY[-2:] == ["ln_final.hook_scale", "ln_final.hook_normalized"]
    assert EVERY.index("blocks.2.hook_resid_pre") < EVERY.index("blocks.10.hook_resid_pre")


@given(st.lists(st.sampled_from(EVERY), min_size=1))
def test_names_are_matched_once_and_in_order(names: list[str]) -> None:
    found = match_names(CONFIG, names)
    assert set(found) == set(names)
    assert found == sorted(found, key=EVERY.index)
    assert found == match_names(CONFIG, lambda name: name in names)


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (None, 243),
        ("hook_embed", 1),
        ("blocks.*.attn.hook_z", 12),
        ("blocks.1.*", 20),
        ("blocks.1[01].hook_resid_p*", 4),
        (["hook_embed", "*hook_pattern", "blocks.0.attn.hook_pattern"], 13),
        (lambda name: name.endswith("hook_scale"), 25),
    ],
)
def test_patterns_functions_and_lists_choose(names: Any, count: int) -> None:
    assert len(match_names(CONFIG, names)) == count


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ("blocks.0.attn.hook_zz", r"'blocks.0.attn.hook_zz': there is no such name.*Near: blocks.0.attn.hook_z"),
        ("blocks.12.hook_resid_pre", "no such name"),
        ("blocks.*.attn.hook_result", "the pattern fits no name"),
        ([], "is empty"),
        (lambda name: False, "yes to none of 243"),
        ([3], "must hold names and patterns, got int"),
        (3, "must be a name"),
    ],
)
def test_what_means_nothing_is_an_error_that_names_its_neighbours(names: Any, why: str) -> None:
    with pytest.raises(llama_ext.OptionError, match=why):
        match_names(CONFIG, names)


def test_a_model_is_no_config() -> None:
    for call in (lambda: hook_names(letter_models.make()), lambda: match_names(letter_models.make(), None)):  # type: ignore[arg-type]
        with pytest.raises(
            llama_ext.OptionError, match=r"must be a LlamaConfig, got LlamaForCausalLM: .* model\.config"
        ):
            call()
