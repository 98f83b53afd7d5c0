"""Settings whose results on tiny Shakespeare, character by character, are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llama_ext.models.config import LlamaConfig
from llama_ext.runtime.tokenizer import Tokenizer

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A model's shape and how it is trained.

    Attributes:
        layers, heads, width, ffn_width, context: Of the model.
        compile: Arguments of `compile`.
        fit: Arguments of `fit`.
    """

    layers: int
    heads: int
    width: int
    ffn_width: int
    context: int
    compile: dict[str, Any]
    fit: dict[str, Any]

    def config(self, tokenizer: Tokenizer, **changes: Any) -> LlamaConfig:
        """The config of a model with tied embeddings for a tokenizer; `changes` are arguments of `LlamaConfig`."""
        values: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "hidden_size": self.width,
            "intermediate_size": self.ffn_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": True,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return LlamaConfig(**{**values, **changes})


_ADAMW = {"optimizer": "adamw", "lr": 1e-3, "min_lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1, "warmup": 100}

# nanoGPT's two settings for this text: minutes on a CPU (validation loss 1.88), and a GPU's (1.4697).
PRESETS: dict[str, Preset] = {
    "cpu": Preset(4, 4, 128, 344, 64, dict(_ADAMW), {"batch_size": 12, "max_steps": 2000}),
    "gpu": Preset(
        6,
        6,
        384,
        1024,
        256,
        {**_ADAMW, "dropout": 0.2, "attention_dropout": 0.2},
        {"batch_size": 64, "max_steps": 5000, "validate_every": 250},
    ),
}
