"""What `fit` is called with: how much, how often, and where it is saved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ext._options import number, shown, whole
from llama_ext.errors import OptionError
from llama_ext.io.atomic import named
from llama_ext.training.callbacks import Callback

__all__ = ["RunSettings"]


@dataclass(frozen=True)
class RunSettings:
    """Checked arguments of `fit`, which says what each means.

    Raises:
        OptionError: One is out of range or contradicts another one.
    """

    batch_size: int = 32
    epochs: int | None = None
    max_steps: int | None = None
    grad_accum: int = 1
    seed: int = 0
    checkpoint_dir: str | os.PathLike[str] | None = None
    resume: str | os.PathLike[str] | bool | None = None
    callbacks: Sequence[Callback] = ()
    verbose: int = 1
    save_every: int | None = None
    keep_last: int = 3
    keep_best: bool = False
    validate_every: int | None = None
    overfit_batch: bool = False
    log_file: str | os.PathLike[str] | None = None
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accum", "keep_last"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        for name in ("epochs", "max_steps", "save_every", "validate_every"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        if self.max_steps is not None and self.epochs is not None:
            raise OptionError(
                f"epochs={shown(self.epochs)} and max_steps={shown(self.max_steps)} both say how long the run is: give one of them"
            )
        for name in ("keep_best", "overfit_batch"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        for name in ("checkpoint_dir", "log_file"):
            _check_path(name, getattr(self, name), "a path")
        if not isinstance(self.resume, bool):
            _check_path("resume", self.resume, "True, False or the path of a checkpoint")
        object.__setattr__(self, "seed", whole("seed", self.seed, 0, 2**64 - 1))
        object.__setattr__(
            self,
            "verbose",
            whole("verbose", int(self.verbose) if isinstance(self.verbose, bool) else self.verbose, 0, 1),
        )
        if self.peak_flops is not None:
            object.__setattr__(self, "peak_flops", number("peak_flops", self.peak_flops, above=0.0))
        # Not what was given: a generator would be used up by the check.
        object.__setattr__(self, "callbacks", _listed(self.callbacks))
        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                raise OptionError(
                    f"callbacks must be llama_ext.training.Callback objects, got {type(callback).__name__}"
                )
        if self.resume is True and self.checkpoint_dir is None:
            raise OptionError("resume=True goes on from the last checkpoint in checkpoint_dir, which is not given")
        if self.checkpoint_dir is None and (self.save_every is not None or self.keep_best):
            raise OptionError("save_every and keep_best need checkpoint_dir")

    def check(self, *, validates: bool) -> None:
        """What else can be told before anything is changed.

        Args:
            validates: Whether there is validation data.

        Raises:
            OptionError: An argument needs validation data.
            OSError: log_file cannot be written.
        """
        if not validates and (self.validate_every is not None or self.keep_best):
            raise OptionError("validate_every and keep_best need validation_data")
        if self.log_file is not None:
            Path(self.log_file).open("a", encoding="utf-8").close()


def _check_path(name: str, value: object, expected: str) -> None:
    if value is None:
        return
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise OptionError(f"{name} must be {expected}, got {shown(value)}")
    named(value)  # and what no name of a file may have


def _listed(callbacks: object) -> tuple[Any, ...]:
    if isinstance(callbacks, Callback):
        return (callbacks,)
    if not isinstance(callbacks, Iterable):
        raise OptionError(
            f"callbacks must be a list of llama_ext.training.Callback objects, got {type(callbacks).__name__}"
        )
    return tuple(callbacks)
