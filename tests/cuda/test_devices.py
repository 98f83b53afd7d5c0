"""More than one GPU: work goes to the one that was named, and the thread's current one stays what it was."""

from __future__ import annotations

import pytest

from devices import IS_EMULATED, requires_cuda
from llama_ext import _core
from subprocesses import run_script

# Two GPUs, of which nothing but the package makes one current.
SCRIPT = """
import numpy as np
import llama_ext

def work(device):
    model = llama_ext.LlamaForCausalLM.from_pretrained("demo", device=device, dtype="bfloat16")
    tokens = model.generate("ROMEO:", max_new_tokens=6, do_sample=False, return_details=True).token_ids
    sampled = model.generate(["KING", "JULIET:"], max_new_tokens=4, temperature=0.8, seed=3)
    config = llama_ext.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                   num_attention_heads=2, max_position_embeddings=32)
    learner = llama_ext.LlamaForCausalLM(config, device=device, seed=0)
    learner.compile(lr=1e-3)
    history = learner.fit([list(range(1, 20))] * 4, epochs=1)
    score = model.perplexity("All the world's a stage")
    return tokens, sampled, list(history.loss), score

one = llama_ext.LlamaForCausalLM.from_pretrained("demo", device="cuda:0")
first = one(np.array([[5, 6, 7]]))
there = work("cuda:1")
again = one(np.array([[5, 6, 7]]))
assert np.array_equal(first, again)
assert there == work("cuda:0")
print("same")
"""


@pytest.mark.gpu
@requires_cuda
@pytest.mark.skipif(not IS_EMULATED and len(_core.gpus()[0]) < 2, reason="this machine has one GPU")
def test_two_gpus_beside_each_other_compute_the_same() -> None:
    assert run_script(SCRIPT, timeout=240, LLAMA_EXT_CUDA_EMULATION_DEVICES="2") == "same\n"
