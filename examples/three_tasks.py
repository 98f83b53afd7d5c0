"""Three tasks on one base: three adapters, each learned by itself, and a batch in which every row has its own.

python examples/three_tasks.py
"""

from __future__ import annotations

from small_model import small_model
from template_grammars import number_pairs, sentiment

import llama_ext


def tasks() -> dict[str, list[tuple[str, str]]]:
    """(prompt, answer) by task."""
    numbers = number_pairs(range(60))
    words = sentiment()[0][::4]
    return {
        "to Chinese": [(f"{english} = ", chinese) for english, chinese in numbers],
        "to English": [(f"{chinese} = ", english) for english, chinese in numbers],
        "sentiment": [(f"{text} = ", label) for text, label in words],
    }


def main() -> None:
    data = tasks()
    model = small_model((text for pairs in data.values() for pair in pairs for text in pair), width=64)
    for name, pairs in data.items():
        model.add_adapter(name, llama_ext.LoRA(r=16, alpha=32), seed=1)
        model.compile(lr=1e-2, weight_decay=0.0, warmup=0.1)
        history = model.fit(pairs, batch_size=16, epochs=30, seed=1, verbose=0)
        print(f"{name}: loss {history.steps[0].loss:.2f} -> {history.steps[-1].loss:.3f}")

    names = list(data)
    prompts = [data[name][7][0] for name in names]
    together = model.generate(prompts, adapter=names, max_new_tokens=16)
    for prompt, name, text in zip(prompts, names, together, strict=True):
        assert model.generate(prompt, adapter=name, max_new_tokens=16) == text, "a row gives what it gives alone"
        print(f"[{name}] {text}")


if __name__ == "__main__":
    main()
