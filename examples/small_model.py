"""A small random Llama and a tokenizer for the texts of an example: what real work would load instead."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

import llama_ext

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def word_tokenizer(texts: Iterable[str]) -> llama_ext.Tokenizer:
    """A byte-level BPE that has learned whole words, but takes digits and Chinese characters one by one.

    As large models' tokenizers do: what a number or a date consists of stays apart, and its parts can be put together anew.
    """
    backend = Backend(models.BPE())
    parts = pre_tokenizers.Split(Regex(r"\p{N}|\p{Han}| ?[^\s\p{N}\p{P}\p{Han}]+|\s|\p{P}"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([parts, bytes_])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,  # more than there are words
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(list(texts), trainer)
    return llama_ext.Tokenizer.from_tokenizers(backend, **SPECIAL)


def small_model(
    texts: Iterable[str],
    *,
    words: bool = False,
    width: int = 96,
    layers: int = 2,
    heads: int = 4,
    context: int = 96,
    spread: float = 0.05,
    seed: int = 0,
) -> llama_ext.LlamaForCausalLM:
    """A model whose tokens are the characters of some texts, or with `words` their words; and those that begin, end and fill up.

    `spread` is the standard deviation of its weights. Logits are products with the embedding: where adapters are to be sure of
    something above a base that has learned little, it must not be small.
    """
    if words:
        tokenizer = word_tokenizer(texts)
    else:
        tokenizer = llama_ext.Tokenizer.train(texts, kind="char", unknown="replace", **SPECIAL)
    config = llama_ext.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=spread,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return llama_ext.LlamaForCausalLM(config, tokenizer, seed=seed)
