"""A tokenizer of any size for a model of random weights: engines want one beside the weights, whatever it says.

It is of Llama's kind: byte-pair encoding of text with its spaces as U+2581, and 256 pieces for single bytes. The merges are
not learned: they are all pairs, triples and so on of letters in turn.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["BOS", "EOS", "SPECIAL", "UNKNOWN", "ensure_tokenizer", "pieces"]

UNKNOWN, BOS, EOS = SPECIAL = ("<unk>", "<s>", "</s>")
_SPACE = "\u2581"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SYMBOLS = [_SPACE, *string.ascii_lowercase]
_LEAST = len(SPECIAL) + len(_BYTES) + len(_SYMBOLS)


def pieces(vocabulary: int) -> tuple[list[str], list[tuple[str, str]]]:
    """The pieces by id, and the merges that make those after the letters.

    Args:
        vocabulary: How many pieces; special ones, bytes and letters are 286 of them.

    Returns:
        The pieces and the pairs.

    Raises:
        ValueError: Fewer than 286, or more than there are merges for.
    """
    if vocabulary < _LEAST:
        raise ValueError(f"a tokenizer has {_LEAST} pieces at least, not {vocabulary}")
    merges = list(itertools.islice(_merges(), vocabulary - _LEAST))
    found = [*SPECIAL, *_BYTES, *_SYMBOLS, *(first + second for first, second in merges)]
    if len(found) < vocabulary:
        raise ValueError(f"a tokenizer has {len(found)} pieces at most, not {vocabulary}")
    return found, merges


def _merges() -> Iterator[tuple[str, str]]:
    """Two symbols, then three, then four; a space only begins."""
    letters = _SYMBOLS[1:]
    pairs = [first + second for first in _SYMBOLS for second in letters]
    yield from itertools.product(_SYMBOLS, letters)
    yield from itertools.product(pairs, letters)
    yield from itertools.product(pairs, (pair for pair in pairs if not pair.startswith(_SPACE)))


def ensure_tokenizer(directory: Path, vocabulary: int) -> bool:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
        directory: Of a model.
        vocabulary: V.

    Returns:
        Whether they had to be written.

    Raises:
        ValueError: No such tokenizer, see `pieces`.
    """
    config = directory / "tokenizer_config.json"
    if config.exists():
        return False
    text = json.dumps(_tokenizer(vocabulary), ensure_ascii=False, indent=1)
    (directory / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    # Last, because it says that both are there.
    config.write_text(json.dumps(_config(), indent=1) + "\n", encoding="utf-8")
    return True


def _config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }


def _tokenizer(vocabulary: int) -> dict[str, Any]:
    """What the package `tokenizers` reads."""
    found, merges = pieces(vocabulary)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": content, **flags} for index, content in enumerate(SPECIAL)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": BOS, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": BOS, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {BOS: {"id": BOS, "ids": [SPECIAL.index(BOS)], "tokens": [BOS]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(found)},
            "merges": [list(pair) for pair in merges],
        },
    }
