"""`llama-ext info`: what this build sees of the machine, and what a model is."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llama_ext.cli.common import add_model_options, shown_bytes, write

if TYPE_CHECKING:
    from llama_ext.cli.common import Commands

__all__ = ["add_to", "describe_model", "run"]

_DESCRIPTION = """\
What this build sees of the machine, and what it chose and why. With --model,
what that model is: its files are checked, its weights are not loaded."""

_EPILOG = """
examples:
  llama-ext info
  llama-ext info --model demo
  llama-ext info --model demo --json
"""


def add_to(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "info",
        usage="llama-ext info [OPTIONS]",
        help="what was chosen on this machine, and what a model is",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser, required=False)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from llama_ext.system_info import info

    machine = info()
    model = None if args.model is None else describe_model(args.model)
    if args.json:
        record = asdict(machine)
        record["build"] = dict(machine.build)
        if model is not None:
            record["model"] = model
        write(json.dumps(record, ensure_ascii=False) + "\n")
        return 0
    write(f"{machine}\n")
    if model is not None:
        write(f"\n{_shown(args.model, model)}\n")
    return 0


def describe_model(name: str) -> dict[str, Any]:
    """What a model is, from its files.

    Args:
        name: A directory, a GGUF file, "demo" or a Hub id.

    Returns:
        Facts by name, for JSON; of "types", how many tensors and how many numbers.

    Raises:
        FormatError, CheckpointError, UnsupportedError, LimitError: As `LlamaForCausalLM.from_pretrained`.
    """
    from llama_ext.runtime.loading import open_model

    with open_model(name) as files:
        files.check()
        config, tokenizer = files.config, files.tokenizer
        types: dict[str, list[int]] = {}
        for tensor in files.tensors:
            count = types.setdefault(tensor.type, [0, 0])
            count[0] += 1
            count[1] += math.prod(tensor.shape)
        return {
            "path": str(files.path),
            "format": files.format,
            "model_type": config.model_type,
            "parameters": sum(numbers for _, numbers in types.values()),
            "bytes": files.nbytes,
            "dtype": files.stored_dtype,
            "types": dict(sorted(types.items(), key=lambda item: -item[1][1])),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "attention_heads": config.num_attention_heads,
            "key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "vocabulary": config.vocab_size,
            "context": config.max_position_embeddings,
            "rope_type": config.rope_parameters.rope_type,
            "tied_embeddings": config.tie_word_embeddings,
            "kv_cache_numbers_a_token": 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim,
            "tokenizer": None if tokenizer is None else type(tokenizer.backend.model).__name__,
            "tokenizer_size": None if tokenizer is None else len(tokenizer),
            "chat_template": tokenizer is not None and tokenizer.chat_template is not None,
            "generation_defaults": {
                key: value
                for key, value in asdict(files.generation_defaults).items()
                if value is not None and key != "ignored"
            },
            "ignored_generation_defaults": dict(files.generation_defaults.ignored),
        }


def _shown(name: str, model: dict[str, Any]) -> str:
    heads, kv_heads = model["attention_heads"], model["key_value_heads"]
    shared = "" if heads == kv_heads else f" sharing {kv_heads} key/value heads"
    tied = ", embeddings tied" if model["tied_embeddings"] else ""
    shape = (
        f"{model['layers']} layers, width {model['hidden_size']:,}, feed-forward {model['intermediate_size']:,}, "
        f"{heads} heads of {model['head_dim']}{shared}{tied}"
    )
    # As the model decides on kv_dtype.
    wide = 4 if model["dtype"] in ("float64", "float32", "float16", "F32", "F16") else 2
    cache = wide * model["kv_cache_numbers_a_token"]
    tokenizer = "none: token ids only"
    if model["tokenizer"] is not None:
        tokenizer = f"{model['tokenizer']}, {model['tokenizer_size']:,} tokens"
    sampling = ", ".join(f"{key}={value}" for key, value in model["generation_defaults"].items())
    rows = [
        ("files", model["path"]),
        ("format", model["format"]),
        ("parameters", f"{model['parameters']:,} in {shown_bytes(model['bytes'])} of {model['dtype']}"),
        ("shape", shape),
        ("vocabulary", f"{model['vocabulary']:,}"),
        ("context", f"{model['context']:,} tokens, RoPE {model['rope_type']}"),
        ("KV cache", f"{shown_bytes(cache)} a token, {shown_bytes(cache * model['context'])} for the whole context"),
        ("tokenizer", tokenizer),
        ("chat template", "yes" if model["chat_template"] else "no"),
        ("generation", sampling or "greedy, 256 new tokens: the model says nothing else"),
    ]
    if model["ignored_generation_defaults"]:
        rows.append(("not done here", ", ".join(model["ignored_generation_defaults"])))
    if len(model["types"]) > 1:
        listed = "; ".join(f"{name} {numbers:,} in {count}" for name, (count, numbers) in model["types"].items())
        rows.insert(3, ("types", f"{listed} tensors"))
    width = max(len(key) for key, _ in rows)
    return "\n".join([f"model {name}", *(f"  {key:<{width}}  {value}" for key, value in rows)])
