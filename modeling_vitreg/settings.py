"""Frozen dataclasses and keywords from names and values that a user wrote, checked against types and names."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any


def make_settings(kind: type, values: dict[str, Any], *, of: str) -> Any:
    """A frozen dataclass from a dictionary, with lists as tuples and numbers as the type of the default.

    Raises:
        ValueError: an unknown name, with the nearest known one, or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    checked = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{of}: no value is called {name!r}; {suggest_name(name, fields)}")
        field = fields[name]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        checked[name] = _fit(value, default, f"{of}: {name}")
    return kind(**checked)


def make_keywords(function: Callable, values: dict[str, Any], *, of: str) -> dict[str, Any]:
    """Keywords of a function from a dictionary, with numbers that YAML took for text as numbers.

    Raises:
        ValueError: a name that the function does not know, with the nearest that it does, or text for a number.
    """
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{of}: no value is called {unknown[0]!r}; {suggest_name(unknown[0], known)}")
    is_text = {name: isinstance(value, str) and not isinstance(known[name], str) for name, value in values.items()}
    return {name: _number(value, f"{of}: {name}") if is_text[name] else value for name, value in values.items()}


def suggest_name(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, or all of them."""
    known = sorted(map(str, known))
    matches = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {matches[0]!r}?" if matches else f"expected one of {', '.join(known)}"


def _fit(value: Any, default: Any, name: str) -> Any:
    if default is None:
        return _number(value, name) if isinstance(value, str) else value
    if default == ():  # words, as many as there are
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} is a list of words, got {value!r}")
        return tuple(map(str, value))
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)) or len(value) != len(default):
            raise ValueError(f"{name} has {len(default)} values such as {list(default)}, got {value!r}")
        return tuple(_fit(part, like, name) for part, like in zip(value, default))
    # YAML 1.1 reads 1e-4 as text: the number is what is meant.
    if isinstance(default, (int, float)) and not isinstance(default, bool) and isinstance(value, str):
        value = _number(value, name)
    if isinstance(default, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{name} is a finite number, got {value!r}")
        return float(value)
    if isinstance(default, int) and not isinstance(default, bool) and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not type(default):
        example = "" if dataclasses.is_dataclass(default) else f" such as {default!r}"
        raise ValueError(f"{name} is {type(default).__name__}{example}, got {value!r}")
    return value


def _number(text: str, name: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} is a number, got {text!r}") from None
    return int(value) if value.is_integer() else value


__all__ = ["make_keywords", "make_settings", "suggest_name"]
