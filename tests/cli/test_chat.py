"""`llama-ext chat` and the conversation behind it: from a pipe, and its commands."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import llama_ext
from command_line import Run, command
from llama_ext.cli.conversation import Conversation
from llama_ext.runtime.session import Session
from shared_data import LETTERS

Model = llama_ext.LlamaForCausalLM


@pytest.fixture(scope="module")
def talker(chat_model: Path) -> Model:
    """A model with a chat template."""
    return Model.from_pretrained(chat_model)


@pytest.fixture(scope="module")
def teller() -> Model:
    """A model without one."""
    return Model.from_pretrained(LETTERS)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens that sessions are given to read."""
    given: list[list[int]] = []
    original = Session.stream_generate

    def spy(self: Session, prompt: Any, **options: Any) -> Any:
        given.append(list(prompt))
        return original(self, prompt, **options)

    monkeypatch.setattr(Session, "stream_generate", spy)
    return given


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# The conversation.


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "top_k": 20, "seed": 7}])
def test_answers_are_those_of_the_library(options: dict[str, Any], talker: Model) -> None:
    conversation = Conversation(talker, {**options, "max_new_tokens": 60}, system="A street.")
    messages = [{"role": "system", "content": "A street."}]
    for turn, text in enumerate(["Who is there?", "Speak!", "Away"]):
        answer = "".join(conversation.say(text))
        given = {**options, "seed": options["seed"] + turn} if "seed" in options else options
        messages.append(user(text))
        expected = talker.chat(messages, **given, max_new_tokens=60)
        assert answer == expected
        messages.append({"role": "assistant", "content": expected})
        assert conversation.messages == messages


def test_what_was_read_once_is_not_read_again(talker: Model, read: list[list[int]]) -> None:
    conversation = Conversation(talker, {"temperature": 0, "max_new_tokens": 30})
    list(conversation.say("Who is there?"))
    list(conversation.say("Speak!"))
    whole = talker.tokenizer.apply_chat_template(conversation.messages[:-1])
    first = talker.tokenizer.apply_chat_template(conversation.messages[:1])
    assert read[0] == first
    # What follows the answer, every letter of which is a token.
    assert read[1] == whole[len(first) + len(conversation.messages[1]["content"]) :]
    assert conversation.last.prompt_tokens == len(whole)
    assert conversation.last.read_tokens == len(read[1])


def test_a_turn_without_a_template_ends_at_a_blank_line_and_is_kept(teller: Model, read: list[list[int]]) -> None:
    conversation = Conversation(teller, {"seed": 1})
    assert not conversation.is_templated
    first = "".join(conversation.say("ROMEO:"))
    assert "\n\n" not in first
    assert first == teller.generate("ROMEO:\n", seed=1, stop="\n\n").removeprefix("ROMEO:\n")
    second = "".join(conversation.say("JULIET:"))
    assert teller.tokenizer.decode(read[1]) == "JULIET:\n"
    text = f"ROMEO:\n{first}\n\nJULIET:\n"
    assert second == teller.generate(text, seed=2, stop="\n\n").removeprefix(text)


def test_another_answer_reads_one_token(talker: Model, read: list[list[int]]) -> None:
    conversation = Conversation(talker, {"temperature": 1.0, "seed": 1, "max_new_tokens": 40})
    first = "".join(conversation.say("Who is there?"))
    second = "".join(conversation.answer_again())
    assert second != first
    assert len(read[1]) == 1
    assert conversation.messages == [user("Who is there?"), {"role": "assistant", "content": second}]


def test_an_answer_that_is_cut_off_is_kept_as_far_as_it_went(talker: Model) -> None:
    conversation = Conversation(talker, {"temperature": 0, "max_new_tokens": 60})
    with closing(conversation.say("Who is there?")) as pieces:
        said = next(pieces) + next(pieces)
    assert conversation.messages == [user("Who is there?"), {"role": "assistant", "content": said}]
    messages = [*conversation.messages, user("Go on")]
    assert "".join(conversation.say("Go on")) == talker.chat(messages, temperature=0, max_new_tokens=60)


def test_an_answer_that_fails_changes_nothing(talker: Model) -> None:
    conversation = Conversation(talker, {"temperature": 0, "max_new_tokens": 20}, context=120)
    answer = "".join(conversation.say("Who is there?"))
    before = list(conversation.messages)
    with pytest.raises(llama_ext.ContextLengthError, match=r"room for 120.*/reset"):
        list(conversation.say("no " * 100))
    with pytest.raises(llama_ext.OptionError, match="surrogate"):
        list(conversation.say("\ud800"))
    assert conversation.messages == before
    assert "".join(conversation.answer_again()) == answer


def test_an_interrupt_before_the_first_word_takes_the_message_back(
    talker: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt
        yield

    conversation = Conversation(talker, {"temperature": 0, "max_new_tokens": 20})
    list(conversation.say("Who is there?"))
    before = list(conversation.messages)
    monkeypatch.setattr(Session, "stream_generate", interrupted)
    for again in (lambda: conversation.say("Speak"), conversation.answer_again):
        with pytest.raises(KeyboardInterrupt):
            list(again())
        assert conversation.messages == before
        assert not conversation.last.is_kept


def test_an_answer_never_leaves_the_context(teller: Model) -> None:
    conversation = Conversation(teller, {"temperature": 0, "max_new_tokens": 5000}, context=64)
    assert len("".join(conversation.say("ROMEO:"))) <= 64 - 7
    assert conversation.last.finish_reason in ("length", "stop")
    assert conversation.last.is_full == (conversation.last.finish_reason == "length")


def test_without_a_limit_an_answer_goes_to_its_end(talker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = talker.generation_defaults
    assert defaults.max_new_tokens == 256
    monkeypatch.setattr(talker, "generation_defaults", dataclasses.replace(defaults, max_new_tokens=None))
    conversation = Conversation(talker, {"temperature": 0})
    # Without the end of a turn nothing but the context is left.
    conversation._ends = []
    list(conversation.say("Who is there?"))
    assert conversation.last.prompt_tokens + conversation.last.new_tokens == 512
    assert conversation.last.is_full


def test_a_context_that_does_not_fit_into_memory_is_halved(talker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Model.session

    def small(self: Model, max_length: int | None = None, **options: Any) -> Session:
        assert max_length is not None
        if max_length > 300:
            raise llama_ext.OutOfMemoryError("too large")
        return original(self, max_length, **options)

    monkeypatch.setattr(Model, "session", small)
    assert Conversation(talker, {}).room == 256


def test_the_system_message_can_be_changed_and_survives_a_reset(talker: Model) -> None:
    conversation = Conversation(talker, {"temperature": 0, "max_new_tokens": 9})
    assert conversation.system is None
    list(conversation.say("Who?"))
    conversation.set_system("A street.")
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
    conversation.set_system("A garden.")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "A garden."}]


def test_a_conversation_survives_a_file(talker: Model, tmp_path: Path) -> None:
    options = {"temperature": 0, "max_new_tokens": 30}
    first = Conversation(talker, options, system="A street – in Verona.")
    list(first.say("Who is there?"))
    first.save(str(tmp_path / "saved.json"))
    second = Conversation(talker, options)
    second.load(str(tmp_path / "saved.json"))
    assert second.messages == first.messages
    assert list(second.say("Speak!")) == list(first.say("Speak!"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "other", "messages": []}',
        '{"format": "llama_ext conversation 1"}',
        '{"format": "llama_ext conversation 1", "messages": {}}',
        '{"format": "llama_ext conversation 1", "messages": ["hello"]}',
        '{"format": "llama_ext conversation 1", "messages": [{"role": "user"}]}',
        '{"format": "llama_ext conversation 1", "messages": [{"role": "king", "content": "x"}]}',
        '{"format": "llama_ext conversation 1", "messages": [{"role": "user", "content": 5}]}',
        '{"format": "llama_ext conversation 1", "messages": [{"role": "user", "content": ""}, {"role": "system"}]}',
        '{"format": "llama_ext conversation 1", "messages": [{"role": "user", "content": "a\\ud800"}]}',
    ],
)
def test_another_file_is_refused_and_changes_nothing(text: str, talker: Model, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(text)
    conversation = Conversation(talker, {}, system="A street.")
    with pytest.raises(llama_ext.FormatError, match=r"file\.json"):
        conversation.load(str(tmp_path / "file.json"))
    assert conversation.system == "A street."


def test_a_template_that_takes_no_system_message_says_so(chat_model: Path, tmp_path: Path, run: Run) -> None:
    for file in chat_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        + config["chat_template"]
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    result = run("chat", "--model", tmp_path, "--system", "A street.", stdin="Who?\n")
    assert result.code == 2
    assert "no system message" in result.err
    assert run("chat", "--model", tmp_path, "--max-new-tokens", 5, stdin="Who?\n").code == 0


# From a pipe.


def test_each_line_of_a_pipe_is_answered(run: Run, chat_model: Path, talker: Model) -> None:
    result = run("chat", "--model", chat_model, "--greedy", "--max-new-tokens", 40, stdin="Who is there?\n\nSpeak!")
    first = talker.chat([user("Who is there?")], temperature=0, max_new_tokens=40)
    messages = [user("Who is there?"), {"role": "assistant", "content": first}, user("Speak!")]
    second = talker.chat(messages, temperature=0, max_new_tokens=40)
    assert (result.code, result.out) == (0, f"{first}\n{second}\n")


@pytest.mark.parametrize(
    "wish",
    [{"num_beams": 2, "repetition_penalty": 1.1}, {"num_beams": 2000}, {"num_beams": 2, "early_stopping": "never"}],
)
def test_a_checkpoint_that_wishes_for_beams_answers_without(
    wish: dict[str, Any], run: Run, talker: Model, tmp_path: Path
) -> None:
    talker.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(wish))
    result = run("chat", "--model", tmp_path, "--max-new-tokens", 5, stdin="Who is there?")
    assert result.code == 0
    assert result.out.strip()
    assert result.err.count("asks for") == ("early_stopping" in wish)


def test_a_model_without_a_template_is_honest_about_it(run: Run) -> None:
    result = run("chat", "--seed", 1, stdin="ROMEO:\n")
    assert result.code == 0
    assert result.out.strip()
    assert "no chat template" in result.err
    assert result.err.count("\n") == 1


def test_commands_work_from_a_pipe(run: Run, chat_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "saved file.json"
    lines = [
        "/help",
        "/system",
        "/system A street.",
        "/system",
        "Who is there?",
        "/regen",
        f"/save {path}",
        "/reset",
        f"/load {path}",
        "//slash",
        f"/save {path}",
        "/exit",
        "never said",
    ]
    result = run("chat", "--model", chat_model, "--greedy", "--max-new-tokens", 9, "-v", stdin="\n".join(lines))
    assert result.code == 0
    assert result.out.count("\n") >= 3
    for part in (
        "/regen",
        "there is no system message",
        "system message: A street.",
        "saved to",
        "is forgotten",
        "3 messages",
        "tokens/s",
    ):
        assert part in result.err
    messages = json.loads(path.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "/slash"


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("/sing", 2, "no command /sing"),
        ("/save", 2, "needs the name of a file"),
        ("/load", 2, "needs the name of a file"),
        ("/load /no/such/file", 3, "/no/such/file"),
        (
            "/save /no/such/folder/file",
            1,
            "/no/such/folder/file: the directory /no/such/folder does not exist: create it first",
        ),
        ("/save a\0b", 2, "a NUL character"),
        ("/save ~a\0b", 2, "a NUL character"),
        ("/load ~a\0b", 3, "null byte"),
        ("/regen", 2, "nothing to answer"),
        ("x" * 2000, 4, "/reset"),
    ],
)
def test_a_mistake_ends_a_pipe(line: str, code: int, message: str, run: Run) -> None:
    result = run("chat", stdin=f"{line}\nROMEO:\n")
    assert (result.code, result.out) == (code, "")
    assert message in result.err


@pytest.mark.parametrize("handler", ["strict", "surrogateescape"])
def test_what_is_piped_in_must_be_text(handler: str) -> None:
    # The second is how Python reads standard input where LC_ALL is C or not set.
    done = subprocess.run(
        command("chat"),
        input=b"ROM\xff\n",
        env={**os.environ, "PYTHONIOENCODING": f"utf-8:{handler}"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, b"")
    assert b"llama-ext: standard input: this is not UTF-8 text: invalid start byte\n" in done.stderr


def test_a_system_message_must_be_text(run: Run, talker: Model) -> None:
    # What Python makes of an argument that is not UTF-8: it could be neither read by the model nor saved.
    result = run("chat", "--system", "\udcff", stdin="Who?\n")
    assert (result.code, result.out) == (2, "")
    assert "the system message has bytes that are not UTF-8: '\\udcff'" in result.err
    conversation = Conversation(talker, {}, system="A street.")
    with pytest.raises(llama_ext.OptionError, match="not UTF-8"):
        conversation.set_system("\ud800")
    assert conversation.system == "A street."


def test_a_byte_order_mark_before_the_first_line_is_no_part_of_it(run: Run) -> None:
    given = ("chat", "--greedy", "--max-new-tokens", 3)
    assert run(*given, stdin="\ufeffROMEO:\n") == run(*given, stdin="ROMEO:\n")


def test_an_answer_that_is_cut_says_so(run: Run, chat_model: Path) -> None:
    result = run("chat", "--model", chat_model, "--greedy", "--max-new-tokens", 3, stdin="Who is there?")
    assert "cut after 3 tokens: --max-new-tokens" in result.err
    # 16 tokens; the answer has eight or more, whatever the arithmetic of this machine.
    full = run("chat", "--context", 18, "--greedy", stdin="Now is the winter of our discontent")
    assert "context of 18 tokens is full" in full.err


def test_a_model_without_a_tokenizer_cannot_chat(run: Run, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((LETTERS / name).read_bytes())
    result = run("chat", "--model", tmp_path, stdin="Who?")
    assert result.code == 2
    assert "no tokenizer" in result.err


def test_ctrl_c_ends_a_pipe(slow_model: Path) -> None:
    arguments = ["--model", slow_model, "--max-new-tokens", 16000, "--stop", "@@@"]
    process = subprocess.Popen(
        command("chat", *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdin.write(b"Who is there?\n")
        process.stdin.flush()
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
