"""OpenVINO GenAI's LLMPipeline on the CPU, with its own choices. It remembers prompts, so each begins with another token."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.file_bytes import openvino_decode_bytes
from benchmarks.streaming import TokenStream


class OpenVinoGenai:
    """See measure.Engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        import openvino
        import openvino_genai

        self._openvino, self._library = openvino, openvino_genai
        self._pipeline = openvino_genai.LLMPipeline(str(options.openvino), "CPU", INFERENCE_NUM_THREADS=options.threads)
        self._config = openvino_genai.GenerationConfig()
        self._config.max_new_tokens = options.tokens + 1
        self._config.ignore_eos = True
        self._config.do_sample = False
        self._decode_bytes = openvino_decode_bytes(options.openvino / "openvino_model.xml")
        self._stream: TokenStream | None = None
        self._vocabulary = options.vocabulary
        self._prompts = 0

    def reset(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def prefill(self, ids: list[int]) -> None:
        first = (ids[0] + self._prompts) % self._vocabulary
        self._prompts += 1
        prompt = self._openvino.Tensor(np.array([[first, *ids[1:]]], dtype=np.int64))
        running, stop = self._library.StreamingStatus.RUNNING, self._library.StreamingStatus.STOP

        class Streamer(self._library.StreamerBase):  # type: ignore[name-defined, misc]
            def __init__(self, tell: Callable[[], bool]) -> None:
                super().__init__()
                self._tell = tell

            def write(self, token: int | list[int]) -> Any:
                """One token, or several at once where it guesses: they count one by one."""
                go_on = True
                for _ in [token] if isinstance(token, int) else token:
                    go_on = self._tell()
                return running if go_on else stop

            def end(self) -> None:
                """Nothing is kept back."""

        self._stream = TokenStream(lambda tell: self._pipeline.generate(prompt, self._config, Streamer(tell)))
        self._stream.wait(1)

    def decode(self, tokens: int) -> int:
        assert self._stream is not None
        return self._stream.wait(tokens)

    def facts(self) -> dict[str, Any]:
        self.reset()
        return {"version": self._library.__version__, "decode_bytes": self._decode_bytes}


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--openvino", type=Path, required=True)


if __name__ == "__main__":
    measure.run(_add_options, OpenVinoGenai)
