"""MAE: an encoder gets a quarter of the patches, and a small decoder reconstructs the others.

Letters: B images, N tokens, n visible tokens, P patches, M masked patches of all images, D width of the encoder, W of
the decoder.
Class token and registers are never masked. The decoder gets no registers unless `sees_registers` is set; the paper has
no registers, so there is no reference for either.
Source: He et al. 2021, arXiv 2111.06377.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from modeling_vitreg.configuration_vitreg import ViTWithRegistersConfig
from modeling_vitreg.modeling_vitreg import ViTWithRegistersLayer, ViTWithRegistersModel
from modeling_vitreg.positions_vitreg import sincos_position_table
from modeling_vitreg.settings import expect

from ..views.masking import MaskSettings
from .objective import Objective


@dataclasses.dataclass(frozen=True)
class MAESettings:
    """Settings of MAE. Defaults are those of the paper.

    Args:
        decoder_width, decoder_layers, decoder_heads: sizes of the decoder, which is not saved.
        has_normed_pixels: the target is each patch with mean 0 and variance 1, not its pixels as they are.
        sees_registers: whether the decoder gets the registers beside class token and patches.
    """

    decoder_width: int = 512
    decoder_layers: int = 8
    decoder_heads: int = 16
    has_normed_pixels: bool = True
    sees_registers: bool = False

    def __post_init__(self):
        expect(self, "settings", **dict.fromkeys(("decoder_width", "decoder_layers", "decoder_heads"), "[1, inf)"))
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise ValueError(
                "settings: expected decoder_width to be a multiple of decoder_heads and, for the sine-cosine "
                f"positions, of 4, got {self.decoder_width} and {self.decoder_heads}"
            )


class MAE(Objective):
    """An encoder of visible patches, and a decoder that predicts the pixels of the others.

    Args:
        backbone: the encoder, without a mask token.
        crops: one global view.
        masks: "random", so that each image hides the same number of patches.

    Raises:
        ValueError: crops, masks or backbone do not fit the objective.
    """

    description = "reconstruction of the pixels of hidden patches from a quarter of the patches (MAE)"
    citation = "mae"
    settings_class = MAESettings
    needs_normed_tokens = has_masks = has_single_view = True

    def __init__(self, backbone: ViTWithRegistersModel, **options: Any):
        super().__init__(backbone, **options)
        _check_masks(self.masks)
        _check_config(backbone.config)
        self.backbone = backbone
        grid = tuple(self.crops.global_size // side for side in backbone.config.patch_shape)
        self.decoder = MAEDecoder(backbone.config, grid=grid, settings=self.settings)

    @property
    def encoder(self) -> ViTWithRegistersModel:
        return self.backbone

    @property
    def trained(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "decoder": self.decoder}

    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """Mean squared error of the pixels of masked patches, as `total`.

        for each masked patch i:  add  mean over pixels of (prediction[i] - target[i])^2
        divide by the number of masked patches

        Args:
            batch: `global_views` (1, B, 3, h, w), `masks` (B, P) with as many patches in every image, and
                `masked_patches` (M,), indices into (B P).
            step: number of the step.
        """
        images = batch["global_views"].flatten(0, 1)
        with torch.no_grad():
            targets = patchify(images, patch_shape=self.backbone.config.patch_shape)
            targets = targets.flatten(0, 1)[batch["masked_patches"]]  # [B, P, pixels] -> [M, pixels]
            if self.settings.has_normed_pixels:
                targets = standardise(targets)
        num_masked = len(batch["masked_patches"]) // len(images)
        predicted = self.reconstruct(images, batch["masks"], num_masked=num_masked)
        predicted = predicted.flatten(0, 1)[batch["masked_patches"]].float()
        return {"total": (predicted - targets).square().mean()}

    def to_device(self, batch: dict, *, device: torch.device, mean: list, std: list) -> dict[str, Tensor]:
        """As in `Objective`.

        Raises:
            ValueError: the number of masked patches differs between images.
        """
        # Here, because the masks are still on the CPU: on a GPU it would wait for the counts.
        low, high = batch["masks"].sum(dim=-1).aminmax()
        if low != high:
            raise ValueError(
                f"masks: expected as many hidden patches in every image for the MAE objective, got {low} to {high}: "
                "draw them with kind 'random'"
            )
        return super().to_device(batch, device=device, mean=mean, std=std)

    def reconstruct(self, images: Tensor, masks: Tensor, *, num_masked: int) -> Tensor:
        """Predict the pixels of all patches (B, P, pixels) from those that are not masked.

        With `has_normed_pixels` they are those of standardised patches. The order of the pixels is that of `patchify`.
        """
        tokens, visible = self.encode_visible(images, masks, num_masked=num_masked)
        if not self.settings.sees_registers:
            # Read here, because registers may be added to the backbone after the objective was made.
            registers = self.backbone.config.token_slices["registers"]
            tokens = torch.cat([tokens[:, : registers.start], tokens[:, registers.stop :]], dim=1)
        return self.decoder(tokens, visible, num_patches=masks.shape[1])

    def encode_visible(self, images: Tensor, masks: Tensor, *, num_masked: int) -> tuple[Tensor, Tensor]:
        """Encode prefix and visible patches alone.

        Args:
            images: (B, 3, h, w).
            masks: bool (B, P), true where a patch is hidden.
            num_masked: hidden patches of each image; an argument, so that nothing waits for the device.

        Returns:
            Normed tokens (B, n, D), and which patches they are, (B, n - prefix), in rising order.
        """
        backbone, num_prefix = self.backbone, self.backbone.config.num_prefix_tokens
        # Positions are what `embed` gives them in the whole image; embedding hidden patches too costs next to nothing.
        states, rotary, _ = backbone.embed(images)
        order = masks.byte().argsort(dim=1, stable=True)  # visible patches first
        visible = order[:, : masks.shape[1] - num_masked]
        prefix = torch.arange(num_prefix, device=masks.device).expand(len(masks), -1)
        kept = torch.cat([prefix, num_prefix + visible], dim=1)
        states = _gather(states, kept)  # [B, N, D] -> [B, n, D]
        if rotary is not None:
            rotary = tuple(table[kept].unsqueeze(1) for table in rotary)  # [N, d] -> [B, 1, n, d], for all heads
        for layer in backbone.layers:
            states = layer(states, rotary)
        return backbone.norm_tokens(states), visible


class MAEDecoder(nn.Module):
    """Tokens of visible patches to pixels of all patches, with mask tokens in the gaps and fixed positions.

    Args:
        config: configuration of the encoder.
        grid: rows and columns of the patches.
    """

    def __init__(self, config: ViTWithRegistersConfig, *, grid: tuple, settings: MAESettings):
        super().__init__()
        width = settings.decoder_width
        own = ViTWithRegistersConfig(
            hidden_size=width,
            num_hidden_layers=settings.decoder_layers,
            num_attention_heads=settings.decoder_heads,
            image_size=[side * patch for side, patch in zip(grid, config.patch_shape)],
            patch_size=list(config.patch_shape),
            num_register_tokens=0,
            position_embedding_type="sincos",
            layer_norm_eps=config.layer_norm_eps,
            initializer_range=config.initializer_range,
        )
        own._attn_implementation = config._attn_implementation
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        # Known from the grid, so it is in no checkpoint.
        positions = sincos_position_table(grid, width).flatten(0, 1)[None]
        self.register_buffer("positions", positions, persistent=False)
        self.layers = nn.ModuleList(ViTWithRegistersLayer(own, 0.0) for _ in range(settings.decoder_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.predict = nn.Linear(width, config.num_channels * config.patch_shape[0] * config.patch_shape[1])
        self._initialise(config.initializer_range)

    def forward(self, tokens: Tensor, visible: Tensor, *, num_patches: int) -> Tensor:
        """Reconstruct all patches.

        Args:
            tokens: tokens of the encoder, prefix and visible patches, (B, n, D).
            visible: which patches the last tokens are; what stands in front of them is prefix, (B, n - prefix).
            num_patches: P.

        Returns:
            (B, P, pixels of a patch).
        """
        # In the dtype of the mask token: autocast then keeps the residual stream in float32.
        tokens = self.embed(tokens).to(self.mask_token.dtype)  # [B, n, D] -> [B, n, W]
        num_prefix = tokens.shape[1] - visible.shape[1]
        prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
        places = visible.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        patches = self.mask_token.expand(len(tokens), num_patches, -1).scatter(1, places, patches)
        states = torch.cat([prefix, patches + self.positions.to(patches.dtype)], dim=1)
        for layer in self.layers:
            states = layer(states)
        return self.predict(self.norm(states[:, num_prefix:]))

    def _initialise(self, std: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)  # as the decoder of the paper starts
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=std)


def patchify(images: Tensor, *, patch_shape: tuple) -> Tensor:
    """Cut images (B, C, height, width) into patches (B, P, rows x columns x C of a patch), row by row."""
    height, width = patch_shape
    patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # [B, C, rows, height, columns, width]
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def standardise(patches: Tensor) -> Tensor:
    """Each patch (..., pixels) minus its mean, over the root of its unbiased variance + 1e-6."""
    variance, mean = torch.var_mean(patches.float(), dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def _gather(tokens: Tensor, places: Tensor) -> Tensor:
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _check_masks(masks: MaskSettings) -> None:
    if masks.kind != "random" or masks.share != 1 or not masks.ratio[0] > 0:
        raise ValueError(
            "the MAE objective hides the same number of patches of every image: expected masks such as kind='random', "
            f"ratio=(0.75, 0.75), share=1, got kind={masks.kind!r}, ratio={masks.ratio}, share={masks.share}"
        )


def _check_config(config: ViTWithRegistersConfig) -> None:
    if config.position_embedding_type == "none":
        raise ValueError(
            "the MAE objective needs positions: position_embedding_type is 'learned', 'sincos' or 'rope', got 'none'"
        )
    if config.relative_position_bias is not None or config.rope_style == "mixed":
        raise ValueError(
            "the MAE objective leaves patches out, and neither relative_position_bias nor rope_style='mixed' supports "
            f"that: got {config.relative_position_bias!r} and {config.rope_style!r}"
        )
    is_subset = config.drop_path_mode == "batch_subset" and config.drop_path_rate > 0
    if is_subset and config.has_rope:
        raise ValueError(
            "in MAE every image has its own rotary table, which drop_path_mode='batch_subset' does not support: set "
            "drop_path_mode='sample' in the model"
        )
