"""`llama-ext train`."""

from __future__ import annotations

import argparse
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
from llama_ext.cli.train_checks import warmup_of
from llama_ext.training import PRESETS, TokenFile
from llama_ext.training.checkpoints import locked
from shared_data import LETTERS

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


def test_tokens_are_prepared_with_a_models_tokenizer(run: Run, file: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "text.tokens"
    result = run("train", file, "--prepare", tokens, "--model", "demo")
    assert result.code == 0, result.err
    # And no tokenizer beside them: the model has it.
    assert sorted(os.listdir(tmp_path)) == [tokens.name, file.name]
    demo = llama_ext.LlamaForCausalLM.from_pretrained("demo")
    assert demo.tokenizer is not None
    with TokenFile(tokens) as opened:
        assert opened.read(0, len(opened)).tolist() == demo.tokenizer.encode(TEXT)
    result = run("train", tokens, "--model", "demo", "--out", tmp_path / "x", "--steps", 1, "--context", 16)
    assert result.code == 0, result.err
    result = run("train", file, "--prepare", tmp_path / "y", "--model", "demo", "--tokenizer", "bpe")
    assert result.code == 2
    assert "--tokenizer is for a new model; --model demo has its own" in result.err
    demo.tokenizer = None
    demo.save_pretrained(tmp_path / "bare")
    result = run("train", file, "--prepare", tmp_path / "y", "--model", tmp_path / "bare")
    assert result.code == 2
    assert "bare has no tokenizer" in result.err
    assert not (tmp_path / "y").exists()


def test_a_model_is_trained_further(run: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    result = run("train", file, "--model", "demo", "--out", out, "--steps", 3, "--lr", 1e-4, "--context", 32)
    assert result.code == 0
    tuned = llama_ext.LlamaForCausalLM.from_pretrained(out)
    demo = llama_ext.LlamaForCausalLM.from_pretrained("demo")
    assert tuned.config.max_position_embeddings == demo.config.max_position_embeddings
    assert tuned.dtype == "float32"
    assert tuned.evaluate(TEXT, context=32).loss < demo.evaluate(TEXT, context=32).loss
    result = run("train", file, "--model", "demo", "--out", tmp_path / "other", "--layers", 3)
    assert result.code == 2
    assert "--layers is for a new model" in result.err


def test_a_wide_model_is_trained_further_at_a_lower_learning_rate(run: Run, file: Path, tmp_path: Path) -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=66, hidden_size=384, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    tokenizer = llama_ext.Tokenizer.from_pretrained(LETTERS)
    llama_ext.LlamaForCausalLM(config, tokenizer=tokenizer, seed=1).save_pretrained(tmp_path / "wide")
    options = ("--steps", 2, "--context", 32, "--batch-size", 2)
    for given, lr in (((), 5e-4), (("--lr", 2e-3), 2e-3)):
        log = tmp_path / f"log-{lr}"
        out = tmp_path / f"out-{lr}"
        result = run("train", file, "--model", tmp_path / "wide", "--out", out, *options, *given, "--log-file", log)
        assert result.code == 0, result.err
        assert json.loads(log.read_text().splitlines()[0])["compile"]["lr"] == lr


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
    assert start["compile"]["min_lr"] == 0.1
    assert start["fit"]["batch_size"] == 12


@pytest.mark.parametrize("option", ["--prepare", "--log-file", "--plot"])
def test_the_text_is_not_what_is_written_whatever_is_said(run: Run, file: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "link.png").symlink_to(file)
    out = () if option == "--prepare" else ("--out", tmp_path / "model")
    for path in (file, tmp_path / "link.png"):
        result = run("train", file, *out, *SMALL, "--overwrite", option, path)
        assert result.code == 2
        assert f"{option} {path}: this is also the text that is learned" in result.err
    assert file.read_text() == TEXT


def test_a_log_is_no_plot(run: Run, file: Path, tmp_path: Path) -> None:
    files = ("--log-file", tmp_path / "x.png", "--plot", tmp_path / "x.png")
    result = run("train", file, "--out", tmp_path / "model", *SMALL, *files)
    assert result.code == 2
    assert "--plot" in result.err
    assert "this is also --log-file" in result.err


def test_two_runs_do_not_share_a_directory(run: Run, file: Path, tmp_path: Path) -> None:
    for options in ((), ("--overwrite",), ("--resume",)):
        with locked(tmp_path / "model" / "checkpoints"):
            result = run("train", file, "--out", tmp_path / "model", *SMALL, "--steps", 3, *options)
        assert result.code == 2
        assert "another run is saving there now" in result.err
        assert not (tmp_path / "model").exists()


def test_an_empty_out_is_not_the_current_directory(
    run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for options in ((*SMALL, "--out", ""), (*SMALL, "--out", "", "--overwrite"), ("--prepare", "")):
        result = run("train", file, *options)
        assert result.code == 2
        assert "is empty" in result.err
    assert sorted(tmp_path.iterdir()) == before


def test_a_plot_is_drawn(run: Run, file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    plot = tmp_path / "history.png"
    assert run("train", file, "--out", tmp_path / "model", *SMALL, "--steps", 3, "--plot", plot).code == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("out", "where"), [("model", "model"), ("runs/model", "runs/model"), ("runs/model", "runs")])
def test_a_log_and_a_plot_may_lie_where_the_model_goes(
    run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, where: str
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    monkeypatch.chdir(tmp_path)
    files = ["--log-file", f"{where}/log.jsonl", "--plot", f"{where}/p.png"]
    result = run("train", file, "--out", out, *SMALL, "--steps", 3, *files)
    assert result.code == 0, result.err
    assert Path(where, "log.jsonl").read_text().count('"step"') >= 3
    assert Path(where, "p.png").read_bytes()[:4] == b"\x89PNG"
    assert Path(out, "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("nowhere/log", "nowhere/log: the directory nowhere does not exist: create it first"),
        ("model/deeper/log", "deeper does not exist: create it first"),
        ("model", "model: this is a directory: name a file"),
        (".", ".: this is a directory: name a file"),
    ],
)
def test_a_log_that_cannot_be_written_is_told_before_anything_is_read(
    run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("train", "no text", "--out", "model", "--log-file", log)
    assert result.code == 2
    assert words in result.err.replace(f"{tmp_path}{os.sep}", "")
    assert os.listdir() == ["text.txt"]


def test_a_log_is_added_to(run: Run, file: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("mine\n")
    assert run("train", file, "--out", tmp_path / "x", *SMALL, "--steps", 2, "--log-file", log).code == 0
    assert log.read_text().startswith('mine\n{"event": "start"')


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "--out"),
        (["--out", "x", "--prepare", "y"], 2, "one of --out"),
        (["--out", "x", "--val-fraction", "1"], 2, "--val-fraction"),
        (["--out", "x", "--heads", "3"], 2, "--width must be a multiple of twice --heads, 6, as"),
        (["--out", "x", "--width", "7"], 2, "RoPE rotates pairs); got 7"),
        (["--out", "x", "--width", "12", "--tokenizer", "nowhere"], 2, "twice --heads, 8, as"),
        (["--out", "x", "--preset", "cpu", "--width", "4"], 2, "twice --heads, 8, as"),
        (["--out", "x", "--kv-heads", "3"], 2, "--kv-heads must be a divisor of --heads, 4, got 3"),
        (["--out", "x", "--kv-heads", "8"], 2, "--kv-heads must be a divisor of --heads, 4, got 8"),
        (["--out", "x", "--layers", "1000000"], 4, "--layers is 1000000, the limit is"),
        (["--out", "x", "--device", "abacus"], 2, "--device"),
        (["--out", "x", "--steps", "0"], 2, "--steps must"),
        (["--out", "x", "--lr", "-1"], 2, "--lr must"),
        (["--out", "x", "--model", "demo", "--context", "100000"], 4, "context"),
        (["--out", "x", "--tokenizer", "nowhere"], 3, "nowhere"),
        (["--out", "x", "--precision", "int8"], 2, "--precision"),
        (["--out", "x", "--steps", "5", "--epochs", "2"], 2, "--steps and --epochs both say"),
        (["--out", "x", "--steps", "5", "--warmup", "6"], 2, "--warmup is 6 steps and the run has 5"),
        (["--out", "x", "--epochs", "1", "--warmup", "1000"], 2, "--warmup is 1000 steps and the run has 2:"),
        (["--out", "x", "--resume", "--overwrite"], 2, "give one of them"),
        (["--out", "x", "--sample", "%"], 2, "--sample '%': "),
        (["--out", "x", "--sample", ""], 2, "--sample is empty"),
        (["--out", "x", "--context", "8", "--sample", "First Ci"], 2, "--sample has 8 tokens and the context is 8"),
        (
            ["--out", "x", "--context", "2232"],
            2,
            "2,480 tokens, 2,232 of them to learn from, and a row of --context 2232 needs",
        ),
        (["--out", "x", "--context", "2232"], 2, "2,233. Give a longer text, or --context 2231 or less"),
        (["--out", "x", "--eval-every", "0"], 2, "--eval-every must be a whole number >= 1, got 0"),
        (["--out", "x", "--eval-every", "0", "--val-fraction", "0"], 2, "--eval-every must be a whole number >= 1"),
        (["--out", "x", "--save-every", "0"], 2, "--save-every must be a whole number >= 1, got 0"),
        (["--out", "x", "--log-file", "x/log", "--save-every", "0"], 2, "--save-every must"),
        (["--out", "x", "--ffn-width", "0"], 2, "--ffn-width must be a whole number >= 1, got 0"),
        (["--out", "x", "--ffn-width", "-8", "--preset", "cpu"], 2, "--ffn-width must be a whole number >= 1, got -8"),
        (["--out", "x", "--model", "demo", "--context", "0"], 2, "--context must be a whole number >= 1, got 0"),
        (["--out", "x", "--patience", "0"], 2, "--patience must be a whole number >= 1, got 0"),
        (["--out", "x", "--patience", "0", "--val-fraction", "0"], 2, "--patience must be a whole number >= 1"),
        (["--out", "x", "--patience", "2", "--val-fraction", "0"], 2, "--patience needs validation"),
        (["--out", "x", "--patience", "2", "--val-fraction", "0.0001"], 2, "and 1 are held out: --val-fraction holds"),
        (["--out", "x", "--tokenizer", ""], 3, "the path of a model is empty"),
        (["--out", "text.txt"], 2, "text.txt: no files can be written into this directory: text.txt is a file"),
        (["--out", "text.txt/x"], 2, "text.txt/x: no files can be written into this directory: text.txt is a file"),
        (["--prepare", "nowhere/x"], 2, "nowhere does not exist: create it first"),
        (["--prepare", "."], 2, "this is a directory: name a file"),
        (["--prepare", "y", "--steps", "5"], 2, "--steps is for a training, and --prepare only writes tokens"),
        (["--prepare", "y", "--resume"], 2, "--resume is for a training"),
        (["--prepare", "y", "--layers", "2"], 2, "--layers is for a training"),
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
    assert os.listdir() == ["text.txt"]


@pytest.mark.parametrize(
    ("plot", "words"),
    [
        ("nowhere/x.png", "nowhere does not exist: create it first"),
        ("x.foo", "does not write .foo files"),
        (".", "is a directory"),
    ],
)
def test_a_plot_that_cannot_be_written_is_told_before_the_training(
    run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plot: str, words: str
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    monkeypatch.chdir(tmp_path)
    result = run("train", file, "--out", "model", *SMALL, "--steps", 3, "--plot", plot)
    assert result.code == 2
    assert words in result.err
    assert os.listdir() == ["text.txt"]


def test_what_is_there_is_replaced_only_when_it_is_asked_for(run: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    options = [*SMALL, "--steps", 3, "--eval-every", 2]
    llama_ext.LlamaForCausalLM.from_pretrained("demo").save_pretrained(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for more in ([], ["--resume"]):
        result = run("train", file, "--out", out, *options, *more)
        assert result.code == 2
        assert f"{out} exists and is not empty: name another directory, or say --overwrite" in result.err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run("train", file, "--out", out, *options, "--overwrite").code == 0
    first = weights(out)
    # A run with checkpoints: they go as well, those of a longer run too.
    (out / "checkpoints" / "step-00000003").rename(out / "checkpoints" / "step-00000300")
    (out / "checkpoints" / "mine").mkdir()
    assert run("train", file, "--out", out, *options, "--seed", 1, "--overwrite").code == 0
    assert weights(out) != first
    best, *others = sorted(os.listdir(out / "checkpoints"))
    assert best in ("best-00000002", "best-00000003")
    assert others == ["mine", "step-00000003"]


def test_a_mistake_with_overwrite_leaves_the_earlier_run(run: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert run("train", file, "--out", out, *SMALL, "--steps", 3).code == 0
    before = sorted(path for path in out.rglob("*"))
    assert run("train", file, "--out", out, *SMALL, "--steps", 3, "--keep-last", 0, "--overwrite").code == 2
    assert sorted(path for path in out.rglob("*")) == before


def test_resume_begins_where_nothing_was_saved_yet(run: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    (out / "checkpoints").mkdir(parents=True)
    (out / "log").write_text("{}\n")
    result = run("train", file, "--out", out, *SMALL, "--steps", 2, "--log-file", out / "log", "--resume")
    assert result.code == 0, result.err


def test_prepared_tokens_are_replaced_only_when_it_is_asked_for(run: Run, file: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    assert run("train", file, "--prepare", tokens).code == 0
    before = tokens.read_bytes()
    result = run("train", file, "--prepare", tokens, "--tokenizer", "bpe")
    assert result.code == 2
    assert f"{tokens} exists: name another file, or say --overwrite" in result.err
    assert tokens.read_bytes() == before
    # Its tokenizer alone is something to be lost, too.
    tokens.unlink()
    result = run("train", file, "--prepare", tokens)
    assert result.code == 2
    assert f"{tokens}.tokenizer exists and is not empty" in result.err
    assert run("train", file, "--prepare", tokens, "--overwrite").code == 0
    assert tokens.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "warmup"),
    [
        (["--steps", 20], 2),
        (["--steps", 9], 0),
        (["--preset", "cpu", "--steps", 30], 3),
        (["--epochs", 4], 4),  # of (2232 - 1) // (16 * 12) = 11 steps
        (["--steps", 20, "--warmup", 20], 20),
    ],
)
def test_a_warm_up_is_a_tenth_of_the_steps(
    run: Run, file: Path, tmp_path: Path, options: list[Any], warmup: int
) -> None:
    log = tmp_path / "log"
    shape = ["--layers", 1, "--width", 16, "--heads", 2, "--context", 16, "--ffn-width", 16]
    assert run("train", file, "--out", tmp_path / "x", *shape, *options, "--log-file", log).code == 0
    assert json.loads(log.read_text().splitlines()[0])["compile"]["warmup"] == warmup


def test_a_long_run_warms_up_for_100_steps() -> None:
    arguments = argparse.Namespace(warmup=None, resume=False)
    assert [warmup_of(arguments, 100, steps) for steps in (999, 1000, 2000, 5000)] == [99, 100, 100, 100]
    assert all(preset.compile["warmup"] == 100 for preset in PRESETS.values())


def test_a_run_that_is_made_longer_keeps_its_warm_up(run: Run, file: Path, tmp_path: Path) -> None:
    options = ["--layers", 1, "--width", 16, "--heads", 2, "--context", 16, "--schedule", "constant"]
    assert run("train", file, "--out", tmp_path / "x", *options, "--steps", 20).code == 0
    result = run("train", file, "--out", tmp_path / "x", *options, "--steps", 40, "--resume")
    assert result.code == 0, result.err
    assert "40 steps" in result.err


def test_a_text_too_short_to_validate_on_is_told(run: Run, file: Path, tmp_path: Path) -> None:
    result = run("train", file, "--out", tmp_path / "x", *SMALL, "--steps", 2, "--val-fraction", 0.0005)
    assert result.code == 0
    assert "note: 2 tokens are held out" not in result.err
    assert "validation loss" in result.err
    result = run("train", file, "--out", tmp_path / "y", *SMALL, "--steps", 2, "--val-fraction", 0.0001)
    assert result.code == 0
    assert "note: 1 tokens are held out, and a validation needs 2" in result.err
    for fraction in (0, 0.1):
        short = run("train", "-", "--out", tmp_path / "z", "--steps", 2, "--val-fraction", fraction, stdin="hi")
        assert short.code == 2
        assert "the text has 2 tokens, " in short.err


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
