"""A tokenizer learned from texts: byte-level BPE, or one token per character."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from llama_ext._arrays import as_whole
from llama_ext._options import shown
from llama_ext.errors import OptionError
from llama_ext.limits import DEFAULT_LIMITS
from llama_ext.runtime.tokenizer_backend import check_utf8, special_token, typed_errors

if TYPE_CHECKING:
    import tokenizers

    from llama_ext.runtime.tokenizer import Tokenizer

__all__ = ["character_backend", "train_tokenizer"]

_BYTES = 256
# Tokens of byte-level BPE when nobody says how many: the command's number as well.
_DEFAULT_SIZE = 1024
_REPLACEMENT = "\ufffd"


def train_tokenizer(
    cls: type[Tokenizer],
    texts: str | Iterable[str],
    vocab_size: int | None,
    kind: str,
    *,
    special: Mapping[str, str | None],
    unknown: Literal["raise", "replace"],
) -> Tokenizer:
    """The body of `Tokenizer.train`."""
    if kind not in ("bpe", "char"):
        raise OptionError(f"kind must be bpe or char, got {kind!r}")
    names = list(dict.fromkeys(special_token(token) for token in special.values() if token is not None))
    if kind == "char":
        return _characters(cls, texts, vocab_size, special, len(names), unknown)
    if unknown != "raise":
        raise OptionError("unknown belongs to kind='char': byte-level BPE knows every text")
    wanted = _DEFAULT_SIZE if vocab_size is None else vocab_size
    size = _size(wanted, _BYTES + len(names), "256 bytes and the special tokens")
    backend = _bpe(_checked(texts), size, names)
    # Trained with its special tokens, which therefore have the first ids.
    return cls.from_tokenizers(backend, **_named(special))


def character_backend(text: str | Iterable[str], unknown: str) -> tokenizers.Tokenizer:
    """What `Tokenizer.characters` works with.

    Raises:
        OptionError: As there.
    """
    if unknown not in ("raise", "replace"):
        raise OptionError(f"unknown: expected 'raise' or 'replace', got {unknown!r}")
    try:
        letters: set[Any] = set(text)
    except TypeError as error:  # not iterable, or of things that cannot be in a set
        raise OptionError(f"characters: expected a text or single characters, got {shown(text)}") from error
    for letter in letters:
        if not isinstance(letter, str) or len(letter) != 1:
            raise OptionError(f"characters: expected single characters, got {letter!r}")
        if "\ud800" <= letter <= "\udfff":
            raise OptionError(f"characters: {letter!r} is half of a surrogate pair, which is not a character")
    if not letters:
        raise OptionError("characters: the text is empty. Give a text with every character the model should know")
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    if unknown == "replace":
        letters.add(_REPLACEMENT)
    # BPE without merges: each character stays a token. No special token, so no text is mistaken for one.
    vocabulary = {letter: index for index, letter in enumerate(sorted(letters))}
    unk_token = _REPLACEMENT if unknown == "replace" else None
    backend: Any = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token=unk_token))
    backend.decoder = decoders.Fuse()
    result: tokenizers.Tokenizer = backend
    return result


def _named(special: Mapping[str, str | None]) -> dict[str, Any]:
    return dict(special)


def _size(vocab_size: object, least: int, what: str) -> int:
    size = as_whole(vocab_size)
    if size is None or not least <= size <= DEFAULT_LIMITS.vocabulary:
        raise OptionError(
            f"vocab_size must be a whole number in [{least}, {DEFAULT_LIMITS.vocabulary}], room for {what}, got {shown(vocab_size)}"
        )
    return size


def _checked(texts: str | Iterable[str]) -> Iterable[str]:
    if not isinstance(texts, Iterable):
        raise OptionError(f"expected a text or texts, got {type(texts).__name__}")
    found = False
    for index, text in enumerate([texts] if isinstance(texts, str) else texts):
        if not isinstance(text, str):
            raise OptionError(f"texts[{index}] must be a text, got {type(text).__name__}")
        check_utf8(text, f"texts[{index}]")
        found = found or bool(text)
        yield text
    if not found:
        raise OptionError("there is no text to learn a tokenizer from")


def _bpe(texts: Iterable[str], size: int, special: list[str]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend: Any = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        # Every byte is a token, so every text can be encoded.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Checked beforehand: what an iterator raises inside comes out as another exception.
    listed = list(texts)
    with typed_errors("the tokenizer cannot be trained on these texts"):
        backend.train_from_iterator(listed, trainer)
    result: tokenizers.Tokenizer = backend
    return result


def _characters(
    cls: type[Tokenizer],
    texts: str | Iterable[str],
    vocab_size: int | None,
    special: Mapping[str, str | None],
    specials: int,
    unknown: Literal["raise", "replace"],
) -> Tokenizer:
    counts: Counter[str] = Counter()
    for text in _checked(texts):
        counts.update(text)
    letters = set(counts)
    if vocab_size is not None:
        most = _size(vocab_size, specials + 1, "a character and the special tokens") - specials
        if unknown == "replace":
            letters.discard(_REPLACEMENT)
            most -= 1
        if len(letters) > most:
            if unknown != "replace":
                raise OptionError(
                    f"the texts have {len(letters)} characters and vocab_size leaves room for {most}: raise it, or let rare "
                    "characters become U+FFFD with unknown='replace'"
                )
            # The most frequent ones; of equally frequent ones the first in code point order.
            letters = set(sorted(letters, key=lambda letter: (-counts[letter], letter))[:most])
    plain = cls.characters(letters or {_REPLACEMENT}, unknown=unknown)
    if not specials:
        return plain
    named = cls.from_tokenizers(plain.backend, **_named(special))
    return cls(
        named.backend,
        special,
        config={"unknown_characters": unknown},
    )
