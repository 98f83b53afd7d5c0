"""How the model in the box was made: a tokenizer and a Llama learned from one text, then rounded to int8.

python examples/train_demo_model.py tinyshakespeare.txt demo

The text: https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt. All steps take most of an
hour on two cores; `--steps 30` shows the way in under a minute. Ctrl-C leaves a checkpoint in DIRECTORY-training, from which the
same command goes on. One seed gives one model on one instruction set, whatever the number of threads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import llama_ext

VOCABULARY, CONTEXT, ROWS = 512, 512, 8
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
TRAINING = {
    "optimizer": "adamw",
    "lr": 2e-3,
    "min_lr": 0.02,
    "betas": (0.9, 0.99),
    "weight_decay": 0.1,
    "warmup": 0.03,
    "dropout": 0.1,
}
GENERATION = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 256, "bos_token_id": None, "eos_token_id": None}
PROMPT = "ROMEO:"

MODEL_CARD = """\
---
license: mit
language: en
library_name: llama_ext
tags: [llama, text-generation]
---
# A Llama on tiny Shakespeare

A Llama of {parameters:,} parameters that continues a text in the manner of Shakespeare's plays. It is here so that everything can
be tried at once, without a download. It knows nothing; do not ask it anything.

| | |
| --- | --- |
| shape | {layers} layers, {heads} heads that share {kv_heads} key/value heads, width {width}, feed-forward {ffn_width}, tied embeddings, {context} positions |
| weights | int8, packed: a file of {megabytes:.1f} MB that is mapped and used as it lies |
| vocabulary | {vocabulary} tokens of byte-level BPE, learned from the same text; any text can be written in them |
| trained on | the first 90% of tiny Shakespeare (1,115,394 characters; Shakespeare's text is in the public domain) |
| training | {steps:,} steps of {rows} x {context} tokens of AdamW in float32, dropout {dropout}: {epochs:.0f} times the text |
| validation loss | {loss:.4f} nats a character over the whole last 10%, in windows of {context} tokens; {float_loss:.4f} before rounding to int8 |
| made with | `examples/train_demo_model.py`, llama_ext {version}, seed {seed} |
| licence | MIT |

The validation loss is that of these int8 weights, read back: the sum over all tokens, divided by the characters they stand for. There is
neither a first nor a last token: a prompt needs at least one character, and a text ends where its length says.

`generation_config.json` samples at temperature 0.8; greedy decoding soon repeats itself. A sample:

```
{sample}
```
"""


def train(text: str, args: argparse.Namespace) -> llama_ext.LlamaForCausalLM:
    """A model of a text, trained from nothing, or from where an earlier run of this command ended."""
    tokenizer = llama_ext.Tokenizer.train(text, vocab_size=VOCABULARY)
    config = llama_ext.LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        **SHAPE,
    )
    model = llama_ext.LlamaForCausalLM(config, tokenizer, seed=args.seed, threads=args.threads)
    print(model)
    model.compile(**TRAINING)
    model.fit(
        text,
        batch_size=ROWS,
        max_steps=args.steps,
        seed=args.seed,
        checkpoint_dir=f"{args.directory}-training",
        save_every=500,
        resume=True,
        log_file=f"{args.directory}-training.jsonl",
    )
    return model


def nats_a_character(model: llama_ext.LlamaForCausalLM, text: str) -> float:
    """-ln p of a text, in consecutive windows of the model's context, divided by its characters."""
    found = model.evaluate(text)
    return found.loss * found.tokens / len(text)


def write(model: llama_ext.LlamaForCausalLM, held_out: str, epochs: float, args: argparse.Namespace) -> None:
    """Writes the int8 model, and beside it what it is and how good the written one is."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        (Path(directory) / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
        print(llama_ext.quantize(directory, args.directory, "int8"))
    written = llama_ext.LlamaForCausalLM.from_pretrained(args.directory, threads=args.threads)
    config = written.config
    loss = nats_a_character(written, held_out)
    card = MODEL_CARD.format(
        parameters=written.num_parameters(),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        width=config.hidden_size,
        ffn_width=config.intermediate_size,
        context=CONTEXT,
        megabytes=(args.directory / "model.safetensors").stat().st_size / 1e6,
        vocabulary=config.vocab_size,
        steps=args.steps,
        rows=ROWS,
        dropout=TRAINING["dropout"],
        epochs=epochs,
        loss=loss,
        float_loss=nats_a_character(model, held_out),
        version=llama_ext.__version__,
        seed=args.seed,
        sample=written.generate(PROMPT, max_new_tokens=160, seed=args.seed),
    )
    (args.directory / "README.md").write_text(card, encoding="utf-8")
    print(f"validation loss {loss:.4f} nats a character; wrote {args.directory}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="the text; its last 10%% only score the model")
    parser.add_argument("directory", type=Path, help="where to write the model")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    args = parser.parse_args()
    if not args.text.is_file():
        parser.error(f"{args.text}: there is no such file")
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    text = args.text.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    model = train(text[:cut], args)
    assert model.tokenizer is not None
    epochs = args.steps * ROWS * CONTEXT / len(model.tokenizer.encode(text[:cut]))
    write(model, text[cut:], epochs, args)


if __name__ == "__main__":
    main()
