"""An encoder and annotated images in, a report of what it discovers out; with a sweep over what LOST reads.

A model whose plain LOST fails may well work with other features, another layer or a bias. The sweep measures all of
these in one pass over the images. "As published" is what was fixed before; "best of sweep" was chosen on the very
images that it is measured on, so the two never stand in one column.

Images are read at full resolution, normalised as the model wants it, and padded with zeros below and to the right
until patches fill them. Images of equal padded size share a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import tqdm

from modeling_vitreg.features import Encoder
from modeling_vitreg.reports import DiscoveryReport

from .annotations import AnnotatedImage
from .measurement import Measurement
from .settings import DiscoverySettings, Sweep


OPTIMISTIC = "chosen on the images that it is measured on: for comparing settings, not models"


def discover(
    encoder: Encoder,
    images: Iterable[AnnotatedImage],
    *,
    settings: DiscoverySettings | None = None,
    sweep: Sweep | None = None,
    source: str = "",
    command: str = "",
) -> DiscoveryReport:
    """Find an object in each image and compare it with the truth.

    An image that cannot be read, or whose features are not finite, is counted and left out. When the pass is stopped
    by hand or fails after the first batch, the report holds what was measured until then and says so.

    Args:
        encoder: from `modeling_vitreg.features.load_encoder`.
        images: with boxes or without; see `annotations`.
        settings: what is measured as published.
        sweep: what is tried beside it; None: nothing.
        source: of the images, in words, for the report.
        command: that made the report, for the report.

    Returns:
        The report; `modeling_vitreg.reports.write_report` writes it.

    Raises:
        ValueError: no image could be measured, or settings that do not fit the model.
    """
    run = Measurement(encoder, settings or DiscoverySettings(), sweep)
    stopped_by = _pass_over(images, run)
    if not run.predictions:
        raise ValueError(
            f"expected at least one image, got {len(run.unreadable)} that cannot be read, {run.num_nonfinite} with "
            "features that are not finite, and no other" + "".join(f"\n  {line}" for line in run.unreadable[:3])
        )
    settings = {**dataclasses.asdict(run.settings), "layer": run.layer}
    entries = run.sweep_entries()
    best = max(entries, key=lambda entry: entry["num_hits"], default={})
    return DiscoveryReport(
        model=encoder.name,
        architecture=encoder.describe(),
        images={"source": source, **run.counts(), "is_complete": stopped_by is None, "stopped_by": stopped_by},
        as_published={"settings": settings, **run.published.summarise()},
        sweep={"settings": dataclasses.asdict(sweep), "entries": entries} if sweep else {},
        best_of_sweep={**best, "note": OPTIMISTIC} if best and best["corloc"] is not None else {},
        predictions=[run.predictions[number] for number in sorted(run.predictions)],
        command=command,
        made_with=encoder.made_with(),
    )


def _pass_over(images: Iterable[AnnotatedImage], run: Measurement) -> str | None:
    """Feed all images to a run; returns why it stopped early, None if it did not."""
    total = len(images) if hasattr(images, "__len__") else None
    bar = tqdm.tqdm(total=total, unit="image", desc=run.encoder.name, disable=not run.settings.has_progress_bar)
    try:
        with bar:
            run.pass_over(enumerate(images), tell=bar.update)
    except KeyboardInterrupt:
        return f"stopped by hand after {len(run.predictions)} images"
    except Exception as error:  # whatever it is, what was measured is worth more than the traceback
        if not run.predictions:
            raise
        return f"{type(error).__name__} after {len(run.predictions)} images: {error}"
    return None


__all__ = ["OPTIMISTIC", "DiscoveryReport", "discover"]
