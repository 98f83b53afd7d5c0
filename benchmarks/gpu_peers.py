"""torch and transformers beside a GPU's operations and models, where they are installed. Both sides of a ratio are timed alike: whole
calls, each waited for, on weights that are not in the cache from the call before."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu_shapes import Shape, products, seconds
from llama_ext import ops

# Bytes of weights that calls take turns with: more than any L2 cache.
ROTATED_BYTES = 256 << 20
ROUNDS = 20
# Times that all products of a prompt are made.
CHAINS = 5


def torch_for(device: str) -> Any:
    """The module, or None where it is not installed or has no such GPU."""
    try:
        import torch
    except ImportError:
        return None
    index = int(device.partition(":")[2] or 0)
    return torch if torch.cuda.is_available() and index < torch.cuda.device_count() else None


def waiting(torch: Any, device: str, call: Callable[[], object]) -> Callable[[], None]:
    """A call of torch with a wait for its results, as ours have."""
    is_gpu = device.startswith("cuda")

    def run() -> None:
        call()
        if is_gpu:
            torch.cuda.synchronize(device)

    return run


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """One of some calls at a time, one after the other."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def product_seconds(torch: Any, device: str, rows: int, n: int, k: int) -> tuple[float, float]:
    """y (rows, n) = x W^T of ours, float32 in and out, and of torch, bfloat16 in and out."""
    copies = max(1, min(16, ROTATED_BYTES // (2 * n * k)))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    weight = (rng.standard_normal((n, k)) * 0.02).astype(np.float32)
    ours_x = ops.to_device(x, device)
    out = ops.to_device(np.zeros((rows, n), np.float32), device)
    matrices = [ops.pack(weight, "bfloat16", device=device) for _ in range(copies)]
    ours = seconds(in_turn([lambda m=m: ops.matmul(ours_x, m, out=out, device=device) for m in matrices]), ROUNDS)
    del matrices
    theirs_x = torch.from_numpy(x).to(device, torch.bfloat16)
    weights = [torch.from_numpy(weight).to(device, torch.bfloat16) for _ in range(copies)]
    calls = [waiting(torch, device, lambda w=w: torch.nn.functional.linear(theirs_x, w)) for w in weights]
    return ours, seconds(in_turn(calls), ROUNDS)


def products_seconds(torch: Any, device: str, shape: Shape, tokens: int) -> float:
    """Of all products of a prompt by torch, in bfloat16 and with nothing between them: a prefill cannot take less. 0 without torch.

    The blocks' products and the head's, of the last token alone, are one chain that is waited for once, as a prefill is."""
    if torch is None:
        return 0.0

    def random(*extents: int) -> Any:
        return torch.randn(extents, device=device, dtype=torch.bfloat16)

    matrices = products(shape).values()
    copies = min(shape.layers, -(-ROTATED_BYTES // (2 * sum(n * k for n, k in matrices))))
    rotated = [[random(n, k) for n, k in matrices] for _ in range(copies)]
    inputs = [random(tokens, k) for _, k in matrices]
    head, last = random(shape.vocabulary, shape.width), random(1, shape.width)

    def chain() -> None:
        for layer in range(shape.layers):
            for x, weight in zip(inputs, rotated[layer % copies], strict=True):
                torch.nn.functional.linear(x, weight)
        torch.nn.functional.linear(last, head)

    return seconds(waiting(torch, device, chain), CHAINS)


def attention_seconds(torch: Any, device: str, shape: Shape, tokens: int) -> tuple[float, float]:
    """Causal attention of a sequence: of ours, which stores keys and values in a bfloat16 cache first, and of torch."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, tokens, shape.heads, shape.head_dim)).astype(np.float32)
    k, v = (rng.standard_normal((1, tokens, shape.kv_heads, shape.head_dim)).astype(np.float32) for _ in range(2))
    ours_q, ours_k, ours_v = (ops.to_device(each, device) for each in (q, k, v))
    out = ops.to_device(np.zeros_like(q), device)
    ours = seconds(lambda: ops.attention(ours_q, ours_k, ours_v, kv_dtype="bfloat16", out=out, device=device), ROUNDS)
    theirs = [torch.from_numpy(each).to(device, torch.bfloat16).transpose(1, 2).contiguous() for each in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    call = waiting(torch, device, lambda: attend(*theirs, is_causal=True, enable_gqa=True))
    return ours, seconds(call, ROUNDS)


def compare(torch: Any, device: str, shape: Shape, tokens: int) -> list[list[object]]:
    """Rows (operation, ours, torch, ratio) in TFLOP/s, of a prompt. None without torch."""
    if torch is None:
        return []
    rows: list[list[object]] = []

    def add(name: str, operations: float, ours: float, theirs: float) -> None:
        rows.append(
            [name, f"{1e-12 * operations / ours:,.1f}", f"{1e-12 * operations / theirs:,.1f}", f"{theirs / ours:.2f}"]
        )

    for name, (n, k) in products(shape).items():
        add(f"{name} ({tokens} x {n} x {k})", 2.0 * tokens * n * k, *product_seconds(torch, device, tokens, n, k))
    operations = 2.0 * tokens * tokens * shape.heads * shape.head_dim
    add(f"attention of {tokens} tokens", operations, *attention_seconds(torch, device, shape, tokens))
    return rows


def transformers_speed(
    torch: Any, device: str, shape: Shape, prompt: int, tokens: int, compiles: bool = True
) -> list[object]:
    """(prefill tok/s, decode tok/s) of transformers' model of random bfloat16 weights, its decoding compiled; or why not."""
    try:
        import transformers
    except ImportError:
        return ["transformers is not installed", "-"]
    config = transformers.LlamaConfig(**shape.config(prompt + 256).to_dict())
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = transformers.LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    model.generation_config.cache_implementation = "static"
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.randint(0, shape.vocabulary, (1, prompt), device=device)
    with torch.inference_mode():
        prefill = seconds(waiting(torch, device, lambda: model(ids, logits_to_keep=1)), 3)
        if compiles:
            model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

        def run(count: int) -> float:
            begin = time.perf_counter()
            model.generate(ids[:, :64], max_new_tokens=count, min_new_tokens=count, do_sample=False)
            return time.perf_counter() - begin

        for count in (8, 8 + tokens):
            run(count)
        token = statistics.median(run(8 + tokens) - run(8) for _ in range(3)) / tokens
    return [f"{prompt / prefill:,.0f}", f"{1 / token:,.1f}"]
