"""Settings of an evaluation: encoding, tasks and seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from modeling_vitreg.discovery import DiscoverySettings
from modeling_vitreg.encoding import PassSettings
from modeling_vitreg.settings import expect

from .depth import DepthSettings
from .linear import LinearSettings
from .logistic import LogisticSettings
from .segmentation import SegmentationSettings
from .zero_shot import ZeroShotSettings


@dataclass(frozen=True)
class EncodingSettings:
    """How images are encoded.

    Args:
        image_size: side of the square crop in pixels; None: that of the encoder.
        batch_size, workers, precision, compile, has_progress_bar: see `PassSettings`.
        shard_size: images per file, the most that an interruption loses.
        patch_precision: precision of patches on disk, "float16" or "float32".

    Raises:
        ValueError: a value out of its range.
    """

    RENAMED: ClassVar = {"num_threads": "workers"}  # accepted for one release

    image_size: int | None = None
    batch_size: int = 64
    shard_size: int = 256
    patch_precision: str = "float16"
    workers: int | None = None
    precision: str | None = None
    compile: bool = False
    has_progress_bar: bool = True

    def __post_init__(self):
        expect(self, "", image_size="[1, inf)", patch_precision=("float16", "float32"))
        self.for_pass()

    def for_pass(self, **changes: object) -> PassSettings:
        """Settings of a pass that stores shards."""
        names = ("batch_size", "shard_size", "workers", "precision", "compile", "has_progress_bar")
        return PassSettings(**{name: getattr(self, name) for name in names} | changes)


@dataclass(frozen=True)
class KnnSettings:
    """Settings of `features.knn.knn_accuracy`.

    Args:
        num_neighbors: number of training images that vote.
        temperature: temperature of the softmax over their cosines.
    """

    RENAMED: ClassVar = {"num_neighbours": "num_neighbors"}  # accepted for one release

    num_neighbors: int = 20
    temperature: float = 0.07

    def __post_init__(self):
        expect(self, "", num_neighbors="[1, inf)", temperature="(0, inf)")


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
