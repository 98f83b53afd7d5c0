"""What a classifier has to beat: naive Bayes over n-grams of words or of characters, with Laplace's smoothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

__all__ = ["NaiveBayes"]


class NaiveBayes:
    """log p(label) + sum over a text's n-grams of log p(n-gram | label), where p counts each n-gram once more than it was seen.

    Args:
        longest: n-grams of 1 to this many parts.
        characters: Parts are characters, else words.
    """

    def __init__(self, longest: int, *, characters: bool) -> None:
        self._longest, self._characters = longest, characters
        self._seen: dict[str, Counter[tuple[str, ...]]] = {}
        self._texts: Counter[str] = Counter()

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> NaiveBayes:
        for text, label in zip(texts, labels, strict=True):
            self._texts[label] += 1
            self._seen.setdefault(label, Counter()).update(self._ngrams(text))
        return self

    def log_joint(self, text: str) -> dict[str, float]:
        """log p(label, text) for each label."""
        vocabulary = len(set().union(*self._seen.values()))
        result = {}
        for label, seen in self._seen.items():
            total = sum(seen.values()) + vocabulary
            likelihood = math.fsum(math.log((seen[ngram] + 1) / total) for ngram in self._ngrams(text))
            result[label] = math.log(self._texts[label] / sum(self._texts.values())) + likelihood
        return result

    def accuracy(self, texts: Sequence[str], labels: Sequence[str]) -> float:
        right = 0
        for text, label in zip(texts, labels, strict=True):
            scores = self.log_joint(text)
            right += max(scores, key=lambda each: scores[each]) == label
        return right / len(texts)

    def _ngrams(self, text: str) -> list[tuple[str, ...]]:
        parts = list(text) if self._characters else text.split()
        parts = ["<", *parts, ">"]
        sizes = range(1, self._longest + 1)
        return [tuple(parts[begin : begin + size]) for size in sizes for begin in range(len(parts) - size + 1)]
