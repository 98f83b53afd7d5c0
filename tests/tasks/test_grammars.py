"""The grammars hold out what they say, and their numbers and dates are right."""

from __future__ import annotations

import pytest

from grammars import example

GRAMMARS = example("template_grammars")


@pytest.mark.parametrize("language", ["English", "Chinese"])
@pytest.mark.parametrize("task", ["sentiment", "denials", "news"])
def test_held_out_texts_are_new_but_made_of_known_words(task: str, language: str) -> None:
    train, test = getattr(GRAMMARS, task)(language)
    assert not {text for text, _ in train} & {text for text, _ in test}
    assert {label for _, label in train} == {label for _, label in test}
    assert len(test) >= 0.1 * len(train)
    assert set("".join(text for text, _ in test)) <= set("".join(text for text, _ in train))
    assert getattr(GRAMMARS, task)(language) == (train, test), "the same seed gives the same texts"
    assert getattr(GRAMMARS, task)(language, seed=1) != (train, test)


@pytest.mark.parametrize(
    ("value", "english", "chinese"),
    [
        (0, "zero", "零"),
        (7, "seven", "七"),
        (10, "ten", "十"),
        (13, "thirteen", "十三"),
        (20, "twenty", "二十"),
        (45, "forty-five", "四十五"),
        (100, "one hundred", "一百"),
        (105, "one hundred and five", "一百零五"),
        (110, "one hundred and ten", "一百一十"),
        (999, "nine hundred and ninety-nine", "九百九十九"),
        (1000, "one thousand", "一千"),
        (2017, "two thousand and seventeen", "二千零一十七"),
        (3050, "three thousand and fifty", "三千零五十"),
        (4500, "four thousand five hundred", "四千五百"),
        (6001, "six thousand and one", "六千零一"),
    ],
)
def test_numbers_in_words(value: int, english: str, chinese: str) -> None:
    assert GRAMMARS.english_number(value) == english
    assert GRAMMARS.chinese_number(value) == chinese


def test_words_name_one_number_each() -> None:
    for words in (GRAMMARS.english_number, GRAMMARS.chinese_number):
        assert len({words(value) for value in range(10_000)}) == 10_000


def test_dates() -> None:
    assert GRAMMARS.english_date(2021, 3, 5) == "5 March 2021"
    assert GRAMMARS.chinese_date(2021, 3, 5) == "二〇二一年三月五日"
    assert GRAMMARS.chinese_date(1999, 12, 28) == "一九九九年十二月二十八日"


def test_translations_hold_out_values() -> None:
    train, test = GRAMMARS.translations(numbers=100, dates=50)
    assert len(train) + len(test) == 150
    assert len(test) == 15
    assert not set(train) & set(test)
