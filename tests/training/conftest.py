"""What tests of the loop share."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigram_runs import MakeRun, bigram_run, tokens
from llama_ext.training.batches import Stream
from llama_ext.training.token_file import ArrayReader


@pytest.fixture
def make_run() -> MakeRun:
    return bigram_run


@pytest.fixture
def stream() -> Stream:
    return Stream(ArrayReader(tokens(500)), 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"
