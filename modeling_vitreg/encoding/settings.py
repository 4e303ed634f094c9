"""Settings of a pass, and what it counted."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable

from modeling_vitreg.images.annotations import NoteCounter
from modeling_vitreg.settings import expect


PRECISIONS = ("float32", "bfloat16", "float16")
NUM_NAMED = 20  # images that are left out whose names a report keeps


@dataclasses.dataclass(frozen=True)
class PassSettings:
    """How a pass reads and encodes.

    Args:
        batch_size: images per forward pass.
        workers: processes that read and cut images; 0: this process; None: chosen by the cores of the machine. Only a
            source or a stream of `open_images` is read by workers.
        precision: one of `PRECISIONS`, in which the matrix products run; None: bfloat16 on a GPU that has it, else
            that of the weights.
        compile: compile the layers of the model.
        limit: maximum number of images to read, including unreadable ones; None for all.
        shard_size: images that consumers store and resume together; None: they do not.
        has_progress_bar: show a progress bar.
        title: of the progress bar; None: the name of the encoder.

    Raises:
        ValueError: a value out of its range.
    """

    batch_size: int = 32
    workers: int | None = 0
    precision: str | None = None
    compile: bool = False
    limit: int | None = None
    shard_size: int | None = None
    has_progress_bar: bool = True
    title: str | None = None

    def __post_init__(self):
        counts = dict.fromkeys(("batch_size", "limit", "shard_size"), "[1, inf)")
        expect(self, "", **counts, workers="[0, inf)", precision=PRECISIONS)


@dataclasses.dataclass
class PassCounts:
    """What a pass read, and what it left out.

    Args:
        num_seen: images that were read and encoded, finite or not.
        unreadable: by the place of an image in the source, its name and the reason.
        nonfinite: by the place, the name of an image with a feature that is not finite.
        notes: what was done to bring images and annotations together.
        sizes: (rows, columns) in pixels of the batches, in order of first appearance.
        stopped_by: why the pass ended early; None: it did not.
        precision: in which the matrix products ran.
    """

    num_seen: int = 0
    unreadable: dict[int, str] = dataclasses.field(default_factory=dict)
    nonfinite: dict[int, str] = dataclasses.field(default_factory=dict)
    notes: NoteCounter = dataclasses.field(default_factory=NoteCounter)
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    stopped_by: str | None = None
    precision: str = "float32"

    @property
    def num_images(self) -> int:
        """Images that consumers saw."""
        return self.num_seen - len(self.nonfinite)

    def merge(self, other: PassCounts) -> None:
        """Add what another process counted."""
        self.num_seen += other.num_seen
        self.unreadable |= other.unreadable
        self.nonfinite |= other.nonfinite
        self.notes.merge(other.notes.counts)
        self.sizes = list(dict.fromkeys([*self.sizes, *other.sizes]))
        self.stopped_by = self.stopped_by or other.stopped_by

    @classmethod
    def join(cls, parts: Iterable[PassCounts]) -> PassCounts:
        """What several passes, or shards, counted together."""
        first, *others = [*parts] or [cls()]
        joined = copy.deepcopy(first)
        for other in others:
            joined.merge(other)
        return joined

    def to_json(self) -> dict:
        """All of it for JSON."""
        return {**vars(self), "notes": self.notes.counts}

    @classmethod
    def from_json(cls, values: dict) -> PassCounts:
        """From what `to_json` returned and JSON stored."""
        found = cls(**{**values, "notes": NoteCounter(), "sizes": [tuple(size) for size in values["sizes"]]})
        for name in ("unreadable", "nonfinite"):
            setattr(found, name, {int(place): text for place, text in values[name].items()})
        found.notes.merge(values["notes"])
        return found

    def describe(self) -> dict:
        """The counts as reports write them: numbers, the first names and reasons, and whether the pass is complete."""
        unreadable, nonfinite = (
            [text for _, text in sorted(found.items())][:NUM_NAMED] for found in (self.unreadable, self.nonfinite)
        )
        return {
            "num_images": self.num_images,
            "num_unreadable": len(self.unreadable),
            "unreadable": unreadable,
            "num_nonfinite": len(self.nonfinite),
            "nonfinite": nonfinite,
            "notes": self.notes.lines(self.num_seen + len(self.unreadable)),
            "is_complete": self.stopped_by is None,
            "stopped_by": self.stopped_by,
        }
