"""Every Python snippet of docs/onnx.md runs as it stands there, where its package is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onnx_runs import onnx
from shared_data import SHARED, requires_shared
from subprocesses import run_script

from llama_ext.onnx.exporting import export  # isort: skip

GUIDE = Path(__file__).parents[2] / "docs" / "onnx.md"
SNIPPETS = re.findall(r"^## (.+?)$|^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
HEADINGS = ("onnxruntime, Python", "onnxruntime-genai", "optimum", "OpenVINO")
PACKAGES = {"onnxruntime-genai": "onnxruntime_genai", "optimum": "optimum.onnxruntime", "OpenVINO": "openvino"}


def snippet(heading: str) -> str:
    found, current = [], ""
    for title, code in SNIPPETS:
        current = title or current
        if code and current == heading:
            found.append(code)
    assert len(found) == 1, heading
    return str(found[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guide")
    export(SHARED / "stories260K", path / "llama-onnx", verify=False)
    assert onnx.__version__
    return path


@requires_shared
@pytest.mark.parametrize("heading", HEADINGS)
def test_a_snippet_of_the_guide_runs(heading: str, folder: Path) -> None:
    if heading in PACKAGES:
        pytest.importorskip(PACKAGES[heading], reason=f"{heading} is not installed")
    script = f"import os\nos.chdir({str(folder)!r})\n" + snippet(heading)
    assert run_script(script).strip()
