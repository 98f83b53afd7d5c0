"""Other runtimes than onnxruntime: whoever asks for one by name hears of a failure where it did not run."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

import llama_ext
from onnx_runs import each_profile

from llama_ext.onnx import metadata  # isort: skip
from llama_ext.onnx.exporting import export  # isort: skip
from llama_ext.onnx.verification import ParityReport, verify  # isort: skip
from llama_ext.onnx.verification_others import GENAI, OPENVINO, OTHERS, installed  # isort: skip

BOTH = [GENAI, OPENVINO]


def requires(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(installed(name) is None, reason=f"{name} is not installed")


@requires(GENAI)
@each_profile
def test_genai_takes_the_tokens_of_the_reference(tmp_path: Path, profile: str) -> None:
    export("demo", tmp_path, profile=profile, dtype="float32", verify=False)
    report = verify("demo", tmp_path, steps=20, threads=1, runtimes=[GENAI])
    assert report.passed, str(report)
    (check,) = [check for check in report.checks if check.runtime == GENAI]
    assert check.figures["flips"] == 0
    assert check.figures["steps"] == 20
    assert GENAI in report.versions


@requires(GENAI)
def test_another_graph_of_genai_config_is_not_taken_for_this_one(tmp_path: Path) -> None:
    export("demo", tmp_path, dtype="float32", verify=False)
    export("demo", tmp_path, dtype="int8", verify=False)
    report = verify("demo", tmp_path, steps=2, threads=1, variant="model", runtimes=[GENAI])
    assert not report.passed
    (check,) = [check for check in report.checks if check.runtime == GENAI]
    assert "names model_quantized.onnx, not model.onnx" in check.note


@requires(OPENVINO)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_openvino_computes_the_same_from_the_portable_profile(tmp_path: Path, dtype: str) -> None:
    export("demo", tmp_path, profile="portable", dtype=dtype, verify=False)
    report = verify("demo", tmp_path, steps=12, threads=1, runtimes=[OPENVINO])
    assert report.passed, str(report)
    checks = [check for check in report.checks if check.runtime == OPENVINO]
    assert len(checks) == 9
    for check in checks:
        relative_rms = check.figures["relative_rms"]
        assert relative_rms is not None
        assert relative_rms < 5e-6


@requires(OPENVINO)
def test_operators_that_openvino_lacks_are_told_and_it_has_not_passed(tmp_path: Path) -> None:
    export("demo", tmp_path, profile="ort", dtype="float32", verify=False)
    report = verify("demo", tmp_path, steps=2, threads=1, runtimes=[OPENVINO])
    assert not report.passed
    assert not report.differs
    (skipped,) = report.not_run
    assert skipped.runtime == OPENVINO
    assert "'portable' is the one for OpenVINO" in skipped.reason


def test_what_was_asked_for_and_is_not_installed_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in OTHERS.values():
        monkeypatch.setitem(sys.modules, module, None)
    export("demo", tmp_path, dtype="float32", verify=False)
    proven = verify("demo", tmp_path, steps=2, threads=1)
    assert proven.passed
    report = verify("demo", tmp_path, steps=2, threads=1, runtimes=BOTH)
    assert not report.passed
    assert [(each.runtime, each.reason) for each in report.not_run] == [
        (GENAI, "not installed: pip install onnxruntime-genai"),
        (OPENVINO, "not installed: pip install openvino"),
    ]
    assert report.verdicts[GENAI] == "not run"
    assert "not run: openvino" in str(report)
    assert "FAILED: " in str(report)
    assert "openvino not run (it had to run)" in str(report)
    # It says nothing of the graph, whose proof stays.
    assert metadata.get_metadata(tmp_path / "onnx" / "model.onnx")[metadata.REPORT_KEY] == proven.hash


def test_a_report_of_nothing_that_ran_has_not_passed() -> None:
    nothing = ParityReport(
        profile="standard",
        dtype="float32",
        files={},
        versions={},
        machine={},
        texts={},
        steps=0,
        checks=(),
        loss={},
        loss_note="",
        not_run=(),
        fault=None,
        required=(),
    )
    assert not nothing.passed
    missing = dataclasses.replace(nothing, required=(OPENVINO,))
    assert not missing.passed
    assert "FAILED: openvino not run (it had to run)" in str(missing)


def test_an_unknown_runtime_is_refused(tmp_path: Path) -> None:
    with pytest.raises(llama_ext.OptionError, match="onnxruntime-genai and openvino, got"):
        verify("demo", tmp_path, runtimes=["tensorrt"])
