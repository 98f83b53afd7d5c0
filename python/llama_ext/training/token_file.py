"""A file of token ids for pre-training: mapped, so that a text larger than memory can be trained on.

Layout, little-endian: 8 bytes b"LLXTOKEN"; uint32 version, 1; uint32 bytes of a token, 2 or 4; uint64 how many tokens; uint64
vocabulary; 32 bytes, the SHA-256 of the tokenizer's tokenizer.json, or zeros; then the tokens, uint16 or uint32.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext._arrays import Array, IntArray, array_by_protocol
from llama_ext._options import shown, whole
from llama_ext.errors import DTypeError, FormatError, LimitError, OptionError, TokenIdError
from llama_ext.io.atomic import atomic_write
from llama_ext.io.json_file import open_regular
from llama_ext.io.mapped_file import MappedFile
from llama_ext.limits import DEFAULT_LIMITS, Limits, check_limits
from llama_ext.runtime.tokenizer import Tokenizer

__all__ = ["ArrayReader", "TokenFile", "TokenSlice", "is_token_file", "tokenizer_hash", "write_token_file"]

_MAGIC = b"LLXTOKEN"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQ32s")
_NO_TOKENIZER = bytes(32)
# A fingerprint reads so many blocks, spread over the file, of so many tokens.
_SAMPLES, _SAMPLE = 1_024, 1_024


def tokenizer_hash(tokenizer: Tokenizer | None) -> bytes:
    """32 bytes that tell one tokenizer from another; zeros for none."""
    if tokenizer is None:
        return _NO_TOKENIZER
    return hashlib.sha256(tokenizer.backend.to_str().encode("utf-8")).digest()


class TokenFile:
    """An open token file; `fit` takes it as data, a context manager closes it.

    Args:
        path: What `write_token_file` or `llama-ext train --prepare` wrote.
        limits: `vocabulary` bounds the vocabulary that it may name.

    Attributes:
        path: The file.
        vocabulary: Ids are below this.

    Raises:
        FormatError: There is no such file, or it is not one: its size and every field of its header are checked.
        LimitError: Its vocabulary is beyond the limits.
    """

    def __init__(self, path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> None:
        check_limits(limits)
        self.path = os.fspath(path)
        with open_regular(path, what="a token file") as file:
            head = file.read(_HEADER.size)
            size = os.fstat(file.fileno()).st_size
            if len(head) < _HEADER.size or head[:8] != _MAGIC:
                raise FormatError(
                    "this is not a token file. Make one: llama-ext train TEXT --prepare FILE", path=self.path
                )
            _, version, item, count, vocabulary, self._tokenizer = _HEADER.unpack(head)
            if version != _VERSION:
                self._refuse("version", 8, _VERSION, version, "It was written by another version of this package.")
            if item not in (2, 4):
                self._refuse("bytes of a token", 12, "2 or 4", item)
            if count < 1:
                self._refuse("how many tokens", 16, "at least 1", count)
            # Python's whole numbers do not overflow.
            if size != _HEADER.size + count * item:
                self._refuse("size", 0, f"{_HEADER.size + count * item} bytes", f"{size} bytes", "Truncated copy?")
            if vocabulary > limits.vocabulary:
                raise LimitError(
                    f"{self.path}: a vocabulary of {vocabulary} tokens, the limit is {limits.vocabulary} (Limits.vocabulary)"
                )
            if not 1 <= vocabulary <= 1 << 8 * item:
                self._refuse("vocabulary", 24, f"in [1, {1 << 8 * item}]", vocabulary)
            self.vocabulary = int(vocabulary)
            self._count = int(count)
            self._item = int(item)
            self._file = MappedFile(file, self.path)

    def _refuse(self, field: str, offset: int, expected: object, got: object, advice: str = "") -> None:
        message = f"{field} must be {expected}, got {got}. {advice}".rstrip()
        raise FormatError(message, path=self.path, offset=offset, field=field, expected=expected, got=got)

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def read(self, begin: int, end: int) -> IntArray:
        """Tokens [begin, end), a copy.

        Args:
            begin, end: 0 <= begin <= end <= len(self).

        Returns:
            (end - begin,) int32, each in [0, vocabulary).

        Raises:
            OptionError: The range is none.
            FormatError: A token is outside the vocabulary, or the file shrank or was closed.
        """
        if not 0 <= begin <= end <= self._count:
            raise OptionError(f"{self.path}: tokens [{begin}, {end}) are not in [0, {self._count})")
        self._file.check("tokens")
        if begin == end:
            return np.zeros(0, dtype=np.int32)
        offset = _HEADER.size + begin * self._item
        stored = self._file.array(f"<u{self._item}", end - begin, offset)
        wrong = np.flatnonzero(stored >= self.vocabulary)
        if wrong.size:
            raise FormatError(
                f"token {begin + int(wrong[0])} is {int(stored[wrong[0]])}; ids of this file are in [0, {self.vocabulary}).",
                path=self.path,
                offset=offset + int(wrong[0]) * self._item,
            )
        return stored.astype(np.int32)

    @property
    def fingerprint(self) -> str:
        """A hash of the header and of 1,024 pieces spread over the file: reading all of a large one would take minutes."""
        digest = hashlib.sha256(self._file.bytes(0, _HEADER.size))
        for begin in np.unique(np.linspace(0, max(0, self._count - _SAMPLE), _SAMPLES).astype(np.int64)):
            digest.update(self.read(int(begin), min(int(begin) + _SAMPLE, self._count)).tobytes())
        return digest.hexdigest()

    def check_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        """Raises FormatError when the file names another tokenizer than this one."""
        if tokenizer is not None and self._tokenizer not in (_NO_TOKENIZER, tokenizer_hash(tokenizer)):
            raise FormatError(
                "these tokens were made with another tokenizer than the model's. Prepare the text again with this one.",
                path=self.path,
                offset=32,
                field="tokenizer",
            )


def is_token_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a token file does; False where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


class TokenSlice:
    """A part of a token file, as data of its own.

    Args:
        file: The file, which stays open as long as this is used.
        begin, end: 0 <= begin <= end <= len(file).
    """

    def __init__(self, file: TokenFile, begin: int, end: int) -> None:
        if not 0 <= begin <= end <= len(file):
            raise OptionError(f"{file.path}: tokens [{begin}, {end}) are not in [0, {len(file)})")
        self.file = file
        self._begin = begin
        self._end = end

    def __len__(self) -> int:
        return self._end - self._begin

    @property
    def fingerprint(self) -> str:
        """That of the file, and which part it is."""
        return f"{self._begin}-{self._end}/{self.file.fingerprint}"

    def read(self, begin: int, end: int) -> IntArray:
        """Tokens [begin, end) of the part."""
        return self.file.read(self._begin + begin, self._begin + end)

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


class ArrayReader:
    """A stream of tokens in memory.

    Args:
        tokens: (n,) int32.
    """

    def __init__(self, tokens: IntArray) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return int(self._tokens.size)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens."""
        return hashlib.sha256(self._tokens.tobytes()).hexdigest()

    def read(self, begin: int, end: int) -> IntArray:
        """Tokens [begin, end), a view."""
        return self._tokens[begin:end]


def write_token_file(
    path: str | os.PathLike[str],
    pieces: Iterable[npt.NDArray[np.integer[Any]] | list[int]],
    *,
    vocabulary: int,
    tokenizer: Tokenizer | None = None,
) -> int:
    """Writes a token file, whole or not at all.

    Args:
        path: The file; its folder must exist.
        pieces: Ids in [0, vocabulary), piece by piece: all together may be larger than memory.
        vocabulary: How many different ids there are; up to 65,536 they take two bytes each, else four.
        tokenizer: What made the ids; a model with another one then refuses the file.

    Returns:
        How many tokens were written.

    Raises:
        OptionError: No tokens, or `vocabulary` is not in [1, 2^32].
        DTypeError: `pieces` cannot be gone through, or a piece is an array that is not on the CPU.
        TokenIdError: A piece is no list of whole numbers, or one of them is outside the vocabulary.
        OSError: It cannot be written.
    """
    vocabulary = whole("vocabulary", vocabulary, 1, 1 << 32)
    item = 2 if vocabulary <= 1 << 16 else 4
    if not isinstance(pieces, Iterable):
        raise DTypeError(f"pieces must be lists or arrays of token ids, one after the other, got {shown(pieces)}")
    count = 0
    with atomic_write(path, follow_links=True) as file:
        file.write(bytes(_HEADER.size))
        for piece in pieces:
            ids = _ids(piece)
            if ids is not None and ids.size == 0:
                continue
            if ids is None or ids.min() < 0 or ids.max() >= vocabulary:
                found = shown(piece) if ids is None else f"{ids.dtype} in [{ids.min()}, {ids.max()}]"
                raise TokenIdError(
                    f"cannot write {os.fspath(path)}: a piece must be a list of whole numbers in [0, {vocabulary}), got {found}"
                )
            file.write(ids.astype(f"<u{item}").tobytes())
            count += ids.size
        if count == 0:
            raise OptionError(f"cannot write {os.fspath(path)}: there are no tokens")
        file.seek(0)
        file.write(_HEADER.pack(_MAGIC, _VERSION, item, count, vocabulary, tokenizer_hash(tokenizer)))
    return count


def _ids(piece: object) -> Array | None:
    """A piece as an array with one axis, of integers unless it is empty; None where it is something else."""
    array = array_by_protocol("a piece", piece)
    try:
        ids: Array = np.asarray(piece) if array is None else array
    except ValueError:  # lists of several lengths
        return None
    return ids if ids.size == 0 or (ids.dtype.kind in "iu" and ids.ndim == 1) else None
