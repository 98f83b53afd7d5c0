"""A session on disk: a safetensors file with the keys and values of each layer, and whose they are.

Metadata: `format`, `tokens` (a JSON list of ids), `max_length`, `kv_dtype`, `model`, a fingerprint: keys and values mean
nothing to another model; and `crc32` of all these and of the tensors, eight hexadecimal digits: a damaged key would only make
for another text. Tensors: `layers.{i}.k` and `layers.{i}.v`, (T, K, D) in the cache's dtype.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import Array, FloatArray, IntArray, widen_bfloat16
from llama_ext.errors import FormatError
from llama_ext.io.atomic import path_text
from llama_ext.io.checkpoint import TensorSource, write_safetensors
from llama_ext.io.safetensors_file import SafetensorsFile
from llama_ext.runtime.loading import core_config

if TYPE_CHECKING:
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["SavedSession", "fingerprint", "read_session", "weights_hash", "write_session"]

_FORMAT = "llama_ext session 2"
# Without a checksum.
_OLD_FORMATS = ("llama_ext session 1",)
# The checksum's own entry is left out.
_CHECKED = ("format", "tokens", "max_length", "kv_dtype", "model")
# How keys and values of each dtype are stored: int8 ones as the numbers they stand for, which rounding gives back.
_STORED = {"float32": "float32", "bfloat16": "bfloat16", "int8": "float32"}
# What a fingerprint takes of a tensor.
_BLOCK = 64 << 10
_BLOCKS = 16


def fingerprint(model: LlamaForCausalLM) -> str:
    """A number that differs between models whose keys and values differ; made once per model.

    It is of the config, the dtype, the arithmetic and every tensor as it is kept: all of a tensor of up to 1 MiB, and of
    a larger one 16 blocks of 64 KiB, evenly from its first byte to its last. Training changes each of them; a change
    of single rows by hand may lie between them.
    """
    if model._fingerprint is None:
        about = {"config": core_config(model.config), "dtype": model.dtype, "compute": model.compute}
        model._fingerprint = weights_hash(model._core, json.dumps(about, sort_keys=True))
    return model._fingerprint


def weights_hash(core: _core.Model, about: str = "", without: Collection[str] = ()) -> str:
    """64 hexadecimal digits of every tensor of a core as it is kept, sampled as `fingerprint` says.

    Args:
        core: Its weights.
        about: What else counts.
        without: Slots that do not count.
    """
    digest = hashlib.blake2b(about.encode(), digest_size=32)
    missing = set(core.missing())  # optional ones
    for name, _, _ in core.slots():
        if name in without:
            continue
        digest.update(f"/{name}/".encode())
        if name not in missing:
            for block in _sampled(core.read(name)):
                digest.update(block.data)
    return digest.hexdigest()


def _identity(model: LlamaForCausalLM, adapter: _core.Adapter | None) -> str:
    """The fingerprint of a model together with an adapter."""
    if adapter is None:
        return fingerprint(model)
    digest = hashlib.blake2b(fingerprint(model).encode(), digest_size=32)
    for slot, rank, scale in adapter.slots():
        digest.update(f"/{slot}/{rank}/{scale!r}/".encode())
        for which in "AB":
            digest.update(np.ascontiguousarray(adapter.read(slot, which)).data)
    return digest.hexdigest()


def _sampled(values: Array) -> Iterator[npt.NDArray[np.uint8]]:
    data = values.reshape(-1).view(np.uint8)
    if data.size <= _BLOCKS * _BLOCK:
        yield data
        return
    for index in range(_BLOCKS):
        begin = (data.size - _BLOCK) * index // (_BLOCKS - 1)
        yield data[begin : begin + _BLOCK]


def write_session(
    path: str | os.PathLike[str], model: LlamaForCausalLM, core: _core.Session, adapter: _core.Adapter | None = None
) -> None:
    """Writes a session, whole or not at all.

    Raises:
        OptionError: `path` is no path.
        OSError: It cannot be written.
    """
    path = path_text(path, "the path to save into")
    config = model.config
    tokens = core.tokens
    shape = (len(tokens), config.num_key_value_heads, config.head_dim)
    held: dict[int, tuple[FloatArray, FloatArray]] = {}

    def stored(layer: int, index: int) -> Array:
        # Keys and values of a layer are read together and asked for one after the other. The last layer goes before the next comes.
        if layer not in held:
            held.clear()
            held[layer] = core.read_layer(layer)
        values: Array = held[layer][index]
        # The cache's bfloat16 came widened: its lower half is zero.
        return (values.view(np.uint32) >> 16).astype(np.uint16) if core.kv_dtype == "bfloat16" else values

    def source(layer: int, index: int) -> TensorSource:
        return f"layers.{layer}.{'kv'[index]}", _STORED[core.kv_dtype], shape, lambda: [stored(layer, index)]

    places = [(layer, index) for layer in range(config.num_hidden_layers) for index in range(2)]
    tensors = [source(*place) for place in places]
    metadata = {
        "format": _FORMAT,
        "tokens": json.dumps(tokens, separators=(",", ":")),
        "max_length": str(core.capacity),
        "kv_dtype": core.kv_dtype,
        "model": _identity(model, adapter),
    }
    # The header comes first in the file, so everything is read twice: memory holds one layer at a time either way.
    metadata["crc32"] = _checksum(metadata, (stored(*place) for place in places))
    # The user named this file: a link at its path stays one.
    write_safetensors(os.path.realpath(path) if os.path.islink(path) else path, tensors, metadata)


def _checksum(metadata: Mapping[str, str], tensors: Iterable[Array]) -> str:
    """CRC-32 of the entries and of the tensors, keys before values, layer by layer: of whole tensors, as they are stored."""
    found = 0
    for key in _CHECKED:
        found = zlib.crc32(f"/{key}/{metadata.get(key, '')}/".encode(), found)
    for values in tensors:
        found = zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, found)
    return f"{found:08x}"


class SavedSession:
    """A session's file, opened and checked against the model; a context manager.

    Attributes:
        tokens: The ids it holds, (T) int32.
        capacity: The room it had.
        kv_dtype: "float32", "bfloat16" or "int8".
    """

    def __init__(
        self, path: str | os.PathLike[str], model: LlamaForCausalLM, adapter: _core.Adapter | None = None
    ) -> None:
        self._file = SafetensorsFile(path)
        try:
            self._check(os.fspath(path), model, adapter)
        except BaseException:
            self._file.close()
            raise

    def _check(self, path: str, model: LlamaForCausalLM, adapter: _core.Adapter | None) -> None:
        metadata = self._file.metadata
        if metadata.get("format") != _FORMAT:
            found = metadata.get("format", "nothing")[:80]
            if found in _OLD_FORMATS:
                raise FormatError(
                    f"saved by an earlier version: its format is {found!r}, which has no checksum, and must be {_FORMAT!r}. "
                    "Run its text again, and save that",
                    path=path,
                    field="format",
                    expected=_FORMAT,
                    got=found,
                )
            raise FormatError(f"not a saved session: its format must be {_FORMAT!r}, got {found!r}", path=path)
        if metadata.get("model") != _identity(model, adapter):
            raise FormatError(
                "saved with another model, other weights, another adapter or another dtype: its keys and values mean nothing to this one",
                path=path,
                field="model",
            )
        config = model.config
        self.kv_dtype = metadata.get("kv_dtype", "")
        try:
            tokens = json.loads(metadata.get("tokens", ""))
            self.capacity = int(metadata.get("max_length", ""))
        except (ValueError, RecursionError) as error:
            raise FormatError("its tokens or max_length are not numbers", path=path) from error
        if not isinstance(tokens, list) or not all(
            type(token) is int and 0 <= token < config.vocab_size for token in tokens
        ):
            raise FormatError("its tokens are not a list of this model's token ids", path=path, field="tokens")
        if self.kv_dtype not in _STORED or not len(tokens) <= self.capacity <= 2**31:
            raise FormatError("its kv_dtype or max_length is impossible", path=path, field="kv_dtype")
        shape = (len(tokens), config.num_key_value_heads, config.head_dim)
        names = {f"layers.{layer}.{name}" for layer in range(config.num_hidden_layers) for name in "kv"}
        found_names = set(self._file.tensors)
        if found_names != names:
            odd = sorted(found_names ^ names)[0]
            raise FormatError(f"tensor {odd!r} is {'missing' if odd in names else 'unexpected'}", path=path, field=odd)
        for name in names:
            info = self._file.tensors[name]
            if info.shape != shape or info.core_dtype != _STORED[self.kv_dtype]:
                raise FormatError(
                    f"tensor {name!r} must be {_STORED[self.kv_dtype]} of shape {shape}, got {info.dtype} {info.shape}",
                    path=path,
                    field=name,
                )
        self.tokens: IntArray = np.array(tokens, dtype=np.int32)
        layers = range(config.num_hidden_layers)
        made = _checksum(metadata, (self._file.read(f"layers.{layer}.{name}") for layer in layers for name in "kv"))
        said = metadata.get("crc32", "none")[:80]
        if made != said:
            raise FormatError(
                f"damaged since it was saved: the checksum of what it holds is {made}, the file says {said}. "
                "Restore it from a copy, or run its text again",
                path=path,
                field="crc32",
                expected=said,
                got=made,
            )

    def layer(self, layer: int) -> tuple[FloatArray, FloatArray]:
        """Keys and values of a layer, (T, K, D) float32 each."""
        return self._read(f"layers.{layer}.k"), self._read(f"layers.{layer}.v")

    def _read(self, name: str) -> FloatArray:
        values = self._file.read(name)
        return widen_bfloat16(values) if self.kv_dtype == "bfloat16" else values

    def __enter__(self) -> SavedSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def read_session(
    path: str | os.PathLike[str], model: LlamaForCausalLM, adapter: _core.Adapter | None = None
) -> SavedSession:
    """Opens what `write_session` wrote.

    Raises:
        OptionError: `path` is no path.
        FormatError: The file is malformed, or of another model.
        LimitError: A number in it is beyond the limits.
    """
    return SavedSession(path_text(path, "the path of a session"), model, adapter)
