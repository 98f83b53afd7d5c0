"""The weights that one token reads of a model in another engine's format: sizes of stored tensors, nothing is loaded.

All of them, less the embedding where the head is another tensor: of that one row is read. Files are trusted: they are the
caller's own. Standard library only, because peers run in environments of their own.
"""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import BinaryIO

__all__ = ["ctranslate2_decode_bytes", "gguf_decode_bytes", "openvino_decode_bytes"]


# ---------------------------------------------------------------------------------------------------------- GGUF

_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type
_DEFAULT_ALIGNMENT = 32


def gguf_decode_bytes(path: Path) -> int:
    """Of a GGUF file.

    A tensor's size is the distance to the next one, which needs no table of block formats and counts at most
    the alignment too much.

    Raises:
        ValueError: Not a little-endian GGUF file of version 2 or later.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF" or _number(file, "<I") not in (2, 3):
            raise ValueError(f"{path.name}: not a GGUF file of version 2 or 3")
        tensors, entries = _number(file, "<Q"), _number(file, "<Q")
        alignment = _DEFAULT_ALIGNMENT
        for _ in range(entries):
            key = _string(file)
            kind = _number(file, "<I")
            if key == b"general.alignment":
                alignment = _number(file, "<I")
            else:
                _skip(file, kind)
        offsets = {}
        for _ in range(tensors):
            name = _string(file)
            file.seek(8 * _number(file, "<I") + 4, 1)  # dimensions and type
            offsets[name] = _number(file, "<Q")
        data = -(-file.tell() // alignment) * alignment
    order = sorted(offsets, key=offsets.__getitem__)
    ends = [offsets[name] for name in order[1:]] + [path.stat().st_size - data]
    sizes = {name: end - offsets[name] for name, end in zip(order, ends, strict=True)}
    return sum(sizes.values()) - (sizes[b"token_embd.weight"] if b"output.weight" in sizes else 0)


def _number(file: BinaryIO, layout: str) -> int:
    return int(struct.unpack(layout, file.read(struct.calcsize(layout)))[0])


def _string(file: BinaryIO) -> bytes:
    return file.read(_number(file, "<Q"))


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == _GGUF_STRING:
        file.seek(_number(file, "<Q"), 1)
    elif kind == _GGUF_ARRAY:
        element, count = _number(file, "<I"), _number(file, "<Q")
        if element in _GGUF_SCALARS:
            file.seek(count * _GGUF_SCALARS[element], 1)
        else:
            for _ in range(count):
                _skip(file, element)
    else:
        file.seek(_GGUF_SCALARS[kind], 1)


# --------------------------------------------------------------------------------------------------- CTranslate2

_CTRANSLATE2_VERSION = 6
_EMBEDDINGS = "decoder/embeddings/"


def ctranslate2_decode_bytes(path: Path) -> int:
    """Of a CTranslate2 directory's model.bin: its variables, the scales of int8 rows among them.

    Raises:
        ValueError: Not version 6 of that format.
    """
    with path.open("rb") as file:
        version = _number(file, "<I")
        if version != _CTRANSLATE2_VERSION:
            raise ValueError(f"{path.name}: not version {_CTRANSLATE2_VERSION} of CTranslate2's format, but {version}")
        _short_string(file)  # the specification and its revision
        _number(file, "<I")
        sizes = {}
        for _ in range(_number(file, "<I")):
            name = _short_string(file)
            file.seek(4 * _number(file, "<B") + 1, 1)  # dimensions and type
            sizes[name] = _number(file, "<I")
            file.seek(sizes[name], 1)
        aliases = {_short_string(file): _short_string(file) for _ in range(_number(file, "<I"))}
    is_tied = any(target.startswith(_EMBEDDINGS) for target in aliases.values())
    return sum(size for name, size in sizes.items() if is_tied or not name.startswith(_EMBEDDINGS))


def _short_string(file: BinaryIO) -> str:
    return file.read(_number(file, "<H")).rstrip(b"\0").decode()


# ------------------------------------------------------------------------------------------------------ OpenVINO

# What may lie between a stored weight and its product: decompression.
_DECOMPRESSION = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose")


def openvino_decode_bytes(path: Path) -> int:
    """Of an OpenVINO IR (openvino_model.xml): the constants of its matrix products, with their scales and zero points."""
    root = ElementTree.parse(path).getroot()
    layers = {layer.attrib["id"]: layer for layer in root.iterfind("layers/layer")}
    inputs: dict[str, list[str]] = {}
    for edge in root.iterfind("edges/edge"):
        inputs.setdefault(edge.attrib["to-layer"], []).append(edge.attrib["from-layer"])
    constants: dict[str, int] = {}

    def stored(index: str) -> dict[str, int] | None:
        """The constants behind a layer, or None where something else is behind it, too."""
        kind = layers[index].attrib["type"]
        if kind == "Const":
            data = layers[index].find("data")
            return {index: int(data.attrib["size"])} if data is not None else None
        if kind not in _DECOMPRESSION:
            return None
        found: dict[str, int] = {}
        for source in inputs.get(index, []):
            part = stored(source)
            if part is None:
                return None
            found.update(part)
        return found

    for index, layer in layers.items():
        if layer.attrib["type"] == "MatMul":
            for source in inputs.get(index, []):
                constants.update(stored(source) or {})
    return sum(constants.values())
