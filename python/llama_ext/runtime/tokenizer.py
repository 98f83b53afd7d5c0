"""Text to token ids and back, as Hugging Face transformers does it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from llama_ext._arrays import as_whole
from llama_ext._options import shown
from llama_ext.errors import OptionError, TokenIdError
from llama_ext.io.atomic import path_text
from llama_ext.io.hub import resolve_small_files
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.runtime.chat_template import DEFAULT_TEMPLATE_LIMITS, TemplateLimits, render_chat_template
from llama_ext.runtime.text_stream import DecodePlan, TextStream, decode_plan
from llama_ext.runtime.tokenizer_backend import (
    add_special_tokens,
    check_utf8,
    copy_backend,
    set_post_processor,
    special_token,
    typed_errors,
)
from llama_ext.runtime.tokenizer_files import load_tokenizer, tokenizer_files, write_tokenizer_files

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer"]

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
# Options of transformers' apply_chat_template that change its result. As template variables they would do nothing.
_UNSUPPORTED_TEMPLATE_OPTIONS = frozenset(
    {
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenizer_kwargs",
        "truncation",
    }
)


class Tokenizer:
    """A tokenizer: text to ids, ids to text, conversations to prompts.

    Made by `from_pretrained`, `from_tokenizers`, `characters` or `train`. It never truncates and never pads, whatever the file
    says, and may be used by several threads.

    Attributes:
        backend: The `tokenizers.Tokenizer` that does the work.
        chat_template: The Jinja chat template, a dictionary of named ones, or None.
        model_max_length: The context the tokenizer's config names, in tokens; None when it names none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        tokens: Mapping[str, str | None],
        *,
        chat_template: str | dict[str, str] | None = None,
        model_max_length: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Not for direct use: see `from_tokenizers`."""
        self.backend = backend
        self.chat_template = chat_template
        self.model_max_length = model_max_length
        self._tokens = {name: tokens.get(name) for name in _NAMED}
        self._config = dict(config or {})
        self._special_ids = frozenset(
            index for index, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._alphabet: frozenset[str] | None = None
        self._specials: re.Pattern[str] | None = None
        if self._config.get("unknown_characters") == "raise":
            special = {token.content for token in backend.get_added_tokens_decoder().values()}
            self._alphabet = frozenset(backend.get_vocab()) - special
            written = sorted(map(re.escape, special), key=len, reverse=True)
            self._specials = re.compile("|".join(written)) if written else None

    # -- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, revision: str | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> Tokenizer:
        """Load a tokenizer from disk.

        `tokenizer.json` decides how text is split; when there is none, `tokenizer.model` (SentencePiece) does. Special
        tokens, chat templates and the rest come from the files beside it: `tokenizer_config.json`,
        `special_tokens_map.json`, `chat_template.jinja`, `added_tokens.json`. BOS and EOS are added as the
        post-processor in `tokenizer.json` says, unless the config has `add_bos_token` or `add_eos_token`. With a
        `tokenizer.model` alone, BOS is added unless the config says otherwise, as Llama's reference code does.

        Args:
            path: A directory, or a `tokenizer.json`, `tokenizer.model` or GGUF file. A directory with neither of the first
                two may have one GGUF file, whose tokenizer it is. "demo" or a Hub id, as for `LlamaForCausalLM`.
            revision: Of the Hub: a branch, tag or commit.
            limits: Bounds on what the files may ask for.

        Returns:
            The tokenizer.

        Raises:
            FormatError: There is no tokenizer at `path`, or one of its files is malformed.
            LimitError: A file, or the vocabulary, is larger than `limits` allow.
            OptionError: `path` is no path, or a revision of something that is not on the Hub.
            UnsupportedError: A tiktoken file, or a kind of SentencePiece model or of a GGUF file's tokenizer that is not
                supported; a Hub id, and huggingface_hub is not installed.
        """
        path_text(path, "the path of a tokenizer")
        return load_tokenizer(cls, resolve_small_files(path, revision), limits)

    @classmethod
    def from_tokenizers(
        cls,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        unk_token: str | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        chat_template: str | dict[str, str] | None = None,
        model_max_length: int | None = None,
    ) -> Tokenizer:
        """Wrap a tokenizer of the `tokenizers` package.

        Args:
            backend: The tokenizer. It is copied: later changes to it have no effect here.
            bos_token: The token that begins a sequence.
            eos_token: The token that ends one.
            pad_token: The token for padding.
            unk_token: The token for unknown text.
            add_bos_token: Whether `encode` adds BOS; None: as the tokenizer's post-processor says.
            add_eos_token: Whether `encode` adds EOS; None: as the tokenizer's post-processor says. If either of the two
                is given, the post-processor is replaced, as in transformers.
            chat_template: A Jinja chat template, or named ones.
            model_max_length: The model's context in tokens.

        Returns:
            The tokenizer. A named token that the vocabulary lacks is added behind it, as in transformers.

        Raises:
            OptionError: `backend` is no such tokenizer, or has a part written in Python; a token is not a text, or is empty.
        """
        backend = copy_backend(backend)
        given = zip(_NAMED, (bos_token, eos_token, pad_token, unk_token), strict=True)
        tokens = {name: None if token is None else special_token(token) for name, token in given}
        config: dict[str, Any] = {}
        with typed_errors("the special tokens cannot be used", kind=OptionError):
            add_special_tokens(backend, [token for token in tokens.values() if token is not None])
            if add_bos_token is not None or add_eos_token is not None:
                config = {"add_bos_token": bool(add_bos_token), "add_eos_token": bool(add_eos_token)}
                set_post_processor(backend, tokens, bos=bool(add_bos_token), eos=bool(add_eos_token))
        return cls(backend, tokens, chat_template=chat_template, model_max_length=model_max_length, config=config)

    @classmethod
    def characters(cls, text: str | Iterable[str], *, unknown: Literal["raise", "replace"] = "raise") -> Tokenizer:
        """Make a tokenizer with one token per character (Unicode code point), and no special tokens.

        Any text of the given characters survives `decode(encode(text))` exactly, white space included.

        Args:
            text: The characters, in any order and number: a text to learn them from, or a collection of characters.
                Ids follow code point order.
            unknown: What `encode` does with another character. `raise`: OptionError, naming it. `replace`: it becomes
                U+FFFD, which then is one of the tokens. The choice is kept by `save_pretrained` and `from_pretrained`;
                transformers, which has no such choice, leaves the character out for `raise`.

        Returns:
            The tokenizer.

        Raises:
            OptionError: There are no characters, an item is not a single character, or `unknown` is something else.
        """
        from llama_ext.runtime.tokenizer_training import character_backend

        return cls(character_backend(text, unknown), {}, config={"unknown_characters": unknown})

    @classmethod
    def train(
        cls,
        texts: str | Iterable[str],
        vocab_size: int | None = None,
        kind: Literal["bpe", "char"] = "bpe",
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        unknown: Literal["raise", "replace"] = "raise",
    ) -> Tokenizer:
        """Learn a tokenizer from texts. `save_pretrained` writes it as files that transformers loads.

        Args:
            texts: A text, or texts; for "bpe" all of them are in memory at once.
            vocab_size: Tokens at most. "bpe": at least 256 and the special tokens; fewer come out when the texts are too short;
                None is 1,024. "char": None has no limit.
            kind: "bpe": byte-level byte pair encoding, as in GPT-2 and Llama 3: it knows every text. "char": a token per
                character.
            bos_token, eos_token, pad_token: Special tokens to have, such as "</s>"; `encode` adds none of them by itself.
            unknown: Of "char", see `characters`; with "replace" only the most frequent characters get a token where `vocab_size`
                has no room for all.

        Returns:
            The tokenizer. The same texts in the same order give the same one.

        Raises:
            OptionError: There is no text, an option is out of range, or there are more characters than `vocab_size`.
        """
        from llama_ext.runtime.tokenizer_training import train_tokenizer

        special = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        return train_tokenizer(cls, texts, vocab_size, kind, special=special, unknown=unknown)

    # -- text and ids -----------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Split a text into token ids.

        Special tokens written out in the text (`</s>`) become those tokens, as in transformers: do not encode text from
        strangers together with a prompt of your own when that matters.

        Args:
            text: The text; never truncated.
            add_special_tokens: Add BOS or EOS as the tokenizer is set up to.

        Returns:
            The ids.

        Raises:
            OptionError: The text is not a str, has half of a surrogate pair, or a character that a `characters`
                tokenizer does not know.
        """
        checked = self._checked(text)
        with typed_errors("the tokenizer fails on this text"):
            return list(self.backend.encode(checked, add_special_tokens=add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Split several texts, in parallel.

        Args:
            texts: The texts.
            add_special_tokens: As in `encode`.

        Returns:
            The ids of each text, the same as `encode` gives.

        Raises:
            OptionError: `texts` is one str or no list, or one of the texts fails as in `encode`.
        """
        if isinstance(texts, str):
            raise OptionError("encode_batch: expected a list of texts, got one str. Use encode")
        if not isinstance(texts, Iterable):
            raise OptionError(f"encode_batch: expected a list of texts, got {type(texts).__name__}")
        checked = [self._checked(text) for text in texts]
        with typed_errors("the tokenizer fails on these texts"):
            return [
                list(item.ids) for item in self.backend.encode_batch(checked, add_special_tokens=add_special_tokens)
            ]

    def _checked(self, text: object) -> str:
        if not isinstance(text, str):
            raise OptionError(f"encode: expected a str, got {type(text).__name__}. Use encode_batch for several texts")
        check_utf8(text, "encode: the text", ". Was it decoded with errors='surrogateescape'?")
        if self._alphabet is not None:
            # Special tokens that are written out are no characters; most texts have none to look for.
            unknown = set(text) - self._alphabet
            if unknown and self._specials is not None:
                unknown = set(self._specials.sub("", text)) - self._alphabet
            if unknown:
                found = ", ".join(repr(letter) for letter in sorted(unknown)[:10])
                raise OptionError(
                    f"encode: this tokenizer knows {len(self._alphabet)} characters, and not {found}."
                    " Make it with unknown='replace', or from a text with these characters"
                )
        return text

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text.

        Args:
            ids: Token ids: a list, or a one-dimensional integer array.
            skip_special_tokens: Leave special tokens out.

        Returns:
            The text, as transformers gives it, with one difference: byte tokens (`<0xE2>`) that do not make a character
            give one U+FFFD each, as in SentencePiece, and leave their neighbours alone. No "clean-up" of spaces.

        Raises:
            TokenIdError: An id is outside the vocabulary.
            OptionError: An id is not an integer.
        """
        if not isinstance(ids, Iterable):
            raise OptionError(f"ids must be a list of token ids, got {type(ids).__name__}")
        indices = [self._index(token) for token in ids]
        with typed_errors("the tokenizer fails on these ids"):
            text: str = self.backend.decode(indices, skip_special_tokens=skip_special_tokens)
        if self.decode_plan.byte_fallback and "\ufffd" in text:
            # `tokenizers` replaces every byte of a run as soon as one is wrong.
            stream = TextStream(self, skip_special_tokens=skip_special_tokens)
            text = "".join([*map(stream.push, indices), stream.flush()])
        return text

    def has_id(self, token_id: int) -> bool:
        """Whether `decode` takes an id: up to the number of tokens all, and behind a gap in the vocabulary those of a token.

        Args:
            token_id: Any whole number.
        """
        return 0 <= token_id < self._size or (
            self._size <= token_id < 2**32 and self.backend.id_to_token(token_id) is not None
        )

    def _index(self, token: Any) -> int:
        index = as_whole(token)
        if index is None:
            raise OptionError(f"token ids must be integers, got {shown(token)} ({type(token).__name__})")
        if not self.has_id(index):
            raise TokenIdError(
                f"token id {shown(index)} is outside the tokenizer's vocabulary: expected 0 <= id < {self._size}"
            )
        return index

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None when the vocabulary has no such token.

        Raises:
            OptionError: The token is not a str, or has half of a surrogate pair.
        """
        if not isinstance(token, str):
            raise OptionError(f"token_to_id: expected a str, got {type(token).__name__}")
        check_utf8(token, "token_to_id: the token")
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id, as the vocabulary writes it.

        Args:
            token_id: An id in [0, vocabulary).

        Returns:
            The token; None for an id that the vocabulary leaves out.

        Raises:
            TokenIdError: The id is outside the vocabulary.
            OptionError: The id is not an integer.
        """
        return self.backend.id_to_token(self._index(token_id))

    # -- conversations ----------------------------------------------------------------------------------------------

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tokenize: Literal[True] = True,
        limits: TemplateLimits = DEFAULT_TEMPLATE_LIMITS,
        **kwargs: Any,
    ) -> list[int]: ...
    @overload
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: Literal[False], **kwargs: Any
    ) -> str: ...
    @overload
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool, **kwargs: Any
    ) -> list[int] | str: ...
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tokenize: bool = True,
        limits: TemplateLimits = DEFAULT_TEMPLATE_LIMITS,
        **kwargs: Any,
    ) -> list[int] | str:
        """Turn a conversation into a prompt, in the format the model was trained on.

        Args:
            messages: The messages, in order: `{"role": "user", "content": "..."}`.
            tools: JSON schemas of functions that the model may call.
            documents: Documents, for templates that take them.
            chat_template: A template, or the name of one of several, to use instead of the tokenizer's.
            add_generation_prompt: End with the words that open the assistant's turn. (Its default in transformers is
                False. Pass False for training data, and with `continue_final_message`.)
            continue_final_message: Leave the last message open, for the model to continue.
            tokenize: Give token ids; False: give the text.
            limits: What rendering may use up.
            **kwargs: More variables for the template.

        Returns:
            A list of ids, or the text. The template writes BOS itself, so ids are made without adding special tokens;
            encode the text likewise with `add_special_tokens=False`.

        Raises:
            OptionError: There is no chat template, the template refuses the messages, or an option is not supported.
            FormatError: The template has an error.
            LimitError: The template, the messages or the rendering exceed `limits`.
        """
        for name, value in kwargs.items():
            if name in _UNSUPPORTED_TEMPLATE_OPTIONS and value not in (None, False):
                raise OptionError(f"apply_chat_template: {name} is not supported; the result is a list of ids or a str")
        text = render_chat_template(
            self._choose_template(chat_template, tools),
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**{name: token for name, token in self._tokens.items() if token is not None}, **kwargs},
            limits=limits,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _choose_template(self, wanted: str | None, tools: object) -> str | None:
        own = self.chat_template
        if not isinstance(own, dict):
            return own if wanted is None else wanted
        if wanted is not None:
            return own.get(wanted, wanted)
        if tools is not None and "tool_use" in own:
            return own["tool_use"]
        if "default" not in own:
            raise OptionError(f"this model has several chat templates: pass chat_template, one of {sorted(own)}")
        return own["default"]

    # -- properties -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def decode_plan(self) -> DecodePlan:
        """How this tokenizer's tokens become text, for `TextStream`."""
        return decode_plan(self.backend)

    @functools.cached_property
    def _size(self) -> int:
        return len(self)

    @property
    def vocab_size(self) -> int:
        """The number of tokens without added ones, as in transformers; `len(tokenizer)` counts those too."""
        return int(self.backend.get_vocab_size(with_added_tokens=False))

    def __len__(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out by default."""
        return self._special_ids

    @property
    def bos_token(self) -> str | None:
        """The token that begins a sequence, if the model has one."""
        return self._tokens["bos_token"]

    @property
    def eos_token(self) -> str | None:
        """The token that ends a sequence, if the model has one."""
        return self._tokens["eos_token"]

    @property
    def pad_token(self) -> str | None:
        """The token for padding, if the model has one."""
        return self._tokens["pad_token"]

    @property
    def unk_token(self) -> str | None:
        """The token for unknown text, if the model has one."""
        return self._tokens["unk_token"]

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`, or None."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`, or None."""
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id of `pad_token`, or None."""
        return self._named_id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """The id of `unk_token`, or None."""
        return self._named_id("unk_token")

    def _named_id(self, name: str) -> int | None:
        token = self._tokens[name]
        return None if token is None else self.token_to_id(token)

    def __repr__(self) -> str:
        kind = type(self.backend.model).__name__
        return f"Tokenizer({kind}, {len(self)} tokens, bos={self.bos_token!r}, eos={self.eos_token!r})"

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer as Hugging Face's files, readable by transformers and by `from_pretrained`.

        Writes `tokenizer.json`, `tokenizer_config.json` (with the chat template in it) and `chat_template.jinja`;
        named templates go to `additional_chat_templates/` as well. Each file is replaced atomically.

        Args:
            directory: Created when it does not exist.

        Raises:
            OptionError: `directory` is no path, or something of the tokenizer cannot be written: a chat template that is not a
                text or has half of a surrogate pair, or a part written in Python. Nothing is written then.
            LimitError: A chat template is larger than what `from_pretrained` reads. Nothing is written.
            OSError: The directory cannot be written.
        """
        write_tokenizer_files(self._files(), directory)

    def _files(self) -> dict[str, bytes]:
        """What `save_pretrained` writes."""
        return tokenizer_files(self.backend, self._tokens, self.chat_template, self.model_max_length, self._config)
