"""Text as it is generated: whole characters only, and nothing that may turn out to be a stop string.

Decoding a list of ids is not the sum of decoding each: a character may span several tokens, and decoders treat the
first token differently. `DecodePlan` says which of a few shapes a tokenizer's decoder has; each is decoded token by token,
with a few bytes of state, to the same text as all tokens at once.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llama_ext.errors import OptionError

if TYPE_CHECKING:
    import tokenizers

    from llama_ext.runtime.tokenizer import Tokenizer

__all__ = ["DecodePlan", "StopStrings", "TextStream", "decode_plan", "token_bytes"]

# What the ByteFallback decoder takes for a byte: six characters, and two that Rust parses as base 16 (a sign included).
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>")


@dataclass(frozen=True)
class DecodePlan:
    """How tokens become text.

    Args:
        kind: `bytes`: byte-level BPE, a token is bytes written as characters. `pieces`: SentencePiece, a token is text
            or one byte. `metaspace`: tokens with U+2581 for a space. `words`: no decoder, tokens joined by a space.
            `whole`: a decoder whose text may depend on all tokens at once.
        replacements: Strings replaced in each token, in order (`pieces`).
        byte_fallback: Tokens like `<0x0A>` are bytes (`pieces`).
        strip: A character removed at the start of the text, at most `strip_count` times (`pieces`); the character for a
            space, removed from the first token when `strip_count` is 1 (`metaspace`).
        strip_count: See `strip`.
    """

    kind: Literal["bytes", "pieces", "metaspace", "words", "whole"]
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip: str = ""
    strip_count: int = 0


def decode_plan(backend: tokenizers.Tokenizer) -> DecodePlan:
    """The shape of a tokenizer's decoder.

    Args:
        backend: The tokenizer.

    Returns:
        The plan; `whole` for a decoder that is not known here, which is then applied once, at the end.
    """
    decoder = backend.decoder
    if decoder is None:
        return DecodePlan("words")
    # The decoder alone; serialising the whole tokenizer would write out the vocabulary.
    spec = json.loads(decoder.__getstate__())
    return _sequence_plan(spec.get("decoders", []) if spec.get("type") == "Sequence" else [spec])


def _sequence_plan(steps: list[dict[str, Any]]) -> DecodePlan:
    names = [step.get("type") for step in steps]
    if names in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return DecodePlan("bytes")
    if names == ["Metaspace"]:
        first = 0 if steps[0].get("prepend_scheme") == "never" else 1
        return DecodePlan("metaspace", strip=steps[0]["replacement"], strip_count=first)
    replacements: list[tuple[str, str]] = []
    strip, strip_count, byte_fallback = "", 0, False
    # [Replace ...] [ByteFallback] [Fuse [Strip]]: without Fuse, Strip would apply to each token.
    while steps and steps[0]["type"] == "Replace" and steps[0].get("pattern", {}).get("String"):
        replacements.append((steps[0]["pattern"]["String"], steps[0]["content"]))
        steps = steps[1:]
    if steps and steps[0]["type"] == "ByteFallback":
        byte_fallback, steps = True, steps[1:]
    if steps and steps[0]["type"] == "Fuse":
        steps = steps[1:]
        if steps and steps[0]["type"] == "Strip" and steps[0].get("stop") == 0:
            strip, strip_count, steps = steps[0]["content"], steps[0]["start"], steps[1:]
    if steps:
        return DecodePlan("whole")
    return DecodePlan("pieces", tuple(replacements), byte_fallback, strip, strip_count)


@functools.lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The UTF-8 bytes that one token stands for: part of a character, where a character spans several.

    What a decoder does at the start of a text, such as to drop a space, is left out.

    Args:
        tokenizer: The tokenizer of the id.
        token_id: An id in [0, vocabulary).

    Returns:
        The bytes; none for an id that the vocabulary leaves out.

    Raises:
        TokenIdError: The id is outside the vocabulary.
    """
    token = tokenizer.id_to_token(token_id)
    if token is None:
        return b""
    plan = tokenizer.decode_plan
    if token_id in tokenizer.special_ids:
        return token.encode("utf-8")
    if plan.kind == "bytes":
        return _bytes_of(token)
    if plan.kind == "whole":
        return tokenizer.decode([token_id], skip_special_tokens=False).encode("utf-8")
    if plan.kind == "metaspace":
        return token.replace(plan.strip, " ").encode("utf-8")
    for old, new in plan.replacements:
        token = token.replace(old, new)
    byte = _BYTE_TOKEN.fullmatch(token) if plan.byte_fallback else None
    return bytes([int(byte[1], 16)]) if byte else token.encode("utf-8")


def _bytes_of(token: str) -> bytes:
    """Of a token of byte-level BPE; an added one is text."""
    table = _byte_of_character()
    return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode("utf-8")


class TextStream:
    """Decode ids one at a time.

    The pieces joined, with what `flush` gives, are `tokenizer.decode(all ids)`; with a prompt, they are what follows
    the prompt's text. A character that the prompt's last ids began comes with the id that completes it.
    The cost of a token does not depend on how many came before. A decoder this module does not know (none of the Llama
    family's) yields its text from `flush` alone.

    Args:
        tokenizer: The tokenizer of the ids.
        prompt_ids: The ids before the first one pushed; their text is not given out.
        skip_special_tokens: Leave special tokens out of the text.

    Raises:
        TokenIdError: A prompt id is outside the vocabulary.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._plan = tokenizer.decode_plan
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # `bytes`
        self._run = b""  # `pieces`: bytes that do not yet make a character
        self._strip_left = self._plan.strip_count
        self._first = True
        self._ids: list[int] = []  # `whole`
        self._before = ""
        for token in prompt_ids:
            self.push(token)
        if self._plan.kind == "whole" and self._ids:
            self._before = self._decode_whole()

    def push(self, token_id: int) -> str:
        """Take the next id.

        Args:
            token_id: An id in [0, vocabulary).

        Returns:
            The text that is now certain; empty inside a character and for a skipped special token.

        Raises:
            TokenIdError: The id is outside the vocabulary.
        """
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._skip:
            return ""
        plan = self._plan
        if plan.kind == "pieces":
            return self._push_piece(token)
        if plan.kind == "bytes":
            return self._utf8.decode(_bytes_of(token))
        if plan.kind == "whole":
            self._ids.append(int(token_id))
            return ""
        first, self._first = self._first, False
        if plan.kind == "metaspace":
            return token.replace(plan.strip, "" if first and plan.strip_count else " ")
        return token if first else " " + token

    def flush(self) -> str:
        """End the text.

        Returns:
            What was held back: a replacement character (U+FFFD) for bytes that never became a character.
        """
        if self._plan.kind == "pieces":
            return self._strip(self._drain(final=True))
        if self._plan.kind == "bytes":
            text = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return text
        if self._plan.kind == "whole" and self._ids:
            before, self._before = self._before, self._decode_whole()
            return self._before[len(before) :] if self._before.startswith(before) else self._before
        return ""

    def _decode_whole(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)

    def _push_piece(self, token: str) -> str:
        for old, new in self._plan.replacements:
            token = token.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(token) if self._plan.byte_fallback else None
        if byte:
            self._run += bytes([int(byte[1], 16)])
            return self._strip(self._drain(final=False))
        return self._strip(self._drain(final=True) + token)

    def _drain(self, *, final: bool) -> str:
        """The characters that the collected bytes make; each byte that can be part of none gives a U+FFFD."""
        text = ""
        while self._run:
            try:
                part, used = codecs.utf_8_decode(self._run, "strict", final)
            except UnicodeDecodeError as error:  # noqa: PERF203
                text += self._run[: error.start].decode("utf-8") + "\ufffd"
                self._run = self._run[error.start + 1 :]
            else:
                self._run = self._run[used:]
                return text + part
        return text

    def _strip(self, text: str) -> str:
        if self._strip_left and text:
            rest = text.lstrip(self._plan.strip)
            removed = min(len(text) - len(rest), self._strip_left)
            # Anything else ends the stripping: it is for the start of the text only.
            self._strip_left = 0 if rest else self._strip_left - removed
            text = text[removed:]
        return text


class StopStrings:
    """Find the first stop string in a text that arrives in pieces.

    The result does not depend on where the pieces are cut: the text ends where a stop string is first complete, and of
    several that are complete there the longest counts. The stop string is not given out.

    Args:
        stops: One string, or several; none of them empty.

    Raises:
        OptionError: A stop string is empty or not a str.
    """

    def __init__(self, stops: str | Sequence[str]) -> None:
        given: list[object] = [stops] if isinstance(stops, str) else list(stops)
        self._stops: list[str] = []
        for stop in given:
            if not isinstance(stop, str) or not stop:
                raise OptionError(f"stop: expected non-empty strings, got {stop!r}")
            self._stops.append(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece.

        Args:
            text: The piece; may be empty.

        Returns:
            The text that cannot be part of a stop string, and whether one was found. After one was found: "", True.
        """
        if self.stopped:
            return "", True
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]], True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """End the text.

        Returns:
            What was held back and did not become a stop string.
        """
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, `stop` itself excepted."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
