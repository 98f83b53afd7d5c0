"""Three tasks on one base, each in an adapter of its own: in a batch that mixes them, each is as good as alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import llama_ext
from grammars import example
from llama_ext import LoRA

GRAMMARS, SMALL = example("template_grammars"), example("small_model")
# Of held-out prompts, the share that is answered exactly: numbers are made of up to seven characters, labels are one word.
GATES = {"numbers": 0.95, "sentiment": 0.98, "topics": 0.98}

Pairs = list[tuple[str, str]]


class Trained(NamedTuple):
    """The base with its adapters, where all of them are saved, and held-out prompts with their answers by task."""

    model: llama_ext.LlamaForCausalLM
    folder: Path
    held_out: dict[str, Pairs]


def tasks() -> dict[str, tuple[Pairs, Pairs]]:
    """Prompts and answers to learn and held-out ones: English numbers to Chinese, praise or blame, topics of Chinese news."""
    parts = {
        "numbers": GRAMMARS.translations(numbers=1000, dates=0, held_out=0.3),
        "sentiment": GRAMMARS.sentiment("English"),
        "topics": GRAMMARS.news("Chinese"),
    }
    return {
        name: tuple([(f"{text} =", f" {answer}") for text, answer in part] for part in both)
        for name, both in parts.items()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The base has read texts of all kinds and no answers to them; each adapter has seen its own task alone."""
    data = tasks()
    learned = [pair for train, _ in data.values() for pair in train]
    model = SMALL.small_model(("".join(pair) for pair in learned), words=True, width=64, spread=0.12)
    model.compile(lr=3e-3, warmup=0.1)
    texts = [text for prompt, answer in learned for text in (prompt.removesuffix(" ="), answer)]
    model.fit(texts, batch_size=32, epochs=6, seed=1, verbose=0)
    folder = tmp_path_factory.mktemp("tasks")
    model.save_pretrained(folder / "base")
    for name, (train, _) in data.items():
        model.add_adapter(name, LoRA(r=32, alpha=64), seed=1)
        model.compile(lr=4e-3, weight_decay=0.0, warmup=0.1)
        model.fit(train, batch_size=16, epochs=10 if name == "numbers" else 20, seed=1, verbose=0)
        model.save_adapter(folder / name, name)
    model.set_adapter(None)
    return Trained(model, folder, {name: held_out for name, (_, held_out) in data.items()})


def answers(model: llama_ext.LlamaForCausalLM, prompts: list[str], names: list[str]) -> list[str]:
    found: list[str] = model.generate(prompts, adapter=names, max_new_tokens=12, do_sample=False)
    return [text.removeprefix(prompt) for text, prompt in zip(found, prompts, strict=True)]


def share(found: list[str], pairs: Pairs) -> float:
    return float(np.mean([text == answer for text, (_, answer) in zip(found, pairs, strict=True)]))


def mixed(trained: Trained, adapter_of: dict[str, str]) -> dict[str, list[str]]:
    """Answers by task, of one call whose prompts are in any order, each with its adapter."""
    rows = [(task, index) for task, pairs in trained.held_out.items() for index in range(len(pairs))]
    random.Random(0).shuffle(rows)
    prompts = [trained.held_out[task][index][0] for task, index in rows]
    found = dict(zip(rows, answers(trained.model, prompts, [adapter_of[task] for task, _ in rows]), strict=True))
    return {task: [found[task, index] for index in range(len(pairs))] for task, pairs in trained.held_out.items()}


@pytest.mark.slow
def test_each_of_three_adapters_is_as_good_in_a_mixed_batch_as_alone(trained: Trained) -> None:
    together = mixed(trained, {name: name for name in GATES})
    for name, pairs in trained.held_out.items():
        alone = llama_ext.LlamaForCausalLM.from_pretrained(trained.folder / "base")
        alone.load_adapter(trained.folder / name, name)
        found = answers(alone, [prompt for prompt, _ in pairs], [name] * len(pairs))
        assert share(found, pairs) >= GATES[name], name
        assert share(together[name], pairs) == share(found, pairs), name
        assert together[name] == found, name


@pytest.mark.slow
def test_another_task_s_adapter_answers_nothing_right(trained: Trained) -> None:
    """So the adapters, and not the base, are what answers; and a row that got another's would show."""
    names = list(GATES)
    found = mixed(trained, dict(zip(names, [*names[1:], names[0]], strict=True)))
    for name, pairs in trained.held_out.items():
        assert share(found[name], pairs) <= 0.1, name
