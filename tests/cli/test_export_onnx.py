"""`llama-ext export-onnx`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from command_line import Run
from shared_data import LETTERS

pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")


def test_a_model_is_exported_and_proven(run: Run, tmp_path: Path) -> None:
    code, out, err = run("export-onnx", "demo", tmp_path / "out", "--profile", "ort", "--dtype", "int8")
    assert (code, err) == (0, "")
    assert f"wrote {tmp_path / 'out' / 'onnx' / 'model_quantized.onnx'}: " in out
    assert "profile ort, int8" in out
    assert "not verified" not in out


def test_a_quick_export_says_that_nothing_was_proven(run: Run, tmp_path: Path) -> None:
    options = ("--dtype", "int4", "--group-size", 32, "--asymmetric", "--no-verify", "--max-file-bytes", 300000)
    code, out, err = run("export-onnx", LETTERS, tmp_path / "out", *options)
    assert (code, err) == (0, "")
    assert "not verified: it was not asked for\n" in out
    assert len(list((tmp_path / "out" / "onnx").glob("model_q4.onnx_data*"))) > 1
    again = run("export-onnx", LETTERS, tmp_path / "out", *options)
    assert again.code == 2
    assert "exists: name another directory, or say --overwrite" in again.err
    assert run("export-onnx", LETTERS, tmp_path / "out", *options, "--overwrite").code == 0


def test_bfloat16_says_why_it_is_not_proven(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("export-onnx", "demo", tmp_path / "out", "--dtype", "bfloat16")
    assert code == 0
    assert "not verified: onnxruntime has no bfloat16 kernels for CPUs" in out


def test_a_runtime_that_was_asked_for_and_is_not_installed_is_a_failure(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("export-onnx", "demo", tmp_path / "out", "--no-verify").code == 0
    assert run("verify-onnx", "demo", tmp_path / "out", "--steps", 2).code == 0
    monkeypatch.setitem(sys.modules, "openvino", None)
    code, out, _ = run("verify-onnx", "demo", tmp_path / "out", "--steps", 2, "--runtimes", "openvino")
    assert code == 1
    assert "not run: openvino, everything: not installed: pip install openvino" in out
    assert "FAILED: " in out


def test_an_empty_text_proves_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    assert run("export-onnx", "demo", tmp_path / "out", "--no-verify").code == 0
    code, out, err = run("verify-onnx", "demo", tmp_path / "out", "--text", tmp_path / "empty.txt")
    assert (code, out) == (2, "")
    assert f"--text {tmp_path / 'empty.txt'} is empty" in err


def test_an_output_that_cannot_be_a_directory_is_a_mistake_in_the_command(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in ("file", "file/x"):
        code, _, err = run("export-onnx", "demo", tmp_path / out)
        assert (code, "file is a file" in err) == (2, True), err


def test_messages_speak_of_the_options_of_the_command(run: Run, tmp_path: Path) -> None:
    code, _, err = run("export-onnx", "demo", tmp_path / "out", "--dtype", "int4")  # it is int8
    assert code == 2
    assert "export it as int8 with the groups that it has" in err
    assert run("export-onnx", LETTERS, tmp_path / "out", "--dtype", "int4", "--no-verify").code == 0
    code, _, other = run("verify-onnx", "demo", tmp_path / "out")
    assert code == 2
    assert "exported from another model" in other
    float32 = ("export-onnx", LETTERS, tmp_path / "x", "--dtype", "float32")
    assert "--asymmetric belongs to --dtype 'int8'" in run(*float32, "--asymmetric").err
    assert "--group-size belongs to --dtype 'int8'" in run(*float32, "--group-size", 32).err
    assert "--max-file-bytes must be" in run(*float32, "--max-file-bytes", 0).err
    assert "--steps must be" in run("verify-onnx", LETTERS, tmp_path / "out", "--steps", 0).err
    standard_input = ("--text", "-", "--text", "-")
    assert "can be read once" in run("verify-onnx", LETTERS, tmp_path / "out", *standard_input).err
    for message in (err, other):
        assert not re.search(r"\w=|group_size|symmetric|quantised as int8 already.*verify", message)


def test_a_report_that_cannot_be_written_is_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    # There is no graph: that would be said next.
    code, out, err = run("verify-onnx", "demo", tmp_path / "out", "--json", tmp_path / "nodir" / "x.json")
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'nodir' / 'x.json'}: the directory {tmp_path / 'nodir'} does not exist: create it first" in err


def test_a_report_replaces_a_file_only_when_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    assert run("export-onnx", "demo", tmp_path / "out", "--no-verify").code == 0
    line = ("verify-onnx", "demo", tmp_path / "out", "--steps", 2, "--json", notes)
    code, out, err = run(*line)
    assert (code, out) == (2, "")
    assert f"{notes} exists: name another file, or say --overwrite" in err
    assert notes.read_text() == "mine"
    assert run(*line, "--overwrite").code == 0
    assert json.loads(notes.read_text())["passed"] is True


def test_ctrl_c_while_it_proves_says_what_is_there(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    line = ("export-onnx", "demo", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("llama_ext.onnx.verification.verify", interrupt)
        for more in ((), ("--overwrite",)):
            code, out, err = run(*line, *more)
            assert (code, out) == (130, "")
            (graph,) = (tmp_path / "out" / "onnx").glob("*.onnx")
            assert err == (
                f"llama-ext: interrupted: {graph} is written and not verified: `llama-ext verify-onnx` does that\n"
            )
    assert run("verify-onnx", "demo", tmp_path / "out", "--steps", 2).code == 0
    # Nothing of this run is there.
    monkeypatch.setattr("llama_ext.onnx.exporting.write_model", interrupt)
    assert run(*line, "--dtype", "float16") == (130, "", "")


def test_mistakes_have_their_exit_codes(run: Run, tmp_path: Path) -> None:
    assert run("export-onnx", LETTERS, tmp_path, "--dtype", "float16", "--profile", "ort").code == 2
    assert run("export-onnx", "demo", tmp_path, "--profile", "fast").code == 2
    assert run("export-onnx", tmp_path / "nothing", tmp_path / "out").code == 3
    assert run("export-onnx", "demo").code == 2
    assert "llama-ext export-onnx llama-q4_k_m.gguf" in run("export-onnx", "--help").out
