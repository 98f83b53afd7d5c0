"""The tokenizer in a GGUF file's metadata, as a `Tokenizer`: SentencePiece's BPE ("llama") and byte-level BPE ("gpt2").

A token's type is SentencePiece's: normal, unknown, control, user-defined, unused, byte. Control tokens are special:
written out in a text they become that token, and decoding leaves them out.

Source: ggml, `docs/gguf.md`; llama.cpp, `llama-vocab.cpp` (defaults of absent keys).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from llama_ext._options import shown
from llama_ext.errors import FormatError, LimitError, UnsupportedError
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.models.fields import FieldReader
from llama_ext.runtime import sentencepiece_model as spm
from llama_ext.runtime.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from llama_ext.runtime.tokenizer_backend import add_special_tokens, set_post_processor, typed_errors

if TYPE_CHECKING:
    import tokenizers

    from llama_ext.runtime.tokenizer import Tokenizer

__all__ = ["BYTE_PIECE", "KEY", "TEMPLATE_KEY", "end_of_generation_ids", "load_gguf_tokenizer"]

KEY = "tokenizer.ggml."
TEMPLATE_KEY = "tokenizer.chat_template"
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_NAMED = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
# Ends of a turn that many files do not list among their ids.
_ENDS = frozenset({"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>"})


def load_gguf_tokenizer(
    cls: type[Tokenizer], metadata: Mapping[str, Any], *, path: str, limits: Limits = DEFAULT_LIMITS
) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Args:
        cls: `Tokenizer`.
        metadata: Of the file.
        path: The file, for messages.
        limits: The bounds.

    Returns:
        The tokenizer. BOS and EOS are added as the file says; when it does not say, BOS is added by the kind "llama"
        and by Llama 3's. A kind "gpt2" that does not name its way of cutting words is cut as Llama 3 does when its
        vocabulary has Llama 3's <|begin_of_text|>, else as "default".

    Raises:
        FormatError: There is no tokenizer, or it is malformed.
        LimitError: The vocabulary, or one of its tokens, is beyond the limits.
        UnsupportedError: Another kind of tokenizer, or way of cutting words; the message names it.
    """
    source = _Source(metadata, path, limits)
    kind = source.reader.optional_text(KEY + "model")
    if kind is None:
        source.fail("model", "there is no tokenizer in this file.")
    if kind not in ("llama", "gpt2"):
        source.reader.refuse(f"{KEY}model {shown(kind)} is not supported. Supported: llama, gpt2.")
    with typed_errors("the tokenizer cannot be used", path):
        backend, adds_bos = _sentencepiece(source) if kind == "llama" else _byte_level(source)
        tokens = {name: source.named(key) for name, key in _NAMED.items()}
        add_special_tokens(backend, [token for token in tokens.values() if token is not None])
        config = {
            "add_bos_token": source.reader.boolean(KEY + "add_bos_token", adds_bos),
            "add_eos_token": source.reader.boolean(KEY + "add_eos_token", False),
        }
        set_post_processor(backend, tokens, bos=config["add_bos_token"], eos=config["add_eos_token"])
    return cls(
        backend,
        tokens,
        chat_template=_templates(source.reader),
        model_max_length=_context(metadata),
        config=config,
    )


def end_of_generation_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that end a text or a turn: EOS, EOT and EOM by their keys, and control tokens known to end turns.

    Args:
        metadata: Of a file whose tokenizer, if it has one, was loaded.

    Returns:
        Ids, each once; EOS first. Without a tokenizer they may be beyond the model's vocabulary.
    """
    found = [metadata.get(f"{KEY}{name}_token_id") for name in ("eos", "eot", "eom")]
    ids = [int(index) for index in found if isinstance(index, int)]
    tokens, types = metadata.get(KEY + "tokens", []), metadata.get(KEY + "token_type")
    if isinstance(types, np.ndarray) and len(types) == len(tokens):
        special = np.flatnonzero((types == spm.CONTROL) | (types == spm.USER_DEFINED)).tolist()
        ids += [index for index in special if tokens[index] in _ENDS]
    return [index for index in dict.fromkeys(ids) if index >= 0 and (index < len(tokens) or not len(tokens))]


class _Source:
    """The vocabulary of a file, checked."""

    def __init__(self, metadata: Mapping[str, Any], path: str, limits: Limits) -> None:
        self.reader = FieldReader(metadata, path=path, limits=limits)
        self.path = path
        tokens = self._strings("tokens")
        if not tokens:
            self.fail("tokens", "there are no tokens.")
        self.reader.check_limit(f"the number of {KEY}tokens", len(tokens), "vocabulary")
        longest = max(map(len, tokens))
        if longest > spm.MAX_PIECE_CHARACTERS:
            raise LimitError(
                f"{path}: a token of {longest} characters, at most {spm.MAX_PIECE_CHARACTERS} are accepted."
            )
        # A vocabulary has one token for a text; this is how llama.cpp tells empty ones apart.
        self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
        if len(set(self.tokens)) != len(tokens):
            seen: dict[str, int] = {}
            for index, token in enumerate(self.tokens):
                if seen.setdefault(token, index) != index:
                    self.fail("tokens", f"tokens {seen[token]} and {index} are both {shown(token)}.")
        self.types = self._types()

    def fail(self, name: str, message: str) -> NoReturn:
        raise FormatError(f"{KEY}{name}: {message}", path=self.path, field=KEY + name)

    def _strings(self, name: str) -> list[str]:
        value = self.reader.values.get(KEY + name)
        if isinstance(value, np.ndarray) and not value.size:
            value = []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.reader.fail(KEY + name, "an array of strings", None if value is None else type(value).__name__)
        return value

    def numbers(self, name: str, kinds: str) -> list[Any] | None:
        """An array with a number for each token; None when it is absent."""
        value = self.reader.values.get(KEY + name)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            self.reader.fail(KEY + name, "an array of numbers", type(value).__name__)
        if len(value) != len(self.tokens):
            self.reader.fail(KEY + name, f"an array of {len(self.tokens)}, one for each token", len(value))
        if not np.isfinite(value).all():
            self.fail(name, "there is a number that is not finite.")
        numbers: list[Any] = value.tolist()
        return numbers

    def _types(self) -> list[int]:
        types = self.numbers("token_type", "iu")
        if types is None:
            types = [spm.BYTE if BYTE_PIECE.fullmatch(token) else spm.NORMAL for token in self.tokens]
            for name in ("bos", "eos", "padding"):
                index = self.index(name)
                if index is not None:
                    types[index] = spm.CONTROL
        for index, kind in enumerate(types):
            if not spm.NORMAL <= kind <= spm.BYTE:
                self.fail("token_type", f"token {index} has the type {kind}, expected 1 to 6.")
            if not self.reader.values[KEY + "tokens"][index]:
                types[index] = spm.UNUSED
        return types

    def index(self, name: str) -> int | None:
        """The id of a named token. A padding or unknown token beyond the vocabulary is none, as converters write it."""
        index = self.reader.token_id(f"{KEY}{name}_token_id", None)
        if index is not None and index >= len(self.tokens):
            if name in ("padding", "unknown"):
                return None
            self.reader.fail(f"{KEY}{name}_token_id", f"an id below {len(self.tokens)}", index)
        return index

    def named(self, name: str) -> str | None:
        index = self.index(name)
        return None if index is None else self.tokens[index]

    def merges(self) -> list[tuple[str, str]]:
        pairs = []
        for index, text in enumerate(self._strings("merges")):
            at = text.find(" ", 1)
            if at < 0:
                self.fail("merges", f"merge {index} is {shown(text)}, expected two tokens with a space between.")
            pairs.append((text[:at], text[at + 1 :]))
        return pairs


def _sentencepiece(source: _Source) -> tuple[tokenizers.Tokenizer, bool]:
    scores = source.numbers("scores", "f")
    if scores is None:
        source.fail("scores", "the tokens have no scores, which decide what is merged first.")
    types = list(source.types)
    if spm.UNKNOWN not in types:
        types[source.index("unknown") or 0] = spm.UNKNOWN
    charsmap = source.reader.values.get(KEY + "precompiled_charsmap")
    model = spm.SentencePieceModel(
        pieces=source.tokens,
        scores=scores,
        types=types,
        model_type=spm.BPE,
        byte_fallback=spm.BYTE in types,
        charsmap=charsmap.tobytes() if isinstance(charsmap, np.ndarray) else b"",
        add_dummy_prefix=source.reader.boolean(KEY + "add_space_prefix", True),
        remove_extra_whitespaces=source.reader.boolean(KEY + "remove_extra_whitespaces", False),
    )
    spm.check_sentencepiece(model, source.path)
    return spm.build_tokenizer(model, source.path), True


def _byte_level(source: _Source) -> tuple[tokenizers.Tokenizer, bool]:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _pre_tokenizer(source)
    vocabulary = {token: index for index, token in enumerate(source.tokens)}
    core = models.BPE(vocab=vocabulary, merges=source.merges(), ignore_merges=pre.ignore_merges)
    backend = Tokenizer(core)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    typed = list(zip(source.tokens, source.types, strict=True))
    special = [token for token, kind in typed if kind in (spm.CONTROL, spm.UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    plain = [token for token, kind in typed if kind == spm.USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    return backend, pre.adds_bos


def _pre_tokenizer(source: _Source) -> PreTokenizer:
    name = source.reader.optional_text(KEY + "pre")
    if name in (None, "default"):
        name = "llama-bpe" if "<|begin_of_text|>" in source.tokens else "default"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{source.path}: {KEY}pre {shown(name)} is not supported: text would be cut into other words. "
            f"Supported: {', '.join(sorted(PRE_TOKENIZERS))}."
        )
    return PRE_TOKENIZERS[name]


def _templates(reader: FieldReader) -> str | dict[str, str] | None:
    default = reader.optional_text(TEMPLATE_KEY)
    names = reader.values.get(TEMPLATE_KEY + "s")
    found = {} if default is None else {"default": default}
    for name in names if isinstance(names, Sequence) and not isinstance(names, str) else ():
        template = reader.optional_text(f"{TEMPLATE_KEY}.{name}")
        if template is not None:
            found.setdefault(str(name), template)
    return default if set(found) <= {"default"} else found


def _context(metadata: Mapping[str, Any]) -> int | None:
    value = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return value if isinstance(value, int) and value > 0 else None
