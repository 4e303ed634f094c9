"""Rules that turn the tensors of one layout into those of another.

A layout is a table of rules. Each tensor of a source is used by exactly one rule or dropped by one that says why; each
tensor of the target is written exactly once. The same table, read from right to left, converts out again.

In names, `{i}` stands for the number of a layer and `{leaf}` for `weight` or `bias`; both sides of a rule fill them
alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


_PLACEHOLDERS = {"i": r"\d+", "leaf": "weight|bias", "rest": r".+"}


class ConversionError(ValueError):
    """Tensors that do not balance, an architecture that cannot be represented, or numbers that differ."""


@contextlib.contextmanager
def stage(what: str, *, remedy: str) -> Iterator[None]:
    """Turn any error that a library raises on a user's files into one `ConversionError`.

    Args:
        what: the file and the operation.
        remedy: what the reader can do.
    """
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        cause = f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
        raise ConversionError(f"{what} ({cause}): {remedy}") from error


def keep(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


def add_axis(tensor: Tensor) -> Tensor:
    """(...) -> (1, ...)."""
    return tensor.unsqueeze(0)


def drop_axis(tensor: Tensor) -> Tensor:
    """(1, ...) -> (...)."""
    if tensor.shape[0] != 1:
        raise ConversionError(f"expected a first axis of length 1, got shape {tuple(tensor.shape)}")
    return tensor.squeeze(0)


def add_axes(tensor: Tensor) -> Tensor:
    """(D,) -> (1, 1, D)."""
    return tensor[None, None]


def drop_axes(tensor: Tensor) -> Tensor:
    """(1, 1, D) -> (D,)."""
    return tensor[0, 0]


def transpose(tensor: Tensor) -> Tensor:
    """(rows, columns) -> (columns, rows)."""
    return tensor.T


@dataclasses.dataclass(frozen=True)
class Rename:
    """One tensor becomes one tensor.

    Args:
        source, target: names.
        to_target, to_source: function of the values on the way in, and its inverse for the way out.
    """

    source: str
    target: str
    to_target: Callable[[Tensor], Tensor] = keep
    to_source: Callable[[Tensor], Tensor] = keep


@dataclasses.dataclass(frozen=True)
class Join:
    """Tensors that become one, concatenated along the first axis.

    Args:
        source: names, in order.
        target: name.
        may_lack: those of `source` that the layout leaves out if they would be zero.
        shares: relative lengths of the parts; default all equal.
    """

    source: tuple[str, ...]
    target: str
    may_lack: tuple[str, ...] = ()
    shares: tuple[int, ...] | None = None

    def lengths(self, total: int) -> list[int]:
        """Lengths of the parts of a tensor whose first axis has this length."""
        shares = self.shares or (1,) * len(self.source)
        return [total * share // sum(shares) for share in shares]


@dataclasses.dataclass(frozen=True)
class Split:
    """One tensor becomes several, cut along its first axis.

    Args:
        source: name.
        target: names, in order.
        shares: relative lengths of the parts.
        to_target, to_source: functions of the values of each part on the way in, and their inverses; default none.
    """

    source: str
    target: tuple[str, ...]
    shares: tuple[int, ...]
    to_target: tuple[Callable[[Tensor], Tensor], ...] | None = None
    to_source: tuple[Callable[[Tensor], Tensor], ...] | None = None

    def part(self, tensor: Tensor, number: int) -> Tensor:
        """One of the parts, as the target has it."""
        lengths = [len(tensor) * share // sum(self.shares) for share in self.shares]
        part = tensor.split(lengths)[number]
        return part if self.to_target is None else self.to_target[number](part)

    def whole(self, *parts: Tensor) -> Tensor:
        """The tensor that the targets are the parts of."""
        makes = self.to_source or (keep,) * len(parts)
        return torch.cat([make(part) for make, part in zip(makes, parts)])


@dataclasses.dataclass(frozen=True)
class Drop:
    """A tensor of the source that the target does not have.

    Args:
        source: name.
        why: reason, for the report.
        value: computes the values that it must have, from its name.
    """

    source: str
    why: str
    value: Callable[[str], Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class Fill:
    """A tensor of the target that the source does not have, because it would do nothing there.

    Args:
        target: name.
        value: common value of all its elements.
        why: reason, for the report.
    """

    target: str
    value: float
    why: str


Rule = Rename | Join | Split | Drop | Fill


def matches(rule: Rule, name: str) -> bool:
    """Whether a rule knows a tensor of the source."""
    return match_source(rule, name) is not None


def match_source(rule: Rule, name: str) -> dict | None:
    """Values of the placeholders of a rule in the name of a source tensor; None if it does not match."""
    if isinstance(rule, Fill):
        return None
    for pattern in rule.source if isinstance(rule, Join) else (rule.source,):
        if found := _compile(pattern).fullmatch(name):
            return found.groupdict()
    return None


def match_target(rule: Rule, name: str) -> dict | None:
    """The same for a tensor of the target."""
    if isinstance(rule, Drop):
        return None
    for pattern in rule.target if isinstance(rule, Split) else (rule.target,):
        if found := _compile(pattern).fullmatch(name):
            return found.groupdict()
    return None


@functools.cache
def _compile(pattern: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", pattern)
    return re.compile(
        "".join(
            f"(?P<{part}>{_PLACEHOLDERS[part]})" if number % 2 else re.escape(part)
            for number, part in enumerate(parts)
        )
    )
