"""Dependencies point downward: in C++ by what a file includes, in Python by what it imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from subprocesses import run_script

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "llama_ext"

SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

# What each folder of csrc may include besides itself.
BACKENDS = {"cpu", "reference", "cuda"}
BELOW_BACKEND = {"core", "quant", "ops"}
MAY_INCLUDE: dict[str, set[str]] = {
    "core": set(),
    "quant": {"core"},
    "ops": {"core", "quant"},
    "backend": BELOW_BACKEND,
    **{name: {"backend", *BELOW_BACKEND} for name in BACKENDS},
    "model": {"backend", *BELOW_BACKEND},
    "generate": {"model", "backend", *BELOW_BACKEND},
    "train": {"model", "backend", *BELOW_BACKEND},
    "bindings": {"train", "generate", "model", "backend", *BELOW_BACKEND},
}
# Exceptions, by file: making backends, and asking the machine what it has.
ALSO: dict[str, set[str]] = {
    # The CUDA backend is a library of its own, which has one entry.
    "bindings/backends.cpp": {"cpu/cpu_backend.h", "reference/reference_backend.h", "cuda/entry.h"},
    "bindings/module.cpp": {"cpu/isa.h", "cpu/memory.h", "cpu/thread_pool.h"},
}


def name_of(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


def includes(path: Path) -> tuple[list[str], list[str]]:
    """What a file includes with quotes, and with angle brackets."""
    text = path.read_text(encoding="utf-8")
    return (
        re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE),
        re.findall(r"^\s*#\s*include\s*<([^>]+)>", text, re.MULTILINE),
    )


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 50
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_includes_point_downward(path: Path) -> None:
    name = name_of(path)
    folder = name.split("/")[0]
    for included in includes(path)[0]:
        assert (CSRC / included).is_file(), f"{included} is not a path from csrc/"
        target = included.split("/")[0]
        allowed = target == folder or target in MAY_INCLUDE[folder] or included in ALSO.get(name, set())
        assert allowed, f"{name} must not include {included}: {folder} may use {sorted(MAY_INCLUDE[folder])}"


def test_only_one_file_names_all_backends() -> None:
    naming = {
        name_of(path)
        for path in SOURCES
        for included in includes(path)[0]
        if re.fullmatch(r"(\w+)/\1_backend\.h", included) and included.split("/")[0] != name_of(path).split("/")[0]
    }
    assert naming == {"bindings/backends.cpp"}


def test_only_bindings_know_python() -> None:
    for path in SOURCES:
        system = includes(path)[1]
        if not name_of(path).startswith("bindings/"):
            assert not [each for each in system if each.startswith("pybind11") or each == "Python.h"], name_of(path)


# Each tier is compiled with its own instructions: an inline function of the standard library, instantiated there, could be the
# copy that the linker keeps for everyone, and stop older CPUs with an illegal instruction.
KERNELS = [path for path in SOURCES if name_of(path).startswith(("cpu/kernels/", "cpu/simd/", "cpu/tiers/"))]
ALLOWED_IN_KERNELS = {"cstdint", "cstddef", "immintrin.h", "arm_neon.h"}
# Loops that are written once for kernels and for the backends that have none.
SHARED_LOOPS = {"ops/logits_loops.h", "quant/rounding.h"}
# The table that kernels export, and its part for training.
TABLES = {"cpu/kernel_table.h", "cpu/training_kernels.h"}
HELD_TO_IT = [*KERNELS, *(CSRC / name for name in sorted(TABLES)), *(CSRC / name for name in sorted(SHARED_LOOPS))]


@pytest.mark.parametrize("path", HELD_TO_IT, ids=name_of)
def test_kernels_include_nothing_of_the_standard_library(path: Path) -> None:
    quoted, system = includes(path)
    assert set(system) <= ALLOWED_IN_KERNELS
    for included in quoted:
        assert included in {*TABLES, *SHARED_LOOPS} or included.startswith(("cpu/kernels/", "cpu/simd/"))
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\bstd::", re.sub(r"//.*", "", text))
    assert not re.search(r"\b(throw|new|malloc|printf|abort)\b", re.sub(r"//.*|\"[^\"\n]*\"", "", text))


# The places that differ between a GPU and the emulator of the tests: everything else is one text for both.
CUDA_SOURCES = [path for path in SOURCES if name_of(path).startswith("cuda/")]
CUDA_ONLY = {
    r"\bcuda[A-Z]\w*\s*\(": {  # calls of the runtime
        "cuda/runtime.cpp",
        "cuda/recording.cpp",
        "cuda/launch.h",
        "cuda/tensor_map.cpp",
    },
    r"\bcuda_emulation::": {"cuda/launch.h", "cuda/mma.h", "cuda/device_views.h"},
    r"\basm\b": {"cuda/numeric.h", "cuda/mma.h", "cuda/wgmma.h", "cuda/launch.h"},
    r"\b__shared__\b": {"cuda/launch.h"},  # memory that the emulator can guard and fill with NaN
    r"<<<": set(),
    # Sums in an order that nobody knows; of whole numbers, which do not depend on it, where tokens are drawn and blocks counted.
    r"\batomic\w*\s*\(": {
        "cuda/sample_parts.h",
        "cuda/sample_next.cu",
        "cuda/sample_draw.cu",
        "cuda/attention_decode.cu",
    },
}


@pytest.mark.parametrize("path", CUDA_SOURCES, ids=name_of)
def test_cuda_sources_differ_from_the_emulated_ones_in_few_places(path: Path) -> None:
    text = re.sub(r"//.*|\"[^\"\n]*\"", "", path.read_text(encoding="utf-8"))
    for pattern, allowed in CUDA_ONLY.items():
        assert name_of(path) in allowed or not re.search(pattern, text), pattern


def test_nothing_in_the_library_prints_or_ends_the_process() -> None:
    pattern = r"\b(std::cout|std::cerr|printf|fprintf|puts|std::abort|std::exit|std::terminate|assert)\b\s*[(<;]"
    for path in SOURCES:
        text = re.sub(r"//.*|\"[^\"\n]*\"|static_assert", "", path.read_text(encoding="utf-8"))
        assert not re.search(pattern, text), name_of(path)


# Python.

FOREIGN = {"torch", "transformers", "tensorflow", "jax", "llama_cpp", "onnxruntime"}


def imports(path: Path) -> set[str]:
    """Every module a file names in an import, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            module = node.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def reaches(path: Path, package: str) -> list[str]:
    prefix = f"llama_ext.{package}"
    return sorted(name for name in imports(path) if name == prefix or name.startswith(prefix + "."))


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_point_downward(path: Path) -> None:
    name = module_of(path)
    top = name.split("/")[0]
    if top not in {"cli", "__main__"}:
        assert not reaches(path, "cli"), "only the command line may use itself"
    if top not in {"cli", "onnx", "__init__"}:
        assert not reaches(path, "onnx"), "a model runs without its exporter"
    if top not in {"cli", "interpret", "__init__"} and name != "runtime/model":
        assert not reaches(path, "interpret"), "a model runs without what looks into it"
    if top not in {"cli", "tasks", "training", "__init__"} and name != "runtime/trainable":
        assert not reaches(path, "training"), "a model runs without what trains it"
    if top not in {"cli", "tasks", "__init__"}:
        assert not reaches(path, "tasks"), "models and training know no tasks"
    if top in {"onnx", "training", "interpret"}:
        assert not reaches(path, "ops")
    if top in {"models", "io"}:
        assert not reaches(path, "runtime")
        assert not reaches(path, "ops")
    if top in {"errors", "limits", "_version"}:
        assert not [each for each in imports(path) if each.startswith("llama_ext") and "errors" not in each]


def test_a_model_imports_what_trains_it_when_it_is_trained() -> None:
    script = """
        import sys
        import llama_ext
        config = llama_ext.LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16,
        )
        model = llama_ext.LlamaForCausalLM(config)
        print([name for name in sys.modules if name.startswith("llama_ext.training")])
        model.compile()
        print("llama_ext.training.api" in sys.modules)
    """
    assert run_script(script).split() == ["[]", "True"]


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_no_other_framework_is_imported(path: Path) -> None:
    # What an export is proven with, and nothing else.
    allowed = {"onnxruntime"} if module_of(path).startswith("onnx/") else set()
    assert not {name.split(".")[0] for name in imports(path)} & (FOREIGN - allowed)


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_onnx_is_imported_by_the_exporter_alone(path: Path) -> None:
    if not module_of(path).startswith("onnx/"):
        assert "onnx" not in {name.split(".")[0] for name in imports(path)}


def test_a_model_runs_without_any_other_framework() -> None:
    script = """
        import sys
        import llama_ext
        config = llama_ext.LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16,
        )
        llama_ext.LlamaForCausalLM(config).generate([1, 2], max_new_tokens=2)
        print(sorted({name.split(".")[0] for name in sys.modules}))
    """
    assert not set(ast.literal_eval(run_script(script))) & FOREIGN
