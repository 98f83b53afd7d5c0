"""Training: what `LlamaForCausalLM.fit` takes and gives, beside the model itself.

TokenFile, write_token_file   a mapped file of token ids, for texts larger than memory
Callback, EarlyStopping       what hooks into a run
History, Evaluation, ...      what a run and a validation give
PRESETS                       settings of known results
usual_lr                      a learning rate to begin with, for a model of some width
"""

from __future__ import annotations

from llama_ext.training.api import LearningRates
from llama_ext.training.callbacks import Callback, EarlyStopping, RunView
from llama_ext.training.history import Evaluation, History, StepRecord, Validation
from llama_ext.training.loop import StepResult
from llama_ext.training.presets import PRESETS, Preset
from llama_ext.training.schedules import usual_lr
from llama_ext.training.token_file import TokenFile, TokenSlice, write_token_file

__all__ = [
    "PRESETS",
    "Callback",
    "EarlyStopping",
    "Evaluation",
    "History",
    "LearningRates",
    "Preset",
    "RunView",
    "StepRecord",
    "StepResult",
    "TokenFile",
    "TokenSlice",
    "Validation",
    "usual_lr",
    "write_token_file",
]
