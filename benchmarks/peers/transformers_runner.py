"""transformers on torch, the model's own forward with its key/value cache."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import measure


class Transformers:
    """See measure.Engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        import transformers

        torch.set_num_threads(options.threads)
        torch.set_grad_enabled(False)
        self._torch = torch
        self._versions = {"version": transformers.__version__, "torch": torch.__version__}
        dtype = getattr(torch, options.dtype)
        # transformers 5 renamed the argument.
        name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        self._model = transformers.LlamaForCausalLM.from_pretrained(options.model, **{name: dtype}).eval()
        self._cache: Any = None

    def reset(self) -> None:
        self._cache = None

    def prefill(self, ids: list[int]) -> None:
        self._step(self._torch.tensor([ids]))

    def decode(self, tokens: int) -> int:
        for _ in range(tokens):
            self._step(self._next)
        return tokens

    def _step(self, ids: Any) -> None:
        with self._torch.inference_mode():
            output = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = output.past_key_values
            self._next = output.logits[:, -1:].argmax(-1)

    def facts(self) -> dict[str, Any]:
        return self._versions


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)


if __name__ == "__main__":
    measure.run(_add_options, Transformers)
