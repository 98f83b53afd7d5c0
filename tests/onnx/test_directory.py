"""The files beside a graph, and what is refused before any is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from llama_ext.errors import CheckpointError, FormatError, NumericError, OptionError, UnsupportedError
from onnx_runs import Run, each_profile, onnx, read_json
from shared_data import SHARED, requires_shared

from llama_ext.onnx.exporting import export  # isort: skip
from llama_ext.onnx.metadata import get_metadata, set_report_hash  # isort: skip

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eot_id|>{% endfor %}"


def config(**changes: Any) -> llama_ext.LlamaConfig:
    return llama_ext.LlamaConfig(
        **{
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            **changes,
        }
    )


def chat_tokenizer() -> llama_ext.Tokenizer:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[]))
    backend.add_special_tokens(["<s>", "</s>", "<|eot_id|>"])  # 26, 27, 28
    return llama_ext.Tokenizer.from_tokenizers(
        backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE, model_max_length=64
    )


def test_everything_the_runtimes_need_is_there(tmp_path: Path) -> None:
    """Failures elsewhere: no tokenizer, no template, no end of turn, a list of padding tokens."""
    model = llama_ext.LlamaForCausalLM(config(bos_token_id=26, eos_token_id=27), chat_tokenizer(), seed=1)
    export(model, tmp_path, verify=False)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "config.json",
        "generation_config.json",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "onnx/model.onnx",
        "onnx/model.onnx_data",
    }
    assert read_json(tmp_path / "tokenizer_config.json")["chat_template"] == TEMPLATE
    # Else transformers' tokenizer gives token_type_ids, which optimum's generate refuses.
    assert read_json(tmp_path / "tokenizer_config.json")["model_input_names"] == ["input_ids", "attention_mask"]
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    genai = read_json(tmp_path / "genai_config.json")
    assert genai["model"]["type"] == "llama"
    assert genai["model"]["eos_token_id"] == [27, 28]
    assert genai["model"]["pad_token_id"] == 27
    assert genai["model"]["bos_token_id"] == 26
    assert genai["model"]["decoder"]["filename"] == "onnx/model.onnx"
    assert genai["model"]["decoder"]["head_size"] == 16
    assert read_json(tmp_path / "generation_config.json")["eos_token_id"] == [27, 28]
    written = read_json(tmp_path / "config.json")
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["transformers.js_config"] == {"use_external_data_format": {"model.onnx": 1}}
    again = llama_ext.Tokenizer.from_pretrained(tmp_path)
    assert again.encode("abc<|eot_id|>") == chat_tokenizer().encode("abc<|eot_id|>")


@each_profile
def test_only_group_query_attention_shares_its_cache(profile: str, tmp_path: Path) -> None:
    """Failure elsewhere: Attention with a shared buffer fails at run time."""
    export(llama_ext.LlamaForCausalLM(config(), seed=1), tmp_path, profile=profile, verify=False)
    assert read_json(tmp_path / "genai_config.json")["search"]["past_present_share_buffer"] == (profile == "ort")


def test_large_files_are_split_and_named_for_browsers(tmp_path: Path) -> None:
    model = llama_ext.LlamaForCausalLM(config(), seed=1)
    whole = export(model, tmp_path / "whole", verify=False)
    parts = export(model, tmp_path / "parts", verify=False, max_file_bytes=20000)
    assert len(whole.data) == 1
    assert [path.name for path in parts.data[:3]] == ["model.onnx_data", "model.onnx_data_1", "model.onnx_data_2"]
    said = read_json(tmp_path / "parts" / "config.json")["transformers.js_config"]["use_external_data_format"]
    assert said == {"model.onnx": len(parts.data)}
    assert np.array_equal(Run(whole.graph)([[1, 2, 3]])[0], Run(parts.graph)([[1, 2, 3]])[0])
    # Fewer files replace all of them.
    export(model, tmp_path / "parts", verify=False, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "parts" / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]


def test_a_head_dimension_that_optimum_gets_wrong_is_told(tmp_path: Path) -> None:
    model = llama_ext.LlamaForCausalLM(config(head_dim=8), seed=1)
    with pytest.warns(UserWarning, match=r"hidden_size / num_attention_heads, 16; this model's is 8"):
        export(model, tmp_path, verify=False)


def test_an_earlier_export_or_another_model_is_not_written_over(tmp_path: Path) -> None:
    model = llama_ext.LlamaForCausalLM(config(), seed=1)
    other = llama_ext.LlamaForCausalLM(config(intermediate_size=64), seed=1)
    export(model, tmp_path, verify=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OptionError, match=r"model\.onnx exists.*overwrite=True"):
        export(model, tmp_path, verify=False)
    with pytest.raises(OptionError, match="is of another model"):
        export(other, tmp_path, dtype="int8", verify=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    export(model, tmp_path, dtype="int4", verify=False)
    export(other, tmp_path, verify=False, overwrite=True)
    assert read_json(tmp_path / "config.json")["intermediate_size"] == 64
    # What was left of the first model would not fit its config any more.
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]


def test_the_models_own_directory_is_not_written_into(tmp_path: Path) -> None:
    llama_ext.LlamaForCausalLM(config(), seed=1).save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="the directory of the model itself"):
        export(tmp_path, tmp_path, verify=False, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="is a file"):
        export(tmp_path, tmp_path / "file", verify=False)


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    model = llama_ext.LlamaForCausalLM(config(), seed=1)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"profile": "fast"}, "profile must be one of portable, standard, ort, got 'fast'"),
        ({"dtype": "int3"}, "dtype must be one of"),
        ({"profile": "ort", "dtype": "float16"}, "'float16'; profiles with that dtype: portable, standard"),
        ({"profile": "portable", "dtype": "bfloat16"}, "'bfloat16'; profiles with that dtype: standard"),
        ({"dtype": "float32", "group_size": 32}, "group_size belongs to dtype='int8' or 'int4'"),
        ({"dtype": "int8", "group_size": 48}, "group_size must be one of 128, 64, 32"),
        ({"max_file_bytes": 0}, "max_file_bytes must be a whole number >= 1"),
    ]
    for options, message in refused:
        with pytest.raises(OptionError, match=message):
            export(model, tmp_path / "out", verify=False, **options)
    with pytest.raises(
        OptionError, match="takes a LlamaForCausalLM, a LlamaForSequenceClassification or a path, got int"
    ):
        export(3, tmp_path / "out", verify=False)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_weights_beyond_the_range_of_float16_are_refused(tmp_path: Path) -> None:
    """Failure elsewhere: an export full of infinities. Nothing that opens is left behind."""
    model = llama_ext.LlamaForCausalLM(config(), seed=1)
    values = model._core.read("layers.1.down")
    values[3, 4] = 1e6
    model._core.load("layers.1.down", values, "float32")
    with pytest.raises(NumericError, match="too large for float16"):
        export(model, tmp_path, dtype="float16", verify=False)
    assert not list(tmp_path.rglob("*.onnx*"))


def test_a_head_that_only_claims_to_be_tied_is_refused(tmp_path: Path) -> None:
    llama_ext.LlamaForCausalLM(config(), seed=1).save_pretrained(tmp_path / "model")
    values = read_json(tmp_path / "model" / "config.json")
    values["tie_word_embeddings"] = True
    (tmp_path / "model" / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        export(tmp_path / "model", tmp_path / "out", verify=False)


@requires_shared
def test_a_damaged_classifier_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "classifier"
    shutil.copytree(SHARED / "golden" / "classifier", source)
    config_json = read_json(source / "config.json")
    config_json["id2label"]["3"] = "LABEL_3"
    (source / "config.json").write_text(json.dumps(config_json), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"score\.weight must have shape \(4, 64\).*got \(3, 64\)"):
        export(source, tmp_path / "out", verify=False)
    del config_json["id2label"], config_json["label2id"]
    (source / "config.json").write_text(json.dumps(config_json), encoding="utf-8")
    # Without names there are two labels, in transformers, too.
    with pytest.raises(CheckpointError, match=r"score\.weight must have shape \(2, 64\).*got \(3, 64\)"):
        export(source, tmp_path / "out", verify=False)


def test_a_kill_while_weights_are_written_leaves_nothing_that_opens(tmp_path: Path) -> None:
    model = llama_ext.LlamaForCausalLM(config(), seed=1)
    export(model, tmp_path, verify=False)

    def stop(done: int, total: int) -> None:
        assert 0 < done <= total
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path, verify=False, overwrite=True, progress=stop)
    assert not list((tmp_path / "onnx").iterdir())


def test_the_graph_says_what_it_is_and_takes_the_hash_of_its_report(tmp_path: Path) -> None:
    model = llama_ext.LlamaForCausalLM(config(), seed=1)
    result = export(model, tmp_path, profile="portable", dtype="int8", verify=False)
    known = {"llama_ext.version": llama_ext.__version__, "llama_ext.profile": "portable", "llama_ext.dtype": "int8"}
    assert get_metadata(result.graph) == known
    data = result.data[0].read_bytes()
    for digest in ("ab" * 32, "cd" * 32):
        set_report_hash(result.graph, digest)
        assert get_metadata(result.graph) == {**known, "llama_ext.report_sha256": digest}
    assert result.data[0].read_bytes() == data
    onnx.checker.check_model(str(result.graph), full_check=True)
    Run(result.graph)([[1, 2]])
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xfe\xfd")
    for path in (tmp_path / "bad.onnx", tmp_path / "none.onnx"):
        with pytest.raises(FormatError):
            get_metadata(path)


def test_without_the_packages_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from llama_ext.onnx.requirements import require

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'llama_ext\[onnx\]'"):
        require("onnx")
    monkeypatch.delitem(vars(llama_ext.onnx), "export", raising=False)
    with pytest.raises(UnsupportedError, match=r"pip install 'llama_ext\[onnx\]'"):
        _ = llama_ext.onnx.export
