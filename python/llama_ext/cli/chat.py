"""`llama-ext chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, cast

from llama_ext.cli.common import (
    add_length_options,
    add_model_options,
    add_sampling_options,
    add_speculation_options,
    generation_options,
    in_words_of_the_command,
    load_draft_model,
    load_model,
    plan_options,
    report,
    write,
)
from llama_ext.errors import FormatError, LlamaExtError, OptionError

if TYPE_CHECKING:
    from llama_ext.cli.common import Commands
    from llama_ext.cli.conversation import Conversation

__all__ = ["add_to", "run"]

_PROMPT = ">>> "

_DESCRIPTION = """\
Talk with a model. Each line is a message, and the answer is shown as it comes.
A model without a chat template was not made for this: your lines and its own
are then one text that it goes on with, up to a blank line each time.

Ctrl-C while it answers ends the answer; what was said until then is kept.
Ctrl-C or Ctrl-D at the prompt leaves. From a pipe, each line is answered in
turn, and only the answers go to standard output."""

# In the order in which they are shown.
_COMMANDS = (
    ("/help", "this list"),
    ("/reset", "forget the conversation; the system message stays"),
    ("/system TEXT", "set the system message; without TEXT, show it"),
    ("/regen", "take the last answer back and give another"),
    ("/save FILE", "write the conversation to a JSON file"),
    ("/load FILE", "go on with a conversation that was saved"),
    ("/exit", "leave, as Ctrl-D does"),
    ("//...", "a message that begins with a /"),
)

_COMMAND_LIST = "\n".join(f"  {name:<14} {meaning}" for name, meaning in _COMMANDS)

_EPILOG = rf"""
commands:
{_COMMAND_LIST}

examples:
  llama-ext chat
  llama-ext chat --temperature 0.7 --system "A street in Verona."
  printf "ROMEO:\nJULIET:\n" | llama-ext chat --seed 1
"""


def add_to(commands: Commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "chat", usage="llama-ext chat [OPTIONS]", help="talk with a model", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.set_defaults(run=run)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens a conversation has room for (default: the model's context)"
    )
    add_length_options(parser, default="what the model says, else up to the end of its turn")
    parser.add_argument("-v", "--verbose", action="store_true", help="say after each answer how fast it was")
    add_sampling_options(parser)
    add_speculation_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from llama_ext.cli.conversation import Conversation

    # An answer is shown as it comes, which beam search cannot do, whatever the checkpoint wishes.
    options = {**generation_options(args), "num_beams": 1}
    plan = plan_options(args, options)
    load_draft_model(args, plan, options)
    model = load_model(args)
    if model.tokenizer is None:
        raise OptionError("this model has no tokenizer, so it cannot chat: `llama-ext generate --ids` takes token ids")
    conversation = Conversation(model, options, args.system, args.context)
    context = model.config.max_position_embeddings
    if args.context is None and conversation.room < context:
        report(
            f"note: the KV cache of {context:,} tokens does not fit into memory: there is room for {conversation.room:,}"
        )
    if not conversation.is_templated:
        report(
            "note: this model has no chat template: it was not trained to answer. "
            "Your lines and its own are one text, which it goes on with"
        )
    chat = _Chat(conversation, verbose=args.verbose)
    if chat.is_interactive:
        report(f"{args.model}, {model.num_parameters():,} parameters. /help lists the commands, Ctrl-D leaves.")
    return chat.run()


class _Chat:
    """The loop around a conversation."""

    def __init__(self, conversation: Conversation, *, verbose: bool) -> None:
        self._conversation = conversation
        self._verbose = verbose
        self.is_interactive = sys.stdin is not None and sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/regen": self._regen,
            "/save": self._save,
            "/load": self._load,
        }

    def run(self) -> int:
        if self.is_interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  importing it gives input() its history
        if hasattr(sys.stdin, "reconfigure"):
            # In some locales Python would let bytes through that are no text, as halves of surrogate pairs. What a terminal
            # sends is encoded as its locale says; a pipe is UTF-8, as in the other commands.
            sys.stdin.reconfigure(errors="strict", encoding=None if self.is_interactive else "utf-8-sig")
        while True:
            try:
                line = self._read_line()
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                line = None
            except FormatError as error:
                if not self.is_interactive:
                    raise
                report(str(error))
                continue
            if line is None:
                if self.is_interactive:
                    write("\n")
                return 0
            if not line.strip():
                continue
            try:
                if not self._handle(line):
                    return 0
            except (LlamaExtError, OSError) as error:
                if not self.is_interactive or isinstance(error, BrokenPipeError):
                    raise
                report(in_words_of_the_command(str(error)))

    def _read_line(self) -> str | None:
        """The next line without its end, or None when there is none."""
        try:
            if self.is_interactive:
                if sys.stdout is not None and sys.stdout.isatty():
                    return input(_PROMPT)
                # The answers go to a file or a pipe; the prompt is not one of them.
                print(_PROMPT, end="", file=sys.stderr, flush=True)
                return input()
            line = sys.stdin.readline() if sys.stdin is not None else ""
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise FormatError(f"this is not UTF-8 text: {error.reason}", path="standard input") from error
        return line.removesuffix("\n") if line else None

    def _handle(self, line: str) -> bool:
        """Answers a line or does what it commands; False to leave."""
        if not line.startswith("/") or line.startswith("//"):
            self._show(self._conversation.say(line.removeprefix("/")))
            return True
        name, _, rest = line.strip().partition(" ")
        if name in ("/exit", "/quit"):
            return False
        command = self._commands.get(name)
        if command is None:
            raise OptionError(f"there is no command {name}: /help lists them, and // begins a message with a /")
        command(rest.strip())
        return True

    def _show(self, pieces: Iterator[str]) -> None:
        try:
            # Closing it is what keeps the answer, so it must not wait for the garbage collector.
            with contextlib.closing(cast("Generator[str, None, None]", pieces)):
                for text in pieces:
                    write(text)
        except KeyboardInterrupt:
            if not self.is_interactive:
                raise
            write("\n")
            if self._conversation.last.is_kept:
                report("interrupted; /regen answers again")
            else:
                report("interrupted before the first word: nothing was said")
            return
        write("\n")
        last = self._conversation.last
        if last.is_full:
            report(f"note: the context of {self._conversation.room:,} tokens is full: /reset begins a new conversation")
        elif last.finish_reason == "length" and self._conversation.is_templated:
            report(f"note: cut after {last.new_tokens} tokens: --max-new-tokens allows more")
        if self._verbose:
            kept = last.prompt_tokens - last.read_tokens
            decoded = max(last.new_tokens - 1, 0)
            speed = f"{decoded / last.decode_seconds:,.0f} tokens/s" if decoded and last.decode_seconds else "-"
            report(
                f"prompt: {last.prompt_tokens} tokens, {kept} of them kept, {last.read_tokens} read in "
                f"{last.prefill_seconds:.2f} s; answer: {last.new_tokens} tokens, {speed}"
            )

    # -- commands -----------------------------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        print(_COMMAND_LIST, file=sys.stderr, flush=True)

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        report("the conversation is forgotten")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.set_system(text)
        else:
            system = self._conversation.system
            report("there is no system message" if system is None else f"system message: {system}")

    def _regen(self, _: str) -> None:
        self._show(self._conversation.answer_again())

    def _save(self, path: str) -> None:
        self._conversation.save(_required(path, "/save"))
        report(f"saved to {path}")

    def _load(self, path: str) -> None:
        self._conversation.load(_required(path, "/load"))
        report(f"loaded {path}: {len(self._conversation.messages)} messages")


def _required(path: str, command: str) -> str:
    if not path:
        raise OptionError(f"{command} needs the name of a file")
    return path
