"""Tokens as a reader sees them: pieces, whole characters, words."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llama_ext.runtime.text_stream import token_bytes
from llama_ext.runtime.tokenizer import Tokenizer

__all__ = ["Word", "characters", "pieces", "words"]

# UTF-8 has at most so many bytes of a character, and a token at least one.
_LONGEST = 4


class Word(NamedTuple):
    """Neighbouring tokens that a reader sees as one.

    Attributes:
        text: Their text.
        score: The sum of their scores.
        first, last: Their indices, [first, last).
    """

    text: str
    score: float
    first: int
    last: int


def pieces(tokenizer: Tokenizer | None, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself; bytes that are no whole character are written as \\xE4.

    Without a tokenizer, the ids.
    """
    if tokenizer is None:
        return [str(token) for token in ids]
    return [_text(token_bytes(tokenizer, token)) for token in ids]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def characters(tokenizer: Tokenizer | None, ids: Sequence[int]) -> list[tuple[str, int, int]]:
    """The fewest neighbouring tokens that are whole characters together: their text, and their indices [first, last)."""
    if tokenizer is None:
        return [(str(token), index, index + 1) for index, token in enumerate(ids)]
    data = [token_bytes(tokenizer, token) for token in ids]
    found = []
    first = 0
    while first < len(data):
        last = first + 1
        while _is_cut_off(b"".join(data[first:last])) and last < len(data) and last - first < _LONGEST:
            last += 1
        # Tokens that never become a character stay by themselves.
        if last > first + 1 and not _is_text(b"".join(data[first:last])):
            last = first + 1
        found.append((_text(b"".join(data[first:last])), first, last))
        first = last
    return found


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_cut_off(data: bytes) -> bool:
    """Whether more bytes could make text of it."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def words(tokenizer: Tokenizer | None, ids: Sequence[int], scores: npt.NDArray[np.float64]) -> list[Word]:
    """Tokens joined to words: a new one begins at white space, at punctuation, and at each Chinese character or kana."""
    special = frozenset() if tokenizer is None else tokenizer.special_ids
    found: list[Word] = []
    for text, first, last in characters(tokenizer, ids):
        before = found[-1] if found else None
        alone = tokenizer is None or any(ids[index] in special for index in (first, first - 1) if index >= 0)
        score = float(scores[first:last].sum())
        if before is None or alone or _is_border(before.text, text):
            found.append(Word(text, score, first, last))
        else:
            found[-1] = Word(before.text + text, before.score + score, before.first, last)
    return found


def _is_border(before: str, after: str) -> bool:
    if not before or not after:
        return False
    return not (_joins(before[-1]) and _joins(after[0]))


def _joins(character: str) -> bool:
    """Whether it is part of a word together with its neighbours."""
    if unicodedata.category(character)[0] not in "LMN" and character not in "'’_":
        return False
    return not unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA"))
