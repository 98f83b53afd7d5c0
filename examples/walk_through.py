"""How a Llama computes, step by step with llama_ext.ops: encode, embed, attend, feed forward, decode; then the same by the model.

python examples/walk_through.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import llama_ext
from llama_ext import ops


def logits_by_hand(config: llama_ext.LlamaConfig, weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """(T, V) logits of a text, from the operations alone."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    eps = config.rms_norm_eps
    cos, sin = ops.rope_angles(np.arange(len(ids)), size, parameters=config.rope_parameters)

    table = weights["model.embed_tokens.weight"]
    x = ops.embedding(np.array(ids), table)  # embed: a row of the table for each token, (T, C)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        block = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

        # Attend: every token looks at itself and at those before it.
        normed = ops.rms_norm(x, block["input_layernorm.weight"], eps)
        q = ops.matmul(normed, block["self_attn.q_proj.weight"]).reshape(-1, heads, size)
        k = ops.matmul(normed, block["self_attn.k_proj.weight"]).reshape(-1, kv_heads, size)
        v = ops.matmul(normed, block["self_attn.v_proj.weight"]).reshape(-1, kv_heads, size)
        attended = ops.attention(ops.rope(q, cos, sin), ops.rope(k, cos, sin), v)
        x = x + ops.matmul(attended.reshape(len(ids), heads * size), block["self_attn.o_proj.weight"])

        # Feed forward: every token by itself.
        normed = ops.rms_norm(x, block["post_attention_layernorm.weight"], eps)
        gate_up = (block["mlp.gate_proj.weight"], block["mlp.up_proj.weight"])
        x = x + ops.feed_forward(normed, gate_up, block["mlp.down_proj.weight"])

    # Decode: a score for every token of the vocabulary.
    x = ops.rms_norm(x, weights["model.norm.weight"], eps)
    return ops.matmul(x, weights.get("lm_head.weight", table))


def main() -> None:
    model = llama_ext.LlamaForCausalLM.from_pretrained("demo", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")

    text = "To be, or not to b"
    ids = model.tokenizer.encode(text)  # encode: a text becomes numbers
    print(f"{text!r} -> {ids}")

    by_hand = logits_by_hand(model.config, weights, ids)
    by_model = model(np.array([ids]))[0]
    print(f"largest difference to the model: {np.abs(by_hand - by_model).max():.1e}")
    assert np.abs(by_hand - by_model).max() < 1e-3

    probabilities = ops.softmax(by_hand[-1:])[0]
    for token in np.argsort(-probabilities)[:3]:  # decode: numbers become text
        print(f"next: {model.tokenizer.decode([int(token)])!r} with probability {probabilities[token]:.3f}")


if __name__ == "__main__":
    main()
