"""Classifiers in `export` and `verify`: from files and from memory, and the native model is one of those compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from llama_ext import _core
from onnx_runs import PROFILES
from shared_data import SHARED, requires_shared

from llama_ext.onnx.exporting import export  # isort: skip
from llama_ext.onnx.parity import GATES, nearness  # isort: skip
from llama_ext.onnx.profiles import PROFILES as BY_NAME  # isort: skip
from llama_ext.onnx.verification import verify  # isort: skip
from llama_ext.onnx.verification_parties import NativeParty, Pass  # isort: skip

GOLDEN = SHARED / "golden" / "classifier"
KINDS = [(profile, dtype) for profile in PROFILES for dtype in BY_NAME[profile].dtypes]
Classifier = llama_ext.LlamaForSequenceClassification

SMALLEST = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 48,
}  # fmt: skip


pytestmark = pytest.mark.filterwarnings("ignore:optimum computes the head dimension:UserWarning")


def small(**options: Any) -> Classifier:
    """Three labels, and a token that the config calls padding."""
    config = llama_ext.LlamaConfig(
        vocab_size=67,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=48,
        initializer_range=0.2,
        pad_token_id=3,
    )
    base = llama_ext.LlamaForCausalLM(config, seed=3, threads=1, **options)
    return Classifier.from_base(base, ["a", "b", "c"], seed=1)


@requires_shared
@pytest.mark.parametrize(("profile", "dtype"), KINDS, ids=lambda value: value)
def test_a_classifier_passes_and_so_does_the_native_model(tmp_path: Path, profile: str, dtype: str) -> None:
    export(GOLDEN, tmp_path, profile=profile, dtype=dtype, verify=False)
    report = verify(GOLDEN, tmp_path, threads=1)
    assert report.passed, str(report)
    rounded = {"native (int8 activations)": "passed"} if dtype in ("int8", "int4") else {}
    exact = {} if dtype == "float32" else {"onnxruntime (float32)": "passed"}
    exported = {"onnxruntime": "not run" if dtype == "bfloat16" else "passed"}
    assert report.verdicts == {"native": "passed", **rounded, **exported, **exact}
    assert "native" in report.required
    native = {check.name: check for check in report.checks if check.runtime == "native"}
    assert set(native) == {"texts", "batch of two", "one token"}
    # Noise of float32, a hundredth of what the gates allow.
    assert all((check.figures["relative_rms"] or 0) < 5e-6 for check in native.values())
    assert bool(report.loss) == (dtype != "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_classifier_in_memory_gives_the_bytes_of_its_files(tmp_path: Path, dtype: str) -> None:
    model = small(dtype=dtype)
    model.save_pretrained(tmp_path / "files")
    memory = export(model, tmp_path / "memory")
    assert memory.report is not None
    assert memory.report.verdicts["native"] == "passed"
    files = export(tmp_path / "files", tmp_path / "exported", verify=False)
    assert memory.dtype == files.dtype == ("float32" if dtype == "bfloat16" else dtype)
    assert memory.data[0].read_bytes() == files.data[0].read_bytes()
    assert verify(model, files.directory, threads=1).passed
    assert verify(tmp_path / "files", memory.directory, threads=1).passed
    # A quantised model is compared with its own codes.
    assert not memory.report.loss


def test_the_native_party_gives_the_scores_of_the_classifier() -> None:
    model = small()
    party = NativeParty("native", None, model._core, scores=True)  # type: ignore[arg-type]
    rows = (np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32))
    np.testing.assert_array_equal(np.concatenate(party.logits(Pass(rows))), model.scores([[5, 6, 7], [8, 9]]))


def test_a_native_head_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failure elsewhere: nothing compared the native model of a classifier with its graph."""
    model = small()
    export(model, tmp_path, verify=False)
    honest = NativeParty.logits
    monkeypatch.setattr(NativeParty, "logits", lambda self, work: [-row for row in honest(self, work)])
    report = verify(model, tmp_path, threads=1)
    assert not report.passed
    assert report.verdicts == {"native": "failed", "onnxruntime": "passed"}


def test_the_report_claims_no_tokens_that_were_not_generated(tmp_path: Path) -> None:
    model = small()
    export(model, tmp_path, verify=False)
    report = verify(model, tmp_path, threads=1)
    assert report.steps == 0
    text = str(report)
    assert "float32 weights, profile standard: 98 tokens of text\n" in text
    assert "greedy" not in text
    assert "PASSED: native passed, onnxruntime passed" in text
    assert json.loads(report.to_json())["steps"] == 0
    assert "8 greedy steps" in str(language_model_report(tmp_path / "other"))


def language_model_report(folder: Path) -> Any:
    base = llama_ext.LlamaForCausalLM(llama_ext.LlamaConfig.from_dict(SMALLEST), seed=1, threads=1)
    export(base, folder, verify=False)
    return verify(base, folder, steps=8, threads=1)


def test_the_loss_of_few_bits_is_told_of_scores(tmp_path: Path) -> None:
    """Failure elsewhere: the table wanted figures that only a distribution over tokens has."""
    model = small()
    export(model, tmp_path, dtype="int4", verify=False)
    report = verify(model, tmp_path, threads=1)
    assert report.passed, str(report)
    assert "weights: stored as int4, against the original ones, both in float64: relative rms of logits" in str(report)


@pytest.mark.parametrize("texts", [[[5, 6, 7, 3], [8, 3, 9]], [[5, 3, 3]], [[3, 3]], [[5, 3, 3, 9], [6, 3, 3, 8]]])
def test_a_text_may_end_with_what_the_config_calls_padding(tmp_path: Path, texts: Any) -> None:
    """As a tokenizer that ends texts with EOS gives them where EOS is the padding: the scores are those of the token before."""
    model = small()
    export(model, tmp_path, verify=False)
    report = verify(model, tmp_path, texts=texts, threads=1)
    assert report.passed, str(report)


def test_few_scores_are_held_to_what_a_position_may_be_off() -> None:
    """A mean over two numbers is no surer than they are: one in twenty quantised classifiers of two labels was refused."""
    gates = GATES["int8 activations"]
    assert gates.for_numbers(4).relative_rms == gates.for_numbers(4).worst_position == gates.worst_position
    assert gates.for_numbers(32) == gates
    off = nearness([np.array([[1.09, 2.0]])], [np.array([[1.0, 2.0]]) / 1.1])
    assert gates.relative_rms < off.relative_rms < gates.worst_position
    assert off.passes(gates.for_numbers(2))
    assert not off.passes(gates)


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_an_active_adapter_is_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    """Failure elsewhere: the base was exported in silence, and compared with itself."""
    model: Any = llama_ext.LlamaForCausalLM.from_pretrained("demo") if kind == "language model" else small()
    export(model, tmp_path / "base", verify=False)
    model.add_adapter("g", llama_ext.LoRA(r=2))
    advice = r"the adapter 'g' is active\. .*merge_adapter .*set_adapter\(None\) chooses the base"
    with pytest.raises(llama_ext.OptionError, match=f"export writes the base alone, and {advice}"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(llama_ext.OptionError, match=f"verify compares the base alone, and {advice}"):
        verify(model, tmp_path / "base")
    model.set_adapter(None)
    assert verify(model, tmp_path / "base", steps=2, threads=1).passed


def test_a_merged_adapter_is_exported(tmp_path: Path) -> None:
    model = llama_ext.LlamaForCausalLM(llama_ext.LlamaConfig.from_dict(SMALLEST), seed=1, threads=1)
    export(model, tmp_path / "base", verify=False)
    model.add_adapter("g", llama_ext.LoRA(r=2))
    core: _core.Adapter = model._adapters["g"].core
    for slot, _, _ in core.slots():
        core.write(slot, "B", np.ones_like(core.read(slot, "B")))
    model.merge_adapter()
    assert export(model, tmp_path / "merged").report is not None
    assert not verify(model, tmp_path / "base", steps=2, threads=1, record=False).passed


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_quantised_model_that_had_an_adapter_gives_the_same_bytes(tmp_path: Path, profile: str, dtype: str) -> None:
    """Failure elsewhere: gate and up lie apart from then on, and the comparison asked for them together."""
    config = llama_ext.LlamaConfig.from_dict(SMALLEST)
    model = llama_ext.LlamaForCausalLM(config, seed=1, dtype=dtype, threads=1)
    before = export(model, tmp_path / "before", profile=profile, verify=False)
    model.add_adapter("a", llama_ext.LoRA(r=2))
    model.delete_adapter("a")
    after = export(model, tmp_path / "after", profile=profile)
    assert after.data[0].read_bytes() == before.data[0].read_bytes()
    assert after.report is not None
    assert not after.report.loss
    model.save_pretrained(tmp_path / "saved")
    assert export(tmp_path / "saved", tmp_path / "again", profile=profile).report is not None
