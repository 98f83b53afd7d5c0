"""Patterns on the names of modules match as `re` does, and none takes long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ext.errors import FormatError, LimitError, UnsupportedError
from llama_ext.models.module_patterns import NamePatterns

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 10, 21)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")
]
PATTERNS = [
    r".*\.(q|v)_proj",
    r".*layers\.(0|1\d)\..*q_proj",
    r"model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    r".*\.layers\.(?!1\.).*gate_proj",
    r".*(?:gate|up)_proj$",
    r"^model\.layers\.1\b.*",
    r"model.layers.[^0-9]*",
    r"(.*\.){3}[a-z]+_attn\.\w{6}",
    r"(?P<all>model).*?up_proj",
    r"[^.]+\.[^.]+\.2[0-9]?\..+",
    r"q_proj",
    r"layers.1.self_attn.q_proj",
    r"layers?.1.self_attn.q_proj",
    "",
    r"q_proj|gate_proj",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_whole_names_as_re_does(pattern: str) -> None:
    found = NamePatterns([pattern])
    assert [name for name in NAMES if found.fullmatch(name) is not None] == [
        name for name in NAMES if re.fullmatch(pattern, name)
    ]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_ends_of_names_as_peft_does(pattern: str) -> None:
    found = NamePatterns([pattern])
    assert [name for name in NAMES if found.match_end(name) is not None] == [
        name for name in NAMES if re.match(rf"(.*\.)?({pattern})$", name)
    ]


ATOMS = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", r"\d", "^", "$", r"\b", "(?=a)", "(?!b)"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(EXPRESSIONS, st.text("ab.1", max_size=8))
def test_any_pattern_matches_as_re_does(pattern: str, name: str) -> None:
    assert (NamePatterns([pattern]).fullmatch(name) is not None) == (re.fullmatch(pattern, name) is not None)
    expected = re.match(rf"(?:.*\.)?(?:{pattern})\Z", name)
    assert (NamePatterns([pattern]).match_end(name) is not None) == (expected is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "((a*)*)*b",
        "(a|a)*b",
        "(((a?){9}){9}){9}b",
        "a{65535}" * 20,
        "(" * 40 + "a*" + ")*" * 40 + "b",
        ".*" * 300 + "x",
    ],
    ids=range(7),
)
def test_no_pattern_takes_long(pattern: str) -> None:
    started = time.perf_counter()
    try:
        found = NamePatterns([pattern])
        for _ in range(20):
            assert found.fullmatch("a" * 60) is None
    except (LimitError, UnsupportedError):
        pass
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("pattern", "error", "words"),
    [
        ("(", FormatError, "regular expression"),
        ("*a", FormatError, "regular expression"),
        (r"(a)\1", UnsupportedError, "groupref"),
        ("(?i)a", UnsupportedError, "flag"),
        ("(?i:a)", UnsupportedError, "flag"),
        ("(?<=a)b", UnsupportedError, "look behind"),
        ("(" * 60 + "a" + ")" * 60, UnsupportedError, "nested"),
        ("(" * 480 + "a" + ")" * 480, (UnsupportedError, LimitError), "nested"),
        ("(a)" * 400, LimitError, "1200 characters"),
    ],
)
def test_what_is_not_followed_is_refused(
    pattern: str, error: type[Exception] | tuple[type[Exception], ...], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        NamePatterns([pattern], path="adapter_config.json", field="target_modules")
    assert "adapter_config.json" in str(caught.value)
    assert "target_modules" in str(caught.value)
