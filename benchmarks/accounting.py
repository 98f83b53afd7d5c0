"""How much work a Llama is: operations of a prefill, bytes of a decoded token. Nothing is measured here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["TINYLLAMA_1_1B", "ModelShape"]


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
