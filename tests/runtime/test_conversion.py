"""Models into GGUF files and back: the same text, the same bits, tokenizer and template included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import AddedToken

import gguf_models
import llama_ext
from llama_ext.errors import NumericError, OptionError, UnsupportedError
from llama_ext.io.gguf_file import GgufFile
from shared_data import LETTERS, SHARED, requires_shared
from small_config import LLAMA3

Model = llama_ext.LlamaForCausalLM
GOLDEN = ["mha-untied", "gqa-tied-llama3rope", "wide-head-dim", "linear-rope", "biases"]
STORIES = SHARED / "stories260K"
IDS = np.random.default_rng(1).integers(0, 96, (2, 30))


def relative_rms(found: Any, expected: Any) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(np.square(expected))))


@requires_shared
def test_the_greedy_text_is_the_same(tmp_path: Path) -> None:
    before = Model.from_pretrained(STORIES).generate("Once upon a time", max_new_tokens=200, temperature=0)
    llama_ext.convert(STORIES, tmp_path / "x.gguf", dtype="f32")
    model = Model.from_pretrained(tmp_path / "x.gguf")
    assert model.generate("Once upon a time", max_new_tokens=200, temperature=0) == before
    assert model.eos_token_ids == Model.from_pretrained(STORIES).eos_token_ids


# Relative root mean squares of the logits of a trained model.
@requires_shared
@pytest.mark.parametrize(("dtype", "most"), [("float16", 2e-3), ("bfloat16", 2e-2), ("q8_0", 2e-2), ("q4_0", 0.3)])
def test_smaller_types_stay_close(dtype: str, most: float, tmp_path: Path) -> None:
    llama_ext.convert(STORIES, tmp_path / "x.gguf", dtype=dtype)
    model, original = Model.from_pretrained(tmp_path / "x.gguf"), Model.from_pretrained(STORIES)
    ids = np.arange(1, 200)[None]
    assert 0 < relative_rms(model(ids), original(ids)) < most


@requires_shared
@pytest.mark.parametrize("name", GOLDEN)
def test_floats_survive_both_ways_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = SHARED / "golden" / name
    llama_ext.convert(source, tmp_path / "x.gguf")
    llama_ext.convert(tmp_path / "x.gguf", tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for tensor, values in before.items():
        np.testing.assert_array_equal(after[tensor], values)
    ids = load_file(source / "golden.safetensors")["input_ids"]
    expected = Model.from_pretrained(source)(ids)
    np.testing.assert_array_equal(Model.from_pretrained(tmp_path / "x.gguf")(ids), expected)
    np.testing.assert_array_equal(Model.from_pretrained(tmp_path / "back")(ids), expected)


@pytest.mark.parametrize("dtype", [None, "float32", "f16", "bfloat16"])
def test_blocks_become_floats(dtype: str | None, tmp_path: Path) -> None:
    config = gguf_models.config(rope_scaling=LLAMA3)
    gguf_models.write(tmp_path / "x.gguf", config, {"": "Q4_K", ".v": "Q6_K", "up": "F16"})
    llama_ext.convert(tmp_path / "x.gguf", tmp_path / "new", dtype=dtype)
    model = Model.from_pretrained(tmp_path / "new", dtype="float32")
    exact = Model.from_pretrained(tmp_path / "x.gguf", dtype="float32")
    most = {"f16": 2e-3, "bfloat16": 2e-2}.get(dtype or "", 0.0)
    assert relative_rms(model(IDS), exact(IDS)) <= most
    assert model.config.rope_parameters == config.rope_parameters
    said = json.loads((tmp_path / "new" / "config.json").read_text())["dtype"]
    assert said == {"f16": "float16", "bfloat16": "bfloat16"}.get(dtype or "", "float32")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_packed_weights_become_floats(dtype: str, tmp_path: Path) -> None:
    model = Model(gguf_models.config(), dtype=dtype, compute="exact")
    model.save_pretrained(tmp_path / "packed")
    llama_ext.convert(tmp_path / "packed", tmp_path / "x.gguf")
    again = Model.from_pretrained(tmp_path / "x.gguf", compute="exact")
    assert again.dtype == "float32"
    assert relative_rms(again(IDS), model(IDS)) < 1e-6


def test_the_formats_of_tensors(tmp_path: Path) -> None:
    # Rows of 48: 32 does not divide them.
    Model(gguf_models.config(intermediate_size=48)).save_pretrained(tmp_path / "source")
    llama_ext.convert(tmp_path / "source", tmp_path / "x.gguf", dtype="q4_0")
    with GgufFile(tmp_path / "x.gguf") as file:
        kinds = {name: tensor.type.name for name, tensor in file.tensors.items()}
        assert file.metadata["general.file_type"] == 2
        assert file.metadata["general.quantization_version"] == 2
        assert file.metadata["general.name"] == "source"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_a_model_without_a_tokenizer_has_none_and_keeps_its_ends(tmp_path: Path) -> None:
    config = gguf_models.config(bos_token_id=5, eos_token_id=[7, 9], pad_token_id=11)
    Model(config).save_pretrained(tmp_path / "source")
    llama_ext.convert(tmp_path / "source", tmp_path / "x.gguf")
    model = Model.from_pretrained(tmp_path / "x.gguf")
    assert model.tokenizer is None
    assert (model.bos_token_id, model.config.pad_token_id) == (5, 11)


@pytest.mark.parametrize("ends", [None, 7, [7, 9], [7, 9, 10], [2, 3, 5, 7, 8]], ids=str)
@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_a_text_ends_at_the_same_tokens(ends: Any, has_tokenizer: bool, tmp_path: Path) -> None:
    tokenizer = None
    if has_tokenizer:
        text = "the cat sat on the mat " * 20
        tokenizer = llama_ext.Tokenizer.train(text, vocab_size=270, eos_token="</s>")
    model = Model(gguf_models.config(vocab_size=280, bos_token_id=None, eos_token_id=ends), tokenizer)
    model.save_pretrained(tmp_path / "source")
    source = Model.from_pretrained(tmp_path / "source")
    llama_ext.convert(tmp_path / "source", tmp_path / "x.gguf")
    again = Model.from_pretrained(tmp_path / "x.gguf")
    assert again.eos_token_ids == source.eos_token_ids
    llama_ext.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert Model.from_pretrained(tmp_path / "back").eos_token_ids == source.eos_token_ids


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_an_added_token_that_takes_spaces_with_it_is_refused(flag: str, tmp_path: Path) -> None:
    plain = llama_ext.Tokenizer.train("the cat sat on the mat " * 20, vocab_size=270)
    plain.backend.add_tokens([AddedToken("<x>", **{flag: True})])
    model = Model(gguf_models.config(vocab_size=280), llama_ext.Tokenizer.from_tokenizers(plain.backend))
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedError, match=f"the added token '<x>' with {flag}"):
        llama_ext.convert(tmp_path / "source", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_the_file_is_what_the_package_reads(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the gguf package")
    Model(gguf_models.config()).save_pretrained(tmp_path / "source")
    llama_ext.convert(tmp_path / "source", tmp_path / "x.gguf", dtype="q8_0")
    names = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert names["blk.1.ffn_up.weight"] == "Q8_0"


def test_what_cannot_be_written_is_said_before_anything_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OptionError, match="dtype must be one of float32, float16, bfloat16, q8_0, q4_0, got 'q4_k'"):
        llama_ext.convert(LETTERS, out, dtype="q4_k")
    with pytest.raises(OptionError, match=r"end in \.gguf"):
        llama_ext.convert(LETTERS, out, dtype="q8_0")
    with pytest.raises(UnsupportedError, match="this tokenizer cannot be written"):
        llama_ext.convert(LETTERS, tmp_path / "x.gguf")
    large = Model(gguf_models.config())
    large._core.load("layers.1.v", np.full((64, 256), 1e6, np.float32), "float32")
    large.save_pretrained(tmp_path / "large")
    with pytest.raises(NumericError, match="65504"):
        llama_ext.convert(tmp_path / "large", tmp_path / "x.gguf", dtype="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]
