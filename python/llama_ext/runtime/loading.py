"""From what a person calls a model to its open files, and random weights where there are none."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from llama_ext import _core
from llama_ext._options import whole_seed
from llama_ext.errors import FormatError
from llama_ext.io.checkpoint import INDEX_FILE, SINGLE_FILE
from llama_ext.io.gguf import find_gguf
from llama_ext.io.gguf_file import GgufFile
from llama_ext.io.hub import resolve
from llama_ext.io.peft import CONFIG_FILE as ADAPTER_CONFIG
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.models import ARCHITECTURES
from llama_ext.models.config import LlamaConfig
from llama_ext.models.generation_config import GenerationDefaults
from llama_ext.models.gguf_llama import config_from_gguf
from llama_ext.models.quantization_config import KEY, is_ours
from llama_ext.runtime.float_files import FloatFiles
from llama_ext.runtime.gguf_files import GgufFiles, generation_defaults
from llama_ext.runtime.model_files import ModelFiles
from llama_ext.runtime.packed_files import PackedFiles

__all__ = ["core_config", "load_random", "open_model", "read_configs"]


def core_config(config: LlamaConfig) -> dict[str, Any]:
    """The config in the core's words."""
    result: dict[str, Any] = ARCHITECTURES[config.model_type].core_config(config)
    return result


def open_model(
    path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> ModelFiles:
    """Finds a model and opens its files: a GGUF file, or a directory with floating-point or packed safetensors.

    Raises:
        FormatError: There is no such model, or a file of it is malformed.
        CheckpointError: Its tensors are not those that its config asks for.
        UnsupportedError: A model that this version does not run.
        LimitError: A number in a file is beyond `limits`.
    """
    path = resolve(path_or_hub_id, revision)
    gguf = find_gguf(path)
    if gguf is not None:
        return GgufFiles(gguf, limits)
    config = LlamaConfig.from_pretrained(_folder(path), limits=limits)
    kind = PackedFiles if is_ours(config.extra.get(KEY)) else FloatFiles
    return kind(path, config, limits)


def read_configs(path: Path, limits: Limits = DEFAULT_LIMITS) -> tuple[LlamaConfig, GenerationDefaults]:
    """What `open_model` would have as `config` and `generation_defaults`, without opening the rest.

    Raises:
        FormatError and others: As `open_model`.
    """
    gguf = find_gguf(path)
    if gguf is None:
        folder = _folder(path)
        config = LlamaConfig.from_pretrained(folder, limits=limits)
        return config, GenerationDefaults.from_pretrained(folder, limits=limits)
    with GgufFile(gguf, limits) as file:
        config = config_from_gguf(file.metadata, file.tensors, path=str(gguf), limits=limits)
        return config, generation_defaults(file.metadata, config.vocab_size)


def _folder(path: Path) -> Path:
    """The directory of a model that is none of GGUF: of a .safetensors file the one that it lies in.

    Raises:
        FormatError: Another file.
    """
    if not path.is_file():
        if (path / ADAPTER_CONFIG).is_file() and not os.path.lexists(path / "config.json"):
            raise FormatError(
                "this directory is an adapter's, not a model's: load its base, and this with load_adapter; or, of a task, with "
                "TextClassifier.load or Translator.load",
                path=str(path),
            )
        return path
    if path.suffix == ".safetensors":
        return path.parent
    expected = "a directory with config.json, a .gguf file, or a .safetensors file beside its config.json"
    advice = ""
    if path.suffix == ".json" and any(os.path.lexists(path.parent / name) for name in (SINGLE_FILE, INDEX_FILE)):
        advice = f" Give the directory: {path.parent}"
    raise FormatError(
        f"it is neither a directory nor a .gguf file. Expected {expected}.{advice}",
        path=str(path),
        expected=expected,
        got=path.suffix or "no suffix",
    )


def load_random(core: _core.Model, config: LlamaConfig, seed: int) -> None:
    """Fills the weights as transformers initialises a Llama: normal matrices, norms of 1, biases of 0.

    A matrix depends on the seed, its name and its shape alone: not on the other tensors, their order, or a dtype.

    Raises:
        OptionError: `seed` is not in [0, 2^64).
    """
    seed = whole_seed(seed)
    for spec in ARCHITECTURES[config.model_type].tensor_specs(config):
        if len(spec.shape) == 2:
            # Philox is a counter under a key, so a key per tensor is a stream per tensor.
            key = int.from_bytes(hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()[:16], "little")
            values = np.random.Generator(np.random.Philox(key=key)).standard_normal(spec.shape, dtype=np.float32)
            values *= np.float32(config.initializer_range)
        else:
            values = np.full(spec.shape, 0.0 if spec.name.endswith(".bias") else 1.0, dtype=np.float32)
        core.load(spec.slot, values, "float32")
