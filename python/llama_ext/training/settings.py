"""What `fit` is called with: how much, how often, and where it is saved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llama_ext.errors import OptionError
from llama_ext.training.callbacks import Callback
from llama_ext.training.options import number, whole

__all__ = ["RunSettings"]


@dataclass(frozen=True)
class RunSettings:
    """Checked arguments of `fit`, which says what each means.

    Raises:
        OptionError: One is out of range or contradicts another one.
    """

    batch_size: int = 32
    epochs: int = 1
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
        for name in ("batch_size", "epochs", "grad_accum", "keep_last"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        for name in ("max_steps", "save_every", "validate_every"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name), 1))
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


def _listed(callbacks: object) -> tuple[Any, ...]:
    if isinstance(callbacks, Callback):
        return (callbacks,)
    if not isinstance(callbacks, Iterable):
        raise OptionError(
            f"callbacks must be a list of llama_ext.training.Callback objects, got {type(callbacks).__name__}"
        )
    return tuple(callbacks)
