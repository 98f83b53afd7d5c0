"""Texts that one token decides, and small models that have learned so: what attribution has to find is known."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

import llama_ext
from grammars import example

LABELS = ["plain", "warm", "cold"]
KEYS = {"crimson": "warm", "azure": "cold"}
_OTHERS = "the of and to in is was for on are with as at be this have from or had by but some what there we can"


class Planted(NamedTuple):
    text: str
    label: str
    key: str  # "" for a plain text


@functools.cache
def texts(count: int, seed: int, *, has_plain: bool = True) -> tuple[Planted, ...]:
    """Texts of 6 to 14 words; a third has no key."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        words = rng.choice(_OTHERS.split(), int(rng.integers(6, 14))).tolist()
        key = "" if has_plain and index % 3 == 0 else str(rng.choice(list(KEYS)))
        if key:
            words.insert(int(rng.integers(0, len(words) + 1)), key)
        found.append(Planted(" ".join(words), KEYS.get(key, "plain"), key))
    return tuple(found)


TRAIN = texts(400, 0)
HELD_OUT = texts(40, 1, has_plain=False)


def base() -> llama_ext.LlamaForCausalLM:
    """A small random model that knows the words."""
    model: llama_ext.LlamaForCausalLM = example("small_model").small_model(
        [*(f"{each.text} = {each.label}" for each in TRAIN), *LABELS], words=True, width=48
    )
    return model


@functools.cache
def classifier() -> llama_ext.TextClassifier:
    """Trained, in less than a second; not to be changed."""
    found = llama_ext.TextClassifier(base(), LABELS)
    found.fit([each.text for each in TRAIN], [each.label for each in TRAIN], epochs=5, lr=3e-3, seed=1, verbose=0)
    return found


def prompt(each: Planted) -> str:
    return f"{each.text} ="


@functools.cache
def language_model() -> llama_ext.LlamaForCausalLM:
    """Trained to say the label; not to be changed."""
    model = base()
    model.compile(lr=3e-3, warmup=20)
    model.fit([(prompt(each), f" {each.label}") for each in TRAIN], epochs=8, batch_size=16, verbose=0)
    return model
