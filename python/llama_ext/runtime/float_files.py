"""A directory of Hugging Face's: config.json, floating-point safetensors, the tokenizer's files."""

from __future__ import annotations

import abc
import os
from pathlib import Path
from typing import Any

import numpy.typing as npt

from llama_ext import _core
from llama_ext.io.checkpoint import Checkpoint, open_checkpoint
from llama_ext.limits import Limits
from llama_ext.models import ARCHITECTURES
from llama_ext.models.config import LlamaConfig
from llama_ext.models.generation_config import GenerationDefaults
from llama_ext.runtime.model_files import ModelFiles, StoredTensor
from llama_ext.runtime.tokenizer import Tokenizer
from llama_ext.runtime.weight_types import WeightTypes, float_types

__all__ = ["DirectoryFiles", "FloatFiles"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class DirectoryFiles(ModelFiles):
    """What directories have in common: the small files beside the weights, and a checkpoint.

    Args:
        path: The directory, or a safetensors file in it.
        config: Of its config.json.
        limits: The bounds.
    """

    def __init__(self, path: Path, config: LlamaConfig, limits: Limits) -> None:
        folder = path.parent if path.is_file() else path
        self.path = path
        self.config = config
        self.generation_defaults = GenerationDefaults.from_pretrained(folder, limits=limits)
        self.tokenizer = None
        if any((folder / name).exists() for name in _TOKENIZER_FILES):
            self.tokenizer = Tokenizer.from_pretrained(folder, limits=limits)
        self.architecture = ARCHITECTURES[config.model_type]
        self.checkpoint: Checkpoint = open_checkpoint(path, limits)
        self.nbytes = sum(info.nbytes for info in self.checkpoint.tensors.values())
        try:
            self._match()
        except BaseException:
            self.checkpoint.close()
            raise

    @abc.abstractmethod
    def _match(self) -> None:
        """Sets `tensors`, or says why the checkpoint is not of this config."""

    def close(self) -> None:
        self.checkpoint.close()


class FloatFiles(DirectoryFiles):
    """Floating-point safetensors, one file or several."""

    format = "safetensors"

    def _match(self) -> None:
        infos = self.checkpoint.tensors
        specs = self.architecture.match(self.config, infos, path=os.fspath(self.path))
        self._dtypes = {spec.name: infos[spec.name].core_dtype for spec in specs}
        self.tensors = [
            StoredTensor(spec.name, spec.slot, spec.shape, self._dtypes[spec.name], infos[spec.name].nbytes)
            for spec in specs
        ]

    def stored_types(self) -> WeightTypes:
        return float_types(self.stored_dtype if self.stored_dtype in ("bfloat16", "float16") else "float32")

    def read(self, tensor: StoredTensor) -> tuple[npt.NDArray[Any], str]:
        return self.checkpoint.read(tensor.name), self._dtypes[tensor.name]

    def release(self, tensor: StoredTensor) -> None:
        self.checkpoint.release(tensor.name)

    def load_into(self, core: _core.Model) -> None:
        # What is tied is only compared here, and its pages are given back before the weights take theirs.
        self.architecture.check_tied_head(self.config, self.checkpoint, path=os.fspath(self.path))
        for name in self.checkpoint.tensors:
            self.checkpoint.release(name)
        super().load_into(core)
