"""An object in each image, by a method of `modeling_vitreg.discovery`: on disk, shard by shard, and its CorLoc.

    FOLDER/<fingerprint of model, images, boxes and settings>/00003.objects.safetensors

Images are read at full resolution, as `discover` does, and not cut as for the other tasks. A pass that was stopped
goes on with the shard it was in.

A shard has `numbers` (I,), the images in it; `boxes` (I, 4), what was found; `ious` (I,) with the best true box,
NaN where the image has none; `is_degenerate` (I,), true where the method had nothing to go by.

Letters: I images.
"""

from __future__ import annotations

import os
import pathlib

import torch
import tqdm

from modeling_vitreg.discovery import DiscoverySettings
from modeling_vitreg.discovery.measurement import Measurement
from modeling_vitreg.features import Encoder
from modeling_vitreg.images import ImageSource
from modeling_vitreg.reports import short_hash

from .intervals import MetricValue, share_of_images
from .shards import Features, save_shard


OBJECTS = "objects"  # a kind of features


def find_objects(
    encoder: Encoder,
    images: ImageSource,
    *,
    folder: str | os.PathLike,
    weights_hash: str,
    settings: DiscoverySettings,
    shard_size: int = 256,
    has_progress_bar: bool = True,
) -> Features:
    """Find an object in each image that can be read and has finite features; objects on disk are not computed again.

    Args:
        encoder: from `modeling_vitreg.features.load_encoder`.
        images: with a column of boxes.
        folder: see above; it is made.
        weights_hash: of `hash_weights`.
        settings: method, features and batches.
        shard_size: images a file, which is what an interruption can cost.
        has_progress_bar: show one.

    Raises:
        ValueError: settings that do not fit the model, or a column that holds no boxes.
    """
    Measurement(encoder, settings, None)  # refuses what does not fit, also where all shards are there
    facts = [weights_hash, images.box_fingerprint, settings.asked_for(), shard_size]
    folder = pathlib.Path(folder) / short_hash(facts)
    folder.mkdir(parents=True, exist_ok=True)
    files, annotated = [], images.only("box")
    with tqdm.tqdm(total=len(images), unit="image", desc="objects", disable=not has_progress_bar) as bar:
        for start in range(0, len(images), shard_size):
            rows = range(start, min(start + shard_size, len(images)))
            files.append(folder / f"{start // shard_size:05}.{OBJECTS}.safetensors")
            if files[-1].exists():
                bar.update(len(rows))
                continue
            run = Measurement(encoder, settings, None)
            run.pass_over(annotated, rows, tell=bar.update)
            _save(run, files[-1])
    return Features(files)


def _save(run: Measurement, file: pathlib.Path) -> None:
    numbers = sorted(run.predictions)
    found = [run.predictions[number] for number in numbers]
    ious = [torch.nan if entry["iou"] is None else entry["iou"] for entry in found]
    tensors = {
        "numbers": torch.tensor(numbers, dtype=torch.int64),
        "boxes": torch.tensor([entry["box"] for entry in found], dtype=torch.float64).reshape(-1, 4),
        "ious": torch.tensor(ious, dtype=torch.float64),
        "is_degenerate": torch.tensor([entry["is_degenerate"] for entry in found], dtype=torch.bool),
    }
    facts = {"unreadable": run.unreadable, "num_nonfinite": len(run.nonfinite), "nonfinite": run.nonfinite}
    facts["notes"] = run.notes.counts
    save_shard(tensors, file, facts=facts)


def measure_objects(found: Features, *, iou_threshold: float) -> tuple[list[MetricValue], dict]:
    """CorLoc, the share of annotated images whose object has an IoU of `iou_threshold` or more with a true box.

    Raises:
        ValueError: no image has boxes.
    """
    ious = found.load("ious")
    ious = ious[~ious.isnan()]
    if not len(ious):
        raise ValueError("expected images with boxes, got none: check the column of boxes (--columns box=NAME)")
    facts = {"mean_iou": float(ious.mean()), "num_degenerate": int(found.load("is_degenerate").sum())}
    return [share_of_images("corloc", ious >= iou_threshold)], facts


__all__ = ["OBJECTS", "find_objects", "measure_objects"]
