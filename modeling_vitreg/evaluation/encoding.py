"""Encode each image once, and store its features and annotations in shards on disk.

    FOLDER/<hash of model, data and settings>/00003.pooled.safetensors

A shard appears whole or not at all, so a pass that was stopped resumes at the next shard. Only the kinds of features
that the tasks need are computed; each kind has its own files.

| kind | tensors of a shard, in addition to `numbers` (I,), the indices of its images |
| --- | --- |
| pooled | `class_tokens` (I, 4, D), normed, of the last layers in order; `mean_patches` (I, D); `labels` (I,) |
| normed_patches | `patches` (I, rows, columns, D), normed, of the last layer; `masks` (I, height, width) |
| raw_patches | `patches`, before the norm; `class_tokens` (I, D), before the norm; `depths` (I, height, width) |
| embeddings | `embeddings` (I, E) in the space of the text tower; `labels` (I,) |

An unknown label is -1. A model without class token has no `class_tokens`. Maps are resized and cropped like the image,
with the nearest pixel.

Letters: B images of a batch, I images, D width, E width of the embedding.
"""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import tqdm
from PIL import Image
from torch import Tensor

from modeling_vitreg.features import Encoder, extract_features
from modeling_vitreg.images import ImageSource, UnreadableImage
from modeling_vitreg.images.annotations import NoteCounter
from modeling_vitreg.modeling_vitreg import check_image_size
from modeling_vitreg.reports import short_hash

from .shards import Features, save_shard
from .zero_shot import embed_images


KINDS = ("pooled", "normed_patches", "raw_patches", "embeddings")
NUM_LAYERS = 4  # last layers whose class tokens are stored
_TARGETS = {"pooled": "labels", "normed_patches": "masks", "raw_patches": "depths", "embeddings": "labels"}


@dataclass(frozen=True)
class EncodingSettings:
    """How images are encoded.

    Args:
        image_size: side of the square crop in pixels; None: that of the encoder.
        batch_size: images per forward pass.
        shard_size: images per file, the most that an interruption loses.
        patch_precision: precision of patches on disk, "float16" or "float32".
        num_threads: threads that read images.
        has_progress_bar: show a progress bar.
    """

    image_size: int | None = None
    batch_size: int = 64
    shard_size: int = 256
    patch_precision: str = "float16"
    num_threads: int = 4
    has_progress_bar: bool = True

    def __post_init__(self):
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"expected image_size of 1 or more, got {self.image_size}")
        if min(self.batch_size, self.shard_size, self.num_threads) < 1:
            raise ValueError(
                f"expected 1 or more for batch_size, shard_size and num_threads, got {self.batch_size}, "
                f"{self.shard_size} and {self.num_threads}"
            )
        if self.patch_precision not in ("float16", "float32"):
            raise ValueError(f"expected patch_precision float16 or float32, got {self.patch_precision!r}")


def encode(
    encoder: Encoder,
    images: ImageSource,
    *,
    kinds: Sequence[str],
    folder: str | os.PathLike,
    weights_hash: str,
    settings: EncodingSettings,
    title: str = "",
) -> dict[str, Features]:
    """Features of all images that can be read and have finite features; shards on disk are not computed again.

    Args:
        encoder: from `modeling_vitreg.features.load_encoder`.
        images: images to encode.
        kinds: kinds of features, from `KINDS`.
        folder: parent folder of the shards; it is created.
        weights_hash: from `hash_weights`.
        settings: image size, batches and shards.
        title: title of the progress bar.

    Returns:
        Features by their kind.

    Raises:
        ValueError: no image, an unknown kind, or an image size that does not fit the model.
        RuntimeError: a patch has a value that float16 cannot hold.
    """
    if not len(images) or not set(kinds) <= set(KINDS):
        raise ValueError(f"expected images, and kinds out of {', '.join(KINDS)}, got {len(images)} and {list(kinds)}")
    sides = encoder.image_size if settings.image_size is None else (settings.image_size, settings.image_size)
    check_image_size(sides, encoder.patch_shape)
    facts = [weights_hash, images.dataset_hash, list(sides), settings.shard_size, settings.patch_precision]
    folder = pathlib.Path(folder) / short_hash(facts)
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(images), settings.shard_size)
    files = {kind: [folder / f"{number:05}.{kind}.safetensors" for number in range(len(starts))] for kind in kinds}
    has_bar = settings.has_progress_bar
    with tqdm.tqdm(total=len(images), unit="image", desc=title or encoder.name, disable=not has_bar) as bar:
        for number, start in enumerate(starts):
            rows = range(start, min(start + settings.shard_size, len(images)))
            missing = {kind: files[kind][number] for kind in kinds if not files[kind][number].exists()}
            if missing:
                _write_shard(_Shard(encoder, images.only("mask", "depth"), sides, settings), rows, missing)
            bar.update(len(rows))
    return {kind: Features(files[kind]) for kind in kinds}


@dataclass(frozen=True)
class _Shard:
    """Inputs of all shards of a pass."""

    encoder: Encoder
    images: ImageSource
    sides: tuple[int, int]
    settings: EncodingSettings

    def read(self, number: int, notes: NoteCounter) -> tuple[Tensor, dict] | str:
        """Pixels (C, rows, columns) and annotations of an image, or why it cannot be read."""
        try:
            example = self.images[number]
        except UnreadableImage as error:
            return str(error)
        notes.add(example.name, example.notes)
        targets = {"labels": torch.tensor(-1 if example.label is None else example.label)}
        if example.mask is not None:
            targets["masks"] = torch.from_numpy(fit_map(example.mask, self.sides)).to(torch.int16)
        if example.depth is not None:
            targets["depths"] = torch.from_numpy(fit_map(example.depth, self.sides))
        return self.encoder.prepare([example.image], size=self.settings.image_size)[0], targets


def _write_shard(shard: _Shard, rows: range, files: dict[str, pathlib.Path]) -> None:
    parts, unreadable, nonfinite, notes = {kind: [] for kind in files}, [], [], NoteCounter()
    for numbers, pixels, targets in _read_batches(shard, rows, unreadable, notes):
        found = _encode_batch(shard.encoder, pixels, list(files))
        is_finite = _is_finite(found)
        nonfinite += [shard.images.name_of(number) for number in numbers[~is_finite].tolist()]
        for kind, tensors in found.items():
            if _TARGETS[kind] in targets:
                tensors[_TARGETS[kind]] = targets[_TARGETS[kind]]
            kept = {name: value.cpu()[is_finite] for name, value in {"numbers": numbers, **tensors}.items()}
            parts[kind].append(_pack(kept, kind, shard.settings.patch_precision))
    facts = {"unreadable": unreadable, "num_nonfinite": len(nonfinite), "nonfinite": nonfinite}
    facts["notes"] = notes.counts
    for kind, file in files.items():
        names = parts[kind][0] if parts[kind] else ()
        tensors = {name: torch.cat([part[name] for part in parts[kind]]).contiguous() for name in names}
        save_shard(tensors if names else {"numbers": torch.empty(0, dtype=torch.int64)}, file, facts=facts)


def _read_batches(
    shard: _Shard, rows: range, unreadable: list[str], notes: NoteCounter
) -> Iterator[tuple[Tensor, Tensor, dict]]:
    good = []
    for number, result in _read_ahead(shard, rows, notes):
        if isinstance(result, str):
            unreadable.append(result)
            continue
        good.append((number, *result))
        if len(good) == shard.settings.batch_size:
            yield _stack(good)
            good = []
    if good:
        yield _stack(good)


def _read_ahead(shard: _Shard, rows: range, notes: NoteCounter) -> Iterator[tuple[int, tuple[Tensor, dict] | str]]:
    """Images in order, read by threads while the model runs, and no more than two batches ahead."""
    waiting = collections.deque()
    with ThreadPoolExecutor(shard.settings.num_threads) as pool:
        for number in rows:
            waiting.append((number, pool.submit(shard.read, number, notes)))
            if len(waiting) == 2 * shard.settings.batch_size:
                number, result = waiting.popleft()
                yield number, result.result()
        for number, result in waiting:
            yield number, result.result()


def _stack(good: list[tuple]) -> tuple[Tensor, Tensor, dict]:
    numbers, pixels, targets = zip(*good)
    targets = {name: torch.stack([target[name] for target in targets]) for name in targets[0]}
    return torch.tensor(numbers), torch.stack(pixels), targets


@torch.no_grad()
def _encode_batch(encoder: Encoder, pixels: Tensor, kinds: list[str]) -> dict[str, dict[str, Tensor]]:
    found = {}
    if "embeddings" in kinds:
        found["embeddings"] = {"embeddings": embed_images(encoder, pixels).float()}
    if set(kinds) == {"embeddings"}:
        return found
    layers = range(max(encoder.num_layers - NUM_LAYERS, 0) + 1, encoder.num_layers + 1)
    tokens = extract_features(encoder, pixels, layers=list(layers))
    last, has_class = tokens[-1], encoder.has_cls_token
    normed = encoder.norm_tokens(last.patch_tokens).float()
    if "pooled" in kinds:
        found["pooled"] = {"mean_patches": normed.mean(dim=1)}  # [B, P, D] -> [B, D]
        if has_class:
            classes = [encoder.norm_tokens(layer.cls_token).float() for layer in tokens]
            found["pooled"]["class_tokens"] = torch.stack(classes, dim=1)  # 4 x [B, D] -> [B, 4, D]
    if "normed_patches" in kinds:
        found["normed_patches"] = {"patches": normed.unflatten(1, last.grid)}
    if "raw_patches" in kinds:
        found["raw_patches"] = {"patches": last.patch_grid.float()}
        if has_class:
            found["raw_patches"]["class_tokens"] = last.cls_token.float()
    return found


def _is_finite(found: dict[str, dict[str, Tensor]]) -> Tensor:
    values = [value for tensors in found.values() for value in tensors.values()]
    return torch.stack([value.isfinite().flatten(1).all(dim=1) for value in values]).all(dim=0).cpu()


def _pack(tensors: dict[str, Tensor], kind: str, precision: str) -> dict[str, Tensor]:
    if "patches" not in tensors or precision == "float32":
        return tensors
    patches = tensors["patches"].half()
    if patches.isinf().any():
        raise RuntimeError(
            f"{kind}: a patch has a value above 65504, the largest of float16: encode with patch_precision float32"
        )
    return {**tensors, "patches": patches}


def fit_map(values: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """A map (height, width) of int32 or float32, resized (nearest) and cropped like an image by `Encoder.prepare`."""
    (rows, columns), (height, width) = sides, values.shape
    scale = max(rows / height, columns / width)
    fitted = (max(round(width * scale), columns), max(round(height * scale), rows))
    resized = np.asarray(Image.fromarray(values).resize(fitted, Image.Resampling.NEAREST))
    left, top = (fitted[0] - columns) // 2, (fitted[1] - rows) // 2
    return resized[top : top + rows, left : left + columns].copy()


__all__ = ["KINDS", "NUM_LAYERS", "EncodingSettings", "encode", "fit_map"]
