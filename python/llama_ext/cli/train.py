"""`llama-ext train`: from a text file to a model directory, or a model trained further."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ext.cli.common import MODEL_HELP, Spinner, add_device_options, report, write
from llama_ext.cli.outputs import (
    add_overwrite_option,
    check_directory,
    check_file,
    check_log,
    check_plot,
    replaced_checkpoints,
)
from llama_ext.cli.text_input import read_text
from llama_ext.cli.train_checks import (
    CHECKPOINTS,
    check_device,
    check_lengths,
    check_names,
    check_new_model_options,
    check_numbers,
    check_out,
    check_prepare,
    check_sample,
    steps_per_epoch,
    warmup_of,
)
from llama_ext.errors import OptionError

if TYPE_CHECKING:
    from llama_ext.cli.common import Commands
    from llama_ext.runtime.model import LlamaForCausalLM
    from llama_ext.runtime.tokenizer import Tokenizer
    from llama_ext.training.history import History

__all__ = ["add_to", "run"]

_DESCRIPTION = """\
Trains a Llama on a text: a new one with a tokenizer of its own, or with --model one
that is there. Writes a model directory, its checkpoints beside it, and a sample to
standard output. Ctrl-C saves and ends; --resume goes on, bit for bit."""

_EPILOG = """
examples:
  llama-ext train shakespeare.txt --out shakespeare --preset cpu
  llama-ext train shakespeare.txt --out shakespeare --preset cpu --resume
  llama-ext train book.txt --out book --tokenizer bpe --vocab-size 2048 --layers 6 --width 384 \\
      --heads 6 --context 256 --batch-size 16 --steps 5000 --lr 1e-3 --plot book.png
  llama-ext train more.txt --out tuned --model path/to/llama --steps 200 --lr 1e-5
  llama-ext train large.txt --prepare large.tokens --tokenizer path/to/llama
  llama-ext train large.tokens --out large --tokenizer path/to/llama --context 1024

A file that --prepare wrote is mapped and may be larger than memory. --preset cpu and
--preset gpu are nanoGPT's settings for tiny Shakespeare.
"""

# What is neither given nor in a preset.
_SHAPE = {"layers": 4, "heads": 4, "width": 128, "context": 64}
_RUN = {"batch_size": 12, "steps": 2000, "lr": 1e-3}
# At most, where --warmup is not given.
_WARMUP = 100
_COMPILE_OPTIONS = {
    "optimizer": "optimizer",
    "lr": "lr",
    "schedule": "schedule",
    "weight_decay": "weight_decay",
    "dropout": "dropout",
    "precision": "precision",
    "skip_outliers": "skip_outliers",
}
_END = "<|endoftext|>"


def add_to(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "train",
        usage="llama-ext train TEXT --out DIR [OPTIONS]",
        help="train a model on a text",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("text", metavar="TEXT", help="a file in UTF-8, - for standard input, or one of --prepare")
    parser.add_argument("--out", metavar="DIR", help="where the model goes; its checkpoints go to DIR/checkpoints")
    parser.add_argument("--prepare", metavar="FILE", help="only write the text's tokens to a file")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    add_overwrite_option(parser)
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="MODEL", help=f"train this one further: {MODEL_HELP}")
    model.add_argument(
        "--preset", choices=("cpu", "gpu"), help="a shape and settings of training; other options override it"
    )
    model.add_argument("--layers", type=int, metavar="N", help="of a new model (default: 4)")
    model.add_argument("--width", type=int, metavar="N", help="(default: 128)")
    model.add_argument("--heads", type=int, metavar="N", help="(default: 4)")
    model.add_argument("--kv-heads", type=int, metavar="N", help="(default: as many as heads)")
    model.add_argument("--ffn-width", type=int, metavar="N", help="(default: 8/3 of the width, a multiple of 8)")
    model.add_argument("--context", type=int, metavar="N", help="tokens of a row (default: 64, or the model's)")
    model.add_argument(
        "--tokenizer",
        metavar="bpe|char|DIR",
        help="learned from the text, or that of a directory (default: char, or the model's)",
    )
    model.add_argument("--vocab-size", type=int, metavar="N", help="of a bpe tokenizer (default: 1024)")
    train = parser.add_argument_group("training")
    train.add_argument("--steps", type=int, metavar="N", help="(default: 2000)")
    train.add_argument("--epochs", type=int, metavar="N", help="instead of --steps: so many times the text's tokens")
    train.add_argument("--batch-size", type=int, metavar="N", help="rows of a step (default: 12)")
    train.add_argument("--grad-accum", type=int, metavar="N", default=1, help="batches of a step (default: 1)")
    train.add_argument(
        "--lr", type=float, metavar="X", help="highest learning rate (default: 0.001; less for a wide --model)"
    )
    train.add_argument("--optimizer", choices=("adamw", "adam", "sgd", "muon"), help="(default: adamw)")
    train.add_argument("--schedule", choices=("cosine", "linear", "constant", "wsd"), help="(default: cosine)")
    train.add_argument(
        "--warmup",
        type=float,
        metavar="N",
        help="steps, or below 1 their share (default: a tenth of the steps, at most 100)",
    )
    train.add_argument("--weight-decay", type=float, metavar="X", help="of matrices (default: 0.1)")
    train.add_argument("--dropout", type=float, metavar="P", help="(default: 0)")
    train.add_argument("--precision", choices=("float32", "bfloat16"), help="of products (default: float32)")
    train.add_argument("--skip-outliers", type=float, metavar="X", help="skip steps X deviations off; 6 is usual")
    train.add_argument("--seed", type=int, metavar="N", default=0, help="of weights, crops and dropout (default: 0)")
    add_device_options(train)
    train.add_argument("--overfit-batch", action="store_true", help="see the first batch only, to test a setting")
    follow = parser.add_argument_group("following it")
    follow.add_argument(
        "--val-fraction",
        type=float,
        metavar="X",
        default=0.1,
        help="the end of the text that is held out (default: 0.1)",
    )
    follow.add_argument("--eval-every", type=int, metavar="N", help="steps between validations (default: 250)")
    follow.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 500)")
    follow.add_argument("--keep-last", type=int, metavar="N", default=2, help="checkpoints that stay (default: 2)")
    follow.add_argument("--patience", type=int, metavar="N", help="end after N validations that are no better")
    follow.add_argument("--log-file", metavar="FILE", help="add a line of JSON for each step")
    follow.add_argument("--plot", metavar="FILE", help="draw losses and learning rates (extra `plot`)")
    follow.add_argument("--peak-gflops", type=float, metavar="X", help="of the machine: shows the share in use")
    follow.add_argument("--sample", metavar="TEXT", help="what the sample begins with (default: a newline)")
    follow.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    if (args.out is None) == (args.prepare is None):
        raise OptionError("name one of --out (a model directory) and --prepare (a file of tokens)")
    check_numbers(args)
    check_names(args)
    if args.prepare is not None:
        check_prepare(args)
        return _prepare(args)
    check_device(args)
    check_out(args)
    if args.plot is not None:
        check_plot(args.plot, args.out)
    if args.log_file is not None:
        check_log(args.log_file, args.out)
    return _train(args)


# -- tokens -----------------------------------------------------------------------------------------------------------


def _is_token_file(path: str) -> bool:
    from llama_ext.training.token_file import is_token_file

    return path != "-" and is_token_file(path)


def _tokenizer(args: argparse.Namespace, text: str | None) -> Tokenizer:
    """What --tokenizer names, or one that is learned from the text; a run that is resumed learns it anew."""
    from llama_ext.runtime.tokenizer import Tokenizer

    kind = "char" if args.tokenizer is None else args.tokenizer
    if kind not in ("bpe", "char"):
        if args.vocab_size is not None:
            raise OptionError("--vocab-size is for a tokenizer that is learned: --tokenizer bpe")
        return Tokenizer.from_pretrained(kind)
    if text is None:
        raise OptionError("a file of tokens needs the tokenizer it was made with: --tokenizer DIR")
    with Spinner("Learning a tokenizer"):
        if kind == "char":
            return Tokenizer.train(text, args.vocab_size, "char")
        return Tokenizer.train(text, 1024 if args.vocab_size is None else args.vocab_size, eos_token=_END)


def _model_tokenizer(model: str) -> Tokenizer:
    from llama_ext.runtime.loading import open_model

    with open_model(model) as files:
        if files.tokenizer is None:
            raise OptionError(f"--model {model} has no tokenizer, so it cannot read texts")
        return files.tokenizer


def _prepare(args: argparse.Namespace) -> int:
    from llama_ext.training import write_token_file

    if args.model is not None:
        check_new_model_options(args)
    target = Path(args.prepare)
    check_file(args.prepare, args.overwrite)
    folder = target.with_name(target.name + ".tokenizer")
    learned = args.model is None and args.tokenizer in (None, "bpe", "char")
    if learned:
        check_directory(folder, args.overwrite)
    text = _text(args.text)
    tokenizer = _tokenizer(args, text) if args.model is None else _model_tokenizer(args.model)
    with Spinner("Encoding"):
        ids = tokenizer.encode(text)
    count = write_token_file(target, [ids], vocabulary=len(tokenizer), tokenizer=tokenizer)
    note = ""
    if learned:
        tokenizer.save_pretrained(folder)
        note = f", and its tokenizer to {folder}"
    write(f"wrote {count:,} tokens of {len(tokenizer):,} kinds to {target}{note}\n")
    return 0


def _text(path: str) -> str:
    text = read_text(path)
    if not text:
        raise OptionError(f"{'standard input' if path == '-' else path} is empty: there is nothing to learn")
    return text


def _data(args: argparse.Namespace, text: str | None, model: LlamaForCausalLM) -> tuple[Any, Any, bool]:
    """What to learn from, what is held out or None, and whether there was a file to be closed."""
    import numpy as np

    from llama_ext.training.token_file import TokenFile, TokenSlice

    if text is None:
        tokens: Any = TokenFile(args.text)
        tokens.check_tokenizer(model.tokenizer)
    else:
        if model.tokenizer is None:
            raise OptionError("this model has no tokenizer, so it cannot read texts")
        with Spinner("Encoding"):
            tokens = np.array(model.tokenizer.encode(text), dtype=np.int32)
    # As nanoGPT: the end of the text, to the token.
    first = int(len(tokens) * (1.0 - args.val_fraction))
    if text is None:
        return TokenSlice(tokens, 0, first), TokenSlice(tokens, first, len(tokens)), True
    return tokens[:first], tokens[first:], False


# -- training ---------------------------------------------------------------------------------------------------------


def _given(args: argparse.Namespace, preset: dict[str, Any], name: str, default: Any) -> Any:
    value = getattr(args, name)
    return preset.get(name, default) if value is None else value


def _shape(args: argparse.Namespace, preset: dict[str, Any]) -> dict[str, Any]:
    """The shape of a new model, checked before a tokenizer is learned and in words of the command: the config knows others.

    Raises:
        OptionError: Heads do not share the width, or the key/value heads, evenly.
    """
    shape = {name: _given(args, preset, name, default) for name, default in _SHAPE.items()}
    width, heads = shape["width"], shape["heads"]
    if width % (2 * heads):
        raise OptionError(
            f"--width must be a multiple of twice --heads, {2 * heads}, as a head has an even share of it (RoPE rotates pairs); "
            f"got {width}"
        )
    if args.kv_heads is not None and heads % args.kv_heads:
        raise OptionError(f"--kv-heads must be a divisor of --heads, {heads}, got {args.kv_heads}")
    return shape


def _new_model(args: argparse.Namespace, text: str | None) -> LlamaForCausalLM:
    from llama_ext.models.config import LlamaConfig
    from llama_ext.runtime.model import LlamaForCausalLM
    from llama_ext.training.presets import PRESETS

    preset = vars(PRESETS[args.preset]) if args.preset else {}
    shape = _shape(args, preset)
    tokenizer = _tokenizer(args, text)
    ffn = args.ffn_width
    if ffn is None and args.width is None:
        # A preset's feed-forward belongs to its width.
        ffn = preset.get("ffn_width")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape["width"],
        intermediate_size=-(-shape["width"] * 8 // 3 // 8) * 8 if ffn is None else ffn,
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=shape["context"],
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config, tokenizer, seed=args.seed, device=args.device, threads=args.threads)


def _model(args: argparse.Namespace, text: str | None) -> LlamaForCausalLM:
    from llama_ext.io.hub import resolve
    from llama_ext.runtime.model import LlamaForCausalLM

    if args.model is None:
        return _new_model(args, text)
    check_new_model_options(args)
    return LlamaForCausalLM.from_pretrained(
        resolve(args.model), dtype="float32", device=args.device, threads=args.threads
    )


def _compile(args: argparse.Namespace, model: LlamaForCausalLM, steps: int) -> None:
    from llama_ext.training.presets import PRESETS
    from llama_ext.training.schedules import usual_lr

    lr = _RUN["lr"] if args.model is None else usual_lr(model.config.hidden_size, adapts=False)
    options: dict[str, Any] = {"betas": (0.9, 0.99), "lr": lr}
    if args.preset:
        options.update(PRESETS[args.preset].compile)
    for name, option in _COMPILE_OPTIONS.items():
        if getattr(args, name) is not None:
            options[option] = getattr(args, name)
    if args.dropout is not None:
        options["attention_dropout"] = args.dropout
    options["warmup"] = warmup_of(args, options.get("warmup", _WARMUP), steps)
    model.compile(**options)


def _train(args: argparse.Namespace) -> int:
    from llama_ext.io.atomic import folder_for
    from llama_ext.training import EarlyStopping
    from llama_ext.training.presets import PRESETS

    text = None if _is_token_file(args.text) else _text(args.text)
    model = _model(args, text)
    check_sample(args, model)
    learned, held_out, opened = _data(args, text, model)
    check_lengths(args, model, len(learned), len(held_out))
    preset = PRESETS[args.preset].fit if args.preset else {}
    steps = preset.get("max_steps", _RUN["steps"]) if args.steps is None else args.steps
    batch_size = _given(args, preset, "batch_size", _RUN["batch_size"])
    rows = batch_size * args.grad_accum
    _compile(args, model, steps if args.epochs is None else args.epochs * steps_per_epoch(args, model, learned, rows))
    validates = len(held_out) > 1
    checkpoints = Path(args.out) / CHECKPOINTS
    with folder_for(args.out), replaced_checkpoints(checkpoints, args.overwrite):
        history = model.fit(
            learned,
            batch_size=batch_size,
            grad_accum=args.grad_accum,
            max_steps=None if args.epochs is not None else steps,
            epochs=args.epochs,
            validation_data=held_out if validates else None,
            validate_every=(250 if args.eval_every is None else args.eval_every) if validates else None,
            save_every=500 if args.save_every is None else args.save_every,
            keep_last=args.keep_last,
            keep_best=validates,
            checkpoint_dir=checkpoints,
            resume=True if args.resume else None,
            callbacks=[EarlyStopping(args.patience)] if args.patience is not None and validates else [],
            seed=args.seed,
            context=_context(args, model),
            overfit_batch=args.overfit_batch,
            log_file=args.log_file,
            peak_flops=None if args.peak_gflops is None else args.peak_gflops * 1e9,
        )
    if opened:
        learned.close()
    if history.stopped == "interrupted":
        report(f"interrupted after {len(history.steps)} steps: --resume goes on from {checkpoints}")
        return 130
    model.save_pretrained(args.out)
    if args.plot is not None:
        history.plot().savefig(args.plot)
    _say(args, model, history)
    return 0


def _context(args: argparse.Namespace, model: LlamaForCausalLM) -> int | None:
    # Of a new model it is the shape's already.
    return args.context if args.model is not None else model.config.max_position_embeddings


def _say(args: argparse.Namespace, model: LlamaForCausalLM, history: History) -> None:
    tokens = sum(record.tokens for record in history.steps)
    seconds = history.seconds
    ended = "" if history.stopped == "done" else f" ({history.stopped})"
    report(
        f"{len(history.steps):,} steps{ended}, {tokens:,} tokens in {seconds:.0f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"
    )
    if history.validations:
        best = min(history.validations, key=lambda each: each.loss)
        report(
            f"validation loss {history.val_loss[-1]:.4f} nats a token, lowest {best.loss:.4f} after {best.step:,} steps "
            f"({Path(args.out) / CHECKPOINTS / f'best-{best.step:08d}'})"
        )
    report(f"wrote {args.out}")
    _sample(args, model)


def _sample(args: argparse.Namespace, model: LlamaForCausalLM) -> None:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return
    beginning = args.sample
    if beginning is None:
        # A text that a tokenizer of these letters can read.
        beginning = "\n" if _reads(tokenizer, "\n") else tokenizer.decode([0], skip_special_tokens=False)
    room = model.config.max_position_embeddings - len(tokenizer.encode(beginning))
    if room < 1:
        return
    write(model.generate(beginning, max_new_tokens=min(200, room), temperature=0.8, seed=args.seed) + "\n")


def _reads(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return bool(tokenizer.encode(text))
    except OptionError:
        return False
