"""`llama-ext classify`: learns to give texts their labels, gives them, and says how well."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING

from llama_ext.cli.common import report, write
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
from llama_ext.cli.text_answers import answer_texts, in_one_field, in_one_line
from llama_ext.errors import OptionError

if TYPE_CHECKING:
    from llama_ext._arrays import FloatArray
    from llama_ext.cli.common import Commands
    from llama_ext.tasks.text_classifier import TextClassifier

__all__ = ["add_to"]

_COLUMNS = ("text", "label")
# Texts that are read together where there are many: results are the same, and more wait for the first one.
_AT_ONCE = 32
_CLASSIFIER = ("CLASSIFIER", "what `train` wrote, or one of transformers")

_DESCRIPTION = """\
Sort texts by labels: `train` learns it from a file of texts and labels, `predict`
does it, `evaluate` counts how often it is right."""

_EPILOG = """
examples:
  llama-ext classify train reviews.csv --out reviews --model demo
  llama-ext classify train reviews.csv --out reviews --lora 16 --class-weights balanced
  llama-ext classify predict reviews "what a lovely film"
  llama-ext classify evaluate reviews test.csv --json

`llama-ext classify train --help` shows the options of training.
"""


def add_to(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "classify",
        usage="llama-ext classify train|predict|evaluate [OPTIONS]",
        help="sort texts by labels: learn it, do it, score it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    actions = parser.add_subparsers(
        prog="llama-ext classify", title="actions", metavar="ACTION", dest="action", required=True
    )
    _add_train(actions)
    predict = actions.add_parser(
        "predict",
        usage="llama-ext classify predict [OPTIONS] CLASSIFIER [TEXT...]",
        help="the label of texts",
        description="Prints a label and a tab before each text, a line for each as it comes. An empty\n"
        "text has no label; with --json that is null.",
        epilog='\nexamples:\n  llama-ext classify predict reviews "what a lovely film"\n'
        "  llama-ext classify predict reviews --json < texts.txt\n",
    )
    predict.set_defaults(run=_predict)
    add_task_argument(predict, *_CLASSIFIER)
    add_text_arguments(predict, "one JSON object a text, with probabilities")
    evaluate = actions.add_parser(
        "evaluate",
        usage="llama-ext classify evaluate [OPTIONS] CLASSIFIER FILE",
        help="how often it is right",
        description=f"Precision, recall and F1 of each label, and accuracy.\n\n{FORMATS}",
        epilog="\nexamples:\n  llama-ext classify evaluate reviews test.csv\n",
    )
    evaluate.set_defaults(run=_evaluate)
    add_task_argument(evaluate, *_CLASSIFIER)
    add_evaluate_arguments(evaluate, _COLUMNS)


def _add_train(actions: Commands) -> None:
    train = actions.add_parser(
        "train",
        usage="llama-ext classify train [OPTIONS] FILE --out DIRECTORY",
        help="learn from a file of texts and labels",
        description=f"Learns from texts and labels.\n\n{FORMATS}",
        epilog="\nexamples:\n  llama-ext classify train reviews.csv --out reviews\n"
        "  llama-ext classify train reviews.jsonl --out reviews --model path/to/model --lora 16\n",
    )
    train.set_defaults(run=_train)
    train.add_argument("--labels", metavar="NAMES", help="their order, with commas (default: as they sort)")
    train.add_argument("--class-weights", choices=("balanced",), help="balanced: repeat texts of rare labels")
    add_train_arguments(train, _COLUMNS, "classifier", {"default": "demo", "help": "the base (default: demo)"})


def _load(args: argparse.Namespace) -> TextClassifier:
    from llama_ext.tasks.text_classifier import TextClassifier

    return TextClassifier.load(args.directory, **loading_of(args))


def _train(args: argparse.Namespace) -> int:
    pairs, held_out = read_examples(args, _COLUMNS)
    there = sorted({label for _, label in pairs})
    names = there if args.labels is None else args.labels.split(",")
    if len(names) < 2 and len(there) < 2:
        raise OptionError(f"{args.file} has the one label {there[0]!r}: there is nothing to tell apart")
    if len(names) < 2:
        raise OptionError(
            f"--labels names {args.labels!r} alone, and {args.file} has {', '.join(map(repr, there))}: name all labels, with commas"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise OptionError(f"--labels names {twice[0]!r} twice: give each label once")
    # Told before it takes long: a heading that was taken for a text shows here.
    counts = Counter(label for _, label in pairs)
    report(f"{len(pairs)} texts: " + ", ".join(f"{name} {counts[name]}" for name in names))
    from llama_ext.tasks.text_classifier import TextClassifier

    classifier = TextClassifier(args.model, labels=names, seed=args.seed, **base_of(args))
    history = classifier.fit(
        [text for text, _ in pairs],
        [label for _, label in pairs],
        validation_data=None
        if held_out is None
        else ([text for text, _ in held_out], [label for _, label in held_out]),
        class_weights=args.class_weights,
        **fit_settings(args),
    )
    code = save_and_tell(classifier, history, args)
    if code == 0 and held_out is not None:
        write(f"{classifier.evaluate([text for text, _ in held_out], [label for _, label in held_out])}\n")
    return code


def _predict(args: argparse.Namespace) -> int:
    classifier = _load(args)
    names = classifier.labels

    def line(text: str, row: FloatArray | None) -> str:
        label = None if row is None else names[int(row.argmax())]
        if args.json:
            found = None if row is None else {name: float(value) for name, value in zip(names, row, strict=True)}
            return json.dumps({"text": text, "label": label, "probabilities": found}, ensure_ascii=False)
        return f"{in_one_field(label or '')}\t{in_one_line(text)}"

    answer_texts(args, "Classifying", lambda texts: classifier.predict_proba(texts, verbose=0), line, _AT_ONCE)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    pairs = read_pairs(args.file, *_COLUMNS)
    write_report(_load(args).evaluate([text for text, _ in pairs], [label for _, label in pairs]), args)
    return 0
