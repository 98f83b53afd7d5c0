"""Quantising: the errors that are reported, what a calibration text gains, and what the model loses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_models
import llama_ext
from llama_ext.errors import OptionError
from llama_ext.runtime.calibration import Activations, calibration_ids
from shared_data import LETTERS, SHARED, requires_shared

Model = llama_ext.LlamaForCausalLM
PLAY = "\n".join(f"{name}: what is it, {name.lower()}, that you would have of me?" for name in ("ROMEO", "JULIET")) * 20


def rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"symmetric": False}])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_it_is_the_model_that_loading_would_make(dtype: str, options: dict[str, Any], tmp_path: Path) -> None:
    report = llama_ext.quantize(LETTERS, tmp_path, dtype, **options)
    made = Model.from_pretrained(tmp_path)
    loaded = Model.from_pretrained(LETTERS, dtype=dtype, **options)
    ids = np.arange(60)[None]
    np.testing.assert_array_equal(made(ids), loaded(ids))
    assert made.generate("ROMEO:", seed=1) == loaded.generate("ROMEO:", seed=1)
    assert report.nbytes == made.nbytes


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_report_has_the_errors_there_are(dtype: str, tmp_path: Path) -> None:
    report = llama_ext.quantize(LETTERS, tmp_path, dtype)
    original, made = Model.from_pretrained(LETTERS, dtype="float32"), Model.from_pretrained(tmp_path)
    matrices = {name for name, _, is_matrix in made._core.slots() if is_matrix}
    assert {tensor.name for tensor in report.tensors} == matrices
    for tensor in report.tensors:
        exact = original._core.read(tensor.name)
        found = rms(made._core.read(tensor.name) - exact) / rms(exact)
        assert math.isclose(tensor.error, found, rel_tol=1e-3)
        assert (tensor.encoding, tensor.group) == made._core.types()[tensor.name]
        assert tensor.output_error is None
    assert report.improvement is None
    assert json.loads(report.to_json())["tensors"][0]["error"] == report.tensors[0].error
    assert "layers.3.down" in str(report)
    assert "MiB -> " in str(report)


def test_calibration_lowers_the_errors_of_outputs_and_says_by_how_much(tmp_path: Path) -> None:
    report = llama_ext.quantize(LETTERS, tmp_path, "int4", calibration=PLAY)
    assert report.calibration_tokens > 1000
    assert report.improvement is not None
    assert report.improvement > 0.15
    for tensor in report.tensors:
        assert tensor.output_error is not None
        assert tensor.output_error_before is not None
        assert tensor.output_error <= tensor.output_error_before
    assert (
        f"the errors of the outputs are {report.improvement:.1%} lower, measured on tokens of the calibration text itself"
        in str(report)
    )
    assert json.loads(report.to_json())["improvement"] == report.improvement
    Model.from_pretrained(tmp_path).generate("ROMEO:", max_new_tokens=5)


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}])
def test_the_activations_are_those_of_the_model(changes: dict[str, Any]) -> None:
    model = Model(gguf_models.config(initializer_range=0.1, **changes), compute="exact")
    config, core = model.config, model._core
    ids = np.random.default_rng(0).integers(0, 96, (2, 50)).astype(np.int32)
    activations = Activations(config, ids, core.read("embedding"))
    slots = [name for name, _, _ in core.slots()]
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}."
        weights = {name.removeprefix(prefix): core.read(name) for name in slots if name.startswith(prefix)}
        inputs = activations.layer(weights)
        assert inputs["down"].shape == (100, config.intermediate_size)
    table = core.read("embedding" if config.tie_word_embeddings else "head")
    logits = activations.head(core.read("final_norm")) @ table.T
    expected = model(ids).reshape(100, -1)
    assert rms(logits - expected) < 5e-6 * rms(expected)


def test_a_calibration_text_becomes_windows() -> None:
    model = Model.from_pretrained(LETTERS)
    assert calibration_ids(model.tokenizer, "ROMEO" * 4, model.config).shape == (1, 20)
    assert calibration_ids(model.tokenizer, ["ROMEO" * 500, "x" * 10000], model.config).shape == (8, 512)
    with pytest.raises(OptionError, match="no tokenizer"):
        calibration_ids(None, "x", model.config)


@pytest.mark.parametrize("text", [5, [5], ["text", b"bytes"]])
def test_what_is_no_text_is_refused(text: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="calibration must be a text or a list of texts"):
        llama_ext.quantize("demo", tmp_path / "x", "int4", calibration=text)


@pytest.mark.parametrize("text", ["", " \n\t ", [], ["", "\n"], "ROMEO", ["ROMEO", "x" * 10]])
def test_a_text_that_is_no_evidence_is_refused_before_anything_is_written(
    text: str | list[str], tmp_path: Path
) -> None:
    # The demo has a BOS token, which alone made a text of nothing.
    for source in ("demo", LETTERS):
        if source == "demo" and text == ["ROMEO", "x" * 10]:
            continue
        with pytest.raises(OptionError, match=r"the calibration text (is empty|has \d+ tokens): it needs 16"):
            llama_ext.quantize(source, tmp_path / "x", "int4", calibration=text)
    assert not (tmp_path / "x").exists()


def test_other_sources_and_wrong_options(tmp_path: Path) -> None:
    gguf_models.write(tmp_path / "x.gguf", gguf_models.config(), "Q8_0")
    llama_ext.quantize(tmp_path / "x.gguf", tmp_path / "int8")
    report = llama_ext.quantize(tmp_path / "int8", tmp_path / "int4", "int4", group_size=64)
    assert {tensor.group for tensor in report.tensors} == {64}
    with pytest.raises(OptionError, match="dtype must be int8 or int4"):
        llama_ext.quantize(LETTERS, tmp_path / "x", "float16")
    with pytest.raises(OptionError, match="no tokenizer"):
        llama_ext.quantize(tmp_path / "int8", tmp_path / "x", calibration="text")


def test_a_loaded_model_is_to_be_saved_first(tmp_path: Path) -> None:
    model: Any = Model.from_pretrained(LETTERS)
    for function, name in ((llama_ext.quantize, "quantize"), (llama_ext.convert, "convert")):
        with pytest.raises(OptionError, match=rf"got LlamaForCausalLM\. Save a loaded model first.*then {name}\("):
            function(model, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_directory_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any) -> None:
        raise AssertionError("a matrix was quantised")

    monkeypatch.setattr("llama_ext.runtime.quantization._quantize_one", work)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="no files can be written into this directory"):
        llama_ext.quantize(LETTERS, tmp_path / "file" / "x")


@requires_shared
def test_int8_hardly_changes_the_perplexity(tmp_path: Path) -> None:
    play = (SHARED / "tinyshakespeare.txt").read_text()
    held_out = play[int(0.9 * len(play)) :][:20000]
    stories = Model.from_pretrained(SHARED / "stories260K")
    texts = stories.generate(["Once upon a time", "One day"] * 8, max_new_tokens=250, temperature=1.0, seed=77)
    cases = ((str(LETTERS), held_out, 1.02), (str(SHARED / "stories260K"), texts, 1.15))
    for source, text, most in cases:
        before = Model.from_pretrained(source, dtype="float32").perplexity(text).perplexity
        llama_ext.quantize(source, tmp_path / "int8", "int8")
        assert Model.from_pretrained(tmp_path / "int8").perplexity(text).perplexity < 1.01 * before
        llama_ext.quantize(source, tmp_path / "int4", "int4")
        assert Model.from_pretrained(tmp_path / "int4").perplexity(text).perplexity < most * before
