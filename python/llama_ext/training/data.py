"""What callers pass to `fit` and `evaluate`, turned into rows of tokens and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_ext._arrays import Array, IntArray, array_by_protocol, check_token_range, token_ids
from llama_ext.errors import ContextLengthError, DTypeError, LimitError, OptionError, ShapeError
from llama_ext.runtime.prompts import encode_text
from llama_ext.runtime.scoring import encode_pair
from llama_ext.runtime.tokenizer import Tokenizer
from llama_ext.training.batches import IGNORED, Example, Examples, Row, Source, Stream, stream_of
from llama_ext.training.token_file import ArrayReader, TokenFile, TokenSlice

__all__ = ["Reading", "block_examples", "document_examples", "is_pair", "packed", "pair_example", "read_data"]


@dataclass(frozen=True)
class Reading:
    """How data is read.

    Attributes:
        tokenizer: For texts.
        bos: The token that begins a text, or None.
        vocabulary: Ids are below this.
        context: Tokens of a row at most.
        pack: Put documents together into rows of the context.
        shuffle: Change the order each epoch.
        x, y: What the data and its labels are called in messages.
    """

    tokenizer: Tokenizer | None
    bos: int | None
    vocabulary: int
    context: int
    pack: bool = False
    shuffle: bool = True
    x: str = "x"
    y: str = "y"


def is_pair(value: object) -> bool:
    """Whether it is a (prompt, answer) pair of texts."""
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(each, str) for each in value)


def read_data(x: object, y: object, reading: Reading) -> Source:
    """The data that the caller passed; `LlamaForCausalLM.fit` says what it may be.

    Raises:
        DTypeError, ShapeError: It is none of that.
        OptionError: There is nothing to learn from, or a text without a tokenizer.
        TokenIdError: An id outside the vocabulary.
        ContextLengthError: A pair, or a row of an array, is longer than the context.
        FormatError, LimitError: A token file does not fit the model.
    """
    if isinstance(x, (TokenFile, TokenSlice)):
        return _file(x, y, reading)
    if isinstance(x, np.ndarray) and x.ndim == 2:
        return Examples(_rows(block_examples(x, y, reading), reading), shuffle=reading.shuffle)
    if isinstance(x, str):
        _no_labels(y, "a text", reading)
        return _stream(encode_text(x, reading.tokenizer, reading.bos, reading.vocabulary, what="the text"), reading)
    if isinstance(x, np.ndarray):
        if x.ndim != 1:
            raise ShapeError(f"{reading.x} must be an array of shape (T,) or (B, T), got {x.shape}")
        _no_labels(y, "a stream of tokens", reading)
        return _stream(token_ids(reading.x, x, reading.vocabulary), reading)
    if isinstance(x, (bytes, bytearray)) or not isinstance(x, Sequence):
        raise DTypeError(
            f"{reading.x} must be a text, texts, (prompt, answer) pairs, token ids, an array of them or a TokenFile, "
            f"got {type(x).__name__}"
        )
    return _sequence(x, y, reading)


def _sequence(x: Sequence[Any], y: object, reading: Reading) -> Source:
    if not x:
        raise OptionError(f"{reading.x} is empty: there is nothing in it to learn or to score")
    first = x[0]
    if isinstance(first, str):
        if y is not None:
            return Examples(_rows(_pairs(x, y, reading), reading), shuffle=reading.shuffle)
    elif is_pair(first):
        _no_labels(y, "(prompt, answer) pairs", reading)
        prompts, answers = _unzipped(x, reading)
        return Examples(_rows(_pairs(prompts, answers, reading), reading), shuffle=reading.shuffle)
    elif isinstance(first, (tuple, list)) and any(isinstance(each, str) for each in first):
        raise DTypeError(f"{reading.x}[0] must be a pair (prompt, answer) of texts, got {str(first)[:80]}")
    elif isinstance(first, Mapping):
        raise DTypeError(
            f"{reading.x} must be texts, (prompt, answer) pairs or lists of token ids; {reading.x}[0] is a {type(first).__name__}"
        )
    elif not isinstance(first, (Sequence, np.ndarray)):
        _no_labels(y, "a stream of tokens", reading)
        return _stream(token_ids(reading.x, x, reading.vocabulary), reading)
    _no_labels(y, "documents", reading)
    examples: list[Example] = []
    for index, each in enumerate(x):
        if isinstance(first, str) != isinstance(each, str):
            raise DTypeError(
                f"{reading.x}[{index}] must be like {reading.x}[0], {type(first).__name__}, got {type(each).__name__}"
            )
        name = f"{reading.x}[{index}]"
        ids = _document(each, name, reading) if isinstance(each, str) else token_ids(name, each, reading.vocabulary)
        examples += document_examples(ids, reading)
    return Examples(_rows(examples, reading), shuffle=reading.shuffle)


def _no_labels(y: object, what: str, reading: Reading) -> None:
    if y is not None:
        raise OptionError(
            f"{reading.y} goes with a list of prompts or an array (B, T) of ids; {what} has its labels in itself"
        )


def _unzipped(pairs: Sequence[Any], reading: Reading) -> tuple[list[Any], list[Any]]:
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DTypeError(
                f"{reading.x}[{index}] must be a pair (prompt, answer) like {reading.x}[0], got {str(pair)[:80]!r}"
            )
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


# -- streams ----------------------------------------------------------------------------------------------------------


def _stream(tokens: IntArray, reading: Reading) -> Stream:
    return Stream(ArrayReader(tokens), reading.context, shuffle=reading.shuffle)


def _file(tokens: TokenFile | TokenSlice, y: object, reading: Reading) -> Stream:
    _no_labels(y, "a token file", reading)
    file = tokens.file if isinstance(tokens, TokenSlice) else tokens
    if file.vocabulary > reading.vocabulary:
        raise LimitError(
            f"{file.path} has a vocabulary of {file.vocabulary} tokens, the model one of {reading.vocabulary}. "
            "Was it prepared for another model?"
        )
    file.check_tokenizer(reading.tokenizer)
    return Stream(tokens, reading.context, shuffle=reading.shuffle)


# -- documents --------------------------------------------------------------------------------------------------------


def _document(text: str, what: str, reading: Reading) -> IntArray:
    """A text's tokens, and the token that ends it if there is one."""
    ids = encode_text(text, reading.tokenizer, reading.bos, reading.vocabulary, what=what)
    return _ended(ids, reading)


def _ended(ids: IntArray, reading: Reading) -> IntArray:
    end = None if reading.tokenizer is None else reading.tokenizer.eos_token_id
    if end is None or ids[-1] == end or end >= reading.vocabulary:
        return ids
    return np.append(ids, np.int32(end))


def document_examples(ids: IntArray, reading: Reading) -> list[Example]:
    """A document as one example, or as several where it is longer than the context: every token but the first is a label once."""
    return [
        Example(ids[begin : min(begin + reading.context, ids.size - 1)], ids[begin + 1 : begin + reading.context + 1])
        for begin in range(0, ids.size - 1, reading.context)
    ]


def _pairs(prompts: Sequence[Any], answers: object, reading: Reading) -> list[Example]:
    if isinstance(answers, str) or not isinstance(answers, Sequence) or len(answers) != len(prompts):
        got = f"{len(answers)}" if isinstance(answers, Sequence) else type(answers).__name__
        raise ShapeError(f"{reading.y} must be a list of {len(prompts)} answers, one for each prompt, got {got}")
    examples = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        what = f"pair {index} of {reading.x}"
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise DTypeError(f"{what} must be two texts, got {type(prompt).__name__} and {type(answer).__name__}")
        examples.append(pair_example(prompt, answer, reading, what=what))
    return examples


def pair_example(prompt: str, answer: str, reading: Reading, *, what: str = "the pair") -> Example:
    """A prompt that is not learned and an answer that is, with the token that ends it.

    Both are encoded as one text, as a model sees them when it generates. Spaces at the end of the prompt count to the answer,
    and so does a token that crosses the border, so that no part of the answer is left out.

    Args:
        prompt: A text, may be empty if there is a BOS token.
        answer: A text.
        reading: Tokenizer and context.
        what: The pair in messages.

    Returns:
        Labels of the prompt are -100.

    Raises:
        ContextLengthError: It is longer than the context: nothing is cut.
        OptionError: There is no tokenizer, or nothing comes before the first label.
    """
    ids, first = encode_pair(reading.tokenizer, reading.bos, reading.vocabulary, prompt, answer, what=what)
    ids = _ended(ids, reading)
    if ids.size - 1 > reading.context:
        raise ContextLengthError(
            f"{what} has {ids.size} tokens, a row has room for {reading.context + 1} (the last one is only predicted). "
            "Shorten it, or raise `context`: nothing is cut"
        )
    labels = ids[1:].copy()
    labels[: first - 1] = IGNORED
    return Example(ids[:-1], labels)


# -- arrays -----------------------------------------------------------------------------------------------------------


def block_examples(x: Array, y: object, reading: Reading) -> list[Example]:
    """Rows of an array (B, T) with labels as in transformers: of the same shape, shifted here by one, -100 ignored.

    What comes after the last label of a row, such as padding, influences nothing and is cut; rows without labels are left out.
    """
    if x.dtype.kind not in "iu":
        raise DTypeError(f"{reading.x} must be integers, got {x.dtype}")
    labels = x if y is None else _array_of_labels(y, x.shape, reading)
    if labels.shape != x.shape:
        raise ShapeError(f"{reading.y} must have the shape of {reading.x}, {x.shape}, got {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise DTypeError(f"{reading.y} must be integers, got {labels.dtype}")
    check_token_range(reading.y, labels, reading.vocabulary, labels != IGNORED)
    examples = []
    for index, (row, targets) in enumerate(zip(x, labels, strict=True)):
        counted = np.flatnonzero(targets[1:] != IGNORED)
        if counted.size == 0:
            continue
        end = int(counted[-1]) + 1
        if end > reading.context:
            raise ContextLengthError(
                f"{reading.x}[{index}] has {end + 1} tokens up to its last label, a row has room for {reading.context + 1}"
            )
        tokens = token_ids(f"{reading.x}[{index}]", row[:end], reading.vocabulary)
        examples.append(Example(tokens, np.ascontiguousarray(targets[1 : end + 1], dtype=np.int32)))
    return examples


def _array_of_labels(y: object, shape: tuple[int, ...], reading: Reading) -> Array:
    array = array_by_protocol(reading.y, y)
    if array is not None:
        return array
    try:
        return np.asarray(y)
    except ValueError:
        raise ShapeError(
            f"{reading.y} must have the shape of {reading.x}, {shape}, got rows of several lengths"
        ) from None


# -- packing ----------------------------------------------------------------------------------------------------------


def _rows(examples: list[Example], reading: Reading) -> list[Row]:
    kept = [each for each in examples if np.any(each.labels != IGNORED)]
    return packed(kept, reading.context) if reading.pack else [(each,) for each in kept]


def packed(examples: Sequence[Example], context: int) -> list[Row]:
    """Examples put together into rows of at most `context` tokens; they do not see each other.

    The longest go first, each into the row that it fills best: few rows, all nearly full. Which examples share a row depends on
    the examples alone, so every epoch has the same number of steps.

    Args:
        examples: Each at most `context` tokens.
        context: Tokens of a row.

    Returns:
        The rows, their examples in a fixed but arbitrary order.
    """
    order = sorted(range(len(examples)), key=lambda index: -examples[index].tokens.size)
    rows: list[list[Example]] = []
    # Rows by the room they have left.
    by_room: dict[int, list[int]] = {}
    rooms = _Rooms()
    for index in order:
        size = examples[index].tokens.size
        room = rooms.smallest(size)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, context
        else:
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.remove(room)
        rows[row].append(examples[index])
        left = room - size
        if left:
            by_room.setdefault(left, []).append(row)
            rooms.add(left)
    # Otherwise long examples would all come first where nothing is shuffled.
    mixed = stream_of(0, "packing", len(rows)).permutation(len(rows))
    return [tuple(rows[index]) for index in mixed]


class _Rooms:
    """A set of sizes that finds the smallest one that is large enough: a bit for each."""

    def __init__(self) -> None:
        self._bits = 0

    def add(self, room: int) -> None:
        self._bits |= 1 << room

    def remove(self, room: int) -> None:
        self._bits &= ~(1 << room)

    def smallest(self, least: int) -> int | None:
        above = self._bits >> least
        return None if above == 0 else least + (above & -above).bit_length() - 1
