"""What is packed for a file is what a model that is loaded asks for: with gate and up joined, wherever adapters had them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_models
import llama_ext
from llama_ext import _core
from llama_ext.errors import CheckpointError, UnsupportedError
from random_models import CONFIG, build, tokens
from tolerances import assert_same_bits

Plan = dict[str, tuple[str, int]]

# By the last word of a slot; "" for the others.
PLANS: dict[str, Plan] = {
    "float32": {"": ("float32", 0)},
    "bfloat16": {"": ("bfloat16", 0)},
    "int8": {"": ("int8", 128)},
    "int4_min": {"": ("int4_min", 32)},
    "gate and up of two types": {"": ("int8", 32), "gate": ("int4", 32)},
    "of two types in layer 0 alone": {"": ("int8", 32), "layers.0.gate": ("int4", 32)},
}
each_plan = pytest.mark.parametrize("plan", PLANS)
IDS = tokens(40)


def filled(plan: Plan, packed: dict[str, Any] | None = None) -> _core.Model:
    named = {name: kept for name, kept in plan.items() if name == "" or "." in name}
    for layer in range(CONFIG["layers"]):
        named |= {f"layers.{layer}.{name}": kept for name, kept in plan.items() if name not in named}
    return build(_core.Backend("cpu", 2), types=named, packed=packed)


def packed_of(model: _core.Model) -> dict[str, Any]:
    return {name: aligned(model.packed(name)) for name in model.matrices()}


def aligned(values: Any) -> Any:
    """A copy that starts on a cache line, as in a file that is mapped."""
    memory = np.empty(values.size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    memory[begin : begin + values.size] = values
    return memory[begin : begin + values.size]


def digests(model: _core.Model) -> dict[str, str]:
    return {name: hashlib.sha256(model.packed(name)).hexdigest() for name in model.matrices()}


@each_plan
def test_gate_and_up_that_lie_apart_are_packed_as_one(plan: str) -> None:
    model = filled(PLANS[plan])
    apart = model.converted(model.types(), True)
    assert apart.separate_gate_up
    assert digests(apart) == digests(model)
    assert ("layers.1.gate_up" in apart.matrices()) == (plan != "gate and up of two types")


@each_plan
def test_what_is_packed_loads_as_the_same_model(plan: str) -> None:
    model = filled(PLANS[plan])
    apart = model.converted(model.types(), True)
    loaded = filled(PLANS[plan], packed_of(apart))
    assert loaded.separate_gate_up == model.separate_gate_up
    assert_same_bits(loaded.logits([IDS])[0], model.logits([IDS])[0])
    assert_same_bits(apart.logits([IDS])[0], model.logits([IDS])[0])


def test_the_memory_of_a_joined_matrix_outlives_its_model() -> None:
    model = filled(PLANS["int8"])
    expected = model.packed("layers.0.gate_up").tobytes()
    joined = model.converted(model.types(), True).packed("layers.0.gate_up")
    assert joined.tobytes() == expected
    assert not joined.flags.writeable


def test_files_that_have_gate_and_up_apart_load() -> None:
    """What was saved of quantised models with adapters before the two were joined."""
    model = filled(PLANS["int8"])
    packed = packed_of(model)
    # The only models whose gate is packed alone are those whose up is of another type.
    for name, other in (("gate", "up"), ("up", "gate")):
        alone = filled({"": ("int8", 128), other: ("int4", 32)})
        packed |= {f"layers.{layer}.{name}": aligned(alone.packed(f"layers.{layer}.{name}")) for layer in range(2)}
    packed = {name: values for name, values in packed.items() if not name.endswith("gate_up")}
    loaded = filled(PLANS["int8"], packed)
    assert loaded.separate_gate_up
    assert_same_bits(loaded.logits([IDS])[0], model.logits([IDS])[0])
    assert digests(loaded) == digests(model)
    with pytest.raises(CheckpointError, match=r"packed matrix 'layers\.1\.up' is missing"):
        filled(PLANS["int8"], {name: values for name, values in packed.items() if name != "layers.1.up"})


def test_a_matrix_that_is_not_packed_is_refused() -> None:
    model = filled(PLANS["gate and up of two types"])
    for name in ("layers.0.gate_up", "gate_up", "layers.9.gate", ""):
        with pytest.raises(CheckpointError, match=f"there is no matrix '{name}' in this model"):
            model.packed(name)


def test_an_adapter_separates_every_layer_though_the_first_one_is_already() -> None:
    """Failure elsewhere: the first layer was taken for all of them, and the second one had no gate to add to."""
    model = filled(PLANS["of two types in layer 0 alone"])
    assert not model.separate_gate_up
    apart = model.converted(model.types(), True)
    adapter = _core.Adapter(apart, {"layers.1.gate": (2, 1.0)})  # of zeros
    assert_same_bits(apart.logits([IDS], [adapter])[0], apart.logits([IDS], [])[0])


# -- directories ------------------------------------------------------------------------------------------------------


def quantised(**options: Any) -> Callable[[Path], Any]:
    config = llama_ext.LlamaConfig(
        vocab_size=67, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3, mlp_bias=True
    )
    return lambda _: llama_ext.LlamaForCausalLM(config, seed=3, **options)


def from_gguf(kind: str | dict[str, str]) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        gguf_models.write(folder / "x.gguf", gguf_models.config(), kind)
        return llama_ext.LlamaForCausalLM.from_pretrained(folder / "x.gguf")

    return make


def classifier(_: Path) -> Any:
    base = llama_ext.LlamaForCausalLM.from_pretrained("demo")
    return llama_ext.LlamaForSequenceClassification.from_base(base, ["a", "b", "c"], seed=1)


SOURCES: dict[str, Callable[[Path], Any]] = {
    "packed": lambda _: llama_ext.LlamaForCausalLM.from_pretrained("demo"),
    "int8": quantised(dtype="int8"),
    "int4": quantised(dtype="int4"),
    "int4, asymmetric": quantised(dtype="int4", symmetric=False),
    "Q8_0": from_gguf("Q8_0"),
    "Q4_0": from_gguf("Q4_0"),
    "mixed blocks": from_gguf({"": "Q4_K", ".down": "Q6_K", "0.up": "Q5_K"}),
    "classifier": classifier,
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("leave", ["set_adapter(None)", "delete_adapter"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_model_that_had_an_adapter_is_saved_as_if_it_had_none(source: str, leave: str, tmp_path: Path) -> None:
    model = SOURCES[source](tmp_path)
    ids = IDS[None] % model.config.vocab_size
    before = model(ids)
    model.save_pretrained(tmp_path / "before")
    expected = files_of(tmp_path / "before")
    model.add_adapter("a", llama_ext.LoRA(r=2))
    if leave == "delete_adapter":
        model.delete_adapter("a")
    else:
        model.set_adapter(None)
    model.save_pretrained(tmp_path / "after")
    assert files_of(tmp_path / "after") == expected
    again = type(model).from_pretrained(tmp_path / "after")
    np.testing.assert_array_equal(again(ids), before)
    # Over its own directory, which it maps, and with an adapter once more.
    again.add_adapter("b", llama_ext.LoRA(r=2))
    again.delete_adapter("b")
    again.save_pretrained(tmp_path / "after")
    assert files_of(tmp_path / "after") == expected
    np.testing.assert_array_equal(again(ids), before)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_that_cannot_be_packed_leaves_the_directory_as_it_was(adapted: bool, tmp_path: Path) -> None:
    """Every matrix that loading asks for is there before the first file is touched."""
    llama_ext.LlamaForCausalLM.from_pretrained("demo").save_pretrained(tmp_path)
    before = files_of(tmp_path)
    model = llama_ext.LlamaForCausalLM.from_pretrained("demo", dtype="int4", device="reference")
    if adapted:
        model.add_adapter("a", llama_ext.LoRA(r=2))
        model.delete_adapter("a")
    with pytest.raises(UnsupportedError, match="reference"):
        model.save_pretrained(tmp_path)
    assert files_of(tmp_path) == before
