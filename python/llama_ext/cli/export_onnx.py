"""`llama-ext export-onnx`: a model as an ONNX graph, proven against the model."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llama_ext.cli.common import MODEL_HELP, report, shown_bytes, write
from llama_ext.cli.outputs import check_directory

if TYPE_CHECKING:
    from llama_ext.cli.common import Commands

__all__ = ["add_to", "run"]

PROFILES = ("portable", "standard", "ort")
DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")

_DESCRIPTION = """\
Writes a model as an ONNX graph with everything its runtimes need, and compares what
onnxruntime makes of it with the model and with float64 arithmetic. The directory
opens in onnxruntime, onnxruntime-genai, optimum, transformers.js and OpenVINO.

profiles:
  standard  operators of opset 23: onnxruntime 1.23 and later, and all of the above
  portable  operators of opset 17 (int4: 21): OpenVINO, TensorRT, old onnxruntime
  ort       onnxruntime's own operators: the fastest on it and on genai"""

_EPILOG = """
examples:
  llama-ext export-onnx path/to/llama llama-onnx
  llama-ext export-onnx path/to/llama llama-onnx --profile ort --dtype int4
  llama-ext export-onnx llama-q4_k_m.gguf llama-onnx          # keeps the file's codes
  llama-ext export-onnx path/to/llama web --dtype float16 --max-file-bytes 2000000000
"""


def add_to(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "export-onnx",
        usage="llama-ext export-onnx MODEL OUT [OPTIONS]",
        help="write a model as an ONNX graph, and prove it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="a directory")
    parser.add_argument("--profile", choices=PROFILES, default="standard", help="default: standard")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: as the model is quantised, else float32)"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(128, 64, 32),
        help="where weights are quantised here: how many share a scale (default: the largest that divides)",
    )
    parser.add_argument("--asymmetric", action="store_true", help="a group has a minimum beside its scale")
    parser.add_argument(
        "--max-file-bytes", type=int, metavar="N", help="of a file with weights; browsers need less than 2 GB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the result with the model")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from llama_ext.onnx import export

    check_directory(args.out, overwrite=True)  # what may be replaced, the export knows
    with _told_when_interrupted(args.out), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = export(
            args.model,
            args.out,
            profile=args.profile,
            dtype=args.dtype,
            group_size=args.group_size,
            symmetric=False if args.asymmetric else None,
            max_file_bytes=args.max_file_bytes,
            overwrite=args.overwrite,
            verify=not args.no_verify,
        )
    for warning in caught:
        report(f"note: {warning.message}")
    if result.report is not None:
        write(f"{result.report}\n")
    write(f"wrote {result.graph}: {shown_bytes(result.nbytes)}, profile {result.profile}, {result.dtype}\n")
    if result.not_verified is not None:
        write(f"not verified: {result.not_verified}\n")
    return 0


@contextlib.contextmanager
def _told_when_interrupted(out: str) -> Iterator[None]:
    """A block of code that exports, which Ctrl-C may end when the graph is whole and nothing is proven yet."""
    before = _graphs(out)
    try:
        yield
    except KeyboardInterrupt:
        # A graph is the last file that is written, and an earlier one goes before the first.
        for path in sorted(path for path, state in _graphs(out).items() if before.get(path) != state):
            report(f"interrupted: {path} is written and not verified: `llama-ext verify-onnx` does that")
        raise


def _graphs(out: str) -> dict[Path, tuple[int, int]]:
    """By graph of an export, which file it is and since when."""
    from llama_ext.onnx.directory import GRAPH_FOLDER

    found = {path: path.stat() for path in Path(out, GRAPH_FOLDER).glob("*.onnx")}
    return {path: (status.st_ino, status.st_mtime_ns) for path, status in found.items()}
