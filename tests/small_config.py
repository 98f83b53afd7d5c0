"""A small config in the words of config.json, to be changed where a test is about it."""

from __future__ import annotations

from typing import Any

from llama_ext.models.config import LlamaConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def config_of(**changes: Any) -> LlamaConfig:
    return LlamaConfig.from_dict({**SMALL, **changes}, path="config.json")
