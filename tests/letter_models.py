"""Small models of letters, of awkward sizes, and texts for them: what tests of training share."""

from __future__ import annotations

from typing import Any

import numpy as np

import llama_ext

TEXT = "the quick brown fox jumps over the lazy dog. "
Model = llama_ext.LlamaForCausalLM


def make(seed: int = 0, tied: bool = True, threads: int | None = None, device: str = "cpu", **changes: Any) -> Model:
    """A small model of letters, of awkward sizes."""
    tokenizer = llama_ext.Tokenizer.train(TEXT * 2, kind="char", eos_token="</s>")
    config = llama_ext.LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 24,
            "intermediate_size": 50,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "max_position_embeddings": 48,
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "initializer_range": 0.1,
            **changes,
        }
    )
    return Model(config, tokenizer, seed=seed, threads=threads, device=device)


def weights(model: Model) -> dict[str, Any]:
    return {slot: np.array(model._core.read(slot)) for slot, _, _ in model._core.slots()}


def same(first: Model, second: Model) -> None:
    theirs = weights(second)
    for slot, values in weights(first).items():
        assert values.tobytes() == theirs[slot].tobytes(), slot


def documents() -> list[str]:
    rng = np.random.default_rng(0)
    return [TEXT[begin : begin + size] for begin, size in rng.integers(2, 20, (24, 2)).tolist()]
