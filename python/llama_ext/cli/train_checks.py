"""What `llama-ext train` checks before its first step, and how long the warm-up is."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ext.cli.common import report
from llama_ext.cli.outputs import check_directory, has_replaced, settle_replaced
from llama_ext.errors import OptionError

if TYPE_CHECKING:
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = [
    "CHECKPOINTS",
    "check_device",
    "check_lengths",
    "check_names",
    "check_new_model_options",
    "check_numbers",
    "check_out",
    "check_prepare",
    "check_sample",
    "steps_per_epoch",
    "warmup_of",
]

# In --out.
CHECKPOINTS = "checkpoints"
_SHAPE = ("layers", "width", "heads", "kv_heads", "ffn_width")
# What has no default of the parser's.
_TRAINING = (
    *("resume", "preset", *_SHAPE, "context", "steps", "epochs", "batch_size", "lr", "optimizer", "schedule", "warmup"),
    *("weight_decay", "dropout", "precision", "skip_outliers", "overfit_batch", "eval_every", "save_every", "patience"),
    *("log_file", "plot", "peak_gflops", "sample"),
)


def check_numbers(args: argparse.Namespace) -> None:
    """Numbers that the library has other names for, or does not see in a run without validation."""
    if not 0.0 <= args.val_fraction < 1.0:
        raise OptionError(f"--val-fraction must be in [0, 1), got {args.val_fraction}")
    for name in (*_SHAPE, "context", "eval_every", "patience"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise OptionError(f"{_option(name)} must be a whole number >= 1, got {value}")
    if args.steps is not None and args.epochs is not None:
        raise OptionError("--steps and --epochs both say how long the run is: give one of them")
    if args.patience is not None and args.val_fraction == 0:
        raise OptionError("--patience needs validation, and --val-fraction 0 holds nothing out: leave out one of them")


def check_device(args: argparse.Namespace) -> None:
    """That there is such a device, and so many threads: told before a tokenizer is learned."""
    from llama_ext import _core
    from llama_ext.runtime.threads import checked_threads

    _core.Backend(args.device, checked_threads(args.threads))


def check_names(args: argparse.Namespace) -> None:
    """That no file which is written is the text, or another one that is written; not even --overwrite wants that."""
    named = {"--prepare": args.prepare, "--log-file": args.log_file, "--plot": args.plot}
    taken = {} if args.text == "-" else {os.path.realpath(args.text): "the text that is learned"}
    for name, path in named.items():
        if path is None:
            continue
        other = taken.setdefault(os.path.realpath(path), name)
        if other != name:
            raise OptionError(f"{name} {path}: this is also {other}. Name another file")


def check_prepare(args: argparse.Namespace) -> None:
    """That nothing is asked of a training where --prepare asks for none."""
    for name in _TRAINING:
        if getattr(args, name) not in (None, False):
            raise OptionError(
                f"{_option(name)} is for a training, and --prepare only writes tokens: leave one of them out"
            )


def check_new_model_options(args: argparse.Namespace) -> None:
    """That nothing is said of a new model where --model names one."""
    for name in (*_SHAPE, "vocab_size", "tokenizer"):
        if getattr(args, name) is not None:
            raise OptionError(f"{_option(name)} is for a new model; --model {args.model} has its own")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_out(args: argparse.Namespace) -> None:
    """That nothing in --out is lost, unless --overwrite says so; what a kill has left there is brought in order."""
    from llama_ext.training.checkpoints import has_checkpoints, locked

    check_directory(args.out, overwrite=True)
    folder = Path(args.out) / CHECKPOINTS
    with locked(folder):
        pass  # before anything is moved; the run itself holds the lock
    if args.resume and args.overwrite:
        raise OptionError("--resume goes on with the run in --out and --overwrite replaces it: give one of them")
    if (args.resume or args.overwrite) and settle_replaced(folder):
        report(
            f"note: a run that was to replace the one in {args.out} was killed before its first checkpoint: the earlier "
            "checkpoints are back"
        )
    begun = has_checkpoints(folder)
    if not args.resume:
        # Those of a run that is replaced come back with --resume, where the new one has none.
        resumable = begun or has_replaced(folder)
        advice = "say --resume to go on with the run in it, or --overwrite" if resumable else "say --overwrite"
        check_directory(args.out, args.overwrite, advice=advice)
        return
    # A run that was killed before its first checkpoint has left no more than these, and begins anew.
    check_directory(
        args.out,
        begun,
        besides={CHECKPOINTS, *([Path(args.log_file).name] if args.log_file else [])},
        advice="say --overwrite instead of --resume: there is no checkpoint to go on from",
    )


def check_sample(args: argparse.Namespace, model: LlamaForCausalLM) -> None:
    """That --sample can be gone on with, before the training."""
    if args.sample is None:
        return
    if model.tokenizer is None:
        raise OptionError("--sample: this model has no tokenizer, so it cannot read texts")
    try:
        count = len(model.tokenizer.encode(args.sample))
    except OptionError as error:
        raise OptionError(f"--sample {args.sample!r}: {error}") from error
    if not count:
        raise OptionError("--sample is empty: give the text that the sample begins with, or leave it out")
    most = model.config.max_position_embeddings
    if count >= most:
        raise OptionError(
            f"--sample has {count:,} tokens and the context is {most:,}: nothing can follow. Give a shorter text"
        )


def check_lengths(args: argparse.Namespace, model: LlamaForCausalLM, learned: int, held_out: int) -> None:
    """That a row fits into what is learned from, and --patience has validations; where there are none, it is said."""
    most = model.config.max_position_embeddings
    context = args.context or most
    # `fit` tells what is wrong with a context.
    if 1 <= context <= most and learned < context + 1:
        way_out = f"Give a longer text, or --context {learned - 1} or less" if learned > 1 else "Give a longer text"
        raise OptionError(
            f"{'the text' if args.text == '-' else args.text} has {learned + held_out:,} tokens, {learned:,} of them to learn "
            f"from, and a row of --context {context} needs {context + 1:,}. {way_out}"
        )
    if held_out < 2 and args.patience is not None:
        raise OptionError(
            f"--patience needs validation, which needs 2 tokens, and {held_out} are held out: --val-fraction holds out more"
        )
    if held_out < 2 and args.val_fraction > 0:
        report(
            f"note: {held_out} tokens are held out, and a validation needs 2: there is none. --val-fraction holds out more"
        )


def warmup_of(args: argparse.Namespace, most: int, steps: int) -> Any:
    """What --warmup says, or how a resumed run began, or a tenth of the steps."""
    from llama_ext.training.checkpoints import find_checkpoint, load_checkpoint

    if args.warmup is not None:
        if args.warmup > steps > 0:
            raise OptionError(
                f"--warmup is {args.warmup:g} steps and the run has {steps:,}: the learning rate would never be reached. "
                "Give fewer, or below 1 a share of the steps"
            )
        return int(args.warmup) if args.warmup.is_integer() else args.warmup
    begun = find_checkpoint(Path(args.out) / CHECKPOINTS) if args.resume else None
    if begun is not None:
        # A run that is made longer keeps what it began with.
        settings = load_checkpoint(begun).settings.get("compile")
        if isinstance(settings, dict) and "warmup" in settings:
            return settings["warmup"]
    return min(most, max(0, steps) // 10)


def steps_per_epoch(args: argparse.Namespace, model: LlamaForCausalLM, learned: Any, rows: int) -> int:
    """Steps in which the text is seen once, for --epochs."""
    from llama_ext.training.batches import Stream
    from llama_ext.training.token_file import ArrayReader, TokenSlice

    if args.overfit_batch or rows < 1:
        return 1
    reader = learned if isinstance(learned, TokenSlice) else ArrayReader(learned)
    return Stream(reader, args.context or model.config.max_position_embeddings).steps_per_epoch(rows)
