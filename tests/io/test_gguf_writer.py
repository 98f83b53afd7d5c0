"""What write_gguf writes, our reader and the gguf package read as it was meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_ext.errors import CheckpointError, LlamaExtError, OptionError, ShapeError
from llama_ext.io.gguf_file import GgufFile, ValueType
from llama_ext.io.gguf_types import BY_NAME, quantize
from llama_ext.io.gguf_writer import TensorToWrite, write_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "count": 7,
    "eps": 1e-5,
    "flag": True,
    "words": ["a", "", "ä🦙"],
    "no words": [],
    "scores": np.array([0.5, -1.0], np.float32),
    "types": np.array([1, 3], np.int32),
    "flags": np.array([True, False]),
    "big endian": np.array([1, 2], ">u2"),
    "offset": np.uint64(1 << 63),
    "negative": np.int8(-3),
    "double": np.float64(0.1),
}


def tensors() -> list[TensorToWrite]:
    rng = np.random.default_rng(3)
    result = []
    for name, shape in (("F32", (3, 5)), ("F16", (7,)), ("BF16", (2, 3, 4)), ("Q8_0", (4, 64)), ("Q4_0", (3, 32))):
        data = quantize(rng.standard_normal(shape, dtype=np.float32), BY_NAME[name])
        result.append(TensorToWrite(f"t.{name}", BY_NAME[name], shape, lambda data=data: iter([data[:1], data[1:]])))
    return result


def bytes_of(tensor: TensorToWrite) -> bytes:
    return b"".join(np.ascontiguousarray(chunk).tobytes() for chunk in tensor.chunks())


@pytest.mark.parametrize("alignment", [1, 16, 32, 4096])
def test_our_reader_reads_it_back(alignment: int, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", METADATA, tensors(), alignment=alignment)
    with GgufFile(tmp_path / "x.gguf") as file:
        assert (file.version, file.alignment) == (3, alignment)
        for key, value in METADATA.items():
            got = file.metadata[key]
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(got, value)
                assert got.dtype == value.dtype.newbyteorder("<")
            else:
                assert got == (np.float32(value) if key == "eps" else value)
        assert file.value_types["count"] is ValueType.UINT32
        assert file.value_types["eps"] is ValueType.FLOAT32
        assert file.value_types["offset"] is ValueType.UINT64
        assert file.value_types["double"] is ValueType.FLOAT64
        assert list(file.tensors) == [tensor.name for tensor in tensors()]
        for tensor in tensors():
            found = file.tensors[tensor.name]
            assert (found.type, found.shape, found.nbytes) == (tensor.type, tensor.shape, tensor.nbytes)
            assert found.data.tobytes() == bytes_of(tensor)


def test_the_package_reads_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the gguf package")
    path = tmp_path / "x.gguf"
    write_gguf(path, METADATA, tensors())
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        got = reader.get_field(key).contents()
        assert list(got) == list(value) if isinstance(value, (list, np.ndarray)) else got == pytest.approx(value)
    assert [tensor.name for tensor in reader.tensors] == [tensor.name for tensor in tensors()]
    for theirs, ours in zip(reader.tensors, tensors(), strict=True):
        assert theirs.tensor_type.name == ours.type.name
        assert tuple(reversed(theirs.shape.tolist())) == ours.shape
        assert theirs.data.tobytes() == bytes_of(ours)


def test_ours_reads_what_the_package_writes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the gguf package")
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_uint64("big", 1 << 40)
    writer.add_array("tokens", ["a", "b"])
    writer.add_bool("flag", False)
    values = np.random.default_rng(5).standard_normal((4, 64)).astype(np.float32)
    writer.add_tensor("plain", values)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(path) as file:
        assert (file.alignment, file.metadata["big"], file.metadata["tokens"]) == (64, 1 << 40, ["a", "b"])
        np.testing.assert_array_equal(file.tensors["plain"].dequantize(), values)
        assert file.tensors["packed"].shape == (4, 64)
        np.testing.assert_array_equal(file.tensors["packed"].data, packed)


def test_tensors_are_streamed_one_after_the_other(tmp_path: Path) -> None:
    seen: list[str] = []

    def source(name: str) -> Iterator[bytes]:
        seen.append(f"{name} begins")
        yield bytes(16)
        yield bytes(16)
        seen.append(f"{name} ends")

    kind = BY_NAME["F32"]
    done: list[int] = []
    files = [TensorToWrite(name, kind, (8,), lambda name=name: source(name)) for name in "ab"]
    write_gguf(tmp_path / "x.gguf", {}, files, progress=done.append)
    assert seen == ["a begins", "a ends", "b begins", "b ends"]
    assert done == [16] * 4


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_source_of_another_length_leaves_the_old_file(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError, match=r"tensor 'x' of shape \(8,\) and type F32 needs 32 bytes"):
        write_gguf(path, {}, [TensorToWrite("x", BY_NAME["F32"], (8,), lambda: [bytes(size)])])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_over_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    ones = np.ones(8, np.float32)
    write_gguf(path, {}, [TensorToWrite("x", BY_NAME["F32"], (8,), lambda: [ones])])
    with GgufFile(path) as file:
        view = file.tensors["x"].data
        write_gguf(path, {}, [TensorToWrite("x", BY_NAME["F32"], (8,), lambda: [view[:, ::-1], b""])])
        assert file.tensors["x"].dequantize().sum() == 8


def one(name: str = "x", shape: tuple[int, ...] = (8,), kind: str = "F32") -> TensorToWrite:
    return TensorToWrite(name, BY_NAME[kind], shape, lambda: [bytes(32)])


@pytest.mark.parametrize(
    ("metadata", "wrong", "error", "message"),
    [
        ({"k": -1}, [], OptionError, "k: -1 is no UINT32"),
        ({"k": 1 << 32}, [], OptionError, "is no UINT32"),
        ({"k": None}, [], OptionError, "NoneType has no type in GGUF"),
        ({"k": [1, 2]}, [], OptionError, "list has no type in GGUF"),
        ({"k": np.zeros((2, 2))}, [], OptionError, "one dimension"),
        ({"k": np.zeros(2, np.complex64)}, [], OptionError, "complex64 has no type"),
        ({"k": "\ud800"}, [], OptionError, "surrogate"),
        ({"": 1}, [], OptionError, "empty"),
        ({}, [one(), one()], OptionError, "tensor 'x' is there twice"),
        ({}, [one("n" * 64)], OptionError, "1 to 63 bytes, this one 64"),
        ({}, [one("")], OptionError, "1 to 63 bytes, this one 0"),
        ({}, [one(shape=(8, 0))], OptionError, "dimensions of at least 1"),
        ({}, [one(shape=(1,) * 5)], OptionError, "at most 4 dimensions"),
        ({}, [one(kind="Q8_0")], ShapeError, "multiple of 32 values"),
    ],
)
def test_what_cannot_be_written_is_refused_before_a_file_is_made(
    metadata: dict[str, Any], wrong: list[TensorToWrite], error: type[LlamaExtError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        write_gguf(tmp_path / "x.gguf", metadata, wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("alignment", [0, 3, -32, 1 << 17])
def test_an_alignment_that_is_none_is_refused(alignment: int, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="power of two"):
        write_gguf(tmp_path / "x.gguf", {}, [], alignment=alignment)
