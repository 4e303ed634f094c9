"""Where labels come from, and how what is stored becomes class numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .messages import list_names, show_name


if TYPE_CHECKING:
    import datasets

    from .opened import OpenedDataset


LABEL_NAMES = ("label", "labels", "cls", "class", "category")
_WORDS = ("string", "large_string", "bool", "float")  # types whose values are read before they count as classes


@dataclasses.dataclass(frozen=True)
class Labels:
    """The classes of a source.

    Args:
        column: where labels are stored; None: there are none.
        names: class names; None: classes are numbers, as stored.
        codes: class number of each stored value; None: stored values are class numbers.
        origin: how they were found, or why there are none, for people.
        are_lists: an image has any number of classes.
    """

    column: str | None
    names: tuple[str, ...] | None
    codes: dict | None
    origin: str
    are_lists: bool = False

    def encode(self, row: dict) -> int | tuple[int, ...] | None:
        """The class number of a row; None where its label is empty or, as in test sets of the Hub, below 0.

        Of a column of lists: 0 or 1 for each class; -1 for all where the cell is empty, unlike an empty list.
        """
        if self.are_lists:
            return self._encode_list(row[self.column])
        value = _clean(row[self.column]) if self.column else None
        if value is None or self.codes is None:
            return value
        return self.codes.get(value)

    def _encode_list(self, values: list | None) -> tuple[int, ...]:
        if values is None:
            return (-1,) * len(self.names)
        if self.codes == {}:  # 0 or 1 for each class, as stored
            return tuple(map(int, values))
        found = {self.codes.get(value, value) if self.codes else value for value in map(_clean, values)}
        return tuple(int(number in found) for number in range(len(self.names)))


def find_labels(opened: OpenedDataset, column: str | None, *, features: datasets.Features) -> Labels:
    """The labels of a source, from the column that is named or else found.

    Words, numbers with gaps, booleans and whole floats become class numbers in sorted order, over all splits. Empty
    cells and negative numbers are no labels.

    Raises:
        ValueError: the column holds something else.
    """
    from datasets import ClassLabel

    is_asked = column is not None
    column = column or _find_column(features)
    if column is None:
        reason = opened.label_origin or "no column holds classes (name one: --columns label=NAME)"
        return Labels(None, None, None, reason)
    origin = opened.label_origin or f"the column {column!r}"
    if holds_lists(features[column]):
        return _find_lists(opened, column, origin, features[column].feature)
    if isinstance(features[column], ClassLabel):
        return Labels(column, tuple(features[column].names), None, origin)
    if opened.is_stream:
        if "int" in features[column].dtype:
            return Labels(column, None, None, origin)
        if is_asked:
            raise ValueError(
                f"open_images: the column {column!r} holds {features[column].dtype}, and the labels of a stream are "
                "not known in advance: give a column of class numbers or of type ClassLabel, or do not stream"
            )
        return Labels(
            None,
            None,
            None,
            f"{column!r} is not a column of class numbers, and the values of a stream are not known in advance",
        )
    splits = [part for part in (opened.splits or {"": opened.dataset}).values() if column in part.column_names]
    try:
        values = {_clean(value) for part in splits for value in part.unique(column)} - {None}
    except ValueError:
        if is_asked:
            raise
        return Labels(None, None, None, f"the column {column!r} holds fractions")
    is_words = any(isinstance(value, str) for value in values)
    if is_words and not is_asked and len(values) == sum(len(part) for part in splits) > 2:
        return Labels(None, None, None, f"the column {column!r} holds {len(values)} texts that all differ: no classes")
    ordered = sorted(values)
    if not is_words and ordered == list(range(len(ordered))):
        return Labels(column, None, None, origin)
    codes = {value: number for number, value in enumerate(ordered)}
    names = tuple(ordered) if is_words else None
    kind = "words" if is_words else f"numbers from {ordered[0]} to {ordered[-1]} with gaps" if ordered else "no value"
    return Labels(column, names, codes, f"{origin} ({kind})")


def _find_lists(opened: OpenedDataset, column: str, origin: str, kind: object) -> Labels:
    """Labels of a column of lists: of class numbers or words, or of 0 or 1 for each class."""
    from datasets import ClassLabel

    if isinstance(kind, ClassLabel):
        return Labels(column, tuple(kind.names), None, f"{origin} (lists)", are_lists=True)
    if opened.is_stream:
        raise ValueError(
            f"open_images: the column {column!r} holds lists of {kind.dtype}, and the classes of a stream are not "
            "known in advance: give lists of type ClassLabel, or do not stream"
        )
    splits = [part for part in (opened.splits or {"": opened.dataset}).values() if column in part.column_names]
    rows = [row for part in splits for row in part[column][:] if row is not None]
    values, lengths = set(itertools.chain.from_iterable(rows)), {len(row) for row in rows}
    if values <= {0, 1} and len(lengths) == 1 and min(lengths) >= 2:
        names = tuple(map(str, range(min(lengths))))
        return Labels(column, names, {}, f"{origin} (0 or 1 for each class)", are_lists=True)
    ordered = sorted({_clean(value) for value in values} - {None})
    if not ordered:
        raise ValueError(f"open_images: the column {column!r} holds no class: all of its {len(rows)} lists are empty")
    codes = {value: number for number, value in enumerate(ordered)}
    return Labels(column, tuple(map(str, ordered)), codes, f"{origin} (lists)", are_lists=True)


def describe_labels(labels: Labels, numbers: Iterable[int | None] | None, notes: Iterable[str]) -> str:
    """Lines for the terminal, before work starts: the number of classes, how they were found, what was left out."""
    if labels.column is None:
        lines = [f"labels: none; {labels.origin}"]
    elif numbers is None:
        count = "classes of unknown number" if labels.names is None else f"{len(labels.names)} classes"
        lines = [f"labels: {count} from {labels.origin}"]
    else:
        numbers = list(numbers)
        if labels.are_lists:
            num_missing = sum(-1 in row for row in numbers)
            used = {number for row in numbers for number, is_there in enumerate(row) if is_there == 1}
        else:
            used, num_missing = set(numbers) - {None}, numbers.count(None)
        names = labels.names or [*labels.codes] if labels.codes else labels.names
        count = f"{len(names)} classes" if names else f"{len(used)} classes"
        if names and len(used) < len(names):
            count += f", {len(used)} of them in this split,"
        shown = list_names(names, num_shown=5) if names else f"numbers {min(used)} to {max(used)}" if used else "none"
        lines = [f"labels: {count} from {labels.origin}: {show_name(shown)}"]
        if num_missing:
            lines[0] += f"; {num_missing} of {len(numbers)} images have no label"
    return "\n".join([*lines, *(f"note: {show_name(note)}" for note in notes)])


def _find_column(features: datasets.Features) -> str | None:
    from datasets import ClassLabel

    classes = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    numbers = [name for name in LABEL_NAMES[:3] if "int" in getattr(features.get(name), "dtype", "")]
    if classes or numbers:
        found = [name for name in features if name in classes or name in numbers]
        best = found if len(found) == 1 else [name for name in LABEL_NAMES if name in found][:1]
        if not best:
            raise ValueError(
                f"open_images: several columns qualify: {list_names(found)}; choose one with --columns label=NAME "
                "(label_column)."
            )
        return best[0]
    return next((name for name in LABEL_NAMES if name in features and holds_classes(features[name])), None)


def holds_classes(kind: object) -> bool:
    """Whether a column of this type may hold classes."""
    from datasets import ClassLabel, Value

    is_value = isinstance(kind, Value) and ("int" in kind.dtype or kind.dtype.startswith(_WORDS))
    return is_value or isinstance(kind, ClassLabel)


def holds_lists(kind: object) -> bool:
    """Whether a column of this type may hold lists of classes."""
    return holds_classes(getattr(kind, "feature", None))


def _clean(value: object) -> int | str | None:
    """A stored label; None where it is empty, not a number or negative.

    Raises:
        ValueError: a number that is not whole.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (str, bool)):
        return unicodedata.normalize("NFC", str(value)).strip() or None
    if value != int(value):
        raise ValueError(f"open_images: expected labels to be words or whole numbers, got {value!r}")
    return int(value) if value >= 0 else None
