"""Classifiers on combinations that they have not seen: at least 98%, and never behind naive Bayes, which counts n-grams."""

from __future__ import annotations

import math
from collections import Counter

import pytest

import llama_ext
from grammars import example
from naive_bayes import NaiveBayes

GRAMMARS, SMALL = example("template_grammars"), example("small_model")
GATE = 0.98

Labelled = tuple[list[str], list[str]]


def split(task: str, language: str) -> tuple[Labelled, Labelled]:
    """Texts and labels to learn from, and held-out ones."""
    train, test = getattr(GRAMMARS, task)(language)
    return ([text for text, _ in train], [label for _, label in train]), (
        [text for text, _ in test],
        [label for _, label in test],
    )


def llama_accuracy(train: Labelled, test: Labelled) -> float:
    model = SMALL.small_model(train[0], words=True, width=64)
    classifier = llama_ext.TextClassifier(model, sorted(set(train[1])))
    classifier.fit(*train, epochs=12, lr=3e-3, seed=1, options={"dropout": 0.1}, verbose=0)
    accuracy: float = classifier.evaluate(*test).accuracy
    return accuracy


def bayes_accuracy(train: Labelled, test: Labelled, language: str) -> float:
    """The best of n-grams of several lengths, chosen on the held-out texts themselves, to its advantage."""
    kinds = [(longest, True) for longest in (1, 2, 3, 4, 5)]
    if language == "English":
        kinds += [(longest, False) for longest in (1, 2, 3)]
    return max(NaiveBayes(longest, characters=characters).fit(*train).accuracy(*test) for longest, characters in kinds)


@pytest.mark.parametrize("language", ["English", "Chinese"])
@pytest.mark.parametrize("task", ["sentiment", "news"])
def test_sentiment_and_topics_of_new_combinations_are_as_good_as_naive_bayes(task: str, language: str) -> None:
    train, test = split(task, language)
    accuracy = llama_accuracy(train, test)
    assert accuracy >= GATE
    assert accuracy >= bayes_accuracy(train, test, language)


@pytest.mark.parametrize("language", ["English", "Chinese"])
def test_denials_of_new_combinations_are_beyond_naive_bayes(language: str) -> None:
    train, test = split("denials", language)
    assert bayes_accuracy(train, test, language) <= 0.6
    assert llama_accuracy(train, test) >= GATE


@pytest.mark.parametrize("language", ["English", "Chinese"])
def test_no_part_of_a_denial_says_its_label(language: str) -> None:
    """Every frame and every word has as many texts of one label as of the other: what is left is how they go together."""
    (texts, labels), _ = split("denials", language)
    for part in [
        *(frame.split("{noun}")[0] for pair in GRAMMARS._CLAIMS[language] for frame in pair),
        *GRAMMARS._SENTIMENT[language]["nouns"],
    ]:
        found = Counter(label for text, label in zip(texts, labels, strict=True) if part in text)
        assert found["positive"] == found["negative"] > 0, part


def test_naive_bayes_is_the_formula() -> None:
    bayes = NaiveBayes(1, characters=False).fit(["good film", "good book", "bad film"], ["+", "+", "-"])
    # With both ends there are 8 and 4 words, of a vocabulary of 6: < > good bad film book.
    expected = math.log(2 / 3) + math.log(3 / 14) + math.log(3 / 14) + math.log(3 / 14) + math.log(2 / 14)
    assert bayes.log_joint("good film")["+"] == pytest.approx(expected)
    expected = math.log(1 / 3) + math.log(2 / 10) + math.log(2 / 10) + math.log(1 / 10) + math.log(2 / 10)
    assert bayes.log_joint("good film")["-"] == pytest.approx(expected)
    assert bayes.accuracy(["good film", "bad film"], ["+", "-"]) == 1.0
    # Bigrams tell apart what words alone cannot.
    orders = (["not good yes bad", "yes bad not good", "not bad yes good", "yes good not bad"], ["-", "-", "+", "+"])
    assert NaiveBayes(2, characters=False).fit(*orders).accuracy(*orders) == 1.0
