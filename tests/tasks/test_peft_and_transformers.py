"""Adapters and classifiers, both ways between this package and transformers with PEFT: the same logits. Runs where they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import llama_ext
from llama_ext import LoRA

torch = pytest.importorskip("torch", reason="torch is not installed: golden files stand for it")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: golden files stand for it")
peft = pytest.importorskip("peft", reason="peft is not installed: golden files stand for it")

# What peft calls of transformers is not this package's to mend.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

IDS = np.array([[5, 9, 2, 17, 30, 8], [1, 1, 40, 3, 22, 63]])
CONFIG = llama_ext.LlamaConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=104,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
# Of the largest logit: both compute in float32.
SAME = 2e-6

Logits = npt.NDArray[np.float32]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama_ext.LlamaForCausalLM(CONFIG, seed=2).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def theirs(model: Any) -> Logits:
    with torch.no_grad():
        logits: Logits = model.eval()(torch.tensor(IDS)).logits.numpy()
    return logits


def causal(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def classifier(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **options)


def assert_same(found: Logits, expected: Logits) -> None:
    assert np.abs(found - expected).max() <= SAME * np.abs(expected).max()


@pytest.mark.parametrize(
    "lora",
    [
        LoRA(r=4, alpha=8),
        LoRA(r=3, alpha=6, targets=["q_proj", "down_proj"], rslora=True, rank_pattern={"q_proj": 5}),
    ],
    ids=["all-linear", "patterns"],
)
def test_peft_loads_an_adapter_that_was_trained_here(lora: LoRA, base: Path, tmp_path: Path) -> None:
    model = llama_ext.LlamaForCausalLM.from_pretrained(base)
    model.add_adapter("x", lora)
    model.compile(lr=1e-2)
    model.fit([IDS[0].tolist(), IDS[1].tolist()] * 8, epochs=2, batch_size=8, verbose=0)
    model.save_adapter(tmp_path / "adapter", "x", base=str(base))
    found = theirs(peft.PeftModel.from_pretrained(causal(base), tmp_path / "adapter"))
    assert_same(model(IDS), found)
    assert np.abs(found - theirs(causal(base))).max() > 1e-3


def test_an_adapter_of_peft_is_loaded_here(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=5,
        lora_alpha=7,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        rank_pattern={"q_proj": 2},
        init_lora_weights=False,
    )
    other = peft.get_peft_model(causal(base), config)
    other.save_pretrained(tmp_path / "peft")
    model = llama_ext.LlamaForCausalLM.from_pretrained(base)
    model.load_adapter(tmp_path / "peft", "p")
    model.set_adapter("p")
    assert_same(model(IDS), theirs(other))


def test_transformers_loads_a_classifier_of_ours(base: Path, tmp_path: Path) -> None:
    model = llama_ext.LlamaForSequenceClassification.from_base(
        llama_ext.LlamaForCausalLM.from_pretrained(base), ["a", "b", "c"], seed=1
    )
    model.save_pretrained(tmp_path / "classifier")
    assert_same(model(IDS), theirs(classifier(tmp_path / "classifier")))


def test_a_classifier_of_transformers_and_its_adapter_are_loaded_here(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = classifier(base, num_labels=3)
    whole.save_pretrained(tmp_path / "whole")
    model = llama_ext.LlamaForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert_same(model(IDS), theirs(whole))

    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    adapted = peft.get_peft_model(classifier(tmp_path / "whole"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", "q")
    model.set_adapter("q")
    assert_same(model(IDS), theirs(adapted))
