"""A user's script is type-checked against what the package says: no Any where a text comes out, no None to be argued away."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

mypy = pytest.importorskip("mypy.api", reason="mypy comes with the extra `dev`, not with `test`")

ROOT = Path(__file__).resolve().parents[2]
TYPES = """
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

import llama_ext
from llama_ext import GenerationOutput

model = llama_ext.LlamaForCausalLM.from_pretrained("demo")
ids: npt.NDArray[np.int32] = np.array([[1, 2]], dtype=np.int32)
asked: bool = input() == "details"


class OtherLibrary:
    def __array__(self, dtype: Any = None, copy: Any = None) -> npt.NDArray[Any]:
        return np.array([1, 2])


assert_type(model.generate("a", temperature=0.5), str)
assert_type(model.generate("a", num_return_sequences=2, temperature=0.5), str | list[str])
assert_type(model.generate(["a"], num_return_sequences=2, temperature=0.5), list[str])
assert_type(model.generate(("a", "b")), list[str])
assert_type(model.generate([1, 2]), list[int])
assert_type(model.generate([1, 2], num_return_sequences=2, top_k=5), list[int] | list[list[int]])
assert_type(model.generate([[1], [2, 3]]), list[list[int]])
assert_type(model.generate([np.array([1]), np.array([2, 3])]), list[list[int]])
assert_type(model.generate(ids, attention_mask=ids > 0), npt.NDArray[np.int64])
assert_type(model.generate(np.array([1])), npt.NDArray[np.int64])
assert_type(model.generate(OtherLibrary()), npt.NDArray[np.int64])
assert_type(model.generate("a", return_details=True), GenerationOutput)
assert_type(model.generate([1], return_details=True), GenerationOutput)
assert_type(model.generate(["a"], return_details=True), list[GenerationOutput])
found = model.generate("a", return_details=asked)
assert not isinstance(found, str) or found.startswith("a")

messages = [{"role": "user", "content": "a"}]
tokenizer = llama_ext.Tokenizer.from_pretrained("demo")
assert_type(tokenizer.apply_chat_template(messages), list[int])
assert_type(tokenizer.apply_chat_template(messages, tokenize=False), str)
assert_type(tokenizer.apply_chat_template(messages, tokenize=asked, tools=[]), list[int] | str)
model(OtherLibrary())
print(model.tokenizer.encode("a"))
"""
MISTAKES = """
import llama_ext

model = llama_ext.LlamaForCausalLM.from_pretrained("demo")
model.generate("a", max_new_token=3)
model.generate("a", max_new_tokens="3")
model.tokenizer.encod("a")
"""


def check(script: str, folder: Path) -> str:
    """What mypy says of a script, "" for nothing."""
    path = folder / "script.py"
    path.write_text(script, encoding="utf-8")
    # Away from the repository, whose settings are for the package.
    options = ["--strict", "--config-file=", "--no-error-summary", f"--cache-dir={folder / 'cache'}"]
    output, errors, _ = mypy.run([*options, str(path)])
    assert not errors
    return str(output)


def test_results_have_the_type_that_follows_from_the_prompt(tmp_path: Path) -> None:
    assert check(TYPES, tmp_path) == ""


def test_mistakes_are_found_before_the_script_runs(tmp_path: Path) -> None:
    found = re.findall(r"script\.py:(\d+): error", check(MISTAKES, tmp_path))
    assert sorted(set(found)) == ["5", "6", "7"]


@pytest.mark.parametrize("guide", ["README.md", "docs/running.md"])
def test_the_examples_pass_the_strict_check(guide: str, tmp_path: Path) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert check("\n".join(blocks), tmp_path) == ""
