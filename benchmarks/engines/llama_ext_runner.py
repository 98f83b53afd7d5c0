"""llama_ext: prefill through `Session.append`, decode through `Generation`, which has no Python between tokens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure


class LlamaExt:
    """See measure.Engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        import llama_ext
        from llama_ext import _core

        self._core = _core
        self._info = llama_ext.info()
        self._model = llama_ext.LlamaForCausalLM.from_pretrained(
            options.model,
            dtype=options.dtype,
            compute=options.compute,
            threads=options.threads,
            group_size=options.group_size,
        )
        self._capacity = options.prompt + options.tokens + 8
        self.reset()

    def reset(self) -> None:
        self._session = self._core.Session(self._model._core, self._capacity, self._model.kv_dtype)

    def prefill(self, ids: list[int]) -> None:
        logits = self._session.append(np.array(ids, dtype=np.int32), "last")
        self._next = int(logits.argmax())

    def decode(self, tokens: int) -> int:
        # The first token is the one that prefill chose; running it makes the first of `tokens` new ones.
        generation = self._core.Generation(
            self._model._core,
            [np.array([self._next], dtype=np.int32)],
            sampling={},
            max_new_tokens=[tokens],
            eos=[],
            seed=0,
            kv_dtype=self._model.kv_dtype,
            session=self._session,
        )
        return len(generation.run(tokens))

    def _decode_bytes(self) -> int:
        """The weights read for one token: of an embedding that is not the head, too, one row is all."""
        core = self._model._core
        names = core.matrices()
        return sum(core.packed(name).nbytes for name in names if name != "embedding" or "head" not in names)

    def facts(self) -> dict[str, Any]:
        return {
            "version": self._info.version,
            "isa": self._model.isa,
            "kv_dtype": self._model.kv_dtype,
            "build": dict(self._info.build),
            "decode_bytes": self._decode_bytes(),
        }


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint or a GGUF file")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--compute", default="auto")
    parser.add_argument("--group-size", type=int, help="weights that share a scale, of int8 and int4")


if __name__ == "__main__":
    measure.run(_add_options, LlamaExt)
