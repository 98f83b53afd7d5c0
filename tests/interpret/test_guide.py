"""docs/interpretability.md does what it shows, and its table has every name."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest

import llama_ext
from llama_ext.interpret import hook_names
from self_contained import Page

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "interpretability.md"


def test_python_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = io.StringIO()
    found = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(found) == 7
    with contextlib.redirect_stdout(printed):
        for number, block in enumerate(found, start=1):
            exec(compile(block, f"interpretability.md, block {number}", "exec"), names)
    for line in (
        "['KING', ' R', 'IC', 'H', 'ARD', ' I']",
        "(4, 6, 6, 6)",
        "ActivationCache of 6 tokens",
        "Logit lens of 6 tokens",
    ):
        assert line in printed.getvalue()
    for page in ("attention.html", "lens.html"):
        Page((tmp_path / page).read_text(encoding="utf-8"))
    # What the guide reads off its table.
    patching = names["found"]
    assert isinstance(patching, llama_ext.interpret.Patching)
    assert patching.recovery[0, 2:4].min() > 0.25 > np.abs(patching.recovery[0, 5])
    assert patching.recovery[3, 5] > 0.75 > np.abs(patching.recovery[3, :5]).max()


def test_the_table_has_every_name() -> None:
    config = llama_ext.LlamaForCausalLM.from_pretrained("demo").config
    table = "\n".join(line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("| `"))
    for name in hook_names(config):
        assert name.rpartition(".")[2] in table
