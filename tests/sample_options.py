"""Ways to choose a token, for the tests of samplers."""

from __future__ import annotations

from typing import Any

# Every filter and penalty alone, then together.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top_k_1": {"temperature": 1.0, "top_k": 1},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_k_many": {"temperature": 1.0, "top_k": 700},
    "top_k_many_top_p": {"temperature": 1.3, "top_k": 300, "top_p": 0.8},
    "top_k_256": {"temperature": 2.0, "top_k": 256, "top_p": 0.9},
    "top_k_beyond": {"temperature": 1.0, "top_k": 10**6},
    "top_p": {"temperature": 1.0, "top_p": 0.7},
    "top_p_tiny": {"temperature": 1.0, "top_p": 1e-9},
    "top_p_near_1": {"temperature": 1.0, "top_p": 0.9999},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "filters": {"temperature": 0.8, "top_k": 30, "top_p": 0.85, "min_p": 0.02},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.7},
    "repetition_reward": {"temperature": 1.0, "repetition_penalty": 0.6},
    "presence": {"temperature": 1.0, "presence_penalty": 1.5},
    "frequency": {"temperature": 1.0, "frequency_penalty": 0.7},
    "bias": {"temperature": 1.0, "logit_bias": {0: 3.0, 2: -4.0, 1: float("-inf")}},
    "everything": {
        "temperature": 0.9,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.2,
        "logit_bias": {0: 1.0, 2: -1.0},
    },
}
