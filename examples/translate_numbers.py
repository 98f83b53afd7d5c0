"""English numbers and dates into Chinese: a translator learned from pairs, scored on values it has not seen.

python examples/translate_numbers.py [--numbers 1000]
"""

from __future__ import annotations

import argparse

from small_model import small_model
from template_grammars import translations

import llama_ext


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numbers", type=int, default=300, help="numbers below this one")
    parser.add_argument("--dates", type=int, default=300, help="how many dates")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    train, test = translations(numbers=args.numbers, dates=args.dates)
    prompt = "{source}: {text}\n{target}:"  # a short prompt: this model has to learn every character of it
    base = small_model([*(text for pair in train + test for text in pair), "English: \nChinese: "])
    translator = llama_ext.Translator(base, "English", "Chinese", prompt=prompt)
    translator.fit(train, epochs=args.epochs, lr=3e-3, seed=1)
    for text, right in test[:5]:
        print(f"{text}: {translator.translate(text)} (right: {right})")
    print(translator.evaluate(test, num_beams=1))


if __name__ == "__main__":
    main()
