"""Generation: text in gives text out, ids in give ids out, alone or in a batch, at once or piece by piece."""

from __future__ import annotations

import itertools
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

import llama_ext
from llama_ext.runtime import generation
from shared_data import SHARED, requires_shared

Model = llama_ext.LlamaForCausalLM
GOLDEN = ["mha-untied", "gqa-tied-llama3rope", "wide-head-dim", "linear-rope", "biases"]
# The demonstration model, which stands in where the shared data is missing, has no bos token to begin an empty text with.
PROMPTS = [
    "Once upon a time",
    "The",
    "Lily and Tom went to the park. They",
    "One day, a big dog",
    "" if SHARED.is_dir() else "I",
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def without_end(model: Model) -> None:
    """For tests of a random model, whose end token means nothing."""
    assert model.eos_token_ids == ()


# What is generated.


@requires_shared
def test_the_reference_program_writes_the_same_story(stories: Model) -> None:
    expected = (SHARED / "stories260K" / "greedy-256.txt").read_text(encoding="utf-8").rstrip("\n")
    assert stories.generate("", max_new_tokens=256) == expected


@requires_shared
@pytest.mark.parametrize("name", GOLDEN)
def test_greedy_search_gives_the_tokens_of_transformers(name: str) -> None:
    model = Model.from_pretrained(SHARED / "golden" / name)
    expected = load_file(SHARED / "golden" / name / "golden.safetensors")["greedy_ids"]
    found = model.generate(expected[:, :8], max_new_tokens=24, eos_token_id=[])
    np.testing.assert_array_equal(found, expected)


def test_greedy_search_takes_the_largest_logit_of_each_step(stories: Model) -> None:
    ids = stories.generate([1, 40], max_new_tokens=40)
    logits = stories([ids])
    assert ids[2:] == logits[0, 1:-1].argmax(axis=-1).tolist()


def test_log_probabilities_are_those_of_the_model(stories: Model) -> None:
    output = stories.generate("Tom", max_new_tokens=30, temperature=0.9, seed=1, return_details=True)
    logits = stories([output.prompt_ids + output.token_ids])[0].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    first = len(output.prompt_ids) - 1
    expected = [logits[first + index, token] for index, token in enumerate(output.token_ids)]
    np.testing.assert_allclose(output.logprobs, expected, atol=1e-5)


# What goes in comes out.


def test_texts_give_texts_with_the_prompt_in_front(stories: Model) -> None:
    text = stories.generate("Once upon a time", max_new_tokens=12)
    assert isinstance(text, str)
    assert text.startswith("Once upon a time")
    assert len(text) > len("Once upon a time")
    assert stories.generate(["Once upon a time"], max_new_tokens=12) == [text]
    assert stories.generate(("Once upon a time",), max_new_tokens=12) == [text]
    assert stories.generate([]) == []


def test_ids_give_ids_of_the_same_kind(stories: Model) -> None:
    ids = stories.tokenizer.encode("Once upon a time")
    expected = stories.generate(ids, max_new_tokens=5)
    assert expected[: len(ids)] == ids
    assert len(expected) == len(ids) + 5
    assert stories.generate([ids, ids[:3]], max_new_tokens=5)[0] == expected
    assert stories.generate([np.array(ids)], max_new_tokens=5) == [expected]
    one = stories.generate(np.array(ids, dtype=np.uint16), max_new_tokens=5)
    assert (one.shape, one.dtype) == ((len(expected),), np.int64)
    np.testing.assert_array_equal(one, expected)
    np.testing.assert_array_equal(stories.generate(np.array([ids, ids]), max_new_tokens=5), [expected, expected])
    assert stories.generate(np.zeros((0, 4), dtype=int)).shape == (0, 4)


def test_a_left_padded_array_is_generated_from_where_its_rows_end(stories: Model) -> None:
    long, short = stories.tokenizer.encode("Once upon a time"), stories.tokenizer.encode("Tom")
    pad = len(long) - len(short)
    ids = np.array([long, [0] * pad + short])
    mask = np.array([[1] * len(long), [0] * pad + [1] * len(short)])
    found = stories.generate(ids, attention_mask=mask, max_new_tokens=8)
    np.testing.assert_array_equal(found[:, : len(long)], ids)
    assert found[0].tolist() == stories.generate(long, max_new_tokens=8)
    assert found[1, pad:].tolist() == stories.generate(short, max_new_tokens=8)
    with pytest.raises(llama_ext.OptionError, match="pad on the left"):
        stories.generate(ids, attention_mask=mask[:, ::-1])
    with pytest.raises(llama_ext.OptionError, match="two-dimensional"):
        stories.generate([long, short], attention_mask=mask)


def test_rows_of_an_array_that_end_early_are_padded_on_the_right(stories: Model) -> None:
    first, second = stories.tokenizer.encode("Once"), stories.tokenizer.encode("Then")
    prompts = np.array([first[:2], second[:2]])
    alone = [stories.generate(row, max_new_tokens=10, eos_token_id=[]) for row in prompts]
    end = next(token for token in alone[0][4:].tolist() if token not in alone[1].tolist())
    found = stories.generate(prompts, max_new_tokens=10, eos_token_id=end)
    stopped = alone[0].tolist().index(end) + 1
    np.testing.assert_array_equal(found[0, :stopped], alone[0][:stopped])
    assert set(found[0, stopped:].tolist()) == {end}  # no pad token: the eos of this call
    np.testing.assert_array_equal(found[1], alone[1])


def test_max_length_counts_the_prompt_and_max_new_tokens_does_not(stories: Model) -> None:
    prompt = stories.tokenizer.encode("Once upon a time")
    assert len(stories.generate(prompt, max_length=20)) == 20
    assert len(stories.generate(prompt, max_new_tokens=20)) == len(prompt) + 20
    assert stories.generate("Once upon a time", max_new_tokens=0) == "Once upon a time"
    assert stories.generate("Once upon a time", max_length=len(prompt)) == "Once upon a time"


def test_by_default_256_tokens_or_what_fits(tiny: Model) -> None:
    without_end(tiny)
    assert len(tiny.generate([1, 2, 3])) == 48
    with pytest.raises(llama_ext.ContextLengthError, match="max_new_tokens=46"):
        tiny.generate([1, 2, 3], max_new_tokens=46)
    with pytest.raises(llama_ext.ContextLengthError, match="49 tokens"):
        tiny.generate([1] * 49)
    with pytest.raises(llama_ext.ContextLengthError, match=r"prompts\[1\]"):
        tiny.generate([[1], [1] * 49])


# Batches, copies, seeds.


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 50, "seed": 7}])
def test_a_batch_gives_each_prompt_what_it_gets_alone(options: dict[str, Any], stories: Model) -> None:
    batch = stories.generate(PROMPTS, max_new_tokens=40, **options)
    assert len(batch) == len(PROMPTS)
    if not options:
        assert batch == [stories.generate(prompt, max_new_tokens=40) for prompt in PROMPTS]
    else:  # row r draws from a stream of its own
        assert batch[0] == stories.generate(PROMPTS[0], max_new_tokens=40, **options)
        assert batch == stories.generate(PROMPTS, max_new_tokens=40, **options)


def test_a_seed_reproduces_and_no_seed_does_not(stories: Model) -> None:
    def sample(seed: int | None) -> str:
        return stories.generate("Once upon a time", max_new_tokens=40, temperature=1.2, seed=seed)

    assert sample(5) == sample(5)
    assert len({sample(None) for _ in range(4)} | {sample(5), sample(6)}) == 6


def test_several_sequences_per_prompt_are_flattened(stories: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "seed": 1, "num_return_sequences": 3}
    texts = stories.generate(["One", "Two"], **options)
    assert len(texts) == len(set(texts)) == 6
    assert [text[:3] for text in texts] == ["One"] * 3 + ["Two"] * 3
    assert len(stories.generate("One", **options)) == 3
    assert stories.generate(np.array([1, 2]), **options).shape[0] == 3
    assert stories.generate(np.array([[1, 2], [1, 3]]), **options).shape[0] == 6


def test_a_forbidden_token_is_never_drawn_and_a_favoured_one_always(stories: Model) -> None:
    likeliest = stories.generate([1], max_new_tokens=1)[1]
    ids = stories.generate([1], max_new_tokens=10, logit_bias={likeliest: -float("inf")})
    assert likeliest not in ids[1:]
    assert stories.generate([1], max_new_tokens=4, logit_bias={30: 1e4})[1:] == [30] * 4


def test_penalties_change_what_repeats(stories: Model) -> None:
    plain = stories.generate([1], max_new_tokens=100)
    for options in ({"repetition_penalty": 1.5}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert len(set(stories.generate([1], max_new_tokens=100, **options))) > len(set(plain))


# Ends.


def test_a_stop_string_ends_the_text_and_is_not_in_it(stories: Model) -> None:
    whole = stories.generate("Once upon a time", max_new_tokens=60)
    continuation = whole[len("Once upon a time") :]
    for stop in (".", "a little", "girl named", "e", "zzz"):
        cut = continuation.split(stop)[0]
        found = stories.generate("Once upon a time", max_new_tokens=60, stop=stop, return_details=True)
        assert found.text == cut
        assert found.finish_reason == ("stop" if stop in continuation else "length")
        assert whole.startswith(stories.generate("Once upon a time", max_new_tokens=60, stop=[stop, "zzz"]))


def test_a_stop_string_ends_only_its_own_row(stories: Model) -> None:
    alone = [stories.generate(prompt, max_new_tokens=50, stop=" the") for prompt in PROMPTS]
    assert stories.generate(PROMPTS, max_new_tokens=50, stop=" the") == alone
    assert len({len(text) for text in alone}) > 1


def test_the_reason_of_the_end_is_told(stories: Model) -> None:
    def ended(**options: Any) -> Any:
        return stories.generate([1, 40], return_details=True, **options)

    assert ended(max_new_tokens=3).finish_reason == "length"
    end = ended(max_new_tokens=10, eos_token_id=[]).token_ids[6]
    output = ended(max_new_tokens=10, eos_token_id=end)
    assert (output.finish_reason, output.token_ids[-1]) == ("stop", end)
    assert len(output.logprobs) == len(output.token_ids) < 10
    assert ended(max_new_tokens=0).token_ids == []


def test_a_stop_string_that_is_a_special_token_ends_a_row() -> None:
    base = llama_ext.Tokenizer.train("abc", kind="char", eos_token="</s>")
    config = llama_ext.LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None
    )
    model = Model(config, base)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "logit_bias": {base.eos_token_id: 100.0}}
    found = model.generate("ab", stop=["x", "</s>"], return_details=True, **options)
    assert (found.text, found.token_ids, found.finish_reason) == ("", [base.eos_token_id], "stop")
    assert model.generate("ab", return_details=True, **options).finish_reason == "length"
    assert len(list(model.session().stream_generate("ab", stop="</s>", **options))) == 1


def test_a_special_token_that_is_spelled_out_ends_a_row_as_any_stop_string() -> None:
    tokenizer = llama_ext.Tokenizer.train("ab</s>", kind="char", eos_token="</s>")
    config = llama_ext.LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None
    )
    # The token itself is beyond the model's vocabulary.
    assert tokenizer.eos_token_id == 6
    model = Model(config, tokenizer)
    plan = generation.plan_for(model, {"stop": "</s>"})
    assert (plan.stop, plan.eos) == (("</s>",), ())
    with pytest.raises(llama_ext.OptionError, match=r"the stop string .* has half of a surrogate pair"):
        model.generate("ab", stop="\ud800")


def test_a_token_behind_a_gap_in_the_vocabulary_has_its_text() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "z": 5}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = llama_ext.Tokenizer.from_tokenizers(backend)
    assert [tokenizer.has_id(index) for index in (-1, 0, 2, 3, 5, 6, 2**40)] == [
        False,
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    config = llama_ext.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None
    )
    model = Model(config, tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "logit_bias": {5: 100.0}}
    assert model.generate("ab", **options) == "abzzzz"
    found = model.generate("ab", stop="zz", return_details=True, **options)
    assert (found.text, found.token_ids, found.finish_reason) == ("", [5, 5], "stop")


def test_stop_strings_need_a_tokenizer(tiny: Model) -> None:
    with pytest.raises(llama_ext.OptionError, match="eos_token_id"):
        tiny.generate([1], stop="x")


# Streams.


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}, {"stop": ["dog", "play"]}])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_pieces_of_a_stream_are_the_text_that_generate_returns(prompt: str, options: Any, stories: Model) -> None:
    pieces = list(stories.stream_generate(prompt, max_new_tokens=60, **options))
    assert prompt + "".join(piece.text for piece in pieces) == stories.generate(prompt, max_new_tokens=60, **options)
    assert [piece.finish_reason is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    details = stories.generate(prompt, max_new_tokens=60, return_details=True, **options)
    assert [piece.token_id for piece in pieces] == details.token_ids
    assert [piece.logprob for piece in pieces] == details.logprobs
    assert pieces[-1].finish_reason == details.finish_reason


def test_a_stream_of_several_prompts_tells_its_rows_apart(stories: Model) -> None:
    texts = dict.fromkeys(range(len(PROMPTS)), "")
    for piece in stories.stream_generate(PROMPTS, max_new_tokens=20):
        texts[piece.row] += piece.text
    assert [prompt + texts[row] for row, prompt in enumerate(PROMPTS)] == stories.generate(PROMPTS, max_new_tokens=20)


@requires_shared
def test_a_character_of_several_tokens_comes_whole(stories: Model) -> None:
    # The byte tokens are made the only likely ones, so that the model writes what the test wants.
    first, second, third = (byte + 3 for byte in "你".encode())
    assert stories.tokenizer.id_to_token(first) == "<0xE4>"

    def written(prompt: list[int], token: int, count: int) -> list[str]:
        pieces = stories.stream_generate([1, *prompt], max_new_tokens=count, logit_bias={token: 1e6})
        return [piece.text for piece in pieces]

    assert written([first, second], third, 1) == ["你"]
    # Never half of one: what does not become a character is told at the end, or when it is certain.
    assert written([first], second, 1) == ["\ufffd\ufffd"]
    assert written([], first, 2) == ["", "\ufffd\ufffd"]


def test_a_model_without_tokenizer_streams_ids(tiny: Model) -> None:
    pieces = list(tiny.stream_generate([1, 2], max_new_tokens=4))
    assert [1, 2, *(piece.token_id for piece in pieces)] == tiny.generate([1, 2], max_new_tokens=4)
    assert {piece.text for piece in pieces} == {""}
    only = list(tiny.stream_generate([1, 2], max_new_tokens=0))
    assert [(piece.token_id, piece.logprob, piece.finish_reason) for piece in only] == [(None, None, "length")]


def test_a_stream_checks_its_options_before_it_is_read(tiny: Model) -> None:
    with pytest.raises(llama_ext.OptionError, match="did you mean"):
        tiny.stream_generate([1], max_new_token=3)  # type: ignore[call-arg]
    with pytest.raises(llama_ext.UnsupportedError, match="streamed"):
        tiny.stream_generate([1], num_beams=2)


def test_a_stream_can_be_left_alone(tiny: Model) -> None:
    expected = tiny.generate([1, 2], max_new_tokens=20)
    for _ in itertools.islice(tiny.stream_generate([1, 2], max_new_tokens=20), 3):
        pass
    assert tiny.generate([1, 2], max_new_tokens=20) == expected


# Beams.


def test_beam_search_finds_a_likelier_text_than_greedy_search(stories: Model) -> None:
    greedy = stories.generate("The", max_new_tokens=16, return_details=True)
    beams = stories.generate("The", max_new_tokens=16, num_beams=4, num_return_sequences=4, return_details=True)
    assert [output.score for output in beams] == sorted((output.score for output in beams), reverse=True)
    assert sum(beams[0].logprobs) >= sum(greedy.logprobs) - 1e-4
    for output in beams:
        assert output.score == pytest.approx(sum(output.logprobs) / len(output.token_ids), abs=1e-4)
    text = stories.generate("The", max_new_tokens=16, num_beams=4)
    assert text == "The" + beams[0].text
    assert stories.generate(["The", "One"], max_new_tokens=16, num_beams=4)[0] == text


# Errors.


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("text", llama_ext.OptionError, "no tokenizer"),
        ([[]], llama_ext.ShapeError, "no tokens"),
        (np.zeros(0, dtype=int), llama_ext.ShapeError, "no tokens"),
        (np.zeros((2, 0), dtype=int), llama_ext.ShapeError, "at least one token"),
        (np.zeros((1, 1, 1), dtype=int), llama_ext.ShapeError, "shape"),
        ([1, 67], llama_ext.TokenIdError, r"input_ids\[1\] is 67"),
        ([[1], [2, 10**30]], llama_ext.TokenIdError, r"prompts\[1\]\[1\]"),
        ([10**5000], llama_ext.TokenIdError, r"input_ids\[0\] is beyond 64 bits"),
        (np.array([1.0]), llama_ext.DTypeError, "integers"),
        ([1, "a"], llama_ext.DTypeError, "integer"),
        ([True], llama_ext.DTypeError, "True"),
        (["a", 1], llama_ext.DTypeError, r"prompts\[1\] must be a text"),
        (b"bytes", llama_ext.DTypeError, "bytes"),
        (5, llama_ext.DTypeError, "int"),
        (None, llama_ext.DTypeError, "NoneType"),
    ],
)
def test_a_wrong_prompt_is_a_typed_error(prompt: Any, error: type[Exception], message: str, tiny: Model) -> None:
    with pytest.raises(error, match=message):
        tiny.generate(prompt)


def test_what_cannot_be_done_is_told_for_where_it_was_asked(stories: Model) -> None:
    with pytest.raises(llama_ext.UnsupportedError, match=r"several sequences and a session is one.*num_beams=1"):
        stories.session().generate("a", num_beams=2)
    with pytest.raises(llama_ext.UnsupportedError, match="cannot be streamed"):
        stories.stream_generate("a", num_beams=2)
    for prompts, given in (("a", "^1 prompt with"), (["a", "b"], "^2 prompts with")):
        with pytest.raises(llama_ext.OptionError, match=given):
            stories.generate(prompts, num_return_sequences=70_000, temperature=1.0)


def test_an_empty_prompt_without_a_bos_token_says_what_to_do() -> None:
    tokenizer = llama_ext.Tokenizer.characters("abc")
    config = llama_ext.LlamaConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, bos_token_id=None
    )
    model = Model(config, tokenizer)
    with pytest.raises(llama_ext.OptionError, match="at least one character"):
        model.generate("")
    assert model.generate("ab", max_new_tokens=3).startswith("ab")


def test_a_vocabulary_padded_beyond_the_tokenizer_has_no_text_there() -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None
    )
    model = Model(config, llama_ext.Tokenizer.characters("abc"))
    output = model.generate("ab", max_new_tokens=50, temperature=5.0, seed=0, return_details=True)
    assert max(output.token_ids) > 2
    assert output.text == "".join("abc"[token] for token in output.token_ids if token < 3)


# Chat.


@pytest.fixture
def chatty(tmp_path: Path, stories: Model) -> Model:
    stories.save_pretrained(tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    return Model.from_pretrained(tmp_path / "chat")


def test_chat_answers_in_the_format_of_the_template(chatty: Model) -> None:
    messages = [{"role": "user", "content": "Tell me a story."}]
    prompt = "user: Tell me a story.\nassistant:"
    expected = chatty.generate(prompt, max_new_tokens=30)[len(prompt) :]
    assert chatty.chat(messages, max_new_tokens=30) == expected
    pieces = list(chatty.chat(messages, stream=True, max_new_tokens=30))
    assert "".join(piece.text for piece in pieces) == expected


def test_the_end_of_the_tokenizer_ends_an_answer_and_what_is_told_so(
    chatty: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "Tell me a story."}]
    prompt = chatty.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    free = chatty.generate(prompt, max_new_tokens=30, return_details=True).token_ids
    end = free[6]
    monkeypatch.setattr(llama_ext.Tokenizer, "eos_token_id", property(lambda _: end))
    ended = free[: free.index(end) + 1]

    def tokens(pieces: Any) -> list[Any]:
        return [piece.token_id for piece in pieces]

    assert tokens(chatty.chat(messages, stream=True, max_new_tokens=30)) == ended
    # A text of any other kind may hold that token.
    assert tokens(chatty.stream_generate(prompt, max_new_tokens=30)) == free
    assert tokens(chatty.session().stream_generate(prompt, max_new_tokens=30)) == free
    ends = [*chatty.eos_token_ids, end]
    assert tokens(chatty.session().stream_generate(prompt, max_new_tokens=30, eos_token_id=ends)) == ended


def test_chat_gives_one_answer_and_needs_a_template(chatty: Model, stories: Model, tiny: Model) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(llama_ext.OptionError, match="one answer"):
        chatty.chat(messages, num_return_sequences=2, temperature=1.0)
    with pytest.raises(llama_ext.OptionError, match="chat template"):
        stories.chat(messages)
    assert stories.chat(messages, chat_template=TEMPLATE, max_new_tokens=9) == chatty.chat(messages, max_new_tokens=9)
    with pytest.raises(llama_ext.OptionError, match="no tokenizer"):
        tiny.chat(messages)


# Being interrupted, being shared.


def test_ctrl_c_ends_a_generation_and_leaves_the_model_as_it_was(stories: Model) -> None:
    expected = stories.generate(PROMPTS, max_new_tokens=40)
    many = [[1, 10 + index % 50] for index in range(256)]
    threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        stories.generate(many, max_new_tokens=500, eos_token_id=[])
    assert stories.generate(PROMPTS, max_new_tokens=40) == expected


def test_threads_share_a_model(stories: Model) -> None:
    expected = [stories.generate(prompt, max_new_tokens=60) for prompt in PROMPTS]
    found: dict[int, str] = {}

    def work(index: int) -> None:
        for _ in range(5):
            found[index] = stories.generate(PROMPTS[index % len(PROMPTS)], max_new_tokens=60)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[index] for index in range(10)] == expected * 2
