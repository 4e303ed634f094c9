"""The consumer of a pass that finds an object in each image by several settings, and compares it with the truth.

Images are encoded at full resolution, padded at the bottom and the right to a multiple of the patch. Results are one
row per image, so they depend neither on batches nor on processes:

| key of a row | value |
| --- | --- |
| name | name of the image |
| boxes | true boxes (objects, 4) in pixels of the image; None: not annotated |
| box | box (4,) found by the first setting |
| ious | for each setting the IoU with the best true box; None without a true box |
| is_degenerate | for each setting whether the method found no structure |
| point_in_box | whether the patch most similar to the class token lies in a true box; None without either |

Letters for shapes: B images, P patches.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F

from modeling_vitreg.encoding import Consumer, EncodedBatch, Needs, Pad, PassCounts, Shard
from modeling_vitreg.features import Encoder, layer_numbers
from modeling_vitreg.files import make_folder, write_text
from modeling_vitreg.metrics import best_iou

from .boxes import component_boxes, largest_components, seed_components
from .dino_seg import dino_seg
from .lost import lost_with_biases
from .settings import DiscoverySettings
from .tokencut import tokencut


class ObjectFinder(Consumer):
    """Rows of results of several settings; see the table above.

    Args:
        encoder: from `modeling_vitreg.features.load_encoder`.
        settings: one or more; how images are read is that of the first.
        folder: for shards of rows, which a later pass reads instead of finding them again; None: rows are not stored.

    Attributes:
        settings: as above, with layers counted from 1.
        rows: number of an image to its row.
        stored: number of a shard to what was read for it, of this pass.
        resumed: the same of shards that an earlier pass stored.

    Raises:
        ValueError: settings that do not fit the model.
    """

    name = "objects"

    def __init__(
        self, encoder: Encoder, settings: Sequence[DiscoverySettings], *, folder: str | os.PathLike | None = None
    ):
        self.settings, self.rows = [_fit(each, encoder) for each in settings], {}
        self.stored: dict[int, PassCounts] = {}
        self.resumed: dict[int, PassCounts] = {}
        self._folder = None if folder is None else make_folder(folder)
        # LOST computes similarities once for all biases.
        self._groups = collections.defaultdict(list)
        for number, each in enumerate(self.settings):
            self._groups[dataclasses.replace(each, bias=0.0)].append(number)
        is_map = [each.method == "dino_seg" for each in self.settings]
        self.needs = Needs(
            features=tuple(
                {(e.layer, e.feature): None for e, skips in zip(self.settings, is_map) if not skips}
                | {(-1, "token"): None}
            ),
            attention=tuple({each.layer: None for each, reads in zip(self.settings, is_map) if reads}),
            annotations=("box",),
            transform=Pad(self.settings[0].longest_side, self.settings[0].batch_size),
        )

    def update(self, batch: EncodedBatch) -> None:
        found = [None] * len(self.settings)
        for each, numbers in self._groups.items():
            biases = [self.settings[number].bias for number in numbers]
            for number, (components, is_degenerate) in zip(numbers, _find(each, biases, batch)):
                found[number] = _boxes(components, batch), is_degenerate.tolist()
        points = _similar_points(batch)
        for place, image in enumerate(batch.images):
            boxes = None if image.boxes is None else np.asarray(image.boxes, dtype=np.float64)
            is_annotated = boxes is not None and len(boxes)
            self.rows[image.number] = {
                "name": image.name,
                "boxes": None if boxes is None else boxes.tolist(),
                "box": found[0][0][place].tolist(),
                "ious": [best_iou(own[place], boxes) if is_annotated else None for own, _ in found],
                "is_degenerate": [is_degenerate[place] for _, is_degenerate in found],
                "point_in_box": _is_inside(points[place], boxes) if is_annotated and points is not None else None,
            }

    def has_shard(self, index: int) -> bool:
        if self._folder is None or not self._file(index).exists():
            return False
        if index not in self.resumed:
            found = json.loads(self._file(index).read_text())
            self.resumed[index] = PassCounts.from_json(found["counts"])
            self.rows |= {row.pop("number"): row for row in found["rows"]}
        return True

    def end_shard(self, shard: Shard) -> None:
        if self._folder is not None:
            self.stored[shard.index] = shard.counts
            rows = [{"number": number, **self.rows[number]} for number in shard.numbers if number in self.rows]
            write_text(self._file(shard.index), json.dumps({"counts": shard.counts.to_json(), "rows": rows}))

    def merge(self, others: Sequence[ObjectFinder]) -> None:
        for other in others:
            self.rows |= other.rows
            self.stored |= other.stored
            self.resumed |= other.resumed

    @property
    def counts(self) -> PassCounts:
        """What was read for all shards."""
        return PassCounts.join([*self.resumed.values(), *self.stored.values()])

    def compute(self) -> list[dict]:
        """For each setting `corloc`, `num_hits`, `mean_iou` and `num_degenerate` of `DiscoveryReport`."""
        return [self._summarise(number) for number in range(len(self.settings))]

    def ious(self, number: int = 0) -> list[float]:
        """IoUs of a setting with the best true box, of all annotated images in order."""
        rows = [self.rows[image] for image in sorted(self.rows)]
        return [row["ious"][number] for row in rows if row["ious"][number] is not None]

    def point_in_box(self) -> float | None:
        """Share of annotated images whose patch most similar to the class token lies in a true box."""
        # A row that an earlier version stored has none.
        hits = [row["point_in_box"] for row in self.rows.values() if row.get("point_in_box") is not None]
        return sum(hits) / len(hits) if hits else None

    def _summarise(self, number: int) -> dict[str, Any]:
        ious = self.ious(number)
        num_hits = sum(iou >= self.settings[number].iou_threshold for iou in ious)
        return {
            "corloc": num_hits / len(ious) if ious else None,
            "num_hits": num_hits,
            "mean_iou": float(np.mean(ious)) if ious else None,
            "num_degenerate": sum(row["is_degenerate"][number] for row in self.rows.values()),
        }

    def _file(self, index: int) -> pathlib.Path:
        return self._folder / f"{index:05}.objects.json"


def _fit(settings: DiscoverySettings, encoder: Encoder) -> DiscoverySettings:
    """Settings with the layer counted from 1."""
    num_heads = encoder.num_heads or 0
    if settings.method == "dino_seg" and not (encoder.has_cls_token and 0 <= settings.head < num_heads):
        raise ValueError(
            f"DINO-seg reads the attention of a class token: expected one, and a head from 0 to "
            f"{num_heads - 1}, got {'one' if encoder.has_cls_token else 'none'} and head {settings.head}"
        )
    if not encoder.takes_any_size:
        rows, columns = encoder.image_size
        raise ValueError(
            f"{encoder.name}: discovery reads images at their own size, and this model takes {rows} x {columns} "
            "pixels only"
        )
    (layer,) = layer_numbers(settings.layer, encoder.num_layers, first=1)
    return dataclasses.replace(settings, layer=layer)


def _find(settings: DiscoverySettings, biases: Sequence[float], batch: EncodedBatch) -> Iterator[tuple]:
    """For each bias the components (B, rows, columns) of the objects, and which of them (B,) are degenerate."""
    if settings.method == "dino_seg":
        maps = batch.attention[settings.layer]  # [B, H, Q, N]
        attention = maps[:, settings.head, 0, maps.shape[2] :]  # [B, P]
        kept = dino_seg(attention, attention_share=settings.attention_share)
        yield largest_components(kept, grid=batch.grid), attention.amax(dim=1) == attention.amin(dim=1)
        return
    patches = batch.tokens(settings.layer, settings.feature).patch_tokens
    if settings.method == "tokencut":
        results = [tokencut(patches, tau=settings.tau, epsilon=settings.epsilon)]
    else:
        names = ("num_candidates", "is_centered", "is_normalized")
        results = lost_with_biases(patches, biases=biases, **{name: getattr(settings, name) for name in names})
    for result in results:
        yield seed_components(result.mask, result.seeds, grid=batch.grid), result.is_degenerate


def _boxes(components: np.ndarray, batch: EncodedBatch) -> np.ndarray:
    """Boxes (B, 4) in pixels of the decoded images."""
    sizes, original = (
        np.array([getattr(image, name) for image in batch.images], dtype=np.float64)
        for name in ("size", "original_size")
    )
    boxes = component_boxes(components, patch_shape=batch.encoder.patch_shape, image_sizes=sizes)
    return boxes * np.tile((original / sizes)[:, ::-1], 2)


def _similar_points(batch: EncodedBatch) -> np.ndarray | None:
    """Centre (B, 2) as x, y, in pixels of the decoded image, of the patch with the largest cosine to the class token.

    Both are normed, of the last layer; patches whose centre is padding do not count. None without a class token.

    Source: arXiv 2602.22394.
    """
    tokens = batch.tokens()
    if tokens.cls_token is None:
        return None
    parts = (tokens.cls_token[:, None], tokens.patch_tokens)
    prefix, patches = (batch.encoder.norm_tokens(part).float() for part in parts)
    cosines = F.cosine_similarity(prefix, patches, dim=-1).unflatten(1, batch.grid)
    shape, points = batch.encoder.patch_shape, []
    for image, own in zip(batch.images, cosines):
        rows, columns = (max(round(side / patch), 1) for side, patch in zip(image.size, shape))  # with their centre
        row, column = divmod(own[:rows, :columns].flatten().argmax().item(), columns)
        scales = [original / size for original, size in zip(image.original_size, image.size)]
        points.append(((column + 0.5) * shape[1] * scales[1], (row + 0.5) * shape[0] * scales[0]))
    return np.array(points)


def _is_inside(point: np.ndarray, boxes: np.ndarray) -> bool:
    return bool(((boxes[:, :2] <= point) & (point < boxes[:, 2:])).all(axis=1).any())
