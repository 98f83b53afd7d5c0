"""A session after Ctrl-C holds each token once; a saved one belongs to one model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from llama_ext.runtime import session_file
from llama_ext.runtime.generation import _Run
from llama_ext.runtime.session_file import fingerprint

Model = llama_ext.LlamaForCausalLM
PROMPT = [3, 4, 5]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupt_between_a_step_and_its_piece_leaves_no_token_twice(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    expected = tiny.generate(PROMPT, max_new_tokens=6)
    take, calls = _Run._take, []

    def interrupted(self: _Run, event: Any) -> Any:
        calls.append(event)
        if len(calls) == at:
            raise KeyboardInterrupt
        return take(self, event)

    monkeypatch.setattr(_Run, "_take", interrupted)
    session = tiny.session(max_length=20)
    with pytest.raises(KeyboardInterrupt):
        list(session.stream_generate(PROMPT, max_new_tokens=6))
    assert session.tokens == expected[: len(PROMPT) + at - 1]


@pytest.mark.parametrize("taken", [1, 2, 6])
def test_a_closed_stream_leaves_the_tokens_of_its_pieces(tiny: Model, taken: int) -> None:
    expected = tiny.generate(PROMPT, max_new_tokens=6)
    session = tiny.session(max_length=20)
    stream = session.stream_generate(PROMPT, max_new_tokens=6)
    for _ in range(taken):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert session.tokens == expected[: len(PROMPT) + taken]


def _one_layer(seed: int = 0, **options: Any) -> Model:
    config = llama_ext.LlamaConfig(
        vocab_size=600,
        hidden_size=512,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    return Model(config, seed=seed, **options)


def test_every_tensor_of_a_model_counts_in_its_fingerprint() -> None:
    same = fingerprint(_one_layer())
    assert fingerprint(_one_layer()) == same
    for slot, shape, _ in _one_layer()._core.slots():
        model = _one_layer()
        # All of a tensor, as training changes it; the embedding and the head are above 1 MiB and only sampled.
        changed = model._core.read(slot) + np.float32(2**-12)
        model._core.load(slot, changed.reshape(shape), "float32")
        assert fingerprint(model) != same, slot


def test_a_large_tensor_is_sampled_from_its_first_byte_to_its_last() -> None:
    values = np.arange(3 << 18, dtype=np.float32)
    blocks = list(session_file._sampled(values))
    data = values.view(np.uint8)
    assert len(blocks) == 16
    assert {block.size for block in blocks} == {64 << 10}
    np.testing.assert_array_equal(blocks[0], data[: 64 << 10])
    np.testing.assert_array_equal(blocks[-1], data[-(64 << 10) :])
    (whole,) = session_file._sampled(values[:1000])
    np.testing.assert_array_equal(whole, data[:4000])


def test_the_fingerprint_is_made_once_and_tells_arithmetic_and_dtype_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [_one_layer(), _one_layer(compute="exact"), _one_layer(dtype="bfloat16"), _one_layer(seed=1)]
    prints = [fingerprint(model) for model in models]
    assert len(set(prints)) == len(models)
    monkeypatch.setattr(session_file, "_sampled", None)
    assert [fingerprint(model) for model in models] == prints


def test_a_model_read_with_larger_limits_can_be_saved(tmp_path: Path) -> None:
    config = _one_layer().config
    _one_layer().save_pretrained(tmp_path / "old")
    text = (
        (tmp_path / "old" / "config.json")
        .read_text()
        .replace(
            f'"max_position_embeddings": {config.max_position_embeddings}', f'"max_position_embeddings": {1 << 30 | 1}'
        )
    )
    (tmp_path / "old" / "config.json").write_text(text)
    with pytest.raises(llama_ext.LimitError):
        Model.from_pretrained(tmp_path / "old")
    limits = dataclasses.replace(llama_ext.Limits(), positions=1 << 31)
    model = Model.from_pretrained(tmp_path / "old", limits=limits, dtype="bfloat16")
    model.save_pretrained(tmp_path / "new")
    again = Model.from_pretrained(tmp_path / "new", limits=limits)
    assert (again.config.max_position_embeddings, again.config.dtype) == (1 << 30 | 1, "bfloat16")
    assert model.config.dtype == "float32"
