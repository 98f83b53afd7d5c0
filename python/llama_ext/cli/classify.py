"""`llama-ext classify`: learns to give texts their labels, gives them, and says how well."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING

from llama_ext.cli.common import read_stdin, report, write
from llama_ext.cli.fitting import add_fit_options, fit_settings, lora_of, told
from llama_ext.cli.labelled_files import FORMATS, read_pairs
from llama_ext.errors import OptionError

if TYPE_CHECKING:
    from llama_ext.cli.common import Commands, Parser
    from llama_ext.tasks.text_classifier import TextClassifier

__all__ = ["add_to"]

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
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    _add_train(actions)
    predict = actions.add_parser(
        "predict",
        usage="llama-ext classify predict [OPTIONS] CLASSIFIER [TEXT...]",
        help="the label of texts",
        description="Prints a label and a tab before each text.",
        epilog='\nexamples:\n  llama-ext classify predict reviews "what a lovely film"\n'
        "  llama-ext classify predict reviews --json < texts.txt\n",
    )
    predict.set_defaults(run=_predict)
    _add_classifier(predict)
    predict.add_argument("texts", nargs="*", metavar="TEXT", help="nothing reads standard input, a text a line")
    predict.add_argument("--json", action="store_true", help="one JSON object a text, with probabilities")
    evaluate = actions.add_parser(
        "evaluate",
        usage="llama-ext classify evaluate [OPTIONS] CLASSIFIER FILE",
        help="how often it is right",
        description=f"Precision, recall and F1 of each label, and accuracy.\n\n{FORMATS}",
        epilog="\nexamples:\n  llama-ext classify evaluate reviews test.csv\n",
    )
    evaluate.set_defaults(run=_evaluate)
    _add_classifier(evaluate)
    evaluate.add_argument("file", metavar="FILE", help="columns text and label")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")


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
    train.add_argument("file", metavar="FILE", help="columns text and label")
    train.add_argument("--out", required=True, metavar="DIRECTORY", help="where the classifier goes")
    train.add_argument("--model", default="demo", metavar="MODEL", help="the base (default: demo)")
    train.add_argument("--labels", metavar="NAMES", help="their order, with commas (default: as they sort)")
    train.add_argument("--class-weights", choices=("balanced",), help="balanced: repeat texts of rare labels")
    add_fit_options(train)
    train.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_classifier(parser: Parser) -> None:
    parser.add_argument("classifier", metavar="CLASSIFIER", help="what `train` wrote, or one of transformers")
    parser.add_argument("--base", metavar="MODEL", help="the base of an adapter (default: what the adapter names)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _load(args: argparse.Namespace) -> TextClassifier:
    from llama_ext.tasks.text_classifier import TextClassifier

    return TextClassifier.load(args.classifier, base=args.base)


def _train(args: argparse.Namespace) -> int:
    lora_of(args)  # a mistake there is told before anything is read
    pairs = read_pairs(args.file, "text", "label")
    held_out = None if args.validation is None else read_pairs(args.validation, "text", "label")
    names = sorted({label for _, label in pairs}) if args.labels is None else args.labels.split(",")
    if len(names) < 2:
        raise OptionError(f"{args.file} has the one label {names[0]!r}: there is nothing to tell apart")
    # Told before it takes long: a heading that was taken for a text shows here.
    counts = Counter(label for _, label in pairs)
    report(f"{len(pairs)} texts: " + ", ".join(f"{name} {counts[name]}" for name in names))
    from llama_ext.tasks.text_classifier import TextClassifier

    classifier = TextClassifier(args.model, labels=names, seed=args.seed)
    history = classifier.fit(
        [text for text, _ in pairs],
        [label for _, label in pairs],
        validation_data=None
        if held_out is None
        else ([text for text, _ in held_out], [label for _, label in held_out]),
        class_weights=args.class_weights,
        **fit_settings(args),
    )
    classifier.save(args.out, merge=args.merge)
    report(f"{told(history)}; saved in {args.out}")
    if held_out is not None:
        write(f"{classifier.evaluate([text for text, _ in held_out], [label for _, label in held_out])}\n")
    return 0


def _predict(args: argparse.Namespace) -> int:
    texts = args.texts or [line for line in read_stdin("texts, one a line").splitlines() if line]
    if not texts:
        raise OptionError("there is no text")
    classifier = _load(args)
    for text, row in zip(texts, classifier.predict_proba(texts), strict=True):
        label = classifier.labels[int(row.argmax())]
        if args.json:
            values = {name: float(value) for name, value in zip(classifier.labels, row, strict=True)}
            write(json.dumps({"text": text, "label": label, "probabilities": values}, ensure_ascii=False) + "\n")
        else:
            write(f"{label}\t{text}\n")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    pairs = read_pairs(args.file, "text", "label")
    found = _load(args).evaluate([text for text, _ in pairs], [label for _, label in pairs])
    write((found.to_json() if args.json else str(found)) + "\n")
    return 0
