"""Tokens of any supported encoder by name: class token, registers, patches; of any layer, and inside it.

| family | models |
| --- | --- |
| this package | all, with or without a head |
| transformers | ViT, DeiT, Dinov2, Dinov2WithRegisters, DINOv3ViT, CLIP, SigLIP, ViTMAE, I-JEPA; with heads too |
| timm | `VisionTransformer` and `Eva`: ViT, DeiT, DINOv2, CLIP, SigLIP, DINOv3, with and without registers |
| torch.hub | DINO and DINOv2 |

A model is recognised by the name and the attributes of its classes, so that nothing else has to be installed. Images
of any size that fits the patches are accepted, with positions interpolated as the model itself does it.

Letters for shapes: B images, N tokens, P patches, R registers, Q prefix tokens (class token, distillation token and
registers, in this order in all families), D width, H heads, L layers.
"""

from .components import principal_colours
from .encoder import Encoder, layer_numbers
from .loading import load_encoder
from .tokens import FEATURES, TokenFeatures, extract_features, extract_many, find_reduction
from .updates import class_token_updates, register_share


__all__ = [
    "FEATURES",
    "Encoder",
    "TokenFeatures",
    "class_token_updates",
    "extract_features",
    "extract_many",
    "find_reduction",
    "layer_numbers",
    "load_encoder",
    "principal_colours",
    "register_share",
]
