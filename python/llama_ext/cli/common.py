"""What the subcommands share: options, the model, standard input and output, messages."""

from __future__ import annotations

import argparse
import re
import sys
import threading
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from llama_ext.errors import OptionError, UnsupportedError

if TYPE_CHECKING:
    from rich.status import Status

    from llama_ext.runtime.model import LlamaForCausalLM
    from llama_ext.runtime.options import GenerationPlan

    Commands = argparse._SubParsersAction["Parser"]

__all__ = [
    "MODEL_HELP",
    "Parser",
    "Spinner",
    "add_compute_option",
    "add_device_options",
    "add_length_options",
    "add_model_options",
    "add_sampling_options",
    "add_speculation_options",
    "generation_options",
    "in_words_of_the_command",
    "load_draft_model",
    "load_model",
    "plan_options",
    "report",
    "shown_bytes",
    "table",
    "write",
]

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "int4")
MODEL_HELP = 'a directory, a .gguf file, a Hub id like "organisation/name", or "demo"'

_DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?|reference")

# Options of `generate` in the library's words; on the command line they have dashes.
_OPTIONS = (
    "max_new_tokens",
    "max_length",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "num_return_sequences",
    "seed",
    "prompt_lookup_num_tokens",
)
# Those that have a shorter name here.
_SHORT = {"prompt_lookup_num_tokens": "prompt_lookup"}
# A name with an underscore is an option wherever it stands; one without is an ordinary word unless a value follows.
_OPTION_IN_TEXT = re.compile(
    r"(?<![-\w])("
    + "|".join(name for name in (*_OPTIONS, "draft_model", "group_size", "max_file_bytes") if "_" in name)
    + r"|(?:temperature|stop|seed|stride|context|threads|steps)(?==| must)"
    + r")\b(?!=\S+ of the checkpoint)"
)

# What `fit`, `compile` and the config of a new model say of their arguments, where the command has other words than dashes for underscores.
_TRAINING_WORDS = {
    "max_steps": "steps",
    "validate_every": "eval-every",
    "peak_flops": "peak-gflops",
    "hidden_size": "width",
    "intermediate_size": "ffn-width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv-heads",
    "max_position_embeddings": "context",
}
_TRAINING_OPTION = re.compile(
    r"^(batch_size|epochs|max_steps|grad_accum|lr|warmup|weight_decay|dropout|skip_outliers|seed|validate_every|save_every"
    r"|keep_last|patience|peak_flops|vocab_size|hidden_size|intermediate_size|num_hidden_layers|num_attention_heads"
    r"|num_key_value_heads|max_position_embeddings)(?= must| is \d)"
)

# What is said with a value there, and by its name alone here.
_FLAGS = {
    "do_sample=False": "--greedy",
    "resume=True": "--resume",
    "overwrite=True": "--overwrite",
    "symmetric belongs": "--asymmetric belongs",
    "with variant=": "with --variant",
    "dtype='": "--dtype '",
    "device='cpu'": "--device cpu",
    "TextClassifier(path, labels=[...]).fit": "`llama-ext classify train --model`",
    "TextClassifier.load": "`llama-ext classify`",
    "Translator.load": "`llama-ext translate`",
}

# What `fit` advises, in words that `train` has; other commands that train have no such options.
_ADVICE = {
    ", add warm-up, or skip such steps: skip_outliers=6": ", add --warmup, or skip such steps: --skip-outliers 6",
    "ower batch_size or grad_accum": "ower --batch-size or --grad-accum",
}
_SHORT_ADVICE = dict(zip(_ADVICE, ("", "ower --batch-size"), strict=True))

# Seconds of silence before a `Spinner`.
_DELAY = 1.0

_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}


# -- the parser -------------------------------------------------------------------------------------------------------


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=32, **options)


_NEGATIVE_NUMBER = re.compile(r"-(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf(inity)?$|-nan$", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **options)
        # argparse takes -1e9, -inf and -nan for options.
        self._negative_number_matcher = _NEGATIVE_NUMBER

    def error(self, message: str) -> NoReturn:
        # The heading of the list of commands is made for the list.
        message = message.replace("COMMAND [OPTIONS]", "COMMAND")
        self.exit(2, f"llama-ext: {message}. See `{self.prog} --help`.\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own passes over a full disk, and flushes nothing.
        if file is sys.stdout:
            write(message)
        else:
            super()._print_message(message, file)


def add_model_options(parser: argparse.ArgumentParser, *, several_dtypes: bool = False, required: bool = True) -> None:
    """Adds --model, how to load it, and --debug.

    Args:
        parser: The parser.
        several_dtypes: --dtype takes a list.
        required: The command needs a model: it has a default.
    """
    group = parser.add_argument_group("model")
    known = MODEL_HELP
    group.add_argument(
        "--model",
        metavar="MODEL",
        default="demo" if required else None,
        help=f"{known} (default: demo)" if required else known,
    )
    if required:
        group.add_argument(
            "--dtype",
            choices=DTYPES,
            nargs="+" if several_dtypes else None,
            default=["auto"] if several_dtypes else "auto",
            metavar="DTYPE",
            help=f"how weights are kept in memory{', one row each' * several_dtypes}: {', '.join(DTYPES[1:])} (default: auto, "
            "as in the file)",
        )
        group.add_argument(
            "--group-size",
            type=int,
            choices=(128, 64, 32),
            help="of int8 and int4: weights of a row that share a scale (default: the largest that divides)",
        )
        add_compute_option(group)
        add_device_options(group)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_compute_option(group: argparse._ActionsContainer) -> None:
    """Adds --compute."""
    group.add_argument(
        "--compute",
        choices=("auto", "exact"),
        default="auto",
        help="auto is the fastest arithmetic for these weights, exact is float32 (default: auto)",
    )


def add_device_options(group: argparse._ActionsContainer) -> None:
    """Adds --device and --threads."""
    group.add_argument(
        "--device",
        type=_device,
        default="cpu",
        metavar="DEVICE",
        help="where to compute: cpu; cuda or cuda:1 and so on, an NVIDIA GPU; reference, slowly in float64 (default: cpu)",
    )
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="default: LLAMA_EXT_NUM_THREADS, or the physical cores this process may use",
    )


def _device(text: str) -> str:
    # Whether there is such a device is for the core to say: a name that is none is a mistake in the command.
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda, cuda:1 and so on, or reference, got {text!r}")
    return text


def add_length_options(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Adds --max-new-tokens."""
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"tokens to generate at most (default: {default})"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Adds what decides on the next token."""
    group = parser.add_argument_group(
        "sampling",
        "What is not given is as the model's generation_config.json says. If that says\n"
        "nothing, the most likely token is taken. --temperature, --top-k, --top-p and\n"
        "--min-p turn sampling on.",
    )
    group.add_argument("--temperature", type=float, metavar="T", help="divides the logits; 0 is the same as --greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely tokens; 0 keeps all")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the fewest tokens that together reach P")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the likeliest"
    )
    group.add_argument("--greedy", action="store_true", help="take the most likely token each time")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    group.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="over 1: makes tokens that were there less likely"
    )
    group.add_argument(
        "--presence-penalty", type=float, metavar="X", help="subtracted from the logit of each token generated before"
    )
    group.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="the same, times how often it was generated"
    )
    group.add_argument(
        "--logit-bias",
        type=_token_bias,
        action="append",
        metavar="ID=X",
        help="add X to the logit of a token, -inf forbids it; may be repeated",
    )
    group.add_argument(
        "--stop",
        type=_unescaped,
        action="append",
        metavar="TEXT",
        help=r"end at this text, which is not printed; \n and \t are understood; may be repeated",
    )


def add_speculation_options(parser: argparse.ArgumentParser) -> None:
    """Adds how to guess tokens ahead."""
    group = parser.add_argument_group(
        "speculation",
        "Guess tokens and check them together: faster where guesses are right, and on a\nCPU the same text in any case.",
    )
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--prompt-lookup", type=int, metavar="N", help="guess up to N tokens from what followed the same words before"
    )
    one.add_argument(
        "--draft-model", metavar="MODEL", help="guess with this smaller model, which has the same vocabulary"
    )


def _token_bias(text: str) -> tuple[int, float]:
    token, equals, bias = text.partition("=")
    try:
        if equals:
            return int(token), float(bias)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected TOKEN_ID=NUMBER, for example 29=-1.5, got {text!r}")


def _unescaped(text: str) -> str:
    return re.sub(r"\\[ntr\\]", lambda match: _ESCAPES[match.group()], text)


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, by the names of `LlamaForCausalLM.generate`."""
    options = {name: getattr(args, _SHORT.get(name, name), None) for name in _OPTIONS}
    given = {name: value for name, value in options.items() if value is not None}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    if args.greedy:
        given["do_sample"] = False
    return given


def in_words_of_the_command(message: str, command: str = "train") -> str:
    """A message of the library with its options spelled as on the command line, those that the command has."""
    for flag, option in {**_FLAGS, **(_ADVICE if command == "train" else _SHORT_ADVICE)}.items():
        message = message.replace(flag, option)
    message = _TRAINING_OPTION.sub(
        lambda match: "--" + _TRAINING_WORDS.get(match[1], match[1]).replace("_", "-"), message
    )
    return _OPTION_IN_TEXT.sub(lambda match: "--" + _SHORT.get(match[1], match[1]).replace("_", "-"), message)


# -- the model --------------------------------------------------------------------------------------------------------


def plan_options(args: argparse.Namespace, options: dict[str, Any]) -> GenerationPlan:
    """Checks the options of a generation against the model's configs, before its weights take their time.

    Sets `args.path` to where the model is.

    Raises:
        OptionError: An option is out of range, or contradicts another one.
        FormatError and others: A file of the model cannot be read.
    """
    from llama_ext.io.hub import resolve
    from llama_ext.runtime.loading import read_configs
    from llama_ext.runtime.options import plan_generation

    path = resolve(args.model)
    config, defaults = read_configs(path)
    args.path = path
    try:
        plan = plan_generation(options, defaults, eos=(), vocabulary=config.vocab_size)
    except UnsupportedError as error:
        # Two options that do not go together: nothing is wrong with a file.
        raise OptionError(str(error)) from error
    if defaults.ignored:
        names = ", ".join(f"{name}={value!r}" for name, value in defaults.ignored.items())
        report(f"note: generation_config.json asks for {names}, which this version does not do")
    return plan


def load_model(args: argparse.Namespace, dtype: str | None = None) -> LlamaForCausalLM:
    """Loads the model that the options name; `dtype` is instead of --dtype."""
    from llama_ext.runtime.model import LlamaForCausalLM

    with warnings.catch_warnings():
        # `plan_options` has said so, and the commands without it do not generate.
        warnings.filterwarnings("ignore", message=r".*generation_config\.json asks for", category=UserWarning)
        return LlamaForCausalLM.from_pretrained(
            getattr(args, "path", args.model),
            dtype=args.dtype if dtype is None else dtype,
            group_size=args.group_size,
            device=args.device,
            compute=args.compute,
            threads=args.threads,
        )


def load_draft_model(args: argparse.Namespace, plan: GenerationPlan, options: dict[str, Any]) -> None:
    """Loads what --draft-model names, into `options`; it computes as the model does."""
    if args.draft_model is None:
        return
    from llama_ext.io.hub import resolve
    from llama_ext.runtime.model import LlamaForCausalLM

    if plan.num_beams > 1:
        raise OptionError("draft_model is not supported with beam search in this version")
    with warnings.catch_warnings():
        # How it would be sampled by itself is of no interest.
        warnings.filterwarnings("ignore", message=r".*generation_config\.json asks for", category=UserWarning)
        options["draft_model"] = LlamaForCausalLM.from_pretrained(
            resolve(args.draft_model), device=args.device, compute=args.compute, threads=args.threads
        )


# -- text out ---------------------------------------------------------------------------------------------------------


def write(text: str) -> None:
    """Writes to standard output at once."""
    if sys.stdout is not None:
        sys.stdout.write(text)
        sys.stdout.flush()


def report(message: str) -> None:
    """Says one line on standard error."""
    if sys.stderr is not None:
        print("llama-ext: " + " ".join(message.split("\n")), file=sys.stderr, flush=True)


def table(rows: list[list[str]]) -> str:
    """Rows in columns, the first to the left and the others to the right; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def shown_bytes(count: float) -> str:
    """A number of bytes for people: `1.5 MiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class Spinner:
    """Shows on a terminal's stderr that something is going on, once it takes longer than a second."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._lock = threading.Lock()
        self._ended = False
        self._status: Status | None = None
        self._timer: threading.Timer | None = None
        if sys.stderr is not None and sys.stderr.isatty():
            self._timer = threading.Timer(_DELAY, self._show)
            self._timer.daemon = True

    def say(self, label: str) -> None:
        """Shows another label from now on."""
        with self._lock:
            self._label = label
            if self._status is not None:
                self._status.update(label)

    def _show(self) -> None:
        from rich.console import Console

        with self._lock:
            if not self._ended:
                self._status = Console(stderr=True).status(self._label)
                self._status.start()

    def __enter__(self) -> Spinner:
        if self._timer is not None:
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is None:
            return
        self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._status is not None:
                self._status.stop()
