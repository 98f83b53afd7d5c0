"""A directory whose matrices are packed already: its file is mapped and used as it lies.

Another device than a CPU, whose matrices lie in another way, gets the codes as they are.

model.safetensors holds each of the core's matrices as the bytes of its memory, U8 "packed.<name>", each at a multiple of 64
bytes; norms and biases are float32 under Hugging Face's names; config.json has `quantization_config`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext.errors import CheckpointError, DTypeError, FormatError, OptionError, UnsupportedError
from llama_ext.io.checkpoint import BYTES
from llama_ext.io.safetensors_file import TensorInfo
from llama_ext.models.quantization_config import KEY, QuantizationConfig
from llama_ext.runtime.float_files import DirectoryFiles
from llama_ext.runtime.model_files import StoredTensor
from llama_ext.runtime.weight_types import WeightType, WeightTypes

__all__ = ["PREFIX", "PackedFiles"]

# Of the names of matrices; no name of Hugging Face's begins like this.
PREFIX = "packed."

# Encodings whose scales and minima are float16 numbers for each group, and what is subtracted from a code.
_ZEROS = {"int8": 128, "int8_min": 0, "int5": 16, "int5_min": 0, "int4": 8, "int4_min": 0}

Array = npt.NDArray[Any]


class PackedFiles(DirectoryFiles):
    """Packed safetensors, one file or several."""

    format = "packed safetensors"

    def _match(self) -> None:
        path = os.fspath(self.path)
        specs = list(self.architecture.tensor_specs(self.config))
        slots = [spec.slot for spec in specs if len(spec.shape) == 2]
        self._quantization = QuantizationConfig.from_dict(self.config.extra[KEY], slots, path=path)
        for slot, kind in self._quantization.types.items():
            _check_type(slot, kind, path)
        infos = self.checkpoint.tensors
        self._packed = {name[len(PREFIX) :] for name in infos if name.startswith(PREFIX)}
        vectors = {spec.name: spec for spec in specs if len(spec.shape) == 1}
        _check_tensors(infos, {name: spec.shape for name, spec in vectors.items()}, path)
        types = self._quantization.types
        self.tensors = [
            StoredTensor(spec.name, spec.slot, spec.shape, types[spec.slot][0], 0)
            if spec.name not in vectors
            else StoredTensor(spec.name, spec.slot, spec.shape, infos[spec.name].core_dtype, infos[spec.name].nbytes)
            for spec in specs
        ]
        self._reader: _core.Model | None = None

    def stored_types(self) -> WeightTypes:
        return dict(self._quantization.types)

    def types(self, requested: str, group_size: int | None, symmetric: bool | None) -> WeightTypes:
        encoding, group = self._quantization.types[""]
        has_min = encoding.endswith("_min")
        if (
            requested == encoding.removesuffix("_min")
            and group_size in (None, group)
            and symmetric in (None, not has_min)
        ):
            return self.stored_types()  # what is asked for is what is there
        return super().types(requested, group_size, symmetric)

    def packed(self, layout: str, types: Mapping[str, WeightType]) -> dict[str, Array]:
        if types != self._quantization.types:
            return {}  # to be converted
        if layout != self._quantization.layout:
            if self._can_load_codes():
                return {}
            raise UnsupportedError(
                f"{self.path}: the matrices lie in the layout {self._quantization.layout[:80]!r}, this device and version use "
                f"{layout!r}. Quantise the original model again."
            )
        return {name: self.checkpoint.read_bytes(PREFIX + name) for name in self._packed}

    def check(self) -> None:
        self._opened()

    def _can_load_codes(self) -> bool:
        """Whether another device takes the codes: they lie as a CPU has them, and their scales are what `load_codes` takes."""
        is_plain = all(group == 0 or encoding in _ZEROS for encoding, group in self._quantization.types.values())
        return is_plain and self._quantization.layout == _core.Backend("cpu").matrix_layout

    def _load(self, core: _core.Model, tensor: StoredTensor, kept: WeightType | None) -> None:
        if kept is None or kept[1] == 0 or kept[0] not in _ZEROS or kept != self._quantization.types[tensor.slot]:
            return super()._load(core, tensor, kept)
        codes, scales, mins = self.read_codes(tensor)
        if mins is None:
            signed = (codes - np.uint8(_ZEROS[kept[0]])).view(np.int8)  # which wraps around, as it should
            return core.load_codes(tensor.slot, signed, scales.astype(np.float16))
        return core.load_codes(tensor.slot, codes, scales.astype(np.float16), mins.astype(np.float16))

    def read(self, tensor: StoredTensor) -> tuple[Array, str]:
        if len(tensor.shape) == 1:
            return self.checkpoint.read(tensor.name), tensor.type
        encoding, group = self._quantization.types[tensor.slot]
        return self._opened().read(tensor.slot), "float32" if group else encoding

    def read_codes(self, tensor: StoredTensor) -> tuple[Array, Array, Array | None]:
        return self._opened().read_codes(tensor.slot)

    def _opened(self) -> _core.Model:
        """A model over the mapped file, which only reads."""
        if self._reader is None:
            backend, types = _core.Backend("cpu"), self.stored_types()
            with self.named_in_errors():
                config = self.architecture.core_config(self.config)
                self._reader = _core.Model(backend, config, types, self.packed(backend.matrix_layout, types))
        return self._reader

    def release(self, tensor: StoredTensor) -> None:
        if len(tensor.shape) == 1:
            self.checkpoint.release(tensor.name)

    def close(self) -> None:
        self._reader = None
        super().close()


def _check_type(slot: str, kind: WeightType, path: str) -> None:
    try:
        _core.weight_type(*kind)
    except (DTypeError, OptionError) as error:
        raise FormatError(f"{KEY}.types[{slot!r}]: {error}", path=path, field=KEY) from error


def _check_tensors(infos: Mapping[str, TensorInfo], vectors: Mapping[str, tuple[int, ...]], path: str) -> None:
    """The vectors are there, with their shapes; which matrices have to be, and how large, the core knows."""

    def refuse(name: str, message: str, expected: object = None, got: object = None) -> NoReturn:
        raise CheckpointError(
            f"tensor {name[:120]} {message}. Is config.json of another model?",
            path=path,
            field=name,
            expected=expected,
            got=got,
        )

    for name, shape in vectors.items():
        if name not in infos:
            refuse(name, "is missing in this packed checkpoint")
        if infos[name].shape != shape:
            refuse(name, f"must have shape {shape} by config.json, got {infos[name].shape}", shape, infos[name].shape)
    for name, info in infos.items():
        if name.startswith(PREFIX) and info.dtype != BYTES:
            refuse(name, f"must be {BYTES}, got {info.dtype}", BYTES, info.dtype)
        if name not in vectors and not name.startswith(PREFIX):
            refuse(name, "is unexpected in this packed checkpoint")
