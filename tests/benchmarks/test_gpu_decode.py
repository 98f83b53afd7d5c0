"""Decoding under several settings is compared rightly. Nothing is timed here."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from benchmarks import gpu_decode, gpu_shapes
from devices import requires_cuda


def of(speed: float, digest: str = "same") -> dict[str, Any]:
    return {"1b int4": {"speed": speed, "share": speed / 1000, "digest": digest}}


def test_settings_are_names_and_values() -> None:
    assert gpu_decode.read_settings("A=1,B=") == {"A": "1", "B": ""}
    assert gpu_decode.read_settings("") == {}, "as the environment is"
    for wrong in ("A", "=1", "A=1,B"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected NAME=VALUE"):
            gpu_decode.read_settings(wrong)


def test_a_cell_is_the_median_of_all_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_decode.report({"ONE_ROW=0": [of(500), of(600), of(100)], "ONE_ROW=1": [of(700), of(900), of(800)]}) == 0
    said = capsys.readouterr().out
    assert "ONE_ROW=0  500.0 (50%)" in said
    assert "ONE_ROW=1  800.0 (80%)" in said


def test_other_tokens_are_told_and_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_decode.report({"ONE_ROW=0": [of(500), of(500)], "ONE_ROW=1": [of(500), of(500, "other")]}) == 1
    assert "not the same tokens everywhere, or not the same log probabilities: 1b int4" in capsys.readouterr().out


def test_a_kind_of_weights_that_no_shape_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_decode.main(["--shapes", "8b", "--weights", "int8"])
    assert "8b: none has weights int8" in capsys.readouterr().err


@requires_cuda
@pytest.mark.gpu
def test_each_setting_decodes_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["LLAMA_EXT_CUDA_ONE_ROW=0", "", "LLAMA_EXT_CUDA_ONE_ROW=1,LLAMA_EXT_CUDA_OVERLAP=0"]
    options = ["--shapes", "tiny", "--weights", "bfloat16", "--tokens", "2", "--rounds", "1"]
    assert gpu_decode.main([*options, "--settings", *settings]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if "tiny bfloat16" in line)
    assert [line.strip().split("  ")[0] for line in lines[header + 1 :]] == [
        "ONE_ROW=0",
        "as it is",
        "ONE_ROW=1 OVERLAP=0",
    ]


@requires_cuda
@pytest.mark.gpu
def test_a_library_that_cannot_be_opened_ends_the_measurement_with_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gpu_decode.main(["--shapes", "tiny", "--libraries", "not-there.so", "--rounds", "1"]) == 1
    assert "not-there.so" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["1b", "8b"])
@pytest.mark.parametrize(("weights", "bits"), [("bfloat16", (16, 16)), ("int4", (4.125, 8.125))])
def test_a_token_reads_all_weights_but_an_embedding_that_is_looked_up(
    name: str, weights: str, bits: tuple[float, float]
) -> None:
    class Kept:
        def types(self) -> dict[str, tuple[str, int]]:
            return {"embedding": ("int8", 128) if weights == "int4" else (weights, 0)}

    shape = gpu_shapes.SHAPES[name]
    of_blocks, table = (bits[0] / 8 * gpu_shapes.blocks(shape), bits[1] / 8 * shape.vocabulary * shape.width)
    model = Kept()
    model.nbytes = of_blocks + table * (1 if shape.tied else 2)  # type: ignore[attr-defined]
    assert gpu_shapes.bytes_read(model, shape) == pytest.approx(of_blocks + table)  # type: ignore[arg-type]
