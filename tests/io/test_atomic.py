"""Saves replace a link that lies in their way, and write through one only where the user named it."""

from __future__ import annotations

import os
from pathlib import Path

import llama_ext
from llama_ext.io.atomic import atomic_write


def _model(seed: int = 0) -> llama_ext.LlamaForCausalLM:
    config = llama_ext.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return llama_ext.LlamaForCausalLM(config, seed=seed)


def test_a_followed_link_survives_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for content in (b"new", b"newer"):
        with atomic_write(tmp_path / "link", follow_links=True) as file:
            file.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


def test_saving_a_model_over_a_folder_of_links_leaves_the_files_they_name(tmp_path: Path) -> None:
    # As a snapshot in the Hub's cache, whose links name blobs that other snapshots share.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    _model(seed=1).save_pretrained(blobs)
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    snapshot.mkdir()
    for name in before:
        (snapshot / name).symlink_to(blobs / name)
    _model(seed=2).save_pretrained(snapshot)
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before
    assert not any(path.is_symlink() for path in snapshot.iterdir())
    assert (snapshot / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_a_session_is_saved_through_a_link(tmp_path: Path) -> None:
    model = _model()
    session = model.session(max_length=8)
    session.append([1, 2, 3])
    (tmp_path / "link").symlink_to(tmp_path / "target")
    session.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert model.load_session(tmp_path / "target").tokens == [1, 2, 3]
