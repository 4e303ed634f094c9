"""Features of a frozen encoder in, numbers out: how good they are without training the encoder any further.

| task | what is measured | truth |
| --- | --- | --- |
| knn | vote of the nearest training images | labels |
| linear | linear probe with DINOv2's sweep | labels |
| logistic | logistic regression, its regularisation chosen | labels |
| segmentation | linear head on patches, mean intersection over union | masks |
| depth | linear head of bins on patches and class token | depth |
| zero_shot | prompts of a text tower | labels with names |
| discovery | objects found without labels, CorLoc; see `modeling_vitreg.discovery` | boxes |
"""

from modeling_vitreg.discovery import DiscoverySettings
from modeling_vitreg.reports import EvaluationReport

from .data import EvaluationData, LabelledImages
from .depth import DepthSettings
from .encoding import EncodingSettings
from .knn import knn_accuracy
from .linear import LinearSettings
from .logistic import LogisticSettings
from .run import evaluate
from .segmentation import SegmentationSettings
from .settings import EvaluationSettings, KnnSettings
from .sources import open_data
from .table import compare
from .tasks import TASKS
from .zero_shot import ZeroShotSettings, load_tokenizer


__all__ = [
    "TASKS",
    "DepthSettings",
    "DiscoverySettings",
    "EncodingSettings",
    "EvaluationData",
    "EvaluationReport",
    "EvaluationSettings",
    "KnnSettings",
    "LabelledImages",
    "LinearSettings",
    "LogisticSettings",
    "SegmentationSettings",
    "ZeroShotSettings",
    "compare",
    "evaluate",
    "knn_accuracy",
    "load_tokenizer",
    "open_data",
]
