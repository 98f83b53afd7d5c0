"""`classify predict` and `translate run` as filters: a line out for each line in, as soon as it is known."""

from __future__ import annotations

import argparse
import io
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import llama_ext
from command_line import Run, Terminal, command
from grammars import example
from llama_ext.cli import common
from llama_ext.cli.text_answers import answer_texts
from llama_ext.runtime import progress
from llama_ext.tasks.translator import Translator

GRAMMARS, SMALL = example("template_grammars"), example("small_model")
LONG = "a" * 200


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose answers are those of chance, but the same each time."""
    folder = tmp_path_factory.mktemp("classifier")
    texts = [text for text, _ in GRAMMARS.sentiment()[0]]
    made = llama_ext.TextClassifier(SMALL.small_model(texts, width=16), labels=["bad", "good"], seed=3)
    made.save(folder)
    return folder


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translator")
    pairs = GRAMMARS.number_pairs(range(12))
    texts = [*(text for pair in pairs for text in pair), "Translate this from English to Chinese:\n"]
    Translator(SMALL.small_model(texts, width=16), "English", "Chinese").save(folder)
    return folder


TASKS = pytest.mark.parametrize("task", ["classify", "translate"])


def line_of(task: str, request: pytest.FixtureRequest, *more: object) -> list[object]:
    """The command of a task that is trained, with texts and options."""
    if task == "classify":
        return ["classify", "predict", request.getfixturevalue("classifier"), *more]
    return ["translate", "run", request.getfixturevalue("translator"), *more, "--num-beams", 1]


@TASKS
@pytest.mark.parametrize("json_too", [False, True])
@pytest.mark.parametrize("end", ["\n", ""])
def test_the_nth_line_out_is_about_the_nth_line_in(
    task: str, json_too: bool, end: str, run: Run, request: pytest.FixtureRequest
) -> None:
    texts = ["ten", "", "five", "  ", "nine"]
    options = ["--json"] if json_too else []
    found = run(*line_of(task, request, *options), stdin="\n".join(texts) + end)
    assert (found.code, found.err) == (0, "")
    lines = found.out.removesuffix("\n").split("\n")
    assert len(lines) == 5
    alone = [run(*line_of(task, request, text, *options)).out for text in texts]
    assert [f"{line}\n" for line in lines] == alone, "and is what it gives alone"
    if json_too:
        records = [json.loads(line) for line in lines]
        assert [record["text"] for record in records] == texts
        empty = {"label": None, "probabilities": None} if task == "classify" else {"translation": ""}
        assert [records[index] for index in (1, 3)] == [{"text": texts[index], **empty} for index in (1, 3)]
    elif task == "classify":
        labels = [line.split("\t")[0] for line in lines]
        assert [label in ("bad", "good") for label in labels] == [True, False, True, False, True]
        assert [line.split("\t")[1] for line in lines] == texts
    else:
        assert (lines[1], lines[3]) == ("", "")


def test_a_translation_of_several_lines_is_one_line_and_exact_as_json(
    run: Run, translator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = 'one\n two\r\n\nthree \\n "four"'
    monkeypatch.setattr(Translator, "translate", lambda _, texts, **options: [said] * len(texts))
    assert run("translate", "run", translator, "x", "y").out == 'one two three \\n "four"\n' * 2
    found = run("translate", "run", translator, "x", "--json")
    assert found.out.count("\n") == 1
    assert json.loads(found.out)["translation"] == said


def test_a_label_is_one_column_whatever_is_in_it(run: Run, tmp_path: Path) -> None:
    model = SMALL.small_model(["the film"], width=16)
    llama_ext.TextClassifier(model, labels=["a\tb\nc", "d\te"], seed=3).save(tmp_path)
    found = run("classify", "predict", tmp_path, "the\tfilm")
    label, text = found.out.removesuffix("\n").split("\t", 1)
    assert label in ("a b c", "d e")
    assert text == "the\tfilm"
    assert json.loads(run("classify", "predict", tmp_path, "film", "--json").out)["label"] in ("a\tb\nc", "d\te")


def test_a_text_of_several_lines_is_echoed_in_one(run: Run, classifier: Path) -> None:
    found = run("classify", "predict", classifier, "the\nfilm")
    assert found.out.removesuffix("\n").split("\t")[1] == "the film"
    assert json.loads(run("classify", "predict", classifier, "\nfilm", "--json").out)["text"] == "\nfilm"


@TASKS
def test_an_answer_does_not_wait_for_the_next_line(task: str, request: pytest.FixtureRequest) -> None:
    process = subprocess.Popen(
        command(*line_of(task, request, "--json")), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            # The last one has no end: it is a line once there is no more to come.
            for text in ("ten\n", "five\nnine\n", "six"):
                os.write(process.stdin.fileno(), text.encode())
                if not text.endswith("\n"):
                    process.stdin.close()
                answers = b""
                while answers.count(b"\n") < len(text.splitlines()):
                    assert select.select([process.stdout], [], [], 30)[0], f"no answer to {text!r}, but {answers!r}"
                    answers += os.read(process.stdout.fileno(), 4096)
                assert [json.loads(line)["text"] for line in answers.splitlines()] == text.splitlines()
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


@TASKS
def test_a_line_that_is_too_long_is_named_once_those_before_it_are_answered(
    task: str, run: Run, request: pytest.FixtureRequest
) -> None:
    found = run(*line_of(task, request), stdin=f"ten\n\nfive\n{LONG}\nnine\n")
    assert found.code == 4
    assert found.out.count("\n") == 3
    assert found.err.startswith("llama-ext: line 4 of standard input: this text ")
    assert found.err.count("\n") == 1
    found = run(*line_of(task, request, "ten", LONG, "--json"))
    assert found.code == 4
    assert found.out.count("\n") == 1
    assert found.err.startswith("llama-ext: text 2: this text ")


def test_a_line_that_the_tokenizer_cannot_read_is_named(run: Run, tmp_path: Path) -> None:
    tokenizer = llama_ext.Tokenizer.train("good bad", kind="char", bos_token="<s>")
    config = llama_ext.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    llama_ext.TextClassifier(llama_ext.LlamaForCausalLM(config, tokenizer), labels=["bad", "good"]).save(tmp_path)
    found = run("classify", "predict", tmp_path, stdin="good\n\n漢\nbad\n")
    assert found.code == 2
    assert found.out.count("\n") == 2
    assert found.err.startswith("llama-ext: line 3 of standard input: ")


@TASKS
def test_what_is_no_text_is_told_once_the_lines_before_it_are_answered(
    task: str, run: Run, request: pytest.FixtureRequest
) -> None:
    found = run(*line_of(task, request), stdin=b"ten\nfive\nb\xff\nnine\n")
    assert found.code == 3
    assert found.out.count("\n") == 2
    assert found.err.startswith("llama-ext: standard input @0xa: this is not UTF-8 text")


@TASKS
def test_nothing_is_no_text(task: str, run: Run, request: pytest.FixtureRequest) -> None:
    found = run(*line_of(task, request))
    assert (found.code, found.out) == (2, "")
    assert "there is no text: name texts, or give them on standard input, one a line" in found.err


def test_an_option_that_is_out_of_range_is_no_fault_of_a_line(run: Run, translator: Path) -> None:
    found = run("translate", "run", translator, "--num-beams", 0, stdin="ten\n")
    assert (found.code, found.out) == (2, "")
    assert found.err == "llama-ext: --num-beams must be at least 1, got 0\n"


# Progress.


class Screen(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("given", ["arguments", "a pipe"])
def test_progress_is_shown_while_answers_go_elsewhere_and_none_is_lost(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100")):
        monkeypatch.setenv(name, value)
    for module in (common, progress):
        monkeypatch.setattr(module, "_DELAY", 0.0)
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    texts = [f"text {index}" for index in range(8)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode()), encoding="utf-8"))

    def ask(asked: list[str]) -> list[str]:
        # What is drawn is drawn by another thread.
        deadline = time.monotonic() + 30
        while asked and given == "a pipe" and "Working" not in screen.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        return asked

    args = argparse.Namespace(texts=texts if given == "arguments" else [])
    answer_texts(args, "Working", ask, lambda text, answer: f"{text}: {answer}", at_once=2)
    assert "Working" in screen.getvalue()
    assert "text 0" not in screen.getvalue(), "rich has what is printed drawn where it draws"
    assert capsys.readouterr().out == "".join(f"{text}: {text}\n" for text in texts)
    if given == "arguments":
        assert "8/8" in screen.getvalue()


def test_options_may_stand_among_the_texts(run: Run, classifier: Path, translator: Path) -> None:
    for line in (("classify", "predict", classifier), ("translate", "run", translator)):
        plain = run(*line, "--json", "one", "two").out
        assert len(plain.splitlines()) == 2
        assert run(*line, "one", "--json", "two").out == plain
        assert run(*line, "one", "two", "--json").out == plain
        found = run(*line, "one", "--jsno", "two")
        assert found.code == 2
        assert "unrecognized arguments: --jsno" in found.err


def test_a_pipe_gets_no_progress(run: Run, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    (tmp_path / "test.csv").write_text("text,label\nthe film,good\na book,bad\n")
    assert run("classify", "evaluate", classifier, tmp_path / "test.csv").err == ""
    assert run("classify", "predict", classifier, "the film").err == ""


@pytest.mark.parametrize("action", ["evaluate", "predict"])
def test_what_takes_long_shows_that_it_is_alive_and_can_be_interrupted(
    action: str, slow_model: Path, tmp_path: Path
) -> None:
    llama_ext.TextClassifier(slow_model, labels=["bad", "good"]).save(tmp_path / "slow")
    text = "to be or not to be " * 40
    (tmp_path / "test.csv").write_text(f"{text},bad\n" * 2000)
    # What is answered as it comes has a sign of life only where a few texts take more than a second.
    given: list[Any] = [tmp_path / "test.csv"] if action == "evaluate" else [text * 10] * 100
    with Terminal("classify", action, tmp_path / "slow", *given, kind="xterm") as terminal:
        terminal.read_until("Classifying")
        terminal.type("\x03")
        assert terminal.read_to_end()[1] == 130


# Devices.


@pytest.mark.parametrize(
    "line",
    [
        ("train", "pairs.csv", "--out", "new"),
        ("classify", "train", "pairs.csv", "--out", "new"),
        ("classify", "predict", "CLASSIFIER", "ten"),
        ("classify", "evaluate", "CLASSIFIER", "pairs.csv"),
        ("translate", "train", "pairs.csv", "--out", "new", "--model", "demo", "--source", "a", "--target", "b"),
        ("translate", "run", "TRANSLATOR", "ten"),
        ("translate", "evaluate", "TRANSLATOR", "pairs.csv"),
    ],
    ids=lambda line: " ".join(line[:2]),
)
def test_the_device_and_the_threads_arrive(
    line: tuple[str, ...],
    run: Run,
    classifier: Path,
    translator: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("ten,bad\nfive,good\nnine,bad\n")
    arguments = [{"CLASSIFIER": classifier, "TRANSLATOR": translator}.get(word, word) for word in line]
    found = run(*arguments, "--device", "cuda:99999999999")
    assert (found.code, found.out) == (1, "")
    assert "device 'cuda:99999999999': a GPU is named cuda:0" in found.err
    found = run(*arguments, "--threads", 0)
    assert (found.code, found.out) == (2, "")
    assert "--threads must be a whole number in [1, 256], got 0" in found.err
    assert not (tmp_path / "new").exists()
    words = " ".join(run(*line[: 1 if line[0] == "train" else 2], "--help").out.split())
    assert "where to compute: cpu; cuda or cuda:1 and so on, an NVIDIA GPU; reference, slowly in float64" in words


def test_the_reference_learns_and_answers(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "train.csv"
    data.write_text("text,label\n" + "the film was good,good\nthe film was bad,bad\n" * 4)
    model = SMALL.small_model(["the film was good", "bad"], width=16)
    model.save_pretrained(tmp_path / "base")
    options = ("--model", tmp_path / "base", "--epochs", 20, "--lr", "0.02", "--batch-size", 8)
    found = run("classify", "train", data, "--out", tmp_path / "out", *options, "--device", "reference")
    assert found.code == 0, found.err
    for device in ("reference", "cpu"):
        found = run(
            "classify", "predict", tmp_path / "out", "the film was bad", "--device", device, "--compute", "exact"
        )
        assert (found.code, found.out) == (0, "bad\tthe film was bad\n")


# Folders.


def test_the_folder_of_another_kind_is_told_in_words_of_the_command(
    run: Run, classifier: Path, translator: Path, tmp_path: Path
) -> None:
    llama_ext.LlamaForCausalLM.from_pretrained("demo").save_pretrained(tmp_path)
    for arguments, message in (
        (("classify", "predict", translator), f"{translator} is a translator, no classifier: `llama-ext translate`"),
        (("translate", "run", classifier), f"{classifier} is a classifier, no translator: `llama-ext classify`"),
        (
            ("classify", "predict", tmp_path),
            f"{tmp_path} is a language model, no classifier: `llama-ext classify train --model` makes one of it",
        ),
    ):
        found = run(*arguments, "text")
        assert (found.code, found.out) == (2, "")
        assert found.err.startswith(f"llama-ext: {message}")
