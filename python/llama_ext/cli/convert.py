"""`llama-ext convert`: a model in another format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llama_ext.cli.common import MODEL_HELP, shown_bytes, write
from llama_ext.cli.outputs import add_overwrite_option, check_directory, check_file

if TYPE_CHECKING:
    from llama_ext.cli.common import Commands

__all__ = ["add_to", "run"]

_DESCRIPTION = """\
Writes a model in another format, with its tokenizer and chat template: as a GGUF
file when OUT ends in .gguf, else as a directory of safetensors."""

_EPILOG = """
examples:
  llama-ext convert path/to/llama llama-q8_0.gguf --dtype q8_0
  llama-ext convert llama-q8_0.gguf llama-again --dtype bfloat16
"""


def add_to(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "convert",
        usage="llama-ext convert MODEL OUT [OPTIONS]",
        help="write a model as a GGUF file, or one as safetensors",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="a file that ends in .gguf, or a directory")
    parser.add_argument(
        "--dtype",
        metavar="float32|float16|bfloat16|q8_0|q4_0",
        help="of the matrices; the last two are for GGUF (default: as they are, quantised ones as float32)",
    )
    add_overwrite_option(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from llama_ext.cli.info import describe_model
    from llama_ext.runtime.conversion import convert, names_gguf

    check = check_file if names_gguf(Path(args.out)) else check_directory
    check(args.out, args.overwrite)
    out = convert(args.model, args.out, dtype=args.dtype)
    written = describe_model(str(out))
    size = sum(path.stat().st_size for path in out.rglob("*")) if out.is_dir() else Path(out).stat().st_size
    types = ", ".join(f"{count} x {name}" for name, (count, _) in written["types"].items())
    write(f"wrote {out}: {shown_bytes(size)}; tensors: {types}\n")
    return 0
