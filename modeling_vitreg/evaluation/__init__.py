"""Evaluation of frozen features on seven tasks.

| task | what is measured | annotations |
| --- | --- | --- |
| knn | accuracy of the nearest training images | labels |
| linear | linear probe with the sweep of DINOv2 | labels |
| logistic | logistic regression with a sweep over its regularisation | labels |
| segmentation | mean intersection over union of a linear head on patches | masks |
| depth | errors of a linear head on patches and class token | depth |
| zero_shot | accuracy of prompts of a text tower | labels with names |
| discovery | CorLoc of objects found without labels, see `modeling_vitreg.discovery` | boxes |
"""

from modeling_vitreg.discovery import DiscoverySettings
from modeling_vitreg.features.knn import knn_accuracy
from modeling_vitreg.images import LabelledData, open_data
from modeling_vitreg.reports import EvaluationReport

from .depth import DepthSettings
from .linear import LinearSettings
from .logistic import LogisticSettings
from .run import evaluate, notes_of
from .segmentation import SegmentationSettings
from .settings import EncodingSettings, EvaluationSettings, KnnSettings
from .table import compare
from .tasks import TASKS
from .zero_shot import ZeroShotSettings, load_tokenizer


__all__ = [
    "TASKS",
    "DepthSettings",
    "DiscoverySettings",
    "EncodingSettings",
    "EvaluationReport",
    "EvaluationSettings",
    "KnnSettings",
    "LabelledData",
    "LinearSettings",
    "LogisticSettings",
    "SegmentationSettings",
    "ZeroShotSettings",
    "compare",
    "evaluate",
    "knn_accuracy",
    "load_tokenizer",
    "notes_of",
    "open_data",
]
