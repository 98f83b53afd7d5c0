"""The files of a LlamaForSequenceClassification: a Llama without a head, and the scores of its labels."""

from __future__ import annotations

import os
from pathlib import Path

from llama_ext.errors import CheckpointError
from llama_ext.io.gguf import find_gguf
from llama_ext.io.hub import resolve
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.models.config import LlamaConfig
from llama_ext.runtime.float_files import FloatFiles
from llama_ext.runtime.loading import open_model
from llama_ext.runtime.model_files import ModelFiles, StoredTensor

__all__ = ["ClassifierFiles", "open_exportable"]

ARCHITECTURE = "LlamaForSequenceClassification"
SCORE = "score.weight"


class ClassifierFiles(FloatFiles):
    """Floating-point safetensors of a classifier; its scores are in the slot "score"."""

    def _match(self) -> None:
        infos, path = self.checkpoint.tensors, os.fspath(self.path)
        labels = self.config.labels
        count = len(labels) if labels is not None else self._labels_of_file(path)
        also = {SCORE: (count, self.config.hidden_size)}
        specs = self.architecture.match(self.config, infos, with_head=False, also=also, path=path)
        self._dtypes = {name: infos[name].core_dtype for name in (*(spec.name for spec in specs), SCORE)}
        self.tensors = [
            *(
                StoredTensor(spec.name, spec.slot, spec.shape, self._dtypes[spec.name], infos[spec.name].nbytes)
                for spec in specs
            ),
            StoredTensor(SCORE, "score", also[SCORE], self._dtypes[SCORE], infos[SCORE].nbytes),
        ]

    def _labels_of_file(self, path: str) -> int:
        """How many there are where config.json has no id2label: transformers leaves it out when there are two."""
        found = self.checkpoint.tensors.get(SCORE)
        if found is None or len(found.shape) != 2:
            raise CheckpointError(f"there is no matrix {SCORE}, though config.json says {ARCHITECTURE}", path=path)
        return found.shape[0]


def open_exportable(path_or_hub_id: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> ModelFiles:
    """As `open_model`, and classifiers too.

    Args:
        path_or_hub_id: A directory, a GGUF file, or a Hub id.
        limits: The bounds.

    Returns:
        The opened files.

    Raises:
        FormatError and others: As `open_model`.
    """
    path = resolve(path_or_hub_id)
    if find_gguf(path) is None:
        folder: Path = path.parent if path.is_file() else path
        config = LlamaConfig.from_pretrained(folder, limits=limits)
        if config.architectures[:1] == [ARCHITECTURE]:
            return ClassifierFiles(path, config, limits)
    return open_model(path, limits=limits)
