"""A model into a directory: floating-point weights as transformers reads them, quantised ones packed as they lie in memory."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ext import _core
from llama_ext.errors import FormatError
from llama_ext.io.atomic import atomic_write, named, remove
from llama_ext.io.checkpoint import BYTES, TensorSource, write_sharded
from llama_ext.io.folder_lock import saving_into
from llama_ext.models import ARCHITECTURES
from llama_ext.models.config import LlamaConfig
from llama_ext.models.generation_config import GenerationDefaults
from llama_ext.models.llama import TensorSpec
from llama_ext.models.quantization_config import KEY, QuantizationConfig
from llama_ext.runtime.model_files import GENERATION_FILE
from llama_ext.runtime.packed_files import PREFIX
from llama_ext.runtime.tokenizer import Tokenizer
from llama_ext.runtime.tokenizer_files import write_tokenizer_files
from llama_ext.runtime.weight_types import is_quantized

if TYPE_CHECKING:
    from llama_ext.runtime.loaded_model import LoadedModel

__all__ = ["save_core", "save_files", "save_model"]

_CONFIG_FILE = "config.json"


def save_model(model: LoadedModel, directory: str | os.PathLike[str]) -> None:
    """The weights of a model, without its adapters, and what belongs to them."""
    save_core(directory, model._core, model.config, model.tokenizer, model.generation_defaults)


def save_core(
    directory: str | os.PathLike[str],
    core: _core.Model,
    config: LlamaConfig,
    tokenizer: Tokenizer | None,
    defaults: GenerationDefaults,
) -> None:
    """Writes the weights of a core and what belongs to them: packed when any matrix is quantised.

    Raises:
        OSError: It cannot be written.
        OptionError, LimitError, FormatError: As `save_files`.
        UnsupportedError: Quantised weights of a device that does not pack them.
    """
    types = core.types()
    specs = list(ARCHITECTURES[config.model_type].tensor_specs(config))
    if is_quantized(types):
        quantization = QuantizationConfig(core.backend.matrix_layout, types).to_dict()
        save_files(directory, _packed(core, specs), config, "float32", tokenizer, defaults, quantization)
    else:
        tensors = [_float(core, spec, types[spec.slot if len(spec.shape) == 2 else ""][0]) for spec in specs]
        save_files(directory, tensors, config, core.dtype, tokenizer, defaults)


def save_files(
    directory: str | os.PathLike[str],
    tensors: Iterable[TensorSource],
    config: LlamaConfig,
    dtype: str,
    tokenizer: Tokenizer | None,
    defaults: GenerationDefaults,
    quantization: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Writes a directory: weights, config, generation defaults, tokenizer.

    Nothing loads without config.json: it goes before the first file of an older model is replaced, and comes last. So a
    save that is cut short leaves the older model, the new one or none, but never some files of each. Two saves into one
    directory come one after the other.

    Raises:
        OSError: It cannot be written.
        OptionError: The config's `extra`, the tokenizer or its chat template holds something that files cannot.
        LimitError: A chat template is larger than what is read again.
        FormatError: The generation defaults hold something that JSON cannot.
    """
    # A copy that is not checked again: it may have been read with larger limits than the default ones.
    config = copy.copy(config)
    object.__setattr__(config, "dtype", dtype)
    extra = {name: value for name, value in config.extra.items() if name != KEY}
    object.__setattr__(config, "extra", extra if quantization is None else {**extra, KEY: dict(quantization)})
    folder = named(directory)
    # What may be refused is so before anything is written.
    config.to_json()
    said = _generation_json(defaults, folder / GENERATION_FILE)
    tokenizer_files = None if tokenizer is None else tokenizer._files()
    if advance is not None:
        tensors = [(name, kind, shape, _counted(source, advance)) for name, kind, shape, source in tensors]
    with saving_into(folder):
        write_sharded(folder, tensors, replacing=lambda: remove(folder / _CONFIG_FILE))
        # One that an earlier save left would speak for this model.
        remove(folder / GENERATION_FILE)
        if said is not None:
            with atomic_write(folder / GENERATION_FILE) as file:
                file.write(said.encode("utf-8"))
        if tokenizer_files is not None:
            write_tokenizer_files(tokenizer_files, folder)
        config.save_pretrained(folder)


def _counted(source: Callable[[], Iterable[Any]], advance: Callable[[int], None]) -> Callable[[], Iterable[Any]]:
    def read() -> Iterable[Any]:
        for part in source():
            yield part
            advance(memoryview(part).nbytes)

    return read


def _packed(core: _core.Model, specs: Iterable[TensorSpec]) -> list[TensorSource]:
    def matrix(name: str) -> TensorSource:
        return PREFIX + name, BYTES, core.packed(name).shape, lambda: [core.packed(name)]

    def vector(spec: TensorSpec) -> TensorSource:
        return spec.name, "float32", spec.shape, lambda: [core.read(spec.slot)]

    return [*map(matrix, core.matrices()), *(vector(spec) for spec in specs if len(spec.shape) == 1)]


def _float(core: _core.Model, spec: TensorSpec, dtype: str) -> TensorSource:
    if len(spec.shape) == 1:
        # A norm that was read as bfloat16 is a bfloat16 number still: saving it as one loses nothing.
        values = core.read(spec.slot)
        narrowed = _narrowed(values, dtype)
        if not np.array_equal(_widened(narrowed, dtype), values):
            dtype = "float32"
    return spec.name, dtype, spec.shape, lambda: [_narrowed(core.read(spec.slot), dtype)]


def _narrowed(values: Any, dtype: str) -> Any:
    """float32 numbers as those of `dtype`, cut off; others are of `dtype` already."""
    if values.dtype != np.float32 or dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _widened(values: Any, dtype: str) -> Any:
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


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
