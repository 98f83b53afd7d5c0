"""`llama-ext quantize`, `convert` and `info` of what they write; GGUF and packed models in the other commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import gguf_models
import llama_ext
from command_line import Run
from llama_ext.cli.text_input import read_text
from shared_data import LETTERS, SHARED, requires_shared

TEXT = "ROMEO: what is it that you would have of me? " * 30


def test_quantize_prints_each_matrix_and_writes_a_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text(TEXT)
    code, out, err = run(
        "quantize", LETTERS, tmp_path / "int4", "--dtype", "int4", "--group-size", 64, "--asymmetric", "--calibrate",
        tmp_path / "play.txt",
    )  # fmt: skip
    assert (code, err) == (0, "")
    for part in ("layers.0.q", "int4_min x 64", "outputs before", "lower", f"wrote {tmp_path / 'int4'}"):
        assert part in out
    described = run("info", "--model", tmp_path / "int4").out
    for part in ("packed safetensors", "of int4_min", "int8_min 8,448 in 1"):
        assert part in described
    assert run("generate", "ROMEO:", "--model", tmp_path / "int4", "--max-new-tokens", 5, "--seed", 1).code == 0
    assert run("perplexity", "-", "--model", tmp_path / "int4", stdin=TEXT).code == 0


def test_quantize_as_json(run: Run, tmp_path: Path) -> None:
    record = json.loads(run("quantize", "demo", tmp_path / "int8", "--dtype", "int8", "--json").out)
    assert record["calibration_tokens"] == 0
    assert record["improvement"] is None
    assert len(record["tensors"]) == 4 * 7 + 1


@requires_shared
def test_convert_there_and_back(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("convert", SHARED / "stories260K", tmp_path / "x.gguf", "--dtype", "q8_0")
    assert code == 0
    assert "31 x Q8_0, 5 x F16, 11 x F32" in out
    described = json.loads(run("info", "--model", tmp_path / "x.gguf", "--json").out)["model"]
    assert (described["format"], described["dtype"], described["parameters"]) == ("GGUF", "Q8_0", 260_032)
    assert described["types"]["F32"] == [11, 704]
    assert run("convert", tmp_path / "x.gguf", tmp_path / "back", "--dtype", "bf16").code == 0
    prompt = ("generate", "Once upon a time", "--max-new-tokens", 20, "--greedy", "--model")
    assert run(*prompt, tmp_path / "back").out == run(*prompt, tmp_path / "x.gguf").out


@requires_shared
def test_dtypes_and_group_sizes_of_loading(run: Run) -> None:
    base = ("generate", "Once", "--max-new-tokens", 3, "--greedy", "--model", SHARED / "stories260K")
    for dtype in ("float16", "int8", "int4"):
        assert run(*base, "--dtype", dtype).code == 0
    assert run(*base, "--dtype", "int4", "--group-size", 32).code == 0
    code, _, err = run(*base, "--group-size", 32)
    assert code == 2
    assert "int8" in err


@pytest.mark.parametrize("command", ["generate", "info", "perplexity", "bench", "quantize", "convert"])
def test_a_damaged_file_is_exit_code_3(command: str, run: Run, tmp_path: Path) -> None:
    gguf_models.write(tmp_path / "x.gguf", gguf_models.config(), "Q8_0")
    data = (tmp_path / "x.gguf").read_bytes()
    llama_ext.quantize(tmp_path / "x.gguf", tmp_path / "packed", "int4")
    weights = (tmp_path / "packed" / "model.safetensors").read_bytes()
    arguments = {
        "generate": ("generate", "x", "--model"),
        "perplexity": ("perplexity", "-", "--model"),
        "quantize": ("quantize", "--dtype", "int8", tmp_path / "out"),
        "convert": ("convert", tmp_path / "out"),
    }.get(command, (command, "--model"))
    for part in np.linspace(0, 0.99, 4):
        (tmp_path / "x.gguf").write_bytes(data[: int(part * len(data))])
        (tmp_path / "packed" / "model.safetensors").write_bytes(weights[: int(part * len(weights))])
        for model in (tmp_path / "x.gguf", tmp_path / "packed"):
            line = [*arguments, model]
            if command in ("quantize", "convert"):
                line = [command, model, *(each for each in arguments[1:])]
            code, out, err = run(*line, stdin="text")
            assert (code, out) == (3, ""), err
            assert err.startswith("llama-ext: ")
            assert str(tmp_path) in err
            assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_replaced_only_when_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    llama_ext.LlamaForCausalLM.from_pretrained(LETTERS).save_pretrained(tmp_path / "model")
    gguf_models.write(tmp_path / "x.gguf", gguf_models.config(), "Q8_0")
    for line, out, words in (
        (("quantize", "demo", tmp_path / "model", "--dtype", "int8"), "model", "exists and is not empty: name another"),
        (
            ("convert", "demo", tmp_path / "model"),
            "model",
            "exists and is not empty: name another directory, or say --over",
        ),
        (("convert", "demo", tmp_path / "x.gguf"), "x.gguf", "exists: name another file, or say --overwrite"),
    ):
        path = tmp_path / out
        files = [path] if path.is_file() else sorted(path.iterdir())
        before = [each.read_bytes() for each in files]
        code, printed, err = run(*line)
        assert (code, printed) == (2, "")
        assert f"{path} {words}" in err
        assert [each.read_bytes() for each in files] == before
        assert run(*line, "--overwrite").code == 0
        assert [each.read_bytes() for each in files] != before
        assert run("info", "--model", path).code == 0


def test_an_empty_target_holds_nothing_to_lose(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.gguf").touch()
    assert run("quantize", "demo", tmp_path / "empty", "--dtype", "int8").code == 0
    assert run("convert", "demo", tmp_path / "x.gguf").code == 0
    assert run("convert", "demo", tmp_path / "nowhere" / "x.gguf").code == 2
    assert run("convert", "demo", tmp_path / "x.gguf" / "y").code == 2


def test_quantising_what_is_quantised_is_told(run: Run, tmp_path: Path) -> None:
    gguf_models.write(tmp_path / "x.gguf", gguf_models.config(), "Q8_0")
    for source in ("demo", tmp_path / "x.gguf"):
        code, out, err = run("quantize", source, tmp_path / "out", "--dtype", "int4", "--overwrite", "--json")
        assert code == 0
        assert json.loads(out)["tensors"]
        assert f"note: {source} is quantised already" in err
        assert err.count("\n") == 1


@requires_shared
def test_a_gguf_file_in_a_missing_directory_names_both(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "new" / "sub" / "x.gguf"
    code, out, err = run("convert", SHARED / "stories260K", path)
    assert (code, out) == (2, "")
    assert f"{path}: the directory {path.parent} does not exist: create it first" in err


def test_capitals_name_a_gguf_file_as_well(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "X.GGUF"
    assert run("convert", "demo", path).code == 0
    assert path.read_bytes().startswith(b"GGUF")
    code, _, err = run("convert", "demo", path)
    assert code == 2
    assert f"{path} exists: name another file, or say --overwrite" in err
    assert run("convert", "demo", path, "--overwrite").code == 0


def test_a_byte_order_mark_is_no_letter_of_a_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "marked.txt").write_text(TEXT, encoding="utf-8-sig")
    plain, marked = (run("perplexity", tmp_path / name).out.splitlines() for name in ("text.txt", "marked.txt"))
    assert plain[0].startswith("perplexity ")
    assert marked[:3] == plain[:3]
    given = ("generate", "--max-new-tokens", 3, "--greedy")
    assert run(*given, stdin="\ufeffROMEO:") == run(*given, stdin="ROMEO:")
    # There is one at most: a second one is a letter, if a strange one.
    assert read_text(str(tmp_path / "marked.txt")) == TEXT
    (tmp_path / "marked.txt").write_text("\ufeffx\ufeff", encoding="utf-8-sig")
    assert read_text(str(tmp_path / "marked.txt")) == "\ufeffx\ufeff"


def test_wrong_usage(run: Run, tmp_path: Path) -> None:
    for line in (
        ("quantize", "demo", tmp_path / "x"),
        ("quantize", "demo", tmp_path / "x", "--dtype", "float16"),
        ("convert", "demo", tmp_path / "x", "--dtype", "q8_0"),
        ("convert", "demo"),
    ):
        assert run(*line).code == 2
    assert run("convert", LETTERS, tmp_path / "x.gguf").code == 3  # GGUF has no kind for its tokenizer
    assert run("quantize", tmp_path / "nothing", tmp_path / "x", "--dtype", "int8").code == 3
    assert run("quantize", "demo", tmp_path / "x", "--dtype", "int8", "--calibrate", tmp_path / "nothing").code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_hidden_gguf_file_is_a_file(run: Run, tmp_path: Path) -> None:
    assert run("convert", "demo", tmp_path / ".gguf", "--dtype", "q8_0").code == 0
    assert (tmp_path / ".gguf").read_bytes()[:4] == b"GGUF"
    assert run("info", "--model", tmp_path / ".gguf").code == 0
