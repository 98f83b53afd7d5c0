"""Weights into a model, and out of it again: one tensor at a time, so that memory never holds a checkpoint twice."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ext import _core
from llama_ext._arrays import is_whole
from llama_ext.errors import CheckpointError, FormatError, OptionError
from llama_ext.io.atomic import atomic_write, remove
from llama_ext.io.checkpoint import Checkpoint, TensorSource, open_checkpoint, write_sharded
from llama_ext.io.gguf import gguf_error
from llama_ext.io.hub import resolve
from llama_ext.limits import Limits
from llama_ext.models import ARCHITECTURES
from llama_ext.models.config import LlamaConfig
from llama_ext.models.fields import shown
from llama_ext.models.generation_config import GenerationDefaults
from llama_ext.runtime.progress import ProgressBar
from llama_ext.runtime.tokenizer import Tokenizer
from llama_ext.runtime.weight_types import WeightTypes, choose_types

if TYPE_CHECKING:
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["ModelFiles", "core_config", "load_random", "open_model", "save_model"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_CONFIG_FILE = "config.json"
_GENERATION_FILE = "generation_config.json"


def core_config(config: LlamaConfig) -> dict[str, Any]:
    """The config in the core's words."""
    result: dict[str, Any] = ARCHITECTURES[config.model_type].core_config(config)
    return result


class ModelFiles:
    """The files of a checkpoint, opened and checked against its config before any weight is read; a context manager.

    Attributes:
        config: Of config.json.
        tokenizer: None when there are no files of one.
        generation_defaults: Of generation_config.json; empty when there is none.
        stored_dtype: What most of the weights are stored as.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        if path.suffix == ".gguf":
            raise gguf_error(path)
        folder = path.parent if path.is_file() else path
        self.config = LlamaConfig.from_pretrained(folder, limits=limits)
        self.generation_defaults = GenerationDefaults.from_pretrained(folder, limits=limits)
        self.tokenizer = None
        if any((folder / name).exists() for name in _TOKENIZER_FILES):
            self.tokenizer = Tokenizer.from_pretrained(folder, limits=limits)
        self._path = path
        self._folder = folder
        self._architecture = ARCHITECTURES[self.config.model_type]
        self._checkpoint: Checkpoint = open_checkpoint(path, limits)
        try:
            self._specs = self._architecture.match(self.config, self._checkpoint.tensors, path=str(path))
            self.stored_dtype = self._most_stored()
        except BaseException:
            self._checkpoint.close()
            raise

    def types(self, requested: str, group_size: int | None, symmetric: bool | None) -> WeightTypes:
        """How to keep each matrix; see `choose_types`."""
        return choose_types(requested, self.stored_dtype, self._specs, group_size=group_size, symmetric=symmetric)

    def warn_of_ignored(self) -> None:
        """Tells the caller of this method's caller what generation_config.json asks for in vain."""
        ignored = self.generation_defaults.ignored
        if ignored:
            names = ", ".join(f"{name}={shown(value)}" for name, value in ignored.items())
            file = self._folder / _GENERATION_FILE
            warnings.warn(f"{file} asks for {names}, which this version does not do", UserWarning, stacklevel=3)

    def load_into(self, core: _core.Model) -> None:
        """Fills the core's weights.

        Raises:
            FormatError: A file has been cut short since it was opened.
            CheckpointError: A tied head that differs from the embedding, or a slot without a tensor.
        """
        checkpoint = self._checkpoint
        tensors = checkpoint.tensors
        # What is tied is only compared here, and its pages are given back before the weights take theirs.
        self._architecture.check_tied_head(self.config, checkpoint, path=str(self._path))
        for name in tensors:
            checkpoint.release(name)
        total = sum(tensors[spec.name].nbytes for spec in self._specs)
        # The largest first: while a tensor is copied it is there twice, which costs least when little else is there.
        order = sorted(self._specs, key=lambda spec: -tensors[spec.name].nbytes if _is_large(spec.name, tensors) else 0)
        with ProgressBar("Loading weights", total, "bytes") as bar:
            for spec in order:
                info = tensors[spec.name]
                core.load(spec.slot, checkpoint.read(spec.name), info.core_dtype)
                checkpoint.release(spec.name)
                bar.advance(info.nbytes)
        missing = core.missing()
        if missing:
            raise CheckpointError(f"the checkpoint has nothing for {', '.join(missing[:8])}", path=str(self._path))

    def _most_stored(self) -> str:
        by_dtype: dict[str, int] = {}
        for spec in self._specs:
            info = self._checkpoint.tensors[spec.name]
            by_dtype[info.core_dtype] = by_dtype.get(info.core_dtype, 0) + info.nbytes
        return max(by_dtype, key=by_dtype.__getitem__)

    def __enter__(self) -> ModelFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._checkpoint.close()


def _is_large(name: str, tensors: Any) -> bool:
    return bool(tensors[name].nbytes > sum(info.nbytes for info in tensors.values()) // 16)


def open_model(path_or_hub_id: str | os.PathLike[str], *, revision: str | None, limits: Limits) -> ModelFiles:
    """Finds a checkpoint and opens its files.

    Raises:
        FormatError: There is no such checkpoint, or a file of it is malformed.
        CheckpointError: Its tensors are not those that its config asks for.
        UnsupportedError: A model that this version does not run.
        LimitError: A number in a file is beyond `limits`.
    """
    return ModelFiles(resolve(path_or_hub_id, revision), limits)


def load_random(core: _core.Model, config: LlamaConfig, seed: int) -> None:
    """Fills the weights as transformers initialises a Llama: normal matrices, norms of 1, biases of 0.

    A matrix depends on the seed, its name and its shape alone: not on the other tensors, their order, or a dtype.

    Raises:
        OptionError: `seed` is not in [0, 2^64).
    """
    if not is_whole(seed) or not 0 <= seed < 2**64:
        raise OptionError(f"seed must be a whole number in [0, 2^64), got {seed!r}")
    for spec in ARCHITECTURES[config.model_type].tensor_specs(config):
        if len(spec.shape) == 2:
            # Philox is a counter under a key, so a key per tensor is a stream per tensor.
            key = int.from_bytes(hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()[:16], "little")
            values = np.random.Generator(np.random.Philox(key=key)).standard_normal(spec.shape, dtype=np.float32)
            values *= np.float32(config.initializer_range)
        else:
            values = np.full(spec.shape, 0.0 if spec.name.endswith(".bias") else 1.0, dtype=np.float32)
        core.load(spec.slot, values, "float32")


def save_model(model: LlamaForCausalLM, directory: str | os.PathLike[str]) -> None:
    """The body of `LlamaForCausalLM.save_pretrained`.

    Nothing loads without config.json: it goes before the first file of an older model is replaced, and comes last. So a
    save that is cut short leaves the older model, the new one or none, but never some files of each.
    """
    # A copy that is not checked again: it may have been read with larger limits than the default ones.
    config = copy.copy(model.config)
    object.__setattr__(config, "dtype", model.dtype)
    core = model._core
    matrices = {slot for slot, _, is_matrix in core.slots() if is_matrix}
    tensors: list[TensorSource] = []
    for spec in ARCHITECTURES[config.model_type].tensor_specs(config):
        # A norm that was read as bfloat16 is a bfloat16 number still: saving it as one loses nothing.
        dtype = model.dtype if spec.slot in matrices else _vector_dtype(core, spec.slot, model.dtype)
        tensors.append((spec.name, dtype, spec.shape, _reader(core, spec.slot, dtype)))
    folder = Path(directory)
    # What may be refused is so before anything is written.
    config.to_json()
    defaults = _generation_json(model.generation_defaults, folder / _GENERATION_FILE)
    write_sharded(folder, tensors, replacing=lambda: remove(folder / _CONFIG_FILE))
    # One that an earlier save left would speak for this model.
    remove(folder / _GENERATION_FILE)
    if defaults is not None:
        with atomic_write(folder / _GENERATION_FILE) as file:
            file.write(defaults.encode("utf-8"))
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)


def _vector_dtype(core: _core.Model, slot: str, dtype: str) -> str:
    if dtype == "float32":
        return dtype
    low_bits = core.read(slot).view(np.uint32) & np.uint32(0xFFFF)
    return "float32" if low_bits.any() else dtype


def _reader(core: _core.Model, slot: str, dtype: str) -> Any:
    def read() -> Iterable[Any]:
        values = core.read(slot)
        if dtype == "bfloat16" and values.dtype == np.float32:
            values = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        yield values

    return read


def _generation_json(defaults: GenerationDefaults, path: Path) -> str | None:
    """The text of generation_config.json, or None when there is nothing to say; `path` is for messages."""
    values = dataclasses.asdict(defaults)
    values.update(values.pop("ignored"))
    said = {name: value for name, value in values.items() if value is not None}
    if not said:
        return None
    try:
        return json.dumps(said, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise FormatError(f"the generation defaults cannot be written as JSON: {error}", path=str(path)) from error
