"""`LoRA`: which matrices an adapter changes, and how much; the meaning of every field is PEFT's."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from llama_ext._arrays import as_whole, is_whole
from llama_ext._options import shown
from llama_ext.errors import FormatError, OptionError, UnsupportedError
from llama_ext.limits import DEFAULT_LIMITS
from llama_ext.models.config import LlamaConfig
from llama_ext.models.llama import HEAD_MODULES, adaptable_modules
from llama_ext.models.module_patterns import NamePatterns

__all__ = ["ALL_LINEAR", "LoRA"]

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class LoRA:
    """A low-rank adapter: y = W x + scale B (A x), with scale = alpha / r.

    Names of modules are Hugging Face's, such as "model.layers.0.self_attn.q_proj". A pattern's key is a regular expression that
    matches such a name or its end after a dot, so "q_proj" and "layers.0.mlp.up_proj" are patterns; the first one that matches counts.

    Args:
        r: Rank of A and B, >= 1.
        alpha: Numerator of the scale.
        targets: "all-linear": q, k, v, o, gate, up and down of every layer; a list of names or ends of names after a dot
            (["q_proj", "v_proj"]); or one regular expression that matches whole names.
        rslora: Whether the scale is alpha / sqrt(r) instead (rank-stabilised LoRA).
        dropout: Probability in [0, 1) of dropping an input of A while training.
        rank_pattern: {pattern: r} for modules with another rank.
        alpha_pattern: {pattern: alpha} for modules with another numerator.
        exclude: Names or ends of names, or one regular expression: what `targets` shall not mean.
        layers: Indices of the layers to adapt, when `targets` is a list; None: all.

    Raises:
        OptionError: A value is of the wrong type or out of range.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; Kalajdzievski, "A Rank Stabilization Scaling
    Factor for Fine-Tuning with LoRA", 2023.
    """

    r: int = 8
    alpha: float = 16
    targets: str | Sequence[str] = ALL_LINEAR
    rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    exclude: str | Sequence[str] | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        most = DEFAULT_LIMITS.width
        given: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        dropout = _number("dropout", given["dropout"])
        targets = _texts("targets", given["targets"])
        if not isinstance(given["rslora"], bool):
            _refuse("rslora", "True or False", given["rslora"])
        if not 0 <= dropout < 1:
            _refuse("dropout", "a number in [0, 1)", dropout)
        if not targets:
            _refuse("targets", "at least one name", given["targets"])
        ranks = _mapping("rank_pattern", given["rank_pattern"])
        alphas = _mapping("alpha_pattern", given["alpha_pattern"])
        checked = {
            "r": _whole("r", given["r"], 1, most),
            "alpha": _number("alpha", given["alpha"]),
            "dropout": dropout,
            "targets": targets,
            "exclude": None if given["exclude"] is None else _texts("exclude", given["exclude"]),
            "layers": None if given["layers"] is None else _layers(given["layers"], targets),
            "rank_pattern": {key: _whole(f"rank_pattern[{key!r}]", value, 1, most) for key, value in ranks.items()},
            "alpha_pattern": {key: _number(f"alpha_pattern[{key!r}]", value) for key, value in alphas.items()},
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def resolve(self, config: LlamaConfig, *, path: str | None = None) -> dict[str, tuple[int, float]]:
        """The matrices of a model that this adapts.

        Args:
            config: The model.
            path: The file it is from, for messages; None: mistakes are an argument's.

        Returns:
            By the core's slot, in the order of the model: rank and scale.

        Raises:
            OptionError, FormatError: A pattern is no regular expression, or nothing is adapted.
            UnsupportedError: It wants to adapt the embedding or the head, or a pattern uses what is not supported.
            LimitError: A pattern is too long.
        """
        try:
            return self._resolve(config, path)
        except FormatError as error:
            if path is not None:
                raise
            raise OptionError(f"LoRA: {error.message}") from error

    def _resolve(self, config: LlamaConfig, path: str | None) -> dict[str, tuple[int, float]]:
        chosen = _Chooser("targets" if path is None else "target_modules", self.targets, path)
        excluded = None
        if self.exclude:
            excluded = _Chooser("exclude" if path is None else "exclude_modules", self.exclude, path)
        ranks = NamePatterns(self.rank_pattern, path=path, field="rank_pattern")
        alphas = NamePatterns(self.alpha_pattern, path=path, field="alpha_pattern")
        for module in HEAD_MODULES:
            if self.targets != ALL_LINEAR and chosen(module) and not (excluded and excluded(module)):
                where = f"{path}: " if path else ""
                raise UnsupportedError(
                    f"{where}an adapter of {module} is not supported: adapt the layers' projections."
                )
        result: dict[str, tuple[int, float]] = {}
        for module, (slot, layer) in adaptable_modules(config).items():
            if not chosen(module) or (excluded and excluded(module)):
                continue
            # As PEFT: a module that is named whole is meant whatever `layers` says.
            if self.layers is not None and layer not in self.layers and module not in self.targets:
                continue
            key = ranks.match_end(module)
            rank = self.r if key is None else self.rank_pattern[key]
            key = alphas.match_end(module)
            alpha = self.alpha if key is None else self.alpha_pattern[key]
            result[slot] = (rank, float(alpha) / (math.sqrt(rank) if self.rslora else rank))
        if not result:
            raise FormatError(self._nothing(config), path=path, field="target_modules", got=shown(self.targets))
        if path is None and not isinstance(self.targets, str):
            self._check_each_target(config)
        return result

    def _nothing(self, config: LlamaConfig) -> str:
        names = sorted({module.rpartition(".")[2] for module in adaptable_modules(config)})
        advice = ""
        if isinstance(self.targets, str):
            advice = (
                " A str is a regular expression of the whole name of a module, such as '.*q_proj'; names are a list."
            )
        return (
            f"no matrix of the model is meant by targets {shown(self.targets)}.{advice} There are: {', '.join(names)}."
        )

    def _check_each_target(self, config: LlamaConfig) -> None:
        """A name that means nothing is a mistake where somebody wrote it by hand; PEFT's files may have some."""
        modules = list(adaptable_modules(config))
        for target in self.targets:
            if not any(module == target or module.endswith(f".{target}") for module in modules):
                known = sorted({module.rpartition(".")[2] for module in modules})
                near = difflib.get_close_matches(target, known, n=1)
                advice = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."
                raise OptionError(f"LoRA: the model has no matrix {target!r}. {advice}")


class _Chooser:
    """Whether a module is meant by names or by a regular expression."""

    def __init__(self, field: str, wanted: str | Sequence[str], path: str | None) -> None:
        self._everything = wanted == ALL_LINEAR
        self._pattern = NamePatterns([wanted], path=path, field=field) if isinstance(wanted, str) else None
        self._names = frozenset() if isinstance(wanted, str) else frozenset(wanted)

    def __call__(self, module: str) -> bool:
        if self._everything:
            return True
        if self._pattern is not None:
            return self._pattern.fullmatch(module) is not None
        parts = module.split(".")
        return any(".".join(parts[first:]) in self._names for first in range(len(parts)))


def _whole(name: str, value: object, least: int, most: int) -> int:
    number = as_whole(value)
    if number is None or not least <= number <= most:
        _refuse(name, f"a whole number from {least} to {most}", value)
    return number


def _number(name: str, value: object) -> float:
    """A finite number; a whole one stays one, as PEFT's files say 16, not 16.0."""
    whole = as_whole(value)
    if whole is not None and abs(whole) < 1 << 53:
        return whole
    number = float(value) if whole is None and isinstance(value, (float, np.floating)) else math.nan
    if not math.isfinite(number):
        _refuse(name, "a finite number", value)
    return number


def _texts(name: str, value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value
    texts = tuple(value) if isinstance(value, Iterable) else (None,)
    names = tuple(text for text in texts if isinstance(text, str))
    if len(names) != len(texts):
        _refuse(name, "a text or a list of names", value)
    return names


def _layers(value: object, targets: object) -> tuple[int, ...]:
    if isinstance(targets, str):
        _refuse("targets", "a list of names where layers are given", targets)
    layers: object = [value] if is_whole(value) else value
    if not isinstance(layers, Iterable):
        _refuse("layers", "indices of layers", value)
    return tuple(_whole("layers", layer, 0, DEFAULT_LIMITS.layers) for layer in layers)


def _mapping(name: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        _refuse(name, "a mapping of patterns to numbers", value)
    return value


def _refuse(name: str, expected: str, got: object) -> NoReturn:
    raise OptionError(f"LoRA: {name} must be {expected}, got {shown(got)}")
