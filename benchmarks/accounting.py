"""How much work a Llama is: operations of a prefill, bytes of a decoded token. Nothing is measured here."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["TINYLLAMA_1_1B", "ModelShape", "gguf_decode_bytes"]


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The dimensions of docs/architecture.md."""

    vocabulary: int  # V
    width: int  # C
    ffn_width: int  # F
    layers: int
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # D
    tied_head: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From what config.json holds."""
        heads = int(config["num_attention_heads"])
        return cls(
            vocabulary=int(config["vocab_size"]),
            width=int(config["hidden_size"]),
            ffn_width=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            tied_head=bool(config.get("tie_word_embeddings", False)),
        )

    @classmethod
    def from_directory(cls, directory: Path) -> ModelShape:
        """From a checkpoint."""
        return cls.from_config(json.loads((directory / "config.json").read_text(encoding="utf-8")))

    @property
    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the products of one block, as they run: q, k, v as one, and gate and up as one."""
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (q_size + 2 * kv_size, self.width),
            "o": (self.width, q_size),
            "gate_up": (2 * self.ffn_width, self.width),
            "down": (self.width, self.ffn_width),
        }

    @property
    def block_parameters(self) -> int:
        """Weights of the matrices of all blocks."""
        return self.layers * sum(rows * columns for rows, columns in self.layer_matrices.values())

    @property
    def head_parameters(self) -> int:
        """Weights of the output head, tied or not."""
        return self.vocabulary * self.width

    def attention_flop(self, tokens: int, before: int = 0) -> int:
        """Of all blocks: 2 D for the score of a query and a key and 2 D to add its value, over all keys it sees."""
        pairs = sum(before + token + 1 for token in range(tokens))
        return 4 * self.layers * self.heads * self.head_dim * pairs

    def prefill_flop(self, tokens: int) -> int:
        """2 per weight and token, plus attention. The head runs for the last token only: no more is needed."""
        return 2 * self.block_parameters * tokens + 2 * self.head_parameters + self.attention_flop(tokens)

    def decode_bytes(self, bytes_per_weight: float) -> int:
        """The weights read for one token: every matrix and the head, not the embedding, of which one row is read."""
        return round((self.block_parameters + self.head_parameters) * bytes_per_weight)


TINYLLAMA_1_1B = ModelShape(vocabulary=32000, width=2048, ffn_width=5632, layers=22, heads=32, kv_heads=4, head_dim=64)


# ---------------------------------------------------------------------------------------------------------- GGUF

_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type
_DEFAULT_ALIGNMENT = 32


def gguf_decode_bytes(path: Path) -> int:
    """The weights that one token reads of a GGUF file: its tensors, less the embedding when the head is another tensor.

    A tensor's size is the distance to the next one, which needs no table of block formats and counts at most
    the alignment too much. The file is trusted: it is the caller's own.

    Raises:
        ValueError: Not a little-endian GGUF file of version 2 or later.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF" or _number(file, "<I") not in (2, 3):
            raise ValueError(f"{path.name}: not a GGUF file of version 2 or 3")
        tensors, entries = _number(file, "<Q"), _number(file, "<Q")
        alignment = _DEFAULT_ALIGNMENT
        for _ in range(entries):
            key = _string(file)
            kind = _number(file, "<I")
            if key == b"general.alignment":
                alignment = _number(file, "<I")
            else:
                _skip(file, kind)
        offsets = {}
        for _ in range(tensors):
            name = _string(file)
            file.seek(8 * _number(file, "<I") + 4, 1)  # dimensions and type
            offsets[name] = _number(file, "<Q")
        data = -(-file.tell() // alignment) * alignment
    order = sorted(offsets, key=offsets.__getitem__)
    ends = [offsets[name] for name in order[1:]] + [path.stat().st_size - data]
    sizes = {name: end - offsets[name] for name, end in zip(order, ends, strict=True)}
    return sum(sizes.values()) - (sizes[b"token_embd.weight"] if b"output.weight" in sizes else 0)


def _number(file: BinaryIO, layout: str) -> int:
    return int(struct.unpack(layout, file.read(struct.calcsize(layout)))[0])


def _string(file: BinaryIO) -> bytes:
    return file.read(_number(file, "<Q"))


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == _GGUF_STRING:
        file.seek(_number(file, "<Q"), 1)
    elif kind == _GGUF_ARRAY:
        element, count = _number(file, "<I"), _number(file, "<Q")
        if element in _GGUF_SCALARS:
            file.seek(count * _GGUF_SCALARS[element], 1)
        else:
            for _ in range(count):
                _skip(file, element)
    else:
        file.seek(_GGUF_SCALARS[kind], 1)
