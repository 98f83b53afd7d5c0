"""`llama-ext perplexity`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import llama_ext
from command_line import Run
from shared_data import LETTERS

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_numbers_are_those_of_the_library(run: Run, file: Path) -> None:
    expected = llama_ext.LlamaForCausalLM.from_pretrained("demo").perplexity([TEXT], stride=50, context=200)
    found = json.loads(run("perplexity", file, "--stride", 50, "--context", 200, "--json").out)
    for name in ("perplexity", "loss", "bits_per_byte", "tokens", "bytes"):
        assert found[name] == getattr(expected, name)
    assert found["context"] == 200
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])


def test_people_get_lines(run: Run, file: Path) -> None:
    result = run("perplexity", file)
    assert (result.code, result.err) == (0, "")
    for word in ("perplexity  ", "bits per byte", f"tokens of {len(TEXT) - 1:,} bytes", "tokens/s"):
        assert word in result.out


def test_files_are_scored_each_by_itself(run: Run, file: Path) -> None:
    once = json.loads(run("perplexity", file, "--json").out)
    twice = json.loads(run("perplexity", file, "-", "--json", stdin=TEXT).out)
    assert twice["tokens"] == 2 * once["tokens"]
    assert twice["loss"] == pytest.approx(once["loss"], rel=1e-12)


def test_a_text_is_scored_as_it_is(run: Run, file: Path) -> None:
    # No newline is changed or lost on the way.
    assert json.loads(run("perplexity", "-", "--json", stdin="a\r\nb\n").out)["bytes"] == 4


@pytest.mark.parametrize(
    ("stdin", "code", "message"),
    [(b"", 2, "standard input is empty"), (b"a", 2, "nothing to score"), (b"\xff\xfe", 3, "not UTF-8")],
)
def test_what_cannot_be_scored_is_an_error(stdin: bytes, code: int, message: str, run: Run) -> None:
    result = run("perplexity", "-", stdin=stdin)
    assert result.code == code
    assert message in result.err


@pytest.mark.parametrize("option", ["--stride", "--context"])
def test_a_number_out_of_range_is_named_as_it_is_typed(option: str, run: Run, file: Path) -> None:
    result = run("perplexity", file, option, 0)
    assert result.code == 2
    assert f"{option} must be" in result.err


def test_a_model_without_a_tokenizer_cannot_read(run: Run, file: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((LETTERS / name).read_bytes())
    assert run("perplexity", file, "--model", tmp_path).code == 2


def test_a_directory_is_no_text(run: Run, tmp_path: Path) -> None:
    result = run("perplexity", tmp_path)
    assert result.code == 3
    assert "cannot be read" in result.err
