"""The command on a terminal: a conversation that can be interrupted, and signs of life where it takes long."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from command_line import Terminal
from timing import SLACK

pytest.importorskip("pty", reason="needs pseudo-terminals")

PROMPT = ">>> "


def test_a_conversation_in_a_terminal(chat_model: Path, tmp_path: Path) -> None:
    with Terminal("chat", "--model", chat_model, "--greedy", "--max-new-tokens", 60) as terminal:
        assert "/help lists the commands" in terminal.read_until(PROMPT)
        terminal.type("Who is there?\n")
        first = terminal.read_until(PROMPT)
        terminal.type("/sing\n")
        assert "llama-ext: there is no command /sing" in terminal.read_until(PROMPT)
        terminal.type("/load /no/such/file\n")
        assert "llama-ext: /no/such/file" in terminal.read_until(PROMPT)
        terminal.type("/help\n")
        assert "/save FILE" in terminal.read_until(PROMPT)
        terminal.type("Speak!\n")
        terminal.read_until(PROMPT)
        terminal.type(f"/save {tmp_path / 'saved.json'}\n")
        terminal.read_until(PROMPT)
        terminal.type("\x04")
        shown, code = terminal.read_to_end()
    assert (shown.strip(), code) == ("", 0)
    messages = json.loads((tmp_path / "saved.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert f"\n{messages[1]['content']}\n" in first


def test_ctrl_c_ends_an_answer_and_keeps_it(slow_model: Path, tmp_path: Path) -> None:
    arguments = ["--model", slow_model, "--max-new-tokens", 16000, "--stop", "@@@", "--seed", 1, "--temperature", 1]
    with Terminal("chat", *arguments) as terminal:
        terminal.read_until(PROMPT)
        terminal.type("Who is there?\n")
        terminal.read_until("Who is there?\n")
        time.sleep(1.0)
        started = time.monotonic()
        terminal.type("\x03")
        shown = terminal.read_until(PROMPT)
        assert time.monotonic() - started < 0.5 * SLACK
        assert "interrupted; /regen" in shown
        terminal.type(f"/save {tmp_path / 'saved.json'}\n")
        terminal.read_until(PROMPT)
        said = json.loads((tmp_path / "saved.json").read_text())["messages"][1]["content"]
        assert len(said) > 10
        assert shown.startswith(said[:10])
        # The conversation goes on from there.
        terminal.type("And you?\n")
        terminal.read_until("And you?\n")
        time.sleep(0.3)
        terminal.type("\x03")
        terminal.read_until(PROMPT)
        terminal.type("\x03")
        assert terminal.read_to_end()[1] == 0


def test_lines_can_be_called_back(chat_model: Path) -> None:
    pytest.importorskip("readline", reason="this Python is built without readline")
    with Terminal("chat", "--model", chat_model, "--greedy", "--max-new-tokens", 3) as terminal:
        terminal.read_until(PROMPT)
        terminal.type("/system\n")
        terminal.read_until("there is no system message")
        terminal.read_until(PROMPT)
        terminal.type("\x10\n")  # Ctrl-P, the line before
        terminal.read_until("there is no system message")
        terminal.read_until(PROMPT)
        terminal.type("/exit\n")
        assert terminal.read_to_end()[1] == 0


def test_an_error_in_a_terminal_does_not_end_the_conversation(chat_model: Path) -> None:
    with Terminal("chat", "--model", chat_model, "--greedy", "--max-new-tokens", 3, "--context", 60) as terminal:
        terminal.read_until(PROMPT)
        terminal.type("no " * 40 + "\n")
        assert "/reset begins a new one" in terminal.read_until(PROMPT)
        terminal.type("Who?\n")
        terminal.read_until(PROMPT)
        terminal.type("/quit\n")
        assert terminal.read_to_end()[1] == 0


def test_a_line_in_a_terminal_that_is_no_text_does_not_end_the_conversation(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:surrogateescape")
    with Terminal("chat", "--model", chat_model, "--greedy", "--max-new-tokens", 3) as terminal:
        terminal.read_until(PROMPT)
        os.write(terminal._master, b"Wh\xff\n")  # no str has these bytes
        assert "standard input: this is not UTF-8 text" in terminal.read_until(PROMPT)
        terminal.type("Who?\n")
        assert "standard input" not in terminal.read_until(PROMPT)
        terminal.type("/quit\n")
        assert terminal.read_to_end()[1] == 0


def test_generate_without_a_prompt_does_not_wait_for_a_terminal() -> None:
    with Terminal("generate") as terminal:
        shown, code = terminal.read_to_end()
    assert "BOS" in shown
    assert code == 2


def test_generate_takes_a_prompt_from_the_terminal_when_told_to() -> None:
    with Terminal("generate", "-", "--max-new-tokens", 5) as terminal:
        terminal.read_until("Ctrl-D after it\n")
        terminal.type("ROMEO:\n\x04")
        shown, code = terminal.read_to_end()
    assert shown.count("ROMEO:") == 2
    assert code == 0


def test_what_takes_long_shows_that_it_is_alive_and_can_be_interrupted(slow_model: Path) -> None:
    with Terminal(
        "generate", "x", "--no-stream", "--max-new-tokens", 16000, "--model", slow_model, kind="xterm"
    ) as terminal:
        terminal.read_until("Generating")
        terminal.type("\x03")
        assert terminal.read_to_end()[1] == 130


def test_perplexity_shows_its_progress(slow_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be " * 2000)
    with Terminal(
        "perplexity", tmp_path / "text.txt", "--model", slow_model, "--context", 512, "--stride", 1, kind="xterm"
    ) as terminal:
        terminal.read_until("Scoring")
        terminal.type("\x03")
        assert terminal.read_to_end()[1] == 130
