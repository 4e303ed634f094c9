"""Features on disk: files of tensors whose rows are images, of which any can be read alone.

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


class Features:
    """Features of one kind, read from their shards when they are asked for.

    Args:
        files: the shards, in order.

    Attributes:
        names: of the tensors that every image has.
        num_nonfinite: images left out because a feature was not finite.
        unreadable: why an image could not be read, for each that could not.
    """

    def __init__(self, files: Sequence[pathlib.Path]):
        self._shards = [safe_open(file, framework="pt") for file in files]
        facts = [json.loads(shard.metadata()["facts"]) for shard in self._shards]
        sizes = [shard.get_slice("numbers").get_shape()[0] for shard in self._shards]
        self._ends = list(itertools.accumulate(sizes))
        # A shard of which no image could be read has no features.
        full = [shard for shard, size in zip(self._shards, sizes) if size]
        self.names = frozenset(full[0].keys()) - {"numbers"} if full else frozenset()
        self.num_nonfinite = sum(fact["num_nonfinite"] for fact in facts)
        self.unreadable = [line for fact in facts for line in fact["unreadable"]]

    def __len__(self) -> int:
        return self._ends[-1]

    def counts(self) -> dict:
        """How many images have features, and what became of the others."""
        return {
            "num_images": len(self),
            "num_unreadable": len(self.unreadable),
            "num_nonfinite": self.num_nonfinite,
            "unreadable": self.unreadable[:3],
        }

    def load(self, name: str) -> Tensor:
        """One tensor of all images."""
        return torch.cat([shard.get_tensor(name) for shard in self._shards if name in shard.keys()])  # noqa: SIM118

    def take(self, name: str, rows: Tensor) -> Tensor:
        """One tensor of some images, in the order asked for; nothing else is read."""
        return torch.stack([self._row(name, int(row)) for row in rows])

    def _row(self, name: str, row: int) -> Tensor:
        number = bisect.bisect_right(self._ends, row)
        start = self._ends[number - 1] if number else 0
        return self._shards[number].get_slice(name)[row - start]


def save_shard(tensors: dict[str, Tensor], file: pathlib.Path, *, facts: dict) -> None:
    """Write a shard, beside its final place first, with facts of JSON: `unreadable` and `num_nonfinite`."""
    with atomic_write(file) as part:
        save_file(tensors, part, metadata={"facts": json.dumps(facts)})


__all__ = ["Features", "save_shard"]
