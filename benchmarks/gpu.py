"""A GPU in one command: is it right, and how fast is it, beside how fast its memory can be read.

    python -m benchmarks.gpu                  the whole table, in a few minutes
    python -m benchmarks.gpu --shapes 1b      one shape
    python -m benchmarks.gpu --train          training instead: steps of AdamW with bfloat16 products, float32 weights
    python -m benchmarks.gpu --check          the operations' tests on the device first, and compute-sanitizer on tiny shapes
                                              where it is installed

Weights are random bfloat16 numbers, activations what comes of them. Times are of whole calls, with what the host does: tokens a
second that a program sees. A share is of the bytes of the weights that a token reads, of the read probe of the same run; of
training, of the matrix products that --matrix-peak says the GPU can do. A trained token counts 6 operations for each parameter of
a matrix, and 6 L H D T for attention, half of what it would be without its mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import llama_ext
from llama_ext import _core
from llama_ext.runtime.loading import core_config

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's shape, and in which ways its weights are kept here."""

    width: int
    ffn_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    kinds: tuple[tuple[str, int], ...]

    def config(self, context: int) -> llama_ext.LlamaConfig:
        return llama_ext.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.ffn_width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=context,
            tie_word_embeddings=self.tied,
        )


SHAPES = {
    "tiny": Shape(64, 160, 2, 4, 2, 16, 512, True, (("float32", 0), ("bfloat16", 0), ("int8", 32), ("int4", 32))),
    "1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, True, (("bfloat16", 0), ("int8", 128), ("int4", 128))),
    "8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, False, (("bfloat16", 0), ("int4", 128))),
}


def fill(model: _core.Model) -> None:
    """Random weights from one pool: rounding each for itself would take longer than everything else."""
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(1 << 22) * 0.02).astype(np.float32)
    bits = (pool.view(np.uint32) >> 16).astype(np.uint16)
    codes = rng.integers(0, 256, 1 << 22, dtype=np.uint8)
    types = model.types()
    for slot, shape, is_matrix in model.slots():
        count = int(np.prod(shape))
        if not is_matrix:
            model.load(slot, np.ones(shape, np.float32), "float32")
            continue
        encoding, group = types[slot]
        if group == 0:
            model.load(slot, np.resize(bits, count).reshape(shape), "bfloat16")
            continue
        some = (codes & 15).astype(np.int8) - np.int8(8) if encoding == "int4" else codes.view(np.int8)
        scales = np.full((shape[0], -(-shape[1] // group)), 0.02 / (4 if encoding == "int4" else 64), np.float16)
        model.load_codes(slot, np.resize(some, count).reshape(shape), scales)


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """The median of some calls, after one that does not count."""
    call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure(device: str, shape: Shape, kind: tuple[str, int], prompt: int, tokens: int, probe: float) -> list[object]:
    backend = _core.Backend(device)
    encoding, group = kind
    types = {"": (encoding, group)}
    if encoding == "int4":  # as the package keeps them
        types |= dict.fromkeys(["embedding", *([] if shape.tied else ["head"])], ("int8", group))
    model = _core.Model(backend, core_config(shape.config(prompt + 256)), types)
    fill(model)
    kv_dtype = "float32" if encoding == "float32" else "bfloat16"
    ids = np.random.default_rng(1).integers(0, shape.vocabulary, prompt).astype(np.int32)

    def prefill() -> _core.Session:
        session = _core.Session(model, prompt + 128, kv_dtype)
        session.append(ids, "last")
        return session

    prefill_seconds = seconds(prefill, 3)
    session = prefill()
    one = ids[:1].copy()
    decode_seconds = seconds(lambda: session.append(one, "last"), tokens)
    read = model.nbytes if shape.tied else model.nbytes * (1 - shape.vocabulary * shape.width / parameters(shape))
    share = read / decode_seconds / probe
    return [
        encoding,
        f"{model.nbytes / 1e9:.2f}",
        f"{prompt / prefill_seconds:,.0f}",
        f"{2e-12 * blocks(shape) * prompt / prefill_seconds:,.1f}",
        f"{1 / decode_seconds:,.1f}",
        f"{share:.0%}",
    ]


def train(device: str, shape: Shape, sequences: int, length: int, layers: int, matrix_peak: float) -> list[object]:
    """Whole steps: gradients, their norm, AdamW. Weights are random, so are the tokens, but the same in each step."""
    shape = dataclasses.replace(shape, layers=layers or shape.layers)
    backend = _core.Backend(device)
    model = _core.Model(backend, core_config(shape.config(length)), {"": ("float32", 0)})
    pool = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float32)
    for slot, extents, is_matrix in model.slots():
        values = np.resize(pool, int(np.prod(extents))).reshape(extents) if is_matrix else np.ones(extents, np.float32)
        model.load(slot, values, "float32")
    model = model.converted({"": ("float32", 0)}, True)
    trainer = _core.Trainer(model, optimizer={"kind": "adamw"}, compute="bfloat16")
    tokens = np.random.default_rng(1).integers(0, shape.vocabulary, sequences * length).astype(np.int32)
    labels = np.roll(tokens, -1)
    lengths = np.full(sequences, length, np.int64)
    losses: list[float] = []

    def step() -> None:
        loss, counted = trainer.accumulate(tokens, labels, lengths, scale=1 / len(tokens))
        losses.append(loss / counted)
        norm = trainer.gradient_norm()
        trainer.step(lr=1e-4, gradient_scale=min(1.0, 1.0 / (norm + 1e-6)))

    spent = seconds(step, 5)
    operations = len(tokens) * 6 * (parameters(shape) + shape.layers * shape.heads * shape.head_dim * length)
    if not shape.tied:  # a table that is only looked up
        operations -= len(tokens) * 6 * shape.vocabulary * shape.width
    return [
        shape.layers,
        f"{sequences} x {length}",
        f"{(model.nbytes + trainer.nbytes) / 1e9:.1f}",
        f"{spent * 1e3:,.1f}",
        f"{len(tokens) / spent:,.0f}",
        f"{1e-12 * operations / spent:,.1f}",
        f"{1e-12 * operations / spent / matrix_peak:.0%}" if matrix_peak else "",
        f"{losses[0]:.2f} -> {losses[-1]:.2f}",
    ]


def blocks(shape: Shape) -> int:
    """Parameters that every token of a prompt meets: those of the blocks."""
    attention = shape.width * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    return shape.layers * (attention + 3 * shape.width * shape.ffn_width)


def parameters(shape: Shape) -> int:
    """Of all matrices, an untied head among them."""
    return blocks(shape) + shape.vocabulary * shape.width * (1 if shape.tied else 2)


def check() -> bool:
    """The tests of the operations and models on this device, and the memory checker on a few of them."""
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/ops",
        "tests/cuda",
        "-x",
        "-p",
        "no:cacheprovider",
    ]
    is_right = subprocess.run(tests, cwd=ROOT, check=False).returncode == 0
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not installed: memory, races and barriers are not checked on the device")
        return is_right
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--shapes",
            "tiny",
        ]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(f"{tool}: {'clean' if found.returncode == 0 else 'FAILED'}")
        if found.returncode != 0:
            print("\n".join(found.stdout.splitlines()[-40:]))
            is_right = False
    return is_right


def print_table(header: list[str], rows: list[list[object]]) -> None:
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=["1b", "8b"])
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--train", action="store_true", help="measure training instead")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of a step of training")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each of them")
    parser.add_argument("--layers", type=int, default=0, help="train so many layers instead of all")
    parser.add_argument("--matrix-peak", type=float, default=0.0, help="bfloat16 TFLOP/s that the GPU can do")
    parser.add_argument("--check", action="store_true", help="run the tests on the device first")
    options = parser.parse_args(arguments)
    if not _core.gpus()[0]:
        print(f"no GPU: {_core.gpus()[1]}", file=sys.stderr)
        return 1
    is_right = check() if options.check else True
    is_tiny = options.shapes == ["tiny"]
    if options.train:
        rows: list[list[object]] = []
        for name in options.shapes if options.shapes != ["1b", "8b"] else ["1b"]:
            sequences, length = (2, 40) if is_tiny else (options.sequences, options.length)
            trained = train(options.device, SHAPES[name], sequences, length, options.layers, options.matrix_peak)
            rows.append([name, *trained])
        print(f"\n{', '.join(_core.gpus()[0])}; llama_ext {llama_ext.__version__}\n")
        header = ["shape", "layers", "tokens", "GB", "ms a step", "tok/s", "TFLOP/s", "of the peak", "loss"]
        print_table(header, rows)
        return 0 if is_right else 1
    probe = _core.gpu_read_bandwidth(options.device, 1 << 22 if is_tiny else 4 << 30, 2 if is_tiny else 10)
    rows = []
    for name in options.shapes:
        shape = SHAPES[name]
        prompt, tokens = (9, 3) if is_tiny else (options.prompt, 48)
        rows += [[name, *measure(options.device, shape, kind, prompt, tokens, probe)] for kind in shape.kinds]
    print(f"\n{', '.join(_core.gpus()[0])}; llama_ext {llama_ext.__version__}")
    print(f"read probe: {probe / 1e9:,.0f} GB/s\n")
    print_table(["shape", "weights", "GB", "prefill tok/s", "TFLOP/s", "decode tok/s", "of the probe"], rows)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
