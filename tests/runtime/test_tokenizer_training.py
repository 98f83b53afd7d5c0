"""Tokenizers that are learned from texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llama_ext
from subprocesses import run_script

TEXTS = ["the cat sat on the mat. ", "the dog and the cat! 猫が座った。\n", "naïve café \U0001f600\t"] * 20
ODD = ["", " ", "\n\n  x", "猫 the\u00a0cat", "\U0001f600\u200d\U0001f680", "\x00\x7f", "e\u0301"]


@pytest.mark.parametrize("vocab_size", [256, 257, 300, 400])
def test_bpe_knows_every_text(vocab_size: int) -> None:
    tokenizer = llama_ext.Tokenizer.train(TEXTS, vocab_size)
    assert 256 <= len(tokenizer) <= vocab_size
    for text in [*TEXTS[:3], *ODD]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    if vocab_size == 256:
        assert len(tokenizer.encode(TEXTS[1])) == len(TEXTS[1].encode())
    if vocab_size == 400:
        assert len(tokenizer.encode("the cat")) == 2


def test_without_a_size_it_is_1024_tokens_or_what_the_text_gives() -> None:
    assert 256 < len(llama_ext.Tokenizer.train("abc def")) < 1024
    words = " ".join(str(number**3) for number in range(1000))
    for eos_token in (None, "</s>"):
        tokenizer = llama_ext.Tokenizer.train(words, eos_token=eos_token)
        assert len(tokenizer) == 1024
        assert tokenizer.decode(tokenizer.encode(words)) == words


def test_special_tokens_have_ids_and_are_not_added() -> None:
    tokenizer = llama_ext.Tokenizer.train(TEXTS, 300, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert len(tokenizer) == 300
    assert not {0, 1} & set(tokenizer.encode("the cat"))
    assert tokenizer.encode("the</s>")[-1] == 1
    assert tokenizer.decode([0, *tokenizer.encode("cat"), 1]) == "cat"


@pytest.mark.parametrize("options", [{"vocab_size": 300, "eos_token": "</s>"}, {"kind": "char", "eos_token": "</s>"}])
def test_what_is_learned_is_saved_and_loaded(tmp_path: Path, options: dict[str, Any]) -> None:
    tokenizer = llama_ext.Tokenizer.train(TEXTS, **options)
    tokenizer.save_pretrained(tmp_path)
    again = llama_ext.Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:3]:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == text
    assert (len(again), again.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_transformers_reads_what_was_learned(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    for name, options in {"bpe": {"vocab_size": 300}, "char": {"kind": "char"}}.items():
        tokenizer = llama_ext.Tokenizer.train(TEXTS, eos_token="</s>", **options)  # type: ignore[arg-type]
        tokenizer.save_pretrained(tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        for text in TEXTS[:3]:
            assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.eos_token_id == tokenizer.eos_token_id


def test_the_same_texts_give_the_same_tokenizer_in_every_process() -> None:
    script = """
        import llama_ext
        texts = ["the cat sat on the mat. ", "ab ba ab ba cd dc cd dc "] * 5
        print(llama_ext.Tokenizer.train(texts, 280, eos_token="</s>").backend.to_str())
    """
    assert len({run_script(script, PYTHONHASHSEED=str(seed)) for seed in range(3)}) == 1


def test_special_tokens_among_characters_are_tokens_where_they_are_written_out() -> None:
    tokenizer = llama_ext.Tokenizer.train("cab", kind="char", bos_token="<s>", eos_token="</s>")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.encode("<s>ab</s>", add_special_tokens=False) == [bos, *tokenizer.encode("ab", False), eos]
    with pytest.raises(llama_ext.OptionError, match="knows 3 characters, and not '/', '<', 's'"):
        tokenizer.encode("</s")
    with pytest.raises(llama_ext.OptionError, match="and not '>'"):
        tokenizer.encode("</s>>")


def test_characters_are_tokens() -> None:
    tokenizer = llama_ext.Tokenizer.train(["cab", "ca猫"], kind="char")
    assert [tokenizer.id_to_token(index) for index in range(len(tokenizer))] == ["a", "b", "c", "猫"]
    with pytest.raises(llama_ext.OptionError, match="knows 4 characters"):
        tokenizer.encode("d")
    assert len(llama_ext.Tokenizer.train("cab", 3, "char")) == 3
    assert len(llama_ext.Tokenizer.train("cab", 4, "char", bos_token="<s>")) == 4


def test_rare_characters_can_be_left_out() -> None:
    tokenizer = llama_ext.Tokenizer.train("aaabbc", 3, "char", unknown="replace")
    assert tokenizer.decode(tokenizer.encode("abca")) == "ab\ufffda"
    assert len(tokenizer) == 3
    with pytest.raises(llama_ext.OptionError, match="3 characters and vocab_size leaves room for 2"):
        llama_ext.Tokenizer.train("aaabbc", 2, "char")


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ([], {}, "no text"),
        ("", {"kind": "char"}, "no text"),
        (["a", 3], {}, r"texts\[1\]"),
        (["a\ud800"], {}, "surrogate"),
        ("a", {"vocab_size": 255}, "vocab_size"),
        ("a", {"vocab_size": 256, "eos_token": "</s>"}, r"\[257"),
        ("a", {"vocab_size": 10**5000}, "vocab_size"),
        ("a", {"vocab_size": 1 << 40}, "vocab_size"),
        ("a", {"kind": "word"}, "kind"),
        ("a", {"eos_token": ""}, "special token"),
        ("a", {"eos_token": "\ud800"}, "special token.*surrogate"),
        (3, {}, "expected a text or texts, got int"),
        (None, {"kind": "char"}, "expected a text or texts, got NoneType"),
        ("a", {"unknown": "replace"}, "unknown belongs to"),
        ("a", {"kind": "char", "vocab_size": 0}, "vocab_size"),
    ],
)
def test_what_cannot_be_learned_is_an_option_error(texts: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(llama_ext.OptionError, match=words):
        llama_ext.Tokenizer.train(texts, **{"vocab_size": 300, **options})
