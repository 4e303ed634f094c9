"""An object in each image, by a method of `modeling_vitreg.discovery`: on disk, shard by shard, and its CorLoc.

    FOLDER/<fingerprint of model, images, boxes and settings>/00003.objects.safetensors

Images are read at full resolution, as `discover` does, and not cut as for the other tasks. A pass that was stopped
goes on with the shard it was in.

A shard has `numbers` (I,), the images in it; `boxes` (I, 4), what was found; `overlaps` (I,) with the best true box,
NaN where nobody has looked; `is_degenerate` (I,), true where the method had nothing to go by.

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

from .data import LabelledImages
from .intervals import Measured, share_of_images
from .provenance import shorten
from .shards import Features, save_shard


OBJECTS = "objects"  # a kind of features


def find_objects(
    encoder: Encoder,
    images: LabelledImages,
    *,
    folder: str | os.PathLike,
    model_fingerprint: str,
    settings: DiscoverySettings,
    shard_size: int = 256,
    has_progress_bar: bool = True,
) -> Features:
    """Find an object in each image that can be read and has finite features; what is there is not done again.

    Args:
        encoder: from `modeling_vitreg.features.load_encoder`.
        images: with a column of boxes.
        folder: see above; it is made.
        model_fingerprint: of `provenance.fingerprint_model`.
        settings: method, features and batches.
        shard_size: images a file, which is what an interruption can cost.
        has_progress_bar: show one.

    Raises:
        ValueError: settings that do not fit the model, or a column that holds no boxes.
    """
    Measurement(encoder, settings, None)  # refuses what does not fit, also where all shards are there
    facts = [model_fingerprint, images.box_fingerprint, settings.asked_for(), shard_size]
    folder = pathlib.Path(folder) / shorten(facts)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with tqdm.tqdm(total=len(images), unit="image", desc="objects", disable=not has_progress_bar) as bar:
        for start in range(0, len(images), shard_size):
            rows = range(start, min(start + shard_size, len(images)))
            files.append(folder / f"{start // shard_size:05}.{OBJECTS}.safetensors")
            if files[-1].exists():
                bar.update(len(rows))
                continue
            run = Measurement(encoder, settings, None)
            run.pass_over(((number, images.annotate(number)) for number in rows), tell=bar.update)
            _save(run, files[-1])
    return Features(files)


def _save(run: Measurement, file: pathlib.Path) -> None:
    numbers = sorted(run.predictions)
    found = [run.predictions[number] for number in numbers]
    overlaps = [torch.nan if entry["overlap"] is None else entry["overlap"] for entry in found]
    tensors = {
        "numbers": torch.tensor(numbers, dtype=torch.int64),
        "boxes": torch.tensor([entry["box"] for entry in found], dtype=torch.float64).reshape(-1, 4),
        "overlaps": torch.tensor(overlaps, dtype=torch.float64),
        "is_degenerate": torch.tensor([entry["is_degenerate"] for entry in found], dtype=torch.bool),
    }
    save_shard(tensors, file, facts={"unreadable": run.unreadable, "num_nonfinite": run.num_nonfinite})


def measure_objects(found: Features, *, hit: float) -> tuple[list[Measured], dict]:
    """CorLoc, the share of annotated images whose object overlaps a true box by `hit`, and facts about it.

    Raises:
        ValueError: nobody has looked at any image.
    """
    overlaps = found.load("overlaps")
    overlaps = overlaps[~overlaps.isnan()]
    if not len(overlaps):
        raise ValueError("expected images with boxes, got none with any: is their column the right one?")
    facts = {"mean_overlap": float(overlaps.mean()), "num_degenerate": int(found.load("is_degenerate").sum())}
    return [share_of_images("corloc", overlaps >= hit)], facts


__all__ = ["OBJECTS", "find_objects", "measure_objects"]
