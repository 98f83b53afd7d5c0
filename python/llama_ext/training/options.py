"""What `compile` takes: the optimiser, its schedule and the arithmetic, every value checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from llama_ext._arrays import as_whole
from llama_ext._options import number, shown, whole
from llama_ext.errors import OptionError

__all__ = ["DECAYS", "METRICS", "OPTIMIZERS", "PRECISIONS", "SCHEDULES", "TrainOptions"]

OPTIMIZERS = ("adamw", "adam", "sgd", "muon")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
DECAYS = ("matrices", "all")
PRECISIONS = ("float32", "bfloat16")
METRICS = ("accuracy", "perplexity")

# Momentum and whether it is Nesterov's, unless they are given.
_MOMENTUM = {"sgd": (0.9, False), "muon": (0.95, True)}


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Checked options; `LlamaForCausalLM.compile` says what each means.

    Raises:
        OptionError: An option is unknown, out of range, or belongs to another optimiser or schedule.
    """

    optimizer: str = "adamw"
    lr: float = 3e-4
    weight_decay: float = 0.1
    decay: str = "matrices"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    schedule: str = "cosine"
    warmup: int | float = 0
    clip_norm: float | None = 1.0
    precision: str = "float32"
    metrics: tuple[str, ...] = ("accuracy",)
    min_lr: float = 0.1
    decay_fraction: float = 0.2
    momentum: float | None = None
    nesterov: bool | None = None
    checkpoint_activations: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    skip_outliers: float | None = None

    def __post_init__(self) -> None:
        _word("optimizer", self.optimizer, OPTIMIZERS)
        _word("schedule", self.schedule, SCHEDULES)
        _word("decay", self.decay, DECAYS)
        _word("precision", self.precision, PRECISIONS)
        self._set("lr", number("lr", self.lr, above=0.0))
        self._set("weight_decay", number("weight_decay", self.weight_decay, minimum=0.0))
        self._set("betas", _betas(self.betas))
        self._set("eps", number("eps", self.eps, above=0.0))
        self._set("warmup", _warmup(self.warmup))
        if self.clip_norm is not None:
            self._set("clip_norm", number("clip_norm", self.clip_norm, above=0.0, advice="None does not clip"))
        self._set("min_lr", number("min_lr", self.min_lr, minimum=0.0, maximum=1.0, advice="it is a share of lr"))
        self._set("decay_fraction", number("decay_fraction", self.decay_fraction, above=0.0, maximum=1.0))
        self._set_momentum()
        for name in ("dropout", "attention_dropout"):
            self._set(name, number(name, getattr(self, name), minimum=0.0, below=1.0))
        if not isinstance(self.checkpoint_activations, bool):
            raise OptionError(f"checkpoint_activations must be True or False, got {shown(self.checkpoint_activations)}")
        if self.skip_outliers is not None:
            self._set(
                "skip_outliers",
                number("skip_outliers", self.skip_outliers, minimum=1.0, advice="it counts standard deviations"),
            )
        self._set("metrics", _metrics(self.metrics))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _set_momentum(self) -> None:
        default = _MOMENTUM.get(self.optimizer)
        if default is None:
            for name in ("momentum", "nesterov"):
                if getattr(self, name) is not None:
                    raise OptionError(f"{name} belongs to optimizer='sgd' or 'muon', got optimizer={self.optimizer!r}")
            return
        given = default[0] if self.momentum is None else self.momentum
        self._set("momentum", number("momentum", given, minimum=0.0, below=1.0))
        if self.nesterov is None:
            self._set("nesterov", default[1] and self.momentum != 0.0)
        elif not isinstance(self.nesterov, bool):
            raise OptionError(f"nesterov must be True or False, got {shown(self.nesterov)}")
        if self.nesterov and self.momentum == 0.0:
            raise OptionError("nesterov needs a momentum above 0")

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values, to be written into a checkpoint and compared with it."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def core_optimizer(self) -> dict[str, Any]:
        """The optimiser in the core's words."""
        words: dict[str, Any] = {
            "kind": self.optimizer,
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "decay": self.decay,
        }
        if self.momentum is not None:
            words["momentum"] = self.momentum
            words["nesterov"] = bool(self.nesterov)
        return words


def _word(name: str, value: object, words: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in words:
        raise OptionError(f"{name} must be one of {', '.join(words)}, got {shown(value)}")


def _betas(value: object) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise OptionError(f"betas must be two numbers in [0, 1), got {shown(value)}")
    first, second = (number(f"betas[{index}]", each, minimum=0.0, below=1.0) for index, each in enumerate(value))
    return first, second


def _warmup(value: object) -> int | float:
    steps = as_whole(value)
    if steps is not None:
        return whole("warmup", steps, 0)
    return number(
        "warmup", value, minimum=0.0, below=1.0, advice="a whole number counts steps, another one is a share of them"
    )


def _metrics(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise OptionError(f"metrics must be a list of {', '.join(METRICS)}, got {shown(value)}")
    for each in value:
        _word("metrics", each, METRICS)
    return tuple(value)
