"""How fast a GPU decodes under several settings, or with several builds of the library, in turns within one run.

    python -m benchmarks.gpu_decode                             products of one row on tensor cores, as it is, and all by matmul_one_row.cu
    python -m benchmarks.gpu_decode --shapes 8b --weights int4  one shape, one way to keep its weights
    python -m benchmarks.gpu_decode --settings LLAMA_EXT_CUDA_OVERLAP=0 LLAMA_EXT_CUDA_OVERLAP=1,LLAMA_EXT_CUDA_ONE_ROW=1
    python -m benchmarks.gpu_decode --libraries before.so after.so   builds of the same headers as the installed module

The first compares products of codes; with bfloat16 weights only the last differs, in how a multiprocessor is divided.
Each setting of each library runs in a process of its own, as both are read once, and all of them in each round. A cell is the median
of all rounds, and its share of the read probe of its own processes. The tokens and their log probabilities must be the same, bit for bit,
whatever the setting; if they are not, that is said, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.gpu_shapes import SHAPES, bytes_read, print_table, random_model
from benchmarks.measure import RESULT
from llama_ext import _core

# Decoding is greedy, by the recorded pass that `generate` replays.
GREEDY = {"temperature": 0.0}
# Tokens before the timed ones, which make the recording.
WARM_TOKENS = 8
PROMPT_TOKENS = 64
REPEATS = 3
DEFAULT_SETTINGS = ["LLAMA_EXT_CUDA_ONE_ROW=0", "", "LLAMA_EXT_CUDA_ONE_ROW=1"]
LIBRARY = "LLAMA_EXT_CUDA_LIBRARY"


@dataclass(frozen=True)
class Decoded:
    """seconds: of a token. digest: of all tokens and their log probabilities."""

    seconds: float
    digest: str


def decode(model: _core.Model, prompt: Any, tokens: int, kv_dtype: str) -> Decoded:
    """Tokens after a prompt: a generation that is `tokens` longer takes so much longer."""
    digest = hashlib.sha256()

    def run(count: int) -> float:
        loop = _core.Generation(
            model, [prompt], sampling=GREEDY, max_new_tokens=[count], eos=[], seed=0, kv_dtype=kv_dtype
        )
        events = []
        begin = time.perf_counter()
        while not loop.done:
            events += loop.run(64)
        spent = time.perf_counter() - begin
        digest.update(repr(events).encode())
        return spent

    run(WARM_TOKENS)
    spent = statistics.median(run(WARM_TOKENS + tokens) - run(WARM_TOKENS) for _ in range(REPEATS)) / tokens
    return Decoded(spent, digest.hexdigest())


def measure(device: str, kinds: list[tuple[str, str]], tokens: int) -> dict[str, Any]:
    """By "shape weights": tokens a second, their share of the read probe, and the digest of what was decoded."""
    is_tiny = all(name == "tiny" for name, _ in kinds)
    probe = _core.gpu_read_bandwidth(device, 1 << 22 if is_tiny else 4 << 30, 2 if is_tiny else 10)
    found = {}
    for name, weights in kinds:
        shape = SHAPES[name]
        kind = next(each for each in shape.kinds if each[0] == weights)
        prompt = np.random.default_rng(1).integers(0, shape.vocabulary, PROMPT_TOKENS).astype(np.int32)
        model = random_model(device, shape, kind, PROMPT_TOKENS + WARM_TOKENS + tokens)
        decoded = decode(model, prompt, tokens, "float32" if weights == "float32" else "bfloat16")
        share = bytes_read(model, shape) / decoded.seconds / probe
        found[f"{name} {weights}"] = {"speed": 1 / decoded.seconds, "share": share, "digest": decoded.digest}
    return found


def measure_apart(settings: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    """`measure` in a process of its own.

    Raises:
        RuntimeError: It ended with an error, which is told.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_decode", "--here", *arguments]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    results = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode != 0 or not results:
        raise RuntimeError(
            f"with {settings} the measurement ended with {done.returncode}: {done.stderr.strip()[-2000:]}"
        )
    return json.loads(results[-1])


def read_settings(text: str) -> dict[str, str]:
    """Of "NAME=VALUE,NAME=VALUE", or "" for none."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    if any(not name or not equals for name, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, or several with commas between them, got {text!r}")
    return {name: value for name, _, value in pairs}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["1b", "8b"])
    parser.add_argument(
        "--weights", nargs="+", choices=["float32", "bfloat16", "int8", "int4"], help="default: all there are"
    )
    parser.add_argument(
        "--settings", nargs="+", type=read_settings, default=[read_settings(each) for each in DEFAULT_SETTINGS]
    )
    parser.add_argument("--libraries", nargs="+", default=[""], help="of CUDA kernels; default: the installed one")
    parser.add_argument("--tokens", type=int, default=128, help="to decode")
    parser.add_argument("--rounds", type=int, default=2, help="each runs everything")
    parser.add_argument(
        "--here", action="store_true", help="measure in this process, under its environment, and print JSON"
    )
    options = parser.parse_args(arguments)
    kinds = [
        (name, weights)
        for name in options.shapes
        for weights, _ in SHAPES[name].kinds
        if options.weights is None or weights in options.weights
    ]
    if not kinds:
        parser.error(f"{' and '.join(options.shapes)}: none has weights {' or '.join(options.weights)}")
    if options.here:
        print(RESULT + json.dumps(measure(options.device, kinds, options.tokens)))
        return 0
    if not _core.gpus()[0]:
        print(f"no GPU: {_core.gpus()[1]}", file=sys.stderr)
        return 1
    shared = ["--device", options.device, "--tokens", str(options.tokens), "--shapes", *options.shapes]
    shared += ["--weights", *options.weights] if options.weights else []
    variants = {}
    for library, settings in itertools.product(options.libraries, options.settings):
        named = settings | ({LIBRARY: os.path.abspath(library)} if library else {})
        label = " ".join(f"{key.removeprefix('LLAMA_EXT_CUDA_')}={value}" for key, value in settings.items())
        variants[f"{label} {library}".strip() or "as it is"] = named
    results: dict[str, list[dict[str, Any]]] = {label: [] for label in variants}
    for done in range(options.rounds):
        for label, named in variants.items():
            print(f"round {done + 1} of {options.rounds}: {label}", file=sys.stderr, flush=True)
            try:
                results[label].append(measure_apart(named, shared))
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return 1
    return report(results)


def report(results: dict[str, list[dict[str, Any]]]) -> int:
    """The table, and the exit code."""
    columns = list(next(iter(results.values()))[0])
    rows: list[list[object]] = []
    for label, rounds in results.items():
        row: list[object] = [label]
        for column in columns:
            speed = statistics.median(each[column]["speed"] for each in rounds)
            share = statistics.median(each[column]["share"] for each in rounds)
            row.append(f"{speed:,.1f} ({share:.0%})")
        rows.append(row)
    print(f"\n{', '.join(_core.gpus()[0])}\ndecoding, tokens a second (of the read probe)\n")
    print_table(["", *columns], rows)
    differing = [
        column
        for column in columns
        if len({each[column]["digest"] for rounds in results.values() for each in rounds}) > 1
    ]
    if differing:
        print(f"\nnot the same tokens everywhere, or not the same log probabilities: {', '.join(differing)}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
