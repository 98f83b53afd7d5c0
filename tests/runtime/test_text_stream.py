"""Text that arrives token by token is the text of all tokens, and a stop string ends it wherever the pieces are cut."""

from __future__ import annotations

import functools
import itertools
import random
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from llama_ext.errors import OptionError, TokenIdError
from llama_ext.runtime.text_stream import StopStrings, TextStream
from llama_ext.runtime.tokenizer import Tokenizer
from shared_data import SHARED, requires_shared
from timing import SLACK

SAMPLE = "Hello  world,\n naïve é 日本語 🎉👩‍👩‍👧 done. "


@functools.cache
def byte_level() -> Tokenizer:
    """The Llama 3 kind: every token is bytes, so characters are cut anywhere."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    merges = [("\u0120", "w"), ("\u00c3", "\u00a9"), ("H", "e"), ("l", "l"), ("\u00f0", "\u0141"), ("\u0120", "\u0120")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(["<added token>", "café"])
    return Tokenizer.from_tokenizers(backend, bos_token="<|begin|>", eos_token="<|eot|>")


@functools.cache
def byte_fallback(strip: int = 1) -> Tokenizer:
    """The Llama 2 kind: pieces with U+2581 for a space, and bytes for the rest."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "\u2581\u2581",
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=strip)]
    )
    return Tokenizer.from_tokenizers(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def with_decoder(decoder: decoders.Decoder | None) -> Tokenizer:
    pieces = ["<unk>", "\u2581", "\u2581a", "b\u2581", "##c", "d", " ", "\u2581\u2581e"]
    backend = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer.from_tokenizers(backend, unk_token="<unk>")


KINDS = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "byte-fallback-strips-all": lambda: byte_fallback(0xFFFF),
    "byte-fallback-keeps-spaces": lambda: byte_fallback(0),
    "metaspace": lambda: with_decoder(decoders.Metaspace()),
    "metaspace-never": lambda: with_decoder(decoders.Metaspace(prepend_scheme="never")),
    "no-decoder": lambda: with_decoder(None),
    "fuse": lambda: with_decoder(decoders.Fuse()),
    "replace": lambda: with_decoder(decoders.Replace("\u2581", " ")),
    "word-piece": lambda: with_decoder(decoders.WordPiece()),
    "word-suffix": lambda: with_decoder(decoders.BPEDecoder(suffix="\u2581")),
    "characters": lambda: Tokenizer.characters(SAMPLE),
}


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> str:
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    return "".join([*map(stream.push, ids), stream.flush()])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), skip=st.booleans())
def test_the_pieces_joined_are_the_text_of_any_ids(kind: str, seed: int, skip: bool) -> None:
    tokenizer = KINDS[kind]()
    choose = random.Random(seed)
    ids = [choose.randrange(len(tokenizer)) for _ in range(choose.randint(0, 30))]
    assert streamed(tokenizer, ids, skip=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "characters"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_the_pieces_joined_are_the_text_that_was_encoded(kind: str, text: str) -> None:
    tokenizer = Tokenizer.characters(text or "x") if kind == "characters" else KINDS[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert streamed(tokenizer, ids, skip=False) == tokenizer.decode(ids, skip_special_tokens=False)


@requires_shared
@pytest.mark.parametrize("name", ["stories260K", "llama2-tokenizer", "llama2-tokenizer/tokenizer.model"])
def test_real_tokenizers_stream_exactly(name: str) -> None:
    tokenizer = Tokenizer.from_pretrained(SHARED / name)
    choose = random.Random(0)
    for text in (SAMPLE, "", " ", "  x", "\n\n", "🎉" * 20):
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    for _ in range(300):
        ids = [choose.choice([choose.randrange(len(tokenizer)), choose.randrange(259)]) for _ in range(12)]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids), ids


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_no_piece_ends_inside_a_character(kind: str) -> None:
    tokenizer = KINDS[kind]()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode("é日🎉", add_special_tokens=False)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces).endswith("é日🎉")
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_a_character_that_is_never_finished_becomes_a_replacement_character_at_the_end(kind: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode("🎉", add_special_tokens=False)[:-1]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, ids)) == ""
    assert set(stream.flush()) == {"\ufffd"}


def test_a_wrong_byte_leaves_the_characters_beside_it_alone() -> None:
    tokenizer = byte_fallback()
    ids = [3 + byte for byte in (*"€".encode(), 0xFF, *"€".encode(), 0xE2, 0x82)]
    assert tokenizer.decode(ids) == "€\ufffd€\ufffd\ufffd" == streamed(tokenizer, ids)


@requires_shared
def test_wrong_bytes_decode_as_in_sentencepiece() -> None:
    package = pytest.importorskip("sentencepiece", reason="compares with the sentencepiece package")
    path = SHARED / "llama2-tokenizer" / "tokenizer.model"
    reference, tokenizer = package.SentencePieceProcessor(str(path)), Tokenizer.from_pretrained(path)
    choose = random.Random(1)
    for _ in range(500):
        ids = [choose.choice([choose.randrange(3, 259), choose.randrange(259, 32_000)]) for _ in range(8)]
        assert tokenizer.decode(ids) == reference.decode(ids), ids


def test_only_the_first_space_of_the_text_is_stripped() -> None:
    tokenizer = byte_fallback()
    a = tokenizer.token_to_id("\u2581a")
    assert a is not None
    stream = TextStream(tokenizer)
    assert [stream.push(a), stream.push(a)] == ["a", " a"]


def test_the_prompts_text_is_not_given_out_and_counts_as_the_start() -> None:
    tokenizer = byte_fallback()
    a = tokenizer.token_to_id("\u2581a")
    assert a is not None
    stream = TextStream(tokenizer, [1, a])
    assert stream.push(a) == " a"  # with the space: it does not begin the text
    assert TextStream(tokenizer, prompt_ids=[1]).push(a) == "a"  # a skipped BOS is not text


def test_a_character_begun_in_the_prompt_comes_whole() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("🎉", add_special_tokens=False)
    stream = TextStream(tokenizer, ids[:2])
    assert "".join([*map(stream.push, ids[2:]), stream.flush()]) == "🎉"


def test_a_decoder_that_needs_all_tokens_gives_its_text_at_the_end() -> None:
    tokenizer = with_decoder(decoders.WordPiece())
    stream = TextStream(tokenizer, [5, 4])
    assert [stream.push(5), stream.push(4)] == ["", ""]
    assert stream.flush() == tokenizer.decode([5, 4, 5, 4])[len(tokenizer.decode([5, 4])) :]


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    stream = TextStream(byte_fallback())
    with pytest.raises(TokenIdError, match=r"token id 9999 .* 0 <= id < 264"):
        stream.push(9999)
    with pytest.raises(TokenIdError):
        TextStream(byte_fallback(), [-1])


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    tokenizer = byte_fallback()
    stream = TextStream(tokenizer)

    def seconds(count: int) -> float:
        start = time.process_time()
        for index in range(count):
            stream.push(3 + (0x41 + index % 26))
        return time.process_time() - start

    first = min(seconds(2000) for _ in range(3))
    seconds(60_000)
    # Re-decoding the text each time would make it thirty times slower.
    assert min(seconds(2000) for _ in range(3)) < SLACK * first + 0.01


# -- stop strings ---------------------------------------------------------------------------------------------------


def stopped_by(stops: str | list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    out = ""
    for piece in pieces:
        text, stop = matcher.push(piece)
        out += text
        if stop:
            return out, True
    return out + matcher.flush(), False


@pytest.mark.parametrize(
    ("stops", "text", "expected", "stopped"),
    [
        ("END", "a b END c", "a b ", True),
        ("END", "a b EN", "a b EN", False),
        ("END", "ENEND", "EN", True),
        (["aab"], "aaab", "a", True),
        (["b", "abc"], "xabc", "xa", True),  # "b" is complete first
        (["bc", "abc"], "xabc", "x", True),  # both at once: the longest
        (["abcdef", "cd"], "abcdef", "ab", True),
        (["\n", "\n\n"], "a\n\nb", "a", True),
        (["é"], "caf\u00e9 x", "caf", True),
        ([], "anything", "anything", False),
    ],
)
def test_the_first_complete_stop_string_ends_the_text(
    stops: str | list[str], text: str, expected: str, stopped: bool
) -> None:
    assert stopped_by(stops, [text]) == (expected, stopped)
    assert stopped_by(stops, list(text)) == (expected, stopped)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_where_the_pieces_are_cut_does_not_matter(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    # The definition, letter by letter.
    expected = (text, False)
    for end in range(len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            expected = (text[: end - max(map(len, ends))], True)
            break
    assert stopped_by(stops, pieces) == expected


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["</tool>", "<|x"])
    assert matcher.push("a<") == ("a", False)
    assert matcher.push("/to") == ("", False)
    assert matcher.push("p<") == ("</top", False)
    assert matcher.flush() == "<"


def test_nothing_is_given_out_after_a_stop_string() -> None:
    matcher = StopStrings("x")
    assert matcher.push("axb") == ("a", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""
    assert matcher.stopped


@pytest.mark.parametrize("stops", ["", [""], ["a", ""], [3]])
def test_an_empty_stop_string_is_refused(stops: object) -> None:
    with pytest.raises(OptionError, match="non-empty"):
        StopStrings(stops)  # type: ignore[arg-type]
