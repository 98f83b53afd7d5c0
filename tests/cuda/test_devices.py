"""More than one GPU: work goes to the one that was named, the thread's current one stays what it was, and others are left alone."""

from __future__ import annotations

import pytest

from devices import IS_EMULATED, only_emulated, requires_cuda
from llama_ext import _core
from subprocesses import run_script

pytestmark = [requires_cuda, pytest.mark.gpu]

WORK = """
import numpy as np
import llama_ext

def work(device):
    model = llama_ext.LlamaForCausalLM.from_pretrained("demo", device=device, dtype="bfloat16")
    tokens = model.generate("ROMEO:", max_new_tokens=12, do_sample=False, return_details=True).token_ids
    sampled = model.generate(["KING", "JULIET:"], max_new_tokens=4, temperature=0.8, seed=3)
    config = llama_ext.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                   num_attention_heads=2, max_position_embeddings=32)
    learner = llama_ext.LlamaForCausalLM(config, device=device, seed=0)
    learner.compile(lr=1e-3)
    history = learner.fit([list(range(1, 20))] * 4, epochs=1)
    score = model.perplexity("All the world's a stage")
    return tokens, sampled, list(history.loss), score
"""


@pytest.mark.skipif(not IS_EMULATED and len(_core.gpus()[0]) < 2, reason="there are no two GPUs")
def test_two_gpus_beside_each_other_compute_the_same() -> None:
    script = """
one = llama_ext.LlamaForCausalLM.from_pretrained("demo", device="cuda:0")
first = one(np.array([[5, 6, 7]]))
there = work("cuda:1")
again = one(np.array([[5, 6, 7]]))
assert np.array_equal(first, again)
assert there == work("cuda:0")
print("same")
"""
    assert run_script(WORK + script, timeout=240, LLAMA_EXT_CUDA_EMULATION_DEVICES="2") == "same\n"


@only_emulated
def test_a_gpu_that_nobody_named_is_left_alone_whatever_the_thread() -> None:
    """Each step, and the end of what it left, in a thread that knows of no GPU: its current one is the first."""
    script = """
import ctypes, gc, os, threading
library = ctypes.CDLL(os.environ["LLAMA_EXT_CUDA_LIBRARY"])

def in_a_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]

in_a_thread(lambda: work("cuda:1"))
model = in_a_thread(lambda: llama_ext.LlamaForCausalLM.from_pretrained("demo", device="cuda:1", dtype="bfloat16"))
stream = in_a_thread(lambda: model.stream_generate("KING", max_new_tokens=40, do_sample=False))
for _ in range(12):
    in_a_thread(lambda: next(stream))
session = in_a_thread(lambda: model.session(max_length=64))
in_a_thread(lambda: session.append([1, 2, 3]))
array = in_a_thread(lambda: llama_ext.ops.to_device(np.ones((2, 3), np.float32), "cuda:1"))
def drop(name):
    del globals()[name]
    gc.collect()
for name in ("stream", "session", "array", "model"):
    in_a_thread(lambda name=name: drop(name))
print(library.cuda_emulation_is_used(0), library.cuda_emulation_is_used(1))
"""
    assert run_script(WORK + script, timeout=240, LLAMA_EXT_CUDA_EMULATION_DEVICES="2") == "0 1\n"


@only_emulated
@pytest.mark.parametrize(
    "made",
    [
        pytest.param("backend.matrix(np.zeros((4, 4), np.float32))", id="matrix"),
        pytest.param("backend.zero_matrix(4, 4)", id="zero-matrix"),
        pytest.param("make_model()", id="model"),
        pytest.param("model.converted({'': ('bfloat16', 0)}, False)", id="converted-model"),
        pytest.param("_core.Adapter(model, {'layers.0.q': (2, 1.0)})", id="adapter"),
        pytest.param("_core.Session(model, 40_000, 'float32')", id="session"),
        pytest.param("_core.Session(model, 4, 'float32').fork(40_000)", id="fork"),
        pytest.param("make_generation()", id="generation"),
        pytest.param("_core.Trainer(model.converted({'': ('float32', 0)}, True), optimizer={})", id="trainer"),
    ],
)
def test_whoever_gives_memory_back_and_waits_for_the_gpu_lets_other_threads_run(made: str) -> None:
    """What a large cache or weights had goes back to everybody, which waits for all that the GPU does."""
    script = f"""
    import threading
    import time
    import numpy as np
    import llama_ext
    from llama_ext import _core
    from llama_ext.runtime.loading import core_config

    backend = _core.Backend("cuda")

    def make_model():
        config = llama_ext.LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=8,
            head_dim=128, max_position_embeddings=50_000,
        )
        model = _core.Model(backend, core_config(config), {{"": ("float32", 0)}})
        for slot, extents, _ in model.slots():
            model.load(slot, np.zeros(extents, np.float32), "float32")
        return model

    def make_generation():
        generation = _core.Generation(
            model, [np.zeros(4, np.int32)], sampling={{"temperature": 0.0}}, max_new_tokens=[40_000], eos=[], seed=0,
            kv_dtype="float32",
        )
        generation.step()
        return generation

    model = make_model()
    kept = [{made}]
    let_go = threading.Thread(target=kept.clear)
    let_go.start()
    ticks = 0
    while let_go.is_alive():
        time.sleep(0.01)
        ticks += 1
    print(ticks)
    """
    assert int(run_script(script, LLAMA_EXT_CUDA_EMULATION_BUSY="500")) >= 4
