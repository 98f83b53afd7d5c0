"""The learning rate of each step: a warm-up, then one of four shapes."""

from __future__ import annotations

import math

from llama_ext.training.options import TrainOptions

__all__ = ["learning_rate", "usual_lr", "warmup_steps"]

# What a narrow model bears; from which width on it is too much; and how much more an adapter bears.
_HIGHEST = 1e-3
_NARROW = 192
_OF_AN_ADAPTER = 10


def usual_lr(width: int, *, adapts: bool) -> float:
    """The highest learning rate to begin with when a model that is there is trained further, with AdamW and some thousand tokens a step.

    1e-3 up to a width of 192, and 0.192 / width beyond: 9e-5 at 2,048 and 5e-5 at 4,096. Ten times that for an adapter, but 1e-3 at
    most. `LlamaForCausalLM.lr_find` measures instead.

    Args:
        width: The model's hidden_size, >= 1.
        adapts: Whether an adapter is trained, and the weights stay as they are.

    Sources: that the best rate falls with the width, Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot
    Hyperparameter Transfer", 2022; the ten times, Schulman et al., "LoRA Without Regret", 2025.
    """
    return min(_HIGHEST, _HIGHEST * _NARROW / width * (_OF_AN_ADAPTER if adapts else 1))


def warmup_steps(options: TrainOptions, total: int) -> int:
    """How many steps the learning rate rises.

    Args:
        options: `warmup` in steps, or as a share of `total`.
        total: Steps of the run.

    Returns:
        In [0, total].
    """
    warmup = options.warmup
    # Not a step more because 0.07 * 100 is a little more than 7.
    return min(total, warmup if isinstance(warmup, int) else math.ceil(round(warmup * total, 6)))


def learning_rate(options: TrainOptions, step: int, total: int) -> float:
    """The learning rate of a step.

    With w steps of warm-up, lowest = min_lr * lr and x = (step - w) / (total - w):
      step < w   lr (step + 1) / w
      cosine     lowest + (lr - lowest) (1 + cos(pi x)) / 2
      linear     lr + (lowest - lr) x
      constant   lr
      wsd        lr, and over the last decay_fraction of all steps linearly down to lowest (warm-up, stable, decay)

    Args:
        options: lr, schedule, warmup, min_lr, decay_fraction.
        step: Counts from 0.
        total: Steps of the run, > step.

    Returns:
        The learning rate.

    Source: the cosine is Loshchilov & Hutter, "SGDR", 2017; wsd is Hu et al., "MiniCPM", 2024.
    """
    warmup = warmup_steps(options, total)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    lowest = options.min_lr * options.lr
    share = (step - warmup) / max(1, total - warmup)
    if options.schedule == "cosine":
        return lowest + 0.5 * (options.lr - lowest) * (1.0 + math.cos(math.pi * share))
    if options.schedule == "linear":
        return options.lr + (lowest - options.lr) * share
    if options.schedule == "wsd":
        decaying = max(1, round(options.decay_fraction * total))
        begin = max(warmup, total - decaying)
        if step >= begin:
            return options.lr + (lowest - options.lr) * (step - begin + 1) / max(1, total - begin)
    return options.lr
