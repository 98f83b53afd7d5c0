"""GGUF files with random blocks of every type, and the same weights as floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import llama_ext
from llama_ext.io.gguf_file import GgufFile
from llama_ext.io.gguf_types import BY_NAME, GgmlType, quantize
from llama_ext.io.gguf_writer import TensorToWrite, write_gguf
from llama_ext.models.config import LlamaConfig
from llama_ext.models.gguf_llama import config_to_gguf, gguf_tensor_specs, half_split_rows
from llama_ext.models.gguf_rope import ROPE_FACTORS

BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
TYPES = (*BLOCKS, "F16", "BF16", "F32")
# Where a block's float16 scales are: (offset, what to multiply a scale for weights of about 0.05 with).
_SCALES: dict[str, list[tuple[int, float]]] = {
    "Q8_0": [(0, 1 / 74)],
    "Q4_0": [(0, 1 / 4.6)],
    "Q4_1": [(0, 1 / 4.6), (2, -7.5 / 4.6)],
    "Q5_0": [(0, 1 / 9.2)],
    "Q5_1": [(0, 1 / 9.2), (2, -15.5 / 9.2)],
    "Q4_K": [(0, 1 / 200), (2, 7.5 / 200)],
    "Q5_K": [(0, 1 / 400), (2, 15.5 / 400)],
    "Q6_K": [(208, 1 / 1300)],
}


def config(**changes: Any) -> LlamaConfig:
    """Rows that blocks of 256 divide, and heads that share keys and values."""
    return LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            **changes,
        }
    )


def random_rows(shape: tuple[int, ...], kind: GgmlType, rng: np.random.Generator) -> Any:
    """Bytes of any value, and finite scales: (rows, row bytes)."""
    if kind.block == 1:
        return quantize(rng.standard_normal(shape, np.float32) * np.float32(0.05), kind)
    rows, columns = shape
    blocks = rng.integers(0, 256, (rows * columns // kind.block, kind.block_bytes), dtype=np.uint8)
    for at, scale in _SCALES[kind.name]:
        half = (0.05 * scale * rng.uniform(0.7, 1.3, len(blocks))).astype("<f2")
        blocks[:, at : at + 2] = half[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path, model: LlamaConfig, type_of: dict[str, str] | str, **entries: Any) -> None:
    """`type_of`: a type's name, or names by parts of slots; "" is for the rest."""
    rng = np.random.default_rng(5)
    metadata, factors = config_to_gguf(model)
    tensors = []
    for spec in gguf_tensor_specs(model):
        name = type_of
        if isinstance(type_of, dict):
            name = next((kind for part, kind in type_of.items() if part and spec.slot.endswith(part)), type_of[""])
        assert isinstance(name, str)
        kind = BY_NAME["F32" if len(spec.shape) == 1 else name]
        data = random_rows(spec.shape, kind, rng)
        if spec.slot.endswith("norm"):
            data = (1 + rng.standard_normal(spec.shape) / 10).astype(np.float32)
        tensors.append(TensorToWrite(spec.gguf_name, kind, spec.shape, lambda data=data: [data]))  # type: ignore[misc]
    if factors is not None:
        tensors.append(TensorToWrite(ROPE_FACTORS, BY_NAME["F32"], factors.shape, lambda: [factors]))
    write_gguf(path, {**metadata, **entries}, tensors)


def as_floats(path: Path, model: LlamaConfig) -> llama_ext.LlamaForCausalLM:
    """The same model on the reference backend: float64 arithmetic on the dequantised weights."""
    made = llama_ext.LlamaForCausalLM(model, device="reference")
    with GgufFile(path) as file:
        for spec in gguf_tensor_specs(model):
            values = file.tensors[spec.gguf_name].dequantize()
            if spec.rope_heads is not None:
                values = values[half_split_rows(spec.rope_heads, model.head_dim)]
            made._core.load(spec.slot, values, "float32")
    return made
