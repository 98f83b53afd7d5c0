"""Adapters of a loaded model: PEFT's golden results, nothing changed where nothing is added, rows that do not know each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_ext
from llama_ext import LoRA
from llama_ext.errors import ContextLengthError, FormatError, NumericError, OptionError, UnsupportedError
from shared_data import SHARED, requires_shared

GOLDEN = SHARED / "golden" / "lora-all-linear"


def small(dtype: str = "float32", **changes: Any) -> llama_ext.LlamaForCausalLM:
    options: dict[str, Any] = {
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    return llama_ext.LlamaForCausalLM(llama_ext.LlamaConfig(**{**options, **changes}), seed=3, dtype=dtype)


def relative_rms(found: Any, expected: Any) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2.0) / np.mean(expected**2.0)))


def fill(model: llama_ext.LlamaForCausalLM, name: str, seed: int, size: float = 0.3) -> None:
    """Numbers into B, so that the adapter does something."""
    core = model._loaded(name).core
    rng = np.random.default_rng(seed)
    for slot, _, _ in core.slots():
        shape = core.read(slot, "B").shape
        core.write(slot, "B", rng.standard_normal(shape, np.float32) * np.float32(size))


@pytest.fixture
def three() -> llama_ext.LlamaForCausalLM:
    """A model with adapters a, b and c of different kinds, none of them active."""
    model = small()
    model.add_adapter("a", LoRA(r=4, alpha=8), seed=1)
    model.add_adapter("b", LoRA(r=2, alpha=8, targets=["q_proj", "v_proj"], rslora=True), seed=2)
    model.add_adapter("c", LoRA(r=5, alpha=3, targets=["mlp.down_proj"], rank_pattern={"layers.1": 1}), seed=3)
    for seed, name in enumerate("abc"):
        fill(model, name, seed)
    model.set_adapter(None)
    return model


IDS = np.random.default_rng(0).integers(0, 67, (4, 19))
NAMES = ["a", None, "b", "c"]


@requires_shared
def test_logits_with_peft_s_adapter_are_peft_s() -> None:
    golden = load_file(GOLDEN / "golden.safetensors")
    model = llama_ext.LlamaForCausalLM.from_pretrained(GOLDEN / "base")
    base = golden["base_logits"]
    assert relative_rms(model(golden["input_ids"]), base) <= 2e-6
    model.load_adapter(GOLDEN / "adapter", "golden")
    assert model.active_adapter == "golden"
    found = model(golden["input_ids"])
    assert relative_rms(found, golden["logits"]) <= 2e-6
    assert relative_rms(base, golden["logits"]) > 0.01, "the adapter does something"
    model.merge_adapter()
    assert relative_rms(model(golden["input_ids"]), golden["logits"]) <= 2e-6
    assert relative_rms(model(golden["input_ids"]), found) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_new_adapter_changes_no_bit(dtype: str) -> None:
    model = small(dtype)
    before = model(IDS)
    text = model.generate([IDS[0].tolist()], max_new_tokens=20)
    model.add_adapter("new", LoRA(r=4))
    assert np.array_equal(model(IDS), before)
    assert model.generate([IDS[0].tolist()], max_new_tokens=20) == text


def test_a_is_uniform_as_peft_initialises_it_and_b_is_zero() -> None:
    model = small(hidden_size=256, num_attention_heads=8)
    model.add_adapter("x", LoRA(r=64, targets=["q_proj"]), seed=5)
    core = model._loaded("x").core
    a = core.read("layers.0.q", "A")
    assert a.shape == (64, 256)
    bound = 1 / np.sqrt(256)
    assert np.abs(a).max() <= bound
    assert abs(float(a.std()) - bound / np.sqrt(3)) < 0.02 * bound
    assert not np.array_equal(a, core.read("layers.1.q", "A"))
    assert not core.read("layers.0.q", "B").any()
    again = small(hidden_size=256, num_attention_heads=8)
    again.add_adapter("y", LoRA(r=64, targets=["q_proj"]), seed=5)
    assert np.array_equal(again._loaded("y").core.read("layers.0.q", "A"), a)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_merged_is_unmerged(dtype: str, limit: float, name: str) -> None:
    loras = {
        "a": LoRA(r=4),
        "b": LoRA(r=2, targets=["q_proj", "v_proj"], rslora=True),
        "c": LoRA(targets=["down_proj"]),
    }
    model = small(dtype)
    base = model(IDS)
    model.add_adapter(name, loras[name])
    fill(model, name, 1, 0.1)
    unmerged = model(IDS)
    model.merge_adapter(name)
    assert model.adapters == {}
    assert model.active_adapter is None
    size = np.abs(base).max()
    assert np.abs(model(IDS) - unmerged).max() <= limit * size
    assert np.abs(base - unmerged).max() > 3 * limit * size


def test_swapping_adapters_gives_the_same_bits(three: llama_ext.LlamaForCausalLM) -> None:
    base = three(IDS)
    first = {}
    for name in ("a", "b", "a", "c", "b", None, "a"):
        three.set_adapter(name)
        found = three(IDS)
        assert np.array_equal(first.setdefault(name, found), found)
    assert np.array_equal(first[None], base)
    assert len({value.tobytes() for value in first.values()}) == 4


def test_rows_of_one_batch_have_their_own_adapters(three: llama_ext.LlamaForCausalLM) -> None:
    together = three(IDS, adapter=NAMES)
    for row, name in enumerate(NAMES):
        alone = three(IDS[row : row + 1], adapter=None if name is None else [name])
        assert np.array_equal(together[row : row + 1], alone)
    assert not np.array_equal(together[0], three(IDS[:1])[0])


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 24},
        {"max_new_tokens": 12, "temperature": 1.0, "seed": 5, "num_return_sequences": 2},
        {"max_new_tokens": 12, "max_batch_size": 2},
        {"max_new_tokens": 10, "num_beams": 3},
        {"max_new_tokens": 16, "prompt_lookup_num_tokens": 4},
    ],
    ids=["greedy", "sampled", "continuous", "beams", "lookup"],
)
def test_prompts_of_one_call_have_their_own_adapters(
    three: llama_ext.LlamaForCausalLM, options: dict[str, Any]
) -> None:
    # The same beginnings: what is shared between prompts must not be shared between adapters.
    prompts = [IDS[0, :9].tolist()] * 4
    if "temperature" in options:
        prompts = prompts[:1]
    names = NAMES[: len(prompts)]
    together = three.generate(prompts, adapter=names, **options)
    copies = options.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        alone = three.generate([prompts[row]], adapter=[name], **options)
        assert together[row * copies : (row + 1) * copies] == alone
    if len(names) > 1:
        assert len({tuple(row) for row in together}) > 1


def test_a_list_may_name_the_base_while_an_adapter_is_active(three: llama_ext.LlamaForCausalLM) -> None:
    base = three(IDS)
    three.set_adapter("a")
    assert np.array_equal(three(IDS, adapter=[None] * 4), base)
    assert not np.array_equal(three(IDS), base)


def test_scores_and_sessions_have_the_active_adapter(three: llama_ext.LlamaForCausalLM, tmp_path: Path) -> None:
    row = IDS[0].tolist()
    for name in (None, "a", "b"):
        three.set_adapter(name)
        logits = three(IDS[:1])[0].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = sum(logp[place - 1, row[place]] for place in range(10, 19))
        assert three.loglikelihood(row[:10], row[10:]).logprob == pytest.approx(expected, abs=1e-4)
        session = three.session()
        assert np.array_equal(session.append(row), three(IDS[:1])[0, -1])
        session.save(tmp_path / f"{name}.session")
    three.set_adapter("a")
    session = three.load_session(tmp_path / "a.session")
    assert session.length == 19
    with pytest.raises(FormatError, match="another adapter"):
        three.load_session(tmp_path / "b.session")
    with pytest.raises(FormatError, match="another adapter"):
        three.load_session(tmp_path / "None.session")
    other = three.session(adapter="b")
    three.set_adapter("b")
    assert np.array_equal(other.append(row), three(IDS[:1])[0, -1])
    with pytest.raises(OptionError, match="opened with"):
        next(iter(other.stream_generate([1], adapter="a", max_new_tokens=1)))


def test_an_open_session_survives_new_and_merged_adapters() -> None:
    model = small()
    session = model.session()
    session.append(IDS[0, :8].tolist())
    branch = session.fork()
    model.add_adapter("a", LoRA(r=3))
    fill(model, "a", 0)
    model.merge_adapter("a")
    last = session.append(IDS[0, 8:].tolist())
    assert np.array_equal(last, small()(IDS[:1])[0, -1])
    alone = small().generate([IDS[0, :12].tolist()], max_new_tokens=6)[0][12:]
    pieces = branch.stream_generate(IDS[0, 8:12].tolist(), max_new_tokens=6)
    assert [piece.token_id for piece in pieces] == alone


def test_what_is_saved_is_loaded(three: llama_ext.LlamaForCausalLM, tmp_path: Path) -> None:
    other = small()
    for name in "abc":
        three.save_adapter(tmp_path / name, name, base="some/base")
        other.load_adapter(tmp_path / name, name)
    assert np.array_equal(other(IDS, adapter=NAMES), three(IDS, adapter=NAMES))
    assert dict(other.adapters)["b"] == LoRA(r=2, alpha=8, targets=["q_proj", "v_proj"], rslora=True)


def test_a_merged_model_is_saved_and_loaded(three: llama_ext.LlamaForCausalLM, tmp_path: Path) -> None:
    for name in "bc":
        three.delete_adapter(name)
    three.set_adapter("a")
    with pytest.raises(OptionError, match=r"'a' is active.*merge_adapter"):
        three.save_pretrained(tmp_path)
    unmerged = three(IDS)
    three.merge_adapter()
    three.save_pretrained(tmp_path)
    loaded = llama_ext.LlamaForCausalLM.from_pretrained(tmp_path)
    assert np.array_equal(loaded(IDS), three(IDS))
    assert np.abs(loaded(IDS) - unmerged).max() <= 1e-5 * np.abs(unmerged).max()


def test_what_cannot_be_merged_is_refused(three: llama_ext.LlamaForCausalLM) -> None:
    with pytest.raises(OptionError, match="'b' was made for the weights as they are"):
        three.merge_adapter("a")
    with pytest.raises(OptionError, match="no adapter is active"):
        three.merge_adapter()
    quantized = small("int8")
    quantized.add_adapter("x", LoRA())
    with pytest.raises(UnsupportedError, match="not merged into int8 weights"):
        quantized.merge_adapter()
    narrow = small("float16")
    narrow.add_adapter("x", LoRA(targets=["q_proj"]))
    fill(narrow, "x", 0, 1e6)
    before = narrow(IDS, adapter=[None] * 4)
    with pytest.raises(NumericError, match=r"layers\.0\.q is beyond the range of float16"):
        narrow.merge_adapter()
    assert np.array_equal(narrow(IDS, adapter=[None] * 4), before)


def test_names_and_choices_are_checked(three: llama_ext.LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no adapter 'x'; known: 'a', 'b', 'c'"):
        three.set_adapter("x")
    with pytest.raises(OptionError, match="no adapter 'x'"):
        three(IDS, adapter="x")
    with pytest.raises(OptionError, match="3 adapters for 4 sequences"):
        three(IDS, adapter=["a", "b", "c"])
    with pytest.raises(OptionError, match="1 adapters for 2 sequences"):
        three.generate([[1], [2]], adapter=["a"], max_new_tokens=1)
    with pytest.raises(OptionError, match="adapter must be a name"):
        three.generate([[1]], adapter=[3], max_new_tokens=1)  # type: ignore[list-item]
    with pytest.raises(OptionError, match="'a' already"):
        three.add_adapter("a", LoRA())
    with pytest.raises(OptionError, match="name must be"):
        three.add_adapter("", LoRA())
    with pytest.raises(OptionError, match=r"name must be .*, got 5$"):
        three.add_adapter(5, LoRA())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"llama_ext\.LoRA"):
        three.add_adapter("d", {"r": 3})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="seed"):
        three.add_adapter("d", LoRA(), seed=-1)
    with pytest.raises(FormatError, match="no such directory"):
        three.load_adapter(tmp_path / "nowhere", "d")
    with pytest.raises(OptionError, match="no adapter 'd'"):
        three.delete_adapter("d")
    assert list(three.adapters) == ["a", "b", "c"]
    with pytest.raises(ContextLengthError):
        three(np.zeros((1, 65), np.int64), adapter="a")


def test_an_adapter_that_is_loaded_as_a_model_is_called_one(tmp_path: Path) -> None:
    model = llama_ext.LlamaForCausalLM.from_pretrained("demo")
    model.add_adapter("a", llama_ext.LoRA(r=1))
    model.save_adapter(tmp_path / "a", "a")
    with pytest.raises(
        llama_ext.FormatError, match="is an adapter's, not a model's: load its base, and this with load_adapter"
    ):
        llama_ext.LlamaForCausalLM.from_pretrained(tmp_path / "a")
