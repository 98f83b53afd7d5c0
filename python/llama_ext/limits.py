"""The largest numbers this package accepts from a file, so that a hostile file costs little before it is refused."""

from __future__ import annotations

import dataclasses

from llama_ext.errors import OptionError

__all__ = ["DEFAULT_LIMITS", "Limits", "check_limits"]

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """Upper bounds on what a file may ask for; pass a larger one to load a file you trust.

    A limit is checked beside the bounds of the file itself and never replaces them: with any `Limits`, a tensor that
    reaches beyond its file is refused.

    Args:
        safetensors_header_bytes: JSON header of one safetensors file. The format's own bound is the same number.
        tensors: Tensors of one checkpoint.
        metadata_entries: Entries of a file's metadata.
        string_bytes: One string of a file's metadata.
        array_elements: Elements of all arrays of a file's metadata together; a string counts as two, an inner array as 64.
        gguf_header_bytes: What precedes the tensors of one GGUF file: metadata with the vocabulary, tensor names.
        shards: Files of one checkpoint.
        json_depth: Nesting of objects and arrays in a JSON file.
        config_json_bytes: config.json, generation_config.json and other small JSON files.
        index_json_bytes: model.safetensors.index.json.
        tokenizer_json_bytes: tokenizer.json.
        layers: Transformer blocks.
        vocabulary: Token ids.
        width: Width of any layer: model, feed-forward, all heads together.
        positions: Positions of the context.

    Raises:
        OptionError: A limit is not a positive integer.
    """

    safetensors_header_bytes: int = 100_000_000
    tensors: int = 65_536
    metadata_entries: int = 65_536
    string_bytes: int = 16 * _MIB
    array_elements: int = 4 * _MIB
    gguf_header_bytes: int = 100_000_000
    shards: int = 4_096
    json_depth: int = 64
    config_json_bytes: int = 1 * _MIB
    index_json_bytes: int = 16 * _MIB
    tokenizer_json_bytes: int = 64 * _MIB
    layers: int = 1_024
    vocabulary: int = 1 * _MIB
    width: int = 131_072
    positions: int = 1 << 30

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"Limits.{field.name} must be a positive integer, got {value!r}.")


DEFAULT_LIMITS = Limits()


def check_limits(limits: object) -> None:
    """Refuses what a caller gives for `limits` and is none.

    Raises:
        OptionError: It is no `Limits`.
    """
    if not isinstance(limits, Limits):
        raise OptionError(f"limits must be a Limits, such as Limits(vocabulary=2_000_000), got {type(limits).__name__}")
