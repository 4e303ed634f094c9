"""Settings of object discovery: one method with published settings, and a sweep over the input of LOST."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from modeling_vitreg.encoding import PassSettings
from modeling_vitreg.features import FEATURES, layer_numbers
from modeling_vitreg.metrics import IOU_THRESHOLD
from modeling_vitreg.settings import expect

from .dino_seg import ATTENTION_SHARE
from .lost import NUM_CANDIDATES
from .tokencut import EPSILON, TAU


METHODS = ("lost", "tokencut", "dino_seg")


@dataclass(frozen=True)
class DiscoverySettings:
    """Method, its settings, and reading of images.

    Args:
        method: "lost", "tokencut" or "dino_seg".
        feature: "query", "key", "value", "token" or "mlp"; DINO-seg reads the attention instead.
        layer: 1 ... L, or -1 for the last.
        bias, num_candidates, is_centered, is_normalized: arguments of `lost`.
        tau, epsilon: arguments of `tokencut`.
        attention_share: argument of `dino_seg`.
        head: attention head of DINO-seg, from 0.
        longest_side: images are reduced to this longest side in pixels; None for full resolution.
        batch_size: images of equal size per forward pass.
        iou_threshold: IoU with a true box from which an object counts as found.
        has_progress_bar: show a progress bar.

    Raises:
        ValueError: a value out of its range.
    """

    RENAMED: ClassVar = {  # accepted for one release
        "hit": "iou_threshold",
        "mass": "attention_share",
        "is_centred": "is_centered",
        "is_normalised": "is_normalized",
    }

    method: str = "lost"
    feature: str = "key"
    layer: int = -1
    bias: float = 0.0
    num_candidates: int = NUM_CANDIDATES
    is_centered: bool = False
    is_normalized: bool = False
    tau: float = TAU
    epsilon: float = EPSILON
    attention_share: float = ATTENTION_SHARE
    head: int = 4
    longest_side: int | None = None
    batch_size: int = 8
    iou_threshold: float = IOU_THRESHOLD
    has_progress_bar: bool = True

    def __post_init__(self):
        expect(self, "", method=METHODS, feature=FEATURES, batch_size="[1, inf)", longest_side="[1, inf)")
        expect(self, "", iou_threshold="(0, 1]")

    def for_pass(self, **changes: object) -> PassSettings:
        """Settings of a pass with these batches."""
        return PassSettings(batch_size=self.batch_size, has_progress_bar=self.has_progress_bar, **changes)

    def asked_for(self) -> dict:
        """The settings that the boxes of this method depend on."""
        read = {
            "lost": ("feature", "layer", "bias", "num_candidates", "is_centered", "is_normalized"),
            "tokencut": ("feature", "layer", "tau", "epsilon"),
            "dino_seg": ("layer", "attention_share", "head"),
        }
        names = ("method", *read[self.method], "longest_side", "iou_threshold")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Sweep:
    """Settings of a sweep with LOST: each feature with each layer and each bias.

    Args:
        features, layers, biases: the axes of the sweep; layers as in `DiscoverySettings`.
        is_centered, is_normalized: arguments of `lost`; biases of normalised features are in units of the cosine.

    Raises:
        ValueError: an axis is empty, or a feature is unknown.
    """

    features: Sequence[str] = ("query", "key", "value", "token")
    layers: Sequence[int] = (-1,)
    biases: Sequence[float] = (0.0, -0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7, -0.8)
    is_centered: bool = False
    is_normalized: bool = True

    def settings(self, published: DiscoverySettings, *, num_layers: int) -> list[DiscoverySettings]:
        """The settings of the sweep for a model of `num_layers` layers; all others are as published."""
        options = {"method": "lost", "is_centered": self.is_centered, "is_normalized": self.is_normalized}
        axes = (layer_numbers(self.layers, num_layers, first=1), self.features, self.biases)
        return [
            dataclasses.replace(published, **options, layer=layer, feature=feature, bias=bias)
            for layer, feature, bias in itertools.product(*map(dict.fromkeys, axes))
        ]

    def __post_init__(self):
        for name, kind in (("features", str), ("layers", int), ("biases", float)):
            object.__setattr__(self, name, tuple(map(kind, getattr(self, name))))
        if not (self.features and self.layers and self.biases) or set(self.features) - set(FEATURES):
            raise ValueError(
                f"expected a sweep over at least one feature out of {', '.join(FEATURES)}, layer and bias, got "
                f"{self.features}, {self.layers} and {self.biases}"
            )
