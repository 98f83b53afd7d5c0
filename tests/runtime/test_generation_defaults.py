"""What a checkpoint suggests, and what a caller gives in its place, is followed or named."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from llama_ext import _core
from llama_ext.errors import FormatError, OptionError, UnsupportedError
from llama_ext.models.generation_config import GenerationDefaults
from llama_ext.runtime import generation
from llama_ext.runtime.options import plan_generation

Model = llama_ext.LlamaForCausalLM


def _plan(defaults: GenerationDefaults | None = None, **given: Any) -> Any:
    return plan_generation(given, defaults or GenerationDefaults(), eos=[2], vocabulary=67)


def test_the_eos_of_a_given_generation_config_replaces_the_checkpoints(tiny: Model) -> None:
    assert _plan(generation_config={"eos_token_id": 7}).eos == (7,)
    assert _plan(generation_config={"eos_token_id": [7, 8]}).eos == (7, 8)
    assert _plan(generation_config={"top_k": 3}).eos == (2,)
    assert _plan(generation_config={"eos_token_id": 7}, eos_token_id=9).eos == (9,)
    free = tiny.generate([1, 2], max_new_tokens=5)
    ended = tiny.generate([1, 2], max_new_tokens=5, generation_config={"eos_token_id": free[2]})
    assert ended == free[:3]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"top_kk": 3}, r"'top_kk'; did you mean top_k"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"early_stopping": "never"}, "early_stopping='never' is not supported"),
        ({"temperature": "hot"}, "temperature"),
        ({"num_beams": 0}, "num_beams"),
        ({"min_p": 1.0}, "min_p must be at least 0 and below 1"),
        ({3: 4}, "its keys must be names, got 3"),
        (GenerationDefaults(max_new_tokens="many"), "max_new_tokens"),  # type: ignore[arg-type]
    ],
)
def test_a_mistake_in_a_given_generation_config_is_an_option_error(config: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        _plan(generation_config=config)


def test_beams_that_would_be_drawn_are_asked_for_in_vain() -> None:
    defaults = GenerationDefaults.from_dict({"do_sample": True, "num_beams": 4})
    assert defaults.ignored == {"num_beams": 4}
    assert _plan(defaults).num_beams == 1
    assert _plan(defaults, do_sample=False).num_beams == 4
    assert _plan(generation_config=defaults).num_beams == 1
    assert _plan(generation_config=dataclasses.replace(defaults, do_sample=False)).num_beams == 4
    assert _plan(generation_config={"do_sample": True, "num_beams": 4}, do_sample=False).num_beams == 4
    for follows in ({"num_beams": 4}, {"do_sample": True, "temperature": 0, "num_beams": 4}, {"do_sample": True}):
        assert GenerationDefaults.from_dict(follows).ignored == {}


def test_the_defaults_of_a_model_can_be_given_with_a_change() -> None:
    defaults = GenerationDefaults.from_dict({"top_k": 4, "no_repeat_ngram_size": 3, "eos_token_id": 5})
    plan = _plan(defaults, generation_config=dataclasses.replace(defaults, do_sample=True))
    assert (plan.sampling["top_k"], plan.eos) == (4, (5,))


def test_min_p_of_one_is_refused_with_the_file_that_says_it() -> None:
    with pytest.raises(FormatError, match=r"some\.json.*min_p must be at least 0 and below 1"):
        GenerationDefaults.from_dict({"min_p": 1.0}, path="some.json")
    assert GenerationDefaults.from_dict({"min_p": 0.99}).min_p == 0.99


def _model(**options: Any) -> Model:
    config = llama_ext.LlamaConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        initializer_range=0.3,
        **options,
    )
    return Model(config, seed=1)


def test_padding_is_what_is_named_first_and_otherwise_an_end_token_in_force() -> None:
    class Padding:
        pad_token_id = 13

    model = _model(pad_token_id=12)
    prompts = np.array([[1, 2], [3, 4]])
    ids = [model.generate(row.tolist(), max_new_tokens=1, eos_token_id=[])[-1] for row in prompts]
    assert ids[0] != ids[1]

    def padding(**options: Any) -> int:
        out = model.generate(prompts, max_new_tokens=4, eos_token_id=ids[0], **options)
        assert out.shape == (2, 6)
        return int(out[0, -1])

    assert padding(generation_config={"pad_token_id": 10}) == 10
    model.generation_defaults = GenerationDefaults(pad_token_id=11)
    assert padding() == 11
    model.generation_defaults = GenerationDefaults()
    assert padding() == 12
    model = _model()
    assert padding() == ids[0]
    none = _plan(eos_token_id=[])
    model.tokenizer = Padding()  # type: ignore[assignment]
    assert generation._padding(model, none) == 13
    model.tokenizer = None
    assert generation._padding(model, none) == 0


def test_loading_warns_once_of_what_the_generation_config_asks_for_in_vain(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path)
    said = {"no_repeat_ngram_size": 3, "top_k": 4}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    with pytest.warns(UserWarning, match=r"generation_config\.json asks for no_repeat_ngram_size=3, which") as caught:
        model = Model.from_pretrained(tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(tmp_path) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate([1], max_new_tokens=1)


def test_a_call_of_too_many_sequences_is_refused_before_anything_is_made(tiny: Model) -> None:
    cases: list[tuple[Any, dict[str, Any]]] = [
        ([1], {"num_return_sequences": 65_537}),
        ([[1], [2]], {"num_return_sequences": 40_000}),
        ([1], {"num_return_sequences": 2**31 - 1}),
    ]
    for prompts, options in cases:
        with pytest.raises(OptionError, match="at most 65536"):
            tiny.generate(prompts, max_new_tokens=1, do_sample=True, **options)


def test_the_core_is_asked_for_memory_before_rows_are_made(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, *args: Any, **options: Any) -> None:
            raise llama_ext.OutOfMemoryError("no room")

    monkeypatch.setattr(_core, "Generation", Full)
    monkeypatch.setattr(generation, "_Row", None)
    with pytest.raises(llama_ext.OutOfMemoryError):
        tiny.generate([1], max_new_tokens=1, do_sample=True, num_return_sequences=1000)


def test_what_beam_search_cannot_do_is_told_with_the_file_that_asks_for_it() -> None:
    asks = GenerationDefaults(repetition_penalty=1.1)
    words = r"repetition_penalty=1\.1 is from the checkpoint's generation_config\.json; pass repetition_penalty=1\.0"
    with pytest.raises(UnsupportedError, match=words):
        _plan(asks, num_beams=2)
    assert _plan(asks, num_beams=2, repetition_penalty=1.0).num_beams == 2
    with pytest.raises(UnsupportedError, match=r"in this version$"):
        _plan(num_beams=2, repetition_penalty=1.1)
    beams = GenerationDefaults(num_beams=4)
    with pytest.raises(UnsupportedError, match=r"num_beams=4 is from .*generation_config\.json; pass num_beams=1"):
        _plan(beams, repetition_penalty=1.1)
    assert _plan(beams, repetition_penalty=1.1, num_beams=1).num_beams == 1


def test_beams_are_scored_again_only_for_details(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tiny.generate([1, 2], max_new_tokens=4, num_beams=3, return_details=True)
    assert len(found.logprobs) == len(found.token_ids) == 4
    monkeypatch.setattr(generation, "_logprobs", None)
    assert tiny.generate([1, 2], max_new_tokens=4, num_beams=3) == [1, 2, *found.token_ids]
