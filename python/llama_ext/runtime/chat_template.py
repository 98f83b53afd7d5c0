"""Chat templates: messages in, the text a model was trained to continue out.

Templates are Hugging Face's Jinja templates, rendered with the settings transformers uses. They come with the model and
are not trusted: see `template_sandbox.py` for what they cannot do and what bounds them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_ext.errors import FormatError, LimitError, LlamaExtError, OptionError

if TYPE_CHECKING:
    import jinja2

__all__ = ["DEFAULT_TEMPLATE_LIMITS", "TemplateLimits", "render_chat_template"]

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_MAX_DEPTH = 64


@dataclasses.dataclass(frozen=True)
class TemplateLimits:
    """Bounds on one rendering of a chat template.

    Guaranteed: the output and every string have at most `characters` characters; every list or dictionary prints in at
    most `characters`, at 16 for an element; all values made by the template together have at most `work` characters;
    and the rendering ends with a `LimitError` after `seconds` plus one step on data of that size (a fraction of
    a second). The template's length and tokens bound the time to compile it, which nothing interrupts.

    Args:
        template: Characters of the template itself.
        tokens: Of the template: names, numbers, operators, the space between them.
        characters: Characters of the output, of any one value, and of the messages.
        work: Characters of all values the template makes, together.
        seconds: CPU time of one rendering.
    """

    template: int = 64 * 2**10
    tokens: int = 32 * 2**10
    characters: int = 4 * 2**20
    work: int = 128 * 2**20
    seconds: float = 2.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise OptionError(f"TemplateLimits.{field.name} must be a positive number, got {value!r}")


DEFAULT_TEMPLATE_LIMITS = TemplateLimits()


def render_chat_template(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
    limits: TemplateLimits = DEFAULT_TEMPLATE_LIMITS,
) -> str:
    """Render one conversation.

    Args:
        template: The Jinja source; None when the model has none.
        messages: One dictionary per message, in order, usually with the keys `role` and `content`; plain JSON values.
            Keys whose value is None are left out, as transformers does.
        tools: JSON schemas of functions the model may call.
        documents: Documents for retrieval, for templates that take them.
        add_generation_prompt: End with the words that open the assistant's turn.
        continue_final_message: Cut the text behind the last message's content, so that the model continues it.
        variables: More names for the template: `bos_token`, `eos_token` and so on.
        limits: What the rendering may use up.

    Returns:
        The text. It holds its own special tokens: encode it without adding any.

    Raises:
        OptionError: There is no template; the messages are empty or not JSON values; the template refuses them; or both
            `add_generation_prompt` and `continue_final_message` are set.
        FormatError: The template has a syntax error, or fails on these messages.
        LimitError: The template, the messages or the rendering exceed `limits`.
    """
    if template is None:
        raise OptionError(
            "this model has no chat template: it was probably not trained on conversations. Use generate() with a plain"
            " prompt, or pass chat_template=... with the format it was trained on"
        )
    if not isinstance(template, str):
        raise OptionError(f"a chat template must be a str, got {type(template).__name__}")
    if len(template) > limits.template:
        raise LimitError(
            f"chat template: {len(template)} characters, the limit is {limits.template} (TemplateLimits.template)"
        )
    if add_generation_prompt and continue_final_message:
        raise OptionError("add_generation_prompt starts a new message, continue_final_message the last one: pass one")
    conversation = _conversation(messages)
    last = _mark_end(conversation, template) if continue_final_message else ""
    names = {
        **{name: _plain(value, name) for name, value in (variables or {}).items()},
        "messages": conversation,
        "tools": None if tools is None else _schemas(tools),
        "documents": None if documents is None else _plain(list(documents), "documents"),
        "add_generation_prompt": bool(add_generation_prompt),
    }
    text = _render(template, names, limits)
    return _cut_at_mark(text, last) if continue_final_message else text


def _render(template: str, names: dict[str, Any], limits: TemplateLimits) -> str:
    import jinja2

    from llama_ext.runtime.template_meter import Meter, metered
    from llama_ext.runtime.template_sandbox import TemplateRefusal

    try:
        with metered(Meter(limits.characters, limits.work, limits.seconds)) as meter:
            compiled = _compile(template, limits.tokens)
            for value in names.values():
                meter.check(value)
            return "".join(compiled.generate(**names))
    except LlamaExtError:
        raise
    except TemplateRefusal as error:
        raise OptionError(f"the chat template refuses these messages: {error.message}") from error
    except jinja2.TemplateSyntaxError as error:
        raise FormatError(f"the chat template has a syntax error in line {error.lineno}: {error.message}") from error
    except (RecursionError, OverflowError, MemoryError) as error:
        # Too deep for Python, a range() above jinja's limit, or an allocation that failed.
        raise LimitError(f"chat template: {type(error).__name__}: {error}. Is the template malicious?") from error
    except Exception as error:
        # Whatever a template can provoke: an undefined variable, a wrong type, an attribute the sandbox forbids.
        raise FormatError(
            f"the chat template failed on these messages: {type(error).__name__}: {str(error)[:500]}."
            " Has each message the keys that the template reads?"
        ) from error


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    from llama_ext.runtime.template_sandbox import ChatEnvironment

    return ChatEnvironment()


@functools.lru_cache(maxsize=16)
def _compile(template: str, most_tokens: int) -> jinja2.Template:
    environment = _environment()
    # Parsing takes a hundred times as long as finding out that there is too much to parse.
    tokens = environment.lexer.tokeniter(template, None)
    if sum(1 for _ in itertools.islice(tokens, most_tokens + 1)) > most_tokens:
        raise LimitError(f"chat template: more than {most_tokens:,} tokens. Is the template malicious?")
    return environment.from_string(template)


def _plain(value: Any, name: str, depth: int = 0) -> Any:
    """A copy in JSON types: other objects have methods that the sandbox does not know to be dangerous."""
    if value is None or isinstance(value, bool):
        return value
    # Subclasses (enumerations, NumPy's float64) may carry methods of their own, so they become the base type.
    for base in (str, int, float):
        if isinstance(value, base):
            return value if type(value) is base else base(value)
    if depth == _MAX_DEPTH:
        raise LimitError(f"{name} is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise OptionError(f"{name} has the key {key!r}: expected a str, got {type(key).__name__}")
        return {str(key): _plain(item, f"{name}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise OptionError(
        f"{name}: expected a JSON value (str, number, bool, None, list, dict), got {type(value).__name__}"
    )


def _conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise OptionError(
            f"messages must be a list of dictionaries like {{'role': 'user', 'content': '...'}},"
            f" got {type(messages).__name__}"
        )
    if not messages:
        raise OptionError("messages is empty: give at least one, like {'role': 'user', 'content': '...'}")
    conversation = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise OptionError(
                f"messages[{index}] must be a dictionary like {{'role': 'user', 'content': '...'}},"
                f" got {type(message).__name__}"
            )
        plain = _plain(message, f"messages[{index}]")
        conversation.append({key: value for key, value in plain.items() if value is not None})
    return conversation


def _schemas(tools: Sequence[Mapping[str, Any]]) -> list[Any]:
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise OptionError(f"tools[{index}] must be a dictionary (a JSON schema), got {type(tool).__name__}")
    return [_plain(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _mark_end(conversation: list[dict[str, Any]], template: str) -> str:
    """Append a mark to the last message's text, so that its end can be found in the output."""
    if "content" not in template:
        raise OptionError("continue_final_message: the chat template does not read the content of messages")
    content = conversation[-1].get("content")
    if isinstance(content, str):
        conversation[-1]["content"] = content + _CONTINUE_TAG
        return content
    for block in reversed(content if isinstance(content, list) else []):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            text: str = block["text"]
            block["text"] = text + _CONTINUE_TAG
            return text
    raise OptionError("continue_final_message: the last message has no text to continue")


def _cut_at_mark(text: str, last: str) -> str:
    mark = _CONTINUE_TAG.strip()
    at = text.rfind(mark)
    if at < 0 or last.strip() not in text:
        raise OptionError("continue_final_message: the chat template leaves out the last message")
    if text.startswith(_CONTINUE_TAG, at):
        return text[:at]
    # The template strips messages: it would have stripped the end of this one too.
    return text[:at].rstrip()
