"""generation_config.json becomes checked defaults, and what it asks for in vain is remembered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from llama_ext.errors import FormatError
from llama_ext.models.generation_config import GenerationDefaults


def test_generation_defaults_are_what_the_file_says() -> None:
    values = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 40,
        "top_p": 0.9,
        "eos_token_id": [2, 3],
        "max_new_tokens": None,
        "transformers_version": "5.23.0",
        "_from_model_config": True,
        "use_cache": True,
        "output_attentions": False,
        "no_repeat_ngram_size": 3,
        "early_stopping": "never",
    }
    defaults = GenerationDefaults.from_dict(values)
    assert (defaults.do_sample, defaults.temperature, defaults.top_k, defaults.top_p) == (True, 0.6, 40, 0.9)
    assert (defaults.eos_token_id, defaults.max_new_tokens, defaults.min_p) == ([2, 3], None, None)
    assert defaults.ignored == {"no_repeat_ngram_size": 3, "early_stopping": "never"}
    assert GenerationDefaults.from_dict({"eos_token_id": 2, "early_stopping": True}).early_stopping is True
    assert GenerationDefaults.from_dict({"eos_token_id": 2}).eos_token_id == [2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", "0.7"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("do_sample", "yes"),
        ("max_new_tokens", 0),
        ("max_length", 2**40),
        ("num_beams", True),
        ("length_penalty", math.nan),
        ("early_stopping", "always"),
        ("eos_token_id", {}),
        ("bos_token_id", "1"),
    ],
)
def test_a_wrong_generation_default_is_named(field: str, value: Any) -> None:
    with pytest.raises(FormatError) as caught:
        GenerationDefaults.from_dict({field: value}, path="generation_config.json")
    assert caught.value.field == field


def test_a_checkpoint_without_generation_config_suggests_nothing(tmp_path: Path) -> None:
    assert GenerationDefaults.from_pretrained(tmp_path) == GenerationDefaults()
    (tmp_path / "generation_config.json").write_text('{"top_k": 5}', encoding="utf-8")
    assert GenerationDefaults.from_pretrained(tmp_path).top_k == 5
    with pytest.raises(FormatError, match="no such file"):
        GenerationDefaults.from_pretrained(tmp_path / "other.json")
