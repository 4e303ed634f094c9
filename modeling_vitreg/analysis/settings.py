"""Settings of a survey, and the images that its figures show."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from modeling_vitreg.encoding import PassSettings
from modeling_vitreg.omissions import Failures
from modeling_vitreg.settings import expect


@dataclass(frozen=True)
class SurveySettings:
    """How much is measured.

    Args:
        num_images: maximum number of images to read; None for all.
        batch_size: images per forward pass.
        image_size: side of the square crop in pixels; None for that of the encoder.
        num_attention_images: number of first images of the source whose attention is measured, 0 to skip.
        num_ablation_images: number of first images on which registers are ablated, 0 to skip.
        num_edit_images: number of first images on which heads with sinks are edited, 0 to skip; see `edits`. Each head
            costs six passes over half of them.
        num_probe_images: number of first images whose tokens are probed, 0 to skip; probes take minutes.
        num_shown: number of first images to draw, at most one batch.
        seed: random seed.
        precision, workers, compile: see `modeling_vitreg.encoding.PassSettings`.
        has_progress_bar: show a progress bar.
        is_strict: raise the error of a section that fails instead of leaving the section out.

    Raises:
        ValueError: a value out of its range.
    """

    num_images: int | None = 1000
    batch_size: int = 32
    image_size: int | None = None
    num_attention_images: int = 32
    num_ablation_images: int = 8
    num_edit_images: int = 0
    num_probe_images: int = 0
    num_shown: int = 4
    seed: int = 0
    precision: str | None = None
    workers: int | None = None
    compile: bool = False
    has_progress_bar: bool = True
    is_strict: bool = False

    def __post_init__(self):
        counts = ("num_attention_images", "num_ablation_images", "num_edit_images", "num_probe_images", "num_shown")
        expect(self, "", **dict.fromkeys(("num_images", "batch_size", "image_size"), "[1, inf)"))
        expect(self, "", **dict.fromkeys(counts, "[0, inf)"))
        self.reading()  # which checks the others

    def reading(self) -> PassSettings:
        """Settings of the pass over the images."""
        names = ("batch_size", "precision", "workers", "compile", "has_progress_bar")
        return PassSettings(limit=self.num_images, **{name: getattr(self, name) for name in names})


@dataclass
class Examples:
    """The first images, as arrays to draw.

    Args:
        images: (images, height, width, 3), from 0 to 1.
        norms: (layers, images, rows, columns) of patches before the final norm.
        attention: name of a query to maps (images, heads, rows, columns) of the last layer.
        colours: (images, rows, columns, 3), principal components of the normed patches of the last layer.
        mean_maps: name of a query to its map (rows, columns) of the last layer, mean over images and heads.
        failures: tracebacks of the sections that failed.
    """

    images: np.ndarray | None = None
    norms: np.ndarray | None = None
    attention: dict = field(default_factory=dict)
    colours: np.ndarray | None = None
    mean_maps: dict = field(default_factory=dict)
    failures: Failures = field(default_factory=Failures)
