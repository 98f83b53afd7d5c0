"""Text from the model in the box: greedy, sampled, a batch, a stream and beams.

python examples/generate_text.py
"""

from __future__ import annotations

import llama_ext


def main() -> None:
    model = llama_ext.LlamaForCausalLM.from_pretrained("demo")
    print(model)
    print(model.generate("ROMEO:", max_length=60, do_sample=False))
    print(model.generate("ROMEO:", max_new_tokens=60, temperature=0.8, top_p=0.95, seed=7))
    for text in model.generate(["KING", "First Citizen:"], max_new_tokens=30, temperature=0.7, seed=1):
        print(repr(text))
    for piece in model.stream_generate("JULIET:", max_new_tokens=40, seed=7, stop=["\n\n"]):
        print(piece.text, end="", flush=True)
    print()
    print(model.generate("My lord,", max_new_tokens=20, num_beams=4, do_sample=False))


if __name__ == "__main__":
    main()
