"""HAT-Net: a hierarchical network of images whose attention is local first and global second (Liu et al. 2024,
arXiv 2106.03180).

Four stages work on grids of 4, 8, 16 and 32 pixels. A block attends inside windows, adds its input, and attends from
all positions to the means of small squares; in the last stage all positions attend to all. There is no class token and
no register: the representation of an image is the mean over the last grid.

Letters for shapes: B images, C channels of a stage, H heads, d = C / H, W windows, G side of a window, N positions of
a grid, M squares of a grid, P positions of the last grid, D width of the last stage.

This file travels next to the weights, with the files of the Vision Transformer, and runs without the package.
"""

import itertools
import os

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vitreg import OtherBackboneConfig, is_positive
from .modeling_vitreg import (
    AttentionBackend,
    ViTWithRegistersDropPath,
    ViTWithRegistersForImageClassification,
    ViTWithRegistersModel,
    ViTWithRegistersModelOutput,
    ViTWithRegistersPreTrainedModel,
    check_images,
    eager_attention_forward,
    set_initial,
)


# Table 1 of the paper; Medium as released, with larger kernels in two stages.
_SMALL = {"hidden_sizes": [64, 128, 320, 512], "head_size": 64}
HATNET_SIZES = {
    "tiny": {},
    "small": {**_SMALL, "depths": [2, 3, 8, 3]},
    "medium": {**_SMALL, "depths": [3, 6, 18, 3], "kernel_sizes": [5, 3, 5, 3]},
    "large": {**_SMALL, "depths": [3, 8, 27, 3], "hidden_sizes": [64, 128, 320, 640]},
}
_FOR_EACH_STAGE = ("hidden_sizes", "depths", "kernel_sizes", "expansions", "window_sizes", "pool_sizes")


class HATNetConfig(OtherBackboneConfig):
    """Architecture of HAT-Net. The defaults are those of HAT-Net-Tiny. Lists have a value for each of the four stages.

    Args:
        hidden_sizes: channels.
        depths: blocks.
        head_size: channels d of a head; divides all `hidden_sizes`.
        kernel_sizes: side of the depthwise convolutions, odd.
        expansions: hidden channels of the convolutional part of a block, in units of its channels.
        window_sizes: side G of the windows of local attention; 1 for a stage that has global attention only.
        pool_sizes: side of the squares whose means are keys and values of global attention, in stages with windows.
        stem_size: channels between the two convolutions in front of the first stage.
        classifier_dropout: dropout in front of the classifier.
        num_register_tokens: 0; there are no registers.
        layer_norm_eps: of all norms.
        image_size, num_channels, drop_path_rate, drop_path_schedule, drop_path_mode, has_zero_init_classifier,
            initializer_range: as in `ViTWithRegistersConfig`.

    `num_hidden_layers` is the number of all blocks; `hidden_size` and `num_attention_heads` are those of the last
    stage, and `patch_size` is 32, the pixels of one of its positions.

    Raises:
        ValueError: a value outside its range, or a field of the Vision Transformer that this model lacks.

    Example:
        >>> from modeling_vitreg import HATNetConfig
        >>> HATNetConfig.from_preset("large").hidden_size
        640
    """

    model_type = "vitreg_hat"
    _title = "HAT-Net"
    _presets = HATNET_SIZES

    def __init__(
        self,
        hidden_sizes=(48, 96, 240, 384),
        depths=(2, 2, 6, 3),
        head_size=48,
        kernel_sizes=(3, 3, 3, 3),
        expansions=(8, 8, 4, 4),
        window_sizes=(8, 7, 7, 1),
        pool_sizes=(8, 4, 2, 1),
        stem_size=16,
        classifier_dropout=0.2,
        num_register_tokens=0,
        layer_norm_eps=1e-6,
        image_size=224,
        num_channels=3,
        drop_path_rate=0.0,
        drop_path_schedule="linear",
        drop_path_mode="sample",
        has_zero_init_classifier=False,
        initializer_range=0.02,
        **kwargs,
    ):
        self._check_names(kwargs)
        lists = (hidden_sizes, depths, kernel_sizes, expansions, window_sizes, pool_sizes)
        for name, values in zip(_FOR_EACH_STAGE, lists):
            setattr(self, name, list(values) if isinstance(values, tuple) else values)
        self.head_size, self.stem_size, self.classifier_dropout = head_size, stem_size, classifier_dropout
        self._check_stages()
        self._require(
            num_register_tokens == 0, f"there are no registers, got num_register_tokens={num_register_tokens!r}"
        )
        super().__init__(
            num_register_tokens=0,
            layer_norm_eps=layer_norm_eps,
            image_size=image_size,
            num_channels=num_channels,
            drop_path_rate=drop_path_rate,
            drop_path_schedule=drop_path_schedule,
            drop_path_mode=drop_path_mode,
            has_zero_init_classifier=has_zero_init_classifier,
            initializer_range=initializer_range,
            hidden_size=hidden_sizes[-1],
            num_hidden_layers=sum(depths),
            num_attention_heads=hidden_sizes[-1] // head_size,
            patch_size=32,
            has_cls_token=False,
            position_embedding_type="none",
            has_final_norm=False,
            pooling="mean",
            **kwargs,
        )

    def _check_stages(self):
        for name in _FOR_EACH_STAGE:
            values = getattr(self, name)
            is_list = isinstance(values, list) and len(values) == 4 and all(map(is_positive, values))
            self._require(is_list, f"{name} are four positive integers, one for each stage, got {values!r}")
        for name in ("head_size", "stem_size"):
            self._require(
                is_positive(getattr(self, name)), f"{name} is a positive integer, got {getattr(self, name)!r}"
            )
        fits = all(size % self.head_size == 0 for size in self.hidden_sizes)
        self._require(fits, f"head_size divides all hidden_sizes {self.hidden_sizes}, got {self.head_size}")
        self._require(all(size % 2 for size in self.kernel_sizes), f"kernel_sizes are odd, got {self.kernel_sizes}")
        share = self.classifier_dropout
        is_share = isinstance(share, (int, float)) and 0 <= share < 1
        self._require(is_share, f"classifier_dropout lies in [0, 1), got {share!r}")


# ------------------------------------------------------------------------------------------------------------------
# Layers, of maps (B, C, rows, columns)
# ------------------------------------------------------------------------------------------------------------------


def make_group_norm(config: HATNetConfig, size: int) -> nn.GroupNorm:
    """Norm of each image over channels and positions."""
    return nn.GroupNorm(1, size, eps=config.layer_norm_eps)


class HATNetEmbeddings(nn.Module):
    """Images to the first grid, by two convolutions that halve the sides, rounded up."""

    register_tokens = mask_token = None

    def __init__(self, config: HATNetConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = nn.Conv2d(config.num_channels, config.stem_size, 3, stride=2, padding=1)
        self.norm = make_group_norm(config, config.stem_size)
        self.projection = nn.Conv2d(config.stem_size, config.hidden_sizes[0], 3, stride=2, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed images (B, channels, height, width)."""
        check_images(pixel_values, num_channels=self.config.num_channels)
        maps = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype))
        return self.projection(F.silu(self.norm(maps)))

    def grid_of(self, pixel_values: Tensor) -> tuple:
        """Rows and columns of the last grid of these images."""
        return tuple(-(-side // patch) for side, patch in zip(pixel_values.shape[2:], self.config.patch_shape))


class HATNetDownsampling(nn.Module):
    """From the grid of a stage to that of the next, which has half as many rows and columns, rounded up."""

    def __init__(self, config: HATNetConfig, sizes: tuple):
        super().__init__()
        self.projection = nn.Conv2d(*sizes, 3, stride=2, padding=1)
        self.norm = make_group_norm(config, sizes[1])

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm(self.projection(maps))


class HATNetAttention(AttentionBackend):
    """Hierarchical attention, with the attention implementation of the configuration.

        local = norm(maps + attention inside windows)
        output = proj(local + attention of all positions to the means of squares)

    Where a grid is no multiple of a window or a square, the last ones are cut: what lies beyond the grid is no key,
    and no part of a mean or a norm.

    Args:
        config: the architecture.
        stage: number, from 0 on.
    """

    def __init__(self, config: HATNetConfig, stage: int):
        super().__init__()
        self.config = config
        width = config.hidden_sizes[stage]
        self.num_heads, self.scaling, self.is_causal = width // config.head_size, config.head_size**-0.5, False
        self.window_size, self.pool_size = config.window_sizes[stage], config.pool_sizes[stage]
        self.norm = make_group_norm(config, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)
        if self.window_size > 1:
            self.local_norm, self.pool_norm = make_group_norm(config, width), make_group_norm(config, width)
            self.query, self.key_value = nn.Conv2d(width, width, 1), nn.Conv2d(width, 2 * width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """The update of the maps."""
        return self.attend(maps)[0]

    def attend(self, maps: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """The update of the maps; if requested, with the probabilities of global attention, (B, H, N, M)."""
        packed, local = self.qkv(self.norm(maps)), 0.0
        parts = packed.chunk(3, dim=1)
        if self.window_size > 1:
            local = self.local_norm(maps + self.attend_in_windows(packed))
            # The mean over the positions that a square has, also at the border.
            pooled = F.avg_pool2d(local, self.pool_size, ceil_mode=True)
            parts = (self.query(local), *self.key_value(self.pool_norm(pooled)).chunk(2, dim=1))
        parts = (part.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3) for part in parts)  # [B, H, N, d]
        attended, probabilities = self._attend(*parts, output_attentions=output_attentions)
        attended = attended.flatten(2).transpose(1, 2).unflatten(2, maps.shape[2:])  # [B, N, H, d] -> [B, C, ...]
        return self.proj(attended + local), probabilities if output_attentions else None

    def attend_in_windows(self, packed: Tensor) -> Tensor:
        """(B, C, rows, columns) from queries, keys and values (B, 3 C, rows, columns)."""
        (rows, columns), side = packed.shape[2:], self.window_size
        margins = (0, -columns % side, 0, -rows % side)
        packed = F.pad(packed, margins)
        height, width = packed.shape[2] // side, packed.shape[3] // side
        parts = packed.view(-1, 3, self.num_heads, self.config.head_size, height, side, width, side)
        parts = parts.permute(1, 0, 4, 6, 2, 5, 7, 3).flatten(5, 6).flatten(1, 3)  # [3, B W, H, G G, d]
        mask = None
        if any(margins):
            is_beyond = F.pad(packed.new_zeros(rows, columns), margins, value=float("-inf"))
            mask = is_beyond.view(height, side, width, side).transpose(1, 2).reshape(-1, 1, 1, side * side)
            mask = mask.repeat(packed.shape[0], 1, 1, 1)  # [W, 1, 1, G G] -> [B W, 1, 1, G G]
        attended, _ = self._attend(*parts, mask=mask)  # [B W, G G, H, d]
        attended = attended.reshape(-1, height, width, side, side, self.num_heads, self.config.head_size)
        attended = attended.permute(0, 5, 6, 1, 3, 2, 4).flatten(1, 2).flatten(2, 3).flatten(3, 4)
        return attended[..., :rows, :columns]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, output_attentions=False):
        attend = eager_attention_forward if output_attentions else self.get_attention_function()
        return attend(self, query, key, value, mask, scaling=self.scaling, dropout=0.0, is_causal=False)


class HATNetConvolutions(nn.Module):
    """An inverted residual block: more channels, a depthwise convolution, and back."""

    def __init__(self, config: HATNetConfig, stage: int):
        super().__init__()
        width, kernel = config.hidden_sizes[stage], config.kernel_sizes[stage]
        hidden = config.expansions[stage] * width
        self.norm1 = make_group_norm(config, width)
        self.expand = nn.Conv2d(width, hidden, 1, bias=False)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.reduce = nn.Conv2d(hidden, width, 1, bias=False)
        self.norm2 = make_group_norm(config, width)

    def forward(self, maps: Tensor) -> Tensor:
        """The update of the maps."""
        hidden = F.silu(self.expand(self.norm1(maps)))
        return self.norm2(self.reduce(F.silu(self.depthwise(hidden))))


class HATNetLayer(GradientCheckpointingLayer):
    """A block: attention and convolutions, each with stochastic depth."""

    def __init__(self, config: HATNetConfig, stage: int, drop_path_rate: float):
        super().__init__()
        self.attention = HATNetAttention(config, stage)
        self.convolutions = HATNetConvolutions(config, stage)
        self.drop_path = ViTWithRegistersDropPath(config, drop_path_rate)

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.drop_path.add(maps, self.attention, self.drop_path.choose(maps))
        return self.drop_path.add(maps, self.convolutions, self.drop_path.choose(maps))

    def forward_with_attentions(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The maps, and the probabilities of global attention (B, H, N, M), computed eagerly."""
        branch, probabilities = self.attention.attend(maps, output_attentions=True)
        maps = self.drop_path.add(maps, lambda _: branch, self.drop_path.choose(maps, needs_all=True))
        return self.drop_path.add(maps, self.convolutions, self.drop_path.choose(maps)), probabilities


# ------------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------------


class HATNetMixin:
    """What differs from the Vision Transformer in models with and without a head."""

    config_class = HATNetConfig
    _no_split_modules = ["HATNetEmbeddings", "HATNetLayer"]
    _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = (
        False  # windows at the border need masks
    )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.GroupNorm):
            set_initial(module.weight, nn.init.ones_)
            set_initial(module.bias, nn.init.zeros_)

    def resize_register_tokens(self, num_register_tokens: int) -> None:
        """Refuse registers.

        Raises:
            ValueError: the number is not 0.
        """
        self._change_config(num_register_tokens=num_register_tokens)

    def _auto_map(self) -> dict:
        models = {model._auto_class: f"hat_vitreg.{model.__name__}" for model in HATNET_AUTO_MODELS}
        return {"AutoConfig": "hat_vitreg.HATNetConfig", **models}

    def _save_image_processor(self, folder: str | os.PathLike) -> None:
        # Up to 4.57 a loader of remote code copies only the files that this one names itself.
        from .image_processing_vitreg import PROCESSORS  # noqa: F401
        from .positions_vitreg import is_traced  # noqa: F401
        from .token_reduction_vitreg import make_tracker  # noqa: F401

        super()._save_image_processor(folder)


class HATNetModel(HATNetMixin, ViTWithRegistersModel):
    """Images to the positions of the last grid.

    Args:
        config: the architecture.
        use_mask_token, use_projection: for callers of `ViTWithRegistersModel`; there is neither.

    Example:
        >>> output = HATNetModel(HATNetConfig())(torch.rand(1, 3, 224, 224), output_hidden_states=True)
        >>> output.patch_grid.shape, [tuple(maps.shape[1:]) for maps in output.hidden_states]
        (torch.Size([1, 7, 7, 384]), [(48, 56, 56), (48, 56, 56), (96, 28, 28), (240, 14, 14), (384, 7, 7)])
    """

    def __init__(self, config: HATNetConfig, use_mask_token: bool = False, use_projection: bool = False):
        ViTWithRegistersPreTrainedModel.__init__(self, config)
        self.embeddings = HATNetEmbeddings(config)
        stages = (stage for stage, depth in enumerate(config.depths) for _ in range(depth))
        self.layers = nn.ModuleList(map(HATNetLayer, itertools.repeat(config), stages, config.drop_path_rates))
        pairs = itertools.pairwise(config.hidden_sizes)
        self.downsamplings = nn.ModuleList(HATNetDownsampling(config, sizes) for sizes in pairs)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: None = None,
        output_hidden_states: bool | int | list | None = None,
        output_attentions: bool | None = None,
        output_pre_norm: bool = False,
        num_layers: int | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> ViTWithRegistersModelOutput | tuple:
        """Encode images.

        Args:
            pixel_values: (B, C, height, width) of any size, normalised by the image processor.
            bool_masked_pos: None; there is no mask token.
            output_hidden_states: True for all, or numbers of stages: 0 is the input of the first, i the output of
                stage i, and negative numbers count from the end. Other entries of the output are None.
            output_attentions: return probabilities, computed eagerly with any attention implementation.
            output_pre_norm: return the positions before the final norm too, which are the same: there is none.
            num_layers: None; all blocks run.
            return_dict: False for a tuple.
            interpolate_pos_encoding: False refuses images of other sizes than `config.image_size`.

        Returns:
            Outputs as of `ViTWithRegistersModel`; the positions of the last grid are the patches. `hidden_states` are
            five maps (B, C, rows, columns), the input of the first stage first. `attentions` are one tensor
            (B, H, N, M) for each block: from all positions of its grid to all of its squares.

        Raises:
            ValueError: images of the wrong shape or type, a mask, or no such stage.
        """
        if pixel_values is None:
            raise ValueError("expected `pixel_values`, images of shape (batch, channels, height, width), got None")
        if bool_masked_pos is not None or num_layers is not None:
            raise ValueError("HAT-Net has no mask token and runs all blocks: leave bool_masked_pos and num_layers out")
        if interpolate_pos_encoding is False:
            self._check_native_size(pixel_values)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        wanted = self._wanted_states(output_hidden_states, len(self.config.depths))
        states, attentions = self._run_stages(pixel_values, output_attentions=output_attentions)
        maps = states[-1]
        tokens = self.split_tokens(maps.flatten(2).transpose(1, 2), maps.shape[2:])  # [B, D, ...] -> [B, P, D]
        hidden_states = tuple(maps if number in wanted else None for number, maps in enumerate(states))
        output = ViTWithRegistersModelOutput(
            last_hidden_state=tokens.hidden_state,
            pooler_output=tokens.patch_tokens.mean(dim=1),
            hidden_states=hidden_states if wanted else None,
            attentions=attentions,
            register_tokens=tokens.register_tokens,
            patch_tokens=tokens.patch_tokens,
            patch_grid=tokens.patch_grid,
            pre_norm=tokens if output_pre_norm else None,
        )
        return self._as_asked(output, return_dict)

    def _run_stages(self, pixel_values: Tensor, *, output_attentions: bool) -> tuple[list, tuple | None]:
        """The input of the first stage and the output of each; attentions of all blocks or None."""
        maps, attentions, layers = self.embeddings(pixel_values), [], iter(self.layers)
        states = [maps]
        for stage, depth in enumerate(self.config.depths):
            maps = self.downsamplings[stage - 1](maps) if stage else maps
            for layer in itertools.islice(layers, depth):
                if output_attentions:
                    maps, probabilities = layer.forward_with_attentions(maps)
                    attentions.append(probabilities)
                else:
                    maps = layer(maps)
            states.append(maps)
        return states, tuple(attentions) if output_attentions else None

    def norm_tokens(self, hidden_state: Tensor) -> Tensor:
        """The same: there is no final norm."""
        return hidden_state

    def prefix_attention(self, pixel_values: Tensor, layers: list) -> tuple[dict, tuple]:
        """Refuse.

        Raises:
            ValueError: always; there is no prefix.
        """
        raise ValueError("HAT-Net has no class token and no registers, so there are no attention maps of them")


class HATNetClassifier(nn.Linear):
    """A linear layer behind dropout."""

    dropout = 0.0

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(F.dropout(inputs, self.dropout, self.training))


class HATNetForImageClassification(HATNetMixin, ViTWithRegistersForImageClassification):
    """One linear classifier on the mean of the last grid."""

    def __init__(self, config: HATNetConfig):
        ViTWithRegistersPreTrainedModel.__init__(self, config)
        self.vitreg = HATNetModel(config)
        self.classifier = self._make_classifier(config.pooled_size, HATNetClassifier)
        self.classifier.dropout = config.classifier_dropout
        self.distillation_classifier = None
        self.post_init()


HATNET_AUTO_MODELS = (HATNetModel, HATNetForImageClassification)

__all__ = ["HATNetConfig", "HATNetForImageClassification", "HATNetModel"]
