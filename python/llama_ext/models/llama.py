"""Llama: the names of a Hugging Face checkpoint's tensors, the core's slots they go to, and the core's config.

A checkpoint of a tied model may still hold lm_head.weight, a copy of the embedding: it is tolerated and not loaded,
and `check_tied_head` proves that it is a copy. Old checkpoints hold `rotary_emb.inv_freq` buffers: they are ignored,
because the frequencies follow from the config.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llama_ext.errors import CheckpointError
from llama_ext.io.safetensors_file import TensorInfo
from llama_ext.models.config import LlamaConfig

__all__ = [
    "CLASSIFIER_HEAD",
    "HEAD_MODULES",
    "TensorSpec",
    "adaptable_modules",
    "check_tied_head",
    "core_config",
    "match",
    "tensor_specs",
]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Of a LlamaForSequenceClassification: (labels, C), in the core's slot "head", whether or not the config says that heads are tied.
CLASSIFIER_HEAD = "score.weight"
# Linear modules, or tables, that are no part of a layer.
HEAD_MODULES = ("model.embed_tokens", "lm_head", "score")

# (Hugging Face name, slot, shape) with the dimensions of docs/architecture.md; Q = H * D, KV = K * D.
_BEFORE = ((EMBEDDING, "embedding", "V C"),)
_LAYER = (
    ("input_layernorm.weight", "attention_norm", "C"),
    ("self_attn.q_proj.weight", "q", "Q C"),
    ("self_attn.k_proj.weight", "k", "KV C"),
    ("self_attn.v_proj.weight", "v", "KV C"),
    ("self_attn.o_proj.weight", "o", "C Q"),
    ("post_attention_layernorm.weight", "feed_forward_norm", "C"),
    ("mlp.gate_proj.weight", "gate", "F C"),
    ("mlp.up_proj.weight", "up", "F C"),
    ("mlp.down_proj.weight", "down", "C F"),
)
_ATTENTION_BIAS = (
    ("self_attn.q_proj.bias", "q.bias", "Q"),
    ("self_attn.k_proj.bias", "k.bias", "KV"),
    ("self_attn.v_proj.bias", "v.bias", "KV"),
    ("self_attn.o_proj.bias", "o.bias", "C"),
)
_MLP_BIAS = (
    ("mlp.gate_proj.bias", "gate.bias", "F"),
    ("mlp.up_proj.bias", "up.bias", "F"),
    ("mlp.down_proj.bias", "down.bias", "C"),
)
_AFTER = (("model.norm.weight", "final_norm", "C"),)
_UNTIED = ((HEAD, "head", "V C"),)

_IGNORED = re.compile(r"(?:model\.)?(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

# What the name of an unexpected tensor says about where it is from, and what to do about that.
_HINTS = (
    (
        r"(^|\.)lora_[AB]\.|base_model\.model\.",
        "This is a PEFT adapter: load its base, and then the adapter with load_adapter.",
    ),
    (
        r"\.(qweight|qzeros|scales|g_idx|weight_scale|weight_scale_inv|weight_packed|absmax|SCB)(\.|$)",
        "These are quantised weights: load the original float checkpoint.",
    ),
    (
        r"^(embed_tokens|layers\.\d+|norm)\.",
        "These names lack 'model.': it was saved from LlamaModel; save LlamaForCausalLM.",
    ),
    (r"^score\.", "This is a classifier: load it with LlamaForSequenceClassification."),
    (r"self_attn\..*\.bias$", "Does config.json lack attention_bias: true?"),
    (r"mlp\..*\.bias$", "Does config.json lack mlp_bias: true?"),
)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint and the place of it in the core.

    Args:
        name: Hugging Face's name.
        slot: The core's name, csrc/model/weights.h.
        shape: Its shape.
    """

    name: str
    slot: str
    shape: tuple[int, ...]


class Readable(Protocol):
    """What `check_tied_head` needs of a checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> np.ndarray[Any, Any]: ...


def tensor_specs(config: LlamaConfig, *, with_head: bool = True) -> Iterator[TensorSpec]:
    """The tensors of a checkpoint, from the embedding to the head: of a classifier that is `CLASSIFIER_HEAD`.

    Args:
        config: The model.
        with_head: Whether with the head. A tied language model has none either way.

    Yields:
        Each tensor once, in the order that the model uses them.
    """
    size = {
        "V": config.vocab_size,
        "C": config.hidden_size,
        "F": config.intermediate_size,
        "Q": config.num_attention_heads * config.head_dim,
        "KV": config.num_key_value_heads * config.head_dim,
    }

    def specs(rows: tuple[tuple[str, str, str], ...], name: str = "", slot: str = "") -> Iterator[TensorSpec]:
        for row_name, row_slot, dimensions in rows:
            yield TensorSpec(name + row_name, slot + row_slot, tuple(size[key] for key in dimensions.split()))

    yield from specs(_BEFORE)
    layer_rows = _LAYER + (_ATTENTION_BIAS if config.attention_bias else ()) + (_MLP_BIAS if config.mlp_bias else ())
    for layer in range(config.num_hidden_layers):
        yield from specs(layer_rows, f"model.layers.{layer}.", f"layers.{layer}.")
    yield from specs(_AFTER)
    if with_head and config.is_classifier:
        yield TensorSpec(CLASSIFIER_HEAD, "head", (config.num_labels, config.hidden_size))
    elif with_head and not config.tie_word_embeddings:
        yield from specs(_UNTIED)


def adaptable_modules(config: LlamaConfig) -> dict[str, tuple[str, int]]:
    """The matrices that an adapter may change.

    Args:
        config: The model.

    Returns:
        By Hugging Face's name of the module, in the order of the model: the core's slot and the index of the layer.
    """
    rows = [(name, slot) for name, slot, dimensions in _LAYER if len(dimensions.split()) == 2]
    return {
        f"model.layers.{layer}.{name.removesuffix('.weight')}": (f"layers.{layer}.{slot}", layer)
        for layer in range(config.num_hidden_layers)
        for name, slot in rows
    }


def match(
    config: LlamaConfig,
    available: Mapping[str, TensorInfo],
    *,
    with_head: bool = True,
    also: Mapping[str, tuple[int, ...]] | None = None,
    path: str | None = None,
) -> list[TensorSpec]:
    """Pairs a checkpoint's tensors with the core's slots, or says why they do not fit.

    Args:
        config: The model.
        available: The checkpoint's tensors.
        with_head: Whether its head is wanted.
        also: Tensors that the caller loads by itself, with their shapes; they have to be there.
        path: The checkpoint, for messages.

    Returns:
        What to load, in the order of `available`, which is that of the files. In a tied checkpoint that holds the
        shared table as lm_head.weight only, that is the name of the embedding's spec.

    Raises:
        CheckpointError: A tensor is missing, unexpected, or of another shape.
    """
    specs = {spec.name: spec for spec in tensor_specs(config, with_head=with_head)}
    extras: dict[str, tuple[int, ...]] = dict(also or {})
    if config.tie_word_embeddings and not config.is_classifier and HEAD in available:
        if EMBEDDING in available:
            extras[HEAD] = specs[EMBEDDING].shape
        else:  # one of two names of shared storage survives in a file; which one is the writer's choice
            table = specs.pop(EMBEDDING)
            specs[HEAD] = TensorSpec(HEAD, table.slot, table.shape)

    shapes = {**{name: spec.shape for name, spec in specs.items()}, **extras}
    missing = [name for name in shapes if name not in available]
    unexpected = [name for name in available if name not in shapes and not _IGNORED.fullmatch(name)]
    if missing or unexpected:
        _refuse(missing, unexpected, path)
    for name, shape in shapes.items():
        info = available.get(name)
        if info is not None and info.shape != shape:
            raise CheckpointError(
                f"tensor {name} must have shape {shape} by config.json, got {info.shape}. "
                "Is config.json of another model?",
                path=path,
                field=name,
                expected=shape,
                got=info.shape,
            )
    return [specs[name] for name in available if name in specs]


def _refuse(missing: list[str], unexpected: list[str], path: str | None) -> None:
    parts = []
    if missing:
        parts.append(f"{_count(missing)} missing: {_first(missing)}.")
    if unexpected:
        parts.append(f"{_count(unexpected)} unexpected: {_first(unexpected)}.")
    hints = [text for pattern, text in _HINTS if any(re.search(pattern, name) for name in unexpected)]
    if CLASSIFIER_HEAD in missing and HEAD in unexpected:
        hints.insert(0, "This is a language model: config.json's architectures should say LlamaForCausalLM.")
    if HEAD in missing:
        hints.append("If the model shares its embedding with its head, config.json must say tie_word_embeddings: true.")
    advice = " ".join(hints[:2]) or "Is config.json of another model, or a shard's download incomplete?"
    raise CheckpointError(
        f"the tensors are not those of the model in config.json. {' '.join(parts)} {advice}",
        path=path,
        field=(missing or unexpected)[0],
        expected="missing: " + _first(missing) if missing else None,
        got="unexpected: " + _first(unexpected) if unexpected else None,
    )


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _first(names: list[str], most: int = 4) -> str:
    listed = ", ".join(name if len(name) <= 120 else name[:117] + "..." for name in names[:most])
    return listed if len(names) <= most else f"{listed}, ... ({len(names)} in all)"


def check_tied_head(config: LlamaConfig, checkpoint: Readable, *, path: str | None = None) -> None:
    """Checks that a tied checkpoint's own lm_head.weight, when it has one, is the embedding.

    transformers 4 drops such a head and 5 keeps it: when they differ, the config is wrong about being tied.

    Args:
        config: The model.
        checkpoint: An open checkpoint that `match` accepted.
        path: The checkpoint, for messages.

    Raises:
        CheckpointError: It is another matrix.
    """
    tensors = checkpoint.tensors
    if not config.tie_word_embeddings or config.is_classifier or HEAD not in tensors or EMBEDDING not in tensors:
        return
    embedding, head = checkpoint.read(EMBEDDING), checkpoint.read(HEAD)
    rows = max(1, (1 << 22) // max(1, embedding.itemsize * config.hidden_size))  # a comparison's temporaries stay small
    same = embedding.dtype == head.dtype and all(
        np.array_equal(embedding[row : row + rows].view(np.uint8), head[row : row + rows].view(np.uint8))
        for row in range(0, config.vocab_size, rows)
    )
    if not same:
        raise CheckpointError(
            f"config.json says tie_word_embeddings: true, but {HEAD} differs from {EMBEDDING}. "
            "Set tie_word_embeddings to false, or delete the tensor that is not meant.",
            path=path,
            field=HEAD,
        )


def core_config(config: LlamaConfig) -> dict[str, Any]:
    """The compiled core's config, every default resolved.

    Args:
        config: The model.

    Returns:
        The fields of csrc/model/config.h, and under "rope" those of RopeConfig in csrc/ops/rope.h.
    """
    rope = config.rope_parameters

    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    return {
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "ffn_width": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "context": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "tied_head": config.tie_word_embeddings and not config.is_classifier,
        **({"labels": config.num_labels} if config.is_classifier else {}),
        "attention_bias": config.attention_bias,
        "ffn_bias": config.mlp_bias,
        "rope": {
            "kind": rope.rope_type,
            "head_dim": config.head_dim,
            "theta": rope.rope_theta,
            "factor": given(rope.factor, 1.0),
            "low_freq_factor": given(rope.low_freq_factor, 1.0),
            "high_freq_factor": given(rope.high_freq_factor, 4.0),
            "original_context": given(rope.original_max_position_embeddings, 0),
            "attention_factor": rope.effective_attention_factor,
            "beta_fast": given(rope.beta_fast, 32.0),
            "beta_slow": given(rope.beta_slow, 1.0),
            "truncate": given(rope.truncate, True),
        },
    }
