"""Rules that turn the tensors of one layout into those of another, and the ledger that balances them.

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
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


_PLACEHOLDERS = {"i": r"\d+", "leaf": "weight|bias", "rest": r".+"}
# What of an architecture a tensor belongs to.
_FIELDS_OF = {
    "pre_layernorm": "has_pre_norm",
    "projection": "projection_size",
    "register_tokens": "num_register_tokens",
    "distillation_token": "has_distillation_token",
    "cls_token": "has_cls_token",
    "mask_token": "has_mask_token",
    "layer_scale": "layer_scale_init_value",
    "position_embeddings": "position_embedding_type",
    "classifier": "a head (save its base model alone first: model.base_model.save_pretrained(folder))",
}
_NUM_NAMED = 12  # names in a message before it says how many more


class ConversionError(ValueError):
    """Tensors that do not balance, an architecture that cannot be represented, or numbers that differ."""


@contextlib.contextmanager
def stage(what: str, *, remedy: str) -> Iterator[None]:
    """Turn whatever other people's data make a library raise into one `ConversionError`.

    Args:
        what: names the file and what was done with it.
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
        to_target, to_source: what happens to the values on the way in, and its inverse for the way out.
    """

    source: str
    target: str
    to_target: Callable[[Tensor], Tensor] = keep
    to_source: Callable[[Tensor], Tensor] = keep


@dataclasses.dataclass(frozen=True)
class Join:
    """Tensors that lie one behind the other in ours, along the first axis.

    Args:
        source: their names, in order.
        target: name.
        may_lack: those of `source` that the layout does not have where they would be zero.
    """

    source: tuple[str, ...]
    target: str
    may_lack: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Drop:
    """Tensors that have no place in ours.

    Args:
        source: name.
        why: in words, for the record.
        value: what it must be, given the tensor's name; where it is given the tensor is written on the way out.
    """

    source: str
    why: str
    value: Callable[[str], Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class Fill:
    """Tensors of ours that the layout does not have, for there they would do nothing.

    Args:
        target: name.
        value: of every number in them.
        why: in words, for the record.
    """

    target: str
    value: float
    why: str


Rule = Rename | Join | Drop | Fill


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Args:
        name: of it.
        sources: names of what it is made from.
        make: makes it of them.
    """

    name: str
    sources: tuple[str, ...]
    make: Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What becomes of every tensor.

    Args:
        entries: the tensors to be written.
        dropped: of the source, with the reason.
        filled: of the target, with the reason.
    """

    entries: tuple[Entry, ...]
    dropped: dict[str, str]
    filled: dict[str, str]

    @property
    def num_used(self) -> int:
        """Tensors of the source that are used."""
        return len({name for entry in self.entries for name in entry.sources})

    def coverage(self, title: str) -> str:
        """One line for the log."""
        num_sources = self.num_used + len(self.dropped)
        filled = f", {len(self.filled)} filled" if self.filled else ""
        return (
            f"{title}: {num_sources} of {num_sources} source tensors accounted for ({self.num_used} used, "
            f"{len(self.dropped)} dropped with a reason), {len(self.entries)} of {len(self.entries)} target tensors "
            f"written{filled}"
        )


def balance_to_target(
    rules: Iterable[Rule], sources: dict[str, tuple], targets: dict[str, tuple], *, title: str
) -> Ledger:
    """Plan how tensors of a layout become ours.

    Args:
        rules: of the layout.
        sources: shape of each of their tensors.
        targets: shape of each of ours.
        title: of the conversion, for messages.

    Raises:
        ConversionError: a tensor without a rule, a target without a source or with two, or shapes that differ.
    """
    rules, book = list(rules), LedgerBuilder(title)
    for name, shape in sources.items():
        book.take(name, shape, [(rule, found) for rule in rules if (found := _match_source(rule, name)) is not None])
    for name, shape in targets.items():
        for rule in rules:
            if isinstance(rule, Fill) and _match(rule.target, name) is not None and name not in book.made:
                book.fill(name, shape, rule)
    book.join(targets)
    return book.close(targets, rules)


def balance_to_source(
    rules: Iterable[Rule], sources: dict[str, tuple], *, title: str
) -> tuple[Ledger, Callable[[Callable], None]]:
    """Plan how our tensors become those of a layout.

    Args:
        rules: of the layout.
        sources: shape of each of our tensors.
        title: of the conversion, for messages.

    Returns:
        The ledger, and a function that, given one that reads a tensor of ours, raises where a tensor that the layout
        does not have is not what the layout takes for granted.

    Raises:
        ConversionError: a tensor of ours without a place in the layout.
    """
    entries, dropped, checks, unmapped = [], {}, [], []
    rules = list(rules)
    for name in sources:
        found = [(rule, groups) for rule in rules if (groups := _match_target(rule, name)) is not None]
        if not found:
            unmapped.append(name)
            continue
        rule, groups = found[0]
        if isinstance(rule, Rename):
            entries.append(Entry(rule.source.format(**groups), (name,), rule.to_source))
        elif isinstance(rule, Fill):
            dropped[name] = rule.why
            checks.append((name, rule.value))
        else:
            for number, part in enumerate(rule.source):
                if part not in rule.may_lack:
                    make = functools.partial(_part, number=number, count=len(rule.source))
                    entries.append(Entry(part.format(**groups), (name,), make))
    if unmapped:
        fields = sorted({field for name in unmapped for part, field in _FIELDS_OF.items() if part in name})
        raise ConversionError(f"{title}: the layout has no place for {' and '.join(fields)} ({_listed(unmapped)})")

    def check(read: Callable[[str], Tensor]) -> None:
        for name, value in checks:
            if not bool((read(name) == value).all()):
                raise ConversionError(
                    f"{title}: {name} has values other than {value:g}, and the layout has no place for them"
                )

    return Ledger(tuple(entries), dropped, {}), check


class LedgerBuilder:
    """The ledger while it is written."""

    def __init__(self, title: str):
        self.title = title
        self.made: dict[str, Entry] = {}
        self.shapes: dict[str, tuple] = {}
        self.dropped: dict[str, str] = {}
        self.filled: dict[str, str] = {}
        self.problems: dict[str, list[str]] = {}
        self._joins: dict[str, dict[str, tuple]] = {}

    def take(self, name: str, shape: tuple, found: list) -> None:
        """Enter one tensor of the source."""
        if len(found) != 1:
            problem = "source tensors have no rule" if not found else "source tensors have several rules"
            self._note(problem, name)
            return
        ((rule, groups),) = found
        if isinstance(rule, Drop):
            self.dropped[name] = rule.why
            return
        target = rule.target.format(**groups)
        if isinstance(rule, Join):
            parts = tuple(part.format(**groups) for part in rule.source)
            lacking = tuple(part.format(**groups) for part in rule.may_lack)
            self._joins.setdefault(target, {"parts": parts, "may_lack": lacking, "found": {}})["found"][name] = shape
            return
        try:
            after = tuple(rule.to_target(torch.empty(shape, device="meta")).shape)
        except (ConversionError, RuntimeError, IndexError):
            self._note("shapes differ", f"{name} {tuple(shape)} cannot become {target}")
            return
        self._enter(Entry(target, (name,), rule.to_target), after)

    def join(self, targets: dict[str, tuple]) -> None:
        """Enter what is made of several tensors."""
        for target, join in self._joins.items():
            parts, found = join["parts"], join["found"]
            lacking = [part for part in parts if part not in found]
            self._note_all("source tensors are missing", [part for part in lacking if part not in join["may_lack"]])
            shapes = {shape[1:] for shape in found.values()}
            if len(shapes) != 1:
                self._note("shapes differ", ", ".join(f"{name} {tuple(shape)}" for name, shape in found.items()))
                continue
            absent = targets[target][0] // len(parts) if target in targets else next(iter(found.values()))[0]
            rows = sum(found[part][0] if part in found else absent for part in parts)
            make = functools.partial(_join, is_present=tuple(part in found for part in parts), absent=absent)
            self._enter(Entry(target, tuple(part for part in parts if part in found), make), (rows, *shapes.pop()))
            for part in lacking:
                if part in join["may_lack"]:
                    self.filled[f"{target} (part of {part})"] = "zero: the layout has no such tensor"

    def fill(self, name: str, shape: tuple, rule: Fill) -> None:
        """Enter a tensor that has no source."""
        self.filled[name] = rule.why
        self._enter(Entry(name, (), functools.partial(torch.full, tuple(shape), rule.value)), tuple(shape))

    def close(self, targets: dict[str, tuple], rules: list[Rule]) -> Ledger:
        """Balance."""
        for name, shape in targets.items():
            if name not in self.made:
                self._note("target tensors have no source", f"{name} (from {_sources_of(name, rules)})")
            elif tuple(shape) != self.shapes[name]:
                sources = ", ".join(self.made[name].sources)
                self._note("shapes differ", f"{sources} gives {self.shapes[name]} for {name}, expected {tuple(shape)}")
        for name, entry in self.made.items():
            if name not in targets:
                self._note("source tensors have no target", f"{', '.join(entry.sources)} (would be {name})")
        if self.problems:
            lines = [f"{problem}: {_listed(names)}" for problem, names in self.problems.items()]
            raise ConversionError(
                f"{self.title}: the ledger does not balance.\n  "
                + "\n  ".join(lines)
                + "\n  If the file is of another family, say so with --family; if it is right, its layout is new."
            )
        return Ledger(tuple(self.made[name] for name in targets), self.dropped, self.filled)

    def _enter(self, entry: Entry, shape: tuple) -> None:
        if entry.name in self.made:
            self._note("targets would be written twice", f"{entry.name} by {', '.join(entry.sources)}")
            return
        self.made[entry.name], self.shapes[entry.name] = entry, shape

    def _note(self, problem: str, name: str) -> None:
        self.problems.setdefault(problem, []).append(name)

    def _note_all(self, problem: str, names: list[str]) -> None:
        for name in names:
            self._note(problem, name)


def matches(rule: Rule, name: str) -> bool:
    """Whether a tensor of theirs is one that the rule knows."""
    return _match_source(rule, name) is not None


def _sources_of(name: str, rules: list[Rule]) -> str:
    """What a tensor of ours would be made from."""
    for rule in rules:
        groups = _match_target(rule, name)
        if groups is not None and not isinstance(rule, Fill):
            parts = rule.source if isinstance(rule, Join) else (rule.source,)
            return " and ".join(part.format(**groups) for part in parts)
    return "nothing in this layout"


def _match_source(rule: Rule, name: str) -> dict | None:
    if isinstance(rule, Fill):
        return None
    for pattern in rule.source if isinstance(rule, Join) else (rule.source,):
        groups = _match(pattern, name)
        if groups is not None:
            return groups
    return None


def _match_target(rule: Rule, name: str) -> dict | None:
    return None if isinstance(rule, Drop) else _match(rule.target, name)


def _match(pattern: str, name: str) -> dict | None:
    found = _compile(pattern).fullmatch(name)
    return None if found is None else found.groupdict()


@functools.cache
def _compile(pattern: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", pattern)
    return re.compile(
        "".join(
            f"(?P<{part}>{_PLACEHOLDERS[part]})" if number % 2 else re.escape(part)
            for number, part in enumerate(parts)
        )
    )


def _join(*tensors: Tensor, is_present: tuple[bool, ...], absent: int) -> Tensor:
    tensors, parts = list(tensors), []
    for present in is_present:
        parts.append(tensors.pop(0) if present else None)
    like = next(part for part in parts if part is not None)
    return torch.cat([like.new_zeros(absent, *like.shape[1:]) if part is None else part for part in parts])


def _part(tensor: Tensor, *, number: int, count: int) -> Tensor:
    return tensor.chunk(count)[number]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMED])
    rest = len(names) - _NUM_NAMED
    return f"{len(names)}: {shown}" + (f" and {rest} more" if rest > 0 else "")


__all__ = [
    "ConversionError",
    "Drop",
    "Entry",
    "Fill",
    "Join",
    "Ledger",
    "Rename",
    "Rule",
    "add_axes",
    "add_axis",
    "balance_to_source",
    "balance_to_target",
    "drop_axes",
    "drop_axis",
    "keep",
    "matches",
    "stage",
    "transpose",
]
