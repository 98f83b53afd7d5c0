"""_core.pyi says what the compiled module has: the same names, parameters and defaults, no more and no less."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from llama_ext import _core

STUB = ast.parse((Path(_core.__file__).parent / "_core.pyi").read_text(encoding="utf-8"))


def is_setter(node: ast.FunctionDef) -> bool:
    return any(isinstance(each, ast.Attribute) and each.attr == "setter" for each in node.decorator_list)


FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
METHODS = {
    f"{owner.name}.{node.name}": node
    for owner in CLASSES.values()
    for node in owner.body
    if isinstance(node, ast.FunctionDef) and not is_setter(node)
}
WRITABLE = {
    f"{owner.name}.{node.name}"
    for owner in CLASSES.values()
    for node in owner.body
    if isinstance(node, ast.FunctionDef) and is_setter(node)
}


def is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "property" for each in node.decorator_list)


def parameters(node: ast.FunctionDef) -> list[tuple[str, str, str | None]]:
    """Name, kind and default of each."""
    arguments = node.args
    assert not arguments.posonlyargs
    assert arguments.vararg is None
    assert arguments.kwarg is None
    plain: list[ast.expr | None] = [None] * (len(arguments.args) - len(arguments.defaults)) + list(arguments.defaults)
    found = [(each.arg, "plain", text(default)) for each, default in zip(arguments.args, plain, strict=True)]
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return found + [(each.arg, "keyword", text(default)) for each, default in keywords]


def text(default: ast.expr | None) -> str | None:
    return None if default is None else ast.unparse(default)


def compiled(function: Any) -> ast.FunctionDef:
    """The signature that pybind11 writes as the first line of a docstring."""
    line = function.__doc__.strip().splitlines()[0]
    assert "overloaded" not in line.lower(), "a stub of one signature cannot describe overloads"
    node = ast.parse(f"def {line}: ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def test_the_stub_has_every_name_of_the_module_and_no_other() -> None:
    variables = {
        node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert public(dir(_core)) == set(FUNCTIONS) | set(CLASSES) | public(variables)
    assert isinstance(_core.__version__, str)


@pytest.mark.parametrize("name", CLASSES)
def test_the_stub_has_every_attribute_of_a_class_and_no_other(name: str) -> None:
    stubbed = {node.name for node in CLASSES[name].body if isinstance(node, ast.FunctionDef)}
    cls = getattr(_core, name)
    assert public(vars(cls)) == public(stubbed)
    # A class that Python cannot make has no __init__ of its own.
    has_init = (cls.__init__.__doc__ or "").startswith("__init__(self: ")
    assert has_init == ("__init__" in stubbed)
    # Of methods that Python itself calls, those that the stub has are there.
    assert (set(vars(cls)) | {"__init__"}) >= stubbed


@pytest.mark.parametrize("name", METHODS)
def test_the_stub_has_the_parameters_of_a_method(name: str) -> None:
    owner, member = name.split(".")
    attribute = inspect.getattr_static(getattr(_core, owner), member)
    node = METHODS[name]
    assert isinstance(attribute, property) == is_property(node)
    if isinstance(attribute, property):
        assert (attribute.fset is not None) == (name in WRITABLE)
        return
    assert parameters(node) == parameters(compiled(getattr(getattr(_core, owner), member)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stub_has_the_parameters_of_a_function(name: str) -> None:
    assert parameters(FUNCTIONS[name]) == parameters(compiled(getattr(_core, name)))


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_the_stub_has_the_kind_of_result(name: str) -> None:
    """Names of types differ (tuple and tuple[int, str], ndarray and aliases), so only what both spell is compared."""
    owner, _, member = name.rpartition(".")
    node = METHODS[name] if owner else FUNCTIONS[name]
    attribute = inspect.getattr_static(getattr(_core, owner) if owner else _core, member)
    getter = attribute.fget if isinstance(attribute, property) else getattr(getattr(_core, owner, _core), member)
    line = getter.__doc__.strip().splitlines()[0]
    found = line.rpartition(" -> ")[2].removeprefix("llama_ext._core.").partition("[")[0]
    assert node.returns is not None
    stubbed = ast.unparse(node.returns).removeprefix("npt.").partition("[")[0]
    if found == "numpy.ndarray":
        found, stubbed = "array", "array" if stubbed.endswith("Array") else stubbed
    assert stubbed == found


def test_every_parameter_and_result_of_the_stub_has_a_type() -> None:
    for node in [*FUNCTIONS.values(), *METHODS.values()]:
        assert node.returns is not None, node.name
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            assert argument.arg == "self" or argument.annotation is not None, f"{node.name}: {argument.arg}"
