"""Features on disk: safetensors files with one row per image, from which single rows can be read.

Letters: I images.
"""

from __future__ import annotations

import bisect
import itertools
import json
import pathlib
from collections.abc import Sequence

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeling_vitreg.files import atomic_write
from modeling_vitreg.images.annotations import NoteCounter


_NUM_NAMED = 20  # images that are left out whose names are kept in a report


class Features:
    """Features of one kind, read from their shards on demand.

    Args:
        files: the shards, in order.

    Attributes:
        names: names of the tensors.
        num_nonfinite: number of images that were left out because a feature was not finite.
        nonfinite: names of these images.
        notes: counts of what was done to bring images and annotations together.
        unreadable: for each image that could not be read, its name and the reason.
    """

    def __init__(self, files: Sequence[pathlib.Path]):
        self._shards = [safe_open(file, framework="pt") for file in files]
        facts = [json.loads(shard.metadata()["facts"]) for shard in self._shards]
        sizes = [shard.get_slice("numbers").get_shape()[0] for shard in self._shards]
        self._ends = list(itertools.accumulate(sizes))
        # A shard without a readable image has no features.
        full = [shard for shard, size in zip(self._shards, sizes) if size]
        self.names = frozenset(full[0].keys()) - {"numbers"} if full else frozenset()
        self.num_nonfinite = sum(fact["num_nonfinite"] for fact in facts)
        self.nonfinite = [line for fact in facts for line in fact.get("nonfinite", ())]  # of earlier versions: none
        self.unreadable = [line for fact in facts for line in fact["unreadable"]]
        self.notes = NoteCounter()
        for fact in facts:
            self.notes.merge(fact.get("notes", {}))

    def __len__(self) -> int:
        return self._ends[-1]

    def counts(self) -> dict:
        """Numbers of images that have features and that were left out, and the reasons."""
        return {
            "num_images": len(self),
            "num_unreadable": len(self.unreadable),
            "num_nonfinite": self.num_nonfinite,
            "unreadable": self.unreadable[:_NUM_NAMED],
            "nonfinite": self.nonfinite[:_NUM_NAMED],
            "notes": self.notes.lines(len(self) + len(self.unreadable) + self.num_nonfinite),
        }

    def load(self, name: str) -> Tensor:
        """Tensor of all images."""
        return torch.cat([shard.get_tensor(name) for shard in self._shards if name in shard.keys()])  # noqa: SIM118

    def take(self, name: str, rows: Tensor) -> Tensor:
        """Tensor of some images in the given order; other rows are not read."""
        return torch.stack([self._row(name, int(row)) for row in rows])

    def _row(self, name: str, row: int) -> Tensor:
        number = bisect.bisect_right(self._ends, row)
        start = self._ends[number - 1] if number else 0
        return self._shards[number].get_slice(name)[row - start]


def save_shard(tensors: dict[str, Tensor], file: pathlib.Path, *, facts: dict) -> None:
    """Write a shard with facts in JSON: `unreadable`, `num_nonfinite`, `nonfinite`. It appears whole or not at all."""
    with atomic_write(file) as part:
        save_file(tensors, part, metadata={"facts": json.dumps(facts)})


__all__ = ["Features", "save_shard"]
