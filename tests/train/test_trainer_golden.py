"""Losses, gradients and steps of the trainer are those of transformers and torch, in float64."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from llama_ext import _core
from llama_ext.models import llama
from llama_ext.models.config import LlamaConfig
from shared_data import SHARED, requires_shared
from tolerances import relative_rms
from trainers import ADAMW, Batch, backend, each_backend


@functools.cache
def golden() -> dict[str, Any]:
    return load_file(SHARED / "golden" / "train-gqa-tied" / "golden.safetensors")


def golden_model(isa: str, threads: int = 2) -> tuple[_core.Model, dict[str, str]]:
    folder = SHARED / "golden" / "train-gqa-tied"
    config = LlamaConfig.from_pretrained(folder)
    model = _core.Model(backend(isa, threads), llama.core_config(config), {"": ("float32", 0)})
    weights = load_file(folder / "model.safetensors")
    names = {spec.slot: spec.name for spec in llama.tensor_specs(config)}
    for slot, name in names.items():
        model.load(slot, weights[name], "float32")
    return model.converted({"": ("float32", 0)}, True), names


def golden_batch(step: int) -> Batch:
    """Labels of transformers are those of the same position; the model predicts the next one's."""
    tokens = golden()["batches"][step][:, :-1]
    labels = golden()["labels"][step][:, 1:]
    lengths = np.full(len(tokens), tokens.shape[1], np.int64)
    return tokens.astype(np.int32).ravel(), labels.astype(np.int32).ravel(), lengths


@requires_shared
@each_backend
def test_loss_and_gradients_are_those_of_torch(isa: str) -> None:
    model, names = golden_model(isa)
    trainer = _core.Trainer(model, optimizer=ADAMW)
    tokens, labels, lengths = golden_batch(0)
    counted = int((labels != -100).sum())
    loss, found = trainer.accumulate(tokens, labels, lengths, scale=1 / counted)
    assert found == counted
    assert abs(loss / counted - golden()["losses"][0]) < 1e-6
    assert abs(trainer.gradient_norm() / golden()["grad_norms"][0] - 1) < 1e-5
    for slot, name in names.items():
        assert relative_rms(trainer.gradient(slot), golden()[f"grad.{name}"]) < 5e-6, name


@requires_shared
@each_backend
def test_ten_steps_of_adamw_are_those_of_torch(isa: str) -> None:
    model, names = golden_model(isa)
    trainer = _core.Trainer(model, optimizer={**ADAMW, "weight_decay": 0.1, "decay": "all"})
    for step in range(10):
        tokens, labels, lengths = golden_batch(step)
        counted = int((labels != -100).sum())
        loss, _ = trainer.accumulate(tokens, labels, lengths, scale=1 / counted)
        assert abs(loss / counted - golden()["losses"][step]) < 1e-5
        norm = trainer.gradient_norm()
        assert abs(norm / golden()["grad_norms"][step] - 1) < 1e-4
        trainer.step(lr=1e-3, gradient_scale=min(1.0, 1.0 / (norm + 1e-6)))
    assert trainer.steps == 10
    for slot, name in names.items():
        assert relative_rms(model.read(slot), golden()[f"final.{name}"]) < 1e-4, name
