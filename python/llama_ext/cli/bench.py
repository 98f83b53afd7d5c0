"""`llama-ext bench`: how fast a model reads and writes here."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llama_ext.cli.common import add_model_options, load_model, shown_bytes, table, write
from llama_ext.errors import OptionError

if TYPE_CHECKING:
    from llama_ext.cli.common import Commands
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["Measurement", "add_to", "measure", "run"]

_PROMPT_TOKENS = 512

_DESCRIPTION = """\
How fast a model is on this machine. Prefill is the reading of a prompt up to
the first new token, decode is one token after the other. Shown are the median
and the best of several runs, after one that does not count."""

_EPILOG = """
examples:
  llama-ext bench
  llama-ext bench --dtype float32 bfloat16 --prompt-tokens 128
  llama-ext bench --threads 1 --repeat 5 --json
"""


@dataclass(frozen=True)
class Measurement:
    """The speeds of one model with one dtype; speeds in tokens per second, medians unless they are called best."""

    model: str
    dtype: str
    compute: str
    device: str
    isa: str
    threads: int
    parameters: int
    bytes: int
    prompt_tokens: int
    new_tokens: int
    repeat: int
    prefill: float
    prefill_best: float
    decode: float
    decode_best: float


def add_to(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "bench",
        usage="llama-ext bench [OPTIONS]",
        help="how fast a model is here",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help=f"tokens of the prompt (default: {_PROMPT_TOKENS}, or what the context has room for)",
    )
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="tokens to generate (default: 32)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs that count (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object a dtype")
    add_model_options(parser, several_dtypes=True)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("repeat", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise OptionError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    rows: list[Measurement] = []
    for dtype in dict.fromkeys(args.dtype):
        model = load_model(args, dtype)
        row = measure(model, args.model, args.prompt_tokens, args.new_tokens, args.repeat)
        del model
        rows.append(row)
        if args.json:
            write(json.dumps(asdict(row)) + "\n")
    if not args.json:
        write(_shown(rows) + "\n")
    return 0


def measure(model: LlamaForCausalLM, name: str, prompt_tokens: int | None, new_tokens: int, repeat: int) -> Measurement:
    """Measures prefill and decode.

    Args:
        model: The model.
        name: What it is called.
        prompt_tokens: Of the prompt; None: 512, or what the context has room for.
        new_tokens: To generate, >= 2.
        repeat: Runs that count, >= 1.

    Raises:
        ContextLengthError: They are more than the model's context.
    """
    import statistics

    from llama_ext.runtime.progress import ProgressBar

    if prompt_tokens is None:
        prompt_tokens = max(1, min(_PROMPT_TOKENS, model.config.max_position_embeddings - new_tokens))
    # Any tokens will do: the arithmetic is the same for all of them.
    prompt = [(7919 * index + 3) % model.config.vocab_size for index in range(prompt_tokens)]
    prefill, decode = [], []
    with ProgressBar(f"Measuring {model.dtype}", repeat + 1, "runs") as bar:
        for _ in range(repeat + 1):
            first, rest = _once(model, prompt, new_tokens)
            prefill.append(prompt_tokens / first)
            decode.append((new_tokens - 1) / rest)
            bar.advance(1)
    # The first run wakes threads up and touches memory for the first time.
    del prefill[0], decode[0]
    return Measurement(
        model=str(name),
        dtype=model.dtype,
        compute=model.compute,
        device=model.device,
        isa=model.isa,
        threads=model.threads,
        parameters=model.num_parameters(),
        bytes=model.nbytes,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeat=repeat,
        prefill=statistics.median(prefill),
        prefill_best=max(prefill),
        decode=statistics.median(decode),
        decode_best=max(decode),
    )


def _once(model: LlamaForCausalLM, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds up to the first new token, and from there to the last one."""
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "temperature": 0.0, "num_beams": 1, "eos_token_id": []}
    # The checkpoint's own penalties would be measured too.
    options["generation_config"] = {}
    started = time.perf_counter()
    pieces = model.stream_generate(prompt, **options)
    next(pieces)
    first = time.perf_counter()
    for _ in pieces:
        pass
    return first - started, time.perf_counter() - first


def _shown(rows: list[Measurement]) -> str:
    first = rows[0]
    threads = f"{first.threads} thread{'' if first.threads == 1 else 's'}"
    title = (
        f"{first.model}: {first.parameters:,} parameters; {first.device} {first.isa}, {threads}; "
        f"prompt {first.prompt_tokens}, new {first.new_tokens}, median of {first.repeat} (best)\n"
    )
    lines = [["dtype", "weights", "prefill tokens/s", "(best)", "decode tokens/s", "(best)", "ms a token"]]
    lines += [
        [
            row.dtype,
            shown_bytes(row.bytes),
            f"{row.prefill:,.1f}",
            f"({row.prefill_best:,.1f})",
            f"{row.decode:,.1f}",
            f"({row.decode_best:,.1f})",
            f"{1000 / row.decode:.3f}",
        ]
        for row in rows
    ]
    return f"{title}\n{table(lines)}"
