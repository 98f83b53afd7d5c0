"""`llama-ext classify` and `llama-ext translate`: from a file of examples to scores."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from command_line import Run
from grammars import example
from llama_ext.cli.labelled_files import read_pairs
from llama_ext.errors import FormatError
from llama_ext.tasks.text_classifier import TextClassifier
from llama_ext.tasks.translator import Translator
from llama_ext.training.callbacks import Callback, RunView
from llama_ext.training.history import StepRecord

GRAMMARS, SMALL = example("template_grammars"), example("small_model")


def write_csv(path: Path, rows: list[tuple[str, str]], heading: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heading, *rows])
    return path


def test_a_classifier_is_trained_used_and_scored(run: Run, tmp_path: Path) -> None:
    train, test = GRAMMARS.sentiment()
    SMALL.small_model((text for text, _ in train + test), width=48).save_pretrained(tmp_path / "base")
    data, held_out = write_csv(tmp_path / "train.csv", train), write_csv(tmp_path / "test.csv", test)
    found = run(
        "classify", "train", data, "--out", tmp_path / "out", "--model", tmp_path / "base", "--epochs", 8, "--lr", "0.003",
        "--validation", held_out,
    )  # fmt: skip
    assert found.code == 0, found.err
    assert "loss" in found.err
    assert f"{len(train)} texts: negative {sum(label == 'negative' for _, label in train)}, positive " in found.err
    found = run("classify", "evaluate", tmp_path / "out", held_out, "--json")
    assert json.loads(found.out)["accuracy"] >= 0.95
    found = run("classify", "predict", tmp_path / "out", "the film was superb", "what a dull book")
    assert found.out == "positive\tthe film was superb\nnegative\twhat a dull book\n"
    found = run("classify", "predict", tmp_path / "out", "the film was superb", "--json")
    assert json.loads(found.out)["probabilities"]["positive"] > 0.5


def test_a_translator_is_trained_used_and_scored(run: Run, tmp_path: Path) -> None:
    pairs = GRAMMARS.number_pairs(range(12))
    texts = [*(text for pair in pairs for text in pair), "Translate this from English to Chinese:\n"]
    SMALL.small_model(texts, width=48).save_pretrained(tmp_path / "base")
    data = tmp_path / "pairs.tsv"
    data.write_text("".join(f"{english}\t{chinese}\n" for english, chinese in pairs), encoding="utf-8")
    languages = ("--source", "English", "--target", "Chinese")
    found = run(
        "translate", "train", data, *languages, "--out", tmp_path / "out", "--model", tmp_path / "base", "--lora", 4,
        "--epochs", 2,
    )  # fmt: skip
    assert found.code == 0, found.err
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert run("translate", "run", tmp_path / "out", "ten", "--num-beams", 1).code == 0
    found = run("translate", "evaluate", tmp_path / "out", data, "--num-beams", 1, "--json")
    assert json.loads(found.out)["count"] == 12


@pytest.mark.parametrize("command", ["classify", "translate"])
def test_help_shows_examples(run: Run, command: str) -> None:
    for action in ((), ("train",)):
        found = run(command, *action, "--help")
        assert found.code == 0
        assert "examples:" in found.out
        assert f"llama-ext {command}" in found.out


def test_a_classifier_replaces_an_adapter_only_when_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    train, _ = GRAMMARS.sentiment()
    SMALL.small_model((text for text, _ in train), width=16).save_pretrained(tmp_path / "base")
    data, out = write_csv(tmp_path / "train.csv", train[::9]), tmp_path / "out"
    options = ("classify", "train", data, "--out", out, "--model", tmp_path / "base", "--epochs", 1)
    assert run(*options, "--labels", "negative,positive", "--lora", 2).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(*options, "--labels", "positive,negative").code == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    found = run(*options, "--labels", "positive,negative", "--overwrite")
    assert found.code == 0, found.err
    # What is loaded is the new one: the adapter's labels had another order.
    found = run("classify", "predict", out, "the film was superb", "--json")
    assert list(json.loads(found.out)["probabilities"]) == ["positive", "negative"]


def test_a_classifier_takes_the_place_of_a_translator(run: Run, tmp_path: Path) -> None:
    pairs = GRAMMARS.number_pairs(range(6))
    texts = [*(text for pair in pairs for text in pair), "Translate this from English to Chinese:\n"]
    SMALL.small_model(texts, width=16).save_pretrained(tmp_path / "base")
    options = ("--model", tmp_path / "base", "--out", tmp_path / "out", "--epochs", 1)
    languages = ("--source", "English", "--target", "Chinese")
    data = write_csv(tmp_path / "pairs.csv", pairs, ("source", "target"))
    assert run("translate", "train", data, *languages, *options).code == 0
    data = write_csv(
        tmp_path / "labels.csv", [(text, "odd" if index % 2 else "even") for index, (text, _) in enumerate(pairs)]
    )
    assert run("classify", "train", data, *options, "--overwrite").code == 0
    found = run("classify", "predict", tmp_path / "out", "one")
    assert found.code == 0, found.err


class CtrlC(Callback):
    """Presses Ctrl-C after the second step."""

    def on_step_end(self, run: RunView, record: StepRecord) -> None:
        if record.step == 2:
            signal.raise_signal(signal.SIGINT)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("command", ["classify", "translate"])
def test_ctrl_c_leaves_what_was_trained_before_and_says_so(
    command: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "classify":
        pairs, languages = GRAMMARS.sentiment()[0][::9], ()
        texts = [text for text, _ in pairs]
    else:
        pairs, languages = GRAMMARS.number_pairs(range(12)), ("--source", "English", "--target", "Chinese")
        texts = [*(text for pair in pairs for text in pair), "Translate this from English to Chinese:\n"]
    SMALL.small_model(texts, width=16).save_pretrained(tmp_path / "base")
    heading = ("text", "label") if command == "classify" else ("source", "target")
    data, out = write_csv(tmp_path / "train.csv", pairs, heading), tmp_path / "out"
    options = (command, "train", data, *languages, "--model", tmp_path / "base", "--batch-size", 2, "--epochs", 1)
    found = run(*options, "--out", out)
    assert found.code == 0, found.err
    before = bytes_of(out)
    for task in (TextClassifier, Translator):

        def interrupted(self: Any, *given: Any, fit: Any = task.fit, **settings: Any) -> Any:
            return fit(self, *given, **settings, callbacks=[CtrlC()])

        monkeypatch.setattr(task, "fit", interrupted)
    for where, more in ((out, ("--overwrite",)), (tmp_path / "new", ("--validation", data))):
        found = run(*options, "--out", where, *more)
        assert (found.code, found.out) == (130, "")
        assert "llama-ext: interrupted after 2 steps: nothing was written\n" in found.err
        assert "saved" not in found.err
    assert bytes_of(out) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "line", [("classify", "train", "x.csv"), ("translate", "train", "x.csv"), ("translate", "run")]
)
def test_a_mistake_names_a_help_that_there_is(run: Run, line: tuple[str, ...]) -> None:
    found = run(*line)
    assert found.code == 2
    command = " ".join(("llama-ext", *line[:2], "--help"))
    assert f"See `{command}`.\n" in found.err
    assert run(*line[:2], "--help").code == 0


def test_texts_from_standard_input_end_at_newlines_alone(run: Run, tmp_path: Path) -> None:
    train, _ = GRAMMARS.sentiment()
    characters = "\u2028\x85\x0c\x1c"
    SMALL.small_model([*(text for text, _ in train), characters], width=16).save_pretrained(tmp_path / "base")
    data, out = write_csv(tmp_path / "train.csv", train[::9]), tmp_path / "out"
    assert run("classify", "train", data, "--out", out, "--model", tmp_path / "base", "--epochs", 1).code == 0
    found = run(
        "classify", "predict", out, "--json", stdin=f"\ufeffthe film\r\n\r\na{characters}book\nthe end".encode()
    )
    assert found.code == 0, found.err
    texts = [json.loads(line)["text"] for line in found.out.removesuffix("\n").split("\n")]
    assert texts == ["the film", "", f"a{characters}book", "the end"]


def test_mistakes_are_told_in_one_line(run: Run, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "one.csv", [("a", "x"), ("b", "x")])
    two = write_csv(tmp_path / "two.csv", [("a", "x"), ("b", "y")])
    out, languages = tmp_path / "out", ("--source", "English", "--target", "Chinese")
    for arguments, code, words in (
        (("classify", "train", data, "--out", out), 2, "one label"),
        (("classify", "train", data, "--out", out, "--labels", "x"), 2, "one.csv has the one label 'x'"),
        (("classify", "train", two, "--out", out, "--labels", "y"), 2, "--labels names 'y' alone, and "),
        (("classify", "train", two, "--out", out, "--labels", "y"), 2, "two.csv has 'x', 'y': name all"),
        (("classify", "train", two, "--out", out, "--labels", "x,y,x"), 2, "--labels names 'x' twice"),
        (("classify", "train", data, "--out", out, "--lora-alpha", 3), 2, "belong to --lora"),
        (("classify", "train", two, "--out", out, "--merge"), 2, "--merge belong to --lora"),
        (("classify", "train", tmp_path / "no.csv", "--out", out), 3, "cannot be read"),
        (
            ("classify", "train", two, "--out", tmp_path),
            2,
            "exists and is not empty: name another directory, or say --ov",
        ),
        (
            ("translate", "train", two, *languages, "--model", "demo", "--out", tmp_path),
            2,
            "is not empty: name another",
        ),
        (
            ("translate", "train", two, *languages, "--model", "demo", "--out", data),
            2,
            f"{data}: no files can be written into this directory: {data} is a file",
        ),
        (("classify", "predict", tmp_path / "none", "text"), 3, "no such directory"),
        (("translate", "run", tmp_path, "text"), 3, "translator.json"),
    ):
        found = run(*arguments)
        assert found.code == code, found
        assert words in found.err
        assert found.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'text,label\n"one, two",x\nthree,y\n'),
        ("b.csv", 'id,label,text\n1,x,"one, two"\n2,y,three\n'),
        ("c.csv", '"one, two",x\nthree,y\n'),
        ("d.tsv", "one, two\tx\nthree\ty\n"),
        ("e.tsv", "label\ttext\nx\tone, two\n\ny\tthree\n"),
        ("f.jsonl", '{"text": "one, two", "label": "x"}\n\n{"label": "y", "text": "three"}\n'),
        ("g.csv", '\ufefftext,label\r\n"one, two",x\r\nthree,y\r\n'),
        ("h.csv", 'text,label\n"one, two", x\nthree,y\t\n'),
        ("i.jsonl", '\ufeff{"text": "one, two", "label": " x\\n"}\r\n{"label": "y", "text": "three"}\r\n'),
    ],
)
def test_files_of_each_kind_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8"))
    assert read_pairs(str(tmp_path / name), "text", "label") == [("one, two", "x"), ("three", "y")]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "text,label\n", "no example"),
        ("b.csv", "text,label\nalone\n", "line 2 has 1"),
        ("c.csv", 'a,"b\n', "line"),
        ("d.jsonl", "{\n", "line 1 is not JSON"),
        ("e.jsonl", '{"text": "a"}\n', "line 1 must be"),
        ("f.jsonl", "[1, 2]\n", "line 1 must be"),
        ("g.jsonl", '{"text": "a", "label": true}\n', "line 1 must be"),
        ("h.xml", "", "expected a .csv"),
        (
            "j.csv",
            "text,label\nfine,good\nI liked it, really,good\n",
            "line 3 has 3 values, and line 1 names 2. Put texts",
        ),
        ("k.csv", "I liked it, really,good\nbad,poor\n", "line 2 has 2 values, and line 1 has 3. Put texts"),
        ("l.csv", "bad,poor\nI liked it, really,good\n", "line 2 has 3 values, and line 1 has 2. Put texts"),
        ("m.tsv", "text\tlabel\nI liked it\treally\tgood\n", "line 2 has 3 values, and line 1 names 2. No text may"),
        ("n.txt", "bad\tpoor\nI liked it\treally\tgood\n", "line 2 has 3 values, and line 1 has 2. No text may"),
        ("o.csv", "text,label\na,x\nb, \n", "line 3: its label is empty"),
        ("p.tsv", "a\tx\nb\t\n", "line 2: its label is empty"),
        ("q.jsonl", '{"text": "a", "label": " "}\n', "line 1: its label is empty"),
        ("i.tsv", "", "no example"),
    ],
)
def test_a_malformed_file_names_the_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=words):
        read_pairs(str(tmp_path / name), "text", "label")
