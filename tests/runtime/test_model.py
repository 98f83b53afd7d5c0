"""`LlamaForCausalLM`: loading, saving, random weights, and the logits of a whole batch."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llama_ext
from devices import requires_cuda
from llama_ext.models.llama import tensor_specs
from shared_data import LETTERS, SHARED, requires_shared

GOLDEN = ["mha-untied", "gqa-tied-llama3rope", "wide-head-dim", "linear-rope", "biases"]
SAVED = [
    "letters",
    *(pytest.param(name, marks=requires_shared) for name in (*(f"golden/{name}" for name in GOLDEN), "stories260K")),
]

Model = llama_ext.LlamaForCausalLM


def relative_rms(found: Any, expected: Any) -> float:
    expected = np.asarray(expected, dtype=np.float64)
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def golden(name: str) -> dict[str, Any]:
    return load_file(SHARED / "golden" / name / "golden.safetensors")


# Loading.


@requires_shared
@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("name", GOLDEN)
def test_logits_match_transformers_in_float64(name: str, device: str) -> None:
    case = golden(name)
    model = Model.from_pretrained(SHARED / "golden" / name, device=device)
    logits = model(case["input_ids"])
    assert logits.shape == case["logits"].shape
    assert logits.dtype == np.float32
    # Other engines' float32 agrees with these files to about 1e-6.
    assert relative_rms(logits, case["logits"]) < 2e-6


@pytest.mark.parametrize("device", ["cpu", "reference", pytest.param("cuda", marks=[pytest.mark.gpu, requires_cuda])])
@pytest.mark.parametrize("stored", ["float32", "float64", "bfloat16"])
def test_a_weight_beyond_float16_is_told_instead_of_becoming_an_infinity(
    stored: str, device: str, tiny: Model, tmp_path: Path
) -> None:
    tiny.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    # bfloat16 has nothing between 65280 and 65536.
    for number in (65280.0, 65504.0, -65519.0, -65536.0, 2.0**100):
        weights["model.layers.1.mlp.down_proj.weight"][3, 5] = number
        kept = {
            name: values.astype(np.float64 if stored == "float64" else np.float32) for name, values in weights.items()
        }
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        source = tmp_path
        if stored == "bfloat16":
            source = tmp_path / "bfloat16"
            Model.from_pretrained(tmp_path, dtype=stored).save_pretrained(source)
        if abs(number) < (65400 if stored == "bfloat16" else 65520):
            assert np.isfinite(Model.from_pretrained(source, dtype="float16", device=device)([[1, 2]])).all()
            continue
        with pytest.raises(llama_ext.NumericError, match=r"'layers\.1\.down' has a weight of -?(65536|1\.26765e\+30)"):
            Model.from_pretrained(source, dtype="float16", device=device)


@requires_shared
@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize("name", GOLDEN)
def test_bfloat16_weights_stay_close_to_float32(name: str, compute: str) -> None:
    case = golden(name)
    model = Model.from_pretrained(SHARED / "golden" / name, dtype="bfloat16", compute=compute)
    # 8 bits of mantissa: each rounding is at most 2^-9 off.
    assert relative_rms(model(case["input_ids"]), case["logits"]) < 2e-2


def test_auto_keeps_a_16_bit_checkpoint_as_it_is_and_makes_the_rest_float32(tiny: Model, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny.save_pretrained(source)
    assert Model.from_pretrained(source).dtype == "float32"
    for dtype in ("float32", "bfloat16"):
        Model.from_pretrained(source, dtype=dtype).save_pretrained(tmp_path / dtype)
    model = Model.from_pretrained(tmp_path / "bfloat16")
    assert model.dtype == "bfloat16"
    assert Model.from_pretrained(tmp_path / "float32").dtype == "float32"
    single = load_file(tmp_path / "float32/model.safetensors")
    for kind in (np.float16, np.float64):
        save_file(
            {name: value.astype(kind) for name, value in single.items()},
            tmp_path / "float32/model.safetensors",
            metadata={"format": "pt"},
        )
        expected = "float16" if kind is np.float16 else "float32"
        assert Model.from_pretrained(tmp_path / "float32").dtype == expected


# Root mean squares. Random weights make more of an error than trained ones: 1% of int8 weights' becomes 4% of the logits'.
@requires_shared
@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize(("dtype", "most"), [("float16", 2e-3), ("int8", 6e-2), ("int4", 5e-1)])
@pytest.mark.parametrize("name", GOLDEN)
def test_smaller_weights_stay_close_to_float32(name: str, dtype: str, most: float, compute: str) -> None:
    case = golden(name)
    model = Model.from_pretrained(SHARED / "golden" / name, dtype=dtype, compute=compute)
    assert model.dtype == dtype
    assert relative_rms(model(case["input_ids"]), case["logits"]) < most


def test_quantised_weights_take_as_little_memory_as_they_should() -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    # Bits of a weight: its code and its part of a group's scale. Tables of an int4 model are int8.
    for options, bits in (({}, 4 + 16 / 128), ({"group_size": 32}, 4.5), ({"symmetric": False}, 4 + 32 / 128)):
        model = Model(config, dtype="int4", **options)
        tables = 2 * 64 * 256
        expected = (model.num_parameters() - tables) * bits / 8 + tables * (bits + 4) / 8
        assert abs(model.nbytes / expected - 1) < 0.02
        assert model._core.types()["embedding"][0] == "int8" + "_min" * ("symmetric" in options)


def test_options_of_quantised_weights_need_quantised_weights() -> None:
    for options in ({"group_size": 32}, {"symmetric": True}, {"dtype": "bfloat16", "group_size": 64}):
        with pytest.raises(llama_ext.OptionError, match="belongs to dtype='int8' or 'int4'"):
            Model.from_pretrained("demo", **options)
    with pytest.raises(llama_ext.OptionError, match="128, 64, 32"):
        Model.from_pretrained("demo", dtype="int4", group_size=48)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float31"}, llama_ext.OptionError, "dtype"),
        ({"compute": "fast"}, llama_ext.OptionError, "compute"),
        ({"kv_dtype": "int4"}, llama_ext.OptionError, "kv_dtype"),
        ({"threads": 0}, llama_ext.OptionError, "threads"),
        ({"device": "cuda:99"}, llama_ext.DeviceError, "cuda"),
        ({"device": "tpu"}, llama_ext.DeviceError, "tpu"),
        ({"device": None}, llama_ext.OptionError, "device must be a str, such as 'cpu' or 'cuda', got None"),
    ],
)
def test_a_wrong_option_is_an_error(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Model.from_pretrained("demo", **options)


def test_a_path_that_is_not_there_is_a_format_error(tmp_path: Path) -> None:
    with pytest.raises(llama_ext.FormatError, match="no such"):
        Model.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["README.md", "model.bin", "weights"])
def test_a_file_that_is_no_model_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text("# A text\n")
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):
        for load in (
            Model.from_pretrained,
            llama_ext.TextClassifier,
            llama_ext.LlamaForSequenceClassification.from_pretrained,
        ):
            with pytest.raises(llama_ext.FormatError, match=r"it is neither a directory nor a \.gguf file") as caught:
                load(path)
            assert str(caught.value).startswith(f"{path}: ")


def test_a_file_beside_the_weights_points_to_their_directory(tmp_path: Path) -> None:
    Model.from_pretrained(LETTERS).save_pretrained(tmp_path)
    with pytest.raises(llama_ext.FormatError, match=rf"Give the directory: {re.escape(str(tmp_path))}"):
        Model.from_pretrained(tmp_path / "config.json")
    ids = np.array([[1, 2, 3]])
    found = Model.from_pretrained(tmp_path / "model.safetensors")(ids)
    assert np.array_equal(found, Model.from_pretrained(tmp_path)(ids))


def test_an_empty_path_is_a_format_error() -> None:
    with pytest.raises(llama_ext.FormatError, match=r"^the path of a model is empty\. Expected a directory"):
        Model.from_pretrained("")


def test_a_tied_head_that_differs_is_a_checkpoint_error(tmp_path: Path) -> None:
    Model.from_pretrained(LETTERS, dtype="float32").save_pretrained(tmp_path / "copy")
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(llama_ext.CheckpointError, match="lm_head"):
        Model.from_pretrained(tmp_path / "copy")


def test_nothing_is_printed_while_loading(capfd: pytest.CaptureFixture[str]) -> None:
    Model.from_pretrained("demo")
    assert capfd.readouterr() == ("", "")


# Saving.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("name", SAVED)
def test_a_saved_model_is_the_same_model(name: str, dtype: str, tmp_path: Path) -> None:
    model = Model.from_pretrained(LETTERS if name == "letters" else SHARED / name, dtype=dtype)
    model.save_pretrained(tmp_path / "new")
    again = Model.from_pretrained(tmp_path / "new")
    assert again.dtype == dtype
    assert again.num_parameters() == model.num_parameters()
    assert again.eos_token_ids == model.eos_token_ids
    ids = np.arange(1, 60)[None] % model.config.vocab_size
    np.testing.assert_array_equal(again(ids), model(ids))
    if model.tokenizer is not None:
        options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0}
        assert again.generate("Once", **options) == model.generate("Once", **options)


@requires_shared
def test_float32_weights_survive_bit_for_bit_under_the_names_of_transformers(tmp_path: Path) -> None:
    source = SHARED / "golden" / "biases"
    Model.from_pretrained(source).save_pretrained(tmp_path)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def test_saving_over_the_checkpoint_that_was_loaded_keeps_both_right(stories: Model, tmp_path: Path) -> None:
    stories.save_pretrained(tmp_path / "copy")
    model = Model.from_pretrained(tmp_path / "copy")
    before = model.generate("Once upon", max_new_tokens=30)
    model.save_pretrained(tmp_path / "copy")
    assert model.generate("Once upon", max_new_tokens=30) == before
    assert Model.from_pretrained(tmp_path / "copy").generate("Once upon", max_new_tokens=30) == before


def test_the_generation_config_is_saved_too(stories: Model, tmp_path: Path) -> None:
    stories.save_pretrained(tmp_path / "copy")
    said = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 9, "eos_token_id": [2, 5]}
    (tmp_path / "copy" / "generation_config.json").write_text(json.dumps(said))
    model = Model.from_pretrained(tmp_path / "copy")
    assert model.eos_token_ids == (2, 5)
    model.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "generation_config.json").read_text()) == said


# Random weights.


def test_random_weights_are_those_of_transformers_in_distribution(tiny: Model) -> None:
    for spec in tensor_specs(tiny.config):
        values = tiny._core.read(spec.slot)
        if len(spec.shape) == 1:
            np.testing.assert_array_equal(values, np.ones(spec.shape))
        else:
            assert abs(float(values.std()) / tiny.config.initializer_range - 1) < 0.15
            assert abs(float(values.mean())) < 0.1 * tiny.config.initializer_range


def test_a_random_tensor_depends_on_seed_and_name_alone(tiny: Model) -> None:
    config = tiny.config
    again = Model(config, seed=3)
    other = Model(config, seed=4)
    deeper = Model(llama_ext.LlamaConfig.from_dict({**config.to_dict(), "num_hidden_layers": 3}), seed=3)
    rounded = Model(config, seed=3, dtype="bfloat16")
    for spec in tensor_specs(config):
        values = tiny._core.read(spec.slot)
        np.testing.assert_array_equal(again._core.read(spec.slot), values)
        np.testing.assert_array_equal(deeper._core.read(spec.slot), values)
        if values.ndim == 2:
            assert not np.array_equal(other._core.read(spec.slot), values)
            widened = (rounded._core.read(spec.slot).astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_allclose(widened, values, rtol=2.0**-8)


def test_biases_begin_at_zero() -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    model = Model(config)
    for spec in tensor_specs(config):
        if spec.name.endswith(".bias"):
            assert not model._core.read(spec.slot).any()


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, True, None])
def test_a_wrong_seed_is_an_error(seed: Any, tiny: Model) -> None:
    with pytest.raises(llama_ext.OptionError, match="seed"):
        Model(tiny.config, seed=seed)


@pytest.mark.parametrize(
    ("config", "advice"),
    [({"vocab_size": 5}, r"LlamaConfig\.from_dict"), (None, r"LlamaConfig\.from_dict"), ("demo", "from_pretrained")],
)
def test_what_is_no_config_is_an_error(config: Any, advice: str) -> None:
    with pytest.raises(llama_ext.OptionError, match=f"config must be a LlamaConfig, .*{advice}"):
        Model(config)


def test_what_is_no_tokenizer_is_an_error(tiny: Model) -> None:
    wrong: Any = "demo"
    with pytest.raises(llama_ext.OptionError, match="tokenizer must be a Tokenizer or None, got str"):
        Model(tiny.config, wrong)


@pytest.mark.parametrize("path", [5, None, b"demo", {"vocab_size": 5}])
def test_what_is_no_path_is_an_error(path: Any) -> None:
    with pytest.raises(llama_ext.OptionError, match="a path or a Hub id"):
        Model.from_pretrained(path)


def test_integers_of_numpy_are_whole_numbers(tiny: Model) -> None:
    model = Model(tiny.config, seed=np.int64(3), threads=np.int64(2))
    assert model.threads == 2
    assert np.array_equal(model([[1, 2, 3]]), tiny([[1, 2, 3]]))
    session = model.session(np.int64(10))
    assert session.max_length == 10
    session.append([1, 2, 3])
    session.rewind(np.uint8(2))
    assert session.length == 2
    for wrong in (np.bool_(True), np.float64(2), 2.0, True, "2"):
        with pytest.raises(llama_ext.OptionError, match="threads"):
            Model(tiny.config, threads=wrong)
        with pytest.raises(llama_ext.OptionError, match="rewind"):
            session.rewind(wrong)


def test_a_character_is_neither_bos_nor_eos_because_the_config_says_nothing() -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    letters = llama_ext.Tokenizer.characters("abcd")
    model = Model(config, letters)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert model.bos_token_id is None
    assert model.eos_token_ids == ()
    with pytest.raises(llama_ext.OptionError, match="no BOS token"):
        model.generate("", max_new_tokens=1)
    ended = model.generate("a", max_new_tokens=40, eos_token_id=[0, 1, 2, 3], return_details=True)
    assert ended.finish_reason == "stop"
    assert model.generate("a", max_new_tokens=40, return_details=True).finish_reason == "length"
    without = Model(config)
    assert (without.bos_token_id, without.eos_token_ids) == (1, (2,))


# Facts about a model.


def test_a_model_says_what_it_is(tiny: Model) -> None:
    expected = sum(int(np.prod(spec.shape)) for spec in tensor_specs(tiny.config))
    assert tiny.num_parameters() == expected
    assert (tiny.dtype, tiny.compute, tiny.device) == ("float32", "auto", "cpu")
    assert tiny.nbytes >= 4 * expected
    assert tiny.threads == llama_ext.get_num_threads()
    for part in ("2 layers", f"{expected:,}", "float32", tiny.isa):
        assert part in repr(tiny)


@requires_shared
def test_tied_weights_count_once(stories: Model) -> None:
    assert stories.num_parameters() == 260_032


def test_the_kv_cache_follows_the_weights_unless_it_is_said(tiny: Model) -> None:
    def chosen(**options: Any) -> str:
        return Model(tiny.config, **options).kv_dtype

    assert chosen() == "float32"
    assert chosen(dtype="bfloat16") == "bfloat16"
    assert chosen(dtype="bfloat16", compute="exact") == "float32"
    assert chosen(dtype="bfloat16", kv_dtype="float32") == "float32"
    assert chosen(kv_dtype="bfloat16") == "bfloat16"
    for other in ("float16", "x"):
        with pytest.raises(llama_ext.DTypeError, match=f"must be float32, bfloat16 or int8, got '{other}'"):
            tiny.session(kv_dtype=other)  # type: ignore[arg-type]


# Logits.


def test_a_row_does_not_depend_on_its_batch_or_its_padding(tiny: Model, rng: np.random.Generator) -> None:
    lengths = [11, 1, 7, 11, 4]
    rows = [rng.integers(0, 67, length) for length in lengths]
    alone = [tiny(row[None])[0] for row in rows]
    for left in (True, False):
        ids = np.full((5, 11), 10**6)  # padding may hold anything
        mask = np.zeros((5, 11), dtype=np.int64)
        for line, ones, row in zip(ids, mask, rows, strict=True):
            place = slice(11 - row.size, 11) if left else slice(0, row.size)
            line[place], ones[place] = row, 1
        logits = tiny(ids, attention_mask=mask)
        assert logits.shape == (5, 11, 67)
        for found, ones, expected in zip(logits, mask.astype(bool), alone, strict=True):
            np.testing.assert_array_equal(found[ones], expected)
            np.testing.assert_array_equal(found[~ones], np.zeros((11 - expected.shape[0], 67)))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_ids_of_any_integer_type_are_taken(dtype: Any, tiny: Model) -> None:
    ids = np.array([[1, 2, 66], [3, 4, 0]])
    np.testing.assert_array_equal(tiny(ids.astype(dtype)), tiny(ids.tolist()))
    np.testing.assert_array_equal(tiny(np.asfortranarray(ids.astype(dtype))), tiny(ids))


def test_an_empty_batch_gives_empty_logits(tiny: Model) -> None:
    assert tiny(np.zeros((0, 5), dtype=np.int64)).shape == (0, 5, 67)
    assert tiny(np.zeros((3, 0), dtype=np.int64)).shape == (3, 0, 67)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[1, 67]], llama_ext.TokenIdError, r"input_ids\[0, 1\] is 67.*\[0, 67\)"),
        ([[1, 2], [-1, 2]], llama_ext.TokenIdError, r"input_ids\[1, 0\] is -1"),
        (np.array([[2**63]], dtype=np.uint64), llama_ext.TokenIdError, "9223372036854775808"),
        ([1, 2, 3], llama_ext.ShapeError, r"input_ids\[None\]"),
        (np.zeros((1, 2, 3), dtype=int), llama_ext.ShapeError, "(B, T)"),
        ([[1, 2], [3]], llama_ext.ShapeError, "pad"),
        ([[1.0, 2.0]], llama_ext.DTypeError, "float64"),
        ([[True]], llama_ext.DTypeError, "bool"),
        ("text", llama_ext.DTypeError, "encode it"),
        (np.zeros((1, 49), dtype=int), llama_ext.ContextLengthError, "49 tokens.*48"),
    ],
)
def test_wrong_ids_are_a_typed_error(ids: Any, error: type[Exception], message: str, tiny: Model) -> None:
    with pytest.raises(error, match=message.replace("(B, T)", r"\(B, T\)")):
        tiny(ids)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([[1, 0, 1], [1, 1, 1]], llama_ext.OptionError, r"attention_mask\[0\] has gaps"),
        ([[1, 1, 1], [0, 0, 0]], llama_ext.OptionError, r"attention_mask\[1\] has no token"),
        ([[1, 1, 2], [1, 1, 1]], llama_ext.OptionError, "zeros and ones"),
        ([[1, 1, 1]], llama_ext.ShapeError, "shape of input_ids"),
    ],
)
def test_a_mask_is_one_run_of_ones_a_row(mask: Any, error: type[Exception], message: str, tiny: Model) -> None:
    with pytest.raises(error, match=message):
        tiny([[1, 2, 3], [4, 5, 6]], attention_mask=mask)


def test_a_run_in_the_middle_is_taken_as_well(tiny: Model) -> None:
    logits = tiny([[9, 1, 2, 9]], attention_mask=[[0, 1, 1, 0]])
    np.testing.assert_array_equal(logits[0, 1:3], tiny([[1, 2]])[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_logits_do_not_depend_on_the_number_of_threads(threads: int, tiny: Model) -> None:
    ids = np.arange(40)[None]
    np.testing.assert_array_equal(Model(tiny.config, seed=3, threads=threads)(ids), tiny(ids))


def test_a_model_says_what_to_do_instead_of_pickling_it() -> None:
    model = llama_ext.LlamaForCausalLM.from_pretrained("demo")
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"cannot be pickled or copied\. Give another process the path"):
            copied(model)


@pytest.mark.parametrize("kind", [llama_ext.LlamaForCausalLM, llama_ext.LlamaForSequenceClassification])
def test_an_option_of_another_library_is_refused_with_our_name_for_it(kind: Any) -> None:
    for given, meant in (("torch_dtype", "dtype"), ("device_map", "device"), ("thread", "threads")):
        with pytest.raises(llama_ext.OptionError, match=rf"^unknown option '{given}'; did you mean {meant}\?$"):
            kind.from_pretrained("demo", **{given: "float32"})
