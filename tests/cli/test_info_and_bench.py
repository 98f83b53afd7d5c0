"""`llama-ext info` and `llama-ext bench`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import llama_ext
from command_line import Run
from shared_data import LETTERS, SHARED, requires_shared


def test_info_prints_the_report(run: Run) -> None:
    assert run("info") == (0, f"{llama_ext.info()}\n", "")


def test_info_of_a_model_says_what_it_is(run: Run) -> None:
    out = run("info", "--model", LETTERS).out
    for part in (
        "800,128 in 1.5 MiB of bfloat16",
        "4 layers, width 128",
        "512 tokens, RoPE default",
        "66 tokens",
        "chat template  no",
        "temperature=0.8",
    ):
        assert part in out


def test_info_as_json(run: Run) -> None:
    record = json.loads(run("info", "--model", LETTERS, "--json").out)
    assert record["version"] == llama_ext.__version__
    assert record["isa"] == llama_ext.info().isa
    model = record["model"]
    assert (model["parameters"], model["dtype"], model["layers"]) == (800_128, "bfloat16", 4)
    assert (model["chat_template"], model["tokenizer_size"]) == (False, 66)
    assert "model" not in json.loads(run("info", "--json").out)


@requires_shared
def test_info_of_a_model_with_shared_heads(run: Run) -> None:
    out = run("info", "--model", SHARED / "stories260K").out
    for part in ("260,032 in", "sharing 4 key/value heads", "embeddings tied", "512 tokens", "greedy, 256 new tokens"):
        assert part in out


def test_info_does_not_need_a_tokenizer(run: Run, tmp_path: Path, chat_model: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((LETTERS / name).read_bytes())
    assert "none: token ids only" in run("info", "--model", tmp_path).out
    assert "chat template  yes" in run("info", "--model", chat_model).out


def test_info_checks_the_files(run: Run, tmp_path: Path) -> None:
    shutil.copytree(LETTERS, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = run("info", "--model", tmp_path / "cut")
    assert result.code == 3
    assert result.out == ""
    assert "model.safetensors" in result.err
    for dtype in ("int8", "int4"):
        llama_ext.quantize("demo", tmp_path / dtype, dtype)
        assert run("info", "--model", tmp_path / dtype).code == 0
    shutil.copy(tmp_path / "int8" / "model.safetensors", tmp_path / "int4")
    result = run("info", "--model", tmp_path / "int4")
    assert (result.code, result.out) == (3, "")
    assert "as int4" in result.err


def test_bench_measures_each_dtype(run: Run) -> None:
    options = ["--prompt-tokens", 20, "--new-tokens", 4, "--repeat", 2, "--dtype", "float32", "bfloat16"]
    result = run("bench", *options, "--json")
    assert (result.code, result.err) == (0, "")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert (row["model"], row["prompt_tokens"], row["new_tokens"], row["repeat"]) == ("demo", 20, 4, 2)
        assert row["isa"] == llama_ext.info().isa
        assert 0 < row["prefill"] <= row["prefill_best"]
        assert 0 < row["decode"] <= row["decode_best"]
    assert rows[0]["bytes"] > rows[1]["bytes"]


def test_bench_shows_a_table(run: Run) -> None:
    out = run("bench", "--prompt-tokens", 20, "--new-tokens", 4, "--repeat", 1, "--threads", 1).out
    lines = out.splitlines()
    parameters = llama_ext.LlamaForCausalLM.from_pretrained("demo").num_parameters()
    assert f"demo: {parameters:,} parameters" in lines[0]
    assert "1 thread;" in lines[0]
    assert lines[2].split()[:2] == ["dtype", "weights"]
    assert lines[3].startswith("int8")
    assert len({len(line) for line in lines[2:]}) == 1


def test_bench_cuts_its_own_prompt_to_the_context_but_no_other(run: Run) -> None:
    row = json.loads(run("bench", "--new-tokens", 30, "--repeat", 1, "--json").out)
    assert row["prompt_tokens"] == 512 - 30
    assert run("bench", "--prompt-tokens", 500, "--new-tokens", 30).code == 4


@pytest.mark.parametrize("new_tokens", [513, 5000])
def test_bench_of_more_than_the_context_is_an_error(new_tokens: int, run: Run) -> None:
    assert run("bench", "--new-tokens", new_tokens).code == 4
