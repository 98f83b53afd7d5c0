"""`llama-ext verify-onnx`: proves that an exported graph computes the same model, or says where it does not."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llama_ext.cli.common import MODEL_HELP, write
from llama_ext.cli.outputs import add_overwrite_option, check_file
from llama_ext.cli.text_input import read_text
from llama_ext.errors import OptionError

if TYPE_CHECKING:
    from llama_ext.cli.common import Commands

__all__ = ["add_to", "run"]

_DESCRIPTION = """\
Compares an exported ONNX graph in onnxruntime, the native model, and float64
arithmetic on the same stored weights: logits, greedy generation through the KV
cache, chunks, padded batches, the end of the context. What fewer bits for the
weights cost is told apart. Where onnxruntime differs, the first layer and
operation are named. Exits with 0 only when everything is within its gates, and
all of --runtimes were run."""

_EPILOG = """
examples:
  llama-ext verify-onnx path/to/llama exported
  llama-ext verify-onnx path/to/llama exported --variant q4 --steps 128
  llama-ext verify-onnx path/to/llama exported --text README.md --json report.json

exit codes:
  0 passed             1 failed             others as of `llama-ext --help`
"""


def add_to(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "verify-onnx",
        usage="llama-ext verify-onnx MODEL OUT_DIR [OPTIONS]",
        help="prove that an exported ONNX graph is the same model",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT_DIR", help="what `llama-ext export-onnx` wrote")
    parser.add_argument(
        "--variant", metavar="NAME", help="which graph of several: model, fp16, quantized, q4 (default: the last one)"
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="a text in UTF-8, no longer than the context; - is standard input; may be repeated (default: three short ones)",
    )
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="tokens to generate (default: 64)")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="default: LLAMA_EXT_NUM_THREADS, or the physical cores this process may use",
    )
    parser.add_argument(
        "--runtimes",
        nargs="+",
        default=[],
        choices=("onnxruntime-genai", "openvino"),
        metavar="NAME",
        help="others to compare as well, which have to be installed: onnxruntime-genai, openvino",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there as well, as JSON; - prints it instead")
    add_overwrite_option(parser)
    parser.add_argument(
        "--no-record",
        action="store_true",
        help="leave the graph as it is: else the report's hash goes into its metadata",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _text(path: str) -> str:
    text = read_text(path)
    if not text.strip():
        name = "standard input" if path == "-" else path
        raise OptionError(
            f"--text {name} is empty: nothing can be compared on it. Leave --text out for three short ones"
        )
    return text


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from llama_ext.io.atomic import atomic_write
    from llama_ext.onnx.verification import verify

    if args.text is not None and args.text.count("-") > 1:
        raise OptionError("--text - is standard input, which can be read once: name files for the others")
    to_file = args.json is not None and args.json != "-"
    if to_file:
        check_file(args.json, args.overwrite)
    report = verify(
        args.model,
        args.out,
        texts=None if args.text is None else [_text(path) for path in args.text],
        steps=args.steps,
        variant=args.variant,
        threads=args.threads,
        runtimes=args.runtimes,
        record=not args.no_record,
    )
    if args.json == "-":
        write(report.to_json())
    else:
        if to_file:
            with atomic_write(args.json, follow_links=True) as file:
                file.write(report.to_json().encode("utf-8"))
        write(f"{report}\n")
    return 0 if report.passed else 1
