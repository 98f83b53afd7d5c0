"""Which kernels a decoded token is made of, and how long each takes: the GPU's own times, by torch's profiler (CUPTI).

    python -m benchmarks.gpu_timeline                             8B in int4
    python -m benchmarks.gpu_timeline --shape 1b --weights bfloat16
    LLAMA_EXT_CUDA_ONE_ROW=1 python -m benchmarks.gpu_timeline    under a setting

Kernels of a recorded token may start before those ahead of them are done. What a kernel costs a token is therefore the time from the end
of the one before it to its own end; "own" is from its start. Beside a product stands what its weights alone take at the read probe's speed.
Each time is the median over tokens, and of a layer's kernels over layers, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import gpu_peers
from benchmarks.gpu_decode import GREEDY
from benchmarks.gpu_shapes import BITS, SHAPES, Shape, print_table, products, random_model
from llama_ext import _core

PROMPT_TOKENS = 64
WARM_TOKENS = 8
TOKENS = 32
# The kernel with which a greedy token ends.
LAST = "find_largest_kernel"
# Around a token's layers, and of one of them.
BEFORE = ("embedding",)
LAYER = ("qkv", "attention", "o", "gate, up", "down")
AFTER = ("head", "largest logit")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """name: without what it is a template of; times in us."""

    name: str
    begin: float
    end: float


def kernels_of(events: Sequence[dict[str, Any]]) -> list[Kernel]:
    """The kernels of a trace as torch's profiler writes it, by their ends."""
    found = []
    for event in events:
        if event.get("cat") != "kernel":
            continue
        name = event["name"].replace("(anonymous namespace)::", "").split("<")[0].split("(")[0].split("::")[-1]
        found.append(Kernel(name, event["ts"], event["ts"] + event["dur"]))
    return sorted(found, key=lambda kernel: kernel.end)


def tokens_of(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """Each with the last kernel of the token before it in front; only tokens of the commonest number of kernels."""
    ends = [i for i, kernel in enumerate(kernels) if kernel.name == LAST]
    tokens = [list(kernels[first : last + 1]) for first, last in itertools.pairwise(ends)]
    if not tokens:
        return []
    length = statistics.mode(len(token) for token in tokens)
    return [token for token in tokens if len(token) == length]


def times_of(tokens: Sequence[Sequence[Kernel]]) -> list[tuple[str, float, float]]:
    """Of each kernel of a token: its name, us from the end of the one before it to its own, and us from its own start."""
    found = []
    for i, kernel in enumerate(tokens[0][1:], start=1):
        whole = statistics.median(token[i].end - token[i - 1].end for token in tokens)
        own = statistics.median(token[i].end - token[i].begin for token in tokens)
        found.append((kernel.name, whole, own))
    return found


def rows_of(
    times: Sequence[tuple[str, float, float]], shape: Shape, kind: tuple[str, int], probe: float
) -> list[list[object]]:
    """Of the table. A token that is not made of the kernels that we know by their places is listed as it is."""
    if len(times) != len(BEFORE) + shape.layers * len(LAYER) + len(AFTER):
        return [[name, name, f"{whole:.2f}", f"{own:.2f}", ""] for name, whole, own in times]
    begin, end = len(BEFORE), len(times) - len(AFTER)
    parts = [
        *((name, [times[i]]) for i, name in enumerate(BEFORE)),
        *((name, times[begin + i : end : len(LAYER)]) for i, name in enumerate(LAYER)),
        *((name, [times[end + i]]) for i, name in enumerate(AFTER)),
    ]
    encoding, group = kind
    matrices = products(shape) | {"head": (shape.vocabulary, shape.width)}
    rows: list[list[object]] = []
    for name, of in parts:
        weights = ""
        if name in matrices:
            # As random_model() keeps them.
            bits = BITS["int8" if name == "head" and encoding == "int4" else encoding] + (16 / group if group else 0)
            weights = f"{matrices[name][0] * matrices[name][1] * bits / 8 / probe * 1e6:.2f}"
        whole, own = (statistics.median(each[i] for each in of) for i in (1, 2))
        rows.append([name, of[0][0], f"{whole:.2f}", f"{own:.2f}", weights])
    layer = sum(float(str(row[2])) for row in rows[begin : begin + len(LAYER)])
    return [*rows, ["a layer", "", f"{layer:.2f}", "", ""]]


def profile(torch: Any, device: str, shape: Shape, kind: tuple[str, int]) -> list[dict[str, Any]]:
    """Events of some recorded tokens."""
    prompt = np.random.default_rng(1).integers(0, shape.vocabulary, PROMPT_TOKENS).astype(np.int32)
    model = random_model(device, shape, kind, PROMPT_TOKENS + WARM_TOKENS + TOKENS)

    def run(tokens: int) -> None:
        loop = _core.Generation(
            model, [prompt], sampling=GREEDY, max_new_tokens=[tokens], eos=[], seed=0, kv_dtype="bfloat16"
        )
        while not loop.done:
            loop.run(64)

    run(WARM_TOKENS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        run(WARM_TOKENS + TOKENS)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--weights", choices=sorted(BITS), default="int4")
    parser.add_argument("--layers", type=int, default=8, help="of the model: all are alike")
    options = parser.parse_args(arguments)
    shape = dataclasses.replace(SHAPES[options.shape], layers=options.layers)
    kind = next((each for each in shape.kinds if each[0] == options.weights), None)
    if kind is None:
        parser.error(f"{options.shape} has no weights {options.weights}: {', '.join(name for name, _ in shape.kinds)}")
    if not _core.gpus()[0]:
        print(f"no GPU: {_core.gpus()[1]}", file=sys.stderr)
        return 1
    torch = gpu_peers.torch_for(options.device)
    if torch is None:
        print("torch is not installed, or does not see this GPU: its profiler is needed", file=sys.stderr)
        return 1
    probe = _core.gpu_read_bandwidth(options.device, 4 << 30, 10)
    tokens = tokens_of(kernels_of(profile(torch, options.device, shape, kind)))
    if not tokens:
        print(f"the profiler saw no tokens: no two kernels {LAST}", file=sys.stderr)
        return 1
    whole = statistics.median(token[-1].end - token[0].end for token in tokens)
    print(f"\n{', '.join(_core.gpus()[0])}; read probe {probe / 1e9:,.0f} GB/s")
    print(
        f"{options.shape} {options.weights}, {shape.layers} layers: a token {whole:.1f} us, of {len(tokens)} tokens\n"
    )
    header = ["", "kernel", "us", "own", "its weights at the probe's speed"]
    print_table(header, rows_of(times_of(tokens), shape, kind, probe))
    return 0


if __name__ == "__main__":
    sys.exit(main())
