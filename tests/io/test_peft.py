"""PEFT's files of an adapter: read as PEFT means them, written as PEFT reads them, and refused where they ask for more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama_ext.errors import CheckpointError, FormatError, LimitError, LlamaExtError, UnsupportedError
from llama_ext.io.peft import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, read_adapter_config, write_adapter
from llama_ext.models.config import LlamaConfig
from llama_ext.models.lora import LoRA
from shared_data import SHARED, requires_shared
from small_config import config_of

CONFIG = config_of()
CLASSIFIER = CONFIG.as_classifier(["no", "yes", "perhaps"])
LORA = LoRA(r=4, alpha=6, targets=["q_proj", "down_proj"], rank_pattern={"down_proj": 3}, rslora=True, dropout=0.25)


def matrices(config: LlamaConfig = CONFIG, lora: LoRA = LORA) -> Callable[[str, str], Any]:
    sizes = {"q": (64, 64), "down": (64, 176)}

    def read(slot: str, which: str) -> Any:
        rank, _ = lora.resolve(config)[slot]
        rows, columns = sizes[slot.rpartition(".")[2]]
        rng = np.random.default_rng([ord(letter) for letter in slot + which])
        return rng.standard_normal((rank, columns) if which == "A" else (rows, rank), np.float32)

    return read


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_adapter(tmp_path, LORA, CONFIG, matrices(), base="base/model")
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    tensors = dict(load_file(folder / WEIGHTS_FILE))
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


def opened(folder: Path, config: LlamaConfig = CONFIG) -> AdapterFiles:
    with AdapterFiles(folder, config) as files:
        return files


def test_what_is_written_is_read(adapter: Path) -> None:
    read = matrices()
    with AdapterFiles(adapter, CONFIG) as files:
        assert files.lora == LORA
        assert files.base == "base/model"
        assert files.slots == LORA.resolve(CONFIG)
        assert not files.has_head
        assert files.read_head() is None
        for slot in files.slots:
            for which in "AB":
                assert np.array_equal(files.read(slot, which), read(slot, which))


def test_a_classifiers_head_goes_with_its_adapter(tmp_path: Path) -> None:
    head = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    write_adapter(tmp_path, LORA, CLASSIFIER, matrices(CLASSIFIER), head=head)
    assert np.array_equal(load_file(tmp_path / WEIGHTS_FILE)["base_model.model.score.weight"], head)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (values["task_type"], values["modules_to_save"]) == ("SEQ_CLS", ["classifier", "score"])
    with AdapterFiles(tmp_path, CLASSIFIER) as files:
        found = files.read_head()
        assert found is not None
        assert np.array_equal(found, head)
    with pytest.raises(UnsupportedError, match="LlamaForSequenceClassification"):
        opened(tmp_path)
    with pytest.raises(CheckpointError, match=r"score\.weight must have shape \(2, 64\), got \(3, 64\)"):
        opened(tmp_path, CONFIG.as_classifier(["no", "yes"]))


def test_all_linear_is_written_as_names(tmp_path: Path) -> None:
    config = config_of(num_hidden_layers=1)
    lora = LoRA(r=2, targets="all-linear")
    shapes = {
        "q": (64, 64),
        "k": (16, 64),
        "v": (16, 64),
        "o": (64, 64),
        "gate": (176, 64),
        "up": (176, 64),
        "down": (64, 176),
    }

    def zeros(slot: str, which: str) -> Any:
        rows, columns = shapes[slot.rpartition(".")[2]]
        return np.zeros((2, columns) if which == "A" else (rows, 2), np.float32)

    write_adapter(tmp_path, lora, config, zeros)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert values["target_modules"] == sorted(f"{name}_proj" for name in shapes)
    with AdapterFiles(tmp_path, config) as files:
        assert files.slots == lora.resolve(config)


@requires_shared
def test_peft_s_own_files_are_read() -> None:
    folder = SHARED / "golden" / "lora-all-linear"
    config = LlamaConfig.from_pretrained(folder / "base")
    tensors = load_file(folder / "adapter" / WEIGHTS_FILE)
    with AdapterFiles(folder / "adapter", config) as files:
        assert (files.lora.r, files.lora.alpha, files.lora.dropout) == (8, 16, 0.0)
        assert files.slots == dict.fromkeys(LoRA().resolve(config), (8, 2.0))
        name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
        assert np.array_equal(files.read("layers.1.up", "B"), tensors[name])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_narrow_matrices_are_widened(adapter: Path, dtype: str) -> None:
    from llama_ext.io.checkpoint import write_safetensors

    tensors = load_file(adapter / WEIGHTS_FILE)
    bits = {
        name: values.astype(np.float16) if dtype == "F16" else (values.view(np.uint32) >> 16).astype(np.uint16)
        for name, values in tensors.items()
    }
    write_safetensors(
        adapter / WEIGHTS_FILE, [(name, dtype, values.shape, lambda v=values: [v]) for name, values in bits.items()]
    )
    with AdapterFiles(adapter, CONFIG) as files:
        found = files.read("layers.0.q", "A")
    exact = matrices()("layers.0.q", "A")
    assert found.dtype == np.float32
    assert np.abs(found - exact).max() <= 0.01 * np.abs(exact).max()
    assert not np.array_equal(found, exact)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"use_dora": True}, "use_dora = True.*DoRA"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"task_type": "FEATURE_EXTRACTION"}, "task_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'.*changes the base"),
        ({"init_lora_weights": 1}, "init_lora_weights"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*lm_head"),
        ({"modules_to_save": ["score"]}, "adapter of a classifier"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"kasa_config": {"x": 1}}, "kasa_config"),
        ({"something_of_next_year": 0.5}, "something_of_next_year.*does not know"),
        ({"target_modules": ["q_proj", "down_proj", "lm_head"]}, "an adapter of lm_head"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "layers_pattern"),
    ],
)
def test_what_is_not_done_here_is_refused(adapter: Path, values: dict[str, Any], words: str) -> None:
    change(adapter, **values)
    with pytest.raises(UnsupportedError, match=words) as caught:
        opened(adapter)
    assert CONFIG_FILE in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 0}, "r must be"),
        ({"r": "8"}, "r must be"),
        ({"lora_alpha": None, "r": True}, "r must be"),
        ({"lora_alpha": "x"}, "lora_alpha must be"),
        ({"lora_dropout": 1.0}, "dropout must be"),
        ({"target_modules": None}, "target_modules must be"),
        ({"target_modules": 5}, "target_modules must be"),
        ({"target_modules": []}, "targets must be"),
        ({"target_modules": ["c_attn"]}, "no matrix"),
        ({"target_modules": "("}, "regular expression"),
        ({"rank_pattern": {"(": 3}}, "regular expression"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\.q_proj must be"),
        ({"alpha_pattern": {"q_proj": "1"}}, r"alpha_pattern\.q_proj must be"),
        ({"layers_to_transform": ["a"]}, "layers_to_transform must be"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "layers_to_transform must be absent"),
        ({"use_rslora": "yes"}, "use_rslora must be"),
        ({"modules_to_save": "score"}, "modules_to_save must be"),
    ],
)
def test_a_malformed_value_is_named(adapter: Path, values: dict[str, Any], words: str) -> None:
    change(adapter, **values)
    with pytest.raises(FormatError, match=words) as caught:
        opened(adapter)
    assert str(adapter) in str(caught.value)


def test_keys_that_change_nothing_are_accepted(adapter: Path) -> None:
    change(
        adapter,
        something_of_next_year=None,
        another={},
        peft_version="9",
        init_lora_weights="gaussian",
        ensure_weight_tying=True,
        megatron_core="megatron.core",
        qalora_group_size=32,
    )
    assert opened(adapter).slots == LORA.resolve(CONFIG)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"), "q_proj.lora_B.weight is missing"),
        (lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": np.zeros(64, np.float32)}), "bias"),
        (lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": np.zeros(64, np.float32)}), "DoRA"),
        (lambda t: t.update({"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}), "unexpected"),
        (lambda t: t.update({"base_model.model.score.weight": np.zeros((2, 64), np.float32)}), "adapter of a classifier"),
        (lambda t: t.update({"base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight": np.zeros((4, 64), np.float32)}), "v_proj.* is unexpected"),
        (lambda t: t.update({"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": np.zeros((4, 176), np.float32)}), r"must have shape \(3, 176\), got \(4, 176\)"),
        (lambda t: t.update({"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": np.zeros((3 * 176,), np.float32)}), "must have shape"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(adapter: Path, edit: Callable[[dict[str, Any]], None], words: str) -> None:
    change_tensors(adapter, edit)
    with pytest.raises(CheckpointError, match=words) as caught:
        opened(adapter)
    assert WEIGHTS_FILE in str(caught.value)


def test_whole_numbers_and_infinities_are_refused(adapter: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    change_tensors(adapter, lambda tensors: tensors[name].__setitem__((0, 0), np.inf))
    with AdapterFiles(adapter, CONFIG) as files, pytest.raises(CheckpointError, match=r"q_proj\.lora_A.*not finite"):
        files.read("layers.0.q", "A")
    change_tensors(adapter, lambda tensors: tensors.update({name: np.zeros((4, 64), np.int32)}))
    with pytest.raises(UnsupportedError, match="I32"):
        opened(adapter)


def test_missing_files_are_named(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such directory"):
        opened(tmp_path / "nowhere")
    other = tmp_path / "other"
    shutil.copytree(adapter, other, ignore=lambda *_: [WEIGHTS_FILE, "other"])
    with pytest.raises(FormatError, match="a safetensors file"):
        opened(other)
    (other / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"adapter_model\.bin\. Pickled"):
        opened(other)
    (other / CONFIG_FILE).unlink()
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        opened(other)


def test_patterns_keep_their_order_as_the_first_that_matches_counts(tmp_path: Path) -> None:
    patterns: dict[str, int] = {"q_proj": 3, r"layers\.0\..*": 2}
    for order in (patterns, dict(reversed(patterns.items()))):
        lora = LoRA(r=4, targets=["q_proj"], rank_pattern=order, alpha_pattern=order)
        write_adapter(tmp_path, lora, CONFIG, matrices(lora=lora))
        found = opened(tmp_path).lora
        assert found.resolve(CONFIG) == lora.resolve(CONFIG)
        assert list(found.rank_pattern) == list(found.alpha_pattern) == list(order)


def test_too_many_patterns_are_refused(adapter: Path) -> None:
    change(adapter, rank_pattern={f"a{index}": 1 for index in range(20_000)})
    with pytest.raises(LimitError, match="20000 entries"):
        read_adapter_config(adapter)
    change(adapter, rank_pattern={}, r=1 << 40)
    with pytest.raises(LimitError, match="r is"):
        read_adapter_config(adapter)


def test_a_file_cut_anywhere_is_a_typed_error(adapter: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        whole = (adapter / name).read_bytes()
        for end in [*range(0, len(whole) - 1, max(1, len(whole) // 60))]:
            (adapter / name).write_bytes(whole[:end])
            with pytest.raises(LlamaExtError):
                opened(adapter)
        (adapter / name).write_bytes(whole)
    opened(adapter)


def test_saving_over_an_older_adapter_leaves_no_mixture(adapter: Path) -> None:
    def broken(slot: str, which: str) -> Any:
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write_adapter(adapter, LORA, CONFIG, broken)
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        opened(adapter)
