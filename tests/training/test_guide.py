"""docs/training.md does what it shows."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "training.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_python_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = io.StringIO()
    found = blocks("python")
    assert len(found) >= 7
    with contextlib.redirect_stdout(printed):
        for number, block in enumerate(found, start=1):
            exec(compile(block, f"training.md, block {number}", "exec"), names)
    assert "3 + 4 = 7 1.0" in printed.getvalue()
    again, model = names["again"], names["model"]
    assert again([[1, 2, 3]]).tobytes() == model([[1, 2, 3]]).tobytes()  # type: ignore[operator]


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from llama_ext.cli.main import main

    (tmp_path / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("llama-ext ")]
    assert len(lines) >= 2
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    assert capsys.readouterr().out.strip()
