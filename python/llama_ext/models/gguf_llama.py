"""Llama in a GGUF file: its hyperparameters as a `LlamaConfig`, its tensors' names, and the order of their rows.

GGUF's "llama" is any model of this arithmetic (Llama 1 to 3, Mistral, SmolLM, Yi, TinyLlama, ...). Two things differ from
Hugging Face's layout. The rows of the query and key projections are interleaved for a rotation of neighbouring pairs:
row 2i + j of a head is Hugging Face's row j D/2 + i. And llama3's scaling is a tensor of divisors, one for each
frequency, instead of its four parameters: see `gguf_rope`.

Source: ggml, `docs/gguf.md`; llama.cpp, `gguf-py/gguf/constants.py` (keys) and `conversion` (which of them mean what).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext._options import shown
from llama_ext.errors import CheckpointError, UnsupportedError
from llama_ext.io.gguf_file import GgufTensor
from llama_ext.io.gguf_types import BY_NAME, GgmlType
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.models.config import LlamaConfig
from llama_ext.models.fields import LEAST_EPS, FieldReader
from llama_ext.models.gguf_rope import read_gguf_rope, rope_metadata
from llama_ext.models.llama import tensor_specs

__all__ = [
    "ARCHITECTURE",
    "ENDS_KEY",
    "GgufSpec",
    "config_from_gguf",
    "config_to_gguf",
    "gguf_tensor_specs",
    "half_split_rows",
    "interleaved_rows",
    "match_gguf",
    "stored_type",
]

ARCHITECTURE = "llama"
# Our own: all ids that end a text, where GGUF's keys would say others.
ENDS_KEY = "llama_ext.eos_token_ids"
EMBEDDING = "token_embd.weight"
HEAD = "output.weight"

# Hugging Face's part of a name -> GGUF's.
_PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_IGNORED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")
# Keys that change the arithmetic -> (values that change nothing, what another one is).
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "expert_count": ((0,), "a mixture of experts"),
    "attention.clamp_kqv": ((0,), "clipped queries, keys and values"),
    "attention.max_alibi_bias": ((0,), "ALiBi positions"),
    "attention.causal": ((True,), "attention to later tokens"),
    "attention.q_lora_rank": ((0,), "compressed attention"),
    "attention.kv_lora_rank": ((0,), "compressed attention"),
    "attention.temperature_length": ((0,), "attention temperature by position"),
    "attn_logit_softcapping": ((0,), "soft-capped attention"),
    "final_logit_softcapping": ((0,), "soft-capped logits"),
    "logit_scale": ((0, 1), "scaled logits"),
    "embedding_scale": ((0, 1), "scaled embeddings"),
    "residual_scale": ((0, 1), "scaled residuals"),
    "use_parallel_residual": ((False,), "parallel attention and feed-forward"),
    "nextn_predict_layers": ((0,), "layers that predict further tokens"),
}


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, GgufTensor],
    *,
    path: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> LlamaConfig:
    """The config of the model in a GGUF file.

    Args:
        metadata: Of the file.
        tensors: Of the file: they decide the vocabulary's size, whether the head is tied, and whether there are biases.
        path: The file, for messages.
        limits: The bounds.

    Returns:
        The config, as if it came from config.json.

    Raises:
        CheckpointError: There is no embedding.
        FormatError: A value is missing, of the wrong type, out of range, or contradicts another one.
        LimitError: A value is beyond the limits.
        UnsupportedError: Another architecture, a part of a split file, an adapter, or a key whose arithmetic is not
            implemented; the message names it.
    """
    general = FieldReader(metadata, path=path, limits=limits)
    _check_kind(general)
    prefix = f"{ARCHITECTURE}."
    own = {key.removeprefix(prefix): _scalar(value) for key, value in metadata.items() if key.startswith(prefix)}
    reader = general.nested(own, prefix)
    context = _required(reader, "context_length", "positions")
    _refuse_unimplemented(reader, context)
    if EMBEDDING not in tensors:
        raise CheckpointError(
            f"there is no tensor {EMBEDDING}. A file of a vocabulary only, or of another kind of model?",
            path=path,
            field=EMBEDDING,
        )
    heads = _required(reader, "attention.head_count", "width")
    width = _required(reader, "embedding_length", "width")
    head_dim = reader.optional_integer("attention.key_length", limit="width")
    if head_dim is None:
        if width % heads:
            reader.fail("embedding_length", f"a multiple of {prefix}attention.head_count, {heads}", width)
        head_dim = width // heads
    for name in ("attention.value_length", "rope.dimension_count"):
        if (reader.optional_integer(name) or head_dim) != head_dim:
            reader.refuse(
                f"{prefix}{name} = {shown(own[name])} is not supported: it has to be {head_dim}, as the keys' length."
            )
    scale = reader.optional_number("attention.scale")
    if scale and not math.isclose(scale, 1 / math.sqrt(head_dim), rel_tol=1e-6):
        reader.refuse(f"{prefix}attention.scale = {scale:g} is not supported: for a head of {head_dim} it is 1 / sqrt.")
    values: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tensors[EMBEDDING].shape[0] if tensors[EMBEDDING].shape else 1,
        "hidden_size": width,
        "intermediate_size": _required(reader, "feed_forward_length", "width"),
        "num_hidden_layers": _required(reader, "block_count", "layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.optional_integer("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon", 1e-5, above=LEAST_EPS, maximum=1.0),
        "tie_word_embeddings": HEAD not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "rope_parameters": read_gguf_rope(reader, tensors, head_dim, context, path=path),
    }
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        values[name] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    ends = metadata.get(ENDS_KEY)
    if ends is not None:
        ends = ends.tolist() if isinstance(ends, np.ndarray) else ends
        values["eos_token_id"] = None if ends == [] else ends
    return LlamaConfig.from_dict(values, path=path, limits=limits)


def _check_kind(reader: FieldReader) -> None:
    architecture = reader.optional_text("general.architecture")
    if architecture is None:
        reader.fail("general.architecture", f"{ARCHITECTURE!r}", None, "Is it a model at all?")
    if architecture != ARCHITECTURE:
        reader.refuse(f"architecture {shown(architecture)} is not supported. Supported: {ARCHITECTURE}.")
    kind = reader.optional_text("general.type")
    if kind not in (None, "model"):
        reader.refuse(f"general.type {shown(kind)} is not supported: the file has to be a model.")
    parts = reader.optional_integer("split.count", minimum=0)
    if parts is not None and parts > 1:
        reader.refuse(f"one of {parts} parts of a split model (split.count). Join them with llama-gguf-split --merge.")


def _scalar(value: Any) -> Any:
    """A value that may be given per layer, when all layers agree; a float32 as its shortest decimal."""
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        value = value[0].item()
    if isinstance(value, float) and math.isfinite(value) and np.float32(value) == value:
        return float(str(np.float32(value)))
    return value


def _required(reader: FieldReader, name: str, limit: str) -> int:
    value = reader.values.get(name)
    if isinstance(value, (list, np.ndarray)):
        reader.refuse(f"{reader.prefix}{name} = {shown(value)} is not supported: layers of different shapes.")
    result = reader.optional_integer(name, limit=limit)
    if result is None:
        reader.fail(name, "an integer >= 1", None, "The file's metadata lacks it.")
    return result


def _refuse_unimplemented(reader: FieldReader, context: int) -> None:
    for name, (harmless, meaning) in _REFUSED.items():
        value = reader.values.get(name)
        if value is not None and not (isinstance(value, (bool, int, float)) and value in harmless):
            reader.refuse(f"{reader.prefix}{name} = {shown(value)} is not supported: {meaning}.")
    window = reader.optional_integer("attention.sliding_window", minimum=0)
    if window and window < context:
        reader.refuse(f"{reader.prefix}attention.sliding_window = {window} is not supported: sliding-window attention.")


def config_to_gguf(config: LlamaConfig) -> tuple[dict[str, Any], npt.NDArray[np.float32] | None]:
    """The hyperparameters for a GGUF file; the tokenizer's and the file's own entries are not among them.

    Args:
        config: The model.

    Returns:
        The entries, and the tensor of rope factors (D / 2) when the scaling needs one, to be written as
        `gguf_rope.ROPE_FACTORS` in F32.

    Raises:
        UnsupportedError: A classifier, or a rotation that GGUF cannot express.
    """
    if config.is_classifier:
        raise UnsupportedError(
            "a GGUF file holds a language model here, and this is a LlamaForSequenceClassification, whose head (score.weight) has no "
            "place in one. Convert it to a directory, a path that does not end in .gguf, or export it with `llama-ext export-onnx`"
        )
    entries, factors = rope_metadata(config)
    return {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **entries,
    }, factors


@dataclasses.dataclass(frozen=True)
class GgufSpec:
    """One tensor of a GGUF file and the place of it in the core.

    Args:
        gguf_name: GGUF's name.
        name: Hugging Face's name.
        slot: The core's name.
        shape: Its shape, the same in both.
        rope_heads: Heads whose rows are interleaved in the file: of the query and key projections and their biases.
            None: its rows are in Hugging Face's order.
    """

    gguf_name: str
    name: str
    slot: str
    shape: tuple[int, ...]
    rope_heads: int | None


def gguf_tensor_specs(config: LlamaConfig) -> Iterator[GgufSpec]:
    """The tensors of a GGUF file with this model, in the order that the model uses them.

    Args:
        config: The model.

    Yields:
        Each tensor once; of a tied model, the embedding only.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for spec in tensor_specs(config):
        part, suffix = spec.name.rsplit(".", 1)
        layer = _LAYER.fullmatch(part)
        prefix, part = (f"blk.{layer[1]}.", layer[2]) if layer else ("", part)
        yield GgufSpec(
            f"{prefix}{_PARTS[part]}.{suffix}", spec.name, spec.slot, spec.shape, heads.get(part.rsplit(".", 1)[-1])
        )


def match_gguf(config: LlamaConfig, tensors: Mapping[str, GgufTensor], *, path: str | None = None) -> list[GgufSpec]:
    """Pairs a file's tensors with the core's slots, or says why they do not fit.

    Args:
        config: The model, of the same file.
        tensors: Of the file.
        path: The file, for messages.

    Returns:
        What to load, in the order of the file.

    Raises:
        CheckpointError: A tensor is missing, unexpected, or of another shape.
    """
    specs = {spec.gguf_name: spec for spec in gguf_tensor_specs(config)}
    missing = [name for name in specs if name not in tensors]
    unexpected = [name for name in tensors if name not in specs and not _IGNORED.fullmatch(name)]
    if missing or unexpected:
        parts = [
            f"{what}: {_first(names)}." for what, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise CheckpointError(
            f"the tensors are not those of the model that the metadata describes. {' '.join(parts)} "
            "Is it a Llama with changes, or a part of one?",
            path=path,
            field=(missing or unexpected)[0],
        )
    for name, spec in specs.items():
        if tensors[name].shape != spec.shape:
            raise CheckpointError(
                f"tensor {name} must have shape {spec.shape} by the metadata, got {tensors[name].shape}.",
                path=path,
                field=name,
                expected=spec.shape,
                got=tensors[name].shape,
            )
    return [specs[name] for name in tensors if name in specs]


def _first(names: list[str], most: int = 4) -> str:
    listed = ", ".join(name[:120] for name in names[:most])
    return listed if len(names) <= most else f"{listed}, ... ({len(names)} in all)"


def half_split_rows(heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Which of the file's rows of a query or key projection is each of Hugging Face's: `ours = file[rows]`.

    Rows of packed blocks are moved as they are: no block crosses a row.

    Args:
        heads: Heads of the projection.
        head_dim: D, even.

    Returns:
        (heads * D,) row numbers.
    """
    order = np.arange(heads * head_dim, dtype=np.intp)
    return order.reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def interleaved_rows(heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """The inverse of `half_split_rows`: `file = ours[rows]`."""
    order = np.arange(heads * head_dim, dtype=np.intp)
    return order.reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def stored_type(shape: tuple[int, ...], wanted: GgmlType) -> GgmlType:
    """The format to write a tensor in: vectors stay float32, and rows that blocks do not divide become float16.

    Args:
        shape: Of the tensor.
        wanted: The format of the matrices.

    Returns:
        The format of this one, as llama.cpp expects it.
    """
    if len(shape) < 2:
        return BY_NAME["F32"]
    return wanted if shape[-1] % wanted.block == 0 else BY_NAME["F16"]
