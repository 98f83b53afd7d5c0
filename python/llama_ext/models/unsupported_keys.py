"""Config keys that change a model's arithmetic and that are not supported: loading it anyway would be silently wrong.

Every other unknown key is kept and written back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from llama_ext._options import shown
from llama_ext.models.fields import FieldReader
from llama_ext.models.quantization_config import is_ours

__all__ = ["refuse_unimplemented"]


def _off(value: Any) -> bool:
    return not value


def _off_or_ours(value: Any) -> bool:
    return not value or is_ours(value)


def _one(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 1


def _at_most_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and value <= 1


def _on(value: Any) -> bool:
    return value is True


def _rotary(value: Any) -> bool:
    return value in ("absolute", "rope", "rotary")  # "absolute" is what transformers writes when nobody asked


def _full_attention(value: Any) -> bool:
    return isinstance(value, list) and all(kind == "full_attention" for kind in value)


# Key -> (which values change nothing, what any other one is). null never changes anything.
_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    # weights that are not plain numbers
    "quantization_config": (_off_or_ours, "quantised weights; load the original float checkpoint"),
    "compression_config": (_off, "compressed weights; load the original float checkpoint"),
    # attention: who sees whom
    "sliding_window": (_off, "sliding-window attention"),
    "layer_types": (_full_attention, "layers of different kinds"),
    "attention_chunk_size": (_off, "chunked attention"),
    "is_causal": (_on, "attention to later tokens"),
    "use_bidirectional_attention": (_off, "attention to later tokens"),
    "is_encoder_decoder": (_off, "an encoder"),
    "add_cross_attention": (_off, "cross-attention"),
    # attention: what is computed
    "attn_logit_softcapping": (_off, "soft-capped attention"),
    "attn_temperature_tuning": (_off, "attention temperature by position"),
    "clip_qkv": (_off, "clipped queries, keys and values"),
    "qk_layernorm": (_off, "normalised queries and keys"),
    "use_qk_norm": (_off, "normalised queries and keys"),
    "pruned_heads": (_off, "layers with pruned heads"),
    "num_key_value_heads_per_layer": (_off, "layers of different shapes"),
    "block_configs": (_off, "layers of different shapes"),
    "per_layer_config": (_off, "layers of different shapes"),
    # positions
    "partial_rotary_factor": (_one, "a rotation of a part of each head"),
    "rotary_pct": (_one, "a rotation of a part of each head"),
    "no_rope_layers": (lambda value: _off(value) or all(_one(item) for item in value), "layers without rotation"),
    "no_rope_layer_interval": (_off, "layers without rotation"),
    "rope_interleaved": (_off, "interleaved rotation; convert the checkpoint to Hugging Face's half-split layout"),
    "rope_interleave": (_off, "interleaved rotation; convert the checkpoint to Hugging Face's half-split layout"),
    "rope_traditional": (_off, "interleaved rotation; convert the checkpoint to Hugging Face's half-split layout"),
    "position_embedding_type": (_rotary, "positions other than rotary ones"),
    "alibi": (_off, "ALiBi positions"),
    # the block and the scales around it
    "parallel_attn": (_off, "parallel attention and feed-forward"),
    "use_parallel_residual": (_off, "parallel attention and feed-forward"),
    "embedding_multiplier": (_one, "scaled embeddings"),
    "residual_multiplier": (_one, "scaled residuals"),
    "logits_scaling": (_one, "scaled logits"),
    "logit_scale": (_one, "scaled logits"),
    "scale_emb": (_one, "scaled embeddings"),
    "final_logit_softcapping": (_off, "soft-capped logits"),
    "num_experts": (_at_most_one, "a mixture of experts"),
    "num_local_experts": (_at_most_one, "a mixture of experts"),
    "n_routed_experts": (_at_most_one, "a mixture of experts"),
}


def refuse_unimplemented(reader: FieldReader, head_dim: int) -> None:
    """Raises for a config whose arithmetic is not the one implemented here.

    Args:
        reader: The whole config.
        head_dim: D, which decides whether a scale of the attention is the usual one.

    Raises:
        UnsupportedError: A key names something that is not supported.
    """
    for name, (harmless, meaning) in _KEYS.items():
        value = reader.values.get(name)
        if value is None or _switched_off(name, reader.values):
            continue
        if not _holds(harmless, value):
            detail = f": method {shown(value['quant_method'])}" if _has(value, "quant_method") else ""
            reader.refuse(
                f"{name} = {shown(value)} is not supported{detail}: {meaning}. The result would be wrong, "
                "so the model is not loaded."
            )
    usual = 1.0 / math.sqrt(head_dim)
    for name, expected in (("attention_multiplier", usual), ("query_pre_attn_scalar", float(head_dim))):
        value = reader.optional_number(name)
        if value is not None and not math.isclose(value, expected, rel_tol=1e-6):
            reader.refuse(f"{name} = {value:g} is not supported: for head_dim {head_dim} it has to be {expected:g}.")


def _holds(harmless: Callable[[Any], bool], value: Any) -> bool:
    try:
        return harmless(value)
    except TypeError:  # of a type that the test is not made for: not known to be harmless
        return False


def _switched_off(name: str, values: Mapping[str, Any]) -> bool:
    """Qwen2's spelling: the window is there, and unused."""
    return name == "sliding_window" and values.get("use_sliding_window") is False


def _has(value: Any, key: str) -> bool:
    return isinstance(value, Mapping) and key in value
