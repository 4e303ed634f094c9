"""Refinement of a finished model by low-rank adapters: registers take over the spurious tokens of the original.

A frozen copy of the model looks at crops beside a strip of another image, which shows which of its tokens do not
depend on the crop. The student learns the clean ones from a single pass over the whole image, and its registers the
others. Registers are tokens of the model, which may have gates, or a ring of blank patches around the image,
as published. The adapters are merged into the weights of the saved model.

Letters: B images, C crops of an image, P patches, R registers, D width. Grids are (rows, columns).

Source: Qiu et al. 2026, UniRefiner, arXiv 2605.19622. There the other image is one for the whole batch, here it is the
next image of the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.settings import expect

from .adaptation import add_lora
from .objective import Panel
from .retrofitting import OriginalSettings, RetrofitObjective, cosine_distance, train_only
from .spurious_tokens import (
    absorption_loss,
    alignment_loss,
    clean_threshold,
    consistency_loss,
    hijackee_scores,
    is_no_hijackee,
    match,
    most_similar,
    sample_spurious,
    separation_loss,
)


KINDS, FILLS = ("tokens", "ring"), ("zero", "rand", "randn")
CROP_AREA, CROP_RATIO = (0.25, 0.5), (2 / 3, 3 / 2)  # share of the image; width / height
STRIP_SHARE = 0.35  # of a side of the image
CONSISTENCY_START = 0.1  # share of the steps without the consistency term
LEAST_RING = 4  # patches of the wider ring that makes cleaner targets


@dataclasses.dataclass(frozen=True)
class RefineSettings(OriginalSettings):
    """Settings of the refinement.

    Args:
        registers: "tokens" for registers of the model, "ring" for blank patches around the image.
        ring_factor: side of the grid in units of the width of the ring.
        fill: pixels of the ring: "zero", "rand" (uniform in [0, 1]) or "randn" (normal), normalised ones.
        num_crops: crops of an image.
        spurious_similarity: cosine with an unrelated image from which a token is spurious.
        register_similarity: cosine with a register from which a token is spurious.
        hijack_layers: first and last layer, from 1, of the filter of hijackees; (0, 0) for none.
        hijack_sigma: standard deviations above the mean from which a token is a hijackee.
        uniformity: weight of the spread of tokens; 0.3 for DINOv2 g.
        absorb_weight, consistency_weight: weights of these terms.
        class_weight: weight of the cosine distance of the class token from the original's; 0 in UniRefiner.
        lora_rank, lora_dropout: of the adapters beside all linear layers.
    """

    registers: str = "tokens"
    ring_factor: int = 24
    fill: str = "randn"
    num_crops: int = 3
    spurious_similarity: float = 0.5
    register_similarity: float = 0.55
    hijack_layers: tuple[int, int] = (0, 0)
    hijack_sigma: float = 0.5
    uniformity: float = 1.0
    absorb_weight: float = 0.1
    consistency_weight: float = 0.4
    class_weight: float = 0.0
    lora_rank: int = 8
    lora_dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        counts = dict.fromkeys(("ring_factor", "num_crops", "lora_rank"), "[1, inf)")
        expect(self, "settings", registers=KINDS, fill=FILLS, **counts)
        if len(self.hijack_layers) != 2 or not 0 <= self.hijack_layers[0] <= self.hijack_layers[1]:
            raise ValueError(f"settings: expected 0 <= first <= last in hijack_layers, got {self.hijack_layers}")


class RefineRegisters(RetrofitObjective):
    """Registers that take over spurious tokens; see `RetrofitObjective`."""

    description = (
        "refinement by low-rank adapters that move spurious tokens of the original into registers (UniRefiner)"
    )
    citation = "unirefiner"
    settings_class = RefineSettings
    panels = (
        Panel("Loss", {"total": "total", "alignment": "alignment", "separation": "separation"}),
        Panel("Registers", {"absorption": "absorption", "consistency": "consistency"}),
        Panel("Clean tokens", {"clean_share": "share"}, "%"),
        Panel("Class token", {"class_distance": "cosine distance"}),
    )

    def _choose_parameters(self) -> None:
        backbone, settings = self.backbone, self.settings
        registers = backbone.embeddings.register_tokens
        if settings.registers == "tokens" and registers is None:
            raise ValueError(
                "settings: registers='tokens' needs registers in the model: set num_register_tokens, or "
                "settings.registers=ring"
            )
        if settings.hijack_layers[1] > len(backbone.layers):
            raise ValueError(
                f"settings: expected hijack_layers in 1 ... {len(backbone.layers)}, got {settings.hijack_layers}"
            )
        gates = [layer.attention.register_gates for layer in backbone.layers]
        train_only(backbone, *([registers, *gates] if settings.registers == "tokens" else []))
        targets = ["qkv", "proj", "fc1", "fc2"]
        add_lora(backbone, settings.lora_rank, targets=targets, dropout=settings.lora_dropout)

    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """Terms `alignment`, `separation`, `absorption`, `consistency`, `clean_share`, and `total`.

        Args:
            batch: `global_views` (1, B, 3, h, w) of two images or more.
            step: number of the step.
        """
        settings, images = self.settings, batch["global_views"].flatten(0, 1)  # [1, B, ...] -> [B, ...]
        if len(images) < 2:
            raise ValueError("each image of a batch is compared with another one: use batches of 2 images or more")
        crops_of_image = settings.num_crops
        boxes = draw_boxes(len(images) * crops_of_image, device=images.device).unflatten(0, (-1, crops_of_image))
        crops = cut_boxes(images, boxes, size=images.shape[2:])
        full, registers, cls_tokens = self._encode(images)
        student = F.normalize(cut_boxes(full.permute(0, 3, 1, 2), boxes, size=full.shape[1:3]), dim=1)
        student = student.flatten(2).mT  # [B C, D, rows, columns] -> [B C, P, D]
        full, registers = (each.repeat_interleave(crops_of_image, 0) for each in (full.flatten(1, 2), registers))
        (targets, spurious, is_clean, pool), cls_targets = self._teach(images, crops, registers)
        clean_share = is_clean.float().mean()
        is_clean = is_clean | ~is_clean.any()  # without any clean token all count
        threshold = clean_threshold(targets, is_clean)
        losses = {
            "alignment": alignment_loss(
                student, targets, is_clean, pool, threshold=threshold, uniformity=settings.uniformity
            ),
            "separation": separation_loss(full, registers),
            "absorption": absorption_loss(registers, student, spurious, threshold=threshold),
        }
        if step > CONSISTENCY_START * self.num_steps:
            with torch.no_grad():
                cleaner, *_ = self._encode(crops, least=LEAST_RING)
            losses["consistency"] = consistency_loss(student, cleaner.flatten(1, 2))
        else:
            losses["consistency"] = student.new_zeros(())
        losses["total"] = (
            losses["alignment"]
            + losses["separation"]
            + settings.absorb_weight * losses["absorption"]
            + settings.consistency_weight * losses["consistency"]
        )
        if cls_targets is not None:
            losses["class_distance"] = cosine_distance(cls_tokens, cls_targets)
            losses["total"] = losses["total"] + settings.class_weight * losses["class_distance"]
        return losses | {"clean_share": clean_share}

    def _encode(self, images: Tensor, *, least: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
        """Unit vectors of the student, patches (B, rows, columns, D) and registers (B, R, D); and its class tokens."""
        if self.settings.registers == "tokens":
            output = self.backbone(images)
            patches, registers = (F.normalize(each, dim=-1) for each in (output.patch_grid, output.register_tokens))
            return patches, registers, output.cls_token
        grid = self.backbone.embeddings.grid_of(images)
        width = max(grid[1] // self.settings.ring_factor, least)
        ringed = add_ring(images, width, patch_shape=self.backbone.config.patch_shape, fill=self.settings.fill)
        output = self.backbone(ringed)
        return *split_ring(F.normalize(output.patch_grid, dim=-1), width), output.cls_token

    @torch.no_grad()
    def _teach(self, images: Tensor, crops: Tensor, registers: Tensor) -> tuple[tuple, Tensor | None]:
        """Targets (B C, P, D), spurious tokens (B C, 2 R, D), clean tokens (B C, P) and the pool of targets; and the
        class tokens of the images."""
        settings, teacher = self.settings, self.teacher_for(images)
        others = images.roll(1, 0).repeat_interleave(settings.num_crops, 0)
        composed, is_crop = beside_strip(crops, others, patch_shape=teacher.config.patch_shape)
        first, last = settings.hijack_layers
        with record_queries_and_keys(teacher, range(first, last + 1) if first else ()) as recorded:
            tokens = F.normalize(teacher(composed).patch_tokens, dim=-1)
        found, strip = tokens[:, is_crop], tokens[:, ~is_crop]
        output = teacher(images)
        whole = F.normalize(output.patch_tokens, dim=-1)
        pool, unrelated = (each.repeat_interleave(settings.num_crops, 0) for each in (whole, whole.roll(1, 0)))
        targets = match(found, pool)
        similarities = [most_similar(found, unrelated), most_similar(found, strip)]
        number = registers.shape[1]
        spurious = torch.cat([sample_spurious(found, each, number) for each in similarities], dim=1)
        third = registers[:, torch.randperm(number, device=images.device)[: max(number // 3, 1)]]
        is_clean = most_similar(targets, third) < settings.register_similarity
        for similarity in similarities:
            is_clean &= similarity < settings.spurious_similarity
        if first and is_clean.sum() > 1:
            first_patch = teacher.config.num_prefix_tokens
            queries, keys = zip(*([part[:, first_patch:][:, is_crop] for part in pair] for pair in recorded))
            scores = hijackee_scores(queries, keys, is_clean)
            is_clean &= is_no_hijackee(scores, is_clean, sigma=settings.hijack_sigma)
        return (targets, match(spurious, pool), is_clean, pool), output.cls_token


def draw_boxes(number: int, *, device: torch.device) -> Tensor:
    """Random boxes (number, 4) of left, top, right and bottom, in units of the sides of the image."""
    area = torch.empty(number, device=device).uniform_(*CROP_AREA)
    ratio = torch.empty(number, device=device).uniform_(*map(math.log, CROP_RATIO)).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1)  # [number, 2], width and height
    corner = (torch.rand(number, 2, device=device) - sides / 2).clamp(min=0).minimum(1 - sides)
    return torch.cat([corner, corner + sides], dim=1)


def cut_boxes(maps: Tensor, boxes: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Cut boxes (B, C, 4) of `draw_boxes` out of maps (B, D, rows, columns), resized to (B C, D, *size)."""
    rows, columns = maps.shape[2:]
    boxes = boxes * boxes.new_tensor([columns, rows, columns, rows])
    return roi_align(maps.float(), list(boxes.float()), output_size=tuple(size), aligned=True).to(maps.dtype)


def beside_strip(crops: Tensor, others: Tensor, *, patch_shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Crops with a strip of other images on a random side, and which of the patches are of the crops.

    The strip is 0.35 of the side in patches, rounded down and then up to an even number.

    Args:
        crops, others: (B, 3, h, w).
        patch_shape: pixels of a patch (rows, columns).
    """
    side, is_last = (int(torch.randint(2, ())) for _ in range(2))
    sizes = [crops.shape[2 + axis] // patch_shape[axis] for axis in (0, 1)]
    width = int(sizes[side] * STRIP_SHARE)
    width = max(width + width % 2, 1)
    pixels = width * patch_shape[side]
    start = others.shape[2 + side] - pixels if is_last else 0
    parts = [others.narrow(2 + side, start, pixels), crops]
    is_crop = [torch.zeros, torch.ones]
    lengths = [width, sizes[side]]
    if is_last:
        parts, is_crop, lengths = parts[::-1], is_crop[::-1], lengths[::-1]
    masks = [
        make(*[length if axis == side else sizes[axis] for axis in (0, 1)], dtype=torch.bool)
        for make, length in zip(is_crop, lengths)
    ]
    return torch.cat(parts, dim=2 + side), torch.cat(masks, dim=side).flatten().to(crops.device)


def add_ring(images: Tensor, width: int, *, patch_shape: tuple[int, int], fill: str) -> Tensor:
    """Images (B, 3, h, w) inside a ring of `width` patches of new pixels."""
    rows, columns = (width * side for side in patch_shape)
    size = (*images.shape[:2], images.shape[2] + 2 * rows, images.shape[3] + 2 * columns)
    make = {"zero": torch.zeros, "rand": torch.rand, "randn": torch.randn}[fill]
    canvas = make(size, device=images.device, dtype=images.dtype)
    canvas[:, :, rows:-rows, columns:-columns] = images
    return canvas


def split_ring(patch_grid: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Patches (B, rows, columns, D) within the ring, and the patches (B, R, D) of the ring."""
    is_ring = torch.ones(patch_grid.shape[1:3], dtype=torch.bool, device=patch_grid.device)
    is_ring[width:-width, width:-width] = False
    return patch_grid[:, width:-width, width:-width], patch_grid[:, is_ring]


@contextlib.contextmanager
def record_queries_and_keys(model: ViTWithRegistersModel, layers: range | tuple) -> Iterator[list]:
    """Pairs of queries and keys (B, N, D), all heads in one, of layers from 1, of each pass inside the block."""
    recorded: list[tuple[Tensor, Tensor]] = []
    handles = [
        model.layers[number - 1].attention.qkv.register_forward_hook(
            lambda _, __, packed, sizes=model.layers[number - 1].attention.sizes: recorded.append(
                packed.split(sizes, dim=-1)[:2]
            )
        )
        for number in layers
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
