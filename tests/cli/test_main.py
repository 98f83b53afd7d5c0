"""The command as a whole: its help, its exit codes, its messages, and how it takes signals and closed pipes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import llama_ext
from command_line import Run, command, run_process
from llama_ext import errors
from llama_ext.cli import generate
from llama_ext.cli.common import in_words_of_the_command
from llama_ext.cli.main import build_parser, exit_code
from llama_ext.errors import NumericError
from llama_ext.training.outliers import OutlierRule
from timing import SLACK

COMMANDS = ["info", "generate", "chat", "bench", "perplexity"]


def examples(text: str) -> list[str]:
    """The commands that a help text shows."""
    _, found, rest = text.partition("\nexamples:\n")
    assert found
    return [line.strip() for line in rest.split("\n\n")[0].splitlines()]


# Help.


def test_the_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version") == (0, f"llama-ext {llama_ext.__version__}\n", "")


def test_help_lists_every_command_and_what_the_exit_codes_mean(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for name in [*COMMANDS, "130 interrupted"]:
        assert name in out


@pytest.mark.parametrize("number", ["-1", "-.5", "-1e-1", "-2.5E+3", "-1_000", "-inf", "-Infinity", "-nan"])
def test_a_negative_number_is_the_value_of_an_option(number: str) -> None:
    args = build_parser().parse_args(["generate", "x", "--presence-penalty", number])
    assert str(args.presence_penalty) == str(float(number))


@pytest.mark.parametrize("wrong", ["-1x", "-e9", "-information"])
def test_what_is_no_number_is_an_unknown_option(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["generate", "x", "--presence-penalty", wrong])
    assert "--presence-penalty: expected one argument" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_example_in_the_help_works(name: str, run: Run, shim: dict[str, str], tmp_path: Path) -> None:
    text = run(*filter(None, [name]), "--help").out
    lines = examples(text)
    assert len(lines) >= 3
    script = "\n".join(["set -e -o pipefail", *lines])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=shim,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_a_terminal_of_80_columns(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run(*filter(None, [name]), "--help").out
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_help_loads_nothing_that_computes() -> None:
    code = (
        "import sys; from llama_ext.cli.main import main; main(['generate', '--help'])\n"
        "print([name for name in ('numpy', 'rich', 'tokenizers', 'llama_ext._core') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_takes_less_than_a_fifth_of_a_second_of_processor_time() -> None:
    resource = pytest.importorskip("resource", reason="reads CPU times through resource")

    def spent() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_process("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return float(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    # The least of some runs: what else runs on the machine only ever adds.
    assert any(spent() < 0.2 for _ in range(10))


# Errors.


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "COMMAND"),
        (["sing"], 2, "'sing' (choose from"),
        (["generate", "x", "--bogus"], 2, "--bogus. See `llama-ext generate --help`"),
        (["generate", "x", "--temp", "1"], 2, "--temp"),
        (["generate", "x", "--top-k", "many"], 2, "--top-k"),
        (["generate", "x", "--top-p", "2"], 2, "--top-p must be at most 1, got 2"),
        (["generate", "x", "--greedy", "--top-k", "5"], 2, "--greedy contradicts --top-k=5"),
        (["generate", "x", "--max-length", "9", "--max-new-tokens", "4"], 2, "both --max-length"),
        (["generate", "x", "--num-beams", "4", "--stop", "a"], 2, "stop strings"),
        (["generate", "x", "--num-beams", "4", "--temperature", "1"], 2, "--num-beams=4 contradicts --temperature=1.0"),
        (["generate", "x", "--dtype", "int3"], 2, "'int3'"),
        (["generate", "x", "--threads", "0"], 2, "--threads must be"),
        (["generate", "x", "--logit-bias", "five"], 2, "TOKEN_ID=NUMBER"),
        (["generate", "x", "--logit-bias", "999=1"], 2, "999"),
        (["generate", ""], 2, "BOS"),
        (["generate", "x", "--model", "no/such/model"], 3, "no/such/model: there is no such directory"),
        (["generate", "x", "--max-new-tokens", "9999"], 4, "--max-new-tokens=9999"),
        (
            ["generate", "x", "--device", "abacus"],
            2,
            "--device: expected cpu, cuda, cuda:1 and so on, or reference, got 'abacus'",
        ),
        (["generate", "x", "--device", "cuda:x"], 2, "'cuda:x'"),
        (["bench", "--device", ""], 2, "--device"),
        (["generate", "x", "--device", "cuda:999"], 1, ""),  # a name, of a device that is not there
        (["chat", "--context", "9999"], 4, "--context=9999"),
        (["chat", "--context", "0"], 2, "--context must be"),
        (["bench", "--repeat", "0"], 2, "--repeat must be at least 1"),
        (["bench", "--new-tokens", "1"], 2, "--new-tokens must be at least 2"),
        (["bench", "--prompt-tokens", "600"], 4, "600"),
        (["perplexity"], 2, "FILE"),
        (["perplexity", "no-such-file"], 3, "no-such-file"),
        (["perplexity", "-", "-"], 2, "once"),
        (["info", "--model", "no/such/model"], 3, "no/such/model"),
        (["info", "--model", __file__], 3, "test_main.py: it is neither a directory nor a .gguf file"),
        (["generate", "x", "--model", __file__], 3, "test_main.py: it is neither a directory nor a .gguf file"),
        (["generate", "x", "--model", ""], 3, "the path of a model is empty"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(arguments: list[str], code: int, message: str, run: Run) -> None:
    result = run(*arguments)
    assert result.code == code
    assert result.out == ""
    assert result.err.startswith("llama-ext: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert message in result.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.OptionError("x"), 2),
        (errors.TokenIdError("x"), 2),
        (errors.FormatError("x"), 3),
        (errors.CheckpointError("x"), 3),
        (errors.UnsupportedError("x"), 3),
        (errors.LimitError("x"), 4),
        (errors.OutOfMemoryError("x"), 4),
        (errors.ContextLengthError("x"), 4),
        (MemoryError(), 4),
        (errors.NumericError("x"), 1),
        (errors.DeviceError("x"), 1),
        (errors.ShapeError("x"), 1),
        (errors.DTypeError("x"), 1),
        (OSError(28, "No space left on device"), 1),
        (ZeroDivisionError(), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_error_has_its_exit_code(
    error: BaseException, code: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise error

    assert exit_code(error) == code
    monkeypatch.setattr(generate, "run", fail)
    result = run("generate", "x")
    assert result.code == code
    assert result.err.count("\n") == (0 if code == 130 else 1)


def test_a_traceback_is_shown_when_it_is_asked_for(run: Run) -> None:
    quiet, loud = run("info", "--model", "no/such"), run("info", "--model", "no/such", "--debug")
    assert "Traceback" not in quiet.err
    assert "Traceback" in loud.err
    assert loud.err.endswith(quiet.err)
    assert loud.code == quiet.code == 3


def test_a_mistake_of_ours_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise ZeroDivisionError("by zero\nof all numbers")

    monkeypatch.setattr(generate, "run", fail)
    assert run("generate").err == (
        "llama-ext: internal error, please report it: ZeroDivisionError: by zero of all numbers (--debug shows where)\n"
    )


def test_an_interrupt_that_comes_out_as_another_error_is_an_interrupt(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise ImportError("numpy cannot be imported") from interrupt

    monkeypatch.setattr(generate, "run", fail)
    assert run("generate") == (130, "", "")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("max_new_tokens=5 contradicts max_length=6", "--max-new-tokens=5 contradicts --max-length=6"),
        ("temperature must be at least 0", "--temperature must be at least 0"),
        ("the temperature of the sea", "the temperature of the sea"),
        ("hidden_size is 200000, the limit is 131072", "--width is 200000, the limit is 131072"),
        ("config.json: hidden_size is 200000", "config.json: hidden_size is 200000"),
        ("--context=9 is beyond", "--context=9 is beyond"),
        (
            "x exists: name another directory, or say overwrite=True",
            "x exists: name another directory, or say --overwrite",
        ),
        (
            "more than the max_length=20 of the checkpoint's generation_config.json. Pass max_new_tokens",
            "more than the max_length=20 of the checkpoint's generation_config.json. Pass --max-new-tokens",
        ),
    ],
)
def test_messages_name_options_as_they_are_typed(message: str, expected: str) -> None:
    assert in_words_of_the_command(message) == expected


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("train", "Lower the learning rate, add --warmup, or skip such steps: --skip-outliers 6"),
        ("classify", "Lower the learning rate"),
        ("translate", "Lower the learning rate"),
    ],
)
def test_advice_names_options_that_the_command_has(command: str, advice: str) -> None:
    with pytest.raises(NumericError) as caught:
        OutlierRule(None).skips(math.nan, 1.0, 3)
    assert in_words_of_the_command(str(caught.value), command).endswith(f"this step. {advice}")
    message = "Lower batch_size or grad_accum"
    assert in_words_of_the_command(message, command) == (
        "Lower --batch-size or --grad-accum" if command == "train" else "Lower --batch-size"
    )


def test_options_are_checked_before_weights_are_read(run: Run, chat_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((chat_model / name).read_bytes())
    assert "--min-p" in run("generate", "x", "--min-p", "3", "--model", tmp_path).err


# Processes.


@pytest.mark.parametrize(
    ("arguments", "times"),
    [(["generate", "x", "--max-new-tokens", "2"], 1), (["chat", "--max-new-tokens", "2"], 1), (["perplexity", "-"], 0)],
    ids=["generate", "chat", "perplexity"],
)
def test_what_the_checkpoint_asks_for_in_vain_is_told_once_by_what_generates(
    arguments: list[str], times: int, chat_model: Path, tmp_path: Path
) -> None:
    for file in chat_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 3}))
    # A process of its own, where no filter of the tests hides a warning of the library.
    done = run_process(*arguments, "--model", tmp_path, stdin=b"Go on")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"generation_config.json asks for no_repeat_ngram_size=3") == times
    assert done.stderr.count(b"no_repeat_ngram_size") == times


def test_it_runs_as_a_module() -> None:
    done = run_process("generate", "ROMEO:", "--seed", "1", "--max-new-tokens", "9")
    assert done.returncode == 0
    assert done.stdout.startswith(b"ROMEO:")
    assert done.stderr == b""


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2])
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--max-new-tokens", "16000"],
        ["generate", "x", "--max-new-tokens", "16000", "--no-stream"],
        ["generate", "x", "--max-new-tokens", "16000", "--num-beams", "2"],
        ["bench", "--new-tokens", "10000"],
        ["perplexity", "-", "--stride", "1"],
    ],
    ids=lambda arguments: "-".join(arguments[:1] + arguments[4:5]),
)
def test_ctrl_c_ends_it_at_once(arguments: list[str], delay: float, slow_model: Path) -> None:
    process = subprocess.Popen(
        command(*arguments, "--model", slow_model),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(b"to be or not to be " * 2000)
    process.stdin.close()
    process.stdin = None
    _wait_until_it_computes(process.pid)
    time.sleep(delay)
    assert process.poll() is None
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == b""
    assert time.monotonic() - started < 0.5 * SLACK


def _wait_until_it_computes(pid: int) -> None:
    """Until the compiled core is there."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if "/_core." in Path(f"/proc/{pid}/maps").read_text():
            return
        time.sleep(0.005)
    pytest.fail("the process did not get going")


def test_a_reader_that_has_had_enough_is_no_error_to_speak_of(slow_model: Path) -> None:
    process = subprocess.Popen(
        command("generate", "x", "--max-new-tokens", "16000", "--model", slow_model),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        assert os.read(process.stdout.fileno(), 10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments", [["generate", "x"], ["--help"], ["--version"], ["generate", "--help"], ["classify", "train", "--help"]]
)
def test_a_full_disk_is_an_error(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == b"llama-ext: No space left on device\n"


@pytest.mark.parametrize(("arguments", "code"), [(["generate", "x"], 0), (["--help"], 0), (["sing"], 2)])
def test_it_works_with_nothing_open(arguments: list[str], code: int) -> None:
    script = 'exec "$@" 0<&- 1>&- 2>&-'
    done = subprocess.run(["sh", "-c", script, "-", *command(*arguments)], timeout=60, check=False)
    assert done.returncode == code


def test_a_terminal_without_the_characters_gets_others() -> None:
    done = subprocess.run(
        command("generate", "ROMEO\N{SNOWMAN}", "--max-new-tokens", "3", "--greedy"),
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith(b"ROMEO?")
