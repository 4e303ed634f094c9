"""Frozen dataclasses and keywords from names and values that a user wrote, checked against types and names."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import operator
import pathlib
import sys
import typing
from collections.abc import Callable, Iterable
from typing import Any

import yaml


_EXAMPLES = {bool: True, int: 1, float: 0.5, str: "text"}  # of optional fields, whose default has no type


def make_settings(kind: type, values: dict[str, Any], *, of: str) -> Any:
    """A frozen dataclass from a dictionary, with lists as tuples and numbers as the type of the default.

    Raises:
        ValueError: an unknown name, with the nearest known one, or a value of another type.
    """
    return kind(**check_values(kind, values, of=of))


def check_values(kind: type, values: dict[str, Any], *, of: str) -> dict[str, Any]:
    """Values for some fields of a dataclass, checked and converted as by `make_settings`, which raises the same.

    Old names of fields, in `RENAMED` of the dataclass, are accepted with one line on stderr.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    renamed = {name: new for name, new in getattr(kind, "RENAMED", {}).items() if name in values}
    if renamed:
        print(f"renamed: {', '.join(f'{of}.{old} -> {of}.{new}' for old, new in renamed.items())}", file=sys.stderr)
    checked = {}
    for name, value in values.items():
        name = renamed.get(name, name)
        if name not in fields:
            raise ValueError(f"{of}: there is no value {name!r}; {suggest_name(name, fields)}")
        field = fields[name]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default) and isinstance(value, dict):
            checked[name] = make_settings(type(default), value, of=f"{of}: {name}")
            continue
        kinds = typing.get_args(hints[name]) if default is None else ()
        checked[name] = _fit(value, next((like for kind, like in _EXAMPLES.items() if kind in kinds), default),
                             f"{of}: {name}", is_optional=default is None)  # fmt: skip
    return checked


def expect(settings: Any, of: str, **limits: str | Iterable[str]) -> None:
    """Check fields against their limits; all settings have the same form of message.

    Args:
        settings: object with the fields. Every value of a tuple is checked; None is always allowed.
        of: prefix of the message, such as "recipe"; may be empty.
        limits: an interval such as "[0, 1)" or "(0, inf)" for each field, or its valid choices.

    Raises:
        ValueError: the first field outside of its limits.
    """
    for name, limit in limits.items():
        value = getattr(settings, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if not isinstance(limit, str):
            wanted, is_valid = f"to be one of {', '.join(limit)}", all(each in limit for each in values)
        else:
            low, high = (float(bound) for bound in limit[1:-1].split(","))
            after = operator.ge if limit[0] == "[" else operator.gt
            before = operator.le if limit[-1] == "]" else operator.lt
            is_valid = all(after(each, low) and before(each, high) for each in values)
            wanted = f"in {limit}"
            if high == math.inf:
                wanted = f"of {low:g} or more" if limit[0] == "[" else f"above {low:g}"
        if not is_valid:
            raise ValueError(f"{of}{': ' if of else ''}expected {name} {wanted}, got {value!r}")


def read_assignments(texts: Iterable[str]) -> dict[str, Any]:
    """Nested dictionaries from texts such as "crops.num_local=4"; a later text replaces an earlier one.

    Args:
        texts: NAME=VALUE, where a dot leads into a mapping and the value is YAML; or the name of a YAML file.

    Raises:
        ValueError: a text that is neither, a file that holds no mapping, or a name inside of a plain value.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        is_file = not separator and text.endswith((".yaml", ".yml"))
        if not (separator and name) and not is_file:
            raise ValueError(f"--set: expected NAME=VALUE or a YAML file, got {text!r}")
        try:
            content = yaml.safe_load(pathlib.Path(text).read_text(encoding="utf-8") if is_file else value)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"--set {text}: cannot be read: {error}") from None
        if is_file and not isinstance(content, dict):
            raise ValueError(f"--set {text}: expected a mapping of names to values")
        for part in reversed([] if is_file else name.split(".")):
            content = {part: content}
        _merge(found, content, of=text)
    return found


def _merge(values: dict[str, Any], changes: dict[str, Any], *, of: str) -> None:
    for name, change in changes.items():
        if isinstance(change, dict) and name in values:
            if not isinstance(values[name], dict):
                raise ValueError(f"--set {of}: {name} is a single value, not a group")
            _merge(values[name], change, of=of)
        else:
            values[name] = change


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
        raise ValueError(f"{of}: there is no value {unknown[0]!r}; {suggest_name(unknown[0], known)}")
    is_text = {name: isinstance(value, str) and not isinstance(known[name], str) for name, value in values.items()}
    return {name: _number(value, f"{of}: {name}") if is_text[name] else value for name, value in values.items()}


def suggest_name(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, or all of them."""
    known = sorted(map(str, known))
    matches = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {matches[0]!r}?" if matches else f"expected one of {', '.join(known)}"


def _fit(value: Any, default: Any, name: str, *, is_optional: bool = False) -> Any:
    if default is None or (is_optional and value is None):
        return value
    if default == ():  # words, as many as there are
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name}: expected a list of words, got {value!r}")
        return tuple(map(str, value))
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)) or len(value) != len(default):
            raise ValueError(f"{name}: expected {len(default)} values such as {list(default)}, got {value!r}")
        return tuple(_fit(part, like, name) for part, like in zip(value, default))
    # YAML 1.1 reads 1e-4 as text; the user means the number.
    if isinstance(default, (int, float)) and not isinstance(default, bool) and isinstance(value, str):
        value = _number(value, name)
    if isinstance(default, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
        return float(value)
    if isinstance(default, int) and not isinstance(default, bool) and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not type(default):
        example = "" if dataclasses.is_dataclass(default) else f" such as {default!r}"
        raise ValueError(f"{name}: expected {type(default).__name__}{example}, got {value!r}")
    return value


def _number(text: str, name: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name}: expected a number, got {text!r}") from None
    return int(value) if value.is_integer() else value
