"""A model's name is a path, the packaged demo, or a Hub id; nothing here touches the network."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_ext.errors import FormatError, OptionError, UnsupportedError
from llama_ext.io import hub

Calls = list[dict[str, Any]]


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    calls: Calls = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(tmp_path)

    install(monkeypatch, snapshot_download)
    return calls


def install(monkeypatch: pytest.MonkeyPatch, snapshot_download: Callable[..., str]) -> None:
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_an_existing_path_is_taken_as_it_is(tmp_path: Path, fake_hub: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name") == Path("org/name")
    assert hub.resolve(tmp_path / "model.gguf") == tmp_path / "model.gguf"
    assert fake_hub == []
    with pytest.raises(OptionError, match="revision"):
        hub.resolve("org/name", revision="main")


def test_demo_is_the_packaged_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "llama_ext"
    monkeypatch.setattr(hub, "__file__", str(package / "io" / "hub.py"))
    with pytest.raises(FormatError, match="Reinstall"):
        hub.resolve("demo")
    (package / "data" / "demo").mkdir(parents=True)
    assert hub.resolve("demo") == package / "data" / "demo"


def test_a_hub_id_is_downloaded_without_pickles(fake_hub: Calls, tmp_path: Path) -> None:
    assert hub.resolve("some-org/some.model_1", revision="v2") == tmp_path
    (call,) = fake_hub
    assert (call["repo_id"], call["revision"]) == ("some-org/some.model_1", "v2")
    assert set(call["allow_patterns"]) == {"*.json", "*.safetensors", "tokenizer.model", "*.jinja"}
    assert not any("bin" in pattern for pattern in call["allow_patterns"])


def test_a_hub_id_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnsupportedError, match=r"pip install llama_ext\[hub\]"):
        hub.resolve("some-org/some-model")


@pytest.mark.parametrize("failure", [OSError("401 Client Error.\nlong text"), ValueError("offline"), RuntimeError()])
def test_a_failed_download_is_a_format_error(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, **options: Any) -> str:
        raise failure

    install(monkeypatch, snapshot_download)
    with pytest.raises(FormatError, match="no such directory here, and the Hugging Face Hub") as caught:
        hub.resolve("some-org/some-model")
    assert caught.value.__cause__ is failure
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "a/b/c",
        "../x/y",
        "/no/such/path",
        "./no-such",
        "org/..",
        "org/a..b",
        "org/a--b",
        "org/",
        "/x",
        "a b/c",
        "x\0/y",
        "x" * 5000,
    ],
)
def test_anything_else_says_what_was_looked_for(name: str, fake_hub: Calls) -> None:
    with pytest.raises(FormatError, match="neither 'demo' nor a Hub id"):
        hub.resolve(name)
    assert fake_hub == []


def test_an_empty_name_is_told_to_be_empty(fake_hub: Calls) -> None:
    with pytest.raises(FormatError, match="the path of a model is empty"):
        hub.resolve("")
    assert fake_hub == []


def test_a_missing_path_object_is_never_a_hub_id(fake_hub: Calls) -> None:
    with pytest.raises(FormatError):
        hub.resolve(Path("some-org/some-model"))
    assert fake_hub == []


def test_a_file_or_something_in_a_directory_that_is_here_is_asked_of_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("the Hub was asked"))
    (tmp_path / "models").mkdir()
    for name in ("nowhere/x.gguf", "nowhere/model.safetensors", "models/llama"):
        with pytest.raises(FormatError, match="there is no such directory or file"):
            hub.resolve(name)
