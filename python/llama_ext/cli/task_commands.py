"""What `classify` and `translate` share: arguments of their actions, and the texts and files that these are about."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Protocol

from llama_ext.cli.common import add_compute_option, add_device_options, report, write
from llama_ext.cli.fitting import add_fit_options, lora_of, told
from llama_ext.cli.labelled_files import read_pairs
from llama_ext.cli.main import EXIT_INTERRUPTED, EXIT_OK
from llama_ext.cli.outputs import add_overwrite_option, check_directory

if TYPE_CHECKING:
    from llama_ext.cli.common import Parser
    from llama_ext.training.history import History

__all__ = [
    "add_evaluate_arguments",
    "add_task_argument",
    "add_text_arguments",
    "add_train_arguments",
    "base_of",
    "loading_of",
    "read_examples",
    "save_and_tell",
    "write_report",
]

Pairs = list[tuple[str, str]]


class _Task(Protocol):
    def save(self, directory: str, *, merge: bool = False) -> None: ...


class _Report(Protocol):
    def to_json(self) -> str: ...


def add_train_arguments(parser: Parser, columns: tuple[str, str], what: str, model: dict[str, Any]) -> None:
    """Adds what `train` takes.

    Args:
        parser: Of the action.
        columns: The names of a file's columns.
        what: What is written: "classifier".
        model: Options of the argument --model.
    """
    _add_file(parser, columns)
    parser.add_argument("--out", required=True, metavar="DIRECTORY", help=f"where the {what} goes")
    add_overwrite_option(parser)
    parser.add_argument("--model", metavar="MODEL", **model)
    add_fit_options(parser)
    add_device_options(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_task_argument(parser: Parser, name: str, text: str) -> None:
    """Adds what was trained: its directory, as `args.directory`, the base of an adapter, and how to compute."""
    parser.add_argument("directory", metavar=name, help=text)
    parser.add_argument("--base", metavar="MODEL", help="the base of an adapter (default: what the adapter names)")
    add_compute_option(parser)
    add_device_options(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_text_arguments(parser: Parser, json_help: str) -> None:
    """Adds texts, for `answer_texts`, and --json."""
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="nothing reads standard input, a text a line")
    parser.add_argument("--json", action="store_true", help=json_help)


def add_evaluate_arguments(parser: Parser, columns: tuple[str, str]) -> None:
    """Adds the file that is scored, and --json."""
    _add_file(parser, columns)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_file(parser: Parser, columns: tuple[str, str]) -> None:
    parser.add_argument("file", metavar="FILE", help="columns {} and {}".format(*columns))


def loading_of(args: argparse.Namespace) -> dict[str, Any]:
    """How a task's `load` loads its model, as the options say."""
    return {"base": args.base, "device": args.device, "compute": args.compute, "threads": args.threads}


def base_of(args: argparse.Namespace) -> dict[str, Any]:
    """How `train` loads the base: as it is stored under an adapter, and as float32 where all weights are trained."""
    return {"dtype": "float32" if args.lora is None else "auto", "device": args.device, "threads": args.threads}


def read_examples(args: argparse.Namespace, columns: tuple[str, str]) -> tuple[Pairs, Pairs | None]:
    """The file to learn from, and that of --validation.

    Raises:
        OptionError: Options of an adapter contradict each other, or --out is not empty, which is told before anything is read.
        FormatError: A file cannot be read.
    """
    lora_of(args)
    check_directory(args.out, args.overwrite)
    pairs = read_pairs(args.file, *columns)
    return pairs, None if args.validation is None else read_pairs(args.validation, *columns)


def save_and_tell(task: _Task, history: History, args: argparse.Namespace) -> int:
    """Saves what was trained in --out, and says in a line how it went. After Ctrl-C nothing is saved.

    Returns:
        What the process exits with.
    """
    if history.stopped == "interrupted":
        # There is nothing here that could be gone on from, and half of it must not take the place of a whole one.
        report(f"interrupted after {len(history.steps)} steps: nothing was written")
        return EXIT_INTERRUPTED
    task.save(args.out, merge=args.merge)
    report(f"{told(history)}; saved in {args.out}")
    return EXIT_OK


def write_report(found: _Report, args: argparse.Namespace) -> None:
    """A report as a table, or with --json as one object."""
    write((found.to_json() if args.json else str(found)) + "\n")
