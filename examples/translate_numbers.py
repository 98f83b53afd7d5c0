"""Numbers and dates between English and Chinese: a translator learned from half of the values, scored on the other half.

python examples/translate_numbers.py [--source Chinese]
"""

from __future__ import annotations

import argparse

from small_model import small_model
from template_grammars import translations

import llama_ext

# A short prompt, as this model has to learn every word of it.
PROMPT = "{source}: {text}\n{target}:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", choices=("English", "Chinese"), default="English")
    parser.add_argument("--numbers", type=int, default=10_000, help="numbers below this one")
    parser.add_argument("--dates", type=int, default=2_000, help="how many dates")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--scored", type=int, default=1_000, help="how many held-out values are translated")
    args = parser.parse_args()

    train, test = translations(numbers=args.numbers, dates=args.dates, held_out=0.5)
    if args.source == "Chinese":
        train, test = ([(chinese, english) for english, chinese in pairs] for pairs in (train, test))
    target = "Chinese" if args.source == "English" else "English"
    base = small_model([*(text for pair in train for text in pair), "English: \nChinese: "], words=True, width=64)
    translator = llama_ext.Translator(base, args.source, target, prompt=PROMPT)
    translator.fit(train, epochs=args.epochs, lr=3e-3, batch_size=16, seed=1)
    for text, right in test[:5]:
        print(f"{text}: {translator.translate(text)} (right: {right})")
    scored = test[: args.scored]
    # Of short texts look at chrF and at what is exactly right: BLEU counts four words at a stretch, and an English date has three.
    for name, dates in (("numbers", False), ("dates", True)):
        pairs = [pair for pair in scored if ("年" in "".join(pair)) == dates]
        if pairs:
            print(f"{name}:\n{translator.evaluate(pairs, num_beams=1)}")


if __name__ == "__main__":
    main()
