"""Tokenizers load as in transformers, save so that transformers reads them, and refuse what is not theirs."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from llama_ext.errors import FormatError, LimitError, LlamaExtError, OptionError, TokenIdError, UnsupportedError
from llama_ext.io.atomic import atomic_write
from llama_ext.limits import Limits
from llama_ext.runtime.tokenizer import Tokenizer
from shared_data import SHARED, requires_shared

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "ab"}]


def small_backend() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", "a", "b", "[", "]", " ", "u", "s", "e", "r"]
    backend = tokenizers.Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return backend


def write(folder: Path, config: dict[str, Any] | None = None, **change: Any) -> Path:
    """A model directory with a small tokenizer.json."""
    data = json.loads(small_backend().to_str())
    data.update(change)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# -- real files -----------------------------------------------------------------------------------------------------


@requires_shared
def test_stories260k_adds_bos() -> None:
    tokenizer = Tokenizer.from_pretrained(SHARED / "stories260K")
    assert tokenizer.encode("Once upon a time") == [1, 403, 407, 261, 378]
    assert tokenizer.encode("Once upon a time", add_special_tokens=False) == [403, 407, 261, 378]
    assert tokenizer.decode([1, 403, 407, 261, 378]) == "Once upon a time"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token_id is None
    assert len(tokenizer) == tokenizer.vocab_size == 512
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.model_max_length == 512


@requires_shared
def test_a_tokenizer_json_that_adds_no_bos_is_believed() -> None:
    tokenizer = Tokenizer.from_pretrained(SHARED / "llama2-tokenizer")
    # transformers 5.23 gives the same.
    assert tokenizer.encode("Hello  world") == [15043, 259, 11526]
    assert tokenizer.model_max_length is None


@requires_shared
def test_a_tokenizer_model_adds_bos_as_llama_does() -> None:
    tokenizer = Tokenizer.from_pretrained(SHARED / "llama2-tokenizer" / "tokenizer.model")
    assert tokenizer.encode("Hello  world") == [1, 15043, 29871, 3186]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


@requires_shared
@pytest.mark.parametrize("source", ["stories260K", "llama2-tokenizer", "llama2-tokenizer/tokenizer.model"])
def test_a_saved_tokenizer_is_the_same_tokenizer(source: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(SHARED / source)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    for text in ("", " ", "Hello  world\n", "naïve 日本 🎉", "</s> x <s>", "\u2581a"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert again.apply_chat_template(MESSAGES) == tokenizer.apply_chat_template(MESSAGES)
    assert (again.bos_token_id, again.pad_token_id, again.model_max_length) == (1, None, tokenizer.model_max_length)


@requires_shared
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_survives_a_round_trip(text: str) -> None:
    tokenizer = Tokenizer.from_pretrained(SHARED / "stories260K")
    if not any(symbol in text for symbol in ("<s>", "</s>", "<unk>")):
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


# -- special tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CONFIG, [3]),
        (CONFIG | {"add_bos_token": True}, [1, 3]),
        (CONFIG | {"add_bos_token": True, "add_eos_token": True}, [1, 3, 2]),
        (CONFIG | {"add_bos_token": False}, [3]),
        ({"add_bos_token": True}, [3]),  # there is no BOS to add
    ],
)
def test_without_a_post_processor_the_config_decides(
    config: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    assert Tokenizer.from_pretrained(write(tmp_path, config)).encode("a") == expected


def test_the_post_processor_decides_when_the_config_says_nothing(tmp_path: Path) -> None:
    backend = small_backend()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_pretrained(tmp_path).encode("a") == [3, 2]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"add_bos_token": True}))
    assert Tokenizer.from_pretrained(tmp_path).encode("a") == [1, 3]


def test_special_tokens_may_be_written_as_objects(tmp_path: Path) -> None:
    eos = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False}
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, {"bos_token": "<s>", "eos_token": eos}))
    assert tokenizer.eos_token_id == 2
    assert tokenizer.encode("a</s>b") == [3, 2, 4]
    assert tokenizer.decode([3, 2, 4]) == "ab"
    assert tokenizer.decode([3, 2, 4], skip_special_tokens=False) == "a</s>b"


def test_the_map_of_special_tokens_fills_what_the_config_leaves_out(tmp_path: Path) -> None:
    write(tmp_path, {"eos_token": None})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, None)


def test_a_special_token_that_the_vocabulary_lacks_is_added_behind_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, CONFIG | {"pad_token": "<pad>"}))
    assert (tokenizer.pad_token_id, tokenizer.vocab_size, len(tokenizer)) == (12, 12, 13)
    assert tokenizer.decode([3, 12]) == "a"


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    backend = small_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_pretrained(tmp_path).encode("abab") == [3, 4, 3, 4]
    assert Tokenizer.from_tokenizers(backend).encode("abab") == [3, 4, 3, 4]
    assert backend.encode("abab").ids != [3, 4, 3, 4]  # the caller's own is not changed


def test_tokens_added_to_a_sentencepiece_model_keep_their_ids(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("needs the shared test data (folder shared/ beside the repository)")
    shutil.copy(SHARED / "llama2-tokenizer" / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 32001, "<|im_start|>": 32000}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("<|im_start|>", add_special_tokens=False) == [32000]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 32005}))
    with pytest.raises(FormatError, match="has the id 32005, but its place is 32000"):
        Tokenizer.from_pretrained(tmp_path)


# -- conversations --------------------------------------------------------------------------------------------------


def templated(**config: Any) -> Tokenizer:
    return Tokenizer.from_tokenizers(
        small_backend(), bos_token="<s>", eos_token="</s>", add_bos_token=True, chat_template=TEMPLATE, **config
    )


def test_a_chat_template_gives_ids_with_one_bos() -> None:
    tokenizer = templated()
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text == "<s>[user] ab</s>"
    ids = tokenizer.apply_chat_template(MESSAGES)
    assert ids == [1, 5, 8, 9, 10, 11, 6, 7, 3, 4, 2]
    assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_named_chat_templates_are_chosen_as_in_transformers() -> None:
    tokenizer = templated()
    tokenizer.chat_template = {"default": "a", "tool_use": "b", "other": "e"}
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "a"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{}], tokenize=False) == "b"
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="other", tokenize=False) == "e"
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="{{ 1 }}", tokenize=False) == "1"
    tokenizer.chat_template = {"one": "a", "two": "b"}
    with pytest.raises(OptionError, match=r"\['one', 'two'\]"):
        tokenizer.apply_chat_template(MESSAGES)


def test_variables_reach_the_template_and_options_of_transformers_that_do_not_work_say_so() -> None:
    tokenizer = templated()
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="{{ mood }}", mood="a", tokenize=False) == "a"
    with pytest.raises(OptionError, match="return_tensors is not supported"):
        tokenizer.apply_chat_template(MESSAGES, return_tensors="pt")
    assert tokenizer.apply_chat_template(MESSAGES, return_dict=False)


def test_a_model_without_a_chat_template_says_so() -> None:
    with pytest.raises(OptionError, match="no chat template"):
        Tokenizer.from_tokenizers(small_backend()).apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    "config",
    [{"chat_template": TEMPLATE}, {"chat_template": [{"name": "default", "template": TEMPLATE}]}],
)
def test_a_chat_template_is_read_from_the_config(config: dict[str, Any], tmp_path: Path) -> None:
    assert Tokenizer.from_pretrained(write(tmp_path, config)).chat_template == TEMPLATE


def test_a_chat_template_file_goes_before_the_config(tmp_path: Path) -> None:
    write(tmp_path, {"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert Tokenizer.from_pretrained(tmp_path).chat_template == TEMPLATE


def test_saving_replaces_the_templates_of_an_earlier_save(tmp_path: Path) -> None:
    tokenizer = templated()
    tokenizer.chat_template = {"default": "a", "tool_use": "b", "../escape": "c"}
    tokenizer.save_pretrained(tmp_path / "model")
    assert Tokenizer.from_pretrained(tmp_path / "model").chat_template == tokenizer.chat_template
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]  # a name from a file stays inside the folder
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    assert Tokenizer.from_pretrained(tmp_path / "model").chat_template is None


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a\ud800", r"the chat template 'default' has half of a surrogate pair .* at index 1"),
        ({"default": "a", "b\ud800": "c"}, "surrogate"),
        (3, "must be a text, a dictionary of named ones or None, got 3"),
        ({"default": 3}, "must be a text"),
        ("x" * (2**20 + 1), "has 1048577 bytes"),
    ],
    ids=["half", "half of a name", "number", "named number", "long"],
)
def test_a_chat_template_that_no_file_can_hold_is_refused_before_anything_is_written(
    template: Any, words: str, tmp_path: Path
) -> None:
    tokenizer = templated()
    tokenizer.chat_template = template
    with pytest.raises(LlamaExtError, match=words):
        tokenizer.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- characters -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=60))
def test_characters_survive_a_round_trip_exactly(text: str) -> None:
    tokenizer = Tokenizer.characters(text)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert len(tokenizer) == len(set(text))
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", [" ", "\n", "  a \n\n b\t", "<unk></s><0x0A>", "e\u0301é\ufffd\u2581", "\x00\r\n"])
def test_characters_that_mean_something_elsewhere_are_characters_here(text: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.characters(text, unknown="replace")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text


def test_ids_of_characters_follow_their_order() -> None:
    assert Tokenizer.characters("hello").encode("hello") == [1, 0, 2, 2, 3]
    assert Tokenizer.characters(["o", "l", "h", "e"]).encode("hello") == [1, 0, 2, 2, 3]


def test_an_unknown_character_raises_by_default_and_after_a_save(tmp_path: Path) -> None:
    tokenizer = Tokenizer.characters("abc")
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, Tokenizer.from_pretrained(tmp_path)):
        with pytest.raises(OptionError, match="knows 3 characters, and not '!', 'x'"):
            each.encode("ax!")
        with pytest.raises(OptionError, match="'x'"):
            each.encode_batch(["a", "x"])


def test_an_unknown_character_can_be_replaced(tmp_path: Path) -> None:
    tokenizer = Tokenizer.characters("abc", unknown="replace")
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, Tokenizer.from_pretrained(tmp_path)):
        assert len(each) == 4
        assert each.decode(each.encode("axxb")) == "a\ufffd\ufffdb"


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("", "raise"),
        (["ab"], "raise"),
        ("\ud800", "raise"),
        ("a", "skip"),
        (3, "raise"),
        (None, "raise"),
        ([["a"]], "raise"),
        (b"a", "raise"),
    ],
)
def test_characters_that_are_none_are_refused(text: Any, unknown: Any) -> None:
    with pytest.raises(OptionError):
        Tokenizer.characters(text, unknown=unknown)


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 12, 10**6, 2**32, 2**70])
def test_an_id_outside_the_vocabulary_names_both(token: int) -> None:
    tokenizer = Tokenizer.from_tokenizers(small_backend())
    with pytest.raises(TokenIdError, match=rf"token id {token} .* 0 <= id < 12"):
        tokenizer.decode([3, token])
    with pytest.raises(TokenIdError):
        tokenizer.id_to_token(token)


@pytest.mark.parametrize("token", ["3", 3.0, None, [3], True])
def test_an_id_that_is_not_an_integer_is_refused(token: Any) -> None:
    with pytest.raises(OptionError, match="must be integers"):
        Tokenizer.from_tokenizers(small_backend()).decode([token])


def test_an_id_without_end_is_outside_the_vocabulary() -> None:
    with pytest.raises(TokenIdError, match="0 <= id < 12"):
        Tokenizer.from_tokenizers(small_backend()).decode([10**5000])


def test_ids_may_be_numpy_integers() -> None:
    assert Tokenizer.from_tokenizers(small_backend()).decode(np.array([3, 4], np.int32)) == "ab"


@pytest.mark.parametrize(("text", "expected"), [(b"a", "got bytes"), (["a"], "encode_batch"), ("a\ud800", "index 1")])
def test_what_is_not_text_is_refused(text: Any, expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        Tokenizer.from_tokenizers(small_backend()).encode(text)


@pytest.mark.parametrize("texts", ["a", None, 3, [None], ["a\ud800"]])
def test_what_is_no_list_of_texts_is_refused(texts: Any) -> None:
    with pytest.raises(OptionError, match=r"^encode"):
        Tokenizer.from_tokenizers(small_backend()).encode_batch(texts)


@pytest.mark.parametrize(("token", "words"), [(3, "a str, got int"), (None, "a str"), ("\ud800", "surrogate")])
def test_a_token_to_look_up_is_a_text(token: Any, words: str) -> None:
    with pytest.raises(OptionError, match=f"token_to_id: .*{words}"):
        Tokenizer.from_tokenizers(small_backend()).token_to_id(token)


@pytest.mark.parametrize("path", [None, 3, b"demo"])
def test_what_is_no_path_holds_no_tokenizer(path: Any) -> None:
    with pytest.raises(OptionError, match=r"the path of a tokenizer must be a str or an os\.PathLike, got"):
        Tokenizer.from_pretrained(path)


def test_what_is_no_tokenizer_is_not_wrapped() -> None:
    for wrong in ("x", None, Tokenizer.from_tokenizers(small_backend())):
        with pytest.raises(OptionError, match=r"expected a tokenizers\.Tokenizer, got"):
            Tokenizer.from_tokenizers(wrong)  # type: ignore[arg-type]
    shell = tokenizers.CharBPETokenizer({"a": 0}, [])
    assert type(Tokenizer.from_tokenizers(shell).backend) is tokenizers.Tokenizer  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token", "unk_token"])
@pytest.mark.parametrize("token", [3, "", "\ud800", ["<s>"]])
def test_a_special_token_is_a_text(name: str, token: Any) -> None:
    options: dict[str, Any] = {name: token, "add_bos_token": True, "add_eos_token": True}
    with pytest.raises(OptionError, match="special token"):
        Tokenizer.from_tokenizers(small_backend(), **options)


class _Letters:
    def pre_tokenize(self, text: Any) -> None:
        text.split(lambda _, part: [part])


def test_a_part_written_in_python_can_be_neither_copied_nor_saved(tmp_path: Path) -> None:
    backend: Any = small_backend()
    tokenizer = Tokenizer.from_tokenizers(backend)
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(_Letters())
    with pytest.raises(OptionError, match=r"cannot be copied: .*Custom PreTokenizer"):
        Tokenizer.from_tokenizers(backend)
    tokenizer.backend = backend
    with pytest.raises(OptionError, match=r"cannot be written: .*Custom PreTokenizer"):
        tokenizer.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("token", ["$A", "$B", "$0", "$", "a:1", ":", "<s:0>"])
def test_a_special_token_may_look_like_a_part_of_a_template(token: str, tmp_path: Path) -> None:
    for other in ("</s>", token):
        tokenizer = Tokenizer.from_tokenizers(
            small_backend(), bos_token=token, eos_token=other, add_bos_token=True, add_eos_token=True
        )
        tokenizer.save_pretrained(tmp_path)
        for each in (tokenizer, Tokenizer.from_pretrained(tmp_path)):
            assert each.encode("ab") == [12, 3, 4, 2 if other == "</s>" else 12]
            assert each.encode("") == [12, 2 if other == "</s>" else 12]


def test_a_template_names_its_tokens_by_themselves() -> None:
    # Where llama.cpp's converter looks for them.
    tokenizer = Tokenizer.from_tokenizers(small_backend(), bos_token="<s>", add_bos_token=True)
    first = json.loads(tokenizer.backend.to_str())["post_processor"]["single"][0]
    assert first == {"SpecialToken": {"id": "<s>", "type_id": 0}}


def test_a_batch_gives_what_each_text_gives() -> None:
    tokenizer = templated()
    texts = ["a", "", "ab</s>", "b" * 100]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    with pytest.raises(OptionError, match="Use encode"):
        tokenizer.encode_batch("ab")


def test_a_path_without_a_tokenizer_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"expected tokenizer\.json or tokenizer\.model"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(FormatError, match="no such file"):
        Tokenizer.from_pretrained(tmp_path / "missing")


def test_gguf_files_are_read_as_such_and_tiktoken_files_named(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00")
    for path in (gguf, tmp_path):
        with pytest.raises(FormatError, match="a GGUF file has at least 24 bytes, this one has 8"):
            Tokenizer.from_pretrained(path)
    tiktoken = tmp_path / "tokenizer.model"
    tiktoken.write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(UnsupportedError, match="tiktoken"):
        Tokenizer.from_pretrained(tiktoken)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"{}",
        lambda data: b"[" * 100_000,
        lambda data: data.replace(b'"type":"BPE"', b'"type":"XYZ"'),
        lambda data: data.replace(b'"merges":[]', b'"merges":[["a","q"]]'),
        lambda data: b"\xff\xfe" + data,
    ],
)
def test_a_damaged_tokenizer_json_is_a_format_error(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(spoil(small_backend().to_str().encode()))
    with pytest.raises(FormatError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert caught.value.path == str(path)


def test_a_tokenizer_json_with_any_damage_is_a_tokenizer_or_a_typed_error(tmp_path: Path) -> None:
    backend = small_backend()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    data = backend.to_str().encode()
    choose = random.Random(0)
    path = tmp_path / "tokenizer.json"
    for _ in range(1000):
        damaged = bytearray(data)
        for _ in range(choose.choice([1, 2, 4])):
            damaged[choose.randrange(len(data))] = choose.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(LlamaExtError):
            tokenizer = Tokenizer.from_pretrained(path)
            tokenizer.decode(tokenizer.encode("ab </s> \u00e9"))


def test_a_normalisation_table_that_tokenizers_would_walk_out_of_is_a_format_error(tmp_path: Path) -> None:
    table = {"type": "Precompiled", "precompiled_charsmap": "BAAAAGFiY2Q="}
    with pytest.raises(FormatError, match="its trie has 4 bytes"):
        Tokenizer.from_pretrained(write(tmp_path, normalizer={"type": "Sequence", "normalizers": [table]}))
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("precompiled_charsmap", "precompiled\\u005fcharsmap"))
    with pytest.raises(FormatError, match="its trie has 4 bytes"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_post_processor_that_adds_an_unknown_id_is_a_format_error(tmp_path: Path) -> None:
    backend = small_backend()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 9999)])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FormatError, match="adds the id 9999"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": 3},
        {"add_bos_token": "yes"},
        {"chat_template": 3},
        {"chat_template": [{}]},
        {"extra_special_tokens": 3},
    ],
)
def test_a_config_with_a_wrong_type_names_the_field(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        Tokenizer.from_pretrained(write(tmp_path, config))
    assert caught.value.field == next(iter(config))


def test_files_and_vocabularies_beyond_the_limits_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(LimitError, match="12 tokens, the limit is 5"):
        Tokenizer.from_pretrained(tmp_path, limits=Limits(vocabulary=5))
    with pytest.raises(LimitError, match=r"larger than 100 bytes \(Limits.tokenizer_json_bytes\)"):
        Tokenizer.from_pretrained(tmp_path, limits=Limits(tokenizer_json_bytes=100))


def test_byte_level_tokenizers_round_trip(tmp_path: Path) -> None:
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer.from_tokenizers(backend, bos_token="<|begin_of_text|>", add_bos_token=True)
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    for text in ("", "  a\n", "naïve 日本 🎉"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode(text)[0] == again.bos_token_id == 256
        assert again.decode(again.encode(text)) == text


def test_importing_it_loads_neither_tokenizers_nor_jinja2() -> None:
    code = (
        "import sys, llama_ext.runtime.tokenizer, llama_ext.runtime.sentencepiece_model;"
        "sys.exit(any(m in sys.modules for m in ('tokenizers', 'jinja2')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- atomic saves ---------------------------------------------------------------------------------------------------


def test_an_atomic_write_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_atomic_write_replaces_a_link_and_not_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"shared")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"x")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == b"x"
    assert (tmp_path / "target").read_bytes() == b"shared"
