"""A GGUF file: everything about a model in one, its matrices kept in the blocks that they come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext.io.gguf_file import GgufFile, GgufTensor
from llama_ext.io.gguf_types import dequantize
from llama_ext.limits import Limits
from llama_ext.models.generation_config import GenerationDefaults
from llama_ext.models.gguf_llama import ENDS_KEY, GgufSpec, config_from_gguf, half_split_rows, match_gguf
from llama_ext.runtime.gguf_tokenizer import KEY, end_of_generation_ids, load_gguf_tokenizer
from llama_ext.runtime.model_files import ModelFiles, StoredTensor
from llama_ext.runtime.tokenizer import Tokenizer
from llama_ext.runtime.weight_types import WeightType, WeightTypes

__all__ = ["NO_TOKENIZER", "GgufFiles"]

# What files without a vocabulary call its kind.
NO_TOKENIZER = (None, "none", "no_vocab")

# Formats without blocks: the core's word, and how NumPy views them (bfloat16 as its bits).
_PLAIN: dict[str, tuple[str, str]] = {
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
}
# Values that are dequantised at a time: the temporaries of it are several times as large.
_CHUNK = 1 << 20

Array = npt.NDArray[Any]


class GgufFiles(ModelFiles):
    """A GGUF file.

    Args:
        path: The file.
        limits: The bounds.
    """

    format = "GGUF"

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self._file = GgufFile(path, limits)
        try:
            metadata = self._file.metadata
            self.config = config_from_gguf(metadata, self._file.tensors, path=str(path), limits=limits)
            self.tokenizer = None
            if metadata.get(KEY + "model") not in NO_TOKENIZER:
                self.tokenizer = load_gguf_tokenizer(Tokenizer, metadata, path=str(path), limits=limits)
            self.generation_defaults = generation_defaults(metadata, self.config.vocab_size)
            specs = match_gguf(self.config, self._file.tensors, path=str(path))
        except BaseException:
            self._file.close()
            raise
        self._specs = {spec.slot: spec for spec in specs}
        self.tensors = [
            StoredTensor(spec.gguf_name, spec.slot, spec.shape, tensor.type.name, tensor.nbytes)
            for spec in specs
            for tensor in (self._file.tensors[spec.gguf_name],)
        ]
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)

    def stored_types(self) -> WeightTypes:
        types = {tensor.slot: _kept(tensor.type) for tensor in self.tensors if len(tensor.shape) == 2}
        types[""] = _kept(self.stored_dtype)
        return types

    def read(self, tensor: StoredTensor) -> tuple[Array, str]:
        stored, spec = self._file.tensors[tensor.name], self._specs[tensor.slot]
        if len(tensor.shape) == 1:
            values, dtype = stored.dequantize(), "float32"
        elif tensor.type in _PLAIN:
            dtype, view = _PLAIN[tensor.type]
            values = stored.data.view(view).reshape(tensor.shape)
        else:
            values, dtype = _dequantized(stored), "float32"
        values = values[self._rows(spec)] if spec.rope_heads is not None else values
        return values if values.flags.aligned else values.copy(), dtype

    def read_codes(self, tensor: StoredTensor) -> tuple[Array, Array, Array | None]:
        blocks, spec = self._file.tensors[tensor.name].data, self._specs[tensor.slot]
        # No block crosses a row, so rows move as they are.
        rows = blocks[self._rows(spec)] if spec.rope_heads is not None else blocks
        return _core.decode_blocks(rows, tensor.type, tensor.shape[1])

    def release(self, tensor: StoredTensor) -> None:
        self._file.tensors[tensor.name].release()

    def close(self) -> None:
        self._file.close()

    def _load(self, core: _core.Model, tensor: StoredTensor, kept: WeightType | None) -> None:
        if tensor.type in _PLAIN or kept != _core.type_of_blocks(tensor.type):
            super()._load(core, tensor, kept)
            return
        blocks, spec = self._file.tensors[tensor.name].data, self._specs[tensor.slot]
        # No block crosses a row, so rows move as they are.
        core.load_blocks(tensor.slot, blocks[self._rows(spec)] if spec.rope_heads is not None else blocks, tensor.type)

    def _rows(self, spec: GgufSpec) -> npt.NDArray[np.intp]:
        return half_split_rows(spec.rope_heads or 1, self.config.head_dim)


def generation_defaults(metadata: Any, vocabulary: int) -> GenerationDefaults:
    """What a file says about generating: the tokens that end a text or a turn.

    Args:
        metadata: Of the file.
        vocabulary: V.

    Returns:
        The defaults.
    """
    if ENDS_KEY in metadata:
        return GenerationDefaults()  # the config has them
    ends = [index for index in end_of_generation_ids(metadata) if index < vocabulary]
    return GenerationDefaults(eos_token_id=ends or None)


def _kept(name: str) -> WeightType:
    return (_PLAIN[name][0], 0) if name in _PLAIN else _core.type_of_blocks(name)


def _dequantized(tensor: GgufTensor) -> npt.NDArray[np.float32]:
    """As `GgufTensor.dequantize`, piece by piece."""
    values = np.empty(tensor.shape, np.float32)
    data, step = tensor.data, max(1, _CHUNK // tensor.shape[-1])
    for row in range(0, len(data), step):
        values[row : row + step] = dequantize(data[row : row + step], tensor.type)
    return values
