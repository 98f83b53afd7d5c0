"""A conversation with a model, whose KV cache is read once and kept: each turn only reads what is new."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from llama_ext.errors import ContextLengthError, FormatError, OptionError, OutOfMemoryError

if TYPE_CHECKING:
    from llama_ext.runtime.generation import Piece
    from llama_ext.runtime.model import LlamaForCausalLM
    from llama_ext.runtime.session import Session

__all__ = ["Answer", "Conversation"]

_FORMAT = "llama_ext conversation 1"
_ROLES = ("system", "user", "assistant")

# Where a turn of a conversation without a chat template ends: at a blank line.
_TURN = "\n\n"

# The smallest room worth having a conversation in.
_LEAST_ROOM = 256


@dataclass
class Answer:
    """How the last answer came about.

    Attributes:
        prompt_tokens: The conversation up to the answer.
        read_tokens: Those of them that were not in the KV cache.
        new_tokens: The answer's.
        prefill_seconds: Up to the first new token.
        decode_seconds: From there on.
        finish_reason: "stop", "length", or None when it was interrupted.
        is_kept: It is part of the conversation now.
        is_full: The context has no room for more.
    """

    prompt_tokens: int = 0
    read_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: str | None = None
    is_kept: bool = False
    is_full: bool = False


class Conversation:
    """Messages, and the session that has read them.

    With a chat template the answers are those of `LlamaForCausalLM.chat`. Without one the turns are put one after the
    other, a blank line between them, and the model goes on with that text up to the next blank line.

    Args:
        model: Its tokenizer must not be None.
        options: Of `LlamaForCausalLM.generate`; with a seed, each answer has the next one.
        system: The system message, or None.
        context: Tokens there is room for; None: the model's context, or what memory has room for.

    Raises:
        OptionError: An option is out of range, or the template takes no system message.
        ContextLengthError: `context` is beyond the model's.
        OutOfMemoryError: The KV cache does not fit into memory.
    """

    def __init__(
        self, model: LlamaForCausalLM, options: dict[str, Any], system: str | None = None, context: int | None = None
    ) -> None:
        if model.tokenizer is None:
            raise OptionError("a conversation needs a tokenizer, and this model has none")
        self.messages: list[dict[str, str]] = []
        self.last = Answer()
        self._model = model
        self._tokenizer = model.tokenizer
        self._options = dict(options)
        self._answers = 0
        self._session = _session(model, context)
        self.is_templated = self._tokenizer.chat_template is not None
        if not self.is_templated:
            self._options.setdefault("stop", [_TURN])
        # Chat formats end a turn with the tokenizer's EOS, which need not be the model's.
        ends = dict.fromkeys([*model.eos_token_ids, self._tokenizer.eos_token_id])
        self._ends = [token for token in ends if token is not None and 0 <= token < model.config.vocab_size]
        if system is not None:
            self.set_system(system)

    @property
    def room(self) -> int:
        """How many tokens a conversation may have."""
        return self._session.max_length

    @property
    def system(self) -> str | None:
        """The system message."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    def set_system(self, text: str) -> None:
        """Sets the system message, and keeps what was said.

        Raises:
            OptionError: The chat template takes none, or it is not text.
        """
        if not _is_text(text):
            raise OptionError(f"the system message has bytes that are not UTF-8: {text!a:.200}")
        message = {"role": "system", "content": text}
        if self.is_templated:
            self._tokenizer.apply_chat_template([message, {"role": "user", "content": "."}], tokenize=False)
        said = self.messages[1:] if self.system is not None else self.messages
        self.messages = [message, *said]

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def say(self, text: str) -> Iterator[str]:
        """Says something, and yields the answer as it comes.

        When the iterator ends, is closed or raises, the conversation has the question and what was answered until then, a
        part of an answer too. If that is no text at all it is as before, unless the answer was complete and empty.

        Args:
            text: The user's words.

        Raises:
            ContextLengthError: There is no room for it.
            OptionError: The chat template or the tokenizer refuses it.
        """
        return self._answer([*self.messages, {"role": "user", "content": text}])

    def answer_again(self) -> Iterator[str]:
        """Takes the last answer back and yields another one.

        Raises:
            OptionError: Nothing was said yet.
        """
        messages = self.messages
        said = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
        if not said or said[-1]["role"] != "user":
            raise OptionError("there is nothing to answer yet")
        return self._answer(said)

    def save(self, path: str) -> None:
        """Writes the messages as JSON, whole or not at all.

        Raises:
            OptionError: No file can have this name.
            OSError: The file cannot be written.
        """
        from llama_ext.io.atomic import atomic_write

        record = {"format": _FORMAT, "messages": self.messages}
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        with atomic_write(_at_home(path), follow_links=True) as file:
            file.write(text.encode("utf-8"))

    def load(self, path: str) -> None:
        """Goes on with the messages of a file that `save` wrote.

        Raises:
            FormatError: It is not such a file.
            LimitError: It is too large.
        """
        from llama_ext.io.json_file import read_json_object

        path = _at_home(path)
        values = read_json_object(path, what="a saved conversation")
        if values.get("format") != _FORMAT:
            raise FormatError(
                f"this is not a saved conversation: it has no format {_FORMAT!r}", path=path, field="format"
            )
        messages = values.get("messages")
        if not isinstance(messages, list):
            raise FormatError("messages must be a list", path=path, field="messages")
        self.messages = [_message(message, index, path) for index, message in enumerate(messages)]

    def _answer(self, said: list[dict[str, str]]) -> Iterator[str]:
        before, self.messages = self.messages, said
        self.last = Answer()
        parts: list[str] = []
        complete = False
        try:
            ids = self._ids()
            options = self._turn_options(len(ids))
            new = self._rewind_to(ids)
            self.last.prompt_tokens, self.last.read_tokens = len(ids), len(new)
            started = first = time.perf_counter()
            # Closing it gives the session its last token, which must not wait for the garbage collector.
            pieces = cast("Generator[Piece, None, None]", self._session.stream_generate(new, **options))
            with contextlib.closing(pieces):
                for piece in pieces:
                    if self.last.new_tokens == 0:
                        first = time.perf_counter()
                        self.last.prefill_seconds = first - started
                    self.last.new_tokens += piece.token_id is not None
                    self.last.decode_seconds = time.perf_counter() - first
                    self.last.finish_reason = piece.finish_reason
                    if piece.text:
                        parts.append(piece.text)
                        yield piece.text
            complete = True
        finally:
            # Also when it is closed before its end, and when Ctrl-C comes in the middle of it.
            text = "".join(parts)
            self.last.is_kept = complete or bool(text)
            if self.last.is_kept:
                self.messages = [*self.messages, {"role": "assistant", "content": text}]
                self._answers += 1
            else:
                self.messages = before
            self.last.is_full = self._session.length >= self.room - 1

    def _ids(self) -> list[int]:
        """The tokens of the conversation, up to where the answer begins."""
        if self.is_templated:
            ids: list[int] = self._tokenizer.apply_chat_template(self.messages, add_generation_prompt=True)
            return ids
        text = ""
        for message in self.messages:
            if message["role"] == "assistant":
                text += message["content"]
            else:
                text = (text.rstrip("\n") + _TURN if text else "") + message["content"] + "\n"
        return self._tokenizer.encode(text)

    def _turn_options(self, prompt: int) -> dict[str, Any]:
        room = self.room - prompt
        if room < 1:
            raise ContextLengthError(
                f"the conversation has {prompt} tokens and there is room for {self.room}: nothing is cut silently. "
                "/reset begins a new one"
            )
        options = dict(self._options)
        options["eos_token_id"] = self._ends
        defaults = self._model.generation_defaults
        if "max_new_tokens" in options:
            options["max_new_tokens"] = min(options["max_new_tokens"], room)
        elif self.is_templated and defaults.max_new_tokens is None and defaults.max_length is None:
            # A turn has an end of its own.
            options["max_new_tokens"] = room
        if "seed" in options:
            # Each answer a seed of its own, or /regen would give the same again.
            options["seed"] = (options["seed"] + self._answers) % 2**64
        return options

    def _rewind_to(self, ids: list[int]) -> list[int]:
        """Goes back to where the session's tokens differ from `ids`; returns those that it has yet to read."""
        held = self._session.tokens
        # One at least is read: the next token's logits come from it.
        most = min(len(held), len(ids) - 1)
        shared = next((index for index in range(most) if held[index] != ids[index]), most)
        self._session.rewind(shared)
        return ids[shared:]


def _session(model: LlamaForCausalLM, context: int | None) -> Session:
    most = model.config.max_position_embeddings
    if context is not None:
        if context < 1:
            raise OptionError(f"--context must be at least 1, got {context}")
        if context > most:
            raise ContextLengthError(f"--context={context} is beyond the model's context of {most}")
        return model.session(context)
    while most // 2 >= _LEAST_ROOM:
        with contextlib.suppress(OutOfMemoryError):
            return model.session(most)
        most //= 2
    return model.session(most)


def _message(value: object, index: int, path: str) -> dict[str, str]:
    field = f"messages[{index}]"
    if not isinstance(value, dict):
        raise FormatError(f"{field} must be an object", path=path, field=field)
    role, content = value.get("role"), value.get("content")
    if role not in _ROLES or (role == "system" and index > 0):
        raise FormatError(f"{field}: role {role!r} is not expected here", path=path, field=field)
    if not isinstance(content, str):
        raise FormatError(f"{field}: content must be a text", path=path, field=field)
    if not _is_text(content):
        raise FormatError(
            f"{field}: content has half of a surrogate pair, which is no character", path=path, field=field
        )
    return {"role": str(role), "content": content}


def _is_text(text: str) -> bool:
    """Whether a model can read it and a file hold it: what JSON escapes, or an argument that is not UTF-8, may be something else."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _at_home(path: str) -> str:
    """A path with a home directory for its ~; where it has a NUL character, whoever opens it says what is wrong."""
    return path if "\0" in path else os.path.expanduser(path)
