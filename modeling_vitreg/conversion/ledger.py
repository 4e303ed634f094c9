"""The ledger of a conversion: every tensor of the source is used once or dropped, every target is written once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from modeling_vitreg.names import list_first

from .rules import ConversionError, Drop, Fill, Join, Rename, Rule, Split, match_source, match_target


# Field of the configuration that a tensor belongs to.
_FIELDS_OF = {
    "pre_layernorm": "has_pre_norm",
    "projection": "projection_size",
    "register_tokens": "num_register_tokens",
    "distillation_token": "has_distillation_token",
    "cls_token": "has_cls_token",
    "mask_token": "has_mask_token",
    "layer_scale": "layer_scale_init_value",
    "position_embeddings": "position_embedding_type",
    "rotary_frequencies": "rope_style",
    "position_bias": "relative_position_bias",
    "patch_norm": "has_patch_norm",
    "query_norm": "has_query_key_norm",
    "key_norm": "has_query_key_norm",
    "attention.norm": "has_attention_norm",
    "attention.gate": "attention_gate",
    "mlp.norm": "has_mlp_norm",
    "attention_pooling": "pooling",
    "classifier": "a head (save its base model alone first: model.base_model.save_pretrained(folder))",
}
_NUM_NAMED = 12  # names in a message before it says how many more


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Args:
        name: name.
        sources: names of the tensors that it is made from.
        make: function of those tensors.
    """

    name: str
    sources: tuple[str, ...]
    make: Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The plan for every tensor of a conversion.

    Args:
        entries: tensors to be written.
        dropped: tensors of the source that are not used, with the reason.
        filled: tensors of the target that have no source, with the reason.
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
    """Plan how the tensors of a layout become those of a model of this family.

    Args:
        rules: rules of the layout.
        sources: shape of each tensor of the layout.
        targets: shape of each tensor of the model.
        title: "A to B", for messages.

    Raises:
        ConversionError: a tensor without a rule, a target without a source or with two, or shapes that differ.
    """
    rules, book = list(rules), LedgerBuilder(title)
    for name, shape in sources.items():
        book.take(name, shape, [(rule, found) for rule in rules if (found := match_source(rule, name)) is not None])
    for name, shape in targets.items():
        for rule in rules:
            if isinstance(rule, Fill) and match_target(rule, name) is not None and name not in book.made:
                book.fill(name, shape, rule)
    book.join(targets)
    return book.close(targets, rules)


def balance_to_source(
    rules: Iterable[Rule], sources: dict[str, tuple], *, title: str
) -> tuple[Ledger, Callable[[Callable], None]]:
    """Plan how the tensors of a model of this family become those of a layout.

    Args:
        rules: rules of the layout.
        sources: shape of each tensor of the model.
        title: "A to B", for messages.

    Returns:
        The ledger; and a function that takes one which reads a tensor of the model, and raises if a tensor that the
        layout leaves out does not have the value that the layout implies.

    Raises:
        ConversionError: the layout has no place for a tensor.
    """
    entries, dropped, checks, unmapped = [], {}, [], []
    rules = list(rules)
    for name in sources:
        found = [(rule, groups) for rule in rules if (groups := match_target(rule, name)) is not None]
        if not found:
            unmapped.append(name)
            continue
        rule, groups = found[0]
        if isinstance(rule, Rename):
            entries.append(Entry(rule.source.format(**groups), (name,), rule.to_source))
        elif isinstance(rule, Fill):
            dropped[name] = rule.why
            checks.append((name, rule.value))
        elif isinstance(rule, Split):
            parts = tuple(part.format(**groups) for part in rule.target)
            if name == parts[0]:  # written once, when the first of its parts comes
                entries.append(Entry(rule.source.format(**groups), parts, rule.whole))
        else:
            for number, part in enumerate(rule.source):
                if part not in rule.may_lack:
                    make = functools.partial(_part, rule=rule, number=number)
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
    """A ledger that grows tensor by tensor."""

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
        if isinstance(rule, Split):
            for number, pattern in enumerate(rule.target):
                make = functools.partial(rule.part, number=number)
                self._rename(name, shape, pattern.format(**groups), make)
            return
        target = rule.target.format(**groups)
        if isinstance(rule, Join):
            parts = tuple(part.format(**groups) for part in rule.source)
            lacking = tuple(part.format(**groups) for part in rule.may_lack)
            join = {"parts": parts, "may_lack": lacking, "found": {}, "rule": rule}
            self._joins.setdefault(target, join)["found"][name] = shape
            return
        self._rename(name, shape, target, rule.to_target)

    def _rename(self, name: str, shape: tuple, target: str, make: Callable[[Tensor], Tensor]) -> None:
        try:
            after = tuple(make(torch.empty(shape, device="meta")).shape)
        except (ConversionError, RuntimeError, IndexError):
            self._note("shapes differ", f"{name} {tuple(shape)} cannot become {target}")
            return
        self._enter(Entry(target, (name,), make), after)

    def join(self, targets: dict[str, tuple]) -> None:
        """Enter a tensor that is made of several."""
        for target, join in self._joins.items():
            parts, found = join["parts"], join["found"]
            lacking = [part for part in parts if part not in found]
            for part in lacking:
                if part not in join["may_lack"]:
                    self._note("source tensors are missing", part)
            shapes = {shape[1:] for shape in found.values()}
            if len(shapes) != 1:
                self._note("shapes differ", ", ".join(f"{name} {tuple(shape)}" for name, shape in found.items()))
                continue
            most = next(iter(found.values()))[0] * len(parts)
            absent = join["rule"].lengths(targets[target][0] if target in targets else most)
            lengths = [found[part][0] if part in found else length for part, length in zip(parts, absent)]
            rows = sum(lengths)
            lengths = tuple(None if part in found else length for part, length in zip(parts, lengths))
            make = functools.partial(_join, zeros=lengths)
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
                + "\n  If the file is of another family, name it with --family. Otherwise this layout is not "
                "supported yet."
            )
        return Ledger(tuple(self.made[name] for name in targets), self.dropped, self.filled)

    def _enter(self, entry: Entry, shape: tuple) -> None:
        if entry.name in self.made:
            self._note("targets would be written twice", f"{entry.name} by {', '.join(entry.sources)}")
            return
        self.made[entry.name], self.shapes[entry.name] = entry, shape

    def _note(self, problem: str, name: str) -> None:
        self.problems.setdefault(problem, []).append(name)


def _sources_of(name: str, rules: list[Rule]) -> str:
    """Names of the tensors that a tensor of the model would be made from."""
    for rule in rules:
        groups = match_target(rule, name)
        if groups is not None and not isinstance(rule, Fill):
            parts = rule.source if isinstance(rule, Join) else (rule.source,)
            return " and ".join(part.format(**groups) for part in parts)
    return "no tensor of this layout"


def _join(*tensors: Tensor, zeros: tuple[int | None, ...]) -> Tensor:
    """Parts in order; `zeros` has the lengths of the absent ones, and None for those that are there."""
    parts, rest = iter(tensors), tensors[0].shape[1:]
    return torch.cat([next(parts) if length is None else tensors[0].new_zeros(length, *rest) for length in zeros])


def _part(tensor: Tensor, *, rule: Join, number: int) -> Tensor:
    return tensor.split(rule.lengths(len(tensor)))[number]


def _listed(names: list[str]) -> str:
    return f"{len(names)}: {list_first(names, _NUM_NAMED)}"
