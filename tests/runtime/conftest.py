"""Models that the tests of the runtime share; they do not change, so one of each is enough."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import llama_ext
from shared_data import LETTERS, SHARED

STORIES = SHARED / "stories260K"


@functools.cache
def load(name: str, **options: Any) -> llama_ext.LlamaForCausalLM:
    """A model of the shared data, loaded once for each set of options."""
    return llama_ext.LlamaForCausalLM.from_pretrained(SHARED / name, **options)


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> llama_ext.LlamaForCausalLM:
    """A real trained model with a tokenizer: 260,032 parameters, 512 tokens. Where the shared data is missing, it is the
    model of letters, of 66 characters and without bos and eos; a test that must have the other says requires_shared.
    """
    if not STORIES.is_dir():
        path = tmp_path_factory.mktemp("models") / "letters"
        llama_ext.LlamaForCausalLM.from_pretrained(LETTERS, dtype="float32").save_pretrained(path)
        (path / "generation_config.json").unlink(missing_ok=True)  # it asks for sampling
        return llama_ext.LlamaForCausalLM.from_pretrained(path)
    return load("stories260K")


@pytest.fixture(scope="session")
def tiny() -> llama_ext.LlamaForCausalLM:
    """A random model without a tokenizer, of awkward sizes, that needs no shared data."""
    config = llama_ext.LlamaConfig(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=48,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
    )
    return llama_ext.LlamaForCausalLM(config, seed=3)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
