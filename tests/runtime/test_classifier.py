"""Sequence classifiers: transformers' scores, its rule of the last token, and files that go there and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_ext
from llama_ext import LlamaForSequenceClassification, LoRA
from llama_ext.errors import (
    CheckpointError,
    ContextLengthError,
    DTypeError,
    OptionError,
    TokenIdError,
    UnsupportedError,
)
from shared_data import SHARED, requires_shared

GOLDEN = SHARED / "golden" / "classifier"
LABELS = ["no", "yes", "perhaps"]


def base(**changes: Any) -> llama_ext.LlamaForCausalLM:
    options: dict[str, Any] = {
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    return llama_ext.LlamaForCausalLM(llama_ext.LlamaConfig(**{**options, **changes}), seed=3)


@pytest.fixture(scope="module")
def model() -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification.from_base(base(), LABELS, seed=1)


@requires_shared
def test_scores_are_those_of_transformers() -> None:
    golden = load_file(GOLDEN / "golden.safetensors")
    found = LlamaForSequenceClassification.from_pretrained(GOLDEN)
    assert found.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    scores = found(golden["input_ids"], golden["attention_mask"])
    assert scores.shape == (4, 3)
    assert np.abs(scores - golden["logits"]).max() <= 1e-5
    assert (golden["attention_mask"].sum(axis=1) < 20).any(), "some rows are padded"
    # By the ids alone, as transformers decides it; and by known lengths.
    assert np.array_equal(found(golden["input_ids"]), scores)
    rows = [row[mask == 1].tolist() for row, mask in zip(golden["input_ids"], golden["attention_mask"], strict=True)]
    assert np.array_equal(found.scores(rows), scores)


def test_a_row_gives_what_it_gives_alone(model: LlamaForSequenceClassification) -> None:
    rows = [[5, 6, 7], [1], list(range(1, 33)), [9, 9], *([[index + 1, 3]] * 1 for index in range(40))]
    flat = [row if isinstance(row[0], int) else row[0] for row in rows]
    together = model.scores(flat)
    assert together.shape == (44, 3)
    for row, scores in zip(flat, together, strict=True):
        assert np.array_equal(model.scores([row])[0], scores)


def test_the_last_token_is_the_rightmost_that_is_not_padding(model: LlamaForSequenceClassification) -> None:
    expected = model.scores([[5, 6, 7]])
    assert np.array_equal(model(np.array([[5, 6, 7, 0, 0]])), expected)
    assert np.array_equal(model(np.array([[5, 6, 7, 0, 0]]), [[1, 1, 1, 0, 0]]), expected)
    assert np.array_equal(model(np.array([[0, 0, 5, 6, 7]]), [[0, 0, 1, 1, 1]]), expected)
    # Padding within the text counts, and a row of padding alone is its first token.
    assert np.array_equal(model(np.array([[5, 0, 7, 0]])), model.scores([[5, 0, 7]]))
    assert np.array_equal(model(np.array([[0, 0, 0]])), model.scores([[0]]))


def test_without_a_padding_token_the_mask_decides() -> None:
    model = LlamaForSequenceClassification.from_base(base(pad_token_id=None), LABELS)
    assert np.array_equal(model(np.array([[5, 6, 0, 0]]), [[1, 1, 0, 0]]), model.scores([[5, 6]]))
    assert np.array_equal(model(np.array([[5, 6, 0, 0]])), model.scores([[5, 6, 0, 0]]))


def test_what_is_saved_is_loaded(model: LlamaForSequenceClassification, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["score.weight"].shape == (3, 32)
    assert "lm_head.weight" not in tensors
    again = LlamaForSequenceClassification.from_pretrained(tmp_path)
    assert again.labels == LABELS
    assert again.config.extra["label2id"] == {"no": 0, "yes": 1, "perhaps": 2}
    ids = np.random.default_rng(0).integers(1, 67, (5, 9))
    assert np.array_equal(again(ids), model(ids))
    with pytest.raises(UnsupportedError, match=r"LlamaForSequenceClassification\.from_pretrained"):
        llama_ext.LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(OptionError, match="has the labels"):
        LlamaForSequenceClassification.from_pretrained(tmp_path, labels=["a", "b", "c"])


def test_a_tied_base_gives_the_same_features(tmp_path: Path) -> None:
    tied = base(tie_word_embeddings=True)
    model = LlamaForSequenceClassification.from_base(tied, LABELS, seed=1)
    ids = [[3, 4, 5]]
    assert np.array_equal(
        model.scores(ids), LlamaForSequenceClassification.from_base(base(), LABELS, seed=1).scores(ids)
    )
    tied.save_pretrained(tmp_path)
    loaded = LlamaForSequenceClassification.from_pretrained(tmp_path, labels=LABELS, seed=1)
    assert np.array_equal(loaded.scores(ids), model.scores(ids))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "int4", "int4_min"])
def test_other_weights_keep_their_numbers(dtype: str, tmp_path: Path) -> None:
    symmetric = False if dtype.endswith("_min") else None
    dtype = dtype.removesuffix("_min")
    model = llama_ext.LlamaForCausalLM(base().config, seed=3, dtype=dtype, symmetric=symmetric)
    classifier = LlamaForSequenceClassification.from_base(model, LABELS, seed=1)
    wide = LlamaForSequenceClassification.from_base(base(), LABELS, seed=1)
    for slot in ("layers.0.q", "layers.1.down", "embedding"):
        assert np.array_equal(classifier._core.read(slot), model._core.read(slot))
    ids = [[3, 4, 5], [7, 8]]
    found, exact = classifier.scores(ids), wide.scores(ids)
    assert np.abs(found - exact).max() <= (0.5 if dtype == "int4" else 0.06) * np.abs(exact).max()
    classifier.save_pretrained(tmp_path)
    assert np.array_equal(LlamaForSequenceClassification.from_pretrained(tmp_path).scores(ids), found)


def test_a_packed_language_model_becomes_a_classifier(tmp_path: Path) -> None:
    model = llama_ext.LlamaForCausalLM(base().config, seed=3, dtype="int8")
    model.save_pretrained(tmp_path)
    loaded = LlamaForSequenceClassification.from_pretrained(tmp_path, labels=LABELS, seed=1)
    expected = LlamaForSequenceClassification.from_base(model, LABELS, seed=1)
    assert np.array_equal(loaded.scores([[3, 4, 5]]), expected.scores([[3, 4, 5]]))


def test_adapters_bring_their_own_head(tmp_path: Path) -> None:
    model = LlamaForSequenceClassification.from_base(base(), LABELS, seed=1)
    ids = [[3, 4, 5], [6]]
    before = model.scores(ids)
    model.add_adapter("a", LoRA(r=2))
    assert np.array_equal(model.scores(ids), before)
    head = np.random.default_rng(0).standard_normal((3, 32), np.float32)
    model._adapters["a"] = model._adapters["a"]._replace(head=head)
    expected = model.scores(ids)
    assert not np.array_equal(expected, before)
    assert np.array_equal(model.scores(ids, adapter=[None, "a"]), np.stack([before[0], expected[1]]))
    assert np.array_equal(model.scores(ids, adapter=[None, None]), before)
    model.save_adapter(tmp_path, "a")
    other = LlamaForSequenceClassification.from_base(base(), LABELS, seed=9)
    other.load_adapter(tmp_path, "b")
    assert np.array_equal(other.scores(ids), expected)
    other.merge_adapter("b")
    assert np.abs(other.scores(ids) - expected).max() <= 1e-5


def test_labels_and_bases_are_checked(tmp_path: Path) -> None:
    for labels, words in ((["one"], "at least two"), (["a", "a"], "twice"), ("ab", "list"), (["a", 3], "names")):
        with pytest.raises(OptionError, match=words):
            LlamaForSequenceClassification.from_base(base(), labels)  # type: ignore[arg-type]
    base().save_pretrained(tmp_path)
    with pytest.raises(OptionError, match=r"pass labels=\[\.\.\.\]"):
        LlamaForSequenceClassification.from_pretrained(tmp_path)
    config = dataclasses.replace(base().config, architectures=["LlamaForSequenceClassification"])
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        LlamaForSequenceClassification.from_pretrained(tmp_path)


def test_arguments_are_checked(model: LlamaForSequenceClassification) -> None:
    with pytest.raises(TokenIdError):
        model.scores([[67]])
    with pytest.raises(OptionError, match="no token"):
        model.scores([[]])
    with pytest.raises(OptionError, match="no tokenizer"):
        model.scores(["text"])
    with pytest.raises(DTypeError, match="list of texts"):
        model.scores("text")
    with pytest.raises(ContextLengthError, match="33 tokens"):
        model.scores([[1] * 33])
    with pytest.raises(OptionError, match="outside the attention_mask"):
        model(np.array([[0, 5, 6]]), [[1, 1, 0]])
    assert model.scores([]).shape == (0, 3)
    assert model(np.zeros((0, 4), np.int64)).shape == (0, 3)
    with pytest.raises(OptionError, match="no token"):
        model(np.zeros((2, 0), np.int64))
