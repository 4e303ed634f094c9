"""The pass: images go through the model once, in batches, and each batch goes to all consumers.

    for chunk of images in order (decoded and cut by workers):
        batches = images of equal shapes, `batch_size` of them
        for batch: normalise on the device; run the model; leave out images with a feature that is not finite
            for consumer: update(batch)
    several processes: the first one merges the consumers of the others

Letters for shapes: B images of a batch.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator, Sequence

import torch
import tqdm
from torch import Tensor

from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext, gather_to_first, tell_others
from modeling_vitreg.features import Encoder, TokenFeatures, extract_many, layer_numbers
from modeling_vitreg.images import check_channels
from modeling_vitreg.omissions import Failures

from .consumer import Consumer, EncodedBatch, Needs, Shard
from .images import Chunk, Group, ImageReader
from .precision import choose_precision, run_in
from .settings import PassCounts, PassSettings
from .transforms import Crop, Pad


def run_pass(
    encoder: Encoder,
    images: object,
    consumers: Sequence[Consumer],
    settings: PassSettings | None = None,
    *,
    context: DistributedContext = SINGLE_PROCESS,
    failures: Failures | None = None,
) -> PassCounts:
    """Read and encode images once, and give them to all consumers.

    Images that cannot be read, or that have a feature that is not finite, are left out, counted and named. Ctrl-C ends
    the pass after the batch: consumers keep what they saw. So does an error, if `failures` are given and a batch was
    encoded; a consumer that fails is then dropped, and the others continue.

    Args:
        encoder: from `modeling_vitreg.features.load_encoder`.
        images: anything that `ImageReader` reads.
        consumers: what is measured.
        settings: batches, workers, precision, and how much is read.
        context: processes that share the images. In the first one the consumers and the counts then hold what all of
            them saw; in the others they hold their own part.
        failures: keeps the tracebacks of consumers that fail; None: an error ends the pass and is raised.

    Returns:
        What was read and left out.

    Raises:
        ValueError: no source of images, images that do not fit the model, a feature that does not exist, or a
            precision that the weights do not have.
        RuntimeError: another process died.
    """
    check_channels(encoder.num_channels, reader=encoder.name)
    run = _Pass(encoder, consumers, settings or PassSettings(), context, failures)
    run.read(images)
    if context.size > 1:
        run.merge()
    return run.counts


class _Pass:
    """One pass in one process."""

    def __init__(
        self,
        encoder: Encoder,
        consumers: Sequence[Consumer],
        settings: PassSettings,
        context: DistributedContext,
        failures: Failures | None,
    ):
        self.encoder, self.consumers, self.settings = encoder, list(consumers), settings
        self.context, self.failures = context, failures
        self.counts = PassCounts(precision=choose_precision(encoder, settings.precision))
        self._active = self.consumers
        self._transforms = list(dict.fromkeys(consumer.needs.transform for consumer in consumers))
        self._waiting: list[dict[tuple, Group]] = [{} for _ in self._transforms]  # shape -> images, not encoded yet
        self._shard: _OpenShard | None = None
        for needs in (consumer.needs for consumer in consumers):  # what does not exist is refused before work starts
            _pairs_of(needs, encoder)
            _layers_of(needs, encoder)

    def read(self, images: object) -> None:
        """Read to the end, or until Ctrl-C."""
        settings, device = self.settings, self.encoder.device
        cuts = [transform.make(self.encoder) for transform in self._transforms]
        annotations = sorted({name for consumer in self.consumers for name in consumer.needs.annotations})
        reader = ImageReader(images, num_channels=self.encoder.num_channels, annotations=annotations)
        is_hidden = not settings.has_progress_bar or self.context.rank > 0
        total, title = reader.total(settings.limit), settings.title or self.encoder.name
        bar = tqdm.tqdm(total=total, initial=self._count_done(total), unit="image", desc=title, disable=is_hidden)
        words = {"context": self.context, "is_done": self._is_done, "pin_memory": device.type == "cuda"}
        try:
            compiled = self.encoder.compiled_layers() if settings.compile else contextlib.nullcontext()
            with bar, deferred_interrupt() as pressed, compiled, run_in(self.counts.precision, self.encoder):
                for chunk in reader.read(cuts, settings, **words):
                    self._take(chunk)
                    step = len(chunk.numbers) * self.context.size  # the others are about as far
                    bar.update(step if total is None else min(step, total - bar.n))
                    if pressed or all(consumer.skipped for consumer in self.consumers):
                        break
                self._flush()
                if pressed:
                    raise KeyboardInterrupt
                self._end_shard()
        except KeyboardInterrupt:
            self.counts.stopped_by = f"stopped by hand after {self.counts.num_seen} images"
        except Exception as error:  # what was measured until then is kept
            if not self.counts.num_seen or self.failures is None or self.failures.is_strict:
                raise
            self.counts.stopped_by = f"{type(error).__name__} after {self.counts.num_seen} images: {error}"

    def merge(self) -> None:
        """Bring everything together in the first process."""
        parts = gather_to_first((self.counts, self.consumers), self.context, local={"encoder": self.encoder})
        if parts:
            self._join(parts)
        self.counts.stopped_by = tell_others(self.counts.stopped_by, self.context)

    def _join(self, parts: list[tuple]) -> None:
        counts, consumers = zip(*parts[1:])
        for other in counts:
            self.counts.merge(other)
        for consumer, *others in zip(self.consumers, *consumers):
            reasons = [each.skipped for each in (consumer, *others) if each.skipped]
            if reasons:
                consumer.skipped = reasons[0]
            else:
                consumer.merge(others)

    def _is_done(self, shard: int) -> bool:
        return bool(self.settings.shard_size) and all(consumer.has_shard(shard) for consumer in self.consumers)

    def _count_done(self, total: int | None) -> int:
        """Images of the shards that are there, if the others are about as far; 0 of a stream of unknown length."""
        size, context = self.settings.shard_size, self.context
        starts = range(context.rank * size, total or 0, context.size * size) if size else ()
        own = sum(min(size, total - start) for start in starts if self._is_done(start // size))
        return min(own * context.size, total or 0)

    def _take(self, chunk: Chunk) -> None:
        if self.settings.shard_size and (self._shard is None or self._shard.index != chunk.shard):
            self._flush()
            self._end_shard()
            self._active = [consumer for consumer in self.consumers if not consumer.has_shard(chunk.shard)]
            self._shard = _OpenShard(chunk.shard, chunk.numbers.start, self.counts.precision)
        self.counts.unreadable |= chunk.unreadable
        self.counts.notes.merge(chunk.notes.counts)
        if self._shard is not None:
            self._shard.add(chunk)
        for place, groups in enumerate(chunk.groups):
            for group in groups:
                self._collect(place, group)
        if self.settings.shard_size and chunk.numbers.stop == (chunk.shard + 1) * self.settings.shard_size:
            self._flush()
            self._end_shard()

    def _collect(self, place: int, group: Group) -> None:
        """Fill batches; images that do not fill one wait for others of their shape."""
        waiting, shape = self._waiting[place], tuple(group.pixels.shape[1:])
        if shape in waiting and waiting[shape].images:
            group = Group.join([waiting[shape], group])
        transform = self._transforms[place]
        size = min(self.settings.batch_size, getattr(transform, "batch_size", None) or self.settings.batch_size)
        while len(group.images) >= size:
            full, group = group.split(size)
            self._encode(transform, full)
        waiting[shape] = group

    def _flush(self) -> None:
        for transform, waiting in zip(self._transforms, self._waiting):
            for group in waiting.values():
                if group.images:
                    self._encode(transform, group)
            waiting.clear()

    def _end_shard(self) -> None:
        if self._shard is None:
            return
        for consumer in self._active:
            self._try(consumer, consumer.end_shard, self._shard.close(consumer.needs.transform))
        self._shard = None

    def _encode(self, transform: Crop | Pad, group: Group) -> None:
        active = [each for each in self._active if each.needs.transform == transform and not each.skipped]
        is_padded = isinstance(transform, Pad)
        pixels = group.pixels.to(self.encoder.device, non_blocking=True)
        pixels = self.encoder.normalise(pixels, sizes=[image.size for image in group.images] if is_padded else None)
        batch = encode_batch(self.encoder, pixels, group, [each.needs for each in active], self.counts.precision)
        if transform == self._transforms[0]:
            self.counts.num_seen += len(group.images)
        if len(batch) < len(group.images):
            finite = {image.number for image in batch.images}
            lost = {image.number: image.name for image in group.images if image.number not in finite}
            self.counts.nonfinite |= lost
            if self._shard is not None:
                self._shard.nonfinite[transform] |= lost
        if tuple(pixels.shape[2:]) not in self.counts.sizes:
            self.counts.sizes.append(tuple(pixels.shape[2:]))
        if len(batch):
            for consumer in active:
                self._try(consumer, consumer.update, batch)

    def _try(self, consumer: Consumer, call, argument: object) -> None:
        if consumer.skipped:
            return
        try:
            with torch.no_grad(), torch.autocast(self.encoder.device.type, enabled=False):
                call(argument)
        except Exception as error:
            if self.failures is None:
                raise
            consumer.skipped = self.failures.note(consumer.name or type(consumer).__name__, error)


class _OpenShard:
    """A shard that is being read."""

    def __init__(self, index: int, start: int, precision: str):
        self.index, self.numbers, self.counts = index, range(start, start), PassCounts(precision=precision)
        self.nonfinite: dict[Crop | Pad, dict[int, str]] = collections.defaultdict(dict)

    def add(self, chunk: Chunk) -> None:
        """Add a chunk."""
        self.numbers = range(self.numbers.start, chunk.numbers.stop)
        self.counts.unreadable |= chunk.unreadable
        self.counts.notes.merge(chunk.notes.counts)

    def close(self, transform: Crop | Pad) -> Shard:
        """The shard as consumers of a transform see it."""
        num_seen = len(self.numbers) - len(self.counts.unreadable)
        counts = dataclasses.replace(self.counts, num_seen=num_seen, nonfinite=self.nonfinite[transform])
        return Shard(self.index, self.numbers, counts)


@torch.no_grad()
def encode_batch(
    encoder: Encoder, pixels: Tensor, group: Group, needs: Sequence[Needs], precision: str
) -> EncodedBatch:
    """Run the model for the needs of several consumers; images with a feature that is not finite are left out."""
    pairs = list(dict.fromkeys(pair for each in needs for pair in _pairs_of(each, encoder)))
    layers = list(dict.fromkeys(layer for each in needs for layer in _layers_of(each, encoder)))
    functions = {name: make for each in needs for name, make in each.outputs.items()}

    def autocast() -> contextlib.AbstractContextManager:
        return run_in(precision, encoder)

    with autocast():
        features = dict(zip(pairs, extract_many(encoder, pixels, wanted=pairs))) if pairs else {}
        attention = dict(zip(layers, encoder.prefix_attention(pixels, layers=layers))) if layers else {}
        outputs = {name: make(encoder, pixels) for name, make in functions.items()}
    images, maps = group.images, group.maps
    is_finite = _are_finite(pixels, features.values(), [*attention.values(), *outputs.values()])
    if not is_finite.all():
        kept = is_finite.cpu()
        images = [image for image, is_kept in zip(images, kept.tolist()) if is_kept]
        maps = {name: values[kept] for name, values in maps.items()}
        pixels, features = pixels[is_finite], {pair: _select(part, is_finite) for pair, part in features.items()}
        attention = {layer: values[is_finite] for layer, values in attention.items()}
        outputs = {name: values[is_finite] for name, values in outputs.items()}
    return EncodedBatch(encoder, images, pixels, features, attention, outputs, maps, autocast)


def _pairs_of(needs: Needs, encoder: Encoder) -> list[tuple[int, str]]:
    return [
        (layer_numbers(layer, encoder.num_layers, first=0 if feature == "token" else 1)[0], feature)
        for layer, feature in needs.features
    ]


def _layers_of(needs: Needs, encoder: Encoder) -> list[int]:
    return layer_numbers(needs.attention, encoder.num_layers, first=1) if needs.attention else []


def _are_finite(pixels: Tensor, features: Sequence[TokenFeatures], others: Sequence[Tensor]) -> Tensor:
    """Which images (B,) have finite features: the norm of all numbers of an image is finite."""
    is_finite = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
    parts = [part for tokens in features for part in _parts(tokens).values()]
    for values in [*parts, *others]:
        values = values.flatten(1)
        if values.shape[1]:
            is_finite &= torch.linalg.vector_norm(values, dim=1, dtype=torch.float32).isfinite()
    return is_finite


def _parts(tokens: TokenFeatures) -> dict[str, Tensor]:
    names = ("patch_tokens", "cls_token", "distillation_token", "register_tokens", "cls_tokens")
    return {name: part for name in names if (part := getattr(tokens, name)) is not None}


def _select(tokens: TokenFeatures, kept: Tensor) -> TokenFeatures:
    return dataclasses.replace(tokens, **{name: part[kept] for name, part in _parts(tokens).items()})


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list]:
    """Inside the block, the first Ctrl-C fills a list, so that a batch is counted whole; a second one interrupts."""
    pressed = []

    def note(*_) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield pressed
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
