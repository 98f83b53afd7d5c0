"""The small files beside a graph: what onnxruntime-genai, optimum, transformers.js and OpenVINO look for.

config.json, generation_config.json                 of the model, as Hugging Face's
tokenizer.json, tokenizer_config.json, chat_template.jinja
genai_config.json                                   onnxruntime-genai's
onnx/model.onnx, onnx/model.onnx_data               the graph and its weights
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_ext.io.atomic import atomic_write
from llama_ext.models.quantization_config import KEY as QUANTIZATION_KEY
from llama_ext.onnx.weights import Weights

__all__ = ["GRAPH_FOLDER", "config_json", "eos_token_ids", "write_small_files"]

GRAPH_FOLDER = "onnx"
_TRANSFORMERS_JS = "transformers.js_config"
_EXTERNAL = "use_external_data_format"

# Tokens that end a turn, by the text of the special token. A config often names only one of the tokens that end a generation.
_END_OF_TURN = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
)


def eos_token_ids(weights: Weights) -> list[int]:
    """Every token that ends a generation: those of generation_config.json and config.json, the tokenizer's, and special tokens
    that end a turn.

    Args:
        weights: The model.

    Returns:
        Ids below the vocabulary's size, in that order, each once.
    """
    config, tokenizer = weights.config, weights.tokenizer
    found = [*(weights.generation_defaults.eos_token_id or ()), *config.eos_token_ids]
    if tokenizer is not None:
        # The config's default knows nothing of the tokenizer: a plain token, such as a character, ends nothing.
        named = weights.generation_defaults.eos_token_id or ()
        found = [token for token in found if token in named or token in tokenizer.special_ids]
        if tokenizer.eos_token_id is not None:
            found.append(tokenizer.eos_token_id)
        for text in _END_OF_TURN:
            token = tokenizer.backend.token_to_id(text)
            if token is not None and token in tokenizer.special_ids:
                found.append(token)
    return [token for token in dict.fromkeys(found) if token < config.vocab_size]


def pad_token_id(weights: Weights, ends: Sequence[int]) -> int:
    """One number, as genai wants it: the config's, the tokenizer's, the first end, or 0."""
    tokenizer = weights.tokenizer
    for found in (
        weights.config.pad_token_id,
        weights.generation_defaults.pad_token_id,
        None if tokenizer is None else tokenizer.pad_token_id,
        *ends[:1],
    ):
        if found is not None and found < weights.config.vocab_size:
            return found
    return 0


def bos_token_id(weights: Weights) -> int | None:
    """The token that begins a text: the tokenizer's, else the config's."""
    tokenizer = weights.tokenizer
    if tokenizer is not None and tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    return weights.config.bos_token_id


def config_json(weights: Weights, dtype: str, external: Mapping[str, int]) -> dict[str, Any]:
    """config.json: the model's, without what speaks of weights that are not here.

    Args:
        weights: The model.
        dtype: Of the exported activations.
        external: By graph file, how many data files it has: what transformers.js fetches.
    """
    # Not checked again: it may have been read with larger limits.
    config = copy.copy(weights.config)
    object.__setattr__(config, "dtype", dtype)
    values = config.to_dict()
    values.pop(QUANTIZATION_KEY, None)
    values[_TRANSFORMERS_JS] = {**values.get(_TRANSFORMERS_JS, {}), _EXTERNAL: dict(sorted(external.items()))}
    return values


def _generation_config(weights: Weights, ends: Sequence[int]) -> dict[str, Any]:
    values = dataclasses.asdict(weights.generation_defaults)
    values.update(values.pop("ignored"))
    said = {name: value for name, value in values.items() if value is not None}
    said["bos_token_id"] = said.get("bos_token_id", bos_token_id(weights))
    said["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends) or None
    said["pad_token_id"] = pad_token_id(weights, ends)
    return {name: value for name, value in said.items() if value is not None}


def _genai_config(weights: Weights, ends: Sequence[int], graph: str, *, shares_cache: bool) -> dict[str, Any]:
    config, defaults = weights.config, weights.generation_defaults
    first = {0: None, 1: ends[0] if ends else None}.get(len(ends), list(ends))
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    past = {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")}
    present = {f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")}
    model: dict[str, Any] = {
        "type": "llama",
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "bos_token_id": bos_token_id(weights),
        "eos_token_id": first,
        "pad_token_id": pad_token_id(weights, ends),
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": f"{GRAPH_FOLDER}/{graph}",
            "head_size": config.head_dim,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "inputs": {**inputs, **past},
            "outputs": {"logits": "logits", **present},
        },
    }

    def said(value: Any, default: Any) -> Any:
        return default if value is None else value

    search = {
        "do_sample": said(defaults.do_sample, False),
        "early_stopping": True,
        "length_penalty": said(defaults.length_penalty, 1.0),
        "max_length": config.max_position_embeddings,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": shares_cache,
        "repetition_penalty": said(defaults.repetition_penalty, 1.0),
        "temperature": said(defaults.temperature, 1.0),
        "top_k": said(defaults.top_k, 50),
        "top_p": said(defaults.top_p, 1.0),
    }
    return {"model": {key: value for key, value in model.items() if value is not None}, "search": search}


def write_small_files(
    folder: Path, weights: Weights, *, graph: str, dtype: str, external: Mapping[str, int], shares_cache: bool
) -> None:
    """Writes everything but the graph and its weights.

    Args:
        folder: The directory; it exists.
        weights: The model.
        graph: The name of the graph's file.
        dtype: Of the exported activations.
        external: By graph file of this directory, how many data files it has.
        shares_cache: Whether genai may keep past and present keys in one buffer.

    Warns:
        UserWarning: optimum would compute another head dimension.
    """
    config = weights.config
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        warnings.warn(
            f"optimum computes the head dimension as hidden_size / num_attention_heads, "
            f"{config.hidden_size / config.num_attention_heads:g}; this model's is {config.head_dim}, so its ORTModelForCausalLM "
            "cannot make the first cache for it. onnxruntime, onnxruntime-genai, transformers.js and OpenVINO can",
            UserWarning,
            stacklevel=4,
        )
    _write_json(folder / "config.json", config_json(weights, dtype, external))
    if weights.labels is None:
        ends = eos_token_ids(weights)
        _write_json(folder / "generation_config.json", _generation_config(weights, ends))
        _write_json(folder / "genai_config.json", _genai_config(weights, ends, graph, shares_cache=shares_cache))
    if weights.tokenizer is not None:
        weights.tokenizer.save_pretrained(folder)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))
