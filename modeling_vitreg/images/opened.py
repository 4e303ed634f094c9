"""A source that was opened, with all its columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import datasets


@dataclasses.dataclass(frozen=True)
class OpenedDataset:
    """One split of a source, as it was stored.

    Args:
        dataset: a dataset of the library `datasets`.
        files: local files of a stream.
        revision: commit of a dataset of the Hub, else None.
        splits: all splits of an indexed source, so that words become the same class numbers in each; None: only this.
        label_origin: "folders", or the reason why there are no labels; None: labels are in a column, if anywhere.
        notes: what was left out, for people.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    files: Sequence[str] = ()
    revision: str | None = None
    splits: Mapping[str, datasets.Dataset] | None = None
    label_origin: str | None = None
    notes: Sequence[str] = ()

    @property
    def is_stream(self) -> bool:
        """Whether it has no length and no index."""
        import datasets

        return isinstance(self.dataset, datasets.IterableDataset)
