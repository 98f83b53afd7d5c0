"""The environment in which chat templates run: jinja2's immutable sandbox with every step metered.

A template is a program from whoever published the model. Jinja's sandbox keeps it away from Python's internals, but not
from `{% for i in range(10**9) %}`, `'a' * 10**12` or a list that holds itself twice, forty times over. The rule here:

- every loop pass, call, filter, test, operator, attribute and output looks at the clock first;
- every value a step can make larger than its inputs is sized before it is made (strings by their length, numbers by
  their bits, containers by the size of the whole tree they would print as) and refused above a limit;
- filters are an allowlist, and those with a width, count or precision have it checked.

So one step works on a bounded amount of data, and a render ends within its time limit plus one such step.
This module imports jinja2 and is itself imported on the first render only.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context, pass_environment

from llama_ext.errors import LimitError
from llama_ext.runtime.template_meter import (
    FILTER_CHECKS,
    check_count,
    check_percent,
    check_power,
    check_string_method,
    current,
)

__all__ = ["ChatEnvironment", "TemplateRefusal"]

_FILTERS = (  # noqa: SIM905
    # One string: nobody should have to read this list as forty lines.
    "abs attr batch capitalize center count d default dictsort e escape first float forceescape format groupby indent"
    " int items join last length list lower map max min reject rejectattr replace reverse round safe select selectattr"
    " slice sort string sum title tojson trim truncate unique upper urlencode wordcount wordwrap"
).split()
# These give back one of their inputs, which was sized when it was made.
_SELECTING = frozenset(["attr", "d", "default", "first", "last", "max", "min"])


class TemplateRefusal(jinja2.TemplateError):
    """The template called `raise_exception`: it does not take these messages."""


# -- filters that are ours ------------------------------------------------------------------------------------------


@pass_environment
def _join(environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return current().join(str(d), value)


@pass_environment
def _sum(environment: jinja2.Environment, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    meter = current()
    if attribute is not None:
        iterable = map(make_attrgetter(environment, attribute), iterable)
    for item in meter.iterate(iterable):
        start = meter.check(start + item)
    return start


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As in transformers: plain JSON, not the HTML-safe kind that jinja's own filter writes."""
    meter = current()
    meter.size(meter.weight(value), "a printed value")
    for part in (indent, *(separators or ())):
        check_count(len(part) if isinstance(part, str) else part, 32, "the indent or a separator of tojson")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    check = FILTER_CHECKS.get(name)
    # Jinja puts the context, environment or evaluation context first for functions that ask for it.
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        meter = current()
        meter.tick()
        if check is not None:
            check(meter, *args[first:], **kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return meter.iterate(result)
        return result if name in _SELECTING else meter.check(result)

    return guarded


# -- the environment ------------------------------------------------------------------------------------------------


class _Namespace(Namespace):
    def __repr__(self) -> str:
        # Jinja prints the contents, which may contain the namespace itself, many times.
        return "<Namespace>"


def _raise_exception(message: Any) -> None:
    raise TemplateRefusal(str(message)[:2000])


def _strftime_now(format: str) -> str:  # noqa: A002
    if len(format) > 200 or re.search(r"%[^a-zA-Z%]*\d", format):
        raise LimitError("chat template: strftime_now takes at most 200 characters, and no widths")
    return datetime.datetime.now().strftime(format)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training masks; rendering passes them through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Generator(CodeGenerator):
    """Jinja's compiler, with the meter called where text is copied, a container built or a loop begins a pass."""

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:  # noqa: N802
        static = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        if static:
            self.writeline(f"environment.emit({static})", node)
        super().visit_Output(node, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        tick = nodes.Call(nodes.EnvironmentAttribute("emit"), [nodes.Const(0)], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat_values((")
        for child in node.nodes:
            self.visit(child, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self.write("environment.checked(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx != "load":
            super().visit_Tuple(node, frame)
            return
        self.write("environment.checked(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self.write("environment.checked(")
        super().visit_Dict(node, frame)
        self.write(")")


@pass_context
def _finalize(context: Context, value: Any) -> str:
    """Every `{{ expression }}` ends here. Asking for the context keeps jinja from evaluating it at compile time."""
    meter = current()
    text = meter.text(value)
    meter.emit(len(text))
    return text


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja with the settings, functions and filters that chat templates are written against, and a meter."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            # Constant folding runs steps at compile time; nothing here is rendered often enough to need it.
            optimized=False,
            finalize=_finalize,
            extensions=[jinja2.ext.loopcontrols, _GenerationTag],
        )
        filters: dict[str, Callable[..., Any]] = {name: self.filters[name] for name in _FILTERS}
        # Nothing is HTML here, so `safe` and `escape` give plain strings that concatenate without more escaping.
        escape = filters["escape"]
        filters |= {name: lambda value: str(escape(current().text(value))) for name in ("e", "escape", "forceescape")}
        filters |= {"safe": lambda value: current().text(value), "join": _join, "sum": _sum, "tojson": _tojson}
        self.filters = {name: _guarded(name, function) for name, function in filters.items()}
        self.tests = {name: _guarded("", cast("Callable[..., Any]", function)) for name, function in self.tests.items()}
        del self.globals["lipsum"]
        self.globals.update(
            # A function, not the class: nothing to reach through its attributes.
            dict=lambda *args, **kwargs: dict(*args, **kwargs),
            namespace=_Namespace,
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
        )

    # Called from generated code.

    def emit(self, characters: int) -> None:
        current().emit(characters)

    def checked(self, value: Any) -> Any:
        return current().check(value)

    def concat_values(self, values: tuple[Any, ...]) -> str:
        meter = current()
        meter.tick()
        parts = [meter.text(value) for value in values]
        meter.size(sum(map(len, parts)), "a concatenation")
        return str(meter.check("".join(parts)))

    # Jinja's own hooks.

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # Bytes have no use in a template, and some codecs take quadratic time.
        return attr not in ("encode", "to_bytes", "from_bytes", "mro") and super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        current().tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        meter = current()
        meter.tick()
        value = super().getitem(obj, argument)
        return meter.check(value) if isinstance(argument, slice) else value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        meter = current()
        meter.tick()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        if not isinstance(method, Undefined):
            owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
            if isinstance(owner, str):
                if name == "join" and len(args) == 1:
                    return meter.check(meter.join(owner, args[0]))
                check_string_method(meter, name, owner, args, kwargs)
            elif isinstance(owner, dict) and name == "get":
                return super().call(__context, __obj, *args, **kwargs)
        return meter.check(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = current()
        meter.tick()
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
                    one = len(sequence) if isinstance(sequence, str) else meter.weight(sequence)
                    meter.size(max(0, count) * one, "a repetition")
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            meter.size(len(left) + len(right), "a concatenation")
        elif operator == "%" and isinstance(left, str):
            check_percent(meter, left, right)
        elif operator == "**":
            check_power(left, right)
        return meter.check(super().call_binop(context, operator, left, right))
