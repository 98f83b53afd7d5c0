"""`llama-ext quantize`: a model with int8 or int4 weights, in a directory that loads at once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llama_ext.cli.common import MODEL_HELP, report, write
from llama_ext.cli.outputs import add_overwrite_option, check_directory
from llama_ext.cli.text_input import read_text

if TYPE_CHECKING:
    from llama_ext.cli.common import Commands

__all__ = ["add_to", "run"]

_DESCRIPTION = """\
Writes a model with int8 or int4 weights: a directory whose file is mapped and used
as it lies, so that it loads at once. Prints how far each matrix is off."""

_EPILOG = """
examples:
  llama-ext quantize path/to/llama llama-int8 --dtype int8
  llama-ext quantize path/to/llama llama-int4 --dtype int4 --group-size 64 --asymmetric
  llama-ext quantize path/to/llama llama-int4 --dtype int4 --calibrate some-text.txt
"""


def add_to(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "quantize",
        usage="llama-ext quantize MODEL OUT --dtype int8|int4 [OPTIONS]",
        help="write a model with int8 or int4 weights",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="a directory")
    parser.add_argument(
        "--dtype", choices=("int8", "int4"), required=True, help="of int4 models, embedding and head are int8"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(128, 64, 32),
        help="weights of a row that share a scale (default: the largest that divides)",
    )
    parser.add_argument("--asymmetric", action="store_true", help="a group has a minimum beside its scale")
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="a text like those the model is for, in UTF-8; what the model makes of it says which weights matter",
    )
    add_overwrite_option(parser)
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="default: LLAMA_EXT_NUM_THREADS, or the physical cores this process may use",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from llama_ext.runtime.loading import open_model
    from llama_ext.runtime.quantization import quantize
    from llama_ext.runtime.weight_types import is_quantized

    check_directory(args.out, args.overwrite)
    calibration = None if args.calibrate is None else read_text(args.calibrate)
    with open_model(args.model) as files:
        if is_quantized(files.stored_types()):
            report(
                f"note: {args.model} is quantised already ({files.stored_dtype}): errors are against its quantised weights, "
                "and come on top of those it has"
            )
    result = quantize(
        args.model,
        args.out,
        args.dtype,
        group_size=args.group_size,
        symmetric=not args.asymmetric,
        calibration=calibration,
        threads=args.threads,
    )
    write((result.to_json() if args.json else f"{result}\nwrote {args.out}") + "\n")
    return 0
