"""`llama-ext generate`: goes on with a text."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from llama_ext.cli.common import (
    Spinner,
    add_length_options,
    add_model_options,
    add_sampling_options,
    add_speculation_options,
    generation_options,
    load_draft_model,
    load_model,
    plan_options,
    report,
    shown_bytes,
    write,
)
from llama_ext.cli.text_input import read_stdin
from llama_ext.errors import OptionError

if TYPE_CHECKING:
    from llama_ext.cli.common import Commands
    from llama_ext.runtime.generation import GenerationOutput
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["add_to", "run"]

_DESCRIPTION = """\
Go on with a text. The text and what follows it go to standard output as they
are generated, everything else to standard error."""

_EPILOG = r"""
examples:
  llama-ext generate "ROMEO:"
  llama-ext generate "ROMEO:" --max-new-tokens 80 --temperature 0.7 --seed 1
  echo "JULIET:" | llama-ext generate --stop "\n\n" -v
  llama-ext generate "To be, or" --num-beams 4 --max-new-tokens 20
  llama-ext generate "ROMEO:" --prompt-lookup 10 -v
  llama-ext generate "KING" --num-return-sequences 3 --top-p 0.9 --json
"""


def add_to(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "generate",
        usage="llama-ext generate [OPTIONS] [PROMPT]",
        help="go on with a text",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="the text to go on with; - or nothing reads standard input, without the newline at its end, unless that is a "
        "terminal. An empty text is the model's BOS token",
    )
    add_length_options(parser, default="what the model says, else 256, and never more than its context")
    parser.add_argument("--max-length", type=int, metavar="N", help="the same with the tokens of the prompt counted")
    add_sampling_options(parser)
    add_speculation_options(parser)
    several = parser.add_argument_group("several texts")
    several.add_argument("--num-return-sequences", type=int, metavar="N", help="texts to generate (default: 1)")
    several.add_argument("--num-beams", type=int, metavar="N", help="more than 1: beam search with so many beams")
    several.add_argument("--length-penalty", type=float, metavar="X", help="of beam search: over 1 likes longer texts")
    several.add_argument(
        "--early-stopping",
        action="store_const",
        const=True,
        help="of beam search: end as soon as there are enough complete texts",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--no-stream", action="store_true", help="print the text once it is complete")
    output.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a text: prompt, text, token_ids, logprobs, finish_reason, prompt_ids",
    )
    output.add_argument(
        "--ids", action="store_true", help="PROMPT and the output are token ids with spaces between them"
    )
    output.add_argument("-v", "--verbose", action="store_true", help="say at the end how fast it was")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    prompt = _prompt(args)
    options = generation_options(args)
    plan = plan_options(args, options)
    started = time.perf_counter()
    load_draft_model(args, plan, options)
    model = load_model(args)
    if args.verbose:
        seconds = time.perf_counter() - started
        report(
            f"loaded {args.model} in {seconds:.2f} s: {model.num_parameters():,} parameters, {model.dtype}, "
            f"{shown_bytes(model.nbytes)}; {model.isa}, threads: {model.threads}"
        )
    if model.tokenizer is None and not args.ids:
        raise OptionError("this model has no tokenizer: give token ids, with --ids")
    given = _ids(prompt, model) if args.ids else prompt
    if not args.ids and not prompt and model.bos_token_id is None:
        raise OptionError('there is no prompt and this model has no BOS token to begin with: give one, like "ROMEO:"')
    if args.no_stream or args.json or plan.num_beams > 1 or plan.num_return_sequences > 1:
        _complete(model, given, options, args)
    else:
        _stream(model, given, options, args)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.prompt != "-":
        return str(args.prompt)
    if args.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        return ""
    # `echo` ends its line; that is not meant as a part of the prompt.
    return read_stdin("the prompt").removesuffix("\n")


def _ids(prompt: str, model: LlamaForCausalLM) -> list[int]:
    try:
        ids = [int(word) for word in prompt.split()]
    except ValueError as error:
        raise OptionError(f"--ids: the prompt must be token ids like 1 403 7, got {prompt[:60]!r}") from error
    if ids:
        return ids
    if model.bos_token_id is None:
        raise OptionError("--ids: the prompt has no token ids and this model has no BOS token to begin with")
    return [model.bos_token_id]


def _stream(
    model: LlamaForCausalLM, prompt: str | list[int], options: dict[str, Any], args: argparse.Namespace
) -> None:
    from llama_ext.runtime.generation import stream_with_counts

    pieces, counts = stream_with_counts(model, prompt, options)
    started = time.perf_counter()
    write(prompt if isinstance(prompt, str) else " ".join(map(str, prompt)))
    first, tokens, finish = started, 0, ""
    try:
        for piece in pieces:
            if piece.token_id is not None:
                tokens += 1
                if tokens == 1:
                    first = time.perf_counter()
            finish = piece.finish_reason or finish
            if args.ids:
                write("" if piece.token_id is None else f" {piece.token_id}")
            elif piece.text:
                write(piece.text)
    except KeyboardInterrupt:
        if sys.stdout is not None and sys.stdout.isatty():
            write("\n")
        raise
    write("\n")
    if args.verbose:
        ended = time.perf_counter()
        count = _prompt_tokens(model, prompt)
        line = f"prefill: {_rate(count, first - started)}; decode: {_rate(max(tokens - 1, 0), ended - first)}"
        report(f"{line}; {tokens} new tokens in {ended - started:.2f} s, ended by {finish}")
        found = counts()
        _report_guesses(found["drafted"], found["accepted"])


def _complete(
    model: LlamaForCausalLM, prompt: str | list[int], options: dict[str, Any], args: argparse.Namespace
) -> None:
    started = time.perf_counter()
    with Spinner("Generating"):
        found = model.generate(prompt, return_details=True, **options)
    seconds = time.perf_counter() - started
    outputs: list[GenerationOutput] = found if isinstance(found, list) else [found]
    for index, output in enumerate(outputs):
        if args.json:
            write(json.dumps(_as_json(output), ensure_ascii=False, allow_nan=False) + "\n")
            continue
        if len(outputs) > 1:
            write(f"--- {index + 1} of {len(outputs)} ---\n")
        if args.ids:
            write(" ".join(map(str, output.prompt_ids + output.token_ids)) + "\n")
        else:
            write(f"{output.prompt}{output.text}\n")
    if args.verbose:
        tokens = sum(len(output.token_ids) for output in outputs)
        ends = ", ".join(sorted({output.finish_reason for output in outputs}))
        report(f"prefill and decode: {_rate(tokens, seconds)} generated, ended by {ends}")
        drafted = sum(output.drafted_tokens for output in outputs)
        _report_guesses(drafted, sum(output.accepted_tokens for output in outputs))


def _report_guesses(drafted: int, accepted: int) -> None:
    if drafted:
        report(f"guessed: {drafted} tokens, {accepted} of them right ({accepted / drafted:.0%})")


def _as_json(output: GenerationOutput) -> dict[str, Any]:
    result: dict[str, Any] = {
        "prompt": output.prompt,
        "text": output.text,
        "token_ids": output.token_ids,
        # JSON has no infinity: a token that was impossible has no number.
        "logprobs": [value if math.isfinite(value) else None for value in output.logprobs],
        "finish_reason": output.finish_reason,
        "prompt_ids": output.prompt_ids,
    }
    if output.drafted_tokens:
        result.update(drafted_tokens=output.drafted_tokens, accepted_tokens=output.accepted_tokens)
    if output.score is not None:
        result["score"] = output.score
    return result


def _prompt_tokens(model: LlamaForCausalLM, prompt: str | list[int]) -> int:
    if isinstance(prompt, list) or model.tokenizer is None:
        return len(prompt)
    return len(model.tokenizer.encode(prompt)) or 1


def _rate(tokens: int, seconds: float) -> str:
    if tokens == 0 or seconds <= 0:
        return f"{tokens} tokens"
    return f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s"
