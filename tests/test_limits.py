"""What is given for `limits` is checked wherever something is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama_ext
from llama_ext.io.checkpoint import open_checkpoint
from llama_ext.training.token_file import TokenFile
from small_config import SMALL, config_of

READERS: dict[str, Callable[[Path, Any], object]] = {
    "a model": lambda folder, limits: llama_ext.LlamaForCausalLM.from_pretrained(folder, limits=limits),
    "a GGUF file": lambda folder, limits: llama_ext.LlamaForCausalLM.from_pretrained(folder / "a.gguf", limits=limits),
    "weights": lambda folder, limits: open_checkpoint(folder, limits),
    "a config": lambda folder, limits: llama_ext.LlamaConfig.from_pretrained(folder, limits=limits),
    "a config of a dict": lambda _, limits: llama_ext.LlamaConfig.from_dict(SMALL, limits=limits),
    "a config of arguments": lambda _, limits: llama_ext.LlamaConfig(limits=limits),
    "a tokenizer": lambda _, limits: llama_ext.Tokenizer.from_pretrained("demo", limits=limits),
    "an adapter": lambda folder, limits: llama_ext.LlamaForCausalLM(config_of()).load_adapter(folder, limits=limits),
    "tokens": lambda folder, limits: TokenFile(folder / "tokens", limits=limits),
    "a quantisation": lambda folder, limits: llama_ext.quantize(folder, folder / "new", limits=limits),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = llama_ext.LlamaForCausalLM(config_of(), seed=1)
    model.save_pretrained(folder)
    model.add_adapter("x", llama_ext.LoRA(r=2))
    model.save_adapter(folder, "x")
    llama_ext.convert("demo", folder / "a.gguf")
    return folder


@pytest.mark.parametrize("limits", [5, None, {"layers": 3}])
@pytest.mark.parametrize("reader", READERS)
def test_limits_of_another_type_are_refused(reader: str, limits: object, folder: Path) -> None:
    with pytest.raises(llama_ext.OptionError, match=f"limits must be a Limits.*got {type(limits).__name__}"):
        READERS[reader](folder, limits)
