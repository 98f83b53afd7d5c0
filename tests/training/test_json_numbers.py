"""Every value that JSON can hold, and every float, comes back from a checkpoint as it was."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from llama_ext.training.json_numbers import packed, unpacked

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_what_is_packed_comes_back_from_json(value: object) -> None:
    text = json.dumps(packed(value), allow_nan=False)
    assert repr(unpacked(json.loads(text))) == repr(value)


def test_tuples_come_back_as_lists_and_other_objects_stay() -> None:
    assert unpacked(packed({"a": (1.0, math.inf)})) == {"a": [1.0, math.inf]}
    assert unpacked({"llama_ext.float": "1.0"}) == {"llama_ext.float": "1.0"}
    assert unpacked({"llama_ext.float": "inf", "more": 1}) == {"llama_ext.float": "inf", "more": 1}
