"""The benchmark of a GPU runs, and counts rightly. Nothing is timed here."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import gpu, gpu_peers
from benchmarks.gpu_shapes import SHAPES, blocks, parameters, products
from devices import requires_cuda


def test_products_are_the_parameters_that_every_token_meets() -> None:
    for shape in SHAPES.values():
        assert shape.layers * sum(n * k for n, k in products(shape).values()) == blocks(shape)
    # Llama-3.2-1B has 1,235,814,400 parameters, 33 norms of 2,048 among them.
    assert parameters(SHAPES["1b"]) == 1_235_814_400 - 33 * 2048


def test_without_torch_there_is_nothing_beside() -> None:
    assert gpu_peers.compare(None, "cuda:0", SHAPES["tiny"], 9) == []
    assert gpu_peers.products_seconds(None, "cuda:0", SHAPES["tiny"], 9) == 0
    assert gpu_peers.torch_for("cuda:63") is None


def test_operations_are_compared_with_those_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    shape = SHAPES["tiny"]
    rows = gpu_peers.compare(torch, "cpu", shape, 9)
    names = [str(row[0]) for row in rows]
    assert names[0] == "qkv (9 x 128 x 64)"
    assert names[-1] == "attention of 9 tokens"
    assert len(rows) == 5
    assert all(float(str(row[3])) > 0 for row in rows)


def test_products_alone_are_all_that_a_prefill_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    shape = SHAPES["tiny"]
    made: list[tuple[int, ...]] = []
    linear = torch.nn.functional.linear

    def counted(x: Any, weight: Any) -> Any:
        made.append((x.shape[0], *weight.shape))
        return linear(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    assert gpu_peers.products_seconds(torch, "cpu", shape, 9) > 0
    once = [(9, n, k) for n, k in products(shape).values()] * shape.layers + [(1, shape.vocabulary, shape.width)]
    assert made == once * (1 + gpu_peers.CHAINS)


def test_transformers_is_timed_beside() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    prefill, decode = gpu_peers.transformers_speed(torch, "cpu", SHAPES["tiny"], 70, 2, compiles=False)
    assert float(str(prefill).replace(",", "")) > 0
    assert float(str(decode).replace(",", ""))


def test_nothing_is_both_alone_and_beside_its_peers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--alone", "--peers"])
    assert "not allowed with" in capsys.readouterr().err


@requires_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--alone"]], ids=str)
def test_the_table_has_a_row_for_each_kind_of_weights(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--shapes", "tiny", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if "prefill tok/s" in line)
    kinds = [line.split()[1] for line in lines[header + 1 : header + 5]]
    assert kinds == ["float32", "bfloat16", "int8", "int4"]
    assert any("beside nothing" in line or "each call waited for" in line for line in lines) != bool(options)
