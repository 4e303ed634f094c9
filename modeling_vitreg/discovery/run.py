"""From an encoder and annotated images to a `DiscoveryReport`, with an optional sweep over the input of LOST.

A model on which plain LOST fails may work with other features, another layer or a bias. The sweep measures all of them
in one pass over the images. The published settings are fixed in advance, and the best of a sweep is chosen on the
images that it is measured on; the report keeps the two apart.

Images are read at full resolution, normalised for the model, and padded with zeros at the bottom and the right to a
multiple of the patch. Images of equal padded size form a batch.

    discovery.json  boxes.png  sweep.png   of `write_folder`
    objects/                               rows of images, from which the same command resumes; it may be deleted
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from modeling_vitreg.distributed import distributed_context
from modeling_vitreg.encoding import PassCounts, PassSettings, run_pass
from modeling_vitreg.encoding.precision import choose_precision
from modeling_vitreg.features import Encoder
from modeling_vitreg.features.model_hash import hash_weights
from modeling_vitreg.images import AnnotatedImage
from modeling_vitreg.omissions import Failures
from modeling_vitreg.reports import DiscoveryReport, short_hash, write_report

from .finder import ObjectFinder
from .settings import DiscoverySettings, Sweep


_SHARD_SIZE = 64  # images, the most that an interruption loses
OPTIMISTIC = "chosen on the images that it was measured on: use it to compare settings, not models"


def discover(
    encoder: Encoder,
    images: Sequence[AnnotatedImage],
    *,
    settings: DiscoverySettings | None = None,
    sweep: Sweep | None = None,
    reading: PassSettings | None = None,
    folder: str | os.PathLike | None = None,
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
        reading: workers and precision; None: batches as in `settings`, without workers.
        folder: keeps the rows of a source, so that the next call resumes; None: they are not kept.
        source: name of the images, for the report.
        command: command that makes the report.

    Returns:
        The report; `write_folder` writes it. With several processes that of the first one has all images.

    Raises:
        ValueError: no image could be measured, or settings that do not fit the model.
    """
    settings, context = settings or DiscoverySettings(), distributed_context()
    reading = reading or settings.for_pass()
    swept = sweep.settings(settings, num_layers=encoder.num_layers) if sweep else []
    if folder is not None:
        reading = dataclasses.replace(reading, shard_size=reading.shard_size or _SHARD_SIZE)
        facts = [hash_weights(encoder), choose_precision(encoder, reading.precision), reading.shard_size]
        facts += [images.box_fingerprint or images.dataset_hash, [each.asked_for() for each in (settings, *swept)]]
        folder = pathlib.Path(folder) / short_hash(facts)
    finder = ObjectFinder(encoder, [settings, *swept], folder=folder)
    counts = run_pass(encoder, images, [finder], reading, context=context, failures=Failures())
    counts = PassCounts.join([counts, *finder.resumed.values()])
    counts.stopped_by = counts.stopped_by or finder.skipped
    if not finder.rows and context.rank == 0:
        reasons = [*counts.unreadable.values()][:3] + [counts.stopped_by] * bool(counts.stopped_by)
        raise ValueError(
            f"expected at least one image, got {len(counts.unreadable)} unreadable and {len(counts.nonfinite)} with "
            "features that are not finite" + "".join(f"\n  {reason}" for reason in reasons)
        )
    facts, details = _summarise(finder, sweep), counts.describe()
    details["notes"] = [*getattr(images, "notes", ()), *details["notes"]]
    return DiscoveryReport(
        model=encoder.name,
        architecture=encoder.describe(),
        images={"source": source, **details, **facts.pop("images")},
        **facts,
        command=command,
        made_with={**encoder.made_with(), "precision": counts.precision},
    )


def _summarise(finder: ObjectFinder, sweep: Sweep | None) -> dict:
    """The parts of a report that come from the rows of images."""
    rows = [finder.rows[number] for number in sorted(finder.rows)]
    published, *others = finder.compute()
    names = ("feature", "layer", "bias")
    swept = [{name: getattr(each, name) for name in names} for each in finder.settings[1:]]
    entries = [{**own, **found} for own, found in zip(swept, others)]
    best = max(entries, key=lambda entry: entry["num_hits"], default={})
    return {
        "images": {
            "num_annotated": len(finder.ious()),
            "num_without_boxes": sum(row["boxes"] == [] for row in rows),
        },
        # Programs that read reports know the mean IoU by its old name too, for one release.
        "as_published": {
            "settings": dataclasses.asdict(finder.settings[0]),
            **published,
            "mean_overlap": published["mean_iou"],
            "point_in_box": finder.point_in_box(),
        },
        "sweep": {"settings": dataclasses.asdict(sweep), "entries": entries} if sweep else {},
        "best_of_sweep": {**best, "note": OPTIMISTIC} if best and best["corloc"] is not None else {},
        "predictions": [
            {
                "name": row["name"],
                "box": row["box"],
                "iou": row["ious"][0],
                "is_degenerate": row["is_degenerate"][0],
                "boxes": row["boxes"],
            }
            for row in rows
        ],
    }


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
