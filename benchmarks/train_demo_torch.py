"""Train the demonstration model: a character-level Llama on tiny Shakespeare, with PyTorch.

A development tool: it needs the packages torch and transformers, which are no dependency of the project. It makes the
directory `python/llama_ext/data/demo` and, as the same training in another framework, the figure that our own training
is compared with.

The bulk of the steps sees short windows, which cost least per token; the last ones see the full context, so that the
model has met every position it will be asked for. With one seed and one thread count, one machine gives one result.

Example:
    python benchmarks/train_demo_torch.py tinyshakespeare.txt python/llama_ext/data/demo
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

UNKNOWN = "<unk>"
PROMPT = "ROMEO:"

MODEL_CARD = """\
---
license: mit
language: en
library_name: llama_ext
tags: [llama, character-level, text-generation]
---
# A character-level Llama on tiny Shakespeare

A Llama of {parameters:,} parameters that continues a text in the manner of Shakespeare's plays, one character at a time. It is here
so that everything can be tried at once, without a download. It knows nothing; do not ask it anything.

| | |
| --- | --- |
| shape | {layers} layers, {heads} heads, width {width}, feed-forward {ffn_width}, tied embeddings, {context} positions |
| weights | bfloat16 |
| vocabulary | the {characters} characters of the text, and `<unk>` for any other one |
| trained on | the first 90% of tiny Shakespeare (1,115,394 characters; Shakespeare's text is in the public domain) |
| training | {steps:,} steps of AdamW in float32, {tokens:,} characters, cosine schedule; windows of 64 characters, at last of {context} |
| validation loss | {validation_loss:.4f} nats a character over the whole last 10%, in windows of {context}; {validation_loss_64:.4f} in windows of 64 |
| made with | `benchmarks/train_demo_torch.py`, seed {seed}, PyTorch {version} |
| licence | MIT |

The validation loss is that of these bfloat16 weights, read back. A character that is not in the vocabulary becomes `<unk>`, which the
model has never seen, and shows as `<unk>` when it is decoded. There is neither a first nor a last token: a prompt needs at least one
character, and a text ends where its length says.

`generation_config.json` samples at temperature 0.8; greedy decoding soon repeats itself. A sample:

```
{sample}
```
"""


@dataclass(frozen=True)
class Phase:
    """Steps that share a window length (tokens) and a batch (windows)."""

    steps: int
    context: int
    batch: int


def build_tokenizer(text: str) -> Tokenizer:
    """One token per character of the text, in code point order, after `<unk>` for every other character."""
    vocabulary = {UNKNOWN: 0} | {character: index for index, character in enumerate(sorted(set(text)), start=1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # "." does not match a newline.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def build_model(vocabulary: int, context: int) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        # Every token is a character: transformers' default ids would end a text at its first space.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def summed_loss(model: transformers.LlamaForCausalLM, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=x, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="sum")


def validation_loss(model: transformers.LlamaForCausalLM, ids: torch.Tensor, context: int) -> float:
    """Mean negative log-likelihood (nats per character) of a whole split, cut into consecutive windows."""
    model.eval()
    windows = (len(ids) - 1) // context
    x = ids[: windows * context].view(windows, context)
    y = ids[1 : windows * context + 1].view(windows, context)
    with torch.inference_mode():
        total = sum(summed_loss(model, a, b).item() for a, b in zip(x.split(16), y.split(16), strict=True))
        rest = len(ids) - 1 - windows * context
        if rest:
            total += summed_loss(model, ids[None, -rest - 1 : -1], ids[None, -rest:]).item()
    model.train()
    return total / (len(ids) - 1)


def batches(ids: torch.Tensor, phases: list[Phase], seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Windows at random offsets."""
    rng = np.random.default_rng(seed)
    for phase in phases:
        for _ in range(phase.steps):
            offsets = torch.from_numpy(rng.integers(0, len(ids) - phase.context - 1, phase.batch))
            window = ids[offsets[:, None] + torch.arange(phase.context + 1)]
            yield window[:, :-1], window[:, 1:]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = 0.02 * peak
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(
    model: transformers.LlamaForCausalLM, ids: torch.Tensor, phases: list[Phase], peak: float, seed: int
) -> dict[str, float]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99))
    steps = sum(phase.steps for phase in phases)
    smoothed = 0.0
    tokens = 0
    start = time.perf_counter()
    model.train()
    for step, (x, y) in enumerate(batches(ids, phases, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = summed_loss(model, x, y) / y.numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += y.numel()
        smoothed = loss.item() if step == 0 else 0.95 * smoothed + 0.05 * loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            print(
                f"step {step + 1}/{steps}: loss {smoothed:.4f}, {tokens / seconds:.0f} tok/s, {seconds:.0f} s",
                flush=True,
            )
    return {"steps": steps, "tokens": tokens, "seconds": time.perf_counter() - start, "training_loss": smoothed}


def save(model: transformers.LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """The directory as Hugging Face lays it out, weights in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype", "bfloat16")  # the older name: every reader knows it
    config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    generation = {
        "do_sample": True,
        "temperature": 0.8,
        "max_new_tokens": 256,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    files = {
        "config.json": config,
        "generation_config.json": generation | {"transformers_version": transformers.__version__},
        # No `unk_token`: transformers would make it a special token, and drop from a text what it stands for.
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_position_embeddings,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))
    for path in directory.iterdir():
        path.chmod(0o644)


def write_model_card(directory: Path, report: dict[str, float], sample: str) -> None:
    card = MODEL_CARD.format(**report, version=torch.__version__, sample=sample)
    (directory / "README.md").write_text(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="the text; the last 10%% of it is the validation split")
    parser.add_argument("directory", type=Path, help="where to write the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--short-steps", type=int, default=2800, help="steps of 32 windows of 64 characters")
    parser.add_argument("--long-steps", type=int, default=500, help="steps of 8 windows of the full context")
    parser.add_argument("--context", type=int, default=512)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    text = args.text.read_text(encoding="utf-8")
    tokenizer = build_tokenizer(text)
    ids = torch.tensor(tokenizer.encode(text).ids)
    if tokenizer.decode(ids.tolist()) != text:
        raise SystemExit("the tokenizer does not round-trip the text")
    split = int(0.9 * len(ids))
    phases = [Phase(args.short_steps, 64, 32), Phase(args.long_steps, args.context, 8)]

    model = build_model(tokenizer.get_vocab_size(), args.context)
    report = {
        "seed": args.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "characters": tokenizer.get_vocab_size() - 1,
        "layers": model.config.num_hidden_layers,
        "heads": model.config.num_attention_heads,
        "width": model.config.hidden_size,
        "ffn_width": model.config.intermediate_size,
        "context": args.context,
    }
    print(f"{report['parameters']:,} parameters, {len(ids):,} characters")
    report |= train(model, ids[:split], phases, args.lr, args.seed)
    save(model, tokenizer, args.directory)

    # What is reported is what was written: the rounded weights, read back.
    saved = transformers.LlamaForCausalLM.from_pretrained(args.directory, dtype=torch.float32)
    report |= {
        "validation_loss": validation_loss(saved, ids[split:], args.context),
        "validation_loss_64": validation_loss(saved, ids[split:], 64),
    }
    print(json.dumps(report))
    torch.manual_seed(args.seed)
    prompt = torch.tensor([tokenizer.encode(PROMPT).ids])
    sample = saved.eval().generate(prompt, attention_mask=torch.ones_like(prompt))
    write_model_card(args.directory, report, tokenizer.decode(sample[0].tolist()))


if __name__ == "__main__":
    main()
