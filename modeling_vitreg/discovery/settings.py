"""What a discovery measures: one method as published, and a sweep over what LOST reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modeling_vitreg.features import FEATURES

from .boxes import HIT
from .dino_seg import MASS
from .lost import NUM_CANDIDATES
from .tokencut import EPSILON, TAU


METHODS = ("lost", "tokencut", "dino_seg")


@dataclass(frozen=True)
class DiscoverySettings:
    """What is measured as published, and how images are read.

    Args:
        method: "lost", "tokencut" or "dino_seg".
        feature: "query", "key", "value", "token" or "mlp"; DINO-seg reads attention instead.
        layer: from 1, or from -1 backwards.
        bias, num_candidates, is_centred, is_normalised: of `lost`.
        tau, epsilon: of `tokencut`.
        mass, head: of `dino_seg`; the head of the class token, from 0.
        longest_side: pixels to which larger images are shrunk; None: full resolution.
        batch_size: images of equal size at a time.
        hit: overlap from which an object counts as found.
        has_progress_bar: show one.

    Raises:
        ValueError: a value out of its range.
    """

    method: str = "lost"
    feature: str = "key"
    layer: int = -1
    bias: float = 0.0
    num_candidates: int = NUM_CANDIDATES
    is_centred: bool = False
    is_normalised: bool = False
    tau: float = TAU
    epsilon: float = EPSILON
    mass: float = MASS
    head: int = 4
    longest_side: int | None = None
    batch_size: int = 8
    hit: float = HIT
    has_progress_bar: bool = True

    def __post_init__(self):
        if self.method not in METHODS or self.feature not in FEATURES:
            raise ValueError(
                f"expected a method out of {', '.join(METHODS)} and a feature out of {', '.join(FEATURES)}, got "
                f"{self.method!r} and {self.feature!r}"
            )
        if self.batch_size < 1 or (self.longest_side is not None and self.longest_side < 1) or not 0 < self.hit <= 1:
            raise ValueError(
                f"expected batch_size and longest_side of 1 or more and hit in (0, 1], got {self.batch_size}, "
                f"{self.longest_side} and {self.hit}"
            )

    def asked_for(self) -> dict:
        """What the boxes depend on: the settings that this method reads, by their names."""
        read = {
            "lost": ("feature", "layer", "bias", "num_candidates", "is_centred", "is_normalised"),
            "tokencut": ("feature", "layer", "tau", "epsilon"),
            "dino_seg": ("layer", "mass", "head"),
        }
        names = ("method", *read[self.method], "longest_side", "hit")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Sweep:
    """What LOST is tried with: every feature with every layer and every bias.

    Args:
        features, layers, biases: the axes; layers from 1, or from -1 backwards.
        is_centred, is_normalised: the same for all; biases of normalised features are in units of the cosine.

    Raises:
        ValueError: an axis is empty, or there is no such feature.
    """

    features: Sequence[str] = ("query", "key", "value", "token")
    layers: Sequence[int] = (-1,)
    biases: Sequence[float] = (0.0, -0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7, -0.8)
    is_centred: bool = False
    is_normalised: bool = True

    def __post_init__(self):
        for name, kind in (("features", str), ("layers", int), ("biases", float)):
            object.__setattr__(self, name, tuple(map(kind, getattr(self, name))))
        if not (self.features and self.layers and self.biases) or set(self.features) - set(FEATURES):
            raise ValueError(
                f"expected a sweep over at least one feature out of {', '.join(FEATURES)}, layer and bias, got "
                f"{self.features}, {self.layers} and {self.biases}"
            )


__all__ = ["METHODS", "DiscoverySettings", "Sweep"]
