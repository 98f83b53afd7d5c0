"""A checkpoint of one file or of many is read as one, stays in its directory, and is saved whole or not at all."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from llama_ext.errors import CheckpointError, DTypeError, FormatError, LimitError, OptionError, ShapeError
from llama_ext.io.checkpoint import TensorSource, open_checkpoint, write_safetensors, write_sharded
from llama_ext.limits import Limits

INDEX = "model.safetensors.index.json"
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "embed": np.arange(40, dtype=np.float32).reshape(10, 4),
    "half": np.arange(3, dtype=np.float16),
    "double": np.arange(5, dtype=np.float64),
    "empty": np.zeros((0, 3), np.float32),
    "ä": np.ones((2, 2), np.float32),
}


def sources(arrays: dict[str, np.ndarray[Any, Any]]) -> list[TensorSource]:
    def rows(array: np.ndarray[Any, Any]) -> Iterator[Any]:
        yield from array

    return [(name, str(array.dtype), array.shape, lambda array=array: rows(array)) for name, array in arrays.items()]


def assert_holds(directory: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    with open_checkpoint(directory) as checkpoint:
        assert set(checkpoint.tensors) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)
            assert checkpoint.tensors[name].shape == array.shape
            checkpoint.release(name)


def test_a_written_file_is_what_the_package_would_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    size = write_safetensors(path, sources(ARRAYS))
    assert path.stat().st_size == size
    loaded = safetensors.numpy.load_file(path)
    assert set(loaded) == set(ARRAYS)
    assert all(
        np.array_equal(loaded[name], array) and loaded[name].dtype == array.dtype for name, array in ARRAYS.items()
    )
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_of_a_written_file_is_aligned(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", sources(ARRAYS), {"note": "x"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.metadata == {"note": "x"}
        for name, info in checkpoint.tensors.items():
            assert info.offset % ARRAYS[name].itemsize == 0
        assert next(iter(checkpoint.tensors)) == "double"
    assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_bfloat16_is_written_from_its_bits_in_either_spelling(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC000], np.uint16)
    for word in ("BF16", "bfloat16"):
        write_safetensors(tmp_path / "model.safetensors", [("x", word, (2,), lambda: [bits])])
        with open_checkpoint(tmp_path) as checkpoint:
            assert checkpoint.tensors["x"].dtype == "BF16"
            assert checkpoint.read("x").tolist() == bits.tolist()


def test_writing_is_deterministic(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a", sources(ARRAYS))
    write_safetensors(tmp_path / "b", sources(ARRAYS))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_writing_holds_one_tensor_in_memory(tmp_path: Path) -> None:
    def tensor(value: float) -> Iterator[Any]:
        yield np.full(1 << 20, value, np.float32)

    tracemalloc.start()
    try:
        many: list[TensorSource] = [(str(i), "F32", (1 << 20,), lambda i=i: tensor(i)) for i in range(8)]
        write_safetensors(tmp_path / "x", many)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (("x", "F32", (3,), lambda: [b"\0" * 8]), ShapeError),
        (("x", "F32", (3,), lambda: [b"\0" * 8, b"\0" * 8]), ShapeError),
        (("x", "F32", (-3,), list), ShapeError),
        (("x", "int8", (3,), lambda: [b"\0" * 3]), DTypeError),
        (("", "F32", (0,), list), OptionError),
        (("__metadata__", "F32", (0,), list), OptionError),
        (("old", "F32", (0,), list), OptionError),
    ],
)
def test_a_failed_write_leaves_the_old_file(source: TensorSource, error: type[Exception], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    old: TensorSource = ("old", "F32", (1,), lambda: [np.float32([7])])
    write_safetensors(path, [old])
    before = path.read_bytes()
    with pytest.raises(error):
        write_safetensors(path, [old, source])
    with pytest.raises(OptionError):
        write_safetensors(path, [old], {"a": 1})  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_checkpoint_can_be_saved_over_the_one_it_is_read_from(tmp_path: Path) -> None:
    write_sharded(tmp_path, sources(ARRAYS))
    with open_checkpoint(tmp_path) as checkpoint:
        same: list[TensorSource] = [
            (name, info.dtype, info.shape, lambda name=name: [checkpoint.read(name)])
            for name, info in checkpoint.tensors.items()
        ]
        write_sharded(tmp_path, same, max_shard_bytes=100)
        np.testing.assert_array_equal(checkpoint.read("embed"), ARRAYS["embed"])
    assert_holds(tmp_path, ARRAYS)


def test_shards_have_the_names_and_the_index_of_transformers(tmp_path: Path) -> None:
    written = write_sharded(tmp_path / "new", sources(ARRAYS), max_shard_bytes=160)
    names = [path.name for path in written]
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
    index = json.loads((tmp_path / "new" / INDEX).read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    assert index["weight_map"] == {name: names[0 if name == "embed" else 1] for name in ARRAYS}
    assert_holds(tmp_path / "new", ARRAYS)


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    assert len(write_sharded(tmp_path, sources(ARRAYS), max_shard_bytes=1)) == len(ARRAYS) + 1
    assert_holds(tmp_path, ARRAYS)
    with pytest.raises(OptionError, match="max_shard_bytes"):
        write_sharded(tmp_path, sources(ARRAYS), max_shard_bytes=0)


@pytest.mark.parametrize("first", [1, 160, 1 << 30])
@pytest.mark.parametrize("second", [1, 160, 1 << 30])
def test_a_new_checkpoint_replaces_the_old_one_completely(first: int, second: int, tmp_path: Path) -> None:
    write_sharded(tmp_path, sources(ARRAYS), max_shard_bytes=first)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    changed = {name: array + 1 for name, array in ARRAYS.items()}
    written = write_sharded(tmp_path, sources(changed), max_shard_bytes=second)
    assert_holds(tmp_path, changed)
    assert set(os.listdir(tmp_path)) == {path.name for path in written} | {"tokenizer.json"}


SAVER = """
import sys
import numpy as np
from llama_ext.io.checkpoint import write_sharded

def save(value, shard):
    tensors = [(str(i), "F32", (20000,), lambda i=i: [np.full(20000, value, np.float32)]) for i in range(12)]
    write_sharded(sys.argv[1], tensors, max_shard_bytes=shard)

value = 0
save(value, 1 << 30)
sys.stdout.write("ready\\n")
sys.stdout.flush()
while True:
    value += 1
    save(value, [1 << 30, 250_000, 500_000][value % 3])
"""


@pytest.mark.parametrize("seed", range(8))
def test_a_kill_during_a_save_leaves_one_whole_checkpoint(seed: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    saver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SAVER), str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert saver.stdout is not None
    with saver, saver.stdout:
        assert saver.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            saver.wait(random.Random(seed).uniform(0.0, 0.25))
        saver.send_signal(signal.SIGKILL)
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == {str(index) for index in range(12)}
        assert len({float(checkpoint.read(name)[k]) for name in checkpoint.tensors for k in (0, -1)}) == 1
    final = write_sharded(folder, sources(ARRAYS), max_shard_bytes=160)
    assert_holds(folder, ARRAYS)
    assert set(os.listdir(folder)) == {path.name for path in final}, "what the kill left is gone"


def sharded(folder: Path) -> dict[str, Any]:
    write_sharded(folder, sources(ARRAYS), max_shard_bytes=160)
    result: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return result


def write_index(folder: Path, index: Any) -> None:
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd.safetensors",
        "sub/model.safetensors",
        "..\\outside.safetensors",
        "C:model.safetensors",
        "..",
        ".",
        "",
        ".hidden.safetensors",
        "model.bin",
        "model.safetensors\0.safetensors",
        "x" * 300 + ".safetensors",
        3,
        None,
        ["model.safetensors"],
    ],
)
def test_a_shard_name_that_leaves_the_directory_is_refused(name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    index = sharded(folder)
    write_safetensors(tmp_path / "outside.safetensors", sources(ARRAYS))
    index["weight_map"]["embed"] = name
    write_index(folder, index)
    with pytest.raises(
        FormatError, match=r"tensor embed must be in a \.safetensors file of the same directory"
    ) as caught:
        open_checkpoint(folder)
    assert caught.value.field == "embed"


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}])
def test_an_index_without_a_map_is_refused(index: Any, tmp_path: Path) -> None:
    write_index(tmp_path, index)
    with pytest.raises(FormatError, match="weight_map"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"1 of 2 shards are missing: model-00002-of-00002\.safetensors"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    index["weight_map"]["embed"] = "model-00002-of-00002.safetensors"
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    write_index(tmp_path, index)
    with pytest.raises(CheckpointError, match=r"tensor embed is in model-00002.*it is in model-00001"):
        open_checkpoint(tmp_path)
    index["weight_map"]["embed"] = "model-00001-of-00002.safetensors"
    write_index(tmp_path, index)
    with pytest.raises(CheckpointError, match=r"tensor ghost .*it is in no file"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_safetensors(tmp_path / "model-00002-of-00002.safetensors", sources(ARRAYS))
    with pytest.raises(CheckpointError, match=r"tensor embed is in two files, model-00001.*model-00002"):
        open_checkpoint(tmp_path)


def test_a_duplicate_in_the_index_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    text = (tmp_path / INDEX).read_text(encoding="utf-8")
    (tmp_path / INDEX).write_text(text.replace('"half":', '"embed":'), encoding="utf-8")
    with pytest.raises(FormatError, match="'embed' appears twice"):
        open_checkpoint(tmp_path)


def test_a_broken_shard_is_named_and_nothing_stays_open(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FormatError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.path == str(shard)
    assert len(os.listdir("/proc/self/fd")) == before


def test_links_in_the_directory_are_followed_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    sharded(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in os.listdir(tmp_path / "blobs"):
        (tmp_path / "snapshot" / name).symlink_to(Path("..") / "blobs" / name)
    assert_holds(tmp_path / "snapshot", ARRAYS)


def test_counts_are_limited(tmp_path: Path) -> None:
    write_sharded(tmp_path, sources(ARRAYS), max_shard_bytes=1)
    with pytest.raises(LimitError, match=r"Limits\.shards"):
        open_checkpoint(tmp_path, Limits(shards=4))
    with pytest.raises(LimitError, match=r"Limits\.tensors"):
        open_checkpoint(tmp_path, Limits(tensors=4))
    with pytest.raises(LimitError, match="index_json_bytes"):
        open_checkpoint(tmp_path, Limits(index_json_bytes=4))


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", sources({"only": ARRAYS["embed"]}))
    assert_holds(tmp_path, {"only": ARRAYS["embed"]})


def test_a_file_can_be_opened_by_itself(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "any.safetensors", sources(ARRAYS))
    assert_holds(tmp_path / "any.safetensors", ARRAYS)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"expected model\.safetensors or model\.safetensors\.index\.json, found nothing\."),
        (
            ["config.json", "pytorch_model.bin"],
            r"found config\.json, pytorch_model\.bin\. Pickled weights are never read",
        ),
        (["consolidated.00.pth"], "save_pretrained"),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "This is a PEFT adapter: load its base, and then the adapter with load_adapter",
        ),
        (["x.gguf"], "A GGUF file is no part of such a checkpoint"),
        ([f"{index:02}" for index in range(20)], "and 12 more"),
    ],
)
def test_a_directory_without_weights_says_what_is_there(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path)


def test_a_directory_that_is_not_there_is_a_format_error(tmp_path: Path) -> None:
    for name in ("nowhere", "x" * 5000, "\0"):
        with pytest.raises(FormatError, match="no such directory"):
            open_checkpoint(tmp_path / name)
    with pytest.raises(FormatError, match="path of a checkpoint is empty"):
        open_checkpoint("")


def test_a_missing_shard_with_an_endless_name_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    index["weight_map"]["embed"] = "ä" * 200 + ".safetensors"
    write_index(tmp_path, index)
    with pytest.raises(FormatError, match="1 of 2 shards are missing: ä"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_is_not_there_is_a_format_error(tmp_path: Path) -> None:
    write_sharded(tmp_path, sources(ARRAYS))
    with open_checkpoint(tmp_path) as checkpoint:
        for use in (checkpoint.read, checkpoint.release):
            with pytest.raises(FormatError, match="no tensor 'x' among the 5"):
                use("x")
