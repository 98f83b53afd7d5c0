"""`llama-ext`: finds the subcommand, runs it, and turns what goes wrong into one line and an exit code.

The subcommands are imported where Ctrl-C is already taken care of: an import is the slowest part of a short command.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_ext._version import __version__
from llama_ext.cli.imports import import_runtime
from llama_ext.errors import (
    ContextLengthError,
    FormatError,
    LimitError,
    LlamaExtError,
    OptionError,
    TokenIdError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from llama_ext.cli.common import Parser

__all__ = ["EXIT_INTERRUPTED", "build_parser", "exit_code", "main"]

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_BAD_FILE = 3
EXIT_LIMIT = 4
EXIT_INTERRUPTED = 130

# The first class that fits decides.
_EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (KeyboardInterrupt, EXIT_INTERRUPTED),
    (OptionError, EXIT_USAGE),
    (TokenIdError, EXIT_USAGE),  # only an option can name a token id
    (FormatError, EXIT_BAD_FILE),
    (UnsupportedError, EXIT_BAD_FILE),
    (LimitError, EXIT_LIMIT),
    (ContextLengthError, EXIT_LIMIT),
    (MemoryError, EXIT_LIMIT),
)

_DESCRIPTION = """\
Run and train Llama models on a CPU or an NVIDIA GPU. Without --model it is the
small demonstration model that comes with the package."""

_EPILOG = """\
examples:
  llama-ext info
  llama-ext generate "ROMEO:" --max-new-tokens 100
  echo "To be, or not to be" | llama-ext perplexity -

`llama-ext COMMAND --help` shows the options of a command, and examples.

exit codes:
  0 done               3 bad file          130 interrupted
  2 wrong usage        4 limit or memory     1 anything else
"""


def build_parser() -> Parser:
    """The parser of the whole command."""
    from llama_ext.cli import (
        bench,
        chat,
        classify,
        convert,
        export_onnx,
        generate,
        info,
        perplexity,
        quantize,
        train,
        translate,
        verify_onnx,
    )
    from llama_ext.cli.common import Parser

    parser = Parser(prog="llama-ext", usage="llama-ext COMMAND [OPTIONS]", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"llama-ext {__version__}")
    commands = parser.add_subparsers(
        prog="llama-ext", title="commands", metavar="COMMAND [OPTIONS]", dest="command", required=True
    )
    learning = (train, classify, translate)
    files = (quantize, convert, export_onnx, verify_onnx)
    for module in (info, generate, chat, bench, perplexity, *learning, *files):
        module.add_to(commands)
    return parser


def exit_code(error: BaseException) -> int:
    """What the process exits with after an error."""
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), EXIT_FAILURE)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments after the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        for stream in (sys.stdout, sys.stderr):
            # A terminal that cannot show a character must not end a generation.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        parser = build_parser()
        args, unknown = parser.parse_known_args(arguments)
        # argparse takes a list of texts in one piece: those after an option are texts as well.
        if isinstance(getattr(args, "texts", None), list) and not any(word.startswith("-") for word in unknown):
            args.texts, unknown = [*args.texts, *unknown], []
        if unknown:
            parser.prog = f"llama-ext {args.command}"  # whose help has the options there are
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        import_runtime()
        code: int = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse, after --help, --version or a mistake
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    except BrokenPipeError:
        # Whoever read our output has had enough: `llama-ext generate | head`.
        _abandon_stdout()
        return EXIT_FAILURE
    except BaseException as error:
        if _was_interrupted(error):
            error = KeyboardInterrupt()
        elif "--debug" in arguments:
            import traceback

            traceback.print_exc()
        if not isinstance(error, (Exception, KeyboardInterrupt)):
            raise
        if isinstance(error, Exception):
            from llama_ext.cli.common import report

            report(_describe(error, arguments))
        return exit_code(error)


def _describe(error: Exception, arguments: Sequence[str]) -> str:
    text = str(error)
    if isinstance(error, LlamaExtError):
        from llama_ext.cli.common import in_words_of_the_command

        return in_words_of_the_command(text, *arguments[:1])
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or text}"
    if isinstance(error, MemoryError):
        return f"out of memory{f': {text}' if text else ''}"
    return f"internal error, please report it: {type(error).__name__}: {text} (--debug shows where)"


def _was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is behind it: an interrupted import may come out as another error."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, KeyboardInterrupt):
            return True
        link = link.__cause__ or link.__context__
    return False


def _abandon_stdout() -> None:
    """Sends what is still buffered nowhere: writing it when the interpreter ends would complain again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, sys.stdout.fileno())
        finally:
            os.close(nowhere)
