"""The consumer of a pass that stores the features and annotations of images on disk, and the features read from there.

    FOLDER/00003.pooled.safetensors   one file per shard of images and kind of features

A file appears whole or not at all, so a pass that was stopped resumes at the next shard. Only the kinds that the tasks
need are computed; each kind has its own files.

| kind | tensors of a file, in addition to `numbers` (I,), the places of its images in the source |
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

import bisect
import collections
import itertools
import json
import math
import os
import pathlib
from collections.abc import Sequence

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeling_vitreg.encoding import Consumer, Crop, EncodedBatch, Needs, PassCounts, Shard
from modeling_vitreg.encoding.precision import to_float16
from modeling_vitreg.features import Encoder
from modeling_vitreg.files import atomic_write, make_folder

from .settings import EncodingSettings
from .zero_shot import embed_images


TARGETS = {"pooled": "labels", "normed_patches": "masks", "raw_patches": "depths", "embeddings": "labels"}
NUM_LAYERS = 4  # last layers whose class tokens are stored
_MAPS = {"normed_patches": "mask", "raw_patches": "depth"}


class FeatureCache(Consumer):
    """Stores kinds of features, shard by shard.

    Args:
        encoder: from `modeling_vitreg.features.load_encoder`.
        folder: folder of the files; it is made.
        kinds: kinds of features, keys of `TARGETS`.
        settings: size of images and shards, and precision of patches.
        num_images: number of all images.

    Raises:
        ValueError: an unknown kind.
    """

    name = "features"

    def __init__(
        self,
        encoder: Encoder,
        folder: str | os.PathLike,
        *,
        kinds: Sequence[str],
        settings: EncodingSettings,
        num_images: int,
    ):
        if not kinds or not set(kinds) <= set(TARGETS):
            raise ValueError(f"expected kinds out of {', '.join(TARGETS)}, got {list(kinds)}")
        self._folder, self._kinds, self._patch_precision = make_folder(folder), tuple(kinds), settings.patch_precision
        self._parts, self._num_shards = collections.defaultdict(list), math.ceil(num_images / settings.shard_size)
        depth, is_encoded = encoder.num_layers, set(kinds) != {"embeddings"}
        layers = range(max(depth - NUM_LAYERS, 0) + 1, depth + 1) if "pooled" in kinds else (depth,)
        self.needs = Needs(
            features=tuple((layer, "token") for layer in layers) if is_encoded else (),
            outputs={"embeddings": embed_images} if "embeddings" in kinds else {},
            annotations=tuple(_MAPS[kind] for kind in kinds if kind in _MAPS),
            transform=Crop(settings.image_size),
        )

    def update(self, batch: EncodedBatch) -> None:
        """Take the features of a batch.

        Raises:
            RuntimeError: a patch has a value that float16 cannot hold.
        """
        labels = torch.tensor([-1 if label is None else label for label in batch.labels])
        targets = {"labels": labels, "masks": batch.maps.get("mask"), "depths": batch.maps.get("depth")}
        with torch.no_grad():
            found = self._features(batch)
        for kind, tensors in found.items():
            if targets[TARGETS[kind]] is not None:
                tensors[TARGETS[kind]] = targets[TARGETS[kind]]
            tensors = {name: value.cpu() for name, value in tensors.items()}
            self._parts[kind].append(self._pack({"numbers": batch.numbers, **tensors}, kind))

    def has_shard(self, index: int) -> bool:
        return all(self._file(index, kind).exists() for kind in self._kinds)

    def end_shard(self, shard: Shard) -> None:
        for kind in self._kinds:
            file, parts = self._file(shard.index, kind), self._parts.pop(kind, [{"numbers": torch.empty(0).long()}])
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            if not file.exists():
                with atomic_write(file) as path:
                    save_file(tensors, path, metadata={"counts": json.dumps(shard.counts.to_json())})

    def __getstate__(self) -> dict:
        return {**vars(self), "_parts": {}}  # what an interrupted pass leaves of a shard does not travel

    def merge(self, others: Sequence[FeatureCache]) -> None:
        """Nothing to do: every process wrote its files into the same folder."""

    def compute(self) -> dict[str, Features]:
        """Features by their kind.

        Raises:
            RuntimeError: files are not there.
        """
        files = {kind: [self._file(index, kind) for index in range(self._num_shards)] for kind in self._kinds}
        if missing := [file for group in files.values() for file in group if not file.exists()]:
            raise RuntimeError(
                f"{len(missing)} files of features are missing, the first is {missing[0]}: several machines "
                "need an output folder that they share"
            )
        return {kind: Features(group) for kind, group in files.items()}

    def _features(self, batch: EncodedBatch) -> dict[str, dict[str, Tensor]]:
        found, encoder = {}, batch.encoder
        if "embeddings" in self._kinds:
            found["embeddings"] = {"embeddings": batch.outputs["embeddings"].float()}
        if not self.needs.features:
            return found
        last = batch.tokens()
        normed = encoder.norm_tokens(last.patch_tokens).float()
        if "pooled" in self._kinds:
            found["pooled"] = {"mean_patches": normed.mean(dim=1)}  # [B, P, D] -> [B, D]
            if encoder.has_cls_token:
                layers = [batch.features[pair] for pair in self.needs.features]
                classes = [encoder.norm_tokens(layer.cls_token).float() for layer in layers]
                found["pooled"]["class_tokens"] = torch.stack(classes, dim=1)  # 4 x [B, D] -> [B, 4, D]
        if "normed_patches" in self._kinds:
            found["normed_patches"] = {"patches": normed.unflatten(1, last.grid)}
        if "raw_patches" in self._kinds:
            found["raw_patches"] = {"patches": last.patch_grid.float()}
            if encoder.has_cls_token:
                found["raw_patches"]["class_tokens"] = last.cls_token.float()
        return found

    def _pack(self, tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
        if "patches" not in tensors or self._patch_precision == "float32":
            return tensors
        remedy = "--set encoding.patch_precision=float32"
        return {**tensors, "patches": to_float16(tensors["patches"], name=kind, remedy=remedy)}

    def _file(self, index: int, kind: str) -> pathlib.Path:
        return self._folder / f"{index:05}.{kind}.safetensors"


class Features:
    """Features of one kind, read from their shards on demand.

    Args:
        files: the shards, in order.

    Attributes:
        names: names of the tensors.
        counts: images that were read and left out.
    """

    def __init__(self, files: Sequence[pathlib.Path]):
        self._shards = [safe_open(file, framework="pt") for file in files]
        sizes = [shard.get_slice("numbers").get_shape()[0] for shard in self._shards]
        self._ends = list(itertools.accumulate(sizes))
        # A shard without a readable image has no features.
        full = [shard for shard, size in zip(self._shards, sizes) if size]
        self.names = frozenset(full[0].keys()) - {"numbers"} if full else frozenset()
        counts = [json.loads(shard.metadata()["counts"]) for shard in self._shards]
        self.counts = PassCounts.join(map(PassCounts.from_json, counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def load(self, name: str) -> Tensor:
        """Tensor of all images."""
        return torch.cat([shard.get_tensor(name) for shard in self._shards if name in shard.keys()])  # noqa: SIM118

    def take(self, name: str, rows: Tensor) -> Tensor:
        """Tensor of some images in the given order; other rows are not read."""
        return torch.stack([self._row(name, int(row)) for row in rows])

    def _row(self, name: str, row: int) -> Tensor:
        number = bisect.bisect_right(self._ends, row)
        start = self._ends[number - 1] if number else 0
        return self._shards[number].get_slice(name)[row - start]
