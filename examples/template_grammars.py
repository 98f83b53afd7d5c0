"""Small grammars that make labelled texts and translations, with combinations that are held out: for the examples and tests.

Everything follows from a seed. What is held out is never seen in training, though every word of it is.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

Labelled = tuple[str, str]

_SENTIMENT = {
    "English": {
        "frames": ["the {noun} was {word}", "i found the {noun} {word}", "what a {word} {noun}", "{word}, this {noun}"],
        "nouns": ["film", "book", "meal", "hotel", "song", "teacher", "phone", "garden"],
        "positive": ["wonderful", "great", "lovely", "superb", "charming", "perfect"],
        "negative": ["terrible", "dull", "awful", "boring", "horrid", "poor"],
    },
    "Chinese": {
        "frames": ["这{noun}真{word}", "我觉得{noun}很{word}", "{noun}太{word}了", "多么{word}的{noun}"],
        "nouns": ["电影", "书", "饭菜", "酒店", "歌", "老师", "手机", "花园"],
        "positive": ["精彩", "好", "可爱", "出色", "迷人", "完美"],
        "negative": ["糟糕", "无聊", "难看", "可怕", "差", "讨厌"],
    },
}
# A claim, and the same denied: what comes between the denial and the word is longer than the n-grams that are usually counted.
_CLAIMS = {
    "English": [
        ("i would call the {noun} {word}", "i would not call the {noun} {word}"),
        ("all of us found that {noun} {word}", "none of us found that {noun} {word}"),
        ("anyone would say the {noun} was {word}", "no one would say the {noun} was {word}"),
    ],
    "Chinese": [
        ("我觉得这一次的{noun}{word}", "我不觉得这一次的{noun}{word}"),
        ("大家都说那里的{noun}{word}", "没有人说那里的{noun}{word}"),
        ("我会把那个{noun}叫做{word}", "我不会把那个{noun}叫做{word}"),
    ],
}
_NEWS = {
    "English": {
        "sport": (["the team", "a runner", "the coach"], ["won the match", "lost the final", "scored twice"]),
        "economy": (["the bank", "a company", "the market"], ["raised its rates", "sold its shares", "cut its prices"]),
        "weather": (["a storm", "heavy rain", "the heat"], ["reached the coast", "ended at night", "will last a week"]),
    },
    "Chinese": {
        "sport": (["球队", "运动员", "教练"], ["赢了比赛", "输了决赛", "两次得分"]),
        "economy": (["银行", "公司", "市场"], ["提高了利率", "卖出了股票", "降低了价格"]),
        "weather": (["台风", "大雨", "高温"], ["到达了海岸", "夜里结束", "将持续一周"]),
    },
}
_WHEN = {"English": ["today", "on monday", "in may", "this year"], "Chinese": ["今天", "星期一", "五月", "今年"]}

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]
_ONES += ["seventeen", "eighteen", "nineteen"]
_TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_DIGITS = "零一二三四五六七八九"
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


def sentiment(
    language: str = "English", *, held_out: float = 0.2, seed: int = 0
) -> tuple[list[Labelled], list[Labelled]]:
    """Texts and whether they are "positive" or "negative"; combinations of a noun and a word are held out whole."""
    grammar = _SENTIMENT[language]
    train: list[Labelled] = []
    test: list[Labelled] = []
    for label in ("positive", "negative"):
        pairs = list(itertools.product(grammar["nouns"], grammar[label]))
        chosen = _held_out(pairs, held_out, f"{seed}/{label}")
        for noun, word in pairs:
            texts = [(frame.format(noun=noun, word=word), label) for frame in grammar["frames"]]
            (test if (noun, word) in chosen else train).extend(texts)
    return train, test


def denials(
    language: str = "English", *, held_out: float = 0.2, seed: int = 0
) -> tuple[list[Labelled], list[Labelled]]:
    """Claims with a word of praise or blame, and their denials, which turn the label around; labels as in `sentiment`.

    Every word is as often in texts of one label as in texts of the other, and so is every frame: only both together say which.
    Combinations of a noun and a word are held out whole.
    """
    grammar = _SENTIMENT[language]
    train: list[Labelled] = []
    test: list[Labelled] = []
    for label, other in (("positive", "negative"), ("negative", "positive")):
        pairs = list(itertools.product(grammar["nouns"], grammar[label]))
        chosen = _held_out(pairs, held_out, f"{seed}/denials/{label}")
        for noun, word in pairs:
            for claim, denial in _CLAIMS[language]:
                texts = [(claim.format(noun=noun, word=word), label), (denial.format(noun=noun, word=word), other)]
                (test if (noun, word) in chosen else train).extend(texts)
    return train, test


def news(language: str = "English", *, held_out: float = 0.2, seed: int = 0) -> tuple[list[Labelled], list[Labelled]]:
    """Headlines and their topics: "sport", "economy", "weather"; combinations of who and what are held out whole."""
    train: list[Labelled] = []
    test: list[Labelled] = []
    for topic, (who, what) in _NEWS[language].items():
        pairs = list(itertools.product(who, what))
        chosen = _held_out(pairs, held_out, f"{seed}/{topic}")
        for subject, verb in pairs:
            for when in _WHEN[language]:
                text = f"{when}{subject}{verb}" if language == "Chinese" else f"{subject} {verb} {when}"
                (test if (subject, verb) in chosen else train).append((text, topic))
    return train, test


def _held_out(pairs: list[tuple[str, str]], share: float, seed: str) -> set[tuple[str, str]]:
    count = max(1, round(share * len(pairs)))
    return set(random.Random(seed).sample(pairs, count))


def english_number(value: int) -> str:
    """A number in [0, 9999] in words: "two thousand and seventeen"."""
    if value < 20:
        return _ONES[value]
    if value < 100:
        return _TENS[value // 10] + (f"-{_ONES[value % 10]}" if value % 10 else "")
    if value < 1000:
        rest = f" and {english_number(value % 100)}" if value % 100 else ""
        return f"{_ONES[value // 100]} hundred{rest}"
    rest = value % 1000
    joint = "" if not rest else " and " if rest < 100 else " "
    return f"{_ONES[value // 1000]} thousand{joint}{english_number(rest) if rest else ''}"


def chinese_number(value: int) -> str:
    """A number in [0, 9999] in Chinese characters: "二千零一十七"."""
    if value < 10:
        return _DIGITS[value]
    if value < 20:
        return "十" + (_DIGITS[value % 10] if value % 10 else "")
    text, zero = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = value // unit % 10
        if digit:
            text += ("零" if zero else "") + _DIGITS[digit] + name
            zero = False
        elif text:
            zero = True
    return text


def english_date(year: int, month: int, day: int) -> str:
    """ "5 March 2021"."""
    return f"{day} {_MONTHS[month - 1]} {year}"


def chinese_date(year: int, month: int, day: int) -> str:
    """ "二〇二一年三月五日"."""
    digits = "".join("〇" if digit == "0" else _DIGITS[int(digit)] for digit in str(year))
    return f"{digits}年{chinese_number(month)}月{chinese_number(day)}日"


def number_pairs(values: Iterable[int]) -> list[tuple[str, str]]:
    """(English, Chinese) of numbers."""
    return [(english_number(value), chinese_number(value)) for value in values]


def translations(
    *, numbers: int = 1000, dates: int = 600, held_out: float = 0.1, seed: int = 0
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Numbers below `numbers` and random dates from 1950 to 2049 in English and Chinese; values are held out whole."""
    rng = random.Random(seed)
    everything = set(itertools.product(range(1950, 2050), range(1, 13), range(1, 29)))
    chosen = rng.sample(sorted(everything), dates)
    pairs = number_pairs(range(numbers)) + [(english_date(*date), chinese_date(*date)) for date in chosen]
    rng.shuffle(pairs)
    count = round(held_out * len(pairs))
    return pairs[count:], pairs[:count]
