"""The files of a tokenizer in a Hugging Face model directory: read for `from_pretrained`, written by `save_pretrained`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ext._options import shown
from llama_ext.errors import FormatError, LimitError, OptionError, UnsupportedError
from llama_ext.io.atomic import atomic_write, named
from llama_ext.io.folder_lock import saving_into
from llama_ext.io.gguf import find_gguf
from llama_ext.io.gguf_file import GgufFile
from llama_ext.io.json_file import open_regular, parse_json_object, read_json_object
from llama_ext.limits import Limits
from llama_ext.runtime.precompiled_charsmap import check_charsmaps_in
from llama_ext.runtime.tokenizer_backend import (
    add_special_tokens,
    check_utf8,
    set_post_processor,
    typed_errors,
)

if TYPE_CHECKING:
    import tokenizers

    from llama_ext.runtime.tokenizer import Tokenizer

__all__ = ["load_tokenizer", "tokenizer_files", "write_tokenizer_files"]

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_ALSO_SPECIAL = ("sep_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATES_FOLDER = "additional_chat_templates"
_TEMPLATE_BYTES = 2**20
_OTHER_TEMPLATE = "Set tokenizer.chat_template to another one, or None"
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
# The rest of a config is about the class that wrote it, and would change what PreTrainedTokenizerFast does.
_KEPT = ("padding_side", "truncation_side", "model_input_names", "add_bos_token", "add_eos_token", "unknown_characters")
# transformers writes 10^30 for "no limit".
_NO_MAX_LENGTH = 10**15


def load_tokenizer(cls: type[Tokenizer], path: Path, limits: Limits) -> Tokenizer:
    """The body of `Tokenizer.from_pretrained`."""
    main = _main_file(path)
    if find_gguf(main) is not None:
        from llama_ext.runtime.gguf_tokenizer import load_gguf_tokenizer  # it imports this module

        with GgufFile(main, limits) as file:
            return load_gguf_tokenizer(cls, file.metadata, path=str(main), limits=limits)
    folder = main.parent
    config = _read_optional(folder / _CONFIG_FILE, "the tokenizer's config", limits)
    special = {**_read_optional(folder / "special_tokens_map.json", "the map of special tokens", limits), **config}
    where = str(folder / _CONFIG_FILE)
    add_bos, add_eos = _flag(config, "add_bos_token", where), _flag(config, "add_eos_token", where)
    tokens = {name: _token_text(special.get(name), name, where) for name in _NAMED}
    if main.suffix == ".json":
        backend = _from_json(main, limits)
    else:
        backend, own = _from_sentencepiece(main, limits)
        tokens = {name: tokens[name] if name in special else own[name] for name in _NAMED}
        _add_at_ids(backend, _tokens_with_ids(folder, config, limits), main)
        add_bos, add_eos = add_bos is not False, bool(add_eos)
        config = {**config, "add_bos_token": add_bos, "add_eos_token": add_eos}
    backend.no_truncation()
    backend.no_padding()
    with typed_errors("the special tokens cannot be used", str(main)):
        add_special_tokens(backend, _special_tokens(special, tokens, where))
        if add_bos is not None or add_eos is not None:
            set_post_processor(backend, tokens, bos=bool(add_bos), eos=bool(add_eos))
    _check_backend(backend, main, limits)
    return cls(
        backend,
        tokens,
        chat_template=_read_templates(folder, config, where),
        model_max_length=_max_length(config),
        config=config,
    )


def _main_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        gguf = find_gguf(path)
        if gguf is not None:
            return gguf
        raise FormatError("there is no tokenizer here: expected tokenizer.json or tokenizer.model", path=str(path))
    with open_regular(path, what="a tokenizer.json, tokenizer.model or GGUF file, or a model directory"):
        return path


def _read_bytes(path: Path, what: str, most: int, limit: str) -> bytes:
    with open_regular(path, what=what) as file:
        data = b""
        while len(data) <= most and (part := file.read(most + 1 - len(data))):
            data += part
    if len(data) > most:
        raise LimitError(f"{path}: {what} is larger than {most} bytes{limit}")
    return data


def _read_optional(path: Path, what: str, limits: Limits) -> dict[str, Any]:
    # Some published tokenizer configs list every added token and exceed the limit for small configs.
    return read_json_object(path, what=what, limit="tokenizer_json_bytes", limits=limits) if path.exists() else {}


def _from_json(path: Path, limits: Limits) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    data = _read_bytes(path, "tokenizer.json", limits.tokenizer_json_bytes, " (Limits.tokenizer_json_bytes)")
    # `tokenizers` trusts a normalisation table. Its name can only be hidden from this search by escaping letters.
    if b"precompiled_charsmap" in data or b"\\u00" in data:
        parsed = parse_json_object(data, path=str(path), what="tokenizer.json", limits=limits)
        check_charsmaps_in(parsed.get("normalizer"), str(path))
    with typed_errors("tokenizer.json cannot be loaded", str(path)):
        return Backend.from_buffer(data)


def _from_sentencepiece(path: Path, limits: Limits) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
    from llama_ext.runtime import sentencepiece_model

    data = _read_bytes(path, "tokenizer.model", sentencepiece_model.MAX_FILE_BYTES, "")
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data):
        raise UnsupportedError(f"{path}: a tiktoken file, not SentencePiece. Use the tokenizer.json of the same model")
    model = sentencepiece_model.parse_sentencepiece(data, str(path))
    if len(model.pieces) > limits.vocabulary:
        raise LimitError(f"{path}: {len(model.pieces)} pieces, the limit is {limits.vocabulary} (Limits.vocabulary)")
    with typed_errors("tokenizer.model cannot be used", str(path)):
        backend = sentencepiece_model.build_tokenizer(model, str(path))
    return backend, {
        "bos_token": model.control_piece(model.bos_piece),
        "eos_token": model.control_piece(model.eos_piece),
        "pad_token": model.control_piece(model.pad_piece),
        "unk_token": model.pieces[model.unknown_id],
    }


def _tokens_with_ids(folder: Path, config: Mapping[str, Any], limits: Limits) -> list[tuple[int, Any]]:
    """Tokens that were added to a SentencePiece model, with the ids the model was trained with."""
    found: dict[int, Any] = {}
    path = folder / "added_tokens.json"
    for token, index in _read_optional(path, "the added tokens", limits).items():
        if isinstance(index, bool) or not isinstance(index, int):
            raise FormatError(f"expected an id, got {index!r}", path=str(path), field=token[:80])
        found[index] = token
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise FormatError("added_tokens_decoder must be an object", path=str(folder / _CONFIG_FILE))
    for key, token in decoder.items():
        if not re.fullmatch(r"\d{1,9}", key):
            raise FormatError(
                f"expected an id, got {key[:80]!r}",
                path=str(folder / _CONFIG_FILE),
                field="added_tokens_decoder",
            )
        found[int(key)] = token
    return sorted(found.items(), key=lambda item: item[0])


def _add_at_ids(backend: tokenizers.Tokenizer, wanted: list[tuple[int, Any]], path: Path) -> None:
    for index, value in wanted:
        token = _added_token(value, "added_tokens_decoder", str(path))
        now = backend.token_to_id(token.content)
        if now is None:
            now = backend.get_vocab_size()
        if now != index:
            raise FormatError(
                f"the added token {token.content!r} has the id {index}, but its place is {now}", path=str(path)
            )
        if token.special:
            backend.add_special_tokens([token])
        else:
            backend.add_tokens([token])


def _added_token(value: Any, name: str, where: str) -> tokenizers.AddedToken:
    """A token as configs write it: a string, or an object with its content and how it is matched."""
    from tokenizers import AddedToken

    text = _token_text(value, name, where)
    if text is None:
        raise FormatError("expected a token, got null", path=where, field=name)
    flags = value if isinstance(value, dict) else {"special": True}
    return AddedToken(
        text,
        single_word=flags.get("single_word") is True,
        lstrip=flags.get("lstrip") is True,
        rstrip=flags.get("rstrip") is True,
        normalized=flags.get("normalized") is True,
        special=flags.get("special") is True,
    )


def _token_text(value: Any, name: str, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        content: str = value["content"]
        return content or None
    raise FormatError(
        f"expected a string or an object with 'content', got {type(value).__name__}", path=where, field=name
    )


def _special_tokens(special: Mapping[str, Any], tokens: Mapping[str, str | None], where: str) -> list[Any]:
    """Every token that the configs call special, with its flags, once."""
    values: list[tuple[str, Any]] = [
        (name, special.get(name) or tokens.get(name)) for name in (*_NAMED, *_ALSO_SPECIAL)
    ]
    for name in _LISTS:
        several = special.get(name) or []
        if isinstance(several, dict):
            several = list(several.values())
        if not isinstance(several, list):
            raise FormatError(f"expected a list, got {type(several).__name__}", path=where, field=name)
        values += [(name, value) for value in several]
    return [_added_token(value, name, where) for name, value in values if value]


def _check_backend(backend: tokenizers.Tokenizer, path: Path, limits: Limits) -> None:
    size = backend.get_vocab_size()
    if size > limits.vocabulary:
        raise LimitError(f"{path}: {size} tokens, the limit is {limits.vocabulary} (Limits.vocabulary)")
    with typed_errors("the post-processor cannot be used", str(path)):
        added = backend.encode("", add_special_tokens=True).ids
    for index in added:
        if backend.id_to_token(index) is None:
            raise FormatError(f"the post-processor adds the id {index}, which no token has", path=str(path))


def _flag(config: Mapping[str, Any], name: str, where: str) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise FormatError(f"expected true or false, got {value!r}", path=where, field=name)
    return value


def _max_length(config: Mapping[str, Any]) -> int | None:
    value = config.get("model_max_length")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _NO_MAX_LENGTH:
        return None
    return int(value)


def _read_templates(folder: Path, config: Mapping[str, Any], where: str) -> str | dict[str, str] | None:
    """The chat templates: files go before the config, as in transformers."""
    found: dict[str, str] = {}
    inline = config.get("chat_template")
    if isinstance(inline, str):
        found["default"] = inline
    elif isinstance(inline, list):
        for item in inline:
            if not isinstance(item, dict) or not all(isinstance(item.get(k), str) for k in ("name", "template")):
                raise FormatError("expected a list of {name, template}", path=where, field="chat_template")
            found[item["name"]] = item["template"]
    elif inline is not None:
        raise FormatError(
            f"expected a string or a list, got {type(inline).__name__}", path=where, field="chat_template"
        )
    files = {"default": folder / _TEMPLATE_FILE}
    for path in sorted((folder / _TEMPLATES_FOLDER).glob("*.jinja"))[:100]:
        files[path.stem] = path
    for name, path in files.items():
        if path.exists():
            data = _read_bytes(path, "the chat template", _TEMPLATE_BYTES, "")
            try:
                found[name] = data.decode("utf-8")
            except UnicodeDecodeError as error:
                message = f"the chat template is not valid UTF-8: {error.reason}"
                raise FormatError(message, path=str(path), offset=error.start) from error
    if not found:
        return None
    return found["default"] if list(found) == ["default"] else found


def tokenizer_files(
    backend: tokenizers.Tokenizer,
    tokens: Mapping[str, str | None],
    chat_template: object,
    model_max_length: int | None,
    config: Mapping[str, Any],
) -> dict[str, bytes]:
    """What `Tokenizer.save_pretrained` writes, made before anything is: names in the directory, and contents.

    Raises:
        OptionError, LimitError: As there.
    """
    named = _named_templates(chat_template)
    kept = {name: config[name] for name in (*_KEPT, *_ALSO_SPECIAL) if config.get(name) is not None}
    # Null, not left out: a special_tokens_map.json that is already there must not fill the gap.
    # The class that takes tokenizer.json as it is; others rebuild the pipeline from the vocabulary.
    out = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # That class would add token_type_ids, which no Llama takes: `generate(**tokenizer(text))` would fail.
        "model_input_names": ["input_ids", "attention_mask"],
        **kept,
        **tokens,
    }
    if model_max_length is not None:
        out["model_max_length"] = model_max_length
    if isinstance(chat_template, str):
        out["chat_template"] = chat_template
    elif named:
        out["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
    with typed_errors("the tokenizer cannot be written", kind=OptionError):
        files = {"tokenizer.json": backend.to_str(pretty=True)}
    try:
        files[_CONFIG_FILE] = json.dumps(out, ensure_ascii=False, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise OptionError(f"{_CONFIG_FILE} cannot be written as JSON: {error}") from error
    check_utf8(files[_CONFIG_FILE], f"{_CONFIG_FILE} cannot be written: it")
    for name, template in named.items():
        if name == "default":
            files[_TEMPLATE_FILE] = template
        elif _TEMPLATE_NAME.fullmatch(name):  # a name from a file must stay inside the folder
            files[f"{_TEMPLATES_FOLDER}/{name}.jinja"] = template
    return {name: text.encode("utf-8") for name, text in files.items()}


def _named_templates(chat_template: object) -> dict[str, str]:
    """Chat templates by their names.

    Raises:
        OptionError: They are nothing of what a tokenizer may have, or cannot be written.
        LimitError: One is larger than what `from_pretrained` reads.
    """
    named = {"default": chat_template} if isinstance(chat_template, str) else chat_template or {}
    if not isinstance(named, Mapping) or not all(isinstance(text, str) for item in named.items() for text in item):
        raise OptionError(
            f"chat_template must be a text, a dictionary of named ones or None, got {shown(chat_template)}"
        )
    for name, template in named.items():
        which = f"the chat template {name!a:.80}"
        for text in (name, template):
            check_utf8(text, which, f", so it cannot be saved. {_OTHER_TEMPLATE}")
        size = len(template.encode("utf-8"))
        if size > _TEMPLATE_BYTES:
            raise LimitError(
                f"{which} has {size} bytes, and at most {_TEMPLATE_BYTES} are read from a file. {_OTHER_TEMPLATE}"
            )
    return dict(named)


def write_tokenizer_files(files: Mapping[str, bytes], directory: str | os.PathLike[str]) -> None:
    """Writes what `tokenizer_files` gives, each file whole or not at all.

    Raises:
        OptionError: `directory` is no path that a system may have.
        OSError: It cannot be written.
    """
    folder = named(directory)
    with saving_into(folder):
        # Templates of an earlier save would go before the new config's.
        for path in [folder / _TEMPLATE_FILE, *(folder / _TEMPLATES_FOLDER).glob("*.jinja")]:
            if path.relative_to(folder).as_posix() not in files:
                path.unlink(missing_ok=True)
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            with atomic_write(path) as file:
                file.write(content)
