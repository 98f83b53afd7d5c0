"""What is done to a tokenizer of the `tokenizers` package, wherever it comes from: its errors, its special tokens, a copy of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from llama_ext._options import shown
from llama_ext.errors import FormatError, LlamaExtError, OptionError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["add_special_tokens", "check_utf8", "copy_backend", "set_post_processor", "special_token", "typed_errors"]


@contextlib.contextmanager
def typed_errors(
    message: str, path: str | None = None, kind: type[FormatError | OptionError] = FormatError
) -> Iterator[None]:
    """Turn what the `tokenizers` package raises, bare exceptions and Rust panics, into a typed error.

    Args:
        message: What failed.
        path: The file to blame, where it is known.
        kind: The error; OptionError where a caller is to blame and no file.
    """
    try:
        yield
    except LlamaExtError:
        raise
    except BaseException as error:
        # A panic derives from BaseException, and its class has no importable name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        told = f"{message}: {str(error)[:500]}"
        raise (OptionError(told) if kind is OptionError else FormatError(told, path=path)) from error


def check_utf8(text: str, what: str, advice: str = "") -> None:
    """Refuses a text that neither a file nor the `tokenizers` package takes.

    Args:
        text: The text.
        what: What it is, for the message.
        advice: What to do, for the message.

    Raises:
        OptionError: It has half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OptionError(
            f"{what} has half of a surrogate pair ({text[error.start]!a}) at index {error.start}{advice}"
        ) from error


def special_token(value: object) -> str:
    """What a caller gives for a special token.

    Raises:
        OptionError: It is not a text, is empty, or has half of a surrogate pair.
    """
    if not isinstance(value, str) or not value:
        raise OptionError(f"a special token must be a text that is not empty, got {shown(value)}")
    check_utf8(value, f"the special token {value!a:.80}")
    return value


def add_special_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str | tokenizers.AddedToken]) -> None:
    """Make tokens special that are not yet, adding those the vocabulary lacks behind it.

    Args:
        backend: The tokenizer to change.
        tokens: Tokens, or their texts. One that is special already keeps the way it is matched.
    """
    from tokenizers import AddedToken

    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for token in tokens:
        added = AddedToken(token, normalized=False, special=True) if isinstance(token, str) else token
        if added.content not in special:
            backend.add_special_tokens([added])
            special.add(added.content)


def set_post_processor(
    backend: tokenizers.Tokenizer, tokens: Mapping[str, str | None], *, bos: bool, eos: bool
) -> None:
    """Replace the post-processor by one that adds BOS, EOS, both or nothing.

    Args:
        backend: The tokenizer to change.
        tokens: `bos_token` and `eos_token`; one that is None is not added, as in transformers.
        bos: Whether to add BOS.
        eos: Whether to add EOS.
    """
    from tokenizers import processors

    first = tokens.get("bos_token") if bos else None
    last = tokens.get("eos_token") if eos else None
    # In a template a token goes by itself, where other readers of tokenizer.json look for it. But there $ begins a sequence and a
    # colon a type.
    odd = any(token is not None and (token.startswith("$") or ":" in token) for token in (first, last))
    begin = {} if first is None else {"bos" if odd else first: first}
    end = {} if last is None else {"eos" if odd else last: last}
    backend.post_processor = processors.TemplateProcessing(
        single=[f"{t}:0" for t in begin] + ["$A:0"] + [f"{t}:0" for t in end],
        pair=[f"{t}:0" for t in begin]
        + ["$A:0"]
        + [f"{t}:0" for t in end]
        + [f"{t}:1" for t in begin]
        + ["$B:1"]
        + [f"{t}:1" for t in end],
        special_tokens=[
            {"id": name, "ids": [backend.token_to_id(token)], "tokens": [token]}
            for name, token in {**begin, **end}.items()
        ],
    )


def copy_backend(backend: object) -> tokenizers.Tokenizer:
    """A copy that shares nothing, without truncation and padding.

    Raises:
        OptionError: It is not a tokenizer of the `tokenizers` package, or has a part written in Python, which has no copy.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers.implementations.base_tokenizer import BaseTokenizer

    # Such as ByteLevelBPETokenizer, which is a shell.
    inner = backend._tokenizer if isinstance(backend, BaseTokenizer) else backend
    if not isinstance(inner, Backend):
        raise OptionError(
            f"expected a tokenizers.Tokenizer, got {type(backend).__name__}. Of a fast tokenizer of transformers it is "
            "backend_tokenizer; a directory or a file is for Tokenizer.from_pretrained"
        )
    with typed_errors("the tokenizer cannot be copied", kind=OptionError):
        copied: tokenizers.Tokenizer = copy.deepcopy(inner)
    copied.no_truncation()
    copied.no_padding()
    return copied
