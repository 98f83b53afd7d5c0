"""What a person calls a model names its config and its tokenizer as well: a path, "demo", a Hub id. Nothing here touches the network."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

import llama_ext
from llama_ext import FormatError, LlamaConfig, OptionError, Tokenizer, UnsupportedError

Calls = list[dict[str, Any]]
READERS = pytest.mark.parametrize("read", [Tokenizer.from_pretrained, LlamaConfig.from_pretrained])


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """A Hub where every model is a copy of the demo's config and tokenizer; the calls it got."""
    calls: Calls = []
    demo = Path(llama_ext.__file__).parent / "data" / "demo"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((demo / name).read_bytes())

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(tmp_path)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_demo_has_a_config_and_a_tokenizer() -> None:
    model = llama_ext.LlamaForCausalLM.from_pretrained("demo")
    assert LlamaConfig.from_pretrained("demo") == model.config
    tokenizer = Tokenizer.from_pretrained("demo")
    assert tokenizer.encode("To be, or not to be") == model.tokenizer.encode("To be, or not to be")


@READERS
def test_a_folder_of_that_name_comes_first(read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match=r"tokenizer\.json|config\.json"):
        read("demo")


@READERS
def test_a_hub_id_is_downloaded_without_its_weights(read: Any, fake_hub: Calls) -> None:
    read("some-org/some-model", revision="v2")
    (call,) = fake_hub
    assert (call["repo_id"], call["revision"]) == ("some-org/some-model", "v2")
    assert set(call["allow_patterns"]) == {"*.json", "tokenizer.model", "*.jinja"}


@READERS
def test_a_hub_id_without_the_package_says_what_to_install(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnsupportedError, match=r"pip install llama_ext\[hub\]"):
        read("some-org/some-model")


@READERS
def test_a_mistyped_path_is_not_asked_for_on_the_hub(read: Any, fake_hub: Calls, tmp_path: Path) -> None:
    for name in ("folder/tokenizer.model", "folder/config.json", "nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(FormatError, match="no such file"):
            read(name)
    with pytest.raises(FormatError, match="is empty"):
        read("")
    assert fake_hub == []


@READERS
def test_a_path_has_no_revision(read: Any, fake_hub: Calls, tmp_path: Path) -> None:
    for name in ("demo", tmp_path):
        with pytest.raises(OptionError, match="has no revision 'v2'"):
            read(name, revision="v2")
