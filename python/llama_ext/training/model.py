"""A language model as the loop sees it: its weights, and a trainer made for them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ext import _core
from llama_ext.errors import CheckpointError, UnsupportedError
from llama_ext.models import ARCHITECTURES
from llama_ext.models.config import LlamaConfig
from llama_ext.models.llama import EMBEDDING
from llama_ext.runtime import loading, saving
from llama_ext.runtime.loaded_model import LoadedModel
from llama_ext.runtime.weight_types import float_types, is_quantized
from llama_ext.training.options import TrainOptions
from llama_ext.training.token_file import tokenizer_hash

if TYPE_CHECKING:
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = [
    "ModelWeights",
    "fill",
    "flops_per_token",
    "made_trainable",
    "new_trainer",
    "parameter_names",
    "trainable_copy",
    "use_trainable_core",
]


class ModelWeights:
    """All weights of a model, for the loop.

    Args:
        model: With a core that `use_trainable_core` made.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model

    def save(self, folder: Path) -> None:
        saving.save_model(self._model, folder)

    def load(self, folder: Path) -> None:
        fill(self._model._core, folder)

    def describe(self) -> dict[str, Any]:
        config = self._model.config.to_dict()
        for name in ("dtype", "torch_dtype"):
            config.pop(name, None)
        return {"config": config, "tokenizer": tokenizer_hash(self._model.tokenizer).hex()}

    def flops_per_token(self, context: int) -> float:
        return flops_per_token(self._model.config, context, adapts=False)


def flops_per_token(config: LlamaConfig, context: int, *, adapts: bool) -> float:
    """6 for each weight of a product, forward and backward, and 12 L H D T for attention as if nothing were masked.

    Args:
        config: Of the model.
        context: T.
        adapts: Only an adapter is trained: 4 for a weight, which has no gradient of its own. The adapter's own are not counted.
    """
    # The embedding is looked up; where it is tied, it is the head as well. A classifier's head is used once a sequence.
    is_classifier = config.is_classifier
    products: int = sum(
        spec.shape[0] * spec.shape[1]
        for spec in ARCHITECTURES[config.model_type].tensor_specs(config)
        if len(spec.shape) == 2
        and (spec.name != EMBEDDING or (config.tie_word_embeddings and not is_classifier))
        and not (is_classifier and spec.slot == "head")
    )
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
    return (4.0 if adapts else 6.0) * products + 12.0 * attention


def fill(core: _core.Model, folder: Path) -> None:
    """Sets all weights of a core to those of a directory that `save_pretrained` wrote.

    Raises:
        CheckpointError: It has other tensors.
        FormatError: It is no such directory, or damaged.
    """
    # Not load_into, which fills only what a core does not have yet.
    with loading.open_model(folder) as files:
        slots = {slot for slot, _, _ in core.slots()}
        found = {tensor.slot for tensor in files.tensors}
        if slots != found:
            raise CheckpointError(
                f"the checkpoint's tensors are not this model's: {', '.join(sorted(slots ^ found)[:4])}.",
                path=str(folder),
            )
        for tensor in files.tensors:
            values, dtype = files.read(tensor)
            core.load(tensor.slot, values, dtype)
            files.release(tensor)


def parameter_names(model: LlamaForCausalLM) -> dict[str, str]:
    """The Hugging Face name of each slot."""
    return {spec.slot: spec.name for spec in ARCHITECTURES[model.config.model_type].tensor_specs(model.config)}


def trainable_copy(core: _core.Model) -> _core.Model:
    """Another core with the same weights in float32, as a trainer needs them.

    Raises:
        UnsupportedError: The weights are quantised.
    """
    if is_quantized(core.types()):
        raise UnsupportedError(
            f"{core.dtype} weights cannot be trained: their steps are larger than an optimiser's. Load the model with "
            "dtype='float32'"
        )
    return core.converted(float_types("float32"), True)


def use_trainable_core(model: LoadedModel) -> _core.Model:
    """Gives a model float32 weights to be trained, if it has others. Sessions that were opened before keep the old ones."""
    core = model._core
    if core.dtype != "float32" or not core.separate_gate_up or is_quantized(core.types()):
        core = trainable_copy(core)
        model._core = core
    model._fingerprint = None
    return core


def made_trainable(model: LoadedModel, undo: contextlib.ExitStack) -> _core.Model:
    """As `use_trainable_core`, and gives the model back what it had where `undo` ends before training has begun.

    Until then the old weights stay in memory: `undo.pop_all()` frees them.
    """
    undo.callback(setattr, model, "_core", model._core)
    return use_trainable_core(model)


def new_trainer(core: _core.Model, options: TrainOptions) -> _core.Trainer:
    """A trainer of all weights of a core."""
    return _core.Trainer(
        core,
        optimizer=options.core_optimizer(),
        compute=options.precision,
        checkpoint_activations=options.checkpoint_activations,
        dropout=options.dropout,
        attention_dropout=options.attention_dropout,
    )
