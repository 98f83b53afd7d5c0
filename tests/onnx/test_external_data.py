"""Data files: alignment, several files, whole or absent, memory of one chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_ext.errors import OptionError, ShapeError

onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")

from llama_ext.onnx.external_data import ExternalTensor, place, reference, write  # noqa: E402


def tensor(name: str, values: Any) -> ExternalTensor:
    return ExternalTensor(name, onnx.TensorProto.FLOAT, values.shape, lambda: [values[:1], values[1:]])


def saved(folder: Path, tensors: list[ExternalTensor], most: int | None = None) -> Any:
    """The tensors as onnx itself reads them."""
    placements = place(tensors, "m.onnx_data", most)
    write(folder, tensors, placements, lambda _: None)
    references = [reference(*pair) for pair in zip(tensors, placements, strict=True)]
    graph = onnx.helper.make_graph([], "g", [], [], references)
    onnx.save(onnx.helper.make_model(graph), str(folder / "m.onnx"))
    loaded = onnx.load(str(folder / "m.onnx"))
    return {each.name: onnx.numpy_helper.to_array(each) for each in loaded.graph.initializer}, placements


def test_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {
        f"t{i}": rng.standard_normal(shape, np.float32) for i, shape in enumerate([(3,), (700, 400), (5, 7), (1,)])
    }
    loaded, placements = saved(tmp_path, [tensor(name, each) for name, each in values.items()])
    for name, each in values.items():
        assert np.array_equal(loaded[name], each)
    assert [placement.offset % 64 for placement in placements] == [0] * 4
    assert placements[1].offset % 65536 == 0  # large enough to be mapped
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx_data"]


def test_files_are_no_larger_than_asked_for(tmp_path: Path) -> None:
    values = {f"t{i}": np.full((100,), i, np.float32) for i in range(7)}
    loaded, _ = saved(tmp_path, [tensor(name, each) for name, each in values.items()], most=1000)
    names = sorted(path.name for path in tmp_path.glob("*_data*"))
    assert names == ["m.onnx_data", "m.onnx_data_1", "m.onnx_data_2", "m.onnx_data_3"]
    assert max(path.stat().st_size for path in tmp_path.glob("*_data*")) <= 1000
    for name, each in values.items():
        assert np.array_equal(loaded[name], each)
    with pytest.raises(OptionError, match="t0 alone has 400 bytes"):
        place([tensor("t0", values["t0"])], "m", 399)


def test_a_source_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx_data").write_bytes(b"old")
    short = ExternalTensor("short", onnx.TensorProto.FLOAT, (4,), lambda: [np.zeros(3, np.float32)])
    long = ExternalTensor("long", onnx.TensorProto.FLOAT, (2,), lambda: [np.zeros(3, np.float32)])
    for each, found in ((short, "yields 12"), (long, "yields more")):
        with pytest.raises(ShapeError, match=found):
            write(tmp_path, [each], place([each], "m.onnx_data"), lambda _: None)
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.onnx_data", b"old")]


def test_four_bit_tensors_are_rounded_up_to_bytes() -> None:
    assert ExternalTensor("odd", onnx.TensorProto.INT4, (3, 3), list).nbytes == 5
    assert ExternalTensor("even", onnx.TensorProto.INT4, (4, 2), list).nbytes == 4
