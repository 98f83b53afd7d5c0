"""GgufFile reads what the format's description says, and anything else is a typed error, soon and in little memory."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf_bytes as g
from llama_ext.errors import FormatError, LimitError, LlamaExtError, UnsupportedError
from llama_ext.io.gguf_file import GgufFile, ValueType
from llama_ext.limits import Limits
from subprocesses import run_script
from timing import SLACK, within

BOUNDARIES = [0, 1, 2, 3, 31, 32, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
BOUNDARIES += [1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]

ENTRIES = [
    g.entry("general.architecture", g.STRING, "llama"),
    g.entry("u8", g.UINT8, 255),
    g.entry("i8", g.INT8, -128),
    g.entry("u16", g.UINT16, 65535),
    g.entry("i16", g.INT16, -32768),
    g.entry("u32", g.UINT32, 4096),
    g.entry("i32", g.INT32, -1),
    g.entry("f32", g.FLOAT32, 1.5),
    g.entry("bool", g.BOOL, True),
    g.entry("u64", g.UINT64, (1 << 64) - 1),
    g.entry("i64", g.INT64, -(1 << 63)),
    g.entry("f64", g.FLOAT64, 0.1),
    g.entry("words", g.ARRAY, (g.STRING, ["a", "", "ä🦙"])),
    g.entry("scores", g.ARRAY, (g.FLOAT32, [0.5, -1.0])),
    g.entry("flags", g.ARRAY, (g.BOOL, [True, False])),
    g.entry("nested", g.ARRAY, (g.ARRAY, [(g.INT32, [1, 2]), (g.STRING, ["x"]), (g.ARRAY, [])])),
    g.entry("empty", g.ARRAY, (g.UINT8, [])),
]
TENSORS = [g.tensor("a", [4, 2]), g.tensor("b", [32], g.Q8_0, 32), g.tensor("c", [32, 3, 2], g.Q4_0, 96)]
DATA = np.arange(8, dtype=np.float32).tobytes() + bytes(range(34)) + bytes(30) + bytes(range(108))
SMALL = g.gguf(ENTRIES, TENSORS, DATA)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "model.gguf"


def read(path: Path, data: bytes, limits: Limits | None = None) -> GgufFile:
    """Opens the file and touches every tensor."""
    path.write_bytes(data)
    with GgufFile(path, limits or Limits()) as file:
        for tensor in file.tensors.values():
            assert tensor.data.nbytes == tensor.nbytes
            assert tensor.dequantize().shape == tensor.shape
    return file


def judge(path: Path, data: bytes) -> LlamaExtError | None:
    """The typed error, or None for a file that was read whole; within two seconds and in bounded memory."""
    path.write_bytes(data)
    refusal = None
    tracemalloc.start()
    with within(0.2):
        try:
            with GgufFile(path) as file:
                for tensor in file.tensors.values():
                    int(tensor.data.sum())
        except LlamaExtError as error:
            refusal = error
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (1 << 20) + 20 * len(data)
    assert refusal is None or (str(path) in str(refusal) and len(str(refusal)) < 1000)
    return refusal


def test_every_type_of_value_is_read(scratch: Path) -> None:
    file = read(scratch, SMALL)
    values = file.metadata
    assert values["general.architecture"] == "llama"
    assert [values[name] for name in ("u8", "i8", "u16", "i16", "u32", "i32")] == [255, -128, 65535, -32768, 4096, -1]
    assert (values["f32"], values["bool"], values["f64"]) == (1.5, True, 0.1)
    assert (values["u64"], values["i64"]) == ((1 << 64) - 1, -(1 << 63))
    assert all(type(values[name]) in (int, float, bool) for name in ("u8", "f32", "bool", "u64", "f64"))
    assert values["words"] == ["a", "", "ä🦙"]
    assert (values["scores"].dtype, values["scores"].tolist()) == (np.float32, [0.5, -1.0])
    assert (values["flags"].dtype, values["flags"].tolist()) == (np.bool_, [True, False])
    assert [list(item) for item in values["nested"]] == [[1, 2], ["x"], []]
    assert values["empty"].size == 0
    assert not values["scores"].flags.writeable
    assert file.value_types["u8"] is ValueType.UINT8
    assert file.value_types["words"] is ValueType.ARRAY
    assert list(values) == [*file.value_types]


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_are_read_only_views_of_the_file(version: int, scratch: Path) -> None:
    file = read(scratch, g.gguf(ENTRIES, TENSORS, DATA, version=version))
    assert (file.version, file.alignment) == (version, 32)
    with GgufFile(scratch) as file:
        a, b, c = file.tensors.values()
        assert [(t.name, t.type.name, t.shape) for t in (a, b, c)] == [
            ("a", "F32", (2, 4)),
            ("b", "Q8_0", (32,)),
            ("c", "Q4_0", (2, 3, 32)),
        ]
        assert (a.data.shape, b.data.shape, c.data.shape) == ((2, 16), (1, 34), (6, 18))
        assert a.dequantize().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert c.data.tobytes() == bytes(range(108))
        assert not c.data.flags.writeable
        assert not c.data.flags.owndata
        held = c.data
    assert held[0, 1] == 1, "a view outlives the file"
    with pytest.raises(FormatError, match="tensor c cannot be read: the file was closed"):
        _ = c.data
    c.release()


def test_tensors_come_in_the_order_of_their_bytes_and_may_leave_holes(scratch: Path) -> None:
    file = read(scratch, g.gguf([], [g.tensor("late", [8], offset=256), g.tensor("early", [8])], bytes(288)))
    assert list(file.tensors) == ["early", "late"]


def test_a_scalar_and_a_file_of_nothing(scratch: Path) -> None:
    assert read(scratch, g.gguf([], [g.tensor("x", [])], b"\0\0\x80\x3f")).tensors["x"].shape == ()
    assert read(scratch, g.gguf()[:24]).tensors == {}


def test_padding_at_the_end_need_not_be_there(scratch: Path) -> None:
    assert len(read(scratch, SMALL + bytes(100)).tensors) == 3


def test_every_truncation_is_a_typed_error(scratch: Path) -> None:
    for length in range(len(SMALL)):
        error = judge(scratch, SMALL[:length])
        assert isinstance(error, FormatError), length
        assert "Truncated download?" in str(error)


def test_every_bit_flip_of_the_header_is_judged(scratch: Path) -> None:
    data = bytearray(SMALL)
    accepted = 0
    for position in range(len(SMALL) - len(DATA)):
        for bit in range(8):
            data[position] ^= 1 << bit
            accepted += judge(scratch, bytes(data)) is None
            data[position] ^= 1 << bit
    assert accepted > 0, "a flip in a value is still a valid file"


def at(offset: int, code: str) -> Callable[[int], bytes]:
    """SMALL with one number replaced."""
    size = struct.calcsize("<" + code)

    def build(value: int) -> bytes:
        wrapped = value % (1 << 8 * size)
        return SMALL[:offset] + struct.pack("<" + code, wrapped) + SMALL[offset + size :]

    return build


HEAD = len(g.gguf()[:24])
WORDS = SMALL.index(b"words") + len("words")
NESTED = SMALL.index(b"nested") + len("nested")
TENSOR_A = HEAD + sum(map(len, ENTRIES))
TENSOR_C = SMALL.index(TENSORS[2])
FIELDS: dict[str, Callable[[int], bytes]] = {
    "version": at(4, "I"),
    "number of tensors": at(8, "Q"),
    "number of entries": at(16, "Q"),
    "length of the first key": at(24, "Q"),
    "type of the first value": at(24 + 8 + 20, "I"),
    "length of the first value": at(24 + 8 + 20 + 4, "Q"),
    "type of an array": at(WORDS, "I"),
    "type of an array's elements": at(WORDS + 4, "I"),
    "length of an array of strings": at(WORDS + 8, "Q"),
    "length of a string in an array": at(WORDS + 16, "Q"),
    "type of a nested array": at(NESTED + 16, "I"),
    "length of an array of arrays": at(NESTED + 8, "Q"),
    "length of a nested array": at(NESTED + 20, "Q"),
    "length of a tensor's name": at(TENSOR_A, "Q"),
    "number of dimensions": at(TENSOR_A + 9, "I"),
    "first dimension": at(TENSOR_A + 13, "Q"),
    "second dimension": at(TENSOR_A + 21, "Q"),
    "type of a tensor": at(TENSOR_A + 29, "I"),
    "offset of the first tensor": at(TENSOR_A + 33, "Q"),
    "row of blocks": at(TENSOR_C + 13, "Q"),
    "offset of the last tensor": at(TENSOR_C + 41, "Q"),
}
# What is as good as the original: the tensor or the value is another one, but a valid one.
VALID = {
    ("version", 2),
    ("version", 3),
    *(("number of tensors", count) for count in range(3)),
    ("first dimension", 1),
    ("first dimension", 2),
    ("first dimension", 3),
    ("second dimension", 1),
    ("second dimension", 2),
    ("type of a tensor", 1),
    ("row of blocks", 32),
    ("offset of the first tensor", 0),
}


@pytest.mark.parametrize("value", BOUNDARIES)
@pytest.mark.parametrize("field", FIELDS)
def test_every_number_of_the_header_at_its_boundaries(field: str, value: int, scratch: Path) -> None:
    data = FIELDS[field](value)
    wraps = data == SMALL
    error = judge(scratch, data)
    if wraps or (field, value) in VALID:
        assert error is None
    elif field == "type of a nested array" and value in (0, 1, 7):  # what follows is then read as something else
        pass
    else:
        assert error is not None, "this is not the file that was written"


@pytest.mark.parametrize("value", [value for value in BOUNDARIES if value < 1 << 32])
def test_every_alignment(value: int, scratch: Path) -> None:
    data = g.gguf(
        [g.entry("general.alignment", g.UINT32, value)],
        [g.tensor("x", [8])],
        bytes(32),
        alignment=max(value, 1) if value <= 1 << 16 else 32,
    )
    error = judge(scratch, data)
    valid = value in (1, 2, 32, 1 << 16)
    assert (error is None) == valid
    if not valid:
        assert "general.alignment must be an UINT32 that is a power of two" in str(error)


def test_an_alignment_of_another_type_is_refused(scratch: Path) -> None:
    for kind, value in ((g.UINT64, 32), (g.STRING, "32"), (g.ARRAY, (g.UINT32, [32])), (g.BOOL, True)):
        error = judge(scratch, g.gguf([g.entry("general.alignment", kind, value)]))
        assert isinstance(error, FormatError)
        assert error.field == "general.alignment"


def test_offsets_follow_the_alignment(scratch: Path) -> None:
    entries = [g.entry("general.alignment", g.UINT32, 8)]
    tensors = [g.tensor("x", [1]), g.tensor("y", [1], offset=8)]
    file = read(scratch, g.gguf(entries, tensors, struct.pack("<f4xf", 1.0, 2.0), alignment=8))
    assert (file.alignment, file.tensors["y"].offset % 8) == (8, 0)
    with GgufFile(scratch) as file:
        assert file.tensors["y"].dequantize().tolist() == [2.0]


BROKEN: dict[str, tuple[bytes, str]] = {
    "same key twice": (g.gguf([ENTRIES[1], ENTRIES[1]]), "the key 'u8' appears twice"),
    "same tensor twice": (g.gguf([], [TENSORS[0], TENSORS[0]], bytes(64)), "the tensor 'a' appears twice"),
    "empty key": (g.gguf([g.entry("", g.UINT8, 1)]), "the key of entry 0 is empty"),
    "empty name": (g.gguf([], [g.tensor("", [8])], bytes(32)), "the name of tensor 0 is empty"),
    "key not UTF-8": (g.gguf([g.entry(b"\xff", g.UINT8, 1)]), "the key of entry 0 is not valid UTF-8"),
    "value not UTF-8": (g.gguf([g.entry("k", g.STRING, b"a\xc0")]), "the value of 'k' is not valid UTF-8.*byte 1"),
    "element not UTF-8": (
        g.gguf([g.entry("k", g.ARRAY, (g.STRING, [b"a", b"\xed\xa0\x80"]))]),
        "element 1 of the value of 'k' is not valid UTF-8",
    ),
    "name not UTF-8": (g.gguf([], [g.tensor(b"\xff", [8])], bytes(32)), "the name of tensor 0 is not valid UTF-8"),
    "bool of 2": (g.gguf([g.string("k") + struct.pack("<IB", g.BOOL, 2)]), "must be 0 or 1, got 2"),
    "array of bools with a 3": (
        g.gguf([g.string("k") + struct.pack("<IIQ2B", g.ARRAY, g.BOOL, 2, 1, 3)]),
        "must be 0 or 1, got 3",
    ),
    "five dimensions": (g.gguf([], [g.tensor("x", [1] * 5)], bytes(32)), "has 5 dimensions, at most 4"),
    "a dimension of zero": (g.gguf([], [g.tensor("x", [4, 0])], bytes(32)), r"has a dimension of 0: \[4, 0\]"),
    "zero beside a huge one": (g.gguf([], [g.tensor("x", [1 << 63, 0])], bytes(32)), "has a dimension of 0"),
    "product wraps to zero": (
        g.gguf([], [g.tensor("x", [1 << 32, 1 << 32])], bytes(32)),
        "needs 73786976294838206464 b",
    ),
    "product wraps to eight": (
        g.gguf([], [g.tensor("x", [(1 << 62) + 8, 4])], bytes(128)),
        "needs 73786976294838206592 bytes",
    ),
    "half a block": (
        g.gguf([], [g.tensor("x", [33], g.Q8_0)], bytes(99)),
        "rows of 33 values, but Q8_0 has blocks of 32",
    ),
    "half a super-block": (g.gguf([], [g.tensor("x", [32, 8], g.Q4_K)], bytes(200)), "Q4_K has blocks of 256"),
    "overlap": (
        g.gguf([], [g.tensor("x", [16]), g.tensor("y", [8], offset=32)], bytes(64)),
        "'y' begins at .*inside tensor 'x'",
    ),
    "the same bytes": (g.gguf([], [g.tensor("x", [8]), g.tensor("y", [8])], bytes(32)), "inside tensor"),
    "misaligned": (
        g.gguf([], [g.tensor("x", [1], offset=4)], bytes(64)),
        "begins at 4, which is no multiple of the al",
    ),
    "beyond the file": (g.gguf([], [g.tensor("x", [8], offset=32)], bytes(32)), "the file has .*Truncated download"),
    "offset wraps": (g.gguf([], [g.tensor("x", [8], offset=(1 << 64) - 32)], bytes(64)), "needs 32 bytes at 184467"),
    "not GGUF": (b"PK\x03\x04" + bytes(40), "no GGUF file: it begins with b'PK"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_a_format_error_that_says_what(name: str, scratch: Path) -> None:
    data, message = BROKEN[name]
    scratch.write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        GgufFile(scratch)
    assert caught.value.path == str(scratch)


UNSUPPORTED = {
    "version 1": (g.gguf(version=1), "GGUF version 1 is not supported. Supported: versions 2 and 3"),
    "version 4": (g.gguf(version=4), "GGUF version 4 is not supported"),
    "big-endian": (g.gguf(version=3 << 24), "big-endian GGUF, version 3, is not supported"),
    "older format": (b"tjgg" + bytes(40), "a format older than GGUF"),
    "IQ2_XS": (
        g.gguf([], [g.tensor("blk.0.ffn_up.weight", [256], 17)], bytes(74)),
        "'blk.0.ffn_up.weight' has type IQ2_XS",
    ),
    "unknown type": (g.gguf([], [g.tensor("x", [256], 99)], bytes(99)), "tensor 'x' has type number 99"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_named(name: str, scratch: Path) -> None:
    data, message = UNSUPPORTED[name]
    scratch.write_bytes(data)
    with pytest.raises(UnsupportedError, match=message):
        GgufFile(scratch)


def test_counts_are_limited(scratch: Path) -> None:
    cases: list[tuple[bytes, dict[str, int]]] = [
        (g.gguf([], [g.tensor(str(index), [8], offset=32 * index) for index in range(3)], bytes(96)), {"tensors": 2}),
        (g.gguf(ENTRIES[:3]), {"metadata_entries": 2}),
        (g.gguf([g.entry("k", g.STRING, "abc")]), {"string_bytes": 2}),
        (g.gguf([g.entry("k", g.ARRAY, (g.STRING, ["a", "abc"]))]), {"string_bytes": 2}),
        (g.gguf([g.entry("k", g.ARRAY, (g.UINT8, [1, 2, 3]))]), {"array_elements": 2}),
        (
            g.gguf([g.entry("k", g.ARRAY, (g.UINT8, [1, 2])), g.entry("l", g.ARRAY, (g.UINT8, [3]))]),
            {"array_elements": 2},
        ),
        (g.gguf([g.entry("k", g.ARRAY, (g.ARRAY, [(g.UINT8, [])]))]), {"array_elements": 2}),
        (g.gguf([g.entry("k", g.ARRAY, (g.STRING, ["abcdefgh"] * 9))]), {"gguf_header_bytes": 100}),
        (g.gguf([g.entry("k", g.STRING, "abcdefgh" * 20)]), {"gguf_header_bytes": 100}),
    ]
    for data, limits in cases:
        read(scratch, data)
        with pytest.raises(LimitError, match=rf"Limits\.{next(iter(limits))}"):
            read(scratch, data, Limits(**limits))


def test_deep_nesting_is_limited(scratch: Path) -> None:
    value: tuple[int, list[Any]] = (g.UINT8, [1])
    for _ in range(100):
        value = (g.ARRAY, [value])
    scratch.write_bytes(g.gguf([g.entry("k", g.ARRAY, value)]))
    with pytest.raises(LimitError, match="nested deeper than 64"):
        GgufFile(scratch)


HOSTILE = {
    "empty strings": struct.pack("<IQ", g.STRING, 2 << 20) + bytes(8 * (2 << 20)),
    "empty arrays": struct.pack("<IQ", g.ARRAY, 65_536) + bytes(12 * 65_536),
    "numbers": struct.pack("<IQ", g.UINT64, 4 << 20) + bytes(8 * (4 << 20)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_most_that_the_limits_allow_is_read_in_time(name: str, scratch: Path) -> None:
    scratch.write_bytes(g.gguf([g.string("k") + struct.pack("<I", g.ARRAY) + HOSTILE[name]]))
    # In a process of its own: measuring which lines run takes longer than running them.
    script = """
        import sys, time
        from llama_ext.io.gguf_file import GgufFile
        start = time.process_time()
        elements = len(GgufFile(sys.argv[1]).metadata["k"])
        print(elements, time.process_time() - start)
    """
    elements, seconds = run_script(script, str(scratch)).split()
    assert int(elements) >= 65_536
    assert float(seconds) < 2 * SLACK


def test_strings_across_the_readers_buffer(scratch: Path) -> None:
    lengths = [(1 << 18) + change for change in (-600, 600, -8, -1, 0, 1, 8)]
    words = ["x" * length for length in (1, 0, 8, *lengths, 3)] + ["é" * 40] * 9000
    assert read(scratch, g.gguf([g.entry("k", g.ARRAY, (g.STRING, words))])).metadata["k"] == words


def test_a_file_that_shrank_is_refused_before_its_pages_are_touched(scratch: Path) -> None:
    scratch.write_bytes(SMALL)
    with GgufFile(scratch) as file:
        os.truncate(scratch, 100)
        with pytest.raises(FormatError, match="shrank from"):
            _ = file.tensors["a"].data


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    for path, found in ((tmp_path, "a directory"), (tmp_path / "nowhere", "no such file")):
        with pytest.raises(FormatError, match=f"expected a GGUF file, found {found}"):
            GgufFile(path)


def test_many_opened_and_closed_files_leave_nothing_open(scratch: Path) -> None:
    scratch.write_bytes(SMALL)
    bad = scratch.with_name("bad.gguf")
    bad.write_bytes(SMALL[:-1])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        with GgufFile(scratch) as file:
            file.tensors["a"].dequantize()
        with pytest.raises(FormatError):
            GgufFile(bad)
    assert len(os.listdir("/proc/self/fd")) == before


NUMBERS = st.sampled_from(BOUNDARIES) | st.integers(0, 300)


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_any_mutation_is_read_or_refused(scratch: Path, data: st.DataObject) -> None:
    mutant = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(SMALL) - len(DATA)))
        kind = data.draw(st.sampled_from(["number", "bytes", "cut", "insert"]))
        if kind == "number":
            mutant[place : place + 8] = struct.pack("<Q", data.draw(NUMBERS))
        elif kind == "bytes":
            mutant[place : place + 4] = data.draw(st.binary(min_size=4, max_size=4))
        elif kind == "cut":
            del mutant[place : place + data.draw(st.integers(1, 40))]
        else:
            mutant[place:place] = data.draw(st.binary(max_size=16))
    judge(scratch, bytes(mutant))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(1, 5), max_size=3), st.sampled_from([0, 1, 2, 8, 12, 14])), max_size=5),
    st.sampled_from([1, 8, 32, 64]),
)
def test_any_valid_file_is_read_whole(scratch: Path, shapes: list[tuple[list[int], int]], alignment: int) -> None:
    sizes = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 14: (256, 210)}
    tensors, body, expected = [], b"", {}
    for index, (shape, kind) in enumerate(shapes):
        block, nbytes = sizes[kind]
        dimensions = [(shape[0] if shape else 1) * block, *shape[1:]]
        blocks = int(np.prod(dimensions)) // block
        content = bytes((index * 37 + place) % 251 for place in range(blocks * nbytes))
        tensors.append(g.tensor(f"t{index}", dimensions, kind, len(body)))
        expected[f"t{index}"] = (tuple(reversed(dimensions)), content)
        body += content + bytes(-len(content) % alignment)
    entries = [g.entry("general.alignment", g.UINT32, alignment)]
    scratch.write_bytes(g.gguf(entries, tensors, body, alignment=alignment))
    with GgufFile(scratch) as file:
        assert {t.name: (t.shape, t.data.tobytes()) for t in file.tensors.values()} == expected
