"""A checkpoint's weights: one safetensors file, or several and an index, read as one; and writing them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy.typing as npt

from llama_ext.errors import CheckpointError, DTypeError, FormatError, LimitError, OptionError, ShapeError
from llama_ext.io.atomic import atomic_write, made_folder, remove
from llama_ext.io.json_file import read_json_object
from llama_ext.io.safetensors_file import DTYPES, SafetensorsFile, TensorInfo
from llama_ext.limits import DEFAULT_LIMITS, Limits

__all__ = [
    "BYTES",
    "INDEX_FILE",
    "SINGLE_FILE",
    "Checkpoint",
    "TensorSource",
    "open_checkpoint",
    "remove_weights",
    "write_safetensors",
    "write_sharded",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# A tensor to write: name, dtype (the format's word or the core's), shape, and what yields its bytes in order.
TensorSource = tuple[str, str, Sequence[int], Callable[[], Iterable[Any]]]

# Packed matrices: bytes that mean nothing to other readers.
BYTES = "U8"
# Where tensors begin in a file. Bytes come first and are whole cache lines, so a matrix can be used in the map as it lies.
_ALIGNMENT = 64

_FORMAT_WORDS = {core: word for word, (core, _) in DTYPES.items()} | {word: word for word in (*DTYPES, BYTES)}
_SHARD = re.compile(r"model(-\d+)?-\d{5}-of-\d{5}\.safetensors")
# What a kill leaves of `atomic_write`, as large as a shard and of use to nobody.
_LEFTOVER = re.compile(rf"\.({_SHARD.pattern}|{re.escape(SINGLE_FILE)}|{re.escape(INDEX_FILE)})\.[0-9a-f]{{16}}\.tmp")


class Checkpoint:
    """The tensors of one or more open safetensors files; a context manager.

    Args:
        path: What was opened, for messages.
        files: The files, which this then owns.

    Raises:
        CheckpointError: Two files have a tensor of the same name.
        LimitError: More tensors than the limits allow.
    """

    def __init__(self, path: str, files: Sequence[SafetensorsFile], limits: Limits = DEFAULT_LIMITS) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._files = list(files)
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in self._files:
            self.metadata.update(file.metadata)
            for name, info in file.tensors.items():
                if name in self._file_of:
                    first, second = os.path.basename(self._file_of[name].path), os.path.basename(file.path)
                    raise CheckpointError(
                        f"tensor {name[:120]} is in two files, {first} and {second}.", path=path, field=name
                    )
                self._file_of[name] = file
                self.tensors[name] = info
        if len(self.tensors) > limits.tensors:
            raise LimitError(f"{path}: {len(self.tensors)} tensors, the limit is {limits.tensors} (Limits.tensors).")

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor as a read-only view of its file; see `SafetensorsFile.read`.

        Args:
            name: The tensor.

        Returns:
            The array; BF16 as uint16.

        Raises:
            FormatError: There is no such tensor, or its file has shrunk.
            UnsupportedError: Its dtype is not F64, F32, F16 or BF16.
        """
        return self._owner(name).read(name)

    def read_bytes(self, name: str) -> npt.NDArray[Any]:
        """A tensor's bytes as they lie in its file; see `SafetensorsFile.read_bytes`.

        Args:
            name: The tensor.

        Returns:
            (bytes,) uint8.

        Raises:
            FormatError: There is no such tensor, or its file has shrunk.
        """
        return self._owner(name).read_bytes(name)

    def release(self, name: str) -> None:
        """Gives the memory of a tensor's pages back to the system; see `SafetensorsFile.release`.

        Args:
            name: The tensor.

        Raises:
            FormatError: There is no such tensor.
        """
        self._owner(name).release(name)

    def close(self) -> None:
        """Closes the files. Views of them stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _owner(self, name: str) -> SafetensorsFile:
        file = self._file_of.get(name)
        if file is None:
            raise FormatError(
                f"there is no tensor {name[:120]!r} among the {len(self.tensors)}.", path=self.path, field=name
            )
        return file


def open_checkpoint(directory: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> Checkpoint:
    """Opens the weights in a directory: model.safetensors, else what model.safetensors.index.json lists.

    A name in the index is a plain file name, so that a checkpoint cannot reach outside its directory. A symbolic link
    in the directory is followed: the Hub's cache is made of them.

    Args:
        directory: The directory, or a .safetensors file in any place.
        limits: The bounds.

    Returns:
        The open checkpoint, its tensors in the order of the files.

    Raises:
        FormatError: There is no checkpoint, or a file of it is missing or malformed.
        CheckpointError: The index and the files contradict each other.
        LimitError: A file or a count is beyond the limits.
    """
    if not os.fspath(directory):
        raise FormatError("the path of a checkpoint is empty. Expected its directory, or a .safetensors file.")
    path = Path(directory)
    # os.path rather than Path's methods: those raise for a name that is too long.
    if os.path.isfile(path):
        return _open([path], str(path), limits)
    if not os.path.isdir(path):
        raise FormatError("expected a checkpoint's directory, found no such directory.", path=str(path))
    # The order of transformers: where both exist, the index is what an earlier save left.
    if os.path.lexists(path / SINGLE_FILE):
        return _open([path / SINGLE_FILE], str(path), limits)
    index = path / INDEX_FILE
    if not os.path.lexists(index):
        raise _nothing_to_open(path)
    weight_map = _read_index(index, limits)
    checkpoint = _open([path / name for name in sorted(set(weight_map.values()))], str(path), limits)
    for name, shard in weight_map.items():
        owner = checkpoint._file_of.get(name)
        if owner is None or os.path.basename(owner.path) != shard:
            checkpoint.close()
            found = "no file" if owner is None else os.path.basename(owner.path)
            raise CheckpointError(
                f"the index says that tensor {name[:120]} is in {shard}, it is in {found}. Is a shard of another checkpoint?",
                path=str(index),
                field=name,
                expected=shard,
                got=found,
            )
    return checkpoint


def _open(paths: Sequence[Path], shown: str, limits: Limits) -> Checkpoint:
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(SafetensorsFile(path, limits)) for path in paths]
        checkpoint = Checkpoint(shown, files, limits)
        opened.pop_all()
        return checkpoint


def _read_index(index: Path, limits: Limits) -> dict[str, str]:
    values = read_json_object(index, what="a checkpoint's index", limit="index_json_bytes", limits=limits)
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        got = type(weight_map).__name__ if not isinstance(weight_map, dict) else "an empty one"
        expected = "an object of tensor names and file names"
        raise FormatError(f"weight_map must be {expected}, got {got}.", path=str(index), field="weight_map", got=got)
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and len(shard) <= 255
        if not plain or set(shard) & set("/\\:\0") or shard.startswith("."):
            raise FormatError(
                f"weight_map: tensor {name[:120]} must be in a .safetensors file of the same directory, "
                f"got {str(shard)[:120]!r}.",
                path=str(index),
                field=name,
                expected="a plain file name",
                got=str(shard)[:120],
            )
    shards = len(set(weight_map.values()))
    if shards > limits.shards:
        raise LimitError(f"{index}: {shards} shards, the limit is {limits.shards} (Limits.shards).")
    missing = [shard for shard in sorted(set(weight_map.values())) if not os.path.isfile(index.parent / shard)]
    if missing:
        raise FormatError(
            f"{len(missing)} of {shards} shards are missing: {', '.join(missing[:4])}. Download the rest.",
            path=str(index),
            field=missing[0],
        )
    return weight_map


def _nothing_to_open(directory: Path) -> FormatError:
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        return FormatError(f"the directory cannot be read: {error.strerror or error}.", path=str(directory))
    found = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
    advice = ""
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        advice = (
            " Pickled weights are never read, because loading them can run code. Convert them where torch is installed: "
            "transformers.AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)."
        )
    elif "adapter_model.safetensors" in names:
        advice = " This is a PEFT adapter: load its base, and then the adapter with load_adapter."
    elif any(name.endswith(".gguf") for name in names):
        advice = " A GGUF file is no part of such a checkpoint: it is loaded by its own path."
    expected = f"{SINGLE_FILE} or {INDEX_FILE}"
    return FormatError(
        f"expected {expected}, found {found}.{advice}", path=str(directory), expected=expected, got=found
    )


def write_safetensors(
    path: str | os.PathLike[str], tensors: Iterable[TensorSource], metadata: Mapping[str, str] | None = None
) -> int:
    """Writes a safetensors file, whole or not at all, with one tensor in memory at a time.

    Tensors lie in descending order of their element size and otherwise in the given order, so that each is aligned; bytes
    (U8) come before all others, and the first tensor begins at a multiple of 64 bytes.

    Args:
        path: The file, replaced when it exists; a memory map of the old one stays valid.
        tensors: Name, dtype (F32 or float32, ...), shape, and a function that yields the tensor's bytes in order, as
            contiguous buffers. The functions are called one by one, when their tensor's turn has come.
        metadata: Texts for the header. None: {"format": "pt"}, which transformers insists on.

    Returns:
        The size of the file in bytes.

    Raises:
        OptionError: A name is empty, reserved or given twice, or the metadata is not text.
        DTypeError: A dtype is not F64, F32, F16, BF16 or U8.
        ShapeError: A function yields more or fewer bytes than its shape and dtype say.
        LimitError: The header is larger than the format allows.
        OSError: The file cannot be written.
    """
    planned = _planned(tensors)
    with atomic_write(path) as file:
        return _write(file, planned, metadata)


_Planned = tuple[str, str, tuple[int, ...], int, Callable[[], Iterable[Any]]]


def _planned(tensors: Iterable[TensorSource]) -> list[_Planned]:
    result: dict[str, _Planned] = {}
    for name, dtype, shape, source in tensors:
        if not name or name == "__metadata__" or name in result:
            raise OptionError(f"cannot write tensor {name!r}: a name is not empty, not __metadata__, and used once.")
        if dtype not in _FORMAT_WORDS:
            raise DTypeError(f"cannot write tensor {name} of dtype {dtype!r}. Supported: {', '.join(_FORMAT_WORDS)}.")
        dimensions = tuple(int(size) for size in shape)
        if any(size < 0 for size in dimensions):
            raise ShapeError(f"cannot write tensor {name} of shape {dimensions}: a dimension is negative.")
        word = _FORMAT_WORDS[dtype]
        nbytes = math.prod(dimensions) * (1 if word == BYTES else DTYPES[word][1].itemsize)
        result[name] = (name, word, dimensions, nbytes, source)
    return sorted(result.values(), key=lambda tensor: -_rank(tensor[1]))


def _rank(word: str) -> int:
    return _ALIGNMENT if word == BYTES else DTYPES[word][1].itemsize


def _write(file: BinaryIO, tensors: Sequence[_Planned], metadata: Mapping[str, str] | None) -> int:
    texts = {"format": "pt"} if metadata is None else dict(metadata)
    if not all(isinstance(text, str) for pair in texts.items() for text in pair):
        raise OptionError("the metadata of a safetensors file must be text for text.")
    header: dict[str, Any] = {"__metadata__": texts} if texts else {}
    end = 0
    for name, word, shape, nbytes, _ in tensors:
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-(len(encoded) + 8) % _ALIGNMENT)
    if len(encoded) > DEFAULT_LIMITS.safetensors_header_bytes:  # the format's own bound: no reader would accept it
        raise LimitError(
            f"the header has {len(encoded)} bytes, the format allows {DEFAULT_LIMITS.safetensors_header_bytes}."
        )
    file.write(struct.pack("<Q", len(encoded)))
    file.write(encoded)
    for name, _, shape, nbytes, source in tensors:
        written = 0
        for part in source():
            data = memoryview(part).cast("B") if memoryview(part).nbytes else b""
            written += len(data)
            if written > nbytes:
                break
            file.write(data)
        if written != nbytes:
            more = "more than " if written > nbytes else ""
            raise ShapeError(
                f"tensor {name} of shape {shape} has {nbytes} bytes, its source yields {more}{min(written, nbytes)}."
            )
    return 8 + len(encoded) + end


def write_sharded(
    directory: str | os.PathLike[str],
    tensors: Iterable[TensorSource],
    *,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
    replacing: Callable[[], None] | None = None,
) -> list[Path]:
    """Writes a checkpoint's weights: model.safetensors, or shards and an index when they are larger than one shard.

    A kill at any moment leaves the old weights or the new ones, whole: shards get names that are not in use, the index
    (or the single file) is renamed into place as the one step that counts, and only then the old files go.

    Args:
        directory: Created when it does not exist.
        tensors: As for `write_safetensors`; shards are filled in this order.
        max_shard_bytes: Most bytes of tensors in a file; a tensor larger than that gets a file of its own.
        metadata: As for `write_safetensors`, in every shard.
        replacing: Called when the new weights are whole and synced, right before the step that counts.

    Returns:
        The files written, the index last when there is one.

    Raises:
        OptionError, DTypeError, ShapeError, LimitError, OSError: As for `write_safetensors`.
    """
    if isinstance(max_shard_bytes, bool) or max_shard_bytes < 1:
        raise OptionError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}.")
    # Shards are filled in the given order, as transformers does; each shard then orders its own tensors.
    sources = list(tensors)
    nbytes = {planned[0]: planned[3] for planned in _planned(sources)}
    shards: list[list[TensorSource]] = [[]]
    used = 0
    for source in sources:
        if shards[-1] and used + nbytes[source[0]] > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(source)
        used += nbytes[source[0]]

    folder = made_folder(directory)
    if len(shards) == 1:
        with atomic_write(folder / SINGLE_FILE, replacing=replacing) as file:
            _write(file, _planned(shards[0]), metadata)
        written = [folder / SINGLE_FILE]
    else:
        written = [folder / name for name in _unused_names(folder, len(shards))]
        for path, shard in zip(written, shards, strict=True):
            write_safetensors(path, shard, metadata)
        weight_map = {source[0]: path.name for path, shard in zip(written, shards, strict=True) for source in shard}
        index = {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": weight_map}
        with atomic_write(folder / INDEX_FILE, replacing=replacing) as file:
            file.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8"))
        written.append(folder / INDEX_FILE)
    _remove_old(folder, {path.name for path in written})
    return written


def _unused_names(folder: Path, count: int) -> list[str]:
    """transformers' names for shards, or with a number when a checkpoint that is still valid has those."""
    attempt = 0
    while True:
        stem = f"model-{attempt}" if attempt else "model"
        names = [f"{stem}-{shard + 1:05d}-of-{count:05d}.safetensors" for shard in range(count)]
        if not any(os.path.lexists(folder / name) for name in names):
            return names
        attempt += 1


def remove_weights(folder: Path) -> None:
    """Removes the weights that `write_sharded` writes, by any save.

    Raises:
        OSError: One cannot be removed.
    """
    _remove_old(folder, set())


def _remove_old(folder: Path, new: set[str]) -> None:
    """Removes what the new weights replace, and what saves that were killed have left."""
    # The file that readers prefer goes first: from then on they see the new weights.
    others = sorted(name for name in os.listdir(folder) if _SHARD.fullmatch(name) or _LEFTOVER.fullmatch(name))
    for name in [SINGLE_FILE, INDEX_FILE, *others]:
        if name not in new:
            remove(folder / name)
