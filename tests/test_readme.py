"""The examples of the README, of docs/running.md and of docs/attribution.md do what they show."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

import llama_ext

README = Path(__file__).resolve().parents[1] / "README.md"
RUNNING = README.parent / "docs" / "running.md"
ATTRIBUTION = README.parent / "docs" / "attribution.md"


def blocks(language: str, guide: Path = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", guide.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(guide: Path = README) -> list[tuple[str, str]]:
    """The lines that name a command, and what `echo` gives each to read; less what wants a terminal or a model of one's own."""
    found = []
    for line in (line.split("#")[0].strip() for block in blocks("sh", guide) for line in block.splitlines()):
        said, bar, command = line.rpartition(" | ")
        if not command.startswith("llama-ext ") or "path/to" in command:
            continue
        if bar:
            found.append((command, shlex.split(said)[1] + "\n"))
        elif not command.startswith("llama-ext chat"):
            found.append((command, ""))
    return found


def run_blocks(guide: Path) -> tuple[dict[str, object], str]:
    """The names that the Python of a guide leaves, and what it prints."""
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, block in enumerate(blocks("python", guide), start=1):
            exec(compile(block, f"{guide.name}, example {number}", "exec"), names)
    return names, printed.getvalue()


def test_python_examples_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names, printed = run_blocks(README)
    assert "ROMEO:" in printed
    assert (tmp_path / "random-llama" / "model.safetensors").exists()
    output = names["output"]
    assert isinstance(output, llama_ext.GenerationOutput)
    # The printed numbers; another instruction set may round another way in a close call, but most guesses stay right.
    shown = re.search(r"print\(output\.drafted_tokens, .*# (\d+) (\d+);", README.read_text(encoding="utf-8"))
    assert shown is not None
    drafted, accepted = int(shown[1]), int(shown[2])
    assert (output.drafted_tokens, output.accepted_tokens) == (drafted, accepted) or llama_ext.info().isa != "avx2"
    assert output.accepted_tokens > output.drafted_tokens / 2


def test_the_guide_to_running_models_does_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names, _ = run_blocks(RUNNING)
    outputs, session = names["outputs"], names["session"]
    assert isinstance(outputs, list)
    assert max(output.shared_prompt_tokens for output in outputs) > 16
    assert isinstance(session, llama_ext.Session)
    # The sentence on the memory of a position.
    model = llama_ext.LlamaForCausalLM.from_pretrained("demo")
    sizes = [model.session(32, kv_dtype=kind).nbytes // 32 for kind in ("float32", "bfloat16", "int8")]  # type: ignore[arg-type]
    assert "Of the demo that is {:,}, {:,} and {:,} bytes".format(*sizes) in RUNNING.read_text(encoding="utf-8")
    assert (tmp_path / "demo.gguf").exists()


def test_the_guide_to_attribution_does_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names, printed = run_blocks(ATTRIBUTION)
    assert len(blocks("python", ATTRIBUTION)) >= 6
    why, verdict, best, measures = (names[name] for name in ("why", "verdict", "best", "measures"))
    assert isinstance(why, llama_ext.interpret.Attribution)
    assert str(why) in printed
    assert isinstance(verdict, llama_ext.interpret.Attribution)
    assert verdict.warning is None
    assert isinstance(best, llama_ext.interpret.Word)
    assert best.text.strip() == "good"
    assert isinstance(measures, llama_ext.interpret.Faithfulness)
    assert measures.comprehensiveness.beats_random
    assert measures.insertion_auc.beats_random
    assert (tmp_path / "why.html").exists()


@pytest.mark.parametrize("guide", [README, RUNNING], ids=lambda guide: guide.name)
def test_commands_run_as_printed_one_after_the_other(
    guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llama_ext.cli.main import main

    (tmp_path / README.name).write_bytes(README.read_bytes())
    monkeypatch.chdir(tmp_path)
    for command, typed in commands(guide):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode()), encoding="utf-8"))
        assert main(shlex.split(command)[1:]) == 0, command
        assert capsys.readouterr().out.strip(), command


def test_readme_has_examples() -> None:
    assert len(blocks("python")) >= 7
    assert len(commands()) >= 4
    assert len(blocks("python", RUNNING)) >= 11
    assert {shlex.split(command)[1] for command, _ in commands(RUNNING)} == {
        *("info", "bench", "generate", "chat", "perplexity", "quantize", "convert")
    }


def test_readme_has_no_placeholder_left() -> None:
    text = re.sub(r"^```.*?^```$", "", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^[A-Z_]{6,}$", text, re.MULTILINE) == []
