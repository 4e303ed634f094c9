"""Object discovery without labels: LOST, TokenCut and DINO-seg on the features of any encoder, and CorLoc."""

from modeling_vitreg.metrics import box_iou
from modeling_vitreg.reports import DiscoveryReport

from .dino_seg import dino_seg
from .lost import LostResult, lost, lost_with_biases
from .run import discover, write_folder
from .settings import DiscoverySettings, Sweep
from .tokencut import TokenCutResult, tokencut


__all__ = [
    "DiscoveryReport",
    "DiscoverySettings",
    "LostResult",
    "Sweep",
    "TokenCutResult",
    "box_iou",
    "dino_seg",
    "discover",
    "lost",
    "lost_with_biases",
    "tokencut",
    "write_folder",
]
