"""The pass of a discovery over the images: read, encode, find an object, compare it with the true boxes.

Letters for shapes: B images, H heads, Q prefix tokens, N tokens, P patches.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modeling_vitreg.features import Encoder, extract_many, layer_numbers
from modeling_vitreg.images import AnnotatedImage, UnreadableImage
from modeling_vitreg.images.annotations import NoteCounter
from modeling_vitreg.metrics import best_iou

from .boxes import component_boxes, largest_components, pad_to_patches, seed_components
from .dino_seg import dino_seg
from .lost import LostResult, lost, lost_with_biases
from .settings import DiscoverySettings, Sweep
from .tokencut import TokenCutResult, tokencut


_NUM_NAMED = 20  # images that are left out whose names are kept


@dataclass
class Entry:
    """An image of a batch: its `size` after resizing, and the `scale` from its pixels to those of the original."""

    number: int
    image: AnnotatedImage
    size: tuple[int, int]
    scale: np.ndarray


class Score:
    """Results of one setting, image by image.

    Args:
        iou_threshold: IoU with a true box from which an object counts as found.
    """

    def __init__(self, iou_threshold: float):
        self.iou_threshold, self.ious, self.num_degenerate = iou_threshold, [], 0

    def add(self, box: np.ndarray, truth: np.ndarray | None, is_degenerate: bool) -> float | None:
        """Add a box (4,); returns its IoU with the best true box, None if the image has no true box."""
        self.num_degenerate += int(is_degenerate)
        if truth is None or not len(truth):
            return None
        self.ious.append(best_iou(box, truth))
        return self.ious[-1]

    def summarise(self) -> dict:
        """The numbers of `DiscoveryReport.as_published`."""
        num_hits = sum(iou >= self.iou_threshold for iou in self.ious)
        return {
            "corloc": num_hits / len(self.ious) if self.ious else None,
            "num_hits": num_hits,
            "mean_iou": float(np.mean(self.ious)) if self.ious else None,
            "num_degenerate": self.num_degenerate,
        }


class Measurement:
    """Results of all settings, image by image.

    Args:
        encoder, settings, sweep: as in `run.discover`.

    Raises:
        ValueError: settings that do not fit the model.
    """

    def __init__(self, encoder: Encoder, settings: DiscoverySettings, sweep: Sweep | None):
        self.encoder, self.settings, self.sweep = encoder, settings, sweep
        if settings.method == "dino_seg" and not (encoder.has_cls_token and 0 <= settings.head < encoder.num_heads):
            raise ValueError(
                f"DINO-seg reads the attention of a class token: expected one, and a head from 0 to "
                f"{encoder.num_heads - 1}, got {'one' if encoder.has_cls_token else 'none'} and head {settings.head}"
            )
        (self.layer,) = layer_numbers(settings.layer, encoder.num_layers, first=1)
        layers = layer_numbers(sweep.layers, encoder.num_layers, first=1) if sweep else []
        self.pairs = list(dict.fromkeys((layer, feature) for layer in layers for feature in sweep.features))
        self.published = Score(settings.iou_threshold)
        self.scores = {(*pair, bias): Score(settings.iou_threshold) for pair in self.pairs for bias in sweep.biases}
        self.predictions, self.unreadable, self.nonfinite = {}, [], []
        self.notes = NoteCounter()

    def pass_over(
        self, images: Sequence[AnnotatedImage], numbers: Iterable[int], *, tell: Callable[[int], object]
    ) -> None:
        """Read and measure numbered images; those of equal padded size form a batch.

        Args:
            images: `images[number]` decodes one, or raises `UnreadableImage`.
            numbers: numbers of the images to measure, in any order.
            tell: called with the number of images that are finished.
        """
        waiting = collections.defaultdict(list)  # padded size -> images of it
        for number in numbers:
            if (read := self.read(images, number)) is None:
                tell(1)
                continue
            group = waiting[tuple(read[1].shape)]
            group.append(read)
            if len(group) == self.settings.batch_size:
                self._flush(group, tell)
        for group in filter(None, waiting.values()):
            self._flush(group, tell)

    def _flush(self, group: list[tuple], tell: Callable[[int], object]) -> None:
        entries, pixels = zip(*group)
        self.add(list(entries), torch.stack(pixels))
        tell(len(group))
        group.clear()

    def read(self, images: Sequence[AnnotatedImage], number: int) -> tuple[Entry, Tensor] | None:
        """An image and its padded pixels (C, rows, columns); None if it cannot be read."""
        try:
            image = images[number]
        except UnreadableImage as error:
            self.unreadable.append(str(error))
            return None
        self.notes.add(image.name, image.notes)
        picture, original = image.image, image.image.size
        longest = self.settings.longest_side
        if longest is not None and max(original) > longest:
            sides = [max(round(side * longest / max(original)), 1) for side in original]
            picture = picture.resize(sides, Image.Resampling.BICUBIC)
        entry = Entry(number, image, picture.size[::-1], np.tile(np.divide(original, picture.size), 2))
        return entry, _to_pixels(picture, self.encoder)

    def add(self, entries: list[Entry], pixels: Tensor) -> None:
        """Measure a batch (B, C, rows, columns)."""
        wanted = self.pairs
        if self.settings.method != "dino_seg":
            wanted = list(dict.fromkeys([*wanted, (self.layer, self.settings.feature)]))
        found = dict(zip(wanted, extract_many(self.encoder, pixels, wanted=wanted))) if wanted else {}
        attention = self._attention(pixels)
        values = [tokens.patch_tokens for tokens in found.values()] + [attention] * (attention is not None)
        is_finite = torch.stack([value.isfinite().flatten(1).all(dim=1) for value in values]).all(dim=0)
        self.nonfinite += [entry.image.name for entry, kept in zip(entries, is_finite.tolist()) if not kept]
        if not is_finite.any():
            return
        entries = [entry for entry, is_kept in zip(entries, is_finite.tolist()) if is_kept]
        found = {pair: tokens.patch_tokens[is_finite] for pair, tokens in found.items()}
        attention = None if attention is None else attention[is_finite]
        grid = tuple(side // patch for side, patch in zip(pixels.shape[2:], self.encoder.patch_shape))
        published = self._publish(entries, found, attention, grid)
        swept = {key: boxes for pair in self.pairs for key, boxes in self._try(entries, pair, found[pair], grid)}
        # Added at the end, so that an interrupted pass holds whole batches only.
        self._add_predictions(entries, *published)
        for key, (boxes, is_degenerate) in swept.items():
            for entry, box, is_empty in zip(entries, boxes, is_degenerate):
                self.scores[key].add(box, entry.image.boxes, is_empty)

    def counts(self) -> dict:
        """Numbers of images that were measured and left out, and the reasons."""
        return {
            "num_images": len(self.predictions),
            "num_annotated": len(self.published.ious),
            "num_without_boxes": sum(found["boxes"] == [] for found in self.predictions.values()),
            "num_unreadable": len(self.unreadable),
            "num_nonfinite": len(self.nonfinite),
            "unreadable": self.unreadable[:_NUM_NAMED],
            "nonfinite": self.nonfinite[:_NUM_NAMED],
            "notes": self.notes.lines(len(self.predictions) + len(self.unreadable) + len(self.nonfinite)),
        }

    def sweep_entries(self) -> list[dict]:
        """Numbers of each setting of the sweep."""
        return [
            {"feature": feature, "layer": layer, "bias": bias, **score.summarise()}
            for (layer, feature, bias), score in self.scores.items()
        ]

    def _attention(self, pixels: Tensor) -> Tensor | None:
        if self.settings.method != "dino_seg":
            return None
        (maps,) = self.encoder.prefix_attention(pixels, layers=[self.layer])  # [B, H, Q, N]
        return maps[:, self.settings.head, 0, maps.shape[2] :]

    def _publish(self, entries: list, found: dict, attention: Tensor | None, grid: tuple) -> tuple[np.ndarray, list]:
        """Boxes with the published settings, and which of them are degenerate."""
        settings = self.settings
        if settings.method == "dino_seg":
            components = largest_components(dino_seg(attention, attention_share=settings.attention_share), grid=grid)
            is_degenerate = attention.amax(dim=1) == attention.amin(dim=1)
        else:
            result = self._apply(found[self.layer, settings.feature])
            components, is_degenerate = seed_components(result.mask, result.seeds, grid=grid), result.is_degenerate
        return self._boxes(components, entries), is_degenerate.tolist()

    def _add_predictions(self, entries: list[Entry], boxes: np.ndarray, is_degenerate: list) -> None:
        for entry, box, is_empty in zip(entries, boxes, is_degenerate):
            truth = entry.image.boxes
            self.predictions[entry.number] = {
                "name": entry.image.name,
                "box": box.tolist(),
                "iou": self.published.add(box, truth, is_empty),
                "is_degenerate": is_empty,
                "boxes": None if truth is None else np.asarray(truth, dtype=np.float64).tolist(),
            }

    def _apply(self, patches: Tensor) -> LostResult | TokenCutResult:
        settings = self.settings
        if settings.method == "tokencut":
            return tokencut(patches, tau=settings.tau, epsilon=settings.epsilon)
        names = ("bias", "num_candidates", "is_centered", "is_normalized")
        return lost(patches, **{name: getattr(settings, name) for name in names})

    def _try(self, entries: list, pair: tuple, patches: Tensor, grid: tuple) -> Iterator[tuple]:
        """Keys of the sweep for one feature of one layer, with boxes, and which of them are degenerate."""
        options = {"is_centered": self.sweep.is_centered, "is_normalized": self.sweep.is_normalized}
        options["num_candidates"] = self.settings.num_candidates
        results = lost_with_biases(patches, biases=self.sweep.biases, **options)
        for bias, result in zip(self.sweep.biases, results):
            boxes = self._boxes(seed_components(result.mask, result.seeds, grid=grid), entries)
            yield (*pair, bias), (boxes, result.is_degenerate.tolist())

    def _boxes(self, components: np.ndarray, entries: list[Entry]) -> np.ndarray:
        """Boxes (B, 4) in pixels of the original images."""
        sizes = [entry.size for entry in entries]
        boxes = component_boxes(components, patch_shape=self.encoder.patch_shape, image_sizes=sizes)
        return boxes * np.stack([entry.scale for entry in entries])


def _to_pixels(picture: Image.Image, encoder: Encoder) -> Tensor:
    values = np.asarray(picture.convert(encoder.image_mode), dtype=np.float32) / 255
    values = values.reshape(picture.height, picture.width, -1)
    values = (values - np.float32(encoder.image_mean)) / np.float32(encoder.image_std)
    return pad_to_patches(torch.from_numpy(values).permute(2, 0, 1), patch_shape=encoder.patch_shape)


__all__ = ["Entry", "Measurement", "Score"]
