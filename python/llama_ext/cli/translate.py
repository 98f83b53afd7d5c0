"""`llama-ext translate`: learns to translate from pairs of texts, translates, and says how well."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from llama_ext.cli.common import read_stdin, report, write
from llama_ext.cli.fitting import add_fit_options, fit_settings, lora_of, told
from llama_ext.cli.labelled_files import FORMATS, read_pairs
from llama_ext.errors import OptionError

if TYPE_CHECKING:
    from llama_ext.cli.common import Commands, Parser
    from llama_ext.tasks.translator import Translator

__all__ = ["add_to"]

_DESCRIPTION = """\
Translate: `train` learns it from a file of pairs, `run` does it, `evaluate` scores
it by BLEU, chrF and how many are exactly right."""

_EPILOG = """
examples:
  llama-ext translate train pairs.tsv --source English --target Chinese --out en-zh --model path/to/model
  llama-ext translate train pairs.tsv --source English --target Chinese --out en-zh --lora 16
  llama-ext translate run en-zh "two hundred and five"
  llama-ext translate evaluate en-zh test.tsv

`llama-ext translate train --help` shows the options of training.
"""


def add_to(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "translate",
        usage="llama-ext translate train|run|evaluate [OPTIONS]",
        help="translate: learn it, do it, score it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    train = actions.add_parser(
        "train",
        usage="llama-ext translate train [OPTIONS] FILE --source LANGUAGE --target LANGUAGE --out DIRECTORY",
        help="learn from a file of pairs",
        description=f"Learns from texts and their translations.\n\n{FORMATS}",
        epilog="\nexamples:\n  llama-ext translate train pairs.tsv --source English --target Chinese --out en-zh --lora 16\n",
    )
    train.set_defaults(run=_train)
    train.add_argument("file", metavar="FILE", help="columns source and target")
    train.add_argument("--source", required=True, metavar="LANGUAGE", help="the texts' language, as in the prompt")
    train.add_argument("--target", required=True, metavar="LANGUAGE", help="the translations' language")
    train.add_argument("--out", required=True, metavar="DIRECTORY", help="where the translator goes")
    train.add_argument("--model", required=True, metavar="MODEL", help="the base; its tokenizer needs an EOS token")
    add_fit_options(train)
    train.add_argument("--debug", action="store_true", help="show the traceback of an error")
    run = actions.add_parser(
        "run",
        usage="llama-ext translate run [OPTIONS] TRANSLATOR [TEXT...]",
        help="translate texts",
        description="Prints a translation a line.",
        epilog='\nexamples:\n  llama-ext translate run en-zh "5 March 2021"\n  llama-ext translate run en-zh < texts.txt\n',
    )
    run.set_defaults(run=_run)
    _add_translator(run)
    run.add_argument("texts", nargs="*", metavar="TEXT", help="nothing reads standard input, a text a line")
    run.add_argument("--json", action="store_true", help="one JSON object a text")
    evaluate = actions.add_parser(
        "evaluate",
        usage="llama-ext translate evaluate [OPTIONS] TRANSLATOR FILE",
        help="score translations",
        description=f"BLEU and chrF by sacreBLEU (extra `translate`), and the share that is exactly right.\n\n{FORMATS}",
        epilog="\nexamples:\n  llama-ext translate evaluate en-zh test.tsv\n",
    )
    evaluate.set_defaults(run=_evaluate)
    _add_translator(evaluate)
    evaluate.add_argument("file", metavar="FILE", help="columns source and target")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")


def _add_translator(parser: Parser) -> None:
    parser.add_argument("translator", metavar="TRANSLATOR", help="what `train` wrote")
    parser.add_argument("--base", metavar="MODEL", help="the base of an adapter (default: what the adapter names)")
    parser.add_argument("--num-beams", type=int, default=4, metavar="N", help="1 is greedy (default: 4)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _load(args: argparse.Namespace) -> Translator:
    from llama_ext.tasks.translator import Translator

    return Translator.load(args.translator, base=args.base)


def _train(args: argparse.Namespace) -> int:
    lora_of(args)  # a mistake there is told before anything is read
    pairs = read_pairs(args.file, "source", "target")
    held_out = None if args.validation is None else read_pairs(args.validation, "source", "target")
    from llama_ext.tasks.translator import Translator

    translator = Translator(args.model, args.source, args.target)
    history = translator.fit(pairs, validation_data=held_out, **fit_settings(args))
    translator.save(args.out, merge=args.merge)
    report(f"{told(history)}; saved in {args.out}")
    return 0


def _run(args: argparse.Namespace) -> int:
    texts = args.texts or [line for line in read_stdin("texts, one a line").splitlines() if line]
    if not texts:
        raise OptionError("there is no text")
    for text, found in zip(texts, _load(args).translate(texts, num_beams=args.num_beams), strict=True):
        values = {"text": text, "translation": found}
        write((json.dumps(values, ensure_ascii=False) if args.json else found) + "\n")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    found = _load(args).evaluate(read_pairs(args.file, "source", "target"), num_beams=args.num_beams)
    write((found.to_json() if args.json else str(found)) + "\n")
    return 0
