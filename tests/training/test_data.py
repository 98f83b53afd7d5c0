"""What `fit` takes, as rows of tokens and labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from llama_ext.training import TokenFile, write_token_file
from llama_ext.training.batches import IGNORED, Example, Examples, Stream, collate
from llama_ext.training.data import Reading, block_examples, packed, pair_example, read_data
from llama_ext.training.token_file import ArrayReader

LETTERS = llama_ext.Tokenizer.characters("abcdefgh .:")


def ended_letters() -> llama_ext.Tokenizer:
    return llama_ext.Tokenizer.train("abcdefgh .:", kind="char", eos_token="</s>")


def reading(tokenizer: llama_ext.Tokenizer | None = None, **changes: Any) -> Reading:
    tokenizer = LETTERS if tokenizer is None else tokenizer
    return Reading(**{"tokenizer": tokenizer, "bos": None, "vocabulary": len(tokenizer), "context": 16, **changes})


def rows_of(source: Any) -> list[tuple[list[int], list[int]]]:
    return [(each.tokens.tolist(), each.labels.tolist()) for row in source.all_rows() for each in row]


def test_documents_predict_their_next_tokens_and_their_end() -> None:
    tokenizer = ended_letters()
    end = tokenizer.eos_token_id
    ids = tokenizer.encode("abc")
    assert end not in ids
    assert rows_of(read_data(["abc"], None, reading(tokenizer))) == [(ids, [*ids[1:], end])]
    # A tokenizer without an end, and ids, are as they are.
    assert rows_of(read_data(["abc"], None, reading())) == [(LETTERS.encode("abc")[:2], LETTERS.encode("abc")[1:])]
    assert rows_of(read_data([[1, 2, 3], [4, 5]], None, reading())) == [([1, 2], [2, 3]), ([4], [5])]


@pytest.mark.parametrize("length", [2, 3, 16, 17, 18, 33, 34, 50])
def test_a_long_document_becomes_rows_that_predict_each_token_once(length: int) -> None:
    ids = np.random.default_rng(0).integers(0, 11, length).tolist()
    rows = rows_of(read_data([ids], None, reading()))
    assert sum((labels for _, labels in rows), start=[]) == ids[1:]  # noqa: RUF017
    assert sum((tokens for tokens, _ in rows), start=[]) == ids[:-1]  # noqa: RUF017
    assert max(len(tokens) for tokens, _ in rows) <= 16


def test_a_pair_learns_its_answer_and_its_end_alone() -> None:
    tokenizer = ended_letters()
    for source in (
        read_data([("ab:", " cd")], None, reading(tokenizer)),
        read_data(["ab:"], [" cd"], reading(tokenizer)),
    ):
        ids = [*tokenizer.encode("ab: cd"), tokenizer.eos_token_id]
        assert rows_of(source) == [(ids[:-1], [IGNORED, IGNORED, *ids[3:]])]


def test_a_pair_is_encoded_as_one_text_and_a_token_on_the_border_is_learned() -> None:
    tokenizer = llama_ext.Tokenizer.train(["ab ab ab cab"] * 50, 262)
    whole = tokenizer.encode("c ab")
    # A space belongs to the word behind it, as when the model writes it.
    example = pair_example("c ", "ab", reading(tokenizer), what="it")
    assert [*example.tokens.tolist()[:1], *example.labels.tolist()] == whole
    assert example.labels[0] == whole[1]
    # " ab" is one token, so that the border of "c a" and "b" lies inside it.
    assert len(whole) == 2
    example = pair_example("c a", "b", reading(tokenizer), what="it")
    assert (example.tokens.tolist(), example.labels.tolist()) == (whole[:1], whole[1:])


def test_an_empty_answer_learns_the_end_and_an_empty_prompt_needs_a_beginning() -> None:
    tokenizer = llama_ext.Tokenizer.train("ab", kind="char", bos_token="<s>", eos_token="</s>")
    found = pair_example("ab", "", reading(tokenizer, bos=tokenizer.bos_token_id))
    assert found.labels.tolist() == [IGNORED, tokenizer.eos_token_id]
    found = pair_example("", "ab", reading(tokenizer, bos=tokenizer.bos_token_id))
    assert found.tokens.tolist() == [tokenizer.bos_token_id, *tokenizer.encode("ab")]
    assert found.labels.tolist() == [*tokenizer.encode("ab"), tokenizer.eos_token_id]
    with pytest.raises(llama_ext.OptionError, match="the pair: the context is empty"):
        pair_example("", "ab", reading(tokenizer))


def test_a_pair_that_is_too_long_is_not_cut() -> None:
    pair_example("a" * 8, "b" * 9, reading())
    with pytest.raises(llama_ext.ContextLengthError, match="18 tokens, a row has room for 17"):
        pair_example("a" * 8, "b" * 10, reading())


def test_labels_of_an_array_are_shifted_and_what_follows_the_last_is_cut() -> None:
    x = np.array([[1, 2, 3, 4, 0, 0], [5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6]])
    y = np.array([[1, 2, 3, 4, -100, -100], [-100, -100, -100, 8, 9, -100], [-100] * 6])
    found = [(e.tokens.tolist(), e.labels.tolist()) for e in block_examples(x, y, reading())]
    assert found == [([1, 2, 3], [2, 3, 4]), ([5, 6, 7, 8], [-100, -100, 8, 9])]
    # Labels need not be the next tokens; the first one of a row predicts nothing.
    y = np.array([[9, 8, 7, -100, 6, -100]])
    assert [e.labels.tolist() for e in block_examples(x[:1], y, reading())] == [[8, 7, -100, 6]]
    assert rows_of(read_data(x[:1], None, reading())) == [([1, 2, 3, 4, 0], [2, 3, 4, 0, 0])]


def test_padding_that_no_label_sees_may_be_anything() -> None:
    x = np.array([[1, 2, 3, -1, 9999]])
    y = np.array([[1, 2, 3, -100, -100]])
    assert [e.tokens.tolist() for e in block_examples(x, y, reading())] == [[1, 2]]


@pytest.mark.parametrize(
    ("x", "y", "error", "words"),
    [
        ([], None, llama_ext.OptionError, "x is empty"),
        (["a"], None, llama_ext.OptionError, "nothing to train on"),
        ([("ab", "c"), "ab"], None, llama_ext.DTypeError, r"x\[1\] must be a pair"),
        ([("ab", "c"), ("ab", 3)], None, llama_ext.DTypeError, "pair 1"),
        (["ab", [1, 2]], None, llama_ext.DTypeError, r"x\[1\] must be like x\[0\]"),
        (["ab", "cd"], ["e"], llama_ext.ShapeError, "2 answers"),
        (["ab"], "e", llama_ext.ShapeError, "answers"),
        ("abc", "d", llama_ext.OptionError, "y goes with"),
        ([1, 2, 3], [4], llama_ext.OptionError, "y goes with"),
        ([[1, 2, 3]], [4], llama_ext.OptionError, "y goes with"),
        ([1, 2, 99], None, llama_ext.TokenIdError, "99"),
        ([[1, 2], [3, -1]], None, llama_ext.TokenIdError, r"x\[1\]"),
        (np.zeros((2, 3)), None, llama_ext.DTypeError, "integers"),
        (np.zeros((2, 3, 4), int), None, llama_ext.ShapeError, "shape"),
        (np.zeros((2, 3), int), np.zeros((2, 2), int), llama_ext.ShapeError, "shape of x"),
        (np.zeros((2, 3), int), np.zeros((2, 3)), llama_ext.DTypeError, "y must be integers"),
        (np.zeros((2, 3), int), np.full((2, 3), 11), llama_ext.TokenIdError, "y"),
        (np.zeros((2, 18), int), None, llama_ext.ContextLengthError, "18 tokens"),
        (np.zeros(1, int), None, llama_ext.OptionError, "two tokens"),
        (b"abc", None, llama_ext.DTypeError, "bytes"),
        (
            [("ab", None)],
            None,
            llama_ext.DTypeError,
            r"x\[0\] must be a pair \(prompt, answer\) of texts, got \('ab', None\)",
        ),
        ([("ab", "c", "d")], None, llama_ext.DTypeError, r"x\[0\] must be a pair"),
        ([{"prompt": "ab"}], None, llama_ext.DTypeError, r"x\[0\] is a dict"),
        (3, None, llama_ext.DTypeError, "int"),
        ("abc?", None, llama_ext.OptionError, "'\\?'"),
    ],
)
def test_what_is_none_of_that_is_a_typed_error(x: Any, y: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_data(x, y, reading())


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ([], None, "^the rest is empty"),
        ([("ab", "c"), ("ab", 3)], None, "^pair 1 of the rest must be"),
        (["ab", [1, 2]], None, r"^the rest\[1\] must be like the rest\[0\]"),
        (["ab", "cd"], ["e"], "^its answers must be a list of 2 answers"),
        ([1, 2, 99], None, "the rest"),
        (np.zeros((2, 3), int), np.zeros((2, 2), int), "^its answers must have the shape of the rest"),
    ],
)
def test_an_error_calls_data_what_the_caller_does(x: Any, y: Any, words: str) -> None:
    with pytest.raises(llama_ext.LlamaExtError, match=words):
        read_data(x, y, dataclasses.replace(reading(), x="the rest", y="its answers"))


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(llama_ext.OptionError, match="tokenizer"):
        read_data(["abc"], None, Reading(None, None, 11, 16))


# -- packing ----------------------------------------------------------------------------------------------------------


def _examples(lengths: Any) -> list[Example]:
    return [
        Example(np.full(size, index, np.int32), np.full(size, index, np.int32)) for index, size in enumerate(lengths)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_example_once_and_fills_rows(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 65, 300)
    rows = packed(_examples(lengths), 64)
    assert sorted(int(each.tokens[0]) for row in rows for each in row) == list(range(300))
    sizes = [sum(each.tokens.size for each in row) for row in rows]
    assert max(sizes) <= 64
    # No packing has fewer rows than this: the tokens must fit, and two documents of more than half a row do not.
    least = max(-(-int(lengths.sum()) // 64), int((lengths > 32).sum()))
    assert len(rows) <= 1.05 * least
    assert Examples(rows).fingerprint == Examples(packed(_examples(lengths), 64)).fingerprint


def test_packed_documents_are_sequences_of_their_own() -> None:
    source = read_data([[1, 2, 3], [4, 5], [6, 7, 8, 9]], None, reading(pack=True))
    assert isinstance(source, Examples)
    (row,) = source.all_rows()
    batch = collate([row])
    assert sorted(batch.lengths.tolist()) == [1, 2, 3]
    assert batch.tokens.size == batch.counted == 6


# -- streams ----------------------------------------------------------------------------------------------------------


def test_crops_are_anywhere_in_the_stream_and_the_same_for_a_step() -> None:
    ids = np.arange(40, dtype=np.int32)
    stream = Stream(ArrayReader(ids), 8)
    starts = []
    for step in range(100):
        for row in stream.rows(step, 5, seed=1):
            (example,) = row
            assert example.tokens.size == 8
            assert np.array_equal(example.labels, example.tokens + 1)
            starts.append(int(example.tokens[0]))
        again = stream.rows(step, 5, seed=1)
        assert [row[0].tokens[0] for row in again] == starts[-5:]
    assert set(starts) == set(range(32))
    assert stream.steps_per_epoch(2) == 2
    assert Stream(ArrayReader(ids), 8, shuffle=False).steps_per_epoch(2) == 3


def test_a_stream_in_order_gives_each_token_once() -> None:
    stream = Stream(ArrayReader(np.arange(40, dtype=np.int32)), 8, shuffle=False)
    labels = [row[0].labels for step in range(3) for row in stream.rows(step, 2, 0)]
    assert np.concatenate(labels).tolist() == list(range(1, 40))


def test_one_long_text_and_a_run_of_ids_are_streams() -> None:
    for given in ("abc" * 20, LETTERS.encode("abc" * 20), np.array(LETTERS.encode("abc" * 20))):
        source = read_data(given, None, reading())
        assert isinstance(source, Stream)
        assert source.context == 16


# -- token files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "item"), [(11, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_a_token_file_gives_back_what_was_written(tmp_path: Path, vocabulary: int, item: int) -> None:
    path = tmp_path / "tokens.bin"
    ids = np.random.default_rng(0).integers(0, vocabulary, 1000)
    ids[:2] = 0, vocabulary - 1
    assert write_token_file(path, [ids[:300], [], ids[300:].tolist()], vocabulary=vocabulary) == 1000
    assert path.stat().st_size == 64 + 1000 * item
    with TokenFile(path) as file:
        assert (len(file), file.vocabulary) == (1000, vocabulary)
        assert np.array_equal(file.read(0, 1000), ids)
        assert np.array_equal(file.read(17, 20), ids[17:20])
        assert file.read(5, 5).size == 0
        assert file.read(0, 3).dtype == np.int32
        with pytest.raises(llama_ext.OptionError):
            file.read(0, 1001)
    with pytest.raises(llama_ext.FormatError, match="closed"):
        file.read(0, 1)


def test_a_token_file_is_data_like_an_array(tmp_path: Path) -> None:
    ids = LETTERS.encode("abc: def. " * 20)
    write_token_file(tmp_path / "t", [ids], vocabulary=11, tokenizer=LETTERS)
    with TokenFile(tmp_path / "t") as file:
        source = read_data(file, None, reading())
        assert rows_of(source) == rows_of(read_data(ids, None, reading()))
        with pytest.raises(llama_ext.LimitError, match="vocabulary of 11"):
            read_data(file, None, reading(vocabulary=10))
        with pytest.raises(llama_ext.FormatError, match="another tokenizer"):
            read_data(file, None, reading(ended_letters()))


def test_every_byte_of_a_header_and_every_size_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_token_file(path, [list(range(11))], vocabulary=11)
    data = path.read_bytes()
    good = TokenFile(path).fingerprint
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(llama_ext.FormatError):
            TokenFile(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(llama_ext.FormatError, match="size must be 86 bytes, got 87"):
        TokenFile(path)
    for bit in range(64 * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            with TokenFile(path) as file:
                file.read(0, len(file))
                # Only a larger vocabulary, or another tokenizer's hash, may pass.
                assert bit // 8 >= 24
                assert file.fingerprint != good
        except (llama_ext.FormatError, llama_ext.LimitError):
            pass
    changed = bytearray(data)
    changed[64:66] = b"\x0b\0"
    path.write_bytes(changed)
    with TokenFile(path) as file, pytest.raises(llama_ext.FormatError, match="token 0 is 11"):
        file.read(0, 3)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_token_file(path, [list(range(11)) * 1000], vocabulary=11)
    with TokenFile(path) as file:
        os_truncate(path, 100)
        with pytest.raises(llama_ext.FormatError, match="shrank"):
            file.read(0, 3)


def os_truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    "pieces",
    [[[11]], [[-1]], [[0.5]], [[[1, 2]]], ["ab"], [None], [[[1], [1, 2]]], [["a"]], [[2**70]], [3], [{1: 2}], [[True]]],
)
def test_ids_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path: Path, pieces: Any) -> None:
    (tmp_path / "t").write_text("old")
    with pytest.raises(llama_ext.TokenIdError, match=r"a piece must be a list of whole numbers in \[0, 11\), got "):
        write_token_file(tmp_path / "t", [[1], *pieces], vocabulary=11)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert (tmp_path / "t").read_text() == "old"
    with pytest.raises(llama_ext.OptionError, match="no tokens"):
        write_token_file(tmp_path / "t", [], vocabulary=11)
    with pytest.raises(llama_ext.DTypeError, match=r"pieces must be lists or arrays of token ids, .*, got 5"):
        write_token_file(tmp_path / "t", 5, vocabulary=11)  # type: ignore[arg-type]
    assert (tmp_path / "t").read_text() == "old"


def test_rows_that_do_not_fit_into_memory_are_a_typed_error() -> None:
    class Full(ArrayReader):
        def read(self, begin: int, end: int) -> Any:
            raise MemoryError

    stream = Stream(Full(np.zeros(40, np.int32)), 4)
    with pytest.raises(llama_ext.OutOfMemoryError, match="8 rows of 4 tokens do not fit into memory: lower batch_size"):
        stream.rows(0, 8, 0)


def test_labels_of_several_lengths_are_a_typed_error() -> None:
    ids = np.array([[1, 2], [1, 2]])
    with pytest.raises(
        llama_ext.ShapeError, match=r"y must have the shape of x, \(2, 2\), got rows of several lengths"
    ):
        read_data(ids, [[1], [1, 2]], reading())
    for labels, error in (([[1, 2.5]] * 2, llama_ext.DTypeError), ([[None, 1]] * 2, llama_ext.DTypeError)):
        with pytest.raises(error, match="y must be integers, got"):
            read_data(ids, labels, reading())


def test_fingerprints_tell_data_apart() -> None:
    def fingerprint(*arguments: Any, **changes: Any) -> str:
        return read_data(*arguments, None, reading(**changes)).fingerprint

    given: list[Any] = [
        [[1, 2, 3]],
        [[1, 2, 4]],
        [[1, 2], [3, 4]],
        [[1, 2, 3, 4]],
        [1, 2, 3],
        np.array([[1, 2, 3, 4], [1, 2, 3, 4]]),
    ]
    found = [fingerprint(each) for each in given]
    assert len(set(found)) == len(given)
    assert found == [fingerprint(each) for each in given]
    assert fingerprint([[1, 2, 3]], shuffle=False) != found[0]
