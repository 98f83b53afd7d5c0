"""A checkpoint of random weights in a real shape, made with NumPy alone: bfloat16 safetensors and config.json."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.accounting import ModelShape

__all__ = ["ensure_model"]

# What transformers initialises with. Real weights are of this size too, and none is denormal.
_SCALE = 0.02


def ensure_model(cache: Path, shape: ModelShape) -> Path:
    """The directory of the model, generated when the cache does not have it.

    Args:
        cache: A directory, created when it does not exist.
        shape: Of the model.

    Returns:
        A directory with config.json and model.safetensors; there is no tokenizer.
    """
    name = "-".join(f"{value:d}" for value in dataclasses.astuple(shape))
    directory = cache / f"random-llama-{name}"
    weights = directory / "model.safetensors"
    if weights.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    print(f"generating {directory.name} (once)", file=sys.stderr)
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=2) + "\n", encoding="utf-8")
    unfinished = weights.with_name(f"{weights.name}.{os.getpid()}")
    _write(unfinished, shape)
    unfinished.rename(weights)
    return directory


def _config(shape: ModelShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied_head,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def _tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.width)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (shape.width,)
        yield prefix + "self_attn.q_proj.weight", (q_size, shape.width)
        yield prefix + "self_attn.k_proj.weight", (kv_size, shape.width)
        yield prefix + "self_attn.v_proj.weight", (kv_size, shape.width)
        yield prefix + "self_attn.o_proj.weight", (shape.width, q_size)
        yield prefix + "post_attention_layernorm.weight", (shape.width,)
        yield prefix + "mlp.gate_proj.weight", (shape.ffn_width, shape.width)
        yield prefix + "mlp.up_proj.weight", (shape.ffn_width, shape.width)
        yield prefix + "mlp.down_proj.weight", (shape.width, shape.ffn_width)
    yield "model.norm.weight", (shape.width,)
    if not shape.tied_head:
        yield "lm_head.weight", (shape.vocabulary, shape.width)


def _write(path: Path, shape: ModelShape) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dimensions in _tensors(shape):
        begin, end = end, end + 2 * int(np.prod(dimensions))
        header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for index, (_, dimensions) in enumerate(_tensors(shape)):
            file.write(_values(index, dimensions).tobytes())


def _values(index: int, dimensions: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    """The bits of bfloat16 numbers: ones for a norm, normal ones for a matrix."""
    if len(dimensions) == 1:
        return np.full(dimensions, 0x3F80, dtype=np.uint16)
    values = np.random.default_rng(index).standard_normal(dimensions, dtype=np.float32)
    values *= np.float32(_SCALE)
    bits = values.view(np.uint32)
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to nearest, ties to even
    return (bits >> np.uint32(16)).astype(np.uint16)
