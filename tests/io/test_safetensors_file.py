"""SafetensorsFile accepts what the safetensors package accepts, and anything else is a typed error."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_ext.errors import FormatError, LimitError, LlamaExtError, UnsupportedError
from llama_ext.io.safetensors_file import SafetensorsFile, TensorInfo
from llama_ext.limits import Limits
from shared_data import SHARED, requires_shared


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.float16),
        "empty": np.zeros((0, 5), np.float32),
        "scalar": np.array(3.5),
    }
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt", "note": "ä"})
    return path


def build(header: Any, body: bytes = b"", pad: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text + pad)) + text + pad + body


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def theirs(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """What the safetensors package sees, or None when it refuses the file."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except safetensors.SafetensorError:
        return None


def ours(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """What we see, after reading every tensor that can be read; None for a typed error."""
    try:
        with SafetensorsFile(path) as file:
            for info in file.tensors.values():
                with contextlib.suppress(UnsupportedError):
                    assert file.read(info.name).nbytes == info.nbytes
                file.release(info.name)
            return {info.name: (info.dtype, info.shape) for info in file.tensors.values()}
    except LlamaExtError:
        return None


def test_tensors_are_read_only_views_of_the_file(small: Path) -> None:
    with SafetensorsFile(small) as file:
        expected = safetensors.numpy.load_file(small)
        assert set(file.tensors) == set(expected)
        for name, array in expected.items():
            view = file.read(name)
            np.testing.assert_array_equal(view, array)
            assert (view.dtype, view.shape) == (array.dtype, array.shape)
            assert view.size == 0 or not view.flags.writeable
            assert view.size == 0 or not view.flags.owndata
        assert file.metadata == {"format": "pt", "note": "ä"}


def test_tensors_come_in_the_order_of_the_file(small: Path) -> None:
    with SafetensorsFile(small) as file:
        offsets = [info.offset for info in file.tensors.values()]
    assert offsets == sorted(offsets)


def test_bfloat16_is_read_as_its_bits(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({"x": entry("BF16", [2], 0, 4)}, b"\x80\x3f\x00\xc0"))
    with SafetensorsFile(path) as file:
        assert (file.tensors["x"].dtype, file.tensors["x"].core_dtype) == ("BF16", "bfloat16")
        assert file.read("x").dtype == np.uint16
        assert file.read("x").tolist() == [0x3F80, 0xC000]


@pytest.mark.parametrize("dtype", ["I64", "I8", "U8", "BOOL", "F8_E4M3"])
def test_another_dtype_is_refused_by_name_when_it_is_read(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    size = 8 if dtype == "I64" else 1
    path.write_bytes(
        build({"x": entry(dtype, [1], 0, size), "y": entry("F32", [1], size, size + 4)}, b"\0" * (size + 4))
    )
    with SafetensorsFile(path) as file:
        assert file.read("y").tolist() == [0.0]
        with pytest.raises(UnsupportedError, match=f"tensor x has dtype {dtype}"):
            file.read("x")
        with pytest.raises(UnsupportedError, match=f"tensor x has dtype {dtype}"):
            _ = file.tensors["x"].core_dtype


def test_an_unaligned_tensor_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    body = b"\0\0" + np.float32([1.5, 2.5]).tobytes()
    path.write_bytes(build({"x": entry("F16", [1], 0, 2), "y": entry("F32", [2], 2, 10)}, body))
    with SafetensorsFile(path) as file:
        assert file.read("y").flags.aligned
        assert file.read("y").tolist() == [1.5, 2.5]


def test_a_view_outlives_the_file(small: Path) -> None:
    file = SafetensorsFile(small)
    view = file.read("a")
    file.close()
    file.close()
    assert view.sum() == 15
    with pytest.raises(FormatError, match="closed"):
        file.read("a")
    file.release("a")


def test_a_tensor_that_is_not_there_is_a_format_error(small: Path) -> None:
    with SafetensorsFile(small) as file:
        for use in (file.read, file.release):
            with pytest.raises(FormatError, match="no tensor 'nothing' among the 4"):
                use("nothing")


def resident(view: np.ndarray[Any, Any]) -> int:
    """Bytes of this mapping in memory, by the kernel's account."""
    address = view.__array_interface__["data"][0]
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the mapping is not listed")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc/self/smaps")
def test_released_pages_leave_memory_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    arrays = {name: np.full(1 << 20, index, np.float32) for index, name in enumerate("abcd")}
    safetensors.numpy.save_file(arrays, path)
    with SafetensorsFile(path) as file:
        peak = 0
        for name in arrays:
            assert file.read(name).max() == arrays[name][0]
            peak = max(peak, resident(file.read(name)))
            file.release(name)
        assert peak < 10 << 20, "one tensor of 4 MiB and the kernel's read-around, not all four"
        assert resident(file.read("a")) < 1 << 20
        assert file.read("c").sum() == 2 << 20


def test_every_truncation_is_refused_like_the_package_does(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert theirs(path) is None
        with pytest.raises(FormatError) as caught:
            SafetensorsFile(path)
        assert caught.value.path == str(path)
        assert "Truncated download?" in str(caught.value)


def test_every_bit_flip_of_the_header_is_judged_like_the_package_does(small: Path, tmp_path: Path) -> None:
    data = bytearray(small.read_bytes())
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    path = tmp_path / "flipped.safetensors"
    accepted = 0
    for position in range(header_end):
        for bit in range(8):
            data[position] ^= 1 << bit
            path.write_bytes(data)
            data[position] ^= 1 << bit
            expected = theirs(path)
            assert ours(path) == expected, (position, bit)
            accepted += expected is not None
    assert accepted > 0, "a flip in a name is still a valid file"


F32 = entry("F32", [4, 4], 0, 64)
HANDMADE: dict[str, bytes] = {
    "plain": build({"a": F32}, b"\0" * 64),
    "padded": build({"a": F32}, b"\0" * 64, pad=b"   \n\t"),
    "padded with zeros": build({"a": F32}, b"\0" * 64, pad=b"\0\0"),
    "leading space": build(b" " + json.dumps({"a": F32}).encode(), b"\0" * 64),
    "same name twice": build(
        b'{"a":' + json.dumps(F32).encode() + b',"a":' + json.dumps(F32).encode() + b"}", b"\0" * 64
    ),
    "overlap": build({"a": F32, "b": F32}, b"\0" * 64),
    "hole": build({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, b"\0" * 12),
    "bytes left over": build({"a": F32}, b"\0" * 65),
    "bytes missing": build({"a": F32}, b"\0" * 63),
    "shape larger than bytes": build({"a": entry("F32", [4, 5], 0, 64)}, b"\0" * 64),
    "shape smaller than bytes": build({"a": entry("F32", [4, 3], 0, 64)}, b"\0" * 64),
    "product wraps to zero": build({"a": entry("F32", [1 << 32, 1 << 32], 0, 0)}),
    "huge with a zero": build({"a": entry("F32", [1 << 63, 0], 0, 0)}),
    "end before begin": build({"a": entry("F32", [1], 8, 4)}, b"\0" * 8),
    "negative dimension": build({"a": entry("F32", [-4, -4], 0, 64)}, b"\0" * 64),
    "offset of 2**64": build({"a": entry("F32", [1], 1 << 64, (1 << 64) + 4)}, b"\0" * 4),
    "float offset": build(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0.0,4]}}', b"\0" * 4),
    "as an array": build({"a": ["F32", [4, 4], [0, 64]]}, b"\0" * 64),
    "unknown dtype": build({"a": entry("F128", [4], 0, 64)}, b"\0" * 64),
    "half a byte": build({"a": entry("F4", [2, 2], 0, 2)}, b"\0" * 2),
    "many dimensions": build({"a": entry("F32", [1] * 40, 0, 4)}, b"\0" * 4),
    "more dimensions than NumPy has": build({"a": entry("F32", [1] * 70, 0, 4)}, b"\0" * 4),
    "no dimension": build({"a": entry("F32", [], 0, 4)}, b"\0" * 4),
    "no tensor": build({}),
    "only metadata": build({"__metadata__": {"a": "b"}}),
    "metadata null": build({"__metadata__": None, "a": F32}, b"\0" * 64),
    "metadata not text": build({"__metadata__": {"a": 1}, "a": F32}, b"\0" * 64),
    "empty name": build({"": F32}, b"\0" * 64),
    "name with a zero": build({"a\0b": F32}, b"\0" * 64),
    "lone surrogate": build(b'{"\\ud800":' + json.dumps(F32).encode() + b"}", b"\0" * 64),
    "not UTF-8": build(b'{"\xff":' + json.dumps(F32).encode() + b"}", b"\0" * 64),
    "not an object": build([]),
    "null": build(None),
    "not JSON": build(b"{'a': 1}"),
    "empty header": build(b""),
    "UTF-16 header": build("{}".encode("utf-16-le")),
    "deep": build(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "extra field": build({"a": {**F32, "more": [1, {"x": None}]}}, b"\0" * 64),
    "missing field": build({"a": {"dtype": "F32", "shape": [4, 4]}}, b"\0" * 64),
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "zero length": b"\0" * 8,
    "length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "length of 2**64 - 1": struct.pack("<Q", (1 << 64) - 1) + b"{}",
}


@pytest.mark.parametrize("name", HANDMADE)
def test_a_handmade_file_is_judged_like_the_package_does(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HANDMADE[name])
    assert ours(path) == theirs(path)


NUMBERS = (
    st.sampled_from([0, 1, 2, 4, 8, 16, 63, 64, 65, -1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1, 1 << 64])
    | st.floats()
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "F4", "f32", ""]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    }
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "x.safetensors"


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), st.integers(0, 130), st.binary(max_size=3))
def test_any_header_is_judged_like_the_package_does(
    scratch: Path, header: dict[str, Any], length: int, pad: bytes
) -> None:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    scratch.write_bytes(build(text, b"\0" * length, pad))
    assert ours(scratch) == theirs(scratch)


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4), st.sampled_from([0, 0, 0, -1, 1]), st.data())
def test_any_nearly_valid_file_is_judged_like_the_package_does(
    scratch: Path, shapes: list[list[int]], error: int, data: st.DataObject
) -> None:
    header, end = {}, 0
    for index, shape in enumerate(shapes):
        word = data.draw(st.sampled_from(["F32", "F16", "BF16", "F64", "U8"]))
        size = {"F64": 8, "F32": 4, "U8": 1}.get(word, 2) * int(np.prod(shape, dtype=np.int64))
        header[f"t{index}"] = entry(word, shape, end, end + size)
        end += size
    if header and error:
        victim = header[data.draw(st.sampled_from(sorted(header)))]
        victim["data_offsets"][data.draw(st.integers(0, 1))] += error
    scratch.write_bytes(build(header, b"\0" * end))
    assert ours(scratch) == theirs(scratch)


def test_a_hostile_header_length_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    with pytest.raises(LimitError, match=r"100000001 bytes.*safetensors_header_bytes"):
        SafetensorsFile(path)
    path.write_bytes(build({"a": F32}, b"\0" * 64))
    with pytest.raises(LimitError, match="the limit is 10 "):
        SafetensorsFile(path, Limits(safetensors_header_bytes=10))


@pytest.mark.parametrize(
    "begin", [b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04aaaa", b"GGUF\x03\0\0\0"]
)
def test_another_format_under_this_name_is_recognised(begin: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(begin + b"\xff" * 100)
    with pytest.raises((FormatError, LimitError)) as caught:
        SafetensorsFile(path)
    assert "safetensors" in str(caught.value)


def test_counts_are_limited(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({f"t{index}": entry("F32", [0], 0, 0) for index in range(20)}))
    with pytest.raises(LimitError, match=r"Limits\.tensors"):
        SafetensorsFile(path, Limits(tensors=19))
    path.write_bytes(build({"__metadata__": {str(index): "" for index in range(20)}}))
    with pytest.raises(LimitError, match=r"Limits\.metadata_entries"):
        SafetensorsFile(path, Limits(metadata_entries=19))
    path.write_bytes(build({"__metadata__": {"a": "x" * 20}}))
    with pytest.raises(LimitError, match=r"Limits\.string_bytes"):
        SafetensorsFile(path, Limits(string_bytes=19))


MANY = 2_000_000
HUGE_HEADERS = {
    "metadata": b'{"__metadata__":{' + b",".join(b'"%d":""' % index for index in range(MANY // 4)) + b"}}",
    "tensors": b"{" + b",".join(b'"%d":{}' % index for index in range(MANY // 4)) + b"}",
    "dimensions": b'{"a":{"dtype":"F32","shape":[' + b"1," * MANY + b'1],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("name", HUGE_HEADERS)
def test_a_header_of_very_many_entries_is_refused_before_it_is_parsed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(build(HUGE_HEADERS[name]))
    tracemalloc.start()
    try:
        with pytest.raises(LimitError, match=r"more than 65536 tensors \(Limits\.tensors\)"):
            SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(HUGE_HEADERS[name])
    finally:
        tracemalloc.stop()


def test_long_metadata_is_no_count_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({"__metadata__": {"a": ':"\\' * 400_000}}))
    with SafetensorsFile(path) as file:
        assert len(file.metadata["a"]) == 1_200_000


def test_a_file_that_shrank_is_refused_before_its_pages_are_touched(small: Path) -> None:
    with SafetensorsFile(small) as file:
        os.truncate(small, 100)
        with pytest.raises(FormatError, match="shrank from"):
            file.read("a")


def test_a_file_replaced_after_opening_is_still_read_whole(small: Path) -> None:
    with SafetensorsFile(small) as file:
        other = small.with_name("other")
        other.write_bytes(b"nothing")
        os.replace(other, small)
        assert file.read("a").sum() == 15


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, found in ((pipe, "a special file"), (tmp_path, "a directory"), (tmp_path / "nowhere", "no such file")):
        with pytest.raises(FormatError, match=found):
            SafetensorsFile(path)
    with pytest.raises(FormatError, match="null"):
        SafetensorsFile(str(tmp_path) + "/\0")


def test_many_opened_and_closed_files_leave_nothing_open(small: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        with SafetensorsFile(small) as file:
            file.read("a")
    bad = small.with_name("bad")
    bad.write_bytes(small.read_bytes()[:-1])
    for _ in range(200):
        with pytest.raises(FormatError):
            SafetensorsFile(bad)
    assert len(os.listdir("/proc/self/fd")) == before


@requires_shared
def test_a_real_file_reads_as_the_package_reads_it() -> None:
    path = SHARED / "stories260K" / "model.safetensors"
    with SafetensorsFile(path) as file:
        expected = safetensors.numpy.load_file(path)
        assert set(file.tensors) == set(expected)
        assert all(np.array_equal(file.read(name), array) for name, array in expected.items())


@pytest.mark.parametrize(
    "header", [{"a" * 100_000: entry("F32", [1], 0, 8)}, {"a": entry("F" * 100_000, [1], 0, 4)}], ids=["name", "dtype"]
)
def test_a_message_stays_short_whatever_the_file_says(header: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(build(header, b"\0" * 8))
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    assert len(str(caught.value)) < 1000


def test_a_tensor_info_is_a_value() -> None:
    assert TensorInfo("a", "F32", (1,), 8, 4) == TensorInfo("a", "F32", (1,), 8, 4)
