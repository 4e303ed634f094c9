"""From an encoder and annotated images to a `DiscoveryReport`, with an optional sweep over the input of LOST.

A model on which plain LOST fails may work with other features, another layer or a bias. The sweep measures all of them
in one pass over the images. The published settings are fixed in advance, and the best of a sweep is chosen on the
images that it is measured on; the report keeps the two apart.

Images are read at full resolution, normalised for the model, and padded with zeros at the bottom and the right to a
multiple of the patch. Images of equal padded size form a batch.

    discovery.json  boxes.png  sweep.png   of `write_folder`
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import tqdm

from modeling_vitreg.features import Encoder
from modeling_vitreg.images import AnnotatedImage
from modeling_vitreg.reports import DiscoveryReport, write_report

from .measurement import Measurement
from .settings import DiscoverySettings, Sweep


OPTIMISTIC = "chosen on the images that it was measured on: use it to compare settings, not models"


def discover(
    encoder: Encoder,
    images: Sequence[AnnotatedImage],
    *,
    settings: DiscoverySettings | None = None,
    sweep: Sweep | None = None,
    source: str = "",
    command: str = "",
) -> DiscoveryReport:
    """Find one object in each image, and compare it with the true boxes.

    Images that cannot be read, or whose features are not finite, are counted, named and left out. If the pass is
    stopped by hand or fails after the first batch, the report holds what was measured until then and says so.

    Args:
        encoder: from `modeling_vitreg.features.load_encoder`.
        images: images with or without boxes: a list, or a source of `modeling_vitreg.images.open_images`.
        settings: the published settings.
        sweep: further settings of LOST; None for no sweep.
        source: name of the images, for the report.
        command: command that makes the report, for the report.

    Returns:
        The report; `write_folder` writes it.

    Raises:
        ValueError: no image could be measured, or settings that do not fit the model.
    """
    run = Measurement(encoder, settings or DiscoverySettings(), sweep)
    stopped_by = _pass_over(images, run)
    if not run.predictions:
        raise ValueError(
            f"expected at least one image, got {len(run.unreadable)} unreadable and {len(run.nonfinite)} with "
            "features that are not finite" + "".join(f"\n  {line}" for line in run.unreadable[:3])
        )
    settings = {**dataclasses.asdict(run.settings), "layer": run.layer}
    entries, published = run.sweep_entries(), run.published.summarise()
    best = max(entries, key=lambda entry: entry["num_hits"], default={})
    return DiscoveryReport(
        model=encoder.name,
        architecture=encoder.describe(),
        images={
            "source": source,
            **_with_notes(images, run),
            "is_complete": stopped_by is None,
            "stopped_by": stopped_by,
        },
        # Programs that read reports know the mean IoU by its old name too, for one release.
        as_published={"settings": settings, **published, "mean_overlap": published["mean_iou"]},
        sweep={"settings": dataclasses.asdict(sweep), "entries": entries} if sweep else {},
        best_of_sweep={**best, "note": OPTIMISTIC} if best and best["corloc"] is not None else {},
        predictions=[run.predictions[number] for number in sorted(run.predictions)],
        command=command,
        made_with=encoder.made_with(),
    )


def write_folder(report: DiscoveryReport, images: Sequence[AnnotatedImage], folder: str | os.PathLike) -> list:
    """Write report and figures; returns the files. The report is written first.

    Args:
        report: of `discover`.
        images: the images of the report.
        folder: folder to write; it is created.
    """
    from modeling_vitreg.style import save_figure  # matplotlib is not needed before

    from .figures import draw_discoveries, draw_sweep

    folder = pathlib.Path(folder)
    files = [write_report(report, folder / "discovery.json")]
    files.append(save_figure(draw_discoveries(images, report), folder / "boxes.png"))
    if report.best_of_sweep:
        files.append(save_figure(draw_sweep(report), folder / "sweep.png"))
    return files


def _with_notes(images: Sequence[AnnotatedImage], run: Measurement) -> dict:
    counts = run.counts()
    return {**counts, "notes": [*getattr(images, "notes", ()), *counts["notes"]]}


def _pass_over(images: Sequence[AnnotatedImage], run: Measurement) -> str | None:
    """Measure all images; returns why the pass stopped early, None if it did not."""
    bar = tqdm.tqdm(total=len(images), unit="image", desc=run.encoder.name, disable=not run.settings.has_progress_bar)
    try:
        with bar:
            run.pass_over(images, range(len(images)), tell=bar.update)
    except KeyboardInterrupt:
        return f"stopped by hand after {len(run.predictions)} images"
    except Exception as error:  # what was measured until then is kept
        if not run.predictions:
            raise
        return f"{type(error).__name__} after {len(run.predictions)} images: {error}"
    return None


__all__ = ["OPTIMISTIC", "DiscoveryReport", "discover", "write_folder"]
