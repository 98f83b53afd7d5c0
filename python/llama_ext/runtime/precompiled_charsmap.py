"""Checks a SentencePiece normalisation table before the `tokenizers` package walks it without bounds checks of its own.

The table is `[bytes of the trie: u32][trie: u32 ...][replacements: UTF-8, each ended by a NUL]`. The trie is a double
array: from the unit at `i`, the child for byte `c` is the unit at `(i ^ offset) ^ c`, if its label is `c`.
Source: s-yata/darts-clone, `DoubleArrayUnit`, and google/sentencepiece, `normalizer.cc`.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from llama_ext.errors import FormatError

__all__ = ["check_charsmap", "check_charsmaps_in"]


def check_charsmap(table: bytes, path: str) -> None:
    """Check that no lookup in a table leaves it.

    Args:
        table: The table; not empty.
        path: The file it is from, for the message.

    Raises:
        FormatError: The table is malformed.
    """

    import numpy as np

    def fail(message: str) -> FormatError:
        return FormatError(f"the normalisation table is malformed: {message}", path=path, field="precompiled_charsmap")

    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 or size % 4 or size < 1024 or size > len(table) - 4:
        raise fail(f"its trie has {size} bytes, expected a multiple of 4 in [1024, {max(0, len(table) - 4)}]")
    units = np.frombuffer(table, "<u4", size // 4, 4).astype(np.int64)
    replacements = table[4 + size :]
    try:
        replacements.decode("utf-8")
    except UnicodeDecodeError as error:
        raise fail(f"its replacements are not UTF-8 ({error.reason})") from error
    # Bit 31 marks a value, which no lookup passes through. Bits 10-30 are the offset, in blocks of 256 if bit 9 is set.
    inner = units >> 31 == 0
    inner[0] = True  # every lookup begins here, whatever its bits
    children = np.arange(units.size) ^ (units >> 10 << ((units & 0x200) >> 6))
    # A child is at `children ^ c` for a byte c: anywhere in the same block of 256.
    if np.any(inner & ((children | 0xFF) >= units.size)):
        raise fail("a branch of its trie leaves the table")
    values = units[children[inner & (units >> 8 & 1 == 1)]] & 0x7FFF_FFFF
    starts = np.frombuffer(replacements + b"\0", np.uint8)
    # A replacement begins inside the text, and not in the middle of a character.
    if np.any(values >= starts.size) or np.any(starts[np.minimum(values, starts.size - 1)] & 0xC0 == 0x80):
        raise fail("a replacement is outside its text")


def check_charsmaps_in(normalizer: Any, path: str) -> None:
    """Check every table in the `normalizer` of a tokenizer.json.

    Args:
        normalizer: The parsed JSON; anything that is not a normaliser is left for `tokenizers` to refuse.
        path: The file, for the message.

    Raises:
        FormatError: A table is malformed.
    """
    pending = [normalizer]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending += item
        elif isinstance(item, dict):
            pending += item.values()
            text = item.get("precompiled_charsmap")
            if isinstance(text, str):
                try:
                    table = base64.b64decode(text, validate=True)
                except (binascii.Error, ValueError) as error:
                    raise FormatError("the normalisation table is not base64", path=path) from error
                if table:
                    check_charsmap(table, path)
