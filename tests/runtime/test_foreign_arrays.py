"""Token ids in arrays of other libraries: `generate`, sessions and scores read what `model(ids)` reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import llama_ext

Model = llama_ext.LlamaForCausalLM


class Foreign:
    """An array that is no NumPy array, no sequence, and gives NumPy its numbers when asked, as torch's do."""

    def __init__(self, values: Any) -> None:
        self._values = np.asarray(values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._values


class Number(Foreign):
    """An array without axes, which is what iterating over such an array gives."""

    def __index__(self) -> int:
        return int(self._values)


class Elsewhere:
    """An array on a GPU that does not give its numbers away."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")


@pytest.mark.parametrize("ids", [[[1, 2]], [[1, 2], [3, 4]], [1, 2, 3]])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_an_array_of_another_library_gives_what_numpys_gives(ids: Any, dtype: Any, tiny: Model) -> None:
    expected = tiny.generate(np.array(ids), max_new_tokens=4)
    found = tiny.generate(Foreign(np.array(ids, dtype=dtype)), max_new_tokens=4)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


def test_a_mask_goes_with_it(tiny: Model) -> None:
    ids, mask = [[0, 1], [2, 3]], [[0, 1], [1, 1]]
    found = tiny.generate(Foreign(ids), attention_mask=Foreign(mask), max_new_tokens=4)
    np.testing.assert_array_equal(found, tiny.generate(np.array(ids), attention_mask=np.array(mask), max_new_tokens=4))


def test_a_list_of_them_is_a_list_of_rows(tiny: Model) -> None:
    expected = tiny.generate([[1, 2, 3], [4]], max_new_tokens=4)
    assert tiny.generate([Foreign([1, 2, 3]), Foreign([4])], max_new_tokens=4) == expected


def test_their_perplexity_is_that_of_a_list(tiny: Model) -> None:
    assert tiny.perplexity(Foreign([1, 2, 3])) == tiny.perplexity([1, 2, 3])  # type: ignore[arg-type]
    assert tiny.perplexity(Foreign([[1, 2], [3, 4]])) == tiny.perplexity([[1, 2], [3, 4]])  # type: ignore[arg-type]


def test_a_list_of_their_numbers_is_one_row(tiny: Model) -> None:
    assert tiny.generate([Number(1), Number(2)], max_new_tokens=4) == tiny.generate([1, 2], max_new_tokens=4)


def test_sessions_and_scores_read_them_too(tiny: Model) -> None:
    assert tiny.session().append(Foreign([1, 2])).tobytes() == tiny.session().append([1, 2]).tobytes()
    assert tiny.loglikelihood(Foreign([1, 2]), Foreign([3])) == tiny.loglikelihood([1, 2], [3])


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (Foreign([[1.0, 2.0]]), llama_ext.DTypeError, "integers, got float64"),
        (Foreign([1.0]), llama_ext.DTypeError, "integers, got float64"),
        (Foreign([[[1]]]), llama_ext.ShapeError, r"\(T,\) or \(B, T\), got \(1, 1, 1\)"),
        (Foreign(1), llama_ext.ShapeError, r"got \(\)"),
        (Foreign([67]), llama_ext.TokenIdError, r"input_ids\[0\] is 67"),
        ([Foreign([1]), "a"], llama_ext.DTypeError, r"prompts\[1\]"),
        (Elsewhere(), llama_ext.DTypeError, r"prompts.*got Elsewhere: can't convert cuda:0.*Copy it to the CPU first"),
        ([Elsewhere()], llama_ext.DTypeError, r"prompts\[0\].*Copy it to the CPU first"),
        (np.int64(5), llama_ext.DTypeError, "int64"),
    ],
)
def test_an_array_that_is_no_prompt_is_a_typed_error(
    prompt: Any, error: type[Exception], message: str, tiny: Model
) -> None:
    with pytest.raises(error, match=message):
        tiny.generate(prompt)
