"""One training setting, timed step by step in a process of its own: with llama_ext, or with transformers on torch.

Prints a line of JSON, as the runners of `measure` do, once it is ready: what it uses. Each line that it reads is a number of seconds to train
for, one step at least, and is answered by a line with the rates of the steps. It ends with its input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.measure import RESULT, peak_memory_bytes

# nanoGPT's two settings for tiny Shakespeare.
SETTINGS: dict[str, dict[str, int]] = {
    "4x128": {"layers": 4, "heads": 4, "width": 128, "ffn_width": 344, "context": 64, "batch": 12},
    "6x384": {"layers": 6, "heads": 6, "width": 384, "ffn_width": 1024, "context": 256, "batch": 64},
}
VOCABULARY = 65


def matmul_parameters(setting: dict[str, int]) -> int:
    """Weights of products, the head's included."""
    width = setting["width"]
    return setting["layers"] * (4 * width**2 + 3 * width * setting["ffn_width"]) + VOCABULARY * width


def llama_ext_step(setting: dict[str, int], threads: int, dtype: str) -> tuple[Callable[[Any, Any], None], Any]:
    """A step on (B, T) tokens and labels; and a function that says what it uses."""
    import llama_ext
    from llama_ext import _core
    from llama_ext.training.model import use_trainable_core

    config = llama_ext.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=setting["width"],
        intermediate_size=setting["ffn_width"],
        num_hidden_layers=setting["layers"],
        num_attention_heads=setting["heads"],
        max_position_embeddings=setting["context"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = llama_ext.LlamaForCausalLM(config, seed=0, threads=threads)
    optimizer = {"kind": "adamw", "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}
    trainer = _core.Trainer(use_trainable_core(model), optimizer=optimizer, compute=dtype)
    lengths = np.full(setting["batch"], setting["context"], np.int64)

    def step(tokens: Any, labels: Any) -> None:
        trainer.accumulate(tokens.ravel(), labels.ravel(), lengths, scale=1 / tokens.size)
        norm = trainer.gradient_norm()
        trainer.step(lr=1e-3, gradient_scale=min(1.0, 1.0 / (norm + 1e-6)))

    return step, lambda: {"version": llama_ext.__version__, "isa": model.isa, "trainer_bytes": trainer.nbytes}


def torch_step(setting: dict[str, int], threads: int, dtype: str) -> tuple[Callable[[Any, Any], None], Any]:
    """The same with transformers' model, torch's AdamW and, for bfloat16, its autocast."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=setting["width"],
            intermediate_size=setting["ffn_width"],
            num_hidden_layers=setting["layers"],
            num_attention_heads=setting["heads"],
            num_key_value_heads=setting["heads"],
            max_position_embeddings=setting["context"],
            tie_word_embeddings=True,
        )
    )
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))

    def step(tokens: Any, labels: Any) -> None:
        x, y = torch.tensor(tokens.astype(np.int64)), torch.tensor(labels.astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(x).logits
        loss = torch.nn.functional.cross_entropy(logits.float().reshape(-1, VOCABULARY), y.reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, lambda: {"version": transformers.__version__, "torch": torch.__version__}


def say(result: dict[str, Any]) -> None:
    """A line that `benchmarks.training` reads; libraries print what they like."""
    print(RESULT + json.dumps(result), flush=True)


def main() -> None:
    """The runner."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=("llama_ext", "torch"), required=True)
    parser.add_argument("--setting", choices=tuple(SETTINGS), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    try:
        make = llama_ext_step if options.engine == "llama_ext" else torch_step
        before = peak_memory_bytes()
        step, facts = make(setting, options.threads, options.dtype)
        rng = np.random.default_rng(0)
        shape = (setting["batch"], setting["context"])

        def timed_step() -> float:
            tokens = rng.integers(0, VOCABULARY, shape).astype(np.int32)
            labels = rng.integers(0, VOCABULARY, shape).astype(np.int32)
            start = time.perf_counter()
            step(tokens, labels)
            return time.perf_counter() - start

        timed_step()  # which makes the memory
        say(facts())
        for line in sys.stdin:
            end = time.perf_counter() + float(line)
            times = [timed_step()]
            while time.perf_counter() < end:
                times.append(timed_step())
            peak = peak_memory_bytes()
            tokens = setting["batch"] * setting["context"]
            say(
                {
                    "rates": [tokens / seconds for seconds in times],
                    "peak_memory_bytes": peak,
                    "grown_memory_bytes": peak - before,
                }
            )
    except ModuleNotFoundError as error:
        say({"error": f"not installed: {error.name}"})
    except Exception as error:  # an engine's failure is a result: the others still run
        traceback.print_exc(file=sys.stderr)
        say({"error": f"failed: {type(error).__name__}: {str(error)[:200]}"})


if __name__ == "__main__":
    main()
