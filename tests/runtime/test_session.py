"""Sessions: a KV cache to go on with, go back in, copy, save and load, bit for bit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import llama_ext

Model = llama_ext.LlamaForCausalLM
IDS = [1, 40, 47, 26, 37, 43, 38, 28, 26, 37, 29]


def exact(logits: Any, expected: Any) -> None:
    np.testing.assert_array_equal(logits, expected)


# Appending.


@pytest.mark.parametrize("cuts", [[11], [1] * 11, [5, 6], [10, 1], [1, 3, 7]])
def test_logits_do_not_depend_on_how_a_text_is_cut(cuts: list[int], stories: Model) -> None:
    expected = stories([IDS])[0]
    session = stories.session(max_length=20)
    at = 0
    for cut in cuts:
        logits = session.append(IDS[at : at + cut])
        at += cut
        assert logits.shape == (stories.config.vocab_size,)
        exact(logits, expected[at - 1])
    assert session.tokens == IDS
    assert session.length == len(session) == 11


def test_logits_of_all_new_tokens_or_of_none_can_be_asked_for(stories: Model) -> None:
    session = stories.session()
    assert session.append(IDS[:4], logits="none").shape == (0, stories.config.vocab_size)
    exact(session.append(np.array(IDS[4:], dtype=np.uint16), logits="all"), stories([IDS])[0, 4:])
    assert session.max_length == 512


def test_a_session_can_be_filled_to_its_end_and_not_beyond(tiny: Model) -> None:
    session = tiny.session(max_length=5)
    session.append([1, 2, 3])
    with pytest.raises(llama_ext.ContextLengthError, match=r"3 tokens.*room for 5.*3 more"):
        session.append([4, 5, 6])
    assert session.tokens == [1, 2, 3]
    exact(session.append([4, 5]), tiny([[1, 2, 3, 4, 5]])[0, -1])


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([], llama_ext.OptionError),
        (np.zeros(0, dtype=np.int32), llama_ext.OptionError),
        ([67], llama_ext.TokenIdError),
        ([-1], llama_ext.TokenIdError),
        ([1.5], llama_ext.DTypeError),
        ("text", llama_ext.DTypeError),
        (np.zeros((1, 2), dtype=int), llama_ext.ShapeError),
    ],
)
def test_wrong_ids_are_an_error_and_change_nothing(ids: Any, error: type[Exception], tiny: Model) -> None:
    session = tiny.session()
    session.append([1, 2])
    with pytest.raises(error) as found:
        session.append(ids)
    assert type(found.value) is error
    exact(session.append([3]), tiny([[1, 2, 3]])[0, -1])


def test_only_the_named_logits_can_be_asked_for(tiny: Model) -> None:
    with pytest.raises(llama_ext.OptionError, match="'last', 'all' or 'none', got 'first'"):
        tiny.session().append([1], logits="first")  # type: ignore[arg-type]


@pytest.mark.parametrize("max_length", [0, -1, 1.5, True])
def test_a_wrong_length_is_an_option_error(max_length: Any, tiny: Model) -> None:
    with pytest.raises(llama_ext.OptionError, match="max_length"):
        tiny.session(max_length=max_length)


def test_a_session_beyond_the_context_is_refused(tiny: Model) -> None:
    with pytest.raises(llama_ext.ContextLengthError, match=r"49.*48"):
        tiny.session(max_length=49)


# Rewinding and forking.


def test_after_a_rewind_the_session_is_as_if_it_had_never_gone_on(tiny: Model) -> None:
    session = tiny.session()
    session.append([1, 2, 3, 4, 5, 6])
    session.rewind(3)
    assert session.tokens == [1, 2, 3]
    exact(session.append([9, 8]), tiny([[1, 2, 3, 9, 8]])[0, -1])
    session.rewind(0)
    exact(session.append([7]), tiny([[7]])[0, -1])
    for wrong in (-1, 2, 1.0, True):
        with pytest.raises(llama_ext.OptionError, match="rewind"):
            session.rewind(wrong)  # type: ignore[arg-type]


def test_a_fork_goes_its_own_way(tiny: Model) -> None:
    session = tiny.session(max_length=10)
    session.append([1, 2, 3])
    fork = session.fork()
    longer = session.fork(max_length=20)
    exact(fork.append([4]), tiny([[1, 2, 3, 4]])[0, -1])
    exact(session.append([5]), tiny([[1, 2, 3, 5]])[0, -1])
    exact(longer.append([6]), tiny([[1, 2, 3, 6]])[0, -1])
    assert (fork.max_length, longer.max_length) == (10, 20)
    with pytest.raises(llama_ext.ContextLengthError, match="no room for the 4 tokens"):
        session.fork(max_length=3)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_session_names_fork_and_save_instead_of_sharing_its_cache(copied: Any, tiny: Model) -> None:
    session = tiny.session(max_length=5)
    session.append([1, 2])
    with pytest.raises(
        llama_ext.UnsupportedError, match=r"a Session cannot be pickled or copied: fork\(\).*save\(path\)"
    ):
        copied(session)
    assert session.tokens == [1, 2]


# Generating.


def test_a_session_goes_on_as_generate_does(stories: Model) -> None:
    session = stories.session()
    found = session.generate("Once upon a time", max_new_tokens=20)
    assert "Once upon a time" + found == stories.generate("Once upon a time", max_new_tokens=20)
    # The session holds everything, the last token included.
    prompt = stories.tokenizer.encode("Once upon a time")
    assert session.tokens == stories.generate(prompt, max_new_tokens=20)


def test_turn_after_turn_the_session_keeps_what_was_said(stories: Model) -> None:
    session = stories.session()
    first = session.generate([1, 40], max_new_tokens=7)
    held = session.tokens
    second = session.generate([47], max_new_tokens=5)
    expected = stories.generate([*held, 47], max_new_tokens=5, return_details=True)
    assert second == expected.text
    assert session.tokens == [*held, 47, *expected.token_ids]
    assert first


def test_a_stream_that_is_left_keeps_the_tokens_of_its_pieces(stories: Model) -> None:
    session = stories.session()
    stream = session.stream_generate([1, 40], max_new_tokens=50)
    tokens = [next(stream).token_id for _ in range(3)]
    stream.close()  # type: ignore[attr-defined]
    assert session.tokens == [1, 40, *tokens]
    exact(session.append([5]), stories([[1, 40, *tokens, 5]])[0, -1])


def test_a_prompt_with_nothing_to_follow_comes_into_the_session_that_it_was_for(tiny: Model) -> None:
    session = tiny.session(max_length=20)
    stream = session.stream_generate([1, 2, 3], max_new_tokens=0)
    session.append([4, 5])
    with pytest.raises(llama_ext.OptionError, match="the session was changed"):
        next(stream)
    assert session.tokens == [4, 5]


@pytest.mark.parametrize("room", [3, 20])
def test_a_prompt_with_nothing_to_follow_is_kept(room: int, tiny: Model) -> None:
    session = tiny.session(max_length=room)
    options: dict[str, Any] = {} if room == 3 else {"max_new_tokens": 0}
    (piece,) = session.stream_generate([1, 2, 3], **options)
    assert (piece.token_id, piece.finish_reason) == (None, "length")
    assert session.tokens == [1, 2, 3]
    if room > 3:
        exact(session.append([5]), tiny([[1, 2, 3, 5]])[0, -1])


def test_a_stream_that_is_left_adds_nothing_to_a_session_that_others_have_changed(tiny: Model) -> None:
    session = tiny.session()
    stream = session.stream_generate([1, 2], max_new_tokens=5)
    next(stream)
    next(stream)
    session.rewind(0)
    session.append([9] * 3)
    assert session.length == 3
    stream.close()  # type: ignore[attr-defined]
    assert session.tokens == [9] * 3
    stream = session.stream_generate([4], max_new_tokens=5)
    drawn = next(stream).token_id
    session.append([drawn])
    with pytest.raises(llama_ext.OptionError, match="the session was changed"):
        next(stream)
    assert session.tokens == [9, 9, 9, 4, drawn]


def test_an_empty_text_is_no_bos_token_in_the_middle_of_a_session() -> None:
    tokenizer = llama_ext.Tokenizer.train("abc", kind="char", bos_token="<s>")
    config = llama_ext.LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None
    )
    session = Model(config, tokenizer).session(max_length=8)
    session.generate("", max_new_tokens=1)
    assert session.tokens[0] == tokenizer.bos_token_id
    with pytest.raises(llama_ext.OptionError, match=r"the prompt is empty.*at least one character"):
        session.generate("", max_new_tokens=1)
    assert session.length == 2


def test_a_session_bounds_what_is_generated_in_it(tiny: Model) -> None:
    session = tiny.session(max_length=8)
    session.append([1, 2, 3])
    with pytest.raises(llama_ext.ContextLengthError, match="room for 8"):
        session.stream_generate([4], max_new_tokens=5)
    assert len(list(session.stream_generate([4]))) == 4
    assert session.length == 8
    with pytest.raises(llama_ext.OptionError, match="one prompt"):
        session.stream_generate([[4], [5]])


def test_a_session_does_not_search_with_beams(stories: Model) -> None:
    session = stories.session()
    for call in (session.generate, session.stream_generate):
        with pytest.raises(llama_ext.UnsupportedError, match="num_beams=1"):
            call([1, 40], num_beams=2)
    assert session.length == 0


# Saving and loading.


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_session_goes_on_bit_for_bit(dtype: str, kv_dtype: Any, stories: Model, tmp_path: Path) -> None:
    stories.save_pretrained(tmp_path / "model")
    model = Model.from_pretrained(tmp_path / "model", dtype=dtype)
    session = model.session(max_length=30, kv_dtype=kv_dtype)
    session.append(IDS[:8])
    session.save(tmp_path / "s.safetensors")
    # Another process would load the weights again, too.
    again = Model.from_pretrained(tmp_path / "model", dtype=dtype).load_session(tmp_path / "s.safetensors")
    assert (again.tokens, again.max_length, again.kv_dtype) == (IDS[:8], 30, kv_dtype)
    exact(again.append(IDS[8:]), session.append(IDS[8:]))


@pytest.mark.parametrize("length", [0, 1, 48])
def test_a_session_of_any_length_can_be_saved(length: int, tiny: Model, tmp_path: Path) -> None:
    session = tiny.session()
    if length:
        session.append(np.arange(length))
    session.save(tmp_path / "s")
    again = tiny.load_session(tmp_path / "s")
    assert again.tokens == list(range(length))
    if length < 48:
        exact(again.append([5]), session.append([5]))


def test_a_save_reads_each_layer_once_for_the_checksum_and_once_for_the_file(tiny: Model, tmp_path: Path) -> None:
    session = tiny.session()
    session.append([1, 2, 3])
    layers: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

        def read_layer(self, layer: int) -> Any:
            layers.append(layer)
            return core.read_layer(layer)

    core, session._core = session._core, Watched()  # type: ignore[assignment]
    session.save(tmp_path / "s")
    assert layers == [0, 1, 0, 1]
    assert tiny.load_session(tmp_path / "s").tokens == [1, 2, 3]


def test_a_session_may_get_more_room_when_it_is_loaded(tiny: Model, tmp_path: Path) -> None:
    session = tiny.session(max_length=4)
    session.append([1, 2, 3])
    session.save(tmp_path / "s")
    assert tiny.load_session(tmp_path / "s", max_length=40).max_length == 40
    with pytest.raises(llama_ext.ContextLengthError, match="no room"):
        tiny.load_session(tmp_path / "s", max_length=2)


def test_the_cache_is_saved_in_its_own_dtype(tiny: Model, tmp_path: Path) -> None:
    for kv_dtype, size in (("float32", 4), ("bfloat16", 2)):
        session = tiny.session(kv_dtype=kv_dtype)  # type: ignore[arg-type]
        session.append([1, 2, 3])
        session.save(tmp_path / kv_dtype)
        with safe_open(tmp_path / kv_dtype, "np") as file:
            assert set(file.keys()) == {"layers.0.k", "layers.0.v", "layers.1.k", "layers.1.v"}
            assert file.get_slice("layers.1.v").get_shape() == [3, 2, 6]
        assert (tmp_path / kv_dtype).stat().st_size < 4 * 36 * size + 1000


def test_a_session_of_another_model_is_refused(tiny: Model, tmp_path: Path) -> None:
    tiny.session().save(tmp_path / "s")
    others = [
        Model(tiny.config, seed=4),
        Model(tiny.config, seed=3, dtype="bfloat16"),
        Model(llama_ext.LlamaConfig.from_dict({**tiny.config.to_dict(), "rms_norm_eps": 1e-5}), seed=3),
    ]
    for other in others:
        with pytest.raises(llama_ext.FormatError, match="another model"):
            other.load_session(tmp_path / "s")


def test_a_damaged_session_is_a_format_error(tiny: Model, tmp_path: Path) -> None:
    session = tiny.session()
    session.append([1, 2, 3])
    path = tmp_path / "s"
    session.save(path)
    whole = path.read_bytes()
    for end in (*range(64), len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(llama_ext.LlamaExtError):
            tiny.load_session(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    changes: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({}, {"format": "x"}),
        ({}, {"tokens": "[1,2]"}),
        ({}, {"tokens": "[1,2,67]"}),
        ({}, {"tokens": "[1,2,true]"}),
        ({}, {"tokens": "[1,2,1.0]"}),
        ({}, {"tokens": "[" * 100_000}),
        ({}, {"tokens": "1"}),
        ({}, {"max_length": "2"}),
        ({}, {"max_length": "-1"}),
        ({}, {"max_length": "9" * 5000}),
        ({}, {"kv_dtype": "float16"}),
        ({}, {"kv_dtype": "bfloat16"}),
        ({"layers.0.k": tensors["layers.0.k"][:2]}, {}),
        ({"layers.0.k": tensors["layers.0.k"].astype(np.float64)}, {}),
        ({"layers.2.k": tensors["layers.0.k"]}, {}),
    ]
    for tensor, entry in changes:
        save_file({**tensors, **tensor}, path, metadata={**metadata, **entry})
        with pytest.raises(llama_ext.FormatError):
            tiny.load_session(path)
    del tensors["layers.1.v"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(llama_ext.FormatError, match=r"layers\.1\.v"):
        tiny.load_session(path)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_a_single_flipped_bit_anywhere_in_a_session_is_noticed(kv_dtype: str, tiny: Model, tmp_path: Path) -> None:
    session = tiny.session(kv_dtype=kv_dtype)
    session.append([1, 2, 3])
    path = tmp_path / "s"
    session.save(path)
    whole = path.read_bytes()
    for index in range(len(whole)):
        damaged = bytearray(whole)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(damaged)
        try:
            loaded = tiny.load_session(path)
        except llama_ext.LlamaExtError:
            continue
        # Blanks of the header may be other blanks: what was saved is unchanged.
        assert loaded.tokens == [1, 2, 3], index
        assert loaded.max_length == session.max_length, index
        assert (loaded.append([4]) == tiny.session(kv_dtype=kv_dtype).append([1, 2, 3, 4])).all(), index
    path.write_bytes(whole)
    assert tiny.load_session(path).tokens == [1, 2, 3]
    payload = bytearray(whole)
    payload[-1] ^= 1
    path.write_bytes(payload)
    with pytest.raises(llama_ext.FormatError, match=r"s: damaged since it was saved: the checksum"):
        tiny.load_session(path)


def test_a_session_of_an_earlier_version_is_refused_and_told_apart(tiny: Model, tmp_path: Path) -> None:
    tiny.session().save(tmp_path / "s")
    with safe_open(tmp_path / "s", "np") as file:
        metadata = file.metadata()
    del metadata["crc32"]
    save_file(load_file(tmp_path / "s"), tmp_path / "s", metadata={**metadata, "format": "llama_ext session 1"})
    with pytest.raises(llama_ext.FormatError, match=r"saved by an earlier version.*Run its text again"):
        tiny.load_session(tmp_path / "s")


def test_a_session_in_a_missing_directory_names_both(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="the directory nodir does not exist") as caught:
        tiny.session().save("nodir/x.session")
    assert caught.value.filename == "nodir/x.session"


@pytest.mark.parametrize("path", [None, 3, b"a"])
def test_what_is_no_path_holds_no_session(path: Any, tiny: Model) -> None:
    with pytest.raises(llama_ext.OptionError, match=r"the path of a session must be a str or an os\.PathLike, got"):
        tiny.load_session(path)


def test_a_failed_save_leaves_the_old_file(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tiny.session()
    session.append([1, 2])
    session.save(tmp_path / "s")
    session.append([3])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        session.save(tmp_path / "s")
    monkeypatch.undo()
    assert tiny.load_session(tmp_path / "s").tokens == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
