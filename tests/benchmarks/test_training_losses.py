"""The trainings whose losses are compared have the same settings, and their summary says what it should."""

from __future__ import annotations

from benchmarks import training_losses
from benchmarks.training_runner import SETTINGS
from llama_ext.training import PRESETS
from llama_ext.training.options import TrainOptions
from llama_ext.training.schedules import learning_rate


def test_torch_s_twin_has_the_preset_s_settings() -> None:
    preset, setting = PRESETS["cpu"], SETTINGS[training_losses.SETTING]
    assert setting == {
        "layers": preset.layers,
        "heads": preset.heads,
        "width": preset.width,
        "ffn_width": preset.ffn_width,
        "context": preset.context,
        "batch": preset.fit["batch_size"],
    }
    steps = training_losses.STEPS
    assert preset.fit["max_steps"] == steps
    options = TrainOptions(**preset.compile)
    assert (options.optimizer, options.betas, options.weight_decay) == ("adamw", (0.9, 0.99), 0.1)
    assert (options.decay, options.clip_norm, options.eps) == ("matrices", 1.0, 1e-8)
    assert (options.dropout, options.attention_dropout) == (0.0, 0.0)
    for step in range(steps):
        theirs = training_losses.learning_rate(step, steps)
        assert abs(theirs - learning_rate(options, step, steps)) <= 1e-15, step


def test_the_summary_has_the_means_and_their_difference() -> None:
    found = [
        {"engine": "llama_ext", "dtype": "float32", "seed": 0, "validation_loss": 1.5, "seconds": 2.0, "rate": 9.0},
        {"engine": "torch", "dtype": "float32", "seed": 0, "validation_loss": 1.7, "seconds": 2.0, "rate": 9.0},
        {"engine": "llama_ext", "dtype": "float32", "seed": 1, "validation_loss": 1.6, "seconds": 2.0, "rate": 9.0},
        {"engine": "torch", "dtype": "float32", "seed": 1, "error": "not installed: torch"},
        {"engine": "llama_ext", "dtype": "bfloat16", "seed": 0, "validation_loss": 1.25, "seconds": 2.0, "rate": 9.0},
    ]
    assert training_losses.summary(found) == [
        "Mean validation loss, float32: llama_ext 1.5500 (2 seeds), torch 1.7000 (1 seeds); -0.1500 against torch.",
        "Mean validation loss, bfloat16: llama_ext 1.2500 (1 seeds).",
    ]
    assert training_losses.summary([]) == []
    rows = training_losses.table(found).rows
    assert rows[0] == ["llama_ext", "float32", "0", "1.5000", "2", "9"]
    assert rows[3] == ["torch", "float32", "1", "not installed: torch", "-", "-"]
