"""A GPU in one command: is it right, and how fast is it, beside how fast its memory can be read.

    python -m benchmarks.gpu                  the whole table, in a few minutes
    python -m benchmarks.gpu --shapes 1b      one shape
    python -m benchmarks.gpu --peers          and transformers with torch.compile, where they are installed
    python -m benchmarks.gpu --alone          nothing beside it: torch is not asked for
    python -m benchmarks.gpu --train          training instead: steps of AdamW with bfloat16 products, float32 weights
    python -m benchmarks.gpu --check          the tests and compute-sanitizer first, as `benchmarks.gpu_check` does by itself

Weights are random bfloat16 numbers, activations what comes of them. Times are of whole calls, with what the host does: tokens a
second that a program sees. A share of decoding is of the bytes of the weights that a token reads, of the read probe of the same run; of
a prefill, of the time in which torch makes all of its products and nothing else, measured right before and right after it; of training,
of the matrix products that --matrix-peak says the GPU can do. A trained token counts 6 operations for each parameter of a matrix, and
6 L H D T for attention, half of what it would be without its mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import numpy as np

import llama_ext
from benchmarks import gpu_check, gpu_peers
from benchmarks.gpu_decode import decode
from benchmarks.gpu_shapes import SHAPES, Shape, blocks, bytes_read, parameters, print_table, random_model, seconds
from llama_ext import _core
from llama_ext.runtime.loading import core_config


def measure(
    device: str, shape: Shape, kind: tuple[str, int], prompt: int, tokens: int, probe: float, torch: Any
) -> list[object]:
    """A row of the table of models. torch: the module whose products a prefill is compared with, or None."""
    encoding, _ = kind
    model = random_model(device, shape, kind, prompt + 256)
    kv_dtype = "float32" if encoding == "float32" else "bfloat16"
    ids = np.random.default_rng(1).integers(0, shape.vocabulary, prompt).astype(np.int32)

    def prefill() -> None:
        _core.Session(model, prompt + 128, kv_dtype).append(ids, "last")

    # On both sides of the prefill: the clock of a GPU changes from minute to minute with its power and its temperature.
    before = gpu_peers.products_seconds(torch, device, shape, prompt)
    prefill_seconds = seconds(prefill, 3)
    products_only = (before + gpu_peers.products_seconds(torch, device, shape, prompt)) / 2
    token_seconds = decode(model, ids[:64], tokens, kv_dtype).seconds
    return [
        encoding,
        f"{model.nbytes / 1e9:.2f}",
        f"{prompt / prefill_seconds:,.0f}",
        f"{2e-12 * blocks(shape) * prompt / prefill_seconds:,.1f}",
        f"{products_only / prefill_seconds:.0%}" if torch is not None else "-",
        f"{1 / token_seconds:,.1f}",
        f"{bytes_read(model, shape) / token_seconds / probe:.0%}",
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
    beside_it = parser.add_mutually_exclusive_group()
    beside_it.add_argument(
        "--peers", action="store_true", help="transformers with torch.compile beside, which takes minutes"
    )
    beside_it.add_argument("--alone", action="store_true", help="nothing beside it: torch is not asked for")
    parser.add_argument("--check", action="store_true", help="run the tests on the device first")
    options = parser.parse_args(arguments)
    if not _core.gpus()[0]:
        print(f"no GPU: {_core.gpus()[1]}", file=sys.stderr)
        return 1
    is_right = gpu_check.check(options.device) if options.check else True
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
    torch = None if options.alone else gpu_peers.torch_for(options.device)
    rows = []
    beside: list[list[object]] = []
    peers: list[list[object]] = []
    for name in options.shapes:
        shape = SHAPES[name]
        prompt, tokens = (9, 3) if is_tiny else (options.prompt, 128)
        beside += [[name, *row] for row in gpu_peers.compare(torch, options.device, shape, prompt)]
        for kind in shape.kinds:
            rows.append([name, *measure(options.device, shape, kind, prompt, tokens, probe, torch)])
        if options.peers and torch is not None:
            peers.append([name, *gpu_peers.transformers_speed(torch, options.device, shape, prompt, tokens)])
    print(f"\n{', '.join(_core.gpus()[0])}; llama_ext {llama_ext.__version__}")
    print(f"read probe: {probe / 1e9:,.0f} GB/s\n")
    header = ["shape", "weights", "GB", "prefill tok/s", "TFLOP/s", "of products alone", "decode tok/s", "of the probe"]
    print_table(header, rows)
    if torch is None and not options.alone:
        print("\nbeside nothing: torch is not installed, or does not see this GPU")
    elif torch is not None:
        print(f"\nTFLOP/s in bfloat16, each call waited for; torch {torch.__version__}\n")
        print_table(["shape", "operation", "ours", "torch", "ratio"], beside)
    if peers:
        print("\ntransformers, bfloat16, static cache, torch.compile\n")
        print_table(["shape", "prefill tok/s", "decode tok/s"], peers)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
