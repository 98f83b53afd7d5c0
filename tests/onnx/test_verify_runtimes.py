"""Other runtimes than onnxruntime, compared where they are installed, and told where they are not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import llama_ext
from onnx_runs import each_profile

from llama_ext.onnx.exporting import export  # isort: skip
from llama_ext.onnx.verification import verify  # isort: skip
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
def test_operators_that_openvino_lacks_are_no_failure_of_the_graph(tmp_path: Path) -> None:
    export("demo", tmp_path, profile="ort", dtype="float32", verify=False)
    report = verify("demo", tmp_path, steps=2, threads=1, runtimes=[OPENVINO])
    assert report.passed, str(report)
    (skipped,) = report.not_run
    assert skipped.runtime == OPENVINO
    assert "'portable' is the one for OpenVINO" in skipped.reason


def test_what_is_not_installed_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in OTHERS.values():
        monkeypatch.setitem(sys.modules, module, None)
    export("demo", tmp_path, dtype="float32", verify=False)
    report = verify("demo", tmp_path, steps=2, threads=1, runtimes=BOTH)
    assert report.passed
    assert [(each.runtime, each.reason) for each in report.not_run] == [
        (GENAI, "not installed: pip install onnxruntime-genai"),
        (OPENVINO, "not installed: pip install openvino"),
    ]
    assert report.verdicts[GENAI] == "not run"
    assert "not run: openvino" in str(report)


def test_an_unknown_runtime_is_refused(tmp_path: Path) -> None:
    with pytest.raises(llama_ext.OptionError, match="onnxruntime-genai and openvino, got"):
        verify("demo", tmp_path, runtimes=["tensorrt"])
