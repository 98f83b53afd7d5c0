"""`llama-ext generate`: what goes in, what comes out, and that it comes out while it is made."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

import llama_ext
from command_line import Run, command, run_process
from shared_data import LETTERS, SHARED, requires_shared

STORIES = SHARED / "stories260K"


@pytest.fixture(scope="module")
def demo() -> llama_ext.LlamaForCausalLM:
    return llama_ext.LlamaForCausalLM.from_pretrained("demo")


# The story.


@requires_shared
@pytest.mark.parametrize(
    "more", [[], ["--no-stream"], [""], ["--greedy"], ["--dtype", "float32", "--compute", "exact"]]
)
def test_from_the_bare_bos_token_it_prints_what_the_reference_program_prints(more: list[str], run: Run) -> None:
    arguments = ["generate", "--model", STORIES, "--max-new-tokens", 256, *more]
    assert run(*arguments) == (0, (STORIES / "greedy-256.txt").read_text(encoding="utf-8"), "")


@requires_shared
def test_a_process_of_its_own_prints_the_same_bytes() -> None:
    done = run_process("generate", "--model", STORIES, "--temperature", "0", "--max-new-tokens", "256")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == (STORIES / "greedy-256.txt").read_bytes()


# The prompt.


def test_the_prompt_comes_first_and_a_newline_last(run: Run, demo: llama_ext.LlamaForCausalLM) -> None:
    expected = demo.generate("ROMEO:", max_new_tokens=50, seed=3)
    assert run("generate", "ROMEO:", "--max-new-tokens", 50, "--seed", 3) == (0, expected + "\n", "")


@pytest.mark.parametrize("argument", [[], ["-"]])
def test_the_prompt_may_be_piped_in_and_loses_one_newline(argument: list[str], run: Run) -> None:
    options = ["--max-new-tokens", 20, "--greedy"]
    expected = run("generate", "ROMEO:", *options)
    assert run("generate", *argument, *options, stdin="ROMEO:\n") == expected
    assert run("generate", *argument, *options, stdin="ROMEO:") == expected
    with_newline = run("generate", *argument, *options, stdin="ROMEO:\n\n")
    assert with_newline == run("generate", "ROMEO:\n", *options)
    assert with_newline.out.startswith("ROMEO:\n")


def test_an_argument_is_taken_before_the_pipe(run: Run) -> None:
    assert run("generate", "JULIET:", "--max-new-tokens", 5, stdin="ROMEO:").out.startswith("JULIET:")


def test_what_is_piped_in_must_be_text(run: Run) -> None:
    result = run("generate", stdin=b"ROMEO\xff")
    assert result.code == 3
    assert "standard input @0x5: this is not UTF-8" in result.err


def test_it_says_that_it_waits_for_the_pipe() -> None:
    with subprocess.Popen(
        command("generate", "--max-new-tokens", 3),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline() == b"llama-ext: note: waiting for the prompt on standard input\n"
        process.stdin.write(b"ROMEO:\n")
        process.stdin.close()
        assert process.stdout.read().startswith(b"ROMEO:")


def test_a_prompt_may_begin_with_a_dash(run: Run) -> None:
    assert run("generate", "--greedy", "--max-new-tokens", 3, "--", "--greedy").out.startswith("--greedy")


def test_a_model_without_a_tokenizer_takes_ids(run: Run, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((LETTERS / name).read_bytes())
    refused = run("generate", "ROMEO:", "--model", tmp_path)
    assert (refused.code, refused.err) == (2, "llama-ext: this model has no tokenizer: give token ids, with --ids\n")
    taken = run("generate", "1 2 3", "--ids", "--max-new-tokens", 4, "--model", tmp_path)
    assert taken.code == 0
    assert len(taken.out.split()) == 7


# The options.


def test_every_option_arrives(run: Run, demo: llama_ext.LlamaForCausalLM) -> None:
    expected = demo.generate(
        "ROMEO:",
        max_length=120,
        temperature=0.9,
        top_k=20,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.05,
        logit_bias={5: -1.5, 7: float("-inf")},
        stop=["\n\n", "!"],
        seed=11,
    )
    options = "--max-length 120 --temperature 0.9 --top-k 20 --top-p 0.95 --min-p 0.01 --repetition-penalty 1.1"
    options += " --presence-penalty 0.1 --frequency-penalty 0.05 --logit-bias 5=-1.5 --logit-bias 7=-inf --seed 11"
    found = run("generate", "ROMEO:", *options.split(), "--stop", r"\n\n", "--stop", "!")
    assert found == (0, expected + "\n", "")


def test_beam_search_gives_its_best(run: Run, demo: llama_ext.LlamaForCausalLM) -> None:
    options = {"num_beams": 4, "length_penalty": 0.7, "early_stopping": True, "max_new_tokens": 12}
    expected = demo.generate("KING", **options)
    words = ["--num-beams", "4", "--length-penalty", "0.7", "--early-stopping", "--max-new-tokens", "12"]
    assert run("generate", "KING", *words) == (0, expected + "\n", "")
    best = demo.generate("KING", **options, num_return_sequences=2, return_details=True)
    lines = run("generate", "KING", *words, "--num-return-sequences", 2, "--json").out.splitlines()
    assert [json.loads(line)["score"] for line in lines] == [output.score for output in best]


def test_greedy_does_not_draw(run: Run) -> None:
    first = run("generate", "ROMEO:", "--greedy", "--max-new-tokens", 40)
    assert first.out == run("generate", "ROMEO:", "--temperature", 0, "--max-new-tokens", 40).out
    assert first.out != run("generate", "ROMEO:", "--seed", 1, "--max-new-tokens", 40).out


def test_several_texts_are_told_apart(run: Run, demo: llama_ext.LlamaForCausalLM) -> None:
    expected = demo.generate("KING", num_return_sequences=2, seed=5, max_new_tokens=20)
    out = run("generate", "KING", "--num-return-sequences", 2, "--seed", 5, "--max-new-tokens", 20).out
    assert out == f"--- 1 of 2 ---\n{expected[0]}\n--- 2 of 2 ---\n{expected[1]}\n"


# The output.


def test_json_says_everything(run: Run, demo: llama_ext.LlamaForCausalLM) -> None:
    details = demo.generate("ROMEO:", seed=2, max_new_tokens=60, stop=["\n"], return_details=True)
    result = run("generate", "ROMEO:", "--seed", 2, "--max-new-tokens", 60, "--stop", r"\n", "--json")
    assert result.out.count("\n") == 1
    assert json.loads(result.out) == {
        "prompt": "ROMEO:",
        "text": details.text,
        "token_ids": details.token_ids,
        "logprobs": details.logprobs,
        "finish_reason": details.finish_reason,
        "prompt_ids": details.prompt_ids,
    }


def test_json_has_one_object_a_text(run: Run) -> None:
    out = run("generate", "KING", "--num-return-sequences", 3, "--seed", 5, "--max-new-tokens", 9, "--json").out
    records = [json.loads(line) for line in out.splitlines()]
    assert len(records) == 3
    assert {len(record["token_ids"]) for record in records} == {9}


@pytest.mark.parametrize("more", [[], ["--no-stream"]])
def test_ids_give_ids(more: list[str], run: Run, demo: llama_ext.LlamaForCausalLM) -> None:
    ids = demo.tokenizer.encode("ROMEO:")
    expected = demo.generate(ids, max_new_tokens=10, temperature=0)
    found = run("generate", " ".join(map(str, ids)), "--ids", "--greedy", "--max-new-tokens", 10, *more)
    assert [int(word) for word in found.out.split()] == expected
    assert run("generate", "4 five", "--ids").code == 2
    assert run("generate", "4 5000", "--ids").code == 2
    assert run("generate", "", "--ids").code == 2


@pytest.mark.parametrize("more", [[], ["--no-stream"]])
def test_verbose_tells_the_speed_to_stderr(more: list[str], run: Run, demo: llama_ext.LlamaForCausalLM) -> None:
    options = ["generate", "ROMEO:", "--greedy", "--max-new-tokens", 20, *more]
    quiet, loud = run(*options), run(*options, "-v")
    assert loud.out == quiet.out
    assert f"{demo.num_parameters():,} parameters" in loud.err
    assert "prefill" in loud.err
    assert "tokens/s" in loud.err
    assert "ended by length" in loud.err


def test_nothing_new_may_be_asked_for(run: Run) -> None:
    assert run("generate", "ROMEO:", "--max-new-tokens", 0) == (0, "ROMEO:\n", "")


def test_text_comes_out_while_it_is_made(slow_model: Path) -> None:
    process = subprocess.Popen(
        command("generate", "ROMEO:", "--max-new-tokens", 16000, "--greedy", "--model", slow_model),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process:
        text = b""
        started = time.monotonic()
        while len(text) < 40 and time.monotonic() - started < 30:
            text += os.read(process.stdout.fileno(), 100)
        assert process.poll() is None
        process.kill()
    assert text.startswith(b"ROMEO:")


# Speculation.


@pytest.mark.parametrize("guess", [["--prompt-lookup", "6"], ["--draft-model", "demo"]])
@pytest.mark.parametrize("more", [[], ["--no-stream"], ["--temperature", "0.6", "--seed", "4", "--json"]])
def test_guesses_change_nothing_that_is_printed_and_are_counted(guess: list[str], more: list[str], run: Run) -> None:
    arguments = ["generate", "To be or not to be, to be or not", "--max-new-tokens", 60, "--seed", 3, *more]
    expected = run(*arguments)
    found = run(*arguments, *guess, "-v")
    if "--json" in more:
        told, record = json.loads(expected.out), json.loads(found.out)
        assert 0 < record.pop("accepted_tokens") <= record.pop("drafted_tokens")
        assert record == told
    else:
        assert found.out == expected.out
    assert re.search(r"guessed: \d+ tokens, \d+ of them right \(\d+%\)", found.err)
    assert "guessed" not in run(*arguments, "-v").err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-lookup", "99"], "--prompt-lookup must be at most 64"),
        (["--prompt-lookup", "3", "--draft-model", "demo"], "not allowed with argument --prompt-lookup"),
        (["--num-beams", "2", "--draft-model", "demo"], "--draft-model is not supported with beam search"),
        (["--num-beams", "2", "--prompt-lookup", "2"], "--prompt-lookup is not supported with beam search"),
    ],
)
def test_speculation_that_cannot_be_is_an_error(options: list[str], message: str, run: Run) -> None:
    done = run("generate", "ROMEO:", *options)
    assert done.code == 2
    assert message in done.err
