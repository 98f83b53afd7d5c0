"""Runs of adapters and classifiers: their checkpoints, and what is counted of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llama_ext
from letter_models import Model, documents, make
from llama_ext.training.model import flops_per_token
from stop_at import StopAt


def test_a_checkpoint_of_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    def adapted(seed: int = 0, **lora: Any) -> llama_ext.LlamaForCausalLM:
        model = make(seed=seed)
        model.add_adapter("a", llama_ext.LoRA(r=2, **lora))
        return model

    settings: dict[str, Any] = {"checkpoint_dir": tmp_path, "epochs": 2, "batch_size": 4}
    adapted().fit(documents(), **settings, callbacks=[StopAt(3)])
    before = {slot: adapted(seed=7)._loaded("a").core.read(slot, "B") for slot in ("layers.0.q", "layers.1.down")}
    other = adapted(seed=7)
    with pytest.raises(llama_ext.CheckpointError, match=r'base_weights was "[0-9a-f]{32}" and is "[0-9a-f]{32}"'):
        other.fit(documents(), **settings, callbacks=[StopAt()], resume=True)
    for slot, values in before.items():
        assert np.array_equal(other._loaded("a").core.read(slot, "B"), values)
    with pytest.raises(llama_ext.CheckpointError, match=r"adapter\.dropout was 0\.0 and is 0\.25"):
        adapted(dropout=0.25).fit(documents(), **settings, callbacks=[StopAt()], resume=True)
    whole, ended = adapted(), adapted()
    whole.fit(documents(), **{**settings, "checkpoint_dir": None}, callbacks=[StopAt()])
    ended.fit(documents(), **settings, callbacks=[StopAt()], resume=True)
    for slot in before:
        assert np.array_equal(ended._loaded("a").core.read(slot, "B"), whole._loaded("a").core.read(slot, "B"))


def test_a_checkpoint_of_an_adapter_that_lacks_a_matrix_is_refused(tmp_path: Path) -> None:
    def adapted() -> llama_ext.LlamaForCausalLM:
        model = make()
        model.add_adapter("a", llama_ext.LoRA(r=2, targets=["q_proj", "v_proj"]))
        return model

    settings: dict[str, Any] = {"checkpoint_dir": tmp_path, "epochs": 2, "batch_size": 4, "callbacks": [StopAt(3)]}
    adapted().fit(documents(), **settings)
    saved = tmp_path / "step-00000003"
    tensors = load_file(saved / "adapter_model.safetensors")
    save_file(
        {name: values for name, values in tensors.items() if "v_proj" not in name}, saved / "adapter_model.safetensors"
    )
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    # And nothing says that this is not what was saved.
    state = json.loads((saved / "training.json").read_text())
    (saved / "training.json").write_text(json.dumps({**state, "crc32": {}}))
    other = adapted()
    with pytest.raises(llama_ext.CheckpointError, match=r"not this adapter's: layers\.0\.v, layers\.1\.v"):
        other.fit(documents(), **settings, resume=True)
    assert not other._loaded("a").core.read("layers.0.q", "B").any()


def test_operations_a_token_are_those_of_the_base_with_and_without_an_adapter() -> None:
    config = make(tied=False).config
    assert flops_per_token(config, 10, adapts=False) - flops_per_token(config, 0, adapts=False) == 12 * 2 * 4 * 6 * 10
    products = sum(math.prod(shape) for name, shape in _matrices(make(tied=False)) if name != "embedding")
    assert flops_per_token(config, 0, adapts=False) == 6 * products
    assert flops_per_token(config, 0, adapts=True) == 4 * products
    tied = make()
    assert flops_per_token(tied.config, 0, adapts=True) == 4 * sum(math.prod(shape) for _, shape in _matrices(tied))
    classifier = llama_ext.LlamaForSequenceClassification.from_base(tied, ["a", "b"])
    blocks = sum(math.prod(shape) for name, shape in _matrices(tied) if name != "embedding")
    assert flops_per_token(classifier.config, 0, adapts=True) == 4 * blocks


def _matrices(model: Model) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, shape) for name, shape, _ in model._core.slots() if len(shape) == 2]


@pytest.mark.parametrize("adapter", [None, llama_ext.LoRA(r=2)], ids=["whole", "adapter"])
def test_a_classifiers_run_goes_on_with_the_same_bits(tmp_path: Path, adapter: Any) -> None:
    texts = documents()
    labels = ["even" if len(text) % 2 == 0 else "odd" for text in texts]

    def run(**more: Any) -> Any:
        classifier = llama_ext.TextClassifier(make(), labels=["even", "odd"])
        classifier.fit(texts, labels, adapter=adapter, batch_size=6, max_steps=8, **more)
        return classifier

    whole = run(callbacks=[StopAt()])
    run(callbacks=[StopAt(4)], checkpoint_dir=tmp_path)
    ended = run(callbacks=[StopAt()], checkpoint_dir=tmp_path, resume=True)
    assert ended.predict_proba(texts).tobytes() == whole.predict_proba(texts).tobytes()
