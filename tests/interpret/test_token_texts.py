"""Tokens become pieces, whole characters and words, and nothing is lost between them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_ext
from llama_ext.interpret.token_texts import characters, pieces, words
from llama_ext.runtime.text_stream import token_bytes


@functools.cache
def byte_tokenizer() -> llama_ext.Tokenizer:
    """Byte-level BPE that knows few Chinese characters: most are three tokens."""
    return llama_ext.Tokenizer.train("the cat and the dog 狗 don't " * 20, 280, eos_token="</s>")


@functools.cache
def byte_fallback_tokenizer() -> llama_ext.Tokenizer:
    """As SentencePiece: spaces as U+2581, and bytes where there is no piece."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for piece in ("▁", "t", "h", "e", "▁the", "▁t", "th", "he"):
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("t", "h"), ("h", "e"), ("▁", "t"), ("▁t", "he")]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return llama_ext.Tokenizer.from_tokenizers(backend, unk_token="<unk>")


TOKENIZERS = {"bytes": byte_tokenizer, "byte fallback": byte_fallback_tokenizer}
each_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)
TEXT = st.text(st.sampled_from("the cat dog 狗猫é'!,.\n😀 "), min_size=1, max_size=30)


@each_tokenizer
@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_characters_are_the_text_and_cover_every_token_once(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, token) for token in ids).decode("utf-8") == text
    found = characters(tokenizer, ids)
    assert "".join(part for part, _, _ in found) == text
    assert [index for _, first, last in found for index in range(first, last)] == list(range(len(ids)))
    assert len(pieces(tokenizer, ids)) == len(ids)


@each_tokenizer
@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_words_are_the_text_and_share_out_all_scores(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    scores = np.random.default_rng(0).standard_normal(len(ids))
    found = words(tokenizer, ids, scores)
    assert "".join(word.text for word in found) == text
    assert [index for word in found for index in range(word.first, word.last)] == list(range(len(ids)))
    for word in found:
        assert word.score == pytest.approx(scores[word.first : word.last].sum())


@each_tokenizer
def test_words_end_at_spaces_punctuation_and_chinese_characters(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode("the théthe, 狗猫the don't", add_special_tokens=False)
    found = [word.text for word in words(tokenizer, ids, np.zeros(len(ids)))]
    # What comes after a space may be joined to it or not, as the tokens are.
    assert [text.strip() for text in found if text.strip()] == ["the", "théthe", ",", "狗", "猫", "the", "don't"]


def test_bytes_that_are_no_character_are_written_out() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("猫", add_special_tokens=False)
    assert len(ids) > 1
    assert "".join(pieces(tokenizer, ids)).lower() == "\\xe7\\x8c\\xab"
    assert characters(tokenizer, ids) == [("猫", 0, len(ids))]
    # Cut off, or followed by what does not go on with it: each byte stays by itself.
    assert characters(tokenizer, ids[:1]) == [("\\xe7", 0, 1)]
    the = tokenizer.encode("the", add_special_tokens=False)
    assert characters(tokenizer, [ids[0], *the])[0] == ("\\xe7", 0, 1)
    assert characters(tokenizer, [ids[0], *ids])[1:] == [("猫", 1, 1 + len(ids))]


def test_special_tokens_are_words_of_their_own() -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    assert end is not None
    ids = [*tokenizer.encode("the", add_special_tokens=False), end, *tokenizer.encode("cat", add_special_tokens=False)]
    assert [word.text for word in words(tokenizer, ids, np.zeros(len(ids)))] == ["the", "</s>", "cat"]


def test_without_a_tokenizer_tokens_are_their_ids() -> None:
    assert pieces(None, [5, 17]) == ["5", "17"]
    assert [tuple(word) for word in words(None, [5, 17], np.array([1.0, -2.0]))] == [("5", 1, 0, 1), ("17", -2, 1, 2)]
