"""What the commands that learn share: how to train, and an adapter."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_ext.models.lora import LoRA
    from llama_ext.training.history import History

__all__ = ["add_fit_options", "fit_settings", "lora_of", "told"]


def add_fit_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a run of training."""
    group = parser.add_argument_group("training")
    group.add_argument("--validation", metavar="FILE", help="examples that are scored after each epoch")
    group.add_argument("--epochs", type=int, default=3, metavar="N", help="how often the data is seen (default: 3)")
    group.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help="highest learning rate (default: 0.001, less for wide models; an adapter's is up to ten times as high)",
    )
    group.add_argument("--batch-size", type=int, default=16, metavar="N", help="examples of a step (default: 16)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of order and new weights (default: 0)")
    group.add_argument("--lora", type=int, metavar="R", help="train an adapter of rank R instead of all weights")
    group.add_argument("--lora-alpha", type=float, metavar="X", help="numerator of its scale (default: 2 R)")
    group.add_argument("--lora-dropout", type=float, default=0.0, metavar="P", help="of its inputs (default: 0)")
    group.add_argument(
        "--lora-targets",
        metavar="NAMES",
        help="what it adapts, with commas: q_proj,v_proj (default: all linear layers of the blocks)",
    )
    group.add_argument("--merge", action="store_true", help="save the adapter as a part of the weights")


def lora_of(args: argparse.Namespace) -> LoRA | None:
    """The adapter that the options ask for."""
    from llama_ext.errors import OptionError
    from llama_ext.models.lora import LoRA

    if args.lora is None:
        if args.lora_alpha is not None or args.lora_targets is not None or args.lora_dropout or args.merge:
            raise OptionError("--lora-alpha, --lora-dropout, --lora-targets and --merge belong to --lora R")
        return None
    targets = "all-linear" if args.lora_targets is None else args.lora_targets.split(",")
    alpha = 2 * args.lora if args.lora_alpha is None else args.lora_alpha
    return LoRA(r=args.lora, alpha=alpha, targets=targets, dropout=args.lora_dropout)


def fit_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a task's `fit`."""
    return {
        "adapter": lora_of(args),
        "epochs": args.epochs,
        "lr": args.lr,
        "batch_size": args.batch_size,
        "seed": args.seed,
    }


def told(history: History) -> str:
    """What happened, in a line."""
    if not history.steps:
        return "nothing was trained"
    count = len(history.steps)
    return f"{count} step{'' if count == 1 else 's'}, loss {history.steps[0].loss:.4f} -> {history.steps[-1].loss:.4f}"
