"""Sentiment in English and Chinese: a classifier learned from a template grammar, scored on combinations it has not seen.

python examples/classify_sentiment.py [--language Chinese] [--lora]
"""

from __future__ import annotations

import argparse
import tempfile

from small_model import small_model
from template_grammars import sentiment

import llama_ext


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--language", choices=("English", "Chinese"), default="English")
    parser.add_argument("--lora", action="store_true", help="train an adapter and the head; the base stays as it is")
    args = parser.parse_args()

    train, test = sentiment(args.language)
    base = small_model((text for text, _ in train + test), words=True)
    texts, labels = zip(*train, strict=True)
    if args.lora:
        # An adapter turns what the base knows towards a task: a base of random weights knows nothing.
        base.compile(lr=2e-3, warmup=20)
        base.fit(list(texts), epochs=8, batch_size=16)
    classifier = llama_ext.TextClassifier(base, labels=["positive", "negative"])
    adapter = llama_ext.LoRA(r=16, alpha=32) if args.lora else None
    classifier.fit(
        list(texts),
        list(labels),
        adapter=adapter,
        epochs=15,
        lr=5e-3 if args.lora else 2e-3,
        seed=1,
    )

    texts, labels = zip(*test, strict=True)
    print(classifier.evaluate(list(texts), list(labels)))
    for text, row in zip(texts[:4], classifier.predict_proba(list(texts[:4])), strict=True):
        print(f"{text!r}: positive {row[0]:.3f}, negative {row[1]:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        classifier.save(folder)
        again = llama_ext.TextClassifier.load(folder, base=base if args.lora else None)
        assert again.predict(list(texts)) == classifier.predict(list(texts))


if __name__ == "__main__":
    main()
