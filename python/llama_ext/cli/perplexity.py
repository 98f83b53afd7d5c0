"""`llama-ext perplexity`: how well a model predicts texts."""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import TYPE_CHECKING

from llama_ext.cli.common import add_model_options, load_model, write
from llama_ext.cli.text_input import read_text
from llama_ext.errors import OptionError

if TYPE_CHECKING:
    from llama_ext.cli.common import Commands

__all__ = ["add_to", "run"]

_DESCRIPTION = """\
How well a model predicts texts: perplexity (the lower, the better), and bits
per byte, which compares models with different tokenizers. Every token but the
first of a text is scored exactly once."""

_EPILOG = """
examples:
  llama-ext generate "ROMEO:" --seed 1 > play.txt
  llama-ext perplexity play.txt
  llama-ext perplexity play.txt --context 128 --stride 32 --json
  echo "To be, or not to be" | llama-ext perplexity -
"""


def add_to(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "perplexity",
        usage="llama-ext perplexity [OPTIONS] FILE...",
        help="how well a model predicts texts",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="texts in UTF-8, each scored by itself; - is standard input"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens that are looked at together (default: the model's context)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from one window to the next; a smaller one gives each token more to look back at, and takes longer "
        "(default: context - 1)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    if args.files.count("-") > 1:
        raise OptionError("standard input (-) can only be read once")
    texts = [read_text(path) for path in args.files]
    for path, text in zip(args.files, texts, strict=True):
        if not text:
            raise OptionError(f"{'standard input' if path == '-' else path} is empty: there is nothing to score")
    model = load_model(args)
    if model.tokenizer is None:
        raise OptionError("this model has no tokenizer, so it cannot read texts")
    started = time.perf_counter()
    found = model.perplexity(texts, stride=args.stride, context=args.context)
    seconds = time.perf_counter() - started
    if args.json:
        record = {
            "perplexity": found.perplexity if math.isfinite(found.perplexity) else None,
            "loss": found.loss,
            "bits_per_byte": found.bits_per_byte,
            "tokens": found.tokens,
            "bytes": found.bytes,
            "seconds": seconds,
            "tokens_per_second": found.tokens / seconds,
            "context": args.context or model.config.max_position_embeddings,
            "dtype": model.dtype,
            "compute": model.compute,
        }
        write(json.dumps(record, allow_nan=False) + "\n")
        return 0
    per_byte = "" if found.bits_per_byte is None else f"bits per byte  {found.bits_per_byte:.4f}\n"
    size = "" if found.bytes is None else f" of {found.bytes:,} bytes"
    write(
        f"perplexity     {found.perplexity:.4f}\n"
        f"loss           {found.loss:.4f} nats a token\n"
        f"{per_byte}"
        f"scored         {found.tokens:,} tokens{size} in {seconds:.2f} s, {found.tokens / seconds:,.0f} tokens/s\n"
    )
    return 0
