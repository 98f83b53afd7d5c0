"""SentencePiece `tokenizer.model` files, turned into `tokenizers` pipelines that split text the same way.

The file is a protobuf message from an untrusted source, so it is read by a small bounds-checked reader of the wire
format: every length is compared with the bytes left before it is used, and every loop consumes input.
Source: google/sentencepiece, `sentencepiece_model.proto` (field numbers and defaults) and `bpe_model.cc`.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from llama_ext.errors import FormatError, LimitError, UnsupportedError
from llama_ext.io.json_file import open_regular
from llama_ext.runtime.precompiled_charsmap import check_charsmap

if TYPE_CHECKING:
    import tokenizers

__all__ = [
    "SentencePieceModel",
    "build_tokenizer",
    "check_sentencepiece",
    "merges_of",
    "parse_sentencepiece",
    "read_sentencepiece",
]

MAX_FILE_BYTES = 64 * 2**20
MAX_PIECES = 2**20
# The candidate splits of all pieces together; real models have about six per piece. Bounds time and memory of a load.
MAX_MERGE_CANDIDATES = 4 * 2**20
MAX_PIECE_CHARACTERS = 4096

# `ModelProto.SentencePiece.Type`
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# `TrainerSpec.ModelType`
UNIGRAM, BPE = 1, 2
_MODEL_NAMES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT = struct.Struct("<f")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass
class SentencePieceModel:
    """The parts of a `tokenizer.model` that decide how text is split; the position of a piece is its token id."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"
    pad_piece: str = "<pad>"
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @property
    def unknown_id(self) -> int:
        """The id of the only piece of the unknown type."""
        return self.types.index(UNKNOWN)

    def control_piece(self, piece: str) -> str | None:
        """`piece` if the vocabulary has it as a control symbol, else None."""
        return piece if any(p == piece and t == CONTROL for p, t in zip(self.pieces, self.types, strict=True)) else None


class _Reader:
    """The wire format of one message: a sequence of (field number, wire type, value)."""

    def __init__(self, data: bytes, path: str) -> None:
        self.data = data
        self.path = path

    def fail(self, message: str, offset: int, name: str | None = None) -> NoReturn:
        raise FormatError(
            f"{message}. Not a SentencePiece model, or a damaged download?", path=self.path, offset=offset, field=name
        )

    def varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        start = at
        while True:
            if at >= end:
                self.fail("the message ends inside a number", start)
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                # Ten bytes carry 70 bits; protobuf keeps the low 64.
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
            shift += 7
            if shift == 70:
                self.fail("a number is longer than 10 bytes", start)

    def fields(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (field number, wire type, value, offset); for bytes, value is the length and offset its start."""
        while at < end:
            start = at
            key, at = self.varint(at, end)
            number, wire = key >> 3, key & 7
            if number == 0 or number > 0x1FFF_FFFF:
                self.fail(f"field number {number} is outside [1, 2^29)", start)
            if wire == _VARINT:
                value, at = self.varint(at, end)
                yield number, wire, value, start
            elif wire == _BYTES:
                length, at = self.varint(at, end)
                if length > end - at:
                    self.fail(f"field {number} needs {length} bytes, {end - at} are left", start)
                yield number, wire, length, at
                at += length
            elif wire in (_FIXED32, _FIXED64):
                size = 4 if wire == _FIXED32 else 8
                if size > end - at:
                    self.fail(f"field {number} needs {size} bytes, {end - at} are left", start)
                yield number, wire, size, at
                at += size
            else:
                self.fail(f"field {number} has wire type {wire}, expected 0, 1, 2 or 5", start)

    def expect(self, wire: int, got: int, name: str, offset: int) -> None:
        if wire != got:
            self.fail(f"{name} has wire type {got}, expected {wire}", offset, name)

    def text(self, length: int, offset: int, name: str) -> str:
        try:
            return self.data[offset : offset + length].decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{name} is not UTF-8 ({error.reason})", offset + error.start, name)


def _signed32(value: int) -> int:
    """A protobuf int32: negative numbers are sign-extended to 64 bits."""
    value &= 0xFFFF_FFFF
    return value - 2**32 if value >= 2**31 else value


def read_sentencepiece(path: str | os.PathLike[str]) -> SentencePieceModel:
    """Read and check a SentencePiece model file.

    Args:
        path: A `tokenizer.model` file, at most 64 MiB.

    Returns:
        The model.

    Raises:
        FormatError: The file is not a well-formed SentencePiece model.
        LimitError: The file is larger than 64 MiB, or has more than 1,048,576 pieces.
    """
    with open_regular(path, what="a tokenizer.model file") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise LimitError(f"{os.fspath(path)}: larger than {MAX_FILE_BYTES} bytes. Is this really a tokenizer.model?")
    return parse_sentencepiece(data, os.fspath(path))


def parse_sentencepiece(data: bytes, path: str = "tokenizer.model") -> SentencePieceModel:
    """Decode and check the bytes of a SentencePiece model.

    Args:
        data: A serialised `sentencepiece.ModelProto`.
        path: Its name in messages.

    Returns:
        The model: no piece is empty or given twice, exactly one has the unknown type, all scores are finite.

    Raises:
        FormatError: The bytes are not such a message.
        LimitError: There are more than 1,048,576 pieces, or one has more than 4,096 characters.
    """
    reader = _Reader(data, path)
    model = SentencePieceModel()
    for number, wire, value, offset in reader.fields(0, len(data)):
        if number == 1:
            reader.expect(_BYTES, wire, "pieces", offset)
            if len(model.pieces) == MAX_PIECES:
                raise LimitError(f"{path}: more than {MAX_PIECES} pieces")
            _read_piece(reader, model, offset, offset + value)
        elif number == 2:
            reader.expect(_BYTES, wire, "trainer_spec", offset)
            _read_trainer_spec(reader, model, offset, offset + value)
        elif number == 3:
            reader.expect(_BYTES, wire, "normalizer_spec", offset)
            _read_normalizer_spec(reader, model, offset, offset + value)
    check_sentencepiece(model, path)
    return model


def _read_piece(reader: _Reader, model: SentencePieceModel, start: int, end: int) -> None:
    piece, score, kind = "", 0.0, NORMAL
    for number, wire, value, offset in reader.fields(start, end):
        if number == 1:
            reader.expect(_BYTES, wire, "piece", offset)
            piece = reader.text(value, offset, "piece")
        elif number == 2:
            reader.expect(_FIXED32, wire, "score", offset)
            score = _FLOAT.unpack_from(reader.data, offset)[0]
            if not math.isfinite(score):
                reader.fail(f"piece {len(model.pieces)} has the score {score}", offset, "score")
        elif number == 3:
            reader.expect(_VARINT, wire, "type", offset)
            kind = value
    if not piece:
        reader.fail(f"piece {len(model.pieces)} is empty", start, "piece")
    if len(piece) > MAX_PIECE_CHARACTERS:
        raise LimitError(
            f"{reader.path}: piece {len(model.pieces)} has {len(piece)} characters, at most {MAX_PIECE_CHARACTERS}"
        )
    if kind not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE):
        reader.fail(f"piece {len(model.pieces)} has the type {kind}, expected 1 to 6", start, "type")
    model.pieces.append(piece)
    model.scores.append(score)
    model.types.append(kind)


def _read_trainer_spec(reader: _Reader, model: SentencePieceModel, start: int, end: int) -> None:
    flags = {24: "whitespace_as_suffix", 35: "byte_fallback"}
    names = {46: "bos_piece", 47: "eos_piece", 48: "pad_piece"}
    for number, wire, value, offset in reader.fields(start, end):
        if number == 3:
            reader.expect(_VARINT, wire, "model_type", offset)
            model.model_type = _signed32(value)
        elif number in flags:
            reader.expect(_VARINT, wire, flags[number], offset)
            setattr(model, flags[number], value != 0)
        elif number in names:
            reader.expect(_BYTES, wire, names[number], offset)
            setattr(model, names[number], reader.text(value, offset, names[number]))


def _read_normalizer_spec(reader: _Reader, model: SentencePieceModel, start: int, end: int) -> None:
    flags = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}
    for number, wire, value, offset in reader.fields(start, end):
        if number == 2:
            reader.expect(_BYTES, wire, "precompiled_charsmap", offset)
            model.charsmap = reader.data[offset : offset + value]
        elif number in flags:
            reader.expect(_VARINT, wire, flags[number], offset)
            setattr(model, flags[number], value != 0)


def check_sentencepiece(model: SentencePieceModel, path: str) -> None:
    """Checks the conditions that `sentencepiece` itself puts on a model.

    Args:
        model: A model from anywhere.
        path: Its file, for messages.

    Raises:
        FormatError: There are no pieces, one is there twice, there is not one unknown piece, or not all byte pieces.
    """

    def fail(message: str, name: str) -> NoReturn:
        raise FormatError(f"{message}. Not a SentencePiece model, or a damaged download?", path=path, field=name)

    if not model.pieces:
        fail("there are no pieces", "pieces")
    seen: dict[str, int] = {}
    for index, piece in enumerate(model.pieces):
        if seen.setdefault(piece, index) != index:
            fail(f"pieces {seen[piece]} and {index} are both {piece!r}", "pieces")
    unknown = model.types.count(UNKNOWN)
    if unknown != 1:
        fail(f"expected one piece of the unknown type, got {unknown}", "pieces")
    bytes_found = 0
    for index, (piece, kind) in enumerate(zip(model.pieces, model.types, strict=True)):
        if kind == BYTE:
            if not _BYTE_PIECE.fullmatch(piece):
                fail(f"byte piece {index} is {piece!r}, expected <0x00> to <0xFF>", "pieces")
            bytes_found += 1
    if model.byte_fallback and bytes_found != 256:
        fail(f"byte fallback needs 256 byte pieces, got {bytes_found}", "pieces")
    if bytes_found and not model.byte_fallback:
        fail(f"there are {bytes_found} byte pieces, but byte_fallback is off", "pieces")


def merges_of(model: SentencePieceModel) -> list[tuple[str, str]]:
    """The merges that reproduce SentencePiece's choice, the best-scoring piece first.

    SentencePiece stores no merges: it joins the two neighbours whose concatenation is the best-scoring piece. Every
    way of writing a piece as two pieces is therefore a merge with that piece's score; ties are ordered as transformers'
    converter orders them. Only normal pieces take part, so text can never be merged into a control or byte piece.

    Args:
        model: A BPE model.

    Returns:
        Pairs of pieces.

    Raises:
        LimitError: The pieces have more than 4,194,304 splits.
    """
    scores = {p: s for p, s, t in zip(model.pieces, model.scores, model.types, strict=True) if t == NORMAL}
    candidates = 0
    found: list[tuple[float, int, int, str, str]] = []
    for piece, score in scores.items():
        candidates += len(piece) - 1
        if candidates > MAX_MERGE_CANDIDATES:
            raise LimitError(f"tokenizer.model: the pieces can be split in more than {MAX_MERGE_CANDIDATES} ways")
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in scores and right in scores:
                found.append((score, len(left), len(right), left, right))
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in found]


def _unused_is_reachable(model: SentencePieceModel) -> bool:
    """Whether merging could give an unused piece, which SentencePiece would then split again.

    Those that a converter adds to fill the vocabulary up ("[PAD32000]") are out of reach: no two pieces make them.
    """
    unused = [p for p, t in zip(model.pieces, model.types, strict=True) if t == UNUSED]
    known = set(model.pieces) if unused else set()
    return any(
        model.model_type != BPE
        or len(piece) == 1
        or any(piece[:at] in known and piece[at:] in known for at in range(1, len(piece)))
        for piece in unused
    )


def build_tokenizer(model: SentencePieceModel, path: str = "tokenizer.model") -> tokenizers.Tokenizer:
    """Make a `tokenizers.Tokenizer` that splits text as SentencePiece does with this model.

    Ids agree with `sentencepiece.SentencePieceProcessor.encode` on text that holds no control symbols: those (`<s>`)
    are read from text as special tokens here, as everywhere in `tokenizers`, and as ordinary characters there.
    The dummy prefix is added to each stretch of text between special tokens. No BOS or EOS is added.

    Args:
        model: A BPE or Unigram model.
        path: Its name in messages.

    Returns:
        The tokenizer; its decoder removes the dummy prefix again.

    Raises:
        FormatError: The normalisation table is malformed.
        LimitError: The pieces have more than 4,194,304 splits.
        UnsupportedError: The model type is word or character, or the model has unused pieces that text could become,
            writes its spaces behind words, or leaves spaces unescaped.
    """
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    if model.model_type not in (UNIGRAM, BPE):
        kind = _MODEL_NAMES.get(model.model_type, str(model.model_type))
        raise UnsupportedError(f"{path}: a SentencePiece model of type {kind}; BPE and unigram are supported")
    for present, what in (
        (_unused_is_reachable(model), "unused pieces"),
        (model.whitespace_as_suffix, "treat_whitespace_as_suffix"),
        (not model.escape_whitespaces, "escape_whitespaces = false"),
    ):
        if present:
            raise UnsupportedError(f"{path}: a SentencePiece model with {what} is not supported. Use a tokenizer.json.")

    unknown = model.pieces[model.unknown_id]
    # SentencePiece looks for symbols in normalised text, where a space is written as U+2581: one with a space in it
    # is never found. Added tokens would be cut out before the normaliser, and each stretch between them given a prefix.
    symbols = [p for p, t in zip(model.pieces, model.types, strict=True) if t == USER_DEFINED and " " not in p]
    core: models.Model
    if model.model_type == BPE:
        core = models.BPE(
            vocab={piece: index for index, piece in enumerate(model.pieces)},
            merges=merges_of(model),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            # No merges lead to a symbol, so one that was cut out must be found as a whole.
            ignore_merges=bool(symbols),
        )
    else:
        # Byte and control pieces stand in this vocabulary with a score, as in transformers' converter, so text that
        # spells one out (`<0x0A>`) becomes that piece; SentencePiece would split it into characters.
        core = models.Unigram(
            vocab=list(zip(model.pieces, model.scores, strict=True)),
            unk_id=model.unknown_id,
            byte_fallback=model.byte_fallback,
        )
    tokenizer = tokenizers.Tokenizer(core)
    tokenizer.normalizer = normalizers.Sequence(_normalizer_steps(model, path))
    if symbols:
        pattern = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    special = [p for p, t in zip(model.pieces, model.types, strict=True) if t in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(p, normalized=False, special=True) for p in special])
    tokenizer.decoder = _decoder(model)
    return tokenizer


def _normalizer_steps(model: SentencePieceModel, path: str) -> list[Any]:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if model.charsmap:
        check_charsmap(model.charsmap, path)
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        # Spaces only: SentencePiece leaves other white space to the normalisation table. At the end of the text it
        # looks at the escaped form, so a U+2581 that was in the text goes too.
        steps += [normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return steps


def _decoder(model: SentencePieceModel) -> tokenizers.decoders.Decoder:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", left=0xFFFF))  # all of them
    elif model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", left=1))
    return decoders.Sequence(steps)
