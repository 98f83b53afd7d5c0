"""The exported directory, unchanged, in the other runtimes: the same greedy tokens as in onnxruntime's own interface."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_ext
from onnx_runs import COMBINATIONS, PROFILES, Run, each_profile
from shared_data import SHARED, requires_shared

from llama_ext.onnx.exporting import ExportResult, export  # isort: skip

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnxruntime_cpp"

# `gqa-tied-llama3rope` and `biases` generate no token that ends a text within the steps that are compared.
SOURCES = ("stories260K", "gqa-tied-llama3rope", "biases")

pytestmark = [requires_shared]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[str, str, str], ExportResult] = {}

    def make(name: str, profile: str, dtype: str) -> ExportResult:
        key = (name, profile, dtype)
        if key not in made:
            source = SHARED / ("stories260K" if name == "stories260K" else f"golden/{name}")
            made[key] = export(source, tmp_path_factory.mktemp("out"), profile=profile, dtype=dtype, verify=False)
        return made[key]

    return make


def prompt_of(name: str) -> list[int]:
    if name == "stories260K":
        return [1]
    ids = load_file(SHARED / "golden" / name / "golden.safetensors")["greedy_ids"][0, :8]
    return [int(token) for token in ids]


@pytest.mark.parametrize(("profile", "dtype"), COMBINATIONS, ids=str)
@pytest.mark.parametrize("name", SOURCES)
def test_onnxruntime_genai_generates_the_same(exported: Any, name: str, profile: str, dtype: str) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    result, prompt = exported(name, profile, dtype), prompt_of(name)
    model = genai.Model(str(result.directory))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 24)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    ids = [int(token) for token in generator.get_sequence(0)]
    assert len(ids) > len(prompt)
    assert ids == Run(result.graph, exact=False).greedy(prompt, len(ids) - len(prompt))


@each_profile
def test_onnxruntime_genai_tells_the_published_story(exported: Any, profile: str) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    result = exported("stories260K", profile, "float32")
    model = genai.Model(str(result.directory))
    tokenizer = genai.Tokenizer(model)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=257)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([1], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    ids = [int(token) for token in generator.get_sequence(0)]
    ours = llama_ext.Tokenizer.from_pretrained(result.directory)
    expected = (SHARED / "stories260K" / "greedy-256.txt").read_text(encoding="utf-8").strip()
    assert ours.decode(ids[1:]).strip() == expected
    text = "Once upon a time, there was a little girl named Lily."
    assert [int(token) for token in tokenizer.encode(text)] == ours.encode(text, add_special_tokens=False)


# OpenVINO knows GroupQueryAttention, and not GatherBlockQuantized.
OPENVINO = [pair for pair in COMBINATIONS if pair[0] != "ort" or pair[1] == "float32"]


@pytest.mark.parametrize(("profile", "dtype"), OPENVINO, ids=str)
@pytest.mark.parametrize(
    "name", SOURCES[:2]
)  # in `biases`, float16 decides differently between two nearly equal tokens
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openvino_generates_the_same(exported: Any, name: str, profile: str, dtype: str) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    result, prompt = exported(name, profile, dtype), prompt_of(name)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
    model = openvino.Core().compile_model(str(result.graph), "CPU", exact)
    run = Run(result.graph)
    expected = run.greedy(prompt, 24)
    past = {each.name: values for each, values in zip(run.past, run.empty(), strict=True)}
    ids, step = list(prompt), prompt
    for _ in range(24):
        positions = np.arange(len(ids) - len(step), len(ids))[None]
        feeds = {"input_ids": np.array([step]), "attention_mask": np.ones((1, len(ids)), np.int64), **past}
        outputs = model({**feeds, "position_ids": positions})
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        step = [int(outputs["logits"][0, -1].argmax())]
        ids += step
    assert ids == expected


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
def test_the_program_in_cpp_generates_the_same(exported: Any, profile: str, tmp_path: Path) -> None:
    root = os.environ.get("ONNXRUNTIME_ROOT", "")
    places = [Path(place) for place in (root and f"{root}/include", "/usr/include", "/usr/local/include") if place]
    if not any((place / part / "onnxruntime_cxx_api.h").exists() for place in places for part in ("", "onnxruntime")):
        pytest.skip("needs onnxruntime's C++ headers: ONNXRUNTIME_ROOT names an unpacked release of it")
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    build = ["cmake", "-S", str(EXAMPLE), "-B", str(tmp_path), f"-DONNXRUNTIME_ROOT={root}"]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path)], check=True, capture_output=True)
    graph = exported("stories260K", profile, "float32").graph
    program = subprocess.run([str(tmp_path / "generate"), str(graph), "64", "1"], check=True, capture_output=True)
    assert [int(token) for token in program.stdout.split()] == Run(graph).greedy([1], 64)
