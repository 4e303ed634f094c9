"""Settings of an evaluation: encoding, tasks and seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from modeling_vitreg.discovery import DiscoverySettings

from .depth import DepthSettings
from .encoding import EncodingSettings
from .linear import LinearSettings
from .logistic import LogisticSettings
from .segmentation import SegmentationSettings
from .zero_shot import ZeroShotSettings


@dataclass(frozen=True)
class KnnSettings:
    """Settings of `knn.knn_accuracy`.

    Args:
        num_neighbors: number of training images that vote.
        temperature: temperature of the softmax over their cosines.
    """

    RENAMED: ClassVar = {"num_neighbours": "num_neighbors"}  # accepted for one release

    num_neighbors: int = 20
    temperature: float = 0.07

    def __post_init__(self):
        if self.num_neighbors < 1 or not self.temperature > 0:
            raise ValueError(
                f"expected num_neighbors of 1 or more and a temperature above 0, got {self.num_neighbors} and "
                f"{self.temperature}"
            )


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of the encoding and of each task by its name, and the random seed."""

    encoding: EncodingSettings = field(default_factory=EncodingSettings)
    knn: KnnSettings = field(default_factory=KnnSettings)
    linear: LinearSettings = field(default_factory=LinearSettings)
    logistic: LogisticSettings = field(default_factory=LogisticSettings)
    segmentation: SegmentationSettings = field(default_factory=SegmentationSettings)
    depth: DepthSettings = field(default_factory=DepthSettings)
    zero_shot: ZeroShotSettings = field(default_factory=ZeroShotSettings)
    discovery: DiscoverySettings = field(default_factory=DiscoverySettings)
    seed: int = 0


__all__ = ["EvaluationSettings", "KnnSettings"]
