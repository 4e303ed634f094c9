"""SimMIM: mask tokens replace patches, and a linear layer predicts their pixels.

Letters: B images, P patches, M masked patches of all images, D width. Registers take part in the forward pass and in
no loss.
Source: Xie et al. 2021, arXiv 2111.09886.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel

from ..views.masking import MaskSettings
from .objective import Objective


class SimMIM(Objective):
    """An encoder with a mask token, and a linear layer from its patches to pixels.

    The layer has the shape and the order of pixels of the one in `ViTWithRegistersForMaskedImageModeling`, which
    predicts every patch; here only masked patches are, and a batch may mask any number in each image.

    Args:
        backbone: the encoder, with a mask token.
        crops: one global view.
        masks: masks of that view; SimMIM hides squares of 32 pixels at random, 60 % of all.

    Raises:
        ValueError: crops, masks or backbone do not fit the objective.
    """

    description = "prediction of the pixels of masked patches (SimMIM)"
    citation = "simmim"
    needs_mask_token = needs_normed_tokens = has_masks = has_single_view = True

    def __init__(self, backbone: ViTWithRegistersModel, **options: Any):
        super().__init__(backbone, **options)
        _check_masks(self.masks)
        self.backbone = backbone
        config = backbone.config
        self.decoder = nn.Linear(config.hidden_size, config.num_channels * math.prod(config.patch_shape))
        nn.init.trunc_normal_(self.decoder.weight, std=config.initializer_range)
        nn.init.zeros_(self.decoder.bias)

    @property
    def encoder(self) -> ViTWithRegistersModel:
        return self.backbone

    @property
    def trained(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "decoder": self.decoder}

    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """Mean absolute error of the normalised pixels of masked patches, as `total`.

        for each masked pixel i, channel c:  add  |prediction[i, c] - target[i, c]|
        divide by the number of masked pixels + 1e-5, and by the number of channels

        Args:
            batch: `global_views` (1, B, 3, h, w), `masks` (B, P) and `masked_patches` (M,), indices into (B P).
            step: number of the step.
        """
        images, masked, config = batch["global_views"].flatten(0, 1), batch["masked_patches"], self.backbone.config
        tokens = self.backbone(images, bool_masked_pos=batch["masks"]).patch_tokens
        predicted = self.decoder(tokens.flatten(0, 1)[masked])  # [B, P, D] -> [M, D] -> [M, pixels x channels]
        with torch.no_grad():
            targets = F.unfold(images, config.patch_shape, stride=config.patch_shape)
            targets = targets.transpose(1, 2).flatten(0, 1)[masked]
        num_pixels = len(masked) * math.prod(config.patch_shape)
        return {"total": (predicted.float() - targets).abs().sum() / (num_pixels + 1e-5) / config.num_channels}


def _check_masks(masks: MaskSettings) -> None:
    if not (masks.share > 0 and masks.ratio[1] > 0):
        raise ValueError(
            f"the SimMIM objective is trained on masked patches only: expected masks such as kind='random', "
            f"ratio=(0.6, 0.6), share=1, got ratio={masks.ratio}, share={masks.share}"
        )
