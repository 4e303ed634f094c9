"""An encoder and images to an `ArtifactReport`, in one pass over the images and constant memory.

Every image goes through the model once. Norms, places and activations of all layers are reduced while the batch is
there; attention and ablation, which run the model again, are measured on the first few images, and the probes read
tokens that were kept of the first images. Each number says how many images it is from.

A pass that stops (Ctrl-C, a full disk, a device without memory) reports what was measured before, and why it stopped.
A section that cannot be measured says why, and the others stay.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import tqdm

from modeling_vitreg.features import Encoder
from modeling_vitreg.reports import ArtifactReport

from .histograms import EDGES
from .measurement import Examples, Measurement, SurveySettings
from .samples import SampleReader
from .verdict import RULES


def survey(
    encoder: Encoder, images: object, *, settings: SurveySettings | None = None, source: str = "", command: str = ""
) -> tuple[ArtifactReport, Examples]:
    """Measure the artifacts of a model.

    Args:
        encoder: of `modeling_vitreg.features.load_encoder`.
        images: anything that `SampleReader` reads.
        settings: how much is measured.
        source: of the images, in words, for the report.
        command: that made the report, for the report.

    Returns:
        The report, and the first images with their norms and attention.

    Raises:
        ValueError: there is no image that can be read, or the images do not fit the model.
    """
    settings = settings or SurveySettings()
    reader = SampleReader(images, limit=settings.num_images)
    run = Measurement(encoder, settings)
    stopped_by = _pass_over(reader, run)
    if not run.num_seen:
        raise ValueError(
            f"expected at least one image, got {reader.num_unreadable} that cannot be read and no other"
            + "".join(f"\n  {line}" for line in reader.unreadable[:3])
            + (f"\n  {stopped_by}" if stopped_by else "")
        )
    details = {
        "source": source,
        "num_images": run.num_measured,
        "num_unreadable": reader.num_unreadable,
        "unreadable": reader.unreadable,
        "num_nonfinite": run.num_seen - run.num_measured,
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
        **run.finish(),
    )
    return report, run.examples


def _pass_over(reader: SampleReader, run: Measurement) -> str | None:
    """Feed all images to a run; returns why it stopped early, None if it did not."""
    bar = tqdm.tqdm(total=reader.total, unit="image", disable=not run.settings.has_progress_bar, desc=run.encoder.name)
    try:
        with bar, _deferred_interrupt() as pressed:
            for batch in _batches(reader, run.settings.batch_size):
                run.add(*zip(*batch))
                bar.update(len(batch))
                if pressed:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        return f"stopped by hand after {run.num_seen} images"
    except Exception as error:  # whatever it is, what was measured is worth more than the traceback
        if not run.num_seen:
            raise
        return f"{type(error).__name__} after {run.num_seen} images: {error}"
    return None


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[list]:
    """Inside the block Ctrl-C fills a list, so that no batch is counted by half; a second one ends the block."""
    pressed = []

    def note(*_) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield pressed
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _batches(reader: SampleReader, size: int) -> Iterator[list]:
    batch = []
    for pair in reader:
        batch.append(pair)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


__all__ = ["Examples", "SurveySettings", "survey"]
