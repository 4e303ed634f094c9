"""The training loader: order and augmentation depend only on the seed and the number of an image.

A run reads images 0, 1, 2, ... without end, so a run that is killed resumes with the same bytes and any number of
workers; with an indexed source also with another number of processes. Workers decode and augment; the main process
chooses the images, counts unreadable ones and holds the state of a stream.

Letters: B images of a micro-batch, V views, P patches, G images of a step in all processes.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from modeling_vitreg.images import ImageSource, ImageStream
from modeling_vitreg.workers import ignore_interrupts, share, take

from .batches import SEED_OF_ORDER, BatchBuilder, BatchSpec, require


_NUM_CANDIDATES = 8  # of a stream's micro-batch, so that a broken image has a substitute even in one of one image
_NUM_SEEN = 200  # images before a share of unreadable ones says something
_NUM_STATES = 16  # steps whose states are kept


class ViewLoader:
    """Endless micro-batches of views: of step s the images number s * G ... (s + 1) * G - 1.

    for step s, micro-batch m, process r, place i of B:
        number = s * G + (m * num_processes + r) * B + i
        different = ceil(G / num_repeats)
        pass, position = divmod(s * different + (number - s * G) % different, len(source))
        image = source[permutation(seed, pass)[position]]
        views[:, i] = make_views(image, **maps), with torch's generator seeded by (seed, number)
        masks = make_masks(num_processes * B, generator seeded by (seed, s, m))[:, r * B : (r + 1) * B]

    Of a stream each process takes its own next images instead, ceil(B / num_repeats) different ones for a micro-batch;
    a number then only seeds the views.

    A batch is a dictionary: what `make_views` returns with the images along axis 1, (V, B, ...); `masks` (V, B, P) if
    there are any; `texts` (B, N) if `make_text` is given; `labels` int64 (B,), -1 for none; `numbers` int64 (B,);
    `unreadable`, a list of (name, reason), and `notes`, what was done to bring annotations and images together,
    likewise. An unreadable image is replaced by the next readable one, of the source or,
    of a stream, of those read with it; the substitute is cut as the original would have been.

    Args:
        source: what `open_images` returns.
        num_channels: of the decoded images, 1 (grey), 3 (RGB) or 4 (RGBA).
        make_views: cuts an image into tensors (V, ...), by name, of the same shapes for all images; or a `SizedCrops`,
            which makes the function of a step, with seed (seed, step), the same in all processes. The maps of a
            source that has some, arrays (height, width), come as keywords. It draws from torch's global generator
            only. With workers that are not forked it has to be picklable.
        make_text: makes a tensor (N,) of the caption of an image, whose source was opened with a text column; or None.
        make_masks: called as make_masks(num_images, generator=generator), returns bool (V, num_images, P); or None.
        micro_batch_size: B.
        num_accumulations: micro-batches of a step.
        num_repeats: how often an image is in a step, each time with other crops (repeated augmentation, Hoffer
            et al. 2020).
        rank: rank of this process.
        num_processes: number of processes that share the images.
        seed: 0 or a positive integer, the same in all processes.
        num_workers: processes that decode; 0: this one.
        first_step: number of the first batch.
        state: what `state_after(first_step - 1)` returned in this process; needed to resume a stream, and for other
            sources a check that the data and the settings are the same.
        max_unreadable_share: of the images seen, at least 200 of them; above it the loader stops. 0: it stops at the
            first.
        pin_memory: see `torch.utils.data.DataLoader`.
        changes_colors: workers change the colours of views as `make_views` drew them. Else the changes come with the
            views, for `Objective.to_device`, which is far faster on anything but a CPU.

    Raises:
        ValueError: a number outside its range; a state of other data, another seed or another step.
    """

    def __init__(
        self,
        source: ImageSource | ImageStream,
        *,
        num_channels: int = 3,
        make_views: Callable[..., dict[str, Tensor]],
        make_masks: Callable[..., Tensor] | None,
        make_text: Callable[[str], Tensor] | None = None,
        micro_batch_size: int,
        num_accumulations: int = 1,
        num_repeats: int = 1,
        rank: int = 0,
        num_processes: int = 1,
        seed: int,
        num_workers: int = 0,
        first_step: int = 0,
        state: dict | None = None,
        max_unreadable_share: float = 0.05,
        pin_memory: bool = False,
        changes_colors: bool = False,
    ):
        counts = {"micro_batch_size": micro_batch_size, "num_accumulations": num_accumulations}
        for name, count in (counts | {"num_repeats": num_repeats, "num_processes": num_processes}).items():
            require(_is_count(count) and count > 0, f"expected {name} to be a positive integer, got {count!r}")
        for name, count in {"seed": seed, "num_workers": num_workers, "first_step": first_step}.items():
            require(_is_count(count), f"expected {name} to be 0 or a positive integer, got {count!r}")
        require(_is_count(rank) and rank < num_processes, f"expected rank in 0 ... {num_processes - 1}, got {rank!r}")
        share = max_unreadable_share
        require(0 <= share <= 1, f"expected max_unreadable_share in [0, 1], got {share!r}")
        self._stream = source if isinstance(source, ImageStream) else None
        require(self._stream is not None or len(source) > 0, "the source holds no images")
        self._source = source
        self._builder = BatchBuilder(
            source=None if self._stream else source,
            num_channels=num_channels,
            make_views=make_views,
            make_masks=make_masks,
            make_text=make_text,
            micro_batch_size=micro_batch_size,
            rank=rank,
            num_processes=num_processes,
            seed=seed,
            changes_colors=changes_colors,
        )
        self._num_accumulations, self._num_repeats = num_accumulations, num_repeats
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._first_step, self._max_unreadable_share = first_step, max_unreadable_share
        self._first_state = self._check(state)
        self._states = {first_step - 1: self._first_state}

    @property
    def images_per_step(self) -> int:
        """G: the images of a step in all processes and micro-batches."""
        return self._num_accumulations * self._builder.num_processes * self._builder.micro_batch_size

    def __iter__(self) -> Iterator[dict]:
        """Micro-batches from `first_step` on, without end; `num_accumulations` of them are a step.

        Raises:
            RuntimeError: too many images are unreadable, `make_views` failed, or a worker died.
            ValueError: the views or masks have an unexpected shape.
        """
        loader = DataLoader(
            self._builder,
            sampler=self._batch_specs(),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=share,
            pin_memory=self._pin_memory,
            worker_init_fn=ignore_interrupts,
            generator=torch.Generator().manual_seed(self._builder.seed),  # or it would draw from torch's global one
        )
        self._states = {self._first_step - 1: self._first_state}
        unreadable = UnreadableCounter(self._max_unreadable_share)
        batches = iter(loader)
        for place in itertools.count():
            batch = take(batches, reader="ViewLoader")
            unreadable.add(batch)
            step = self._first_step + place // self._num_accumulations
            for old in [known for known in self._states if known < step - _NUM_STATES]:
                del self._states[old]
            yield batch

    def state_after(self, step: int) -> dict:
        """State to resume after a step in this process, for JSON.

        Give it back as `state`, with `first_step=step + 1`.

        Raises:
            ValueError: the source is a stream and the step is not among the last ones.
        """
        if self._stream and step not in self._states:
            raise ValueError(
                f"ViewLoader: expected a step whose state is known, {min(self._states)} ... {max(self._states)}, "
                f"got {step!r}. Ask for the state after all micro-batches of the step."
            )
        return {"step": step, **self._settings(), "stream": self._states[step] if self._stream else None}

    def _settings(self) -> dict:
        """Settings that have to be the same when a run resumes."""
        settings = {"seed": self._builder.seed, "images_per_step": self.images_per_step}
        return {**settings, "source": self._source.dataset_hash}

    def _check(self, state: dict | None) -> dict | None:
        """The stream's part of a state."""
        if state is None:
            is_lost = self._stream is not None and self._first_step > 0
            require(
                not is_lost, f"first_step={self._first_step} of a stream needs the state after step first_step - 1"
            )
            return None
        expected = {"step": self._first_step - 1, **self._settings()}
        found = {name: state.get(name) for name in expected}
        differing = ", ".join(f"{name} {expected[name]!r}, got {found[name]!r}" for name in expected)
        require(
            found == expected,
            f"the state belongs to another run: expected {differing}. Resume with the same data and settings, at the "
            "step after the one that was saved",
        )
        return state["stream"]

    def _batch_specs(self) -> Iterator[BatchSpec]:
        """Specifications of micro-batches, ahead of the batches that were taken."""
        builder, size = self._builder, self._builder.micro_batch_size
        images = self._read_stream() if self._stream else None
        for step in itertools.count(self._first_step):
            for micro in range(self._num_accumulations):
                first = step * self.images_per_step + (micro * builder.num_processes + builder.rank) * size
                numbers = range(first, first + size)
                if images:
                    keys, state = next(images)
                else:
                    keys, state = [self._index_of(number) for number in numbers], None
                if micro + 1 == self._num_accumulations:
                    self._states[step] = state
                yield BatchSpec(step, micro, numbers, keys)

    def _index_of(self, number: int) -> int:
        step, place = divmod(number, self.images_per_step)
        num_different = math.ceil(self.images_per_step / self._num_repeats)
        turn, position = divmod(step * num_different + place % num_different, len(self._source))
        return int(_permute(len(self._source), self._builder.seed, turn)[position])

    def _read_stream(self) -> Iterator[tuple[list[dict], dict]]:
        """The raw images of each micro-batch, candidates to replace them, and the state after the micro-batch."""
        builder, size = self._builder, self._builder.micro_batch_size
        owner = {"seed": builder.seed, "rank": builder.rank, "num_processes": builder.num_processes}
        examples = self._stream.examples(**owner, state=self._first_state)
        num_different = math.ceil(size / self._num_repeats)
        ahead = collections.deque()
        while True:
            ahead.extend(itertools.islice(examples, max(num_different, _NUM_CANDIDATES) - len(ahead)))
            raws = [raw for raw, _ in ahead]
            repeated = [raws[place % num_different] for place in range(size)]
            yield repeated + raws[num_different:], ahead[num_different - 1][1]
            for _ in range(num_different):
                ahead.popleft()


class UnreadableCounter:
    """Counts images that were seen and those of them that were unreadable."""

    def __init__(self, limit: float):
        self._limit = limit
        self._num_seen = self._num_unreadable = 0
        self._examples = []

    def add(self, batch: dict) -> None:
        """Count a batch.

        Raises:
            RuntimeError: the share of unreadable images is above the limit.
        """
        self._num_seen += len(batch["numbers"])
        self._num_unreadable += len(batch["unreadable"])
        self._examples = [*self._examples, *batch["unreadable"]][:3]
        share = self._num_unreadable / self._num_seen
        if share > self._limit and (self._num_seen >= _NUM_SEEN or self._limit == 0):
            examples = "; ".join(f"{name}: {reason}" for name, reason in self._examples)
            raise RuntimeError(
                f"ViewLoader: {self._num_unreadable} of {self._num_seen} images ({share:.1%}) are unreadable, "
                f"expected at most {self._limit:.1%}. The first: {examples}. Repair or remove them, or raise "
                "max_unreadable_share."
            )


@functools.lru_cache(maxsize=2)
def _permute(length: int, seed: int, turn: int) -> np.ndarray:
    return np.random.default_rng([SEED_OF_ORDER, seed, turn]).permutation(length)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
