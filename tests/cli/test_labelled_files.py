"""First lines of tables: names of columns are no example, and no example is taken for names."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import Run
from llama_ext.cli.labelled_files import read_pairs
from llama_ext.errors import FormatError

REVIEWS = [("good", "pos"), ("bad", "neg"), ("dull", "neg"), ("superb", "pos")]


def written(folder: Path, lines: list[str], name: str = "data.csv") -> str:
    file = folder / name
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    "heading",
    [
        "review,sentiment",
        "Sentence , Class",
        "comment,category",
        "tweet,target",
        "content,y",
        "title,label",
        "TEXTS,LABELS",
    ],
)
@pytest.mark.parametrize("count", [2, 4])
def test_common_names_of_columns_are_no_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], heading: str, count: int
) -> None:
    lines = [heading, *(f"{text},{label}" for text, label in REVIEWS[:count])]
    assert read_pairs(written(tmp_path, lines), "text", "label") == REVIEWS[:count]
    said = capsys.readouterr().err
    for name in heading.split(","):
        assert repr(name.strip()) in said
    tabs = [line.replace(",", "\t") for line in lines]
    assert read_pairs(written(tmp_path, tabs, "data.tsv"), "text", "label") == REVIEWS[:count]


def test_named_columns_come_in_any_order_and_the_likelier_name_wins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["class,title,review,n", *(f"{label},a title,{text},1" for text, label in REVIEWS)]
    assert read_pairs(written(tmp_path, lines), "text", "label") == REVIEWS
    assert "'review'" in capsys.readouterr().err
    lines[0] = "label,title,text,n"
    assert read_pairs(written(tmp_path, lines), "text", "label") == REVIEWS
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("heading", ["text,label,text", "label,text,Label"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, heading: str) -> None:
    lines = [heading, *(f"{text},{label},{text}" for text, label in REVIEWS)]
    with pytest.raises(FormatError, match=r"line 1 calls two columns '(text|label)': which one is meant"):
        read_pairs(written(tmp_path, lines), "text", "label")
    # Another one may come twice.
    lines = ["n,text,n,label", *(f"1,{text},2,{label}" for text, label in REVIEWS)]
    assert read_pairs(written(tmp_path, lines), "text", "label") == REVIEWS


@pytest.mark.parametrize("heading", ["phrase,mood", "review,stars", "utterance,label", "1,label"])
def test_a_label_of_the_first_line_alone_is_refused(tmp_path: Path, heading: str) -> None:
    lines = [heading, *(f"{text},{label}" for text, label in REVIEWS)]
    with pytest.raises(
        FormatError, match=r"looks like names of columns.*Rename them to text and label, or remove"
    ) as caught:
        read_pairs(written(tmp_path, lines), "text", "label")
    assert caught.value.got == heading.split(",")[1]
    # The way out that the message names.
    found = read_pairs(written(tmp_path, ["text,label", *lines]), "text", "label")
    assert found == [tuple(heading.split(",")), *REVIEWS]


@pytest.mark.parametrize(
    "rows",
    [
        REVIEWS,
        [("good", "pos")],
        [("good", "pos"), ("bad", "neg")],
        [("good", "1"), ("bad", "0"), ("dull", "0")],
        [("so-so", "-0.5"), ("bad", "0"), ("dull", "0")],
        # Words that are names of columns elsewhere.
        [("title", "y"), ("bad", "n"), ("dull", "y")],
        [("review", "class"), ("bad", "object"), ("dull", "class")],
    ],
)
def test_an_example_is_not_taken_for_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[tuple[str, str]]
) -> None:
    assert read_pairs(written(tmp_path, [",".join(row) for row in rows]), "text", "label") == rows
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "heading", ["source,target", "src,tgt", "Source,Translation", "en,zh", "EN,pt_BR", "zh-CN,en", "English,Chinese"]
)
def test_names_of_columns_are_no_translation(tmp_path: Path, heading: str) -> None:
    pairs = [("one", "un"), ("two", "deux"), ("three", "trois")]
    lines = [heading, *(",".join(pair) for pair in pairs)]
    assert read_pairs(written(tmp_path, lines), "source", "target") == pairs
    more = [f"id,{heading}", *(f"7,{line}" for line in lines[1:])]
    assert read_pairs(written(tmp_path, more), "source", "target") == pairs


@pytest.mark.parametrize(
    "first", [("no", "no"), ("class", "classe"), ("source", "source"), ("is", "est"), ("German", "allemand")]
)
def test_a_translation_is_not_taken_for_names(tmp_path: Path, first: tuple[str, str]) -> None:
    pairs = [first, ("one", "un"), ("two", "deux"), ("three", "trois")]
    assert read_pairs(written(tmp_path, [",".join(pair) for pair in pairs]), "source", "target") == pairs


@pytest.mark.parametrize(("pair", "name"), [(" ,deux", "source"), ("two,", "target")])
def test_there_is_nothing_to_translate_in_an_empty_text(tmp_path: Path, pair: str, name: str) -> None:
    for lines in (["one,un", pair], ["source,target", pair]):
        with pytest.raises(FormatError, match=f"line 2: its {name} is empty"):
            read_pairs(written(tmp_path, lines), "source", "target")


def test_space_around_a_label_is_no_part_of_it_and_that_around_a_translation_is(tmp_path: Path) -> None:
    lines = ["good , pos", "bad,neg ", "superb,pos"]
    assert read_pairs(written(tmp_path, lines), "text", "label") == [
        ("good ", "pos"),
        ("bad", "neg"),
        ("superb", "pos"),
    ]
    assert read_pairs(written(tmp_path, lines), "source", "target")[0] == ("good ", " pos")


def test_a_text_of_json_lines_may_have_any_separator_in_it(tmp_path: Path) -> None:
    texts = ["one\u2028two", "one\u2029two", "one\x85two"]
    lines = [f'{{"text": "{text}", "label": "{place}"}}' for place, text in enumerate(texts)]
    found = read_pairs(written(tmp_path, lines, "data.jsonl"), "text", "label")
    assert [text for text, _ in found] == texts


def test_names_alone_are_no_example(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no example"):
        read_pairs(written(tmp_path, ["review,sentiment"]), "text", "label")


def test_the_commands_say_what_is_recognised_and_refuse_what_is_not(run: Run, tmp_path: Path) -> None:
    for command in ("classify", "translate"):
        for action in ("train", "evaluate"):
            shown = run(command, action, "--help").out
            assert "review" in shown
            assert "tgt" in shown
    data = written(tmp_path, ["phrase,mood", *(f"{text},{label}" for text, label in REVIEWS)])
    found = run("classify", "train", data, "--out", tmp_path / "out")
    assert found.code == 3
    assert "looks like names of columns" in found.err
    assert found.err.count("\n") == 1
