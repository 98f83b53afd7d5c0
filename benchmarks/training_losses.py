"""The small setting trained to its end in a process of its own, with llama_ext or with transformers on torch, and its loss.

Both are nanoGPT's CPU setting: the first 90% of a text, character by character, random crops, AdamW, and the loss on the whole last
tenth. What differs is what has to: each draws its own first weights and crops. Prints one line of JSON, as the runners of `measure` do.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.measure import RESULT
from benchmarks.training_runner import SETTINGS

__all__ = ["SETTING", "learning_rate", "summary", "table"]

SETTING = "4x128"
STEPS = 2000
LR, LAST_LR, WARMUP = 1e-3, 1e-4, 100
# Windows of the validation split that are scored together.
_SCORED = 64


def learning_rate(step: int, steps: int) -> float:
    """Of a step, counted from 0: up in a line, then down as a cosine."""
    if step < WARMUP:
        return LR * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return LAST_LR + 0.5 * (LR - LAST_LR) * (1 + math.cos(math.pi * done))


def with_llama_ext(text: str, dtype: str, threads: int, seed: int, steps: int) -> dict[str, Any]:
    """`fit` with the preset, which has the same numbers."""
    import llama_ext
    from llama_ext.training.presets import PRESETS

    preset = PRESETS["cpu"]
    tokenizer = llama_ext.Tokenizer.train([text], kind="char")
    model = llama_ext.LlamaForCausalLM(preset.config(tokenizer), tokenizer=tokenizer, seed=seed, threads=threads)
    model.compile(precision=dtype, **preset.compile)
    cut = int(0.9 * len(text))
    start = time.perf_counter()
    fit = {**preset.fit, "max_steps": steps}
    model.fit(text[:cut], context=preset.context, seed=seed, verbose=0, **fit)
    seconds = time.perf_counter() - start
    scored = model.evaluate(text[cut:], context=preset.context)
    tokens = steps * preset.fit["batch_size"] * preset.context
    return {"validation_loss": scored.loss, "seconds": seconds, "rate": tokens / seconds}


def with_torch(text: str, dtype: str, threads: int, seed: int, steps: int) -> dict[str, Any]:
    """transformers' model, torch's AdamW and, for bfloat16, its autocast."""
    import torch
    import transformers

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    setting = SETTINGS[SETTING]
    context, batch = setting["context"], setting["batch"]
    letters = {letter: index for index, letter in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[letter] for letter in text])
    cut = int(0.9 * len(text))
    learned, held_out = ids[:cut], ids[cut:]
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(letters),
            hidden_size=setting["width"],
            intermediate_size=setting["ffn_width"],
            num_hidden_layers=setting["layers"],
            num_attention_heads=setting["heads"],
            num_key_value_heads=setting["heads"],
            max_position_embeddings=context,
            tie_word_embeddings=True,
        )
    )
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99))

    def losses(x: Any, y: Any, reduction: str) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(x).logits
        return torch.nn.functional.cross_entropy(
            logits.float().reshape(-1, len(letters)), y.reshape(-1), reduction=reduction
        )

    rng = np.random.default_rng(seed)
    places = torch.arange(context)
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        crops = torch.tensor(rng.integers(0, cut - context, batch))[:, None] + places
        loss = losses(learned[crops], learned[crops + 1], "mean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - start

    # Windows one after the other; each predicts the token after its last one as well.
    model.eval()
    total = 0.0
    with torch.no_grad():
        for begin in range(0, len(held_out) - 1, context * _SCORED):
            part = held_out[begin : begin + context * _SCORED + 1]
            whole = (len(part) - 1) // context * context
            if whole:
                x, y = part[:whole].reshape(-1, context), part[1 : whole + 1].reshape(-1, context)
                total += losses(x, y, "sum").item()
            if whole < len(part) - 1:
                total += losses(part[None, whole:-1], part[None, whole + 1 :], "sum").item()
    loss = total / (len(held_out) - 1)
    return {"validation_loss": loss, "seconds": seconds, "rate": steps * batch * context / seconds}


def summary(losses: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each kind of products: the mean of the seeds, and how far torch's is from ours."""
    lines = []
    for dtype in dict.fromkeys(str(each["dtype"]) for each in losses):
        found: dict[str, list[float]] = {}
        for each in losses:
            if each["dtype"] == dtype and "validation_loss" in each:
                found.setdefault(str(each["engine"]), []).append(each["validation_loss"])
        said = [f"{name} {statistics.fmean(values):.4f} ({len(values)} seeds)" for name, values in found.items()]
        line = f"Mean validation loss, {dtype}: {', '.join(said)}"
        if "llama_ext" in found and "torch" in found:
            line += f"; {statistics.fmean(found['llama_ext']) - statistics.fmean(found['torch']):+.4f} against torch"
        lines.append(f"{line}.")
    return lines


def table(losses: Sequence[Mapping[str, Any]]) -> report.Table:
    """A row for each training."""
    columns = ["engine", "products", "seed", "validation loss", "seconds", "tok/s"]
    title = f"4 x 128 on tiny Shakespeare, {STEPS:,} steps; the whole validation split"
    found = report.Table(title, columns, left=2)
    for each in losses:
        cells = [str(each["engine"]), str(each["dtype"]), str(each["seed"])]
        if "error" in each:
            found.rows.append([*cells, str(each["error"]), "-", "-"])
        else:
            found.rows.append(
                [*cells, f"{each['validation_loss']:.4f}", f"{each['seconds']:.0f}", f"{each['rate']:,.0f}"]
            )
    return found


def main() -> None:
    """The runner."""
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("--engine", choices=("llama_ext", "torch"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    train = with_llama_ext if options.engine == "llama_ext" else with_torch
    result: dict[str, Any]
    try:
        text = options.text.read_text(encoding="utf-8")
        result = train(text, options.dtype, options.threads, options.seed, options.steps)
    except ModuleNotFoundError as error:
        result = {"error": f"not installed: {error.name}"}
    except Exception as error:  # an engine's failure is a result: the others still run
        traceback.print_exc(file=sys.stderr)
        result = {"error": f"failed: {type(error).__name__}: {str(error)[:200]}"}
    print(RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
