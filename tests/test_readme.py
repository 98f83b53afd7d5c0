"""The README's examples do what they show."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

import llama_ext

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The lines that name a command, less `chat`, which wants a terminal and a chat model, and what wants a model of one's own."""
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("llama-ext ") and "chat" not in line and "path/to" not in line]


def test_python_examples_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, block in enumerate(blocks("python"), start=1):
            exec(compile(block, f"README example {number}", "exec"), names)
    assert "ROMEO:" in printed.getvalue()
    assert (tmp_path / "random-llama" / "model.safetensors").exists()
    output = names["output"]
    assert isinstance(output, llama_ext.GenerationOutput)
    # The printed numbers; another instruction set may round another way in a close call, but most guesses stay right.
    shown = re.search(r"print\(output\.drafted_tokens, .*# (\d+) (\d+);", README.read_text(encoding="utf-8"))
    assert shown is not None
    drafted, accepted = int(shown[1]), int(shown[2])
    assert (output.drafted_tokens, output.accepted_tokens) == (drafted, accepted) or llama_ext.info().isa != "avx2"
    assert output.accepted_tokens > output.drafted_tokens / 2


def test_commands_run_as_printed_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llama_ext.cli.main import main

    (tmp_path / README.name).write_bytes(README.read_bytes())
    monkeypatch.chdir(tmp_path)
    for command in commands():
        assert main(shlex.split(command)[1:]) == 0, command
        assert capsys.readouterr().out.strip(), command


def test_readme_has_examples() -> None:
    assert len(blocks("python")) >= 7
    assert len(commands()) >= 4


def test_readme_has_no_placeholder_left() -> None:
    text = re.sub(r"^```.*?^```$", "", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^[A-Z_]{6,}$", text, re.MULTILINE) == []
