"""Tokenizers in GGUF's metadata: text splits as with the original, read from a file or written to one and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from llama_ext import Tokenizer
from llama_ext.errors import CheckpointError, FormatError, LimitError, LlamaExtError, UnsupportedError
from llama_ext.io.gguf_file import GgufFile
from llama_ext.io.gguf_writer import write_gguf
from llama_ext.limits import Limits
from llama_ext.runtime.gguf_pre_tokenizers import GPT2_PATTERN, PRE_TOKENIZERS
from llama_ext.runtime.gguf_tokenizer import end_of_generation_ids, load_gguf_tokenizer
from llama_ext.runtime.gguf_tokenizer_writer import tokenizer_to_gguf
from llama_ext.runtime.sentencepiece_model import read_sentencepiece
from shared_data import SHARED, requires_shared

K = "tokenizer.ggml."
LLAMA2 = SHARED / "llama2-tokenizer"
STORIES = SHARED / "stories260K"

TEXTS = [
    "",
    " ",
    "   ",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces,   three\ttabs\t\tand\nnewlines\n\n\r\n end",
    "Ünïcödé, 日本語テキスト, 한국어, العربية, עברית, ไทย, देवनागरी",
    "🦙 emoji 👩‍👩‍👧‍👦 🇨🇭 and \u200b zero\u200dwidth",
    "I'm, you're, THEY'LL; don't: 'tis",
    "12345678901 3.14159 1,000,000 ½ ² Ⅷ ٣",
    "def f(x):\n    return x ** 2  # comment\n\n\tif True:\n        pass",
    "<0x41> <unk> ▁▁ ▁a [PAD3] <|nothing|>",
    "e\u0301 \u00e9 \ufeff \u3000wide\u3000 \u00a0nbsp",
    "a" * 300,
    "\x00\x01\x7f\x85",
    "$ + < = > ^ ~ | `code` “quotes” — dashes…",
]


def load(metadata: dict[str, Any], limits: Limits | None = None) -> Tokenizer:
    return load_gguf_tokenizer(Tokenizer, metadata, path="x.gguf", limits=limits or Limits())


def through_file(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """Written to a file and read from it."""
    write_gguf(path, {"general.architecture": "llama", **metadata}, [])
    with GgufFile(path) as file:
        return load_gguf_tokenizer(Tokenizer, file.metadata, path=str(path))


def same(ours: Tokenizer, theirs: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        for special in (False, True):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids, text
            assert ours.decode(ids) == theirs.decode(ids), text
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False), text
    for name in ("bos_token", "eos_token", "unk_token"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.special_ids == theirs.special_ids


def differs(text: str) -> bool:
    """Where transformers 5's Llama 2 differs from SentencePiece: no space before a space, or after a special token."""
    return not text or text[0] in " ▁" or "<unk>" in text


# -- SentencePiece ---------------------------------------------------------------------------------------------------


def llama2_metadata() -> dict[str, Any]:
    """As a conversion of tokenizer.model writes it."""
    model = read_sentencepiece(LLAMA2 / "tokenizer.model")
    return {
        K + "model": "llama",
        K + "pre": "default",
        K + "tokens": model.pieces,
        K + "scores": np.array(model.scores, np.float32),
        K + "token_type": np.array(model.types, np.int32),
        K + "bos_token_id": 1,
        K + "eos_token_id": 2,
        K + "unknown_token_id": 0,
    }


@requires_shared
def test_llama_2_splits_text_as_its_tokenizer_model(tmp_path: Path) -> None:
    ours = through_file(llama2_metadata(), tmp_path / "x.gguf")
    same(ours, Tokenizer.from_pretrained(LLAMA2 / "tokenizer.model"), TEXTS)
    assert ours.encode("Hello") == [1, 15043]


@requires_shared
def test_llama_2_splits_text_as_its_tokenizer_json() -> None:
    ours, theirs = load(llama2_metadata()), Tokenizer.from_pretrained(LLAMA2)
    # This file, written by transformers 5, ranks the merges of several spaces first, and SentencePiece last.
    texts = [text for text in TEXTS if not differs(text) and "  " not in text]
    assert len(texts) > 8
    for text in texts:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


@requires_shared
@pytest.mark.parametrize("folder", [LLAMA2, LLAMA2 / "tokenizer.model", STORIES], ids=["json", "model", "stories260K"])
def test_a_sentencepiece_tokenizer_written_and_read_is_the_same(folder: Path, tmp_path: Path) -> None:
    theirs = Tokenizer.from_pretrained(folder)
    size = len(theirs) + 5
    entries = tokenizer_to_gguf(theirs, size)
    assert len(entries[K + "tokens"]) == len(entries[K + "scores"]) == len(entries[K + "token_type"]) == size
    ours = through_file(entries, tmp_path / "x.gguf")
    assert len(ours) == size
    for text in TEXTS:
        if not differs(text):
            for special in (False, True):
                ids = theirs.encode(text, add_special_tokens=special)
                assert ours.encode(text, add_special_tokens=special) == ids
                assert ours.decode(ids) == theirs.decode(ids)
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (1, 2, 0)


@requires_shared
@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_survives_the_way_through_gguf(text: str) -> None:
    theirs, ours = both()
    ids = theirs.encode(text)
    if not theirs.special_ids & set(ids[1:]):
        assert ours.encode(text) == ids


_BOTH: list[tuple[Tokenizer, Tokenizer]] = []


def both() -> tuple[Tokenizer, Tokenizer]:
    if not _BOTH:
        theirs = Tokenizer.from_pretrained(STORIES)
        _BOTH.append((theirs, load(tokenizer_to_gguf(theirs, 512))))
    return _BOTH[0]


@requires_shared
def test_the_vocabulary_written_is_the_one_that_was_read() -> None:
    original = llama2_metadata()
    again = tokenizer_to_gguf(load(original), 32000)
    assert again[K + "tokens"] == original[K + "tokens"]
    np.testing.assert_array_equal(again[K + "token_type"], original[K + "token_type"])
    # Scores have another scale, and the same order wherever two merges compete.
    merged = original[K + "scores"] > -31_740 + 2_000
    np.testing.assert_array_equal(np.argsort(-again[K + "scores"][259:][merged[259:]]), np.arange(merged[259:].sum()))


def small(**changes: Any) -> dict[str, Any]:
    """A vocabulary of bytes, letters and few pieces."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab"]
    types = [2, 3, 3, *[6] * 256, *[1] * 6]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -1.0, -2.0, -3.0]
    metadata = {
        K + "model": "llama",
        K + "tokens": tokens,
        K + "scores": np.array(scores, np.float32),
        K + "token_type": np.array(types, np.int32),
        K + "bos_token_id": 1,
        K + "eos_token_id": 2,
    }
    metadata.update({K + name: value for name, value in changes.items()})
    return {key: value for key, value in metadata.items() if value is not None}


def added(text: str, kind: int, base: dict[str, Any] | None = None) -> dict[str, Any]:
    metadata = dict(base or small())
    metadata[K + "tokens"] = [*metadata[K + "tokens"], text]
    metadata[K + "token_type"] = np.append(metadata[K + "token_type"], np.int32(kind)).astype(np.int32)
    metadata[K + "scores"] = np.append(metadata[K + "scores"], np.float32(-100)).astype(np.float32)
    return metadata


def test_small_vocabulary() -> None:
    tokenizer = load(small())
    names = [tokenizer.id_to_token(index) for index in tokenizer.encode("ab aab\n")]
    assert names == ["<s>", "▁ab", "▁a", "ab", "<0x0A>"]
    assert tokenizer.decode(tokenizer.encode("ab aab\n")) == "ab aab\n"


def test_options_of_the_file() -> None:
    assert load(small(add_bos_token=False)).encode("a") == [263]
    assert load(small(add_eos_token=True)).encode("a") == [1, 263, 2]
    assert load(small(add_space_prefix=False)).encode("a") == [1, 260]
    assert load(small(add_space_prefix=False)).decode([260, 259, 260]) == "a a"
    assert load(small(remove_extra_whitespaces=True)).encode("  a   b ") == load(small()).encode("a b")
    named = load(
        {**small(padding_token_id=2, unknown_token_id=0), "llama.context_length": 77, "general.architecture": "llama"}
    )
    assert (named.pad_token, named.unk_token, named.model_max_length) == ("</s>", "<unk>", 77)
    assert load(small(padding_token_id=100_000)).pad_token is None


def test_types_of_tokens() -> None:
    control = load(added("<|x|>", 3))
    assert control.encode("a<|x|>", add_special_tokens=False)[-1] == 265
    assert control.decode([263, 265]) == "a"
    user = load(added("<y>", 4))
    assert user.encode("a<y>a", add_special_tokens=False) == [263, 265, 260]
    assert user.decode([263, 265]) == "a<y>"
    unused = load(added("[PAD265]", 5))
    assert 265 not in unused.encode("[PAD265]")
    assert unused.id_to_token(265) == "[PAD265]"
    assert load(added("", 1)).id_to_token(265) == "[EMPTY_265]"


def test_types_follow_from_the_tokens_when_the_file_has_none() -> None:
    same(load(small(token_type=None)), load(small()), ["ab a\n", "é", "<s>"])


def test_unused_pieces_within_reach_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="unused pieces"):
        load(added("ba", 5))


# -- byte-level BPE --------------------------------------------------------------------------------------------------

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def bare_bytes() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def whole_bytes() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# As the models' own tokenizer.json has them: (steps, ignore_merges, NFC).
ORIGINALS: dict[str, tuple[Callable[[], list[Any]], bool, bool]] = {
    "llama-bpe": (lambda: [split(LLAMA3), bare_bytes()], True, False),
    "smaug-bpe": (lambda: [split(LLAMA3), bare_bytes()], False, False),
    "gpt-2": (lambda: [whole_bytes()], False, False),
    "smollm": (lambda: [pre_tokenizers.Digits(individual_digits=True), whole_bytes()], False, False),
    "qwen2": (lambda: [split(QWEN2), bare_bytes()], False, True),
}


def byte_level(pre: str, *, specials: bool = True) -> Tokenizer:
    """A tokenizer as that model has it, trained on a little text."""
    steps, ignore_merges, nfc = ORIGINALS[pre]
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps())
    backend.decoder = decoders.ByteLevel()
    if nfc:
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([*TEXTS, *TEXTS, Path(__file__).read_text(encoding="utf-8")], trainer)
    backend.model.ignore_merges = ignore_merges
    if specials:
        backend.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
        backend.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    return Tokenizer.from_tokenizers(
        backend,
        bos_token="<|begin_of_text|>" if specials else None,
        eos_token="<|eot_id|>" if specials else None,
        add_bos_token=specials,
        add_eos_token=False,
        chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    )


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_tokenizers_written_and_read_are_the_same(pre: str, tmp_path: Path) -> None:
    theirs = byte_level(pre)
    entries = tokenizer_to_gguf(theirs, len(theirs) + 3)
    assert (entries[K + "model"], entries[K + "pre"]) == ("gpt2", pre)
    ours = through_file(entries, tmp_path / "x.gguf")
    same(ours, theirs, [*TEXTS, "a<|eot_id|>b <tool> c<|begin_of_text|>"])
    assert len(ours) == len(theirs) + 3
    assert ours.chat_template == theirs.chat_template
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}]) == theirs.apply_chat_template(
        [{"role": "user", "content": "hi"}]
    )


@pytest.mark.parametrize("pre", ORIGINALS)
def test_words_are_cut_as_the_original_does(pre: str) -> None:
    original = pre_tokenizers.Sequence(ORIGINALS[pre][0]())
    entry = PRE_TOKENIZERS[pre]
    ours = pre_tokenizers.Sequence([*map(split, entry.patterns), bare_bytes()])
    for text in TEXTS:
        assert ours.pre_tokenize_str(text) == original.pre_tokenize_str(text)


def test_words_of_every_name_can_be_cut() -> None:
    for entry in PRE_TOKENIZERS.values():
        cutter = pre_tokenizers.Sequence([split(pattern) for pattern in entry.patterns])
        for text in TEXTS:
            assert "".join(piece for piece, _ in cutter.pre_tokenize_str(text)) == text


def bpe(**changes: Any) -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    metadata = {
        K + "model": "gpt2",
        K + "pre": "gpt-2",
        K + "tokens": [*alphabet, "ab", "Ġab", "<|end|>"],
        K + "token_type": np.array([1] * 258 + [3], np.int32),
        K + "merges": ["a b", "Ġ ab"],
    }
    metadata.update({K + name: value for name, value in changes.items()})
    return {key: value for key, value in metadata.items() if value is not None}


def test_defaults_of_the_byte_level_kind() -> None:
    tokenizer = load(bpe())
    assert tokenizer.encode("ab ab<|end|>") == [256, 257, 258]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == (None, None, None)
    assert load(bpe(eos_token_id=258, add_eos_token=True)).encode("ab") == [256, 258]
    assert load(bpe(pre="llama-bpe", bos_token_id=258)).encode("ab") == [258, 256]
    assert load(bpe(bos_token_id=258)).encode("ab") == [256]
    assert load(bpe(token_type=None)).encode("ab") == [256]


def test_a_file_without_a_name_for_its_words() -> None:
    tokens = [*bpe()[K + "tokens"][:-1], "'a", "12", "<|begin_of_text|>"]
    merges = [*bpe()[K + "merges"], "' a", "1 2"]
    changes = {"pre": None, "tokens": tokens, "merges": merges, "token_type": np.array([1] * 260 + [3], np.int32)}
    llama3 = load(bpe(**changes))
    assert [llama3.id_to_token(index) for index in llama3.encode("'a12")] == ["'a", "12"]
    changes["tokens"] = [*tokens[:-1], "<|other|>"]
    default = load(bpe(**changes))
    assert [default.id_to_token(index) for index in default.encode("'a12")] == ["'", "a", "12"], "cut at punctuation"


def test_chat_templates() -> None:
    assert load({**small(), "tokenizer.chat_template": "x"}).chat_template == "x"
    several = {
        **small(),
        "tokenizer.chat_template": "x",
        "tokenizer.chat_templates": ["tool_use", "absent"],
        "tokenizer.chat_template.tool_use": "y",
    }
    assert load(several).chat_template == {"default": "x", "tool_use": "y"}
    written = Tokenizer(load(small()).backend, {"bos_token": "<s>"}, chat_template={"default": "x", "rag": "y"})
    entries = tokenizer_to_gguf(written, 265)
    assert load(entries).chat_template == {"default": "x", "rag": "y"}


def test_ids_that_end_a_turn() -> None:
    metadata = added("<|eot_id|>", 3, added("<|im_end|>", 1))
    assert end_of_generation_ids(metadata) == [2, 266]
    assert end_of_generation_ids({**metadata, K + "eot_token_id": 1, K + "eom_token_id": 999}) == [2, 1, 266]
    assert end_of_generation_ids({}) == []


BROKEN: dict[str, tuple[dict[str, Any], type[LlamaExtError], str]] = {
    "no model": (small(model=None), FormatError, "there is no tokenizer in this file"),
    "model of a number": (small(model=3), FormatError, "must be a string"),
    "another kind": (small(model="t5"), UnsupportedError, r"model 't5' is not supported. Supported: llama, gpt2"),
    "no vocabulary": (small(model="no_vocab"), UnsupportedError, "'no_vocab' is not supported"),
    "no tokens": (small(tokens=None), FormatError, "must be an array of strings, got None"),
    "empty tokens": (small(tokens=np.zeros(0, np.uint8)), FormatError, "there are no tokens"),
    "tokens of numbers": (small(tokens=np.arange(265)), FormatError, "must be an array of strings"),
    "two alike": (added("ab", 1), FormatError, "tokens 262 and 265 are both 'ab'"),
    "no scores": (small(scores=None), FormatError, "the tokens have no scores"),
    "few scores": (small(scores=np.zeros(3, np.float32)), FormatError, "an array of 265, one for each token, got 3"),
    "scores of integers": (small(scores=np.zeros(265, np.int32)), FormatError, "an array of numbers"),
    "scores of text": (small(scores=["1"] * 265), FormatError, "an array of numbers"),
    "a score of nan": (small(scores=np.full(265, np.nan, np.float32)), FormatError, "not finite"),
    "few types": (small(token_type=np.ones(3, np.int32)), FormatError, "one for each token"),
    "type 0": (small(token_type=np.zeros(265, np.int32)), FormatError, "token 0 has the type 0"),
    "type 7": (small(token_type=np.full(265, 7, np.int32)), FormatError, "token 0 has the type 7"),
    "all unknown": (small(token_type=np.full(265, 2, np.int32)), FormatError, "one piece of the unknown type"),
    "a byte that is none": (added("xyz", 6), FormatError, "byte piece 265 is 'xyz'"),
    "bos beyond": (small(bos_token_id=265), FormatError, "must be an id below 265, got 265"),
    "bos of text": (small(bos_token_id="<s>"), FormatError, "must be an integer"),
    "bos negative": (small(bos_token_id=-2), FormatError, "must be an integer"),
    "add_bos of a number": (small(add_bos_token=1), FormatError, "must be true or false"),
    "charsmap": (small(precompiled_charsmap=np.arange(9, dtype=np.uint8)), FormatError, "normalisation table"),
    "template of a number": ({**small(), "tokenizer.chat_template": 1}, FormatError, "must be a string"),
    "another pre": (bpe(pre="poro-chat"), UnsupportedError, "pre 'poro-chat' is not supported.*Supported: command-r"),
    "no merges": (bpe(merges=None), FormatError, "must be an array of strings"),
    "a merge of one": (bpe(merges=["ab"]), FormatError, "merge 0 is 'ab', expected two tokens"),
    "a merge of unknown tokens": (bpe(merges=["zz a"]), FormatError, "the tokenizer cannot be used"),
    "a merge to an unknown token": (bpe(merges=["b a"]), FormatError, "the tokenizer cannot be used"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_vocabulary_is_a_typed_error(name: str) -> None:
    metadata, error, message = BROKEN[name]
    with pytest.raises(error, match=message) as caught:
        load(metadata)
    assert "x.gguf" in str(caught.value)


def test_limits() -> None:
    with pytest.raises(LimitError, match=r"Limits\.vocabulary"):
        load(small(), Limits(vocabulary=264))
    with pytest.raises(LimitError, match="a token of 4097 characters"):
        load(added("x" * 4097, 1))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_vocabulary_is_used_or_refused(data: st.DataObject) -> None:
    metadata = dict(data.draw(st.sampled_from([small(), bpe()])))
    key = data.draw(st.sampled_from([*metadata, K + "add_space_prefix", K + "unknown_token_id", K + "pre"]))
    strange = st.none() | st.integers(-3, 300) | st.text(max_size=5) | st.booleans() | st.floats()
    strange |= st.lists(st.text(max_size=3), max_size=4)
    strange |= st.lists(st.integers(-1, 9), max_size=4).map(lambda values: np.array(values, np.int32))
    if data.draw(st.booleans()) or not isinstance(metadata.get(key), (list, np.ndarray)):
        metadata[key] = data.draw(strange)
    else:
        metadata[key] = metadata[key].copy()
        index = data.draw(st.integers(0, len(metadata[key]) - 1))
        is_text = isinstance(metadata[key], list)
        metadata[key][index] = data.draw(st.text(max_size=4) if is_text else st.integers(-2, 9))
    try:
        tokenizer = load(metadata)
    except LlamaExtError:
        return
    ids = tokenizer.encode("ab a\n🦙")
    assert isinstance(tokenizer.decode(ids), str)


# -- what cannot be written ------------------------------------------------------------------------------------------


def changed(change: Callable[[Backend], None], base: Tokenizer | None = None) -> Tokenizer:
    backend = Backend.from_str((base or load(small())).backend.to_str())
    change(backend)
    return Tokenizer.from_tokenizers(backend, bos_token="<s>", unk_token="<unk>")


def set_part(name: str, value: Any) -> Callable[[Backend], None]:
    return lambda backend: setattr(backend, name, value)


UNWRITABLE: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "unigram": (lambda: Tokenizer(Backend(models.Unigram([("a", 0.0)], unk_id=0)), {}), "a model of type Unigram"),
    "words": (lambda: Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="a")), {}), "a model of type WordLevel"),
    "characters": (lambda: Tokenizer.characters("abc"), "neither SentencePiece's pieces nor made of bytes"),
    "suffix": (
        lambda: Tokenizer(Backend(models.BPE({"a": 0}, [], end_of_word_suffix="</w>")), {}),
        "BPE with end_of_word_suffix",
    ),
    "another normaliser": (lambda: changed(set_part("normalizer", normalizers.Lowercase())), "normaliser of type Lowercase"),
    "no spaces": (lambda: changed(set_part("normalizer", None)), "without SentencePiece's spaces"),
    "cut pieces": (lambda: changed(set_part("pre_tokenizer", pre_tokenizers.Whitespace())), "pre-tokenizer of type Whitesp"),
    "another order": (
        lambda: changed(
            set_part("model", models.BPE({"<unk>": 0, "<s>": 1, "a": 2, "b": 3, "c": 4, "ab": 5, "bc": 6, "abc": 7},
                     [("a", "b"), ("ab", "c"), ("b", "c")], unk_token="<unk>", byte_fallback=True)),
        ),
        "merges are not those of a SentencePiece model",
    ),
    "words of another kind": (
        lambda: Tokenizer(changed_bytes(split("x+")), {}), "has no name in GGUF",
    ),
    "words removed": (
        lambda: Tokenizer(changed_bytes(pre_tokenizers.Split(" ", behavior="removed")), {}), "type Split with these set",
    ),
    "a space in front": (
        lambda: Tokenizer(changed_bytes(pre_tokenizers.ByteLevel(add_prefix_space=True)), {}), "type ByteLevel with these",
    ),
}  # fmt: skip


def changed_bytes(first: Any) -> Backend:
    backend = Backend.from_str(load(bpe()).backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, bare_bytes()])
    return backend


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_tokenizer_that_gguf_has_no_kind_for_is_refused(name: str) -> None:
    make, message = UNWRITABLE[name]
    tokenizer = make()
    with pytest.raises(UnsupportedError, match=message):
        tokenizer_to_gguf(tokenizer, 1000)


def test_a_model_smaller_than_its_tokenizer_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the tokenizer has the id 264, the model has 264 tokens"):
        tokenizer_to_gguf(load(small()), 264)


def test_a_tokenizer_that_adds_something_else_is_refused() -> None:
    from tokenizers import processors

    backend = load(small()).backend
    backend.post_processor = processors.TemplateProcessing(single="a:0 $A:0", pair=None, special_tokens=[("a", 260)])
    with pytest.raises(UnsupportedError, match="adds other tokens than BOS and EOS"):
        tokenizer_to_gguf(Tokenizer(backend, {"unk_token": "<unk>"}), 265)


def test_the_pattern_of_gpt_2_is_that_of_the_tokenizers_package() -> None:
    ours, theirs = pre_tokenizers.Sequence([split(GPT2_PATTERN), bare_bytes()]), whole_bytes()
    for text in TEXTS:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)
