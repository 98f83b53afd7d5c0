"""Directories of packed weights: saved and loaded bit for bit, mapped and not copied, and refused when they do not fit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gguf_models
import llama_ext
from llama_ext.errors import CheckpointError, FormatError, LlamaExtError, UnsupportedError
from llama_ext.io.safetensors_file import SafetensorsFile
from timing import within

Model = llama_ext.LlamaForCausalLM
IDS = np.random.default_rng(1).integers(0, 67, (2, 30))
OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "int4, groups of 32": {"dtype": "int4", "group_size": 32},
    "int8, asymmetric": {"dtype": "int8", "symmetric": False},
    "int4, asymmetric": {"dtype": "int4", "symmetric": False},
}


@pytest.fixture
def packed(tiny: Model, tmp_path: Path) -> Path:
    Model(tiny.config, seed=3, dtype="int4").save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("compute", ["auto", "exact"])
def test_a_saved_model_is_the_same_model(name: str, compute: str, tiny: Model, tmp_path: Path) -> None:
    model = Model(tiny.config, seed=3, compute=compute, **OPTIONS[name])
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path, compute=compute)
    assert again._core.types() == model._core.types()
    assert (again.dtype, again.nbytes, again.kv_dtype) == (model.dtype, model.nbytes, model.kv_dtype)
    np.testing.assert_array_equal(again(IDS), model(IDS))
    again.save_pretrained(tmp_path / "third")
    np.testing.assert_array_equal(Model.from_pretrained(tmp_path / "third", compute=compute)(IDS), model(IDS))


def test_a_gguf_file_of_mixed_types_survives(tmp_path: Path) -> None:
    gguf_models.write(tmp_path / "x.gguf", gguf_models.config(), {"": "Q4_K", ".v": "Q6_K", "up": "F16", "o": "BF16"})
    model = Model.from_pretrained(tmp_path / "x.gguf")
    model.save_pretrained(tmp_path / "packed")
    again = Model.from_pretrained(tmp_path / "packed")
    assert again._core.types() == model._core.types()
    np.testing.assert_array_equal(again(IDS), model(IDS))


def test_floats_of_several_dtypes_are_saved_as_they_are(tmp_path: Path) -> None:
    gguf_models.write(tmp_path / "x.gguf", gguf_models.config(), {"": "F16", ".v": "BF16", "up": "F32"})
    model = Model.from_pretrained(tmp_path / "x.gguf", compute="exact")
    model.save_pretrained(tmp_path / "floats")
    config = json.loads((tmp_path / "floats" / "config.json").read_text())
    assert (config["dtype"], "quantization_config" in config) == ("float16", False)
    again = Model.from_pretrained(tmp_path / "floats", dtype="float32", compute="exact")
    np.testing.assert_array_equal(again(IDS), Model.from_pretrained(tmp_path / "x.gguf", dtype="float32")(IDS))


def test_the_file_is_laid_out_to_be_mapped(packed: Path) -> None:
    with SafetensorsFile(packed / "model.safetensors") as file:
        matrices = [info for name, info in file.tensors.items() if name.startswith("packed.")]
        assert {info.dtype for info in matrices} == {"U8"}
        assert all(info.offset % 64 == 0 for info in matrices)
        others = [info for name, info in file.tensors.items() if not name.startswith("packed.")]
        assert max(info.offset for info in matrices) < min(info.offset for info in others)
        assert {info.dtype for info in others} == {"F32"}
    # Another reader sees the same: the header is what the format says.
    assert "packed.layers.0.gate_up" in load_file(packed / "model.safetensors")
    assert "model.layers.1.input_layernorm.weight" in load_file(packed / "model.safetensors")


def test_loading_does_nothing_but_map(tmp_path: Path) -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16
    )
    Model(config, dtype="int4").save_pretrained(tmp_path)
    with within(0.1):  # making the weights takes seconds
        model = Model.from_pretrained(tmp_path)
    before = model(IDS)
    Model(config, seed=1, dtype="int4").save_pretrained(tmp_path)  # the map of the old file stays
    np.testing.assert_array_equal(model(IDS), before)


def test_a_dtype_by_name_converts_or_is_there_already(packed: Path) -> None:
    exact = Model.from_pretrained(packed, compute="exact")
    floats = Model.from_pretrained(packed, dtype="float32")
    assert floats.dtype == "float32"
    assert np.abs(floats(IDS) - exact(IDS)).max() < 1e-4
    floats.save_pretrained(packed.parent / "floats")
    np.testing.assert_array_equal(Model.from_pretrained(packed.parent / "floats")(IDS), floats(IDS))
    same = Model.from_pretrained(packed, dtype="int4", compute="exact")
    np.testing.assert_array_equal(same(IDS), exact(IDS))
    assert Model.from_pretrained(packed, dtype="int8").dtype == "int8"


def edit(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def types(slot: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda quantization, _: quantization["types"].__setitem__(slot, value)


QKV = "packed.layers.0.qkv"
WRONG: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], type[LlamaExtError], str]] = {
    "another layout": (lambda q, _: q.update(layout="panels-7"), UnsupportedError, "'panels-7'.*'panels-32"),
    "no layout": (lambda q, _: q.pop("layout"), FormatError, "layout must be a name"),
    "no types": (lambda q, _: q.update(types=[1]), FormatError, "types must be an object"),
    "a type of no shape": (types("layers.0.q", "int4"), FormatError, "like .*got 'int4'"),
    "an unknown encoding": (types("layers.0.q", ["int3", 32]), FormatError, "layers.0.q.*'int3'; known"),
    "a wrong group": (types("layers.0.q", ["int4", 48]), FormatError, "32, 64 or 128, got 48"),
    "a slot too many": (types("layers.9.q", ["int4", 32]), CheckpointError, "layers.9.q.*lacks"),
    "a slot too few": (lambda q, _: q["types"].pop("layers.1.o"), CheckpointError, "no type for 'layers.1.o'"),
    "a missing matrix": (lambda _, t: t.pop(QKV), CheckpointError, "'layers.0.qkv' is missing"),
    "a surplus matrix": (
        lambda _, t: t.update({"packed.x": np.zeros(64, np.uint8)}),
        CheckpointError,
        "'x' has no place",
    ),
    "another size": (
        lambda _, t: t.update({QKV: t[QKV][:-64]}),
        CheckpointError,
        "'layers.0.qkv' of shape .* bytes, got",
    ),
    "another type": (types("layers.0.o", ["int8", 32]), CheckpointError, "'layers.0.o' of shape .*int8.* bytes, got"),
    "no bytes": (lambda _, t: t.update({QKV: t[QKV].view(np.int8)}), CheckpointError, "must be U8, got I8"),
    "a missing norm": (lambda _, t: t.pop("model.norm.weight"), CheckpointError, "model.norm.weight is missing"),
    "a surplus norm": (lambda _, t: t.update(x=np.zeros(4, np.float32)), CheckpointError, "tensor x is unexpected"),
    "a norm's shape": (
        lambda _, t: t.update({"model.norm.weight": np.zeros(4, np.float32)}),
        CheckpointError,
        r"must have shape \(24,\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str, packed: Path) -> None:
    change, error, message = WRONG[name]
    edit(packed, change)
    with pytest.raises(error, match=message) as caught:
        Model.from_pretrained(packed)
    assert str(packed) in str(caught.value)


def test_matrices_that_do_not_begin_on_a_cache_line_are_refused(packed: Path) -> None:
    path = packed / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    path.write_bytes(struct.pack("<Q", length + 8) + data[8 : 8 + length] + b" " * 8 + data[8 + length :])
    with pytest.raises(CheckpointError, match="multiple of 64 bytes"):
        Model.from_pretrained(packed)


def test_truncated_files_are_format_errors(packed: Path) -> None:
    path = packed / "model.safetensors"
    data = path.read_bytes()
    for point in np.linspace(0, len(data) - 1, 40).astype(int):
        path.write_bytes(data[:point])
        with pytest.raises(FormatError):
            Model.from_pretrained(packed)


def test_the_reference_backend_takes_the_codes_and_packs_none(packed: Path, tiny: Model) -> None:
    reference, mapped = Model.from_pretrained(packed, device="reference"), Model.from_pretrained(packed)
    for slot, *_ in mapped._core.slots():
        np.testing.assert_array_equal(reference._core.read(slot), mapped._core.read(slot), err_msg=slot)
    with pytest.raises(UnsupportedError, match="device='cpu'"):
        Model(tiny.config, dtype="int4", device="reference").save_pretrained(packed.parent / "new")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", None])
def test_quantised_weights_of_others_are_refused(method: str | None, packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=f"quantization_config.*{method or 'None'}"):
        Model.from_pretrained(packed)
