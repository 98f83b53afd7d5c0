"""The weights of a model for a graph, one matrix in memory at a time: floats as they are stored, quantised ones as their codes.

They come from a model's files, without loading the model, or from a model in memory. A matrix that is quantised already keeps
its codes and scales; one of floats is quantised as `from_pretrained(dtype=...)` would.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import widen_bfloat16
from llama_ext.errors import NumericError, OptionError
from llama_ext.io.gguf_types import BY_NAME, quantize
from llama_ext.models import ARCHITECTURES
from llama_ext.models.config import LlamaConfig
from llama_ext.models.generation_config import GenerationDefaults
from llama_ext.onnx.profiles import QUANTIZED
from llama_ext.runtime.float_files import FloatFiles
from llama_ext.runtime.model_files import ModelFiles, StoredTensor
from llama_ext.runtime.tokenizer import Tokenizer
from llama_ext.runtime.weight_types import WeightType, WeightTypes, choose_types, is_quantized

__all__ = ["Codes", "CoreWeights", "FileWeights", "FloatMatrix", "Matrix", "QuantizedMatrix", "Weights", "narrowed"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

# Weights that are converted at a time.
_CHUNK = 1 << 20
# Rows that are transposed at a time.
_TILE = 256
# Bits of a code: csrc/quant/weight_type.h.
_BITS = {"int8": 8, "int5": 5, "int4": 4, "q4_k": 4, "q5_k": 5, "q6_k": 6}
_WITH_MIN = ("q4_k", "q5_k")


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantised matrix: w = scale (code - zero) + middle, by groups of columns.

    Args:
        codes: (N, K) uint8.
        scales: (N, groups) float32.
        middles: (N, groups) float32, or None: what a group's minimum is to the middle of its codes.
    """

    codes: npt.NDArray[np.uint8]
    scales: Floats
    middles: Floats | None


@dataclasses.dataclass(frozen=True)
class FloatMatrix:
    """A matrix of floats, or one that is to be widened to them.

    Args:
        shape: (N, K): y = x w^T.
        read: Gives the values and their dtype: float32, float16, float64, or bfloat16 as uint16 bits.
        release: Gives the memory of what `read` gave back.
    """

    shape: tuple[int, int]
    read: Callable[[], tuple[Array, str]]
    release: Callable[[], None]

    def rows(self, dtype: str) -> Iterator[Array]:
        """(N, K) in a dtype, rows by rows."""
        values, stored = self.read()
        step = max(1, _CHUNK // self.shape[1])
        for first in range(0, self.shape[0], step):
            yield converted(values[first : first + step], stored, dtype)
        del values
        self.release()

    def columns(self, dtype: str) -> Iterator[Array]:
        """(K, N), the transposed matrix, in a dtype, rows by rows."""
        values, stored = self.read()
        step = max(1, _CHUNK // self.shape[0])
        for first in range(0, self.shape[1], step):
            part = values[:, first : first + step]
            if stored == "bfloat16" and dtype == "float32":
                # The upper halves of float32 numbers: written once, where widening afterwards would write them twice.
                wide = np.zeros((part.shape[1], part.shape[0], 2), np.uint16)
                transpose(part, wide[:, :, 1])
                yield wide
                continue
            turned = np.empty(part.shape[::-1], part.dtype)
            transpose(part, turned)
            yield converted(turned, stored, dtype)
        del values
        self.release()


@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix of codes.

    Args:
        shape: (N, K).
        bits: Of a code: 4, 5, 6 or 8.
        has_middle: Whether a group has more than a scale.
        group: Columns that share a scale; the last group may be smaller.
        read: Gives the codes.
    """

    shape: tuple[int, int]
    bits: int
    has_middle: bool
    group: int
    read: Callable[[], Codes]

    @property
    def zero(self) -> int:
        """Subtracted from each code: half of their range, so that sums of products stay small."""
        return 1 << (self.bits - 1)

    @property
    def groups(self) -> int:
        """Of a row."""
        return -(-self.shape[1] // self.group)


Matrix = FloatMatrix | QuantizedMatrix


class Weights(abc.ABC):
    """Where the tensors of a graph come from.

    Attributes:
        config: The model.
        tokenizer: Or None.
        generation_defaults: What the files suggest for generating.
        labels: How many classes a classifier has; None for a language model.
        dtype: float32 | float16 | bfloat16 | int8 | int4: the kind of the graph's weights.
        types: How each matrix is kept, by slot.
    """

    config: LlamaConfig
    tokenizer: Tokenizer | None
    generation_defaults: GenerationDefaults
    labels: int | None
    dtype: str
    types: WeightTypes
    _names: dict[str, str]
    _shapes: dict[str, tuple[int, ...]]

    def name(self, slot: str) -> str:
        """Hugging Face's name of a slot's tensor."""
        return self._names[self.tied(slot)]

    def tied(self, slot: str) -> str:
        """The slot whose tensor it is: the head of a tied model is the embedding."""
        tied = self.config.tie_word_embeddings and self.labels is None
        return "embedding" if slot == "head" and tied else slot

    def has(self, slot: str) -> bool:
        """Whether there is such a tensor: a bias is not in every model."""
        return slot in self._names

    @abc.abstractmethod
    def vector(self, slot: str) -> Floats:
        """A norm or a bias, float32."""

    @abc.abstractmethod
    def matrix(self, slot: str) -> Matrix:
        """A matrix, not read yet."""

    def _prepare(self, stored: WeightTypes, dtype: str | None, group_size: int | None, symmetric: bool | None) -> None:
        """Sets `dtype` and `types` from what is there and what is asked for."""
        specs = list(ARCHITECTURES[self.config.model_type].tensor_specs(self.config))
        self._names = {spec.slot: spec.name for spec in specs}
        self._shapes = {spec.slot: spec.shape for spec in specs}
        slots = [spec.slot for spec in specs if len(spec.shape) == 2]
        own = kind_of(stored) if is_quantized(stored) else None
        self.dtype = dtype or own or "float32"
        if self.dtype in QUANTIZED and own is not None:
            if self.dtype != own or group_size is not None or symmetric is not None:
                raise OptionError(
                    f"the model is quantised as {stored[''][0]} already, and quantising it again would lose more: export it "
                    f"as {own} with the groups that it has, which is what an export without further options does, or widened as "
                    "float32"
                )
            self.types = {slot: stored.get(slot, stored[""]) for slot in slots}
        elif self.dtype in QUANTIZED:
            chosen = choose_types(self.dtype, None, specs, group_size=group_size, symmetric=symmetric)
            self.types = {slot: chosen[slot] for slot in slots}
        else:
            choose_types(self.dtype, None, (), group_size=group_size, symmetric=symmetric)  # refuses those two
            self.types = dict.fromkeys(slots, (self.dtype, 0))

    def _base(self, slot: str) -> str:
        """The encoding of a matrix, with or without minima."""
        return self.types[slot][0].removesuffix("_min")

    def _quantized(self, slot: str, read: Callable[[], Codes]) -> QuantizedMatrix:
        encoding, group = self.types[slot]
        base = self._base(slot)
        has_min = base != encoding or base in _WITH_MIN
        rows, columns = self._shapes[slot]
        return QuantizedMatrix((rows, columns), _BITS[base], has_min, group, read)


class FileWeights(Weights):
    """The weights of a model's files.

    Args:
        files: Opened; they must stay open while this is used.
        dtype, group_size, symmetric: See `export`.
    """

    def __init__(self, files: ModelFiles, dtype: str | None, group_size: int | None, symmetric: bool | None) -> None:
        self._files = files
        self._tensors = {tensor.slot: tensor for tensor in files.tensors}
        self.config = files.config
        self.tokenizer = files.tokenizer
        self.generation_defaults = files.generation_defaults
        self.labels = files.config.num_labels if files.config.is_classifier else None
        if isinstance(files, FloatFiles):
            files.architecture.check_tied_head(files.config, files.checkpoint, path=str(files.path))
        self._stored = files.stored_types()
        self._prepare(self._stored, dtype, group_size, symmetric)

    def vector(self, slot: str) -> Floats:
        values, stored = self._files.read(self._tensors[slot])
        return converted(values, stored, "float32")

    def matrix(self, slot: str) -> Matrix:
        slot = self.tied(slot)
        tensor, kept = self._tensors[slot], self.types[slot]
        floats = FloatMatrix(
            (tensor.shape[0], tensor.shape[1]), lambda: self._files.read(tensor), lambda: self._files.release(tensor)
        )
        if not kept[1]:
            return floats
        if self._stored.get(slot, self._stored[""])[1]:
            return self._quantized(slot, lambda: self._own_codes(tensor))
        return self._quantized(slot, lambda: quantized(floats, kept))

    def _own_codes(self, tensor: StoredTensor) -> Codes:
        codes = centred(*self._files.read_codes(tensor), _BITS[self._base(tensor.slot)])
        self._files.release(tensor)
        return codes


class CoreWeights(Weights):
    """The weights of a model in memory.

    Args:
        core: Its weights.
        config, tokenizer, generation_defaults: What belongs to them.
        dtype, group_size, symmetric: See `export`.
    """

    def __init__(
        self,
        core: _core.Model,
        config: LlamaConfig,
        tokenizer: Tokenizer | None,
        generation_defaults: GenerationDefaults,
        dtype: str | None,
        group_size: int | None,
        symmetric: bool | None,
    ) -> None:
        self._core = core
        self.config = config
        self.labels = config.num_labels if config.is_classifier else None
        self.tokenizer = tokenizer
        self.generation_defaults = generation_defaults
        self._stored = core.types()
        self._prepare(self._stored, dtype, group_size, symmetric)

    def vector(self, slot: str) -> Floats:
        return self._core.read(slot)

    def matrix(self, slot: str) -> Matrix:
        slot = self.tied(slot)
        kept, stored = self.types[slot], self._stored.get(slot, self._stored[""])
        floats = FloatMatrix(
            (self._shapes[slot][0], self._shapes[slot][1]),
            lambda: (self._core.read(slot), "float32" if stored[1] else stored[0]),
            lambda: None,
        )
        if not kept[1]:
            return floats
        if stored[1]:
            return self._quantized(slot, lambda: centred(*self._core.read_codes(slot), _BITS[self._base(slot)]))
        return self._quantized(slot, lambda: quantized(floats, kept))


def kind_of(types: WeightTypes) -> str:
    """int8 or int4: which of the two kinds of export the codes of a quantised model belong to."""
    encoding = types[""][0]
    if not types[""][1]:  # mostly floats, some matrices quantised
        return "int8"
    return "int4" if _BITS[encoding.removesuffix("_min")] == 4 else "int8"


def centred(codes: npt.NDArray[np.uint8], scales: Floats, mins: Floats | None, bits: int) -> Codes:
    """Codes as the core has them, w = scale code + min where there are minima, around the middle of their range.

    The sum is rounded to float32, which is 2^-24 of the group's largest weight at most, and nearly always exact.
    """
    return Codes(codes, scales, None if mins is None else mins + np.float32(1 << (bits - 1)) * scales)


def quantized(matrix: FloatMatrix, kept: WeightType) -> Codes:
    """Rounds a matrix of floats as the core does."""
    encoding, group = kept
    rows, columns = matrix.shape
    has_min = encoding.endswith("_min")
    bits = _BITS[encoding.removesuffix("_min")]
    zero = 0 if has_min else 1 << (bits - 1)
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, -(-columns // group)), np.float32)
    mins = np.empty_like(scales) if has_min else None
    values, stored = matrix.read()
    step = max(1, _CHUNK // columns)

    def round_rows(first: int) -> None:
        last = min(first + step, rows)
        part, scale, minimum = _core.quantize(converted(values[first:last], stored, "float32"), encoding, group)
        np.add(part.view(np.uint8), np.uint8(zero), out=codes[first:last])
        scales[first:last] = scale
        if mins is not None:
            mins[first:last] = minimum

    # A row's codes depend on the row alone, and the core lets go of the interpreter while it rounds.
    with ThreadPoolExecutor(_core.default_threads()[0]) as pool:
        for _ in pool.map(round_rows, range(0, rows, step)):
            pass
    matrix.release()
    return centred(codes, scales, mins, bits)


def transpose(values: Array, out: Array) -> None:
    """out = values^T, by blocks of rows that stay in the cache while their columns are read."""
    for first in range(0, values.shape[0], _TILE):
        out[:, first : first + _TILE] = values[first : first + _TILE].T


def converted(values: Array, stored: str, dtype: str) -> Array:
    """Floats in another dtype, contiguous; bfloat16 is uint16 bits on both sides.

    Raises:
        NumericError: A number is too large for it.
    """
    if stored == dtype:
        return np.ascontiguousarray(values)
    wide: Floats
    if stored == "bfloat16":
        wide = widen_bfloat16(values)
    else:
        with np.errstate(over="ignore"):
            wide = np.ascontiguousarray(values, dtype=np.float32)
        if stored == "float64" and not np.isfinite(wide).all():
            raise NumericError("a weight is not finite, or too large for float32")
    return narrowed(wide, dtype)


def narrowed(values: Floats, dtype: str) -> Array:
    """float32 numbers rounded to a dtype, to nearest even; bfloat16 as its bits."""
    if dtype == "float32":
        return values
    kind, view = (BY_NAME["F16"], "<f2") if dtype == "float16" else (BY_NAME["BF16"], "<u2")
    return quantize(np.ascontiguousarray(values), kind).view(view).reshape(values.shape)
