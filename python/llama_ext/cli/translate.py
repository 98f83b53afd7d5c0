"""`llama-ext translate`: learns to translate from pairs of texts, translates, and says how well."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from llama_ext.cli.fitting import fit_settings
from llama_ext.cli.labelled_files import FORMATS, read_pairs
from llama_ext.cli.task_commands import (
    add_evaluate_arguments,
    add_task_argument,
    add_text_arguments,
    add_train_arguments,
    base_of,
    loading_of,
    read_examples,
    save_and_tell,
    write_report,
)
from llama_ext.cli.text_answers import answer_texts, in_one_line

if TYPE_CHECKING:
    from llama_ext.cli.common import Commands, Parser
    from llama_ext.tasks.translator import Translator

__all__ = ["add_to"]

# Texts that are translated together where there are many: results are the same, and more wait for the first one.
_AT_ONCE = 16
_COLUMNS = ("source", "target")

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
    actions = parser.add_subparsers(
        prog="llama-ext translate", title="actions", metavar="ACTION", dest="action", required=True
    )
    train = actions.add_parser(
        "train",
        usage="llama-ext translate train [OPTIONS] FILE --source LANGUAGE --target LANGUAGE --out DIRECTORY",
        help="learn from a file of pairs",
        description=f"Learns from texts and their translations.\n\n{FORMATS}",
        epilog="\nexamples:\n  llama-ext translate train pairs.tsv --source English --target Chinese --out en-zh --lora 16\n",
    )
    train.set_defaults(run=_train)
    train.add_argument("--source", required=True, metavar="LANGUAGE", help="the texts' language, as in the prompt")
    train.add_argument("--target", required=True, metavar="LANGUAGE", help="the translations' language")
    base = {"required": True, "help": "the base; its tokenizer needs an EOS token"}
    add_train_arguments(train, _COLUMNS, "translator", base)
    run = actions.add_parser(
        "run",
        usage="llama-ext translate run [OPTIONS] TRANSLATOR [TEXT...]",
        help="translate texts",
        description="Prints translations, a line for each text as it comes: an empty one for an empty\n"
        "text. Line breaks in a translation become spaces; --json has it as it is.",
        epilog='\nexamples:\n  llama-ext translate run en-zh "5 March 2021"\n  llama-ext translate run en-zh < texts.txt\n',
    )
    run.set_defaults(run=_run)
    _add_translator(run)
    add_text_arguments(run, "one JSON object a text")
    evaluate = actions.add_parser(
        "evaluate",
        usage="llama-ext translate evaluate [OPTIONS] TRANSLATOR FILE",
        help="score translations",
        description=f"BLEU and chrF by sacreBLEU (extra `translate`), and the share that is exactly right.\n\n{FORMATS}",
        epilog="\nexamples:\n  llama-ext translate evaluate en-zh test.tsv\n",
    )
    evaluate.set_defaults(run=_evaluate)
    _add_translator(evaluate)
    add_evaluate_arguments(evaluate, _COLUMNS)


def _add_translator(parser: Parser) -> None:
    add_task_argument(parser, "TRANSLATOR", "what `train` wrote")
    parser.add_argument("--num-beams", type=int, default=4, metavar="N", help="1 is greedy (default: 4)")


def _load(args: argparse.Namespace) -> Translator:
    from llama_ext.tasks.translator import Translator

    return Translator.load(args.directory, **loading_of(args))


def _train(args: argparse.Namespace) -> int:
    pairs, held_out = read_examples(args, _COLUMNS)
    from llama_ext.tasks.translator import Translator

    translator = Translator(args.model, args.source, args.target, **base_of(args))
    history = translator.fit(pairs, validation_data=held_out, **fit_settings(args))
    return save_and_tell(translator, history, args)


def _run(args: argparse.Namespace) -> int:
    translator = _load(args)

    def ask(texts: list[str]) -> list[str]:
        found: list[str] = translator.translate(texts, num_beams=args.num_beams, verbose=0)
        return found

    def line(text: str, found: str | None) -> str:
        translation = found or ""
        if args.json:
            return json.dumps({"text": text, "translation": translation}, ensure_ascii=False)
        return in_one_line(translation)

    # Beam search takes one text after the other anyway.
    answer_texts(args, "Translating", ask, line, _AT_ONCE if args.num_beams == 1 else 1)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    pairs = read_pairs(args.file, *_COLUMNS)
    write_report(_load(args).evaluate(pairs, num_beams=args.num_beams), args)
    return 0
