"""What a worker of the training loader does: read the images of a micro-batch, cut their views, draw their masks.

Letters: B images of a micro-batch, V views, P patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from modeling_vitreg.images import AnnotatedImage, ImageSource, UnreadableImage, derive_seed, read_annotated

from .colors import change_batch
from .crops import SizedCrops


# First words of seeds, so that order, views, masks and sizes are independent of each other.
SEED_OF_ORDER, _SEED_OF_VIEWS, _SEED_OF_MASKS, SEED_OF_SIZES = range(4)
_NUM_TRIES = 100  # images tried in place of an unreadable one


class BatchSpec(NamedTuple):
    """Which images a micro-batch holds."""

    step: int
    micro: int
    numbers: range
    keys: list  # indices, or raw images


@dataclasses.dataclass(frozen=True)
class BatchBuilder:
    """Makes a batch from its specification, in a worker."""

    source: ImageSource | None
    num_channels: int
    make_views: Callable[..., dict[str, Tensor]]
    make_masks: Callable[..., Tensor] | None
    make_text: Callable[[str], Tensor] | None
    micro_batch_size: int
    rank: int
    num_processes: int
    seed: int
    changes_colors: bool

    def __getitem__(self, spec: BatchSpec) -> dict:
        batch, labels, texts, unreadable, notes = {}, [], [], [], []
        make_views, make_masks = self.make_views, self.make_masks
        if isinstance(make_views, SizedCrops):  # of all processes and micro-batches of a step the same
            make_views = make_views.of_step(derive_seed(SEED_OF_SIZES, self.seed, spec.step))
        for place, number in enumerate(spec.numbers):
            raw, found, problems = self._read(spec.keys, place)
            views = self._cut(make_views, found, number)
            if not batch:
                shapes = {
                    name: (view.shape[0], self.micro_batch_size, *view.shape[1:]) for name, view in views.items()
                }
                batch = {name: torch.empty(shape, dtype=views[name].dtype) for name, shape in shapes.items()}
            made = {name: tuple(view.shape) for name, view in views.items()}
            expected = {name: (*view.shape[:1], *view.shape[2:]) for name, view in batch.items()}
            require(made == expected, f"make_views returned {made} after {expected}; all images need the same shapes")
            for name, view in views.items():
                batch[name][:, place] = view  # [V, ...] -> [V, B, ...]
            labels.append(-1 if raw["label"] is None else raw["label"])
            if self.make_text is not None:
                texts.append(self.make_text(raw["text"]))
            unreadable += [(problem.name, problem.reason) for problem in problems[:1]]
            notes += [(found.name, note) for note in found.notes]
        if self.changes_colors:
            change_batch(batch)
        captions = {"texts": torch.stack(texts)} if texts else {}
        if make_masks is not None and make_views is not self.make_views:
            make_masks = make_masks.of_size(tuple(batch["global_views"].shape[-2:]))
        masks = {} if make_masks is None else {"masks": self._mask(make_masks, spec)}
        counts = {"labels": torch.tensor(labels), "numbers": torch.tensor(spec.numbers)}
        return {**batch, **masks, **captions, **counts, "unreadable": unreadable, "notes": notes}

    def _read(self, keys: list, place: int) -> tuple[dict, AnnotatedImage, list[UnreadableImage]]:
        problems = []
        for key in self._candidates(keys, place):
            raw = key if self.source is None else self.source.raw(key)
            try:
                return raw, read_annotated(raw, num_channels=self.num_channels), problems
            except UnreadableImage as problem:
                problems.append(problem)
        raise RuntimeError(
            f"ViewLoader: none of {len(problems)} images in a row can be read; the first: {problems[0]}. "
            "Check that the source is complete and readable."
        )

    def _candidates(self, keys: list, place: int) -> Iterator:
        if self.source is None:
            return iter(keys[place:] + keys[:place])
        num_tries = min(_NUM_TRIES, len(self.source))
        return ((keys[place] + step) % len(self.source) for step in range(num_tries))

    def _cut(self, make_views: Callable, found: AnnotatedImage, number: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would also reset the generators of the accelerators, on which models run.
            torch.default_generator.manual_seed(derive_seed(_SEED_OF_VIEWS, self.seed, number))
            try:
                return make_views(found.image, **found.maps)
            except Exception as error:
                raise RuntimeError(
                    f"ViewLoader: make_views failed on image number {number}, {found.name}, {found.image.width} x "
                    f"{found.image.height} pixels: {type(error).__name__}: {error}"
                ) from error

    def _mask(self, make_masks: Callable[..., Tensor], spec: BatchSpec) -> Tensor:
        num_images = self.num_processes * self.micro_batch_size
        generator = torch.Generator().manual_seed(derive_seed(_SEED_OF_MASKS, self.seed, spec.step, spec.micro))
        masks = make_masks(num_images, generator=generator)
        require(
            masks.ndim == 3 and masks.shape[1] == num_images and masks.dtype == torch.bool,
            f"make_masks returned {masks.dtype} {tuple(masks.shape)}; expected bool (views, {num_images}, patches)",
        )
        first = self.rank * self.micro_batch_size
        return masks[:, first : first + self.micro_batch_size].clone()  # [V, num_images, P] -> [V, B, P]


def require(is_true: bool, message: str) -> None:
    if not is_true:
        raise ValueError(f"ViewLoader: {message}.")
