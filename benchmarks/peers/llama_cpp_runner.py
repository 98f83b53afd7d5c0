"""llama.cpp through llama-cpp-python, whose `eval` makes the logits of the last token of a batch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.file_bytes import gguf_decode_bytes


class LlamaCpp:
    """See measure.Engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._model = llama_cpp.Llama(
            str(options.gguf),
            n_ctx=-(-(options.prompt + options.tokens + 8) // 256) * 256,
            n_batch=options.prompt,
            n_ubatch=options.prompt,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            flash_attn=True,
            verbose=False,
        )
        self._decode_bytes = gguf_decode_bytes(options.gguf)

    def reset(self) -> None:
        self._model.reset()

    def prefill(self, ids: list[int]) -> None:
        self._model.eval(ids)

    def decode(self, tokens: int) -> int:
        vocabulary = self._model.n_vocab()
        for _ in range(tokens):
            logits = self._library.llama_get_logits_ith(self._model.ctx, -1)
            self._model.eval([int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())])
        return tokens

    def facts(self) -> dict[str, Any]:
        return {
            "version": self._library.__version__,
            "kv_dtype": "float16",
            "system": self._library.llama_print_system_info().decode().strip(),
            "decode_bytes": self._decode_bytes,
        }


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gguf", type=Path, required=True)


if __name__ == "__main__":
    measure.run(_add_options, LlamaCpp)
