"""CTranslate2, with the types that its directory was converted to."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.file_bytes import ctranslate2_decode_bytes
from benchmarks.streaming import TokenStream


class CTranslate2:
    """See measure.Engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        import ctranslate2

        self._version = ctranslate2.__version__
        self._generator = ctranslate2.Generator(
            str(options.ctranslate2),
            device="cpu",
            compute_type="default",
            inter_threads=1,
            intra_threads=options.threads,
        )
        # Prompts are given in pieces of text.
        vocabulary = options.ctranslate2 / "vocabulary.json"
        self._pieces = json.loads(vocabulary.read_text(encoding="utf-8"))
        self._decode_bytes = ctranslate2_decode_bytes(options.ctranslate2 / "model.bin")
        self._most = options.tokens + 1
        self._stream: TokenStream | None = None

    def reset(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def prefill(self, ids: list[int]) -> None:
        prompt = [self._pieces[token] for token in ids]

        def generate(tell: Callable[[], bool]) -> None:
            self._generator.generate_batch(
                [prompt],
                max_length=self._most,
                min_length=self._most,  # the end of a text may not come before
                include_prompt_in_result=False,  # the prompt runs at once
                sampling_topk=1,
                callback=lambda step: not tell(),
            )

        self._stream = TokenStream(generate)
        self._stream.wait(1)

    def decode(self, tokens: int) -> int:
        assert self._stream is not None
        return self._stream.wait(tokens)

    def facts(self) -> dict[str, Any]:
        self.reset()
        return {
            "version": self._version,
            "compute_type": self._generator.compute_type,
            "decode_bytes": self._decode_bytes,
        }


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ctranslate2", type=Path, required=True)


if __name__ == "__main__":
    measure.run(_add_options, CTranslate2)
