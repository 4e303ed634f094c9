"""From an encoder and images to an `ArtifactReport`, in one pass over the images and in constant memory.

Each image goes through the model once for norms, positions and activations. Attention and ablation, which run the
model again, use the first images; probes use tokens that were kept of the first images. Each number states how many
images it comes from.

A pass that stops early (Ctrl-C, a full disk, a device without memory) reports what was measured until then, and why it
stopped. A section that cannot be measured states the reason, and the others are measured.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator

import tqdm

from modeling_vitreg.features import Encoder
from modeling_vitreg.images import check_channels
from modeling_vitreg.reports import ArtifactReport

from .histograms import EDGES
from .samples import SampleReader
from .sections import Examples, Sections, SurveySettings, encode_batch
from .verdict import RULES


_NUM_NAMED = 20  # images with features that are not finite whose names are kept


def survey(
    encoder: Encoder, images: object, *, settings: SurveySettings | None = None, source: str = "", command: str = ""
) -> tuple[ArtifactReport, Examples]:
    """Measure the artifacts of a model.

    Args:
        encoder: from `modeling_vitreg.features.load_encoder`.
        images: anything that `SampleReader` reads.
        settings: how much is measured.
        source: name of the images, for the report.
        command: command that makes the report, for the report.

    Returns:
        The report, and the first images with their norms and attention.

    Raises:
        ValueError: no image can be read, or the images do not fit the model.
    """
    settings = settings or SurveySettings()
    check_channels(encoder.num_channels, reader=encoder.name)
    reader = SampleReader(images, limit=settings.num_images, num_channels=encoder.num_channels)
    run = _Pass(encoder, settings)
    stopped_by = run.read(reader)
    if not run.num_seen:
        raise ValueError(
            f"expected at least one readable image, got {reader.num_unreadable} unreadable ones"
            + "".join(f"\n  {line}" for line in reader.unreadable[:3])
            + (f"\n  {stopped_by}" if stopped_by else "")
        )
    details = {
        "source": source,
        "num_images": run.sections.num_images,
        "num_unreadable": reader.num_unreadable,
        "unreadable": reader.unreadable,
        "num_nonfinite": run.num_seen - run.sections.num_images,
        "nonfinite": run.nonfinite,
        "size": list(run.size),
        "grid": list(run.grid),
        "is_complete": stopped_by is None,
        "stopped_by": stopped_by,
    }
    report = ArtifactReport(
        model=encoder.name,
        architecture=encoder.describe(),
        images=details,
        bins={"edges": [float(edge) for edge in EDGES], "rules": RULES},
        command=command,
        made_with=encoder.made_with(),
        **run.sections.compute(run.num_seen),
    )
    return report, run.sections.examples


class _Pass:
    """One pass over the images."""

    def __init__(self, encoder: Encoder, settings: SurveySettings):
        self.encoder, self.settings, self.sections = encoder, settings, Sections(settings)
        self.num_seen, self.nonfinite, self.size, self.grid = 0, [], (), ()

    def read(self, reader: SampleReader) -> str | None:
        """Measure all images; returns why the pass stopped early, None if it did not."""
        is_hidden = not self.settings.has_progress_bar
        bar = tqdm.tqdm(total=reader.total, unit="image", disable=is_hidden, desc=self.encoder.name)
        try:
            with bar, _deferred_interrupt() as pressed:
                samples = iter(reader)
                while batch := list(itertools.islice(samples, self.settings.batch_size)):
                    self._measure(*zip(*batch))
                    bar.update(len(batch))
                    if pressed:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            return f"stopped by hand after {self.num_seen} images"
        except Exception as error:  # what was measured until then is kept
            if not self.num_seen or self.settings.is_strict:
                raise
            return f"{type(error).__name__} after {self.num_seen} images: {error}"
        return None

    def _measure(self, images: tuple, labels: tuple, names: tuple) -> None:
        pixels = self.encoder.prepare(list(images), size=self.settings.image_size).to(self.encoder.device)
        patch_shape = self.encoder.patch_shape
        grid = tuple(side // patch for side, patch in zip(pixels.shape[2:], patch_shape))
        if self.grid and grid != self.grid:
            raise ValueError(f"expected images of one size, got a grid of {grid} after one of {self.grid}")
        batch, is_finite = encode_batch(self.encoder, pixels, list(labels))
        self.size, self.grid = tuple(pixels.shape[2:]), grid
        self.num_seen += len(images)
        self.nonfinite += [name for name, kept in zip(names, is_finite.tolist()) if not kept]
        self.nonfinite = self.nonfinite[:_NUM_NAMED]
        if batch is not None:
            self.sections.update(batch)


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[list]:
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


__all__ = ["Examples", "SurveySettings", "survey"]
