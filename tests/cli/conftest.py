"""What the tests of the command share: running it here or in a process of its own, and models to run it on."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import llama_ext
from command_line import Result, Run
from llama_ext.cli.main import main
from shared_data import LETTERS

TEMPLATE = (
    "{% for m in messages %}{{ m.role | upper }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:\n{% endif %}"
)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process; `stdin` is what is piped into it."""

    def call(*arguments: object, stdin: str | bytes = "") -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the demo's letters that could go on for a minute, to be interrupted."""
    folder = tmp_path_factory.mktemp("slow")
    config = llama_ext.LlamaConfig(
        vocab_size=66,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=16384,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    tokenizer = llama_ext.Tokenizer.from_pretrained(LETTERS)
    llama_ext.LlamaForCausalLM(config, tokenizer=tokenizer, seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with a chat template, a turn of which ends at a full stop."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(LETTERS, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE, "eos_token": "."}))
    return folder


@pytest.fixture
def shim(tmp_path: Path) -> dict[str, str]:
    """An environment in which `llama-ext` is the command under test."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "llama-ext"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llama_ext "$@"\n')
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
