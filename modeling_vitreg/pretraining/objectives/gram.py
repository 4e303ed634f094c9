"""Gram anchoring: similarities between the patches of an image are held near those of an earlier model (DINOv3).

In long self-supervised training class tokens go on to improve while patches lose their local meaning. The term keeps
the similarities of patches, and leaves the patches themselves free.

Letters: B images, P patches, D width.
Source: Simeoni et al. 2025, arXiv 2508.10104, section 4.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.settings import expect

from ..run.schedules import cosine
from ..views.crops import CropSettings


START, EMA = "init", "ema"
TOKENS, NEGATIVES = ("all", "masked", "unmasked"), ("keep", "clip", "clip_with_teacher")


@dataclasses.dataclass(frozen=True)
class GramSettings:
    """Settings of the Gram term. Except for `weight` and `resolution`, the defaults are those of DINOv3's recipes.

    Args:
        weight: weight of the term; 2 in DINOv3, 0 for none.
        teacher: whose similarities are kept: "init", the model that the run starts from; "ema", the moving average as
            it is at step `begin`; else the folder or Hub name of a model of this family.
        begin: first step with the term.
        ramp: steps in which the weight rises to its value, along half a cosine.
        refresh: steps after which the moving average becomes the teacher, counted from `begin`; 0 for never.
        max_refreshes: how often at most.
        resolution: side of the teacher's views divided by that of the student's, 1 or 2; its tokens are resized to the
            student's grid. 2 suits images of twice the size of a view or more.
        is_normalized: divide tokens by their norms.
        is_per_image: compare patches of one image; otherwise of all images of a process.
        tokens: "all", or only those that the student sees "masked" or "unmasked"; these with `is_per_image` false.
        negatives: "keep" negative similarities; "clip" them to 0; "clip_with_teacher": only where the teacher's are
            negative, in both.
    """

    weight: float = 0.0
    teacher: str = START
    begin: int = 0
    ramp: int = 0
    refresh: int = 0
    max_refreshes: int = 3
    resolution: float = 1.0
    is_normalized: bool = True
    is_per_image: bool = True
    tokens: str = "all"
    negatives: str = "keep"

    def __post_init__(self):
        counts = dict.fromkeys(("weight", "begin", "ramp", "refresh", "max_refreshes"), "[0, inf)")
        expect(self, "settings: gram", tokens=TOKENS, negatives=NEGATIVES, **counts)
        names = ("begin", "ramp", "refresh", "resolution")
        unused = [] if self.weight else [name for name in names if getattr(self, name) != getattr(type(self), name)]
        contradictions = {
            f"teacher {self.teacher!r} and weight 0": (
                self.teacher != START and not self.weight,
                "set gram.weight, or leave out gram.teacher",
            ),
            **{
                f"{name} {getattr(self, name):g} and weight 0": (
                    True,
                    f"set gram.weight, or leave out gram.{name} (settings.gram={{}} leaves out all)",
                )
                for name in unused
            },
            f"refresh {self.refresh} and max_refreshes 0": (
                self.refresh > 0 and not self.max_refreshes,
                "set gram.refresh=0, or gram.max_refreshes=1 or more",
            ),
            "teacher 'ema' and begin 0": (
                self.teacher == EMA and not self.begin,
                "the average is kept as it is at step gram.begin: set it, or gram.teacher=init",
            ),
            f"tokens {self.tokens!r} and is_per_image true": (
                self.tokens != "all" and self.is_per_image,
                "images have different numbers of such tokens: set gram.is_per_image=false, or gram.tokens=all",
            ),
            f"resolution {self.resolution:g}": (self.resolution not in (1, 2), "expected 1 or 2"),
        }
        for what, (is_so, remedy) in contradictions.items():
            if is_so:
                raise ValueError(f"settings: gram has {what}: {remedy}")

    def view_sizes(self, crops: CropSettings) -> list[int]:
        """Sides of the teacher's views in pixels."""
        if crops.sizes:
            return [row[2] for row in crops.sizes]
        return [round(crops.global_size * self.resolution)]

    def weight_at(self, step: int) -> float:
        """Weight of the term at a step."""
        if not self.weight or step < self.begin:
            return 0.0
        return cosine(step - self.begin, base=0.0, final=self.weight, num_steps=self.ramp)

    def is_refreshed_after(self, step: int) -> bool:
        """Whether the moving average becomes the teacher after a step; no state counts the refreshes."""
        passed = step + 1 - self.begin
        if not self.weight or passed < 0:
            return False
        if not passed:
            return self.teacher == EMA
        return bool(self.refresh) and not passed % self.refresh and passed // self.refresh <= self.max_refreshes


def gram_loss(student: Tensor, teacher: Tensor, *, settings: GramSettings) -> Tensor:
    """Mean squared difference of the similarities of patches, in float32.

    divide each token by its norm
    mean over images and pairs of patches i, j of  (x_i . x_j - g_i . g_j)^2

    With negative similarities kept there is a form without a matrix of P x P: for S S' - G G' = (A B' + B A') / 2 with
    A = S - G and B = S + G the sum of squares is  (sum (A'A * B'B) + sum (A'B * B'A)) / 2, from products of D x D. It
    is used where it is cheaper. Small differences stay exact in it, unlike in |S'S|^2 + |G'G|^2 - 2 |S'G|^2.

    Args:
        student: (B, P, D).
        teacher: (B, P, D'), another width is allowed.
        settings: of the term; `is_per_image` false takes all tokens as those of one image.
    """
    with torch.autocast(student.device.type, enabled=False):
        own, other = student.float(), teacher.float()
        if settings.is_normalized:
            own, other = F.normalize(own, dim=-1), F.normalize(other, dim=-1)
        if not settings.is_per_image:
            own, other = own.flatten(0, 1)[None], other.flatten(0, 1)[None]
        num_tokens, width = own.shape[1], max(own.shape[2], other.shape[2])
        if settings.negatives == "keep" and 3 * width < 2 * num_tokens:
            return _narrow_loss(own, other, width)
        similar, expected = own @ own.mT, other @ other.mT  # [B, P, D] -> [B, P, P]
        if settings.negatives != "keep":
            is_clipped = similar < 0
            if settings.negatives == "clip_with_teacher":
                is_clipped = is_clipped & (expected < 0)
            similar, expected = similar.masked_fill(is_clipped, 0.0), expected.clamp(min=0)
        return F.mse_loss(similar, expected)


def _narrow_loss(own: Tensor, other: Tensor, width: int) -> Tensor:
    own, other = (F.pad(tokens, (0, width - tokens.shape[2])) for tokens in (own, other))  # zeros change no product
    difference, total = own - other, own + other
    squares = (difference.mT @ difference) * (total.mT @ total)  # [B, D, D]
    mixed = difference.mT @ total
    return (squares.sum() + (mixed * mixed.mT).sum()) / (2 * len(own) * own.shape[1] ** 2)


@torch.no_grad()
def gram_targets(teacher: ViTWithRegistersModel, views: Tensor, grid: tuple[int, int]) -> Tensor:
    """Normed patches (B, P, D) of views (B, C, h, w), resized to a grid of (rows, columns)."""
    tokens = teacher(views).patch_grid.float()
    if tuple(tokens.shape[1:3]) != tuple(grid):
        resized = F.interpolate(tokens.permute(0, 3, 1, 2), size=grid, mode="bicubic", align_corners=False)
        tokens = resized.permute(0, 2, 3, 1)  # [B, D, rows, columns] -> [B, rows, columns, D]
    return tokens.flatten(1, 2)


def check_gram(settings: GramSettings, teacher: ViTWithRegistersModel, *, student, crops, num_steps: int) -> None:
    """Check that the term fits the run.

    Raises:
        ValueError: it does not; the message names both values and what to change.
    """
    has_other_shape = settings.refresh and {name: part.shape for name, part in teacher.state_dict().items()} != {
        name: part.shape for name, part in student.state_dict().items()
    }
    patch, sides = math.lcm(*teacher.config.patch_shape), settings.view_sizes(crops)
    size = next((side for side in sides if side % patch), sides[0])
    source = f"gram.resolution {settings.resolution:g} and crops.global_size {crops.global_size}"
    contradictions = {
        f"gram.begin {settings.begin} and num_steps {num_steps}": (
            settings.begin >= num_steps,
            "the term would never be used: lower gram.begin",
        ),
        f"gram.weight {settings.weight:g} and crops.cut {crops.cut!r}": (
            crops.cut != "resized",
            "set crops.cut=resized, whose views the teacher sees without changes of colour",
        ),
        f"gram.resolution {settings.resolution:g} and crops.sizes": (
            bool(crops.sizes) and settings.resolution != 1,
            "the third value of each row is the side of the teacher's views: leave out gram.resolution",
        ),
        f"crops.sizes {size} and the teacher's patch of {patch}" if crops.sizes else source: (
            size % patch > 0,
            f"views of {size} pixels are no multiple of the teacher's patch of {patch}: change one of them",
        ),
        f"gram.refresh {settings.refresh} and gram.teacher {settings.teacher!r}": (
            has_other_shape,
            "a teacher of another architecture cannot take over the moving average: set gram.refresh=0",
        ),
    }
    for what, (is_so, remedy) in contradictions.items():
        if is_so:
            raise ValueError(f"settings: {what} contradict each other: {remedy}")
