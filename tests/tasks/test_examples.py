"""The examples run, and the guide's code does what it shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grammars import EXAMPLES

GUIDE = EXAMPLES.parent / "docs" / "adapters-and-tasks.md"


def run(name: str, *arguments: str) -> str:
    found = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES)},
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_walk_through_gives_the_model_s_logits() -> None:
    found = re.search(r"largest difference to the model: (\S+)", run("walk_through.py"))
    assert found is not None
    assert float(found[1]) < 1e-4


def test_text_is_generated() -> None:
    assert "ROMEO:" in run("generate_text.py")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--language", "Chinese"), ("--lora",)])
def test_sentiment_is_classified(arguments: tuple[str, ...]) -> None:
    found = re.search(r"accuracy (\S+) of", run("classify_sentiment.py", *arguments))
    assert found is not None
    assert float(found[1]) >= 0.98


@pytest.mark.slow
def test_three_tasks_share_a_base() -> None:
    found = run("three_tasks.py")
    assert "[to Chinese] seven = 七" in found
    assert "[to English] 七 = seven" in found


@pytest.mark.slow
@pytest.mark.parametrize("source", ["English", "Chinese"])
def test_numbers_and_dates_that_were_held_out_are_translated(source: str) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    found = run("translate_numbers.py", "--source", source)
    scores = re.findall(r"^(numbers|dates):\n.*\n.*\nexact +(\S+)  of (\d+) translations$", found, re.MULTILINE)
    assert [name for name, _, _ in scores] == ["numbers", "dates"]
    for name, exact, count in scores:
        assert int(count) >= 150, name
        assert float(exact) >= 98.0, name


def test_the_guide_s_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"example {number} of the guide", "exec"), names)


def test_the_notebook_is_valid_and_its_code_compiles() -> None:
    notebook = json.loads((EXAMPLES / "one_model_many_tasks.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            compile("".join(cell["source"]), cell["id"], "exec")


@pytest.mark.slow
def test_the_notebook_s_code_runs(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    notebook = json.loads((EXAMPLES / "one_model_many_tasks.ipynb").read_text(encoding="utf-8"))
    code = "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    script = tmp_path / "notebook.py"
    script.write_text(code, encoding="utf-8")
    found = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
