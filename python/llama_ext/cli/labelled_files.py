"""Files of examples: two texts a line, as CSV, TSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from llama_ext.cli.common import read_text
from llama_ext.errors import FormatError

__all__ = ["FORMATS", "read_pairs"]

FORMATS = """\
A file is CSV (.csv), tab-separated (.tsv, .txt) or JSON lines (.jsonl). The first
line of the first two may name the columns; else the first two columns count."""

# Of one value; the csv module's own default is smaller.
_MOST_CHARACTERS = 1 << 20


def read_pairs(path: str, first: str, second: str) -> list[tuple[str, str]]:
    """The values of two columns.

    Args:
        path: The file; "-" is standard input, as JSON lines.
        first: The name of a column: "text".
        second: The name of the other: "label".

    Returns:
        The pairs, in order.

    Raises:
        FormatError: It cannot be read, a line has too few values, or there is no line.
    """
    suffix = ".jsonl" if path == "-" else Path(path).suffix.lower()
    if suffix not in (".csv", ".tsv", ".txt", ".jsonl"):
        raise FormatError(f"expected a .csv, .tsv, .txt or .jsonl file, got {suffix or 'no suffix'}.", path=path)
    text = read_text(path).removeprefix("\ufeff")
    rows = _json_lines(text, path, first, second) if suffix == ".jsonl" else _table(text, path, suffix, first, second)
    if not rows:
        raise FormatError("there is no example in it.", path=path)
    return rows


def _json_lines(text: str, path: str, first: str, second: str) -> list[tuple[str, str]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"line {number} is not JSON: {str(error)[:100]}.", path=path) from error
        found = [value.get(name) for name in (first, second)] if isinstance(value, dict) else [None, None]
        if not all(isinstance(each, (str, int)) and not isinstance(each, bool) for each in found):
            raise FormatError(f'line {number} must be {{"{first}": ..., "{second}": ...}} with texts.', path=path)
        rows.append((str(found[0]), str(found[1])))
    return rows


def _table(text: str, path: str, suffix: str, first: str, second: str) -> list[tuple[str, str]]:
    csv.field_size_limit(_MOST_CHARACTERS)
    options: dict[str, Any] = {} if suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(io.StringIO(text, newline=""), strict=suffix == ".csv", **options)
    rows: list[tuple[str, str]] = []
    columns = (0, 1)
    try:
        for row in reader:
            if not row or row == [""]:
                continue
            names = [name.strip().lower() for name in row]
            if not rows and first in names and second in names:
                columns = (names.index(first), names.index(second))
                first = second = ""  # a heading comes once
                continue
            if len(row) <= max(columns):
                raise FormatError(f"line {reader.line_num} has {len(row)} value(s), two are needed.", path=path)
            rows.append((row[columns[0]], row[columns[1]]))
    except csv.Error as error:
        raise FormatError(f"line {reader.line_num}: {error}.", path=path) from error
    return rows
