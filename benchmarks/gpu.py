"""A GPU in one command: is it right, and how fast is it, beside how fast its memory can be read.

    python -m benchmarks.gpu                  the whole table, in a few minutes
    python -m benchmarks.gpu --shapes 1b      one shape
    python -m benchmarks.gpu --peers          and transformers with torch.compile, where they are installed
    python -m benchmarks.gpu --alone          nothing beside it: torch is not asked for
    python -m benchmarks.gpu --train          training instead: steps of AdamW with bfloat16 products, float32 weights
    python -m benchmarks.gpu --check          all tests marked `gpu` on the device first, and the four tools of compute-sanitizer
                                              on some of them, where it is installed

Weights are random bfloat16 numbers, activations what comes of them. Times are of whole calls, with what the host does: tokens a
second that a program sees. A share of decoding is of the bytes of the weights that a token reads, of the read probe of the same run; of
a prefill, of the time in which torch makes all of its products and nothing else, measured right before and right after it; of training,
of the matrix products that --matrix-peak says the GPU can do. A trained token counts 6 operations for each parameter of a matrix, and
6 L H D T for attention, half of what it would be without its mask.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import llama_ext
from benchmarks import gpu_peers
from benchmarks.gpu_shapes import SHAPES, Shape, blocks, fill, parameters, seconds
from llama_ext import _core
from llama_ext.runtime.loading import core_config

ROOT = Path(__file__).parents[1]


# The tools of compute-sanitizer, and the tests that they watch: every kernel, though not each size of its tiles, in shapes of few
# blocks and in about 7,000 launches, which cost a hundredth of a second or more each. tests/cuda/test_hopper.py is not among them, as
# it runs in the emulator alone: on a Hopper GPU, many rows of these tests meet its own instructions.
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED = (
    "tests/ops/test_device_operations.py",
    "tests/ops/test_attention.py",
    "tests/ops/test_causal_attention.py",
    "tests/ops/test_matmul.py",
    "tests/ops/test_matmul_backward.py",
    "tests/ops/test_matrix_rows.py",
    "tests/ops/test_feed_forward.py",
    "tests/ops/test_swiglu.py",
    "tests/ops/test_rms_norm_backward.py",
    "tests/ops/test_embedding_backward.py",
    "tests/ops/test_cross_entropy_backward.py",
    "tests/ops/test_dropout.py",
    "tests/ops/test_quantized_matmul.py::test_quantized_matmul_adds_a_bias_and_a_residual",
    "tests/ops/test_quantized_feed_forward.py::test_feed_forward_takes_gate_and_up_apart_and_kept_in_different_ways",
    "tests/ops/test_quantized_feed_forward.py::test_many_rows_of_a_gpu_meet_gate_up_and_down_kept_in_different_ways",
    "tests/ops/test_sample_next.py::test_equal_logits_are_cut_by_their_ids",
    "tests/ops/test_sample_next.py::test_a_row_with_a_logit_that_is_not_finite_is_not_valid_and_others_are",
    "tests/ops/test_sample_next.py::test_sample_next_chooses_the_tokens_of_sample[top_p-1025]",
    "tests/ops/test_sample_next.py::test_sample_next_chooses_the_tokens_of_sample[everything-3]",
    "tests/ops/test_optimizer.py::test_sum_of_squares_is_that_of_float64",
    "tests/ops/test_optimizer.py::test_sgd_without_momentum_needs_no_velocity",
    "tests/ops/test_optimizer.py::test_the_first_step_of_adam_is_the_learning_rate_against_the_sign",
    "tests/cuda/test_kernels.py::test_a_row_of_a_product_depends_on_whether_there_are_few_rows_and_on_nothing_else",
    "tests/cuda/test_kernels.py::test_few_rows_of_a_narrow_model_with_a_large_vocabulary_are_all_written",
    "tests/cuda/test_kernels.py::test_attention_on_tensor_cores_costs_no_more_than_bfloat16",
    "tests/cuda/test_chain.py::test_a_chain_has_the_bits_of_kernels_one_after_the_other[even-int4_min]",
    "tests/cuda/test_chain.py::test_a_chain_has_the_bits_of_kernels_one_after_the_other[widest-gates-bfloat16]",
    "tests/cuda/test_chain.py::test_a_chain_has_the_bits_of_kernels_one_after_the_other[heads-of-128-int8]",
    "tests/cuda/test_training.py::test_products_round_both_operands_once_and_sum_in_float32",
    "tests/cuda/test_training.py::test_each_gradient_of_a_product_may_be_asked_for_alone",
    "tests/cuda/test_training.py::test_rounding_heads_reads_and_writes_no_byte_beyond_its_arrays",
    "tests/cuda/test_training.py::test_attention_and_its_gradients_on_tensor_cores_cost_no_more_than_bfloat16",
    "tests/cuda/test_training.py::test_gradients_of_a_norm_are_right_at_every_width_that_registers_hold",
    # Codes of 8, 5, 4 and 6 bits.
    "tests/cuda/test_training.py::test_products_of_training_with_frozen_codes_round_both_operands[int8-g64]",
    "tests/cuda/test_training.py::test_products_of_training_with_frozen_codes_round_both_operands[int5_min-g64]",
    "tests/cuda/test_training.py::test_products_of_training_with_frozen_codes_round_both_operands[int4_min-g64]",
    "tests/cuda/test_training.py::test_products_of_training_with_frozen_codes_round_both_operands[Q6_K]",
    # Whole models: decoding by parts, what is done with a cache, and recorded tokens.
    "tests/cuda/test_models.py::test_tokens_one_by_one_give_the_logits_of_a_whole_prompt_with_a_bfloat16_cache[mha-128]",
    "tests/cuda/test_models.py::test_sessions_fork_rewind_save_and_load[bfloat16]",
    "tests/cuda/test_decode_ahead.py::test_rows_of_different_lengths_end_when_they_should",
    "tests/cuda/test_decode_ahead.py::test_each_token_is_the_one_that_its_logits_give[penalties-bfloat16-bfloat16]",
)
# After which a tool is stopped.
SANITIZER_SECONDS = 420.0

# Decoding is greedy, by the recorded pass that `generate` replays.
GREEDY = {"temperature": 0.0}
# Tokens before the timed ones, which make the recording.
WARM_TOKENS = 8


def decode_seconds(model: _core.Model, prompt: Any, tokens: int, kv_dtype: str) -> float:
    """Of one token after the prompt: what a generation takes longer that is `tokens` longer."""

    def run(count: int) -> float:
        loop = _core.Generation(
            model, [prompt], sampling=GREEDY, max_new_tokens=[count], eos=[], seed=0, kv_dtype=kv_dtype
        )
        begin = time.perf_counter()
        while not loop.done:
            loop.run(64)
        return time.perf_counter() - begin

    run(WARM_TOKENS)
    return statistics.median(run(WARM_TOKENS + tokens) - run(WARM_TOKENS) for _ in range(3)) / tokens


def measure(
    device: str, shape: Shape, kind: tuple[str, int], prompt: int, tokens: int, probe: float, torch: Any
) -> list[object]:
    """A row of the table of models. torch: the module whose products a prefill is compared with, or None."""
    backend = _core.Backend(device)
    encoding, group = kind
    types = {"": (encoding, group)}
    if encoding == "int4":  # as the package keeps them
        types |= dict.fromkeys(["embedding", *([] if shape.tied else ["head"])], ("int8", group))
    model = _core.Model(backend, core_config(shape.config(prompt + 256)), types)
    fill(model)
    kv_dtype = "float32" if encoding == "float32" else "bfloat16"
    ids = np.random.default_rng(1).integers(0, shape.vocabulary, prompt).astype(np.int32)

    def prefill() -> None:
        _core.Session(model, prompt + 128, kv_dtype).append(ids, "last")

    # On both sides of the prefill: the clock of a GPU changes from minute to minute with its power and its temperature.
    before = gpu_peers.products_seconds(torch, device, shape, prompt)
    prefill_seconds = seconds(prefill, 3)
    products_only = (before + gpu_peers.products_seconds(torch, device, shape, prompt)) / 2
    token_seconds = decode_seconds(model, ids[:64], tokens, kv_dtype)
    read = model.nbytes if shape.tied else model.nbytes * (1 - shape.vocabulary * shape.width / parameters(shape))
    return [
        encoding,
        f"{model.nbytes / 1e9:.2f}",
        f"{prompt / prefill_seconds:,.0f}",
        f"{2e-12 * blocks(shape) * prompt / prefill_seconds:,.1f}",
        f"{products_only / prefill_seconds:.0%}" if torch is not None else "-",
        f"{1 / token_seconds:,.1f}",
        f"{read / token_seconds / probe:.0%}",
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


def check() -> bool:
    """All tests that are marked `gpu` on this device, and compute-sanitizer's tools on some of them."""
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    is_right = subprocess.run(tests, cwd=ROOT, check=False).returncode == 0
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not installed: memory, races and barriers are not checked on the device")
        return is_right
    return sanitize(sanitizer) and is_right


def sanitize(sanitizer: str) -> bool:
    """Whether all of its tools find nothing. They run beside each other, as each leaves most of a GPU idle."""
    begin = time.perf_counter()
    print(f"compute-sanitizer: {', '.join(SANITIZERS)}, on some of the tests", flush=True)
    is_right = True
    with contextlib.ExitStack() as stack:
        running = {}
        for tool in SANITIZERS:
            output = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            # Without pytest's capture, which would keep the sanitizer's lines of a test that passes.
            tests = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "gpu", "-p", "no:cacheprovider", *SANITIZED]
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *tests]
            # A session of its own, so that the tests end with the sanitizer that started them.
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            stack.callback(stop, process)
            running[tool] = process, output
        while running:
            time.sleep(0.2)
            spent = time.perf_counter() - begin
            for tool, (process, output) in list(running.items()):
                status = process.poll()
                if status is None and spent < SANITIZER_SECONDS:
                    continue
                del running[tool]
                verdict = "not finished" if status is None else "FAILED" if status else "clean"
                print(f"{tool}: {verdict} after {spent:.0f} s", flush=True)
                if status != 0:
                    is_right = False
                    stop(process)
                    output.seek(0)
                    print_found(output.read().splitlines())
    return is_right


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a session and all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def print_found(lines: list[str]) -> None:
    """What a sanitizer has found first, and how its run ended."""
    errors = [line for line in lines if line.startswith("=========")]
    print("\n".join([*errors[:40], "...", *lines[-20:]]), flush=True)


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
