"""Makes what other engines need of the random model: GGUF files, and directories of OpenVINO, onnxruntime-genai, CTranslate2.

What is there already is skipped, and what cannot be made is listed with the reason. `benchmarks.model --prepared` uses them.

Example:
    python -m benchmarks.prepare_peers --peer-python ../peers/bin/python
    python -m benchmarks.prepare_peers --layers 2 --only gguf
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import limits
from benchmarks.accounting import TINYLLAMA_1_1B, ModelShape
from benchmarks.measure import RESULT
from benchmarks.random_model import ensure_model
from benchmarks.random_tokenizer import ensure_tokenizer

__all__ = ["STEPS", "Step", "main", "peer_directory", "prepared"]

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Step:
    """One file or directory.

    Attributes:
        target: Its name.
        option: Of benchmarks.model, that it is for.
        kind: Of benchmarks.peers.make.
        weights: The type, in the words of whoever makes it.
        source: Another target that it is made from; "" is the checkpoint.
    """

    target: str
    option: str
    kind: str
    weights: str
    source: str = ""


STEPS = (
    Step("f32.gguf", "gguf", "gguf", "f32"),
    Step("bf16.gguf", "gguf", "gguf", "bf16"),
    Step("q8_0.gguf", "gguf", "quantize_gguf", "q8_0", "f32.gguf"),
    Step("q4_0.gguf", "gguf", "quantize_gguf", "q4_0", "f32.gguf"),
    Step("q4_k_m.gguf", "gguf", "quantize_gguf", "q4_k_m", "f32.gguf"),
    Step("openvino-int8", "openvino", "openvino", "int8"),
    Step("openvino-int4-g32", "openvino", "openvino", "int4"),
    Step("genai-int8", "genai", "genai", "int8"),
    Step("genai-int4", "genai", "genai", "int4"),
    Step("genai-f32", "genai", "genai", "fp32"),
    Step("ctranslate2-int8", "ctranslate2", "ctranslate2", "int8_float32"),
)


def peer_directory(cache: Path, shape: ModelShape) -> Path:
    """Where the files of a random model lie."""
    return cache / ("peers-" + "-".join(f"{value:d}" for value in dataclasses.astuple(shape)))


def prepared(cache: Path, shape: ModelShape) -> dict[str, list[Path]]:
    """What there is, by the option of benchmarks.model.

    Args:
        cache: Of both commands.
        shape: Of the random model.

    Returns:
        For each option the paths, perhaps none.
    """
    found: dict[str, list[Path]] = {step.option: [] for step in STEPS}
    for step in STEPS:
        path = peer_directory(cache, shape) / step.target
        if path.exists():
            found[step.option].append(path)
    return found


def make(step: Step, python: str, model: Path, directory: Path) -> str:
    """Makes one, unless it is there; of two processes one waits for the other.

    Args:
        step: Which.
        python: The interpreter that has the packages.
        model: The checkpoint.
        directory: For all of them.

    Returns:
        "present", "made in ... s", or the reason why it is not there.
    """
    with _alone_in(directory):
        return _make(step, python, model, directory)


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Waits for another preparation in a directory: what is unfinished is then of one that was stopped."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make(step: Step, python: str, model: Path, directory: Path) -> str:
    target = directory / step.target
    if target.exists():
        return "present"
    source = directory / step.source if step.source else model
    if not source.exists():
        return f"unavailable: there is no {step.source}"
    # Under another name until it is whole; .gguf stays the end, as llama.cpp may look at it.
    unfinished = target.with_name(f"unfinished-{step.target}")
    _remove(unfinished)
    command = [python, "-m", "benchmarks.peers.make", step.kind, str(source), str(unfinished), "--type", step.weights]
    start = time.perf_counter()
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"unavailable: {python}: {error.strerror}"
    error = _error_of(process)
    _remove(unfinished.with_name(f"{unfinished.name}.cache"))
    if error is None and not unfinished.exists():
        error = "failed: nothing was written"
    if error is not None:
        if not error.startswith("not installed"):
            sys.stderr.write(process.stderr[-2000:])
        _remove(unfinished)
        return f"unavailable: {error}"
    unfinished.rename(target)
    return f"made in {time.perf_counter() - start:.0f} s"


def _error_of(process: subprocess.CompletedProcess[str]) -> str | None:
    for line in reversed(process.stdout.splitlines()):
        if line.startswith(RESULT):
            error = json.loads(line.removeprefix(RESULT)).get("error")
            return None if error is None else str(error)
    code = process.returncode
    return f"crashed: {signal.Signals(-code).name}" if code < 0 else f"failed: exit {code}"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prepare_peers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the other engines")
    parser.add_argument(
        "--export-python", help="another one for exports (optimum-intel, onnx_ir), if they are not in it"
    )
    parser.add_argument("--layers", type=int, help="of the random model (22)")
    parser.add_argument("--only", default="", help="by words of the targets, with commas: gguf,int4")
    parser.add_argument("--skip", default="", help="likewise: genai-f32")
    parser.add_argument("--cache", type=Path, default=limits.default_cache(), help="for all that is made")
    options = parser.parse_args(arguments)
    if options.layers is not None and options.layers < 1:
        parser.error(f"--layers must be at least 1, got {options.layers}")
    return options


def chosen(steps: Sequence[Step], only: str, skip: str) -> list[Step]:
    """The steps whose targets have a word of `only`, and none of `skip`."""
    wanted, unwanted = ([word.strip() for word in text.split(",") if word.strip()] for text in (only, skip))
    return [
        step
        for step in steps
        if (not wanted or any(word in step.target for word in wanted))
        and not any(word in step.target for word in unwanted)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse_arguments(arguments)
    shape = dataclasses.replace(TINYLLAMA_1_1B, layers=options.layers or TINYLLAMA_1_1B.layers)
    model = ensure_model(options.cache, shape).resolve()
    state = "made" if ensure_tokenizer(model, shape.vocabulary) else "present"
    directory = peer_directory(options.cache, shape).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    print(f"{model.name}: {size_of(model) / 1e9:.2f} GB, its tokenizer: {state}")
    print(f"{directory.name}:")
    for step in chosen(STEPS, options.only, options.skip):
        is_export = step.kind in ("openvino", "genai")
        python = options.export_python if is_export and options.export_python else options.peer_python
        state = make(step, python, model, directory)
        target = directory / step.target
        size = f"{size_of(target) / 1e9:6.2f} GB" if target.exists() else " " * 9
        print(f"  {step.target:20}{size}  {state}", flush=True)


if __name__ == "__main__":
    main()
