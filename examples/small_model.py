"""A small random Llama and a character tokenizer for the texts of an example: what real work would load instead."""

from __future__ import annotations

from collections.abc import Iterable

import llama_ext


def small_model(
    texts: Iterable[str], *, width: int = 96, layers: int = 2, heads: int = 4, context: int = 96, seed: int = 0
) -> llama_ext.LlamaForCausalLM:
    """A model whose vocabulary is the characters of some texts, and tokens that begin, end and fill up."""
    tokenizer = llama_ext.Tokenizer.train(
        texts, kind="char", bos_token="<s>", eos_token="</s>", pad_token="<pad>", unknown="replace"
    )
    config = llama_ext.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return llama_ext.LlamaForCausalLM(config, tokenizer, seed=seed)
