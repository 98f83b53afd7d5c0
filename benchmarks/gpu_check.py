"""Is a GPU's arithmetic right: the tests marked `gpu` on the device, and the four tools of compute-sanitizer on some of them.

    python -m benchmarks.gpu_check                                everything
    python -m benchmarks.gpu_check --tools                        the tests alone
    python -m benchmarks.gpu_check --no-tests --tools racecheck   one tool alone
    python -m benchmarks.gpu_check --no-tests --tools initcheck --tests tests/ops/test_dropout.py   and of these tests

The tests run twice: as they are, and with LLAMA_EXT_CUDA_ONE_ROW=1 (docs/running.md). Where pytest-xdist is installed, several processes share them. A tool makes a kernel a hundred times as slow and keeps one core busy,
so that each tool's tests are dealt out to several processes, too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from llama_ext import _core

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
    "tests/ops/test_quantized_feed_forward.py::test_few_rows_of_a_gpu_meet_gates_so_wide_that_a_block_has_several_tiles_at_a_time",
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
    "tests/cuda/test_one_row.py::test_its_norm_bias_and_residual_have_the_same_bits",
    "tests/cuda/test_one_row.py::test_gates_and_ups_have_the_same_bits[int8_min-g128-300]",
    "tests/cuda/test_one_row.py::test_gates_and_ups_have_the_same_bits[int4-g128-300]",
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
SANITIZER_SECONDS = 360.0

# Of the environment, for which the tests run once each.
SETTINGS: tuple[dict[str, str], ...] = ({}, {"LLAMA_EXT_CUDA_ONE_ROW": "1"})
# Processes at once, of the tests and of all tools: each has a context on the GPU, of half a gigabyte.
MOST_PROCESSES = 16

PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]


def check(
    device: str = "cuda:0",
    *,
    runs_tests: bool = True,
    tools: Sequence[str] = SANITIZERS,
    watched: Sequence[str] = SANITIZED,
    seconds: float = SANITIZER_SECONDS,
) -> bool:
    """Whether all tests pass and no tool finds anything; says what did not.

    Args:
        device: A GPU.
        runs_tests: Or else only the tools.
        tools: Of compute-sanitizer; none: only the tests.
        watched: The tests that they watch, as pytest names them.
        seconds: After which a tool is stopped.
    """
    is_right = run_tests(device) if runs_tests else True
    if not tools:
        return is_right
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print(
            "compute-sanitizer is not installed (it comes with the CUDA toolkit): memory, races and barriers are not checked"
        )
        return is_right and runs_tests
    return sanitize(sanitizer, collect(watched), tools, seconds, device=device) and is_right


def run_tests(device: str) -> bool:
    """All tests marked `gpu`, under each setting."""
    command = [*PYTEST, *shared_out(), "tests"]
    is_right = True
    for settings in SETTINGS:
        said = " ".join(f"{name}={value}" for name, value in settings.items())
        print(f"tests {said}".rstrip(), flush=True)
        status = subprocess.run(command, cwd=ROOT, env=os.environ | settings | seeing(device), check=False).returncode
        is_right = is_right and status == 0
    return is_right


def seeing(device: str) -> dict[str, str]:
    """The environment of a process whose first and only GPU is this one: the tests run on "cuda:0"."""
    index = device.partition(":")[2] or "0"
    visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    return {"CUDA_VISIBLE_DEVICES": visible[int(index)] if visible else index}


def shared_out() -> list[str]:
    """Options that let several processes share the tests, where pytest has them."""
    processes = min(os.cpu_count() or 1, 6)
    return ["-n", str(processes), "-p", "no:benchmark"] if importlib.util.find_spec("xdist") else []


def collect(selections: Sequence[str]) -> list[str]:
    """The names of the tests marked `gpu` that pytest finds by them.

    Raises:
        RuntimeError: pytest cannot read the tests, or finds none.
    """
    command = [*PYTEST, "--collect-only", *selections]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    if done.returncode != 0 or not names:
        raise RuntimeError(f"pytest --collect-only ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr}")
    return names


def sanitize(
    sanitizer: str,
    tests: Sequence[str],
    tools: Sequence[str] = SANITIZERS,
    seconds: float = SANITIZER_SECONDS,
    processes: int | None = None,
    device: str = "cuda:0",
) -> bool:
    """Whether none of the tools finds anything. Says of each what came of it, and how many processes came to their end.

    Args:
        sanitizer: The program.
        tests: By their names; they are dealt out one by one.
        tools: All run beside each other.
        seconds: After which what still runs is stopped.
        processes: Of each tool; None: as many as there are cores for.
        device: A GPU.
    """
    begin = time.perf_counter()
    if processes is None:
        processes = max(1, min(os.cpu_count() or 1, MOST_PROCESSES) // len(tools))
    parts = [part for part in (tests[first::processes] for first in range(processes)) if part]
    print(f"compute-sanitizer: {', '.join(tools)}; {len(tests)} tests, {len(parts)} processes each", flush=True)
    ended: dict[str, list[int]] = {tool: [] for tool in tools}
    with contextlib.ExitStack() as stack:
        running = []
        for tool in tools:
            for part in parts:
                output = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
                # Without pytest's capture, which would keep the sanitizer's lines of a test that passes.
                command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *PYTEST, "-s", *part]
                # A session of its own, so that the tests end with the sanitizer that started them.
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | seeing(device),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                stack.callback(stop, process)
                running.append((tool, process, output))
        while running:
            time.sleep(0.2)
            spent = time.perf_counter() - begin
            for entry in list(running):
                tool, process, output = entry
                status = process.poll()
                if status is None and spent < seconds:
                    continue
                running.remove(entry)
                if status is None:
                    stop(process)
                else:
                    ended[tool].append(status)
                if status != 0:
                    print_found(tool, output)
                if not any(other == tool for other, _, _ in running):
                    print(f"{tool}: {verdict(ended[tool], len(parts))} after {spent:.0f} s", flush=True)
    return all(statuses == [0] * len(parts) for statuses in ended.values())


def verdict(statuses: Sequence[int], processes: int) -> str:
    """Of a tool whose processes ended with these, all others having been stopped."""
    if any(statuses):
        return "FAILED"
    return "clean" if len(statuses) == processes else f"not finished ({len(statuses)} of {processes} processes clean)"


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a session and all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def print_found(tool: str, output: IO[str]) -> None:
    """What a sanitizer has found first, and how its run ended."""
    output.seek(0)
    lines = output.read().splitlines()
    errors = [line for line in lines if line.startswith("=========")]
    print("\n".join([f"{tool}:", *errors[:40], "...", *lines[-20:]]), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--no-tests", action="store_true", help="the tools alone")
    parser.add_argument("--tools", nargs="*", choices=SANITIZERS, default=SANITIZERS, help="none: the tests alone")
    parser.add_argument("--tests", nargs="+", default=SANITIZED, help="that the tools watch, as pytest names them")
    parser.add_argument("--seconds", type=float, default=SANITIZER_SECONDS, help="after which the tools are stopped")
    options = parser.parse_args(arguments)
    if not _core.gpus()[0]:
        print(f"no GPU: {_core.gpus()[1]}", file=sys.stderr)
        return 1
    is_right = check(
        options.device,
        runs_tests=not options.no_tests,
        tools=options.tools,
        watched=options.tests,
        seconds=options.seconds,
    )
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
