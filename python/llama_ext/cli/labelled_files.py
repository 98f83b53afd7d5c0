"""Files of examples: two texts a line, as CSV, TSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_ext.cli.common import report
from llama_ext.cli.text_input import read_text
from llama_ext.errors import FormatError

__all__ = ["FORMATS", "read_pairs"]

FORMATS = """\
A file is CSV (.csv), tab-separated (.tsv, .txt) or JSON lines (.jsonl). The first
line of the first two may name the columns, which then come in any order; else the
first two columns count. Names of texts: text, review, sentence, comment, tweet,
message, document, content, title; of their labels: label, sentiment, class,
category, target, y. Names of texts to translate: source, src, and of translations:
target, tgt, translation; or two languages, as codes or in English, in this order:
en and zh, or English and Chinese. JSON lines have "text" and "label", or "source"
and "target"."""

# What first lines call a column, the likeliest name first.
_NAMES = {
    "text": ("text", "texts", "review", "sentence", "comment", "tweet", "message", "document", "content", "title"),
    "label": ("label", "labels", "sentiment", "class", "category", "target", "y"),
    "source": ("source", "src", "source_text"),
    "target": ("target", "tgt", "target_text", "translation"),
}
# Without "id", which names a column of numbers more often than Indonesian.
_LANGUAGE_WORDS = """
    ar bg bn ca cs da de el en es et fa fi fr he hi hr hu it ja ko lt lv ms nl no pl pt ro ru sk sl sr sv sw ta th tr uk ur vi zh
    arabic bengali bulgarian catalan chinese croatian czech danish dutch english estonian finnish french german greek hebrew hindi
    hungarian indonesian italian japanese korean latvian lithuanian malay norwegian persian polish portuguese romanian russian
    serbian slovak slovenian spanish swahili swedish tamil thai turkish ukrainian urdu vietnamese
"""
_LANGUAGES = frozenset(_LANGUAGE_WORDS.split())

# Of one value; the csv module's own default is smaller.
_MOST_CHARACTERS = 1 << 20

# Fewer lines are too few to say that a label occurs nowhere else.
_FEWEST_TO_JUDGE = 3


def read_pairs(path: str, first: str, second: str) -> list[tuple[str, str]]:
    """The values of two columns.

    Args:
        path: The file; "-" is standard input, as JSON lines.
        first: The name of a column: "text".
        second: The name of the other: "label".

    Returns:
        The pairs, in order.

    Raises:
        FormatError: It cannot be read, a line has too few values or more than there are columns, what may not be empty is, there
            is no line, or the first line of a table looks like names of columns that are not known.
    """
    suffix = ".jsonl" if path == "-" else Path(path).suffix.lower()
    if suffix not in (".csv", ".tsv", ".txt", ".jsonl"):
        raise FormatError(f"expected a .csv, .tsv, .txt or .jsonl file, got {suffix or 'no suffix'}.", path=path)
    text = read_text(path)
    rows = _json_lines(text, path, first, second) if suffix == ".jsonl" else _table(text, path, suffix, first, second)
    if not rows:
        raise FormatError("there is no example in it.", path=path)
    return rows


def _json_lines(text: str, path: str, first: str, second: str) -> list[tuple[str, str]]:
    rows = []
    # Not splitlines: JSON allows other separators inside of its texts, like U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"line {number} is not JSON: {str(error)[:100]}.", path=path) from error
        found = [value.get(name) for name in (first, second)] if isinstance(value, dict) else [None, None]
        if not all(isinstance(each, (str, int)) and not isinstance(each, bool) for each in found):
            raise FormatError(f'line {number} must be {{"{first}": ..., "{second}": ...}} with texts.', path=path)
        rows.append(_pair(str(found[0]), str(found[1]), number, path, first, second))
    return rows


def _table(text: str, path: str, suffix: str, first: str, second: str) -> list[tuple[str, str]]:
    csv.field_size_limit(_MOST_CHARACTERS)
    options: dict[str, Any] = {} if suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(io.StringIO(text, newline=""), strict=suffix == ".csv", **options)
    try:
        lines = [(reader.line_num, row) for row in reader if row and row != [""]]
    except csv.Error as error:
        raise FormatError(f"line {reader.line_num}: {error}.", path=path) from error
    if not lines:
        return []
    heading = lines[0][1]
    named = _named_columns(heading, first, second)
    if named is not None and not _is_heading(lines, named, first, second):
        named = None
    for column in named or ():
        if [_plain(name) for name in heading].count(_plain(heading[column])) > 1:
            raise FormatError(
                f"line {lines[0][0]} calls two columns {heading[column]!r}: which one is meant?", path=path
            )
    columns = named or (0, 1)
    rows = []
    for number, row in lines[named is not None :]:
        if len(row) <= max(columns):
            raise FormatError(f"line {number} has {len(row)} value(s), two are needed.", path=path)
        if len(row) > len(heading) or (named is None and len(row) < len(heading)):
            reference = f"line {lines[0][0]} {'has' if named is None else 'names'} {len(heading)}"
            if suffix == ".csv":
                advice = 'Put texts that have commas into quotation marks: "yes, really",good'
            else:
                advice = (
                    "No text may have a tab: CSV (.csv) with quotation marks and JSON lines (.jsonl) have room for them"
                )
            # Another column than the one that is meant might be read.
            raise FormatError(f"line {number} has {len(row)} values, and {reference}. {advice}.", path=path)
        rows.append(_pair(row[columns[0]], row[columns[1]], number, path, first, second))
    if named is None and second == "label":
        _refuse_unknown_heading(rows, path)
    elif named is not None and rows and [_plain(heading[column]) for column in named] != [first, second]:
        # Told because it is a guess, if a good one: with a label or a translation of this name, a line would be lost unseen.
        report(
            f"{path}: {first}s are in column {heading[named[0]].strip()!r}, {second}s in {heading[named[1]].strip()!r}"
        )
    return rows


def _pair(one: str, other: str, number: int, path: str, first: str, second: str) -> tuple[str, str]:
    """An example, whose label is without white space around it.

    Raises:
        FormatError: There is nothing in what has to be learned, or translated.
    """
    for name, value in ((first, one), (second, other)):
        if name != "text" and not value.strip():
            raise FormatError(f"line {number}: its {name} is empty.", path=path)
    return one, other.strip() if second == "label" else other


def _plain(name: str) -> str:
    return name.strip().lower()


def _named_columns(row: Sequence[str], first: str, second: str) -> tuple[int, int] | None:
    """Where the two columns are, if this row names them."""
    names = [_plain(name) for name in row]
    found = [next((names.index(name) for name in _NAMES[column] if name in names), None) for column in (first, second)]
    if found[0] is not None and found[1] is not None:
        return found[0], found[1]
    if second == "label":
        return None
    # "zh-CN" and "pt_BR" are languages as well.
    bases = [name.replace("_", "-").partition("-")[0] for name in names]
    languages = [place for place, base in enumerate(bases) if base in _LANGUAGES]
    if len(languages) < 2 or names[languages[0]] == names[languages[1]]:
        return None
    return languages[0], languages[1]


def _is_heading(lines: Sequence[tuple[int, Sequence[str]]], columns: tuple[int, int], first: str, second: str) -> bool:
    """Whether the first line, which reads like names of columns, is no example: a label may be called "y", or "class"."""
    names = [lines[0][1][column] for column in columns]
    if second != "label" or [_plain(name) for name in names] == [first, second]:
        return True
    return all(len(row) <= columns[1] or row[columns[1]].strip() != names[1].strip() for _, row in lines[1:])


def _refuse_unknown_heading(rows: Sequence[tuple[str, str]], path: str) -> None:
    """Raises FormatError where the first row's label is nobody else's, and no number: it may be the name of a column."""
    if len(rows) < _FEWEST_TO_JUDGE:
        return
    text, label = rows[0]
    if any(other == label for _, other in rows[1:]) or label.strip().lstrip("+-").replace(".", "", 1).isdigit():
        return
    raise FormatError(
        f"the first line, {text[:40]!r} and {label[:40]!r}, looks like names of columns, since {label[:40]!r} is no other line's "
        "label. Rename them to text and label, or remove the line; if it is an example, put the line text,label before it.",
        path=path,
        got=label[:40],
    )
