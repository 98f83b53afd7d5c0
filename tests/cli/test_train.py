"""`llama-ext train`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from command_line import Run, command
from llama_ext.training import TokenFile

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 40
SMALL = ["--layers", 1, "--width", 16, "--heads", 2, "--context", 16, "--batch-size", 4, "--warmup", 2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def test_a_text_becomes_a_model_that_generates(run: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    log = tmp_path / "log.jsonl"
    result = run(
        "train", file, "--out", out, *SMALL, "--steps", 30, "--eval-every", 10, "--log-file", log, "--lr", 0.02
    )
    assert result.code == 0
    assert "30 steps, " in result.err
    assert "tokens/s" in result.err
    assert "validation loss" in result.err
    assert f"wrote {out}" in result.err
    # A sample, and nothing else, goes to standard output.
    model = llama_ext.LlamaForCausalLM.from_pretrained(out)
    assert result.out == model.generate("\n", max_new_tokens=15, temperature=0.8, seed=0) + "\n"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [each["event"] for each in events].count("step") == 30
    validations = [each["loss"] for each in events if each["event"] == "validation"]
    assert len(validations) == 3
    assert validations[-1] < validations[0]
    # The last tenth is held out.
    assert model.tokenizer is not None
    held_out = np.array(model.tokenizer.encode(TEXT))[int(len(TEXT) * 0.9) :]
    assert model.evaluate(held_out).loss == pytest.approx(validations[-1], rel=1e-6)
    assert sorted(os.listdir(out / "checkpoints"))[-1] == "step-00000030"


def test_a_run_is_resumed_bit_for_bit(run: Run, file: Path, tmp_path: Path) -> None:
    options = [*SMALL, "--steps", 20, "--tokenizer", "bpe", "--vocab-size", 270, "--dropout", 0.1]
    assert run("train", file, "--out", tmp_path / "whole", *options, "--save-every", 7).code == 0
    # As after a kill: what was saved before is there, the rest is not.
    (tmp_path / "again").mkdir()
    (tmp_path / "whole" / "checkpoints").rename(tmp_path / "again" / "checkpoints")
    subprocess.run(["rm", "-r", tmp_path / "again" / "checkpoints" / "step-00000020"], check=True)
    result = run("train", file, "--out", tmp_path / "again", *options, "--save-every", 7, "--resume")
    assert result.code == 0, result.err
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")
    # Without --resume it is not touched.
    result = run("train", file, "--out", tmp_path / "again", *options)
    assert result.code == 2
    assert "--resume" in result.err
    # With other settings it does not go on.
    result = run("train", file, "--out", tmp_path / "again", *options, "--resume", "--lr", 0.5)
    assert result.code == 3
    assert "compile.lr was 0.001 and is 0.5" in result.err


def test_tokens_are_prepared_and_trained_on(run: Run, file: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "text.tokens"
    result = run("train", file, "--prepare", tokens, "--tokenizer", "bpe", "--vocab-size", 300)
    assert result.code == 0
    assert f"{tokens}.tokenizer" in result.out
    tokenizer = llama_ext.Tokenizer.from_pretrained(f"{tokens}.tokenizer")
    assert tokenizer.eos_token == "<|endoftext|>"
    with TokenFile(tokens) as opened:
        assert tokenizer.decode(opened.read(0, len(opened))) == TEXT
    options = [*SMALL, "--steps", 5, "--tokenizer", f"{tokens}.tokenizer"]
    assert run("train", tokens, "--out", tmp_path / "one", *options).code == 0
    assert run("train", file, "--out", tmp_path / "two", *options).code == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    result = run("train", tokens, "--out", tmp_path / "three", *SMALL)
    assert result.code == 2
    assert "--tokenizer" in result.err
    tokens.write_bytes(tokens.read_bytes()[:-1])
    assert run("train", tokens, "--out", tmp_path / "four", *options).code == 3


def test_a_model_is_trained_further(run: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    result = run("train", file, "--model", "demo", "--out", out, "--steps", 3, "--lr", 1e-4, "--context", 32)
    assert result.code == 0
    tuned = llama_ext.LlamaForCausalLM.from_pretrained(out)
    demo = llama_ext.LlamaForCausalLM.from_pretrained("demo")
    assert tuned.config.max_position_embeddings == demo.config.max_position_embeddings
    assert tuned.dtype == "float32"
    assert tuned.evaluate(TEXT, context=32).loss < demo.evaluate(TEXT, context=32).loss
    result = run("train", file, "--model", "demo", "--out", out, "--layers", 3)
    assert result.code == 2
    assert "--layers is for a new model" in result.err


def test_a_preset_is_nanogpts_and_options_go_before_it(run: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    log = tmp_path / "log"
    assert run("train", file, "--out", out, "--preset", "cpu", "--steps", 2, "--lr", 5e-4, "--log-file", log).code == 0
    config = json.loads((out / "config.json").read_text())
    shape = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "max_position_embeddings")
    assert [config[name] for name in shape] == [4, 4, 128, 344, 64]
    start = json.loads(log.read_text().splitlines()[0])
    assert start["compile"]["lr"] == 5e-4
    assert start["compile"]["betas"] == [0.9, 0.99]
    assert start["compile"]["warmup"] == 100
    assert start["fit"]["batch_size"] == 12


def test_a_plot_is_drawn(run: Run, file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    plot = tmp_path / "history.png"
    assert run("train", file, "--out", tmp_path / "model", *SMALL, "--steps", 3, "--plot", plot).code == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "--out"),
        (["--out", "x", "--prepare", "y"], 2, "one of --out"),
        (["--out", "x", "--val-fraction", "1"], 2, "--val-fraction"),
        (["--out", "x", "--heads", "3"], 2, "hidden_size"),
        (["--out", "x", "--steps", "0"], 2, "--steps must"),
        (["--out", "x", "--lr", "-1"], 2, "--lr must"),
        (["--out", "x", "--model", "demo", "--context", "100000"], 4, "context"),
        (["--out", "x", "--tokenizer", "nowhere"], 3, "nowhere"),
        (["--out", "x", "--precision", "int8"], 2, "--precision"),
    ],
)
def test_mistakes_have_exit_codes(
    run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[Any], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("train", file, *arguments)
    assert result.code == code
    assert words in result.err
    assert "Traceback" not in result.err


def test_an_empty_text_is_nothing_to_learn(run: Run, tmp_path: Path) -> None:
    result = run("train", "-", "--out", tmp_path / "x", stdin="")
    assert result.code == 2
    assert "standard input is empty" in result.err


def test_ctrl_c_saves_and_the_exit_code_says_so(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    log = tmp_path / "log"
    arguments = [*SMALL, "--steps", 100000, "--save-every", 100000, "--eval-every", 100000, "--log-file", log]
    process = subprocess.Popen(command("train", file, "--out", out, *arguments), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count('"step"') > 3):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"--resume goes on" in err
    (checkpoint,) = (out / "checkpoints").glob("step-*")
    assert json.loads((checkpoint / "training.json").read_text())["step"] > 2
    assert not (out / "config.json").exists()


def test_help_shows_examples(run: Run) -> None:
    result = run("train", "--help")
    assert result.code == 0
    assert "llama-ext train shakespeare.txt --out shakespeare --preset cpu" in result.out
