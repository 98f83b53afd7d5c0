"""Makes a checkpoint's files for other engines, in an interpreter that has their packages; see benchmarks.prepare_peers.

Example:
    python -m benchmarks.peers.make gguf MODEL out.gguf --type bf16
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measure import RESULT
from benchmarks.random_tokenizer import SPECIAL

__all__ = ["KINDS", "main", "write_gguf"]

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

Bits = npt.NDArray[np.uint16]


# ---------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(model: Path, out: Path, kind: str) -> None:
    """A GGUF file with the package `gguf`.

    Args:
        model: A directory as benchmarks.random_model and benchmarks.random_tokenizer write it: one file of bfloat16.
        out: The file.
        kind: "f32" or "bf16", of the matrices; norms are float32.
    """
    import gguf

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name(model.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if kind == "f32" else gguf.LlamaFileType.MOSTLY_BF16)
    _add_vocabulary(writer, model)

    tensors = _tensors(model)
    for name, values in tensors.items():
        is_float32 = kind == "f32" or values.ndim == 1
        raw = gguf.GGMLQuantizationType.F32 if is_float32 else gguf.GGMLQuantizationType.BF16
        item = 4 if is_float32 else 2
        writer.add_tensor_info(_gguf_name(name), values.shape, np.dtype(np.float32), item * values.size, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, values in tensors.items():  # one at a time in memory
        bits = values
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if projection in name:
                bits = _interleaved(values, config[heads])
        writer.write_tensor_data(_widened(bits) if kind == "f32" or bits.ndim == 1 else np.ascontiguousarray(bits))
    writer.close()


def _add_vocabulary(writer: Any, model: Path) -> None:
    """As a SentencePiece vocabulary: the earlier a merge, the higher its score."""
    import gguf

    vocabulary = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = gguf.TokenType
    special = {SPECIAL[0]: types.UNKNOWN, SPECIAL[1]: types.CONTROL, SPECIAL[2]: types.CONTROL}
    kinds = [special.get(token, types.BYTE if token.startswith("<0x") else types.NORMAL) for token in tokens]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(model: Path) -> dict[str, Bits]:
    """The bits of the checkpoint's tensors, mapped."""
    path = model / "model.safetensors"
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = data[begin:end].view(np.uint16).reshape(entry["shape"])
    return tensors


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _GGUF_TOP_NAMES:
        return f"{_GGUF_TOP_NAMES[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[rest]}.weight"


def _interleaved(rows: Bits, heads: int) -> Bits:
    """GGUF rotates neighbours where Hugging Face rotates halves, so a head's rows go half by half in turns."""
    count, columns = rows.shape
    return rows.reshape(heads, 2, count // heads // 2, columns).swapaxes(1, 2).reshape(rows.shape)


def _widened(bits: Bits) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def quantize_gguf(source: Path, out: Path, kind: str) -> None:
    """A quantised GGUF file from one of float32 or bfloat16, by llama.cpp."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    parameters.nthread = len(os.sched_getaffinity(0))
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(parameters))
    if code:
        raise RuntimeError(f"llama_model_quantize to {kind} returned {code}")


# --------------------------------------------------------------------------------------------------- directories


def convert_ctranslate2(model: Path, out: Path, kind: str) -> None:
    """A directory of CTranslate2, of type "int8_float32" (floats where it does not quantise) or another that it knows."""
    import torch  # the converter needs both, and would only say so late
    import transformers
    from ctranslate2.converters import TransformersConverter

    del torch, transformers
    TransformersConverter(str(model), low_cpu_mem_usage=True).convert(str(out), quantization=kind)


def export_openvino(model: Path, out: Path, kind: str) -> None:
    """A directory of OpenVINO's IR by optimum-intel: "int8", "int4" (groups of 32) or "fp32"."""
    importlib.import_module("optimum.intel")
    command = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(model)]
    command += ["--task", "text-generation-with-past", "--weight-format", kind]
    if kind == "int4":
        command += ["--group-size", "32", "--ratio", "1.0"]
    _python([*command, str(out)])


def build_genai(model: Path, out: Path, kind: str) -> None:
    """A directory of onnxruntime-genai by its builder: "int4" or "int8" (blocks of 32, int8 activations) or "fp32"."""
    importlib.import_module("onnxruntime_genai")
    importlib.import_module("onnx_ir")
    cache = out.with_name(f"{out.name}.cache")
    command = ["-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out)]
    _python([*command, "-p", kind, "-e", "cpu", "-c", str(cache)])


def _python(arguments: Sequence[str]) -> None:
    """Another program of this interpreter's packages.

    Raises:
        RuntimeError: It failed; the message is the end of what it said.
    """
    environment = dict(os.environ, HF_HUB_OFFLINE="1")
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.stderr.write(result.stderr[-4000:])
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        raise RuntimeError(f"{arguments[1]} failed ({result.returncode}): {lines[-1] if lines else 'it said nothing'}")


KINDS: dict[str, Callable[[Path, Path, str], None]] = {
    "gguf": write_gguf,
    "quantize_gguf": quantize_gguf,
    "ctranslate2": convert_ctranslate2,
    "openvino": export_openvino,
    "genai": build_genai,
}


def main() -> None:
    """The command: makes one file or directory, and prints a line with what went wrong, if anything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.make")
    parser.add_argument("kind", choices=tuple(KINDS))
    parser.add_argument("source", type=Path, help="the checkpoint; of quantize_gguf a GGUF file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", required=True, help="of the weights")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    try:
        KINDS[options.kind](options.source, options.out, options.type)
    except ModuleNotFoundError as error:
        result = {"error": f"not installed: {error.name}"}
    except Exception as error:  # a reason for the table: the other steps still run
        traceback.print_exc(file=sys.stderr)
        result = {"error": f"failed: {type(error).__name__}: {str(error)[:300]}"}
    print(RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
