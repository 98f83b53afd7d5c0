"""A model's files into another format, tensor by tensor: GGUF, or a directory of floating-point safetensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext.errors import OptionError
from llama_ext.io.atomic import named
from llama_ext.io.checkpoint import TensorSource
from llama_ext.io.gguf_types import BY_NAME, GgmlType, quantize
from llama_ext.io.gguf_writer import TensorToWrite, write_gguf
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.models import ARCHITECTURES
from llama_ext.models.gguf_llama import (
    ENDS_KEY,
    GgufSpec,
    config_to_gguf,
    gguf_tensor_specs,
    interleaved_rows,
    stored_type,
)
from llama_ext.models.gguf_rope import ROPE_FACTORS
from llama_ext.runtime.gguf_tokenizer import KEY, end_of_generation_ids
from llama_ext.runtime.gguf_tokenizer_writer import tokenizer_to_gguf
from llama_ext.runtime.loading import open_model
from llama_ext.runtime.model_files import ModelFiles, StoredTensor
from llama_ext.runtime.progress import ProgressBar
from llama_ext.runtime.saving import save_files

__all__ = ["DTYPES", "convert", "names_gguf"]

DTYPES = ("float32", "float16", "bfloat16", "q8_0", "q4_0")
# GGUF's words for the first three, which are taken as well.
_SHORT = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_QUANTIZED = ("q8_0", "q4_0")
# What a floating-point tensor is called by the core and by GGUF -> GGUF's word.
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "F32": "F32", "F16": "F16", "BF16": "BF16"}
_CORE_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# As choose_types: rounding the tables costs the most and saves the least.
_TABLES = ("embedding", "head")
# Values that are converted at a time.
_CHUNK = 1 << 20
# Of ggml's formats; the first one's scales were of another type.
_QUANTIZATION_VERSION = 2


def convert(
    path_or_hub_id: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    revision: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Path:
    """Writes a model in another format, with its tokenizer and chat template, one tensor in memory at a time.

    Args:
        path_or_hub_id: As `LlamaForCausalLM.from_pretrained`.
        out: A path that ends in .gguf for a GGUF file, in a directory that exists; anything else is a directory of safetensors,
            created if need be.
        dtype: Of the matrices: "float32", "float16", "bfloat16" (or "f32", "f16", "bf16"), and of GGUF files also "q8_0" and "q4_0",
            whose tables (embedding and head) are Q8_0. Norms and biases are kept as they are. None: as they are stored, and quantised
            ones as float32.
        revision: Of the Hub: a branch, tag or commit.
        limits: What a file may ask for.

    Returns:
        `out`.

    Raises:
        OptionError: Another dtype, or one that safetensors do not have; or `path_or_hub_id` is no path.
        UnsupportedError: A tokenizer or a rotation that GGUF has no words for.
        NumericError: A weight is beyond the range of the dtype.
        FormatError, CheckpointError, LimitError: The model cannot be read.
        OSError: `out` cannot be written.
    """
    if not isinstance(path_or_hub_id, (str, os.PathLike)):
        raise OptionError(
            f"convert reads the files of a model: path_or_hub_id must be a path or a Hub id, got {type(path_or_hub_id).__name__}. "
            "Save a loaded model first: model.save_pretrained(directory), then convert(directory, ...)"
        )
    target = named(out)
    to_gguf = names_gguf(target)
    dtype = dtype if dtype is None else _SHORT.get(dtype, dtype)
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype in _QUANTIZED and not to_gguf:
        raise OptionError(
            f"dtype {dtype!r} is GGUF's: {os.fspath(target)} would have to end in .gguf. `quantize` writes packed directories"
        )
    with open_model(path_or_hub_id, revision=revision, limits=limits) as files:
        if to_gguf:
            _write_gguf(files, target, dtype)
        else:
            _write_directory(files, target, dtype)
    return target


def _kind(tensor: StoredTensor, dtype: str | None) -> GgmlType:
    """The format to write a tensor in."""
    if dtype is None or len(tensor.shape) == 1:
        return BY_NAME[_FLOATS.get(tensor.type, "F32")]
    if dtype == "q4_0" and tensor.slot in _TABLES:
        dtype = "q8_0"
    return BY_NAME[_FLOATS.get(dtype, dtype.upper())]


def _chunks(
    files: ModelFiles, tensor: StoredTensor, kind: GgmlType, order: npt.NDArray[np.intp] | None = None
) -> Iterator[npt.NDArray[Any]]:
    """The tensor in a format, its rows in an order, piece by piece."""
    values, dtype = files.read(tensor)
    step = max(1, _CHUNK // (tensor.shape[-1] if len(tensor.shape) == 2 else 1))
    for row in range(0, len(values), step):
        part = values[row : row + step] if order is None else values[order[row : row + step]]
        yield part if dtype == _CORE_WORDS.get(kind.name) else quantize(_widened(part, dtype), kind)
    files.release(tensor)


def _widened(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(values, dtype=np.float32)


def _mostly(files: ModelFiles, kinds: dict[str, GgmlType]) -> GgmlType:
    sizes: dict[GgmlType, int] = {}
    for tensor in files.tensors:
        kind = kinds[tensor.slot]
        sizes[kind] = sizes.get(kind, 0) + int(np.prod(tensor.shape))
    return max(sizes, key=sizes.__getitem__)


def names_gguf(out: Path) -> bool:
    """Whether `convert` writes a GGUF file there: a hidden one has a name that is all suffix."""
    return out.name.lower().endswith(".gguf")


def _write_gguf(files: ModelFiles, path: Path, dtype: str | None) -> None:
    config = files.config
    tensors = {tensor.slot: tensor for tensor in files.tensors}
    kinds = {slot: stored_type(tensor.shape, _kind(tensor, dtype)) for slot, tensor in tensors.items()}
    entries, factors = config_to_gguf(config)
    metadata = {**entries, "general.name": _name(files), "general.file_type": _mostly(files, kinds).file_type}
    if any(kind.block > 1 for kind in kinds.values()):
        metadata["general.quantization_version"] = _QUANTIZATION_VERSION
    metadata.update(_tokenizer(files))

    def source(spec: GgufSpec) -> Callable[[], Iterator[npt.NDArray[Any]]]:
        heads = spec.rope_heads
        order = None if heads is None else interleaved_rows(heads, config.head_dim)
        return lambda: _chunks(files, tensors[spec.slot], kinds[spec.slot], order)

    to_write = [
        TensorToWrite(spec.gguf_name, kinds[spec.slot], spec.shape, source(spec)) for spec in gguf_tensor_specs(config)
    ]
    if factors is not None:
        to_write.insert(0, TensorToWrite(ROPE_FACTORS, BY_NAME["F32"], factors.shape, lambda: [factors]))
    with ProgressBar("Writing GGUF", sum(tensor.nbytes for tensor in to_write), "bytes") as bar:
        write_gguf(path, metadata, to_write, progress=bar.advance)


def _name(files: ModelFiles) -> str:
    path = files.path.resolve()
    return path.stem if path.suffix.lower() in (".gguf", ".safetensors") else path.name


def _tokenizer(files: ModelFiles) -> dict[str, Any]:
    """The tokenizer's entries, and which tokens end a text where the tokenizer does not know it."""
    config, tokenizer = files.config, files.tokenizer
    ends = list(files.generation_defaults.eos_token_id or config.eos_token_ids)
    if tokenizer is None:
        found: dict[str, Any] = {KEY + "model": "none"}
        named = {"bos": config.bos_token_id, "eos": next(iter(ends), None), "padding": config.pad_token_id}
        found.update({f"{KEY}{name}_token_id": index for name, index in named.items() if index is not None})
    else:
        found = tokenizer_to_gguf(tokenizer, config.vocab_size)
        if ends and f"{KEY}eos_token_id" not in found:
            found[f"{KEY}eos_token_id"] = ends[0]
    # What ends a turn, where it is another token.
    others = [index for index in ends if index != found.get(f"{KEY}eos_token_id")]
    for name, index in zip(("eot", "eom"), others, strict=False):
        found.setdefault(f"{KEY}{name}_token_id", index)
    if end_of_generation_ids(found) != ends:
        # More than GGUF has names for, or fewer than a reader takes for granted: a key of our own has them all.
        found[ENDS_KEY] = np.array(ends, np.int32)
    return found


def _write_directory(files: ModelFiles, folder: Path, dtype: str | None) -> None:
    tensors = {tensor.slot: tensor for tensor in files.tensors}
    kinds = {slot: _kind(tensor, dtype) for slot, tensor in tensors.items()}

    def source(tensor: StoredTensor) -> Callable[[], Iterator[npt.NDArray[Any]]]:
        return lambda: (np.ascontiguousarray(part) for part in _chunks(files, tensor, kinds[tensor.slot]))

    sources: list[TensorSource] = [
        (spec.name, _CORE_WORDS[kinds[spec.slot].name], spec.shape, source(tensors[spec.slot]))
        for spec in ARCHITECTURES[files.config.model_type].tensor_specs(files.config)
    ]
    total = sum(kinds[tensor.slot].row_bytes(int(np.prod(tensor.shape))) for tensor in files.tensors)
    mostly = _CORE_WORDS[_mostly(files, kinds).name]
    with ProgressBar("Writing safetensors", total, "bytes") as bar:
        save_files(
            folder, sources, files.config, mostly, files.tokenizer, files.generation_defaults, advance=bar.advance
        )
