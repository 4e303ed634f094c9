"""Vision Transformer with registers: one class family for the plain Vision Transformers of the field.

Registers are learned tokens without a position. They are added to the sequence after the class token and their outputs
are discarded, so the network does not store global information in background patches (Darcet et al. 2024,
arXiv 2309.16588). Outputs give each kind of token by name; there is no need to slice the sequence.

Letters for shapes: B images, N tokens, P patches, R registers, C class tokens, D width, H heads, d = D / H, K heads of
keys and values, L layers.

This file travels next to the weights and runs without the package, on transformers 4.57 to 5.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    DepthEstimatorOutput,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput, cached_file, logging

from .configuration_vitreg import ViTWithRegistersConfig
from .positions_vitreg import (
    ViTWithRegistersPositionBias,
    ViTWithRegistersPositionEmbeddings,
    ViTWithRegistersRotaryFrequencies,
    has_values,
    make_rotation,
    rotary_angles,
)
from .token_reduction_vitreg import (
    HaltingAttention,
    HaltingLayer,
    LearningAttention,
    LearningLayer,
    MergingAttention,
    MergingLayer,
    make_tracker,
)


logger = logging.get_logger(__name__)

# ------------------------------------------------------------------------------------------------------------------
# Shims: everything in this file that depends on the version of transformers, each with its reason.
# ------------------------------------------------------------------------------------------------------------------

# The old home is announced for removal, the new one exists from 5.1 on.
try:
    from transformers.backbone_utils import BackboneMixin
except ImportError:
    from transformers.utils.backbone_utils import BackboneMixin


class AttentionBackend(nn.Module):
    """Looks up the attention function in use. Up to 5.0 the registry is a mapping, from 5.1 on it has a method. The
    library searches this file for both expressions to decide whether the attention implementation can be switched."""

    config: ViTWithRegistersConfig

    def get_attention_function(self):
        if self.config._attn_implementation == "eager":
            return eager_attention_forward
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]


def set_initial(parameter: Tensor | None, initialise, *args, **kwargs) -> None:
    """Initialise a parameter or buffer unless it came from a checkpoint: from 5.0 on the library marks loaded tensors
    one by one and initialises a module as soon as one of its tensors is missing."""
    if parameter is not None and not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            initialise(parameter, *args, **kwargs)


def without_reentrance(checkpoint: Callable) -> Callable:
    """Checkpointing of activations that keeps all gradients. Up to 4.57 the library defaults to reentrant
    checkpointing, under which layers get no gradient if their input needs none, as after frozen embeddings."""
    if isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant"):
        return functools.partial(checkpoint, use_reentrant=False)
    return checkpoint


def set_up_backbone(backbone: nn.Module, config: ViTWithRegistersConfig) -> None:
    """Up to 5.0 a backbone is set up by this call, later by the constructor of the mixin."""
    if hasattr(backbone, "_init_backbone"):
        backbone._init_backbone(config)


# ------------------------------------------------------------------------------------------------------------------
# Outputs
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class ViTWithRegistersTokens(ModelOutput):
    """Tokens of one layer by name.

    Args:
        hidden_state: (B, N, D), all tokens in order: class tokens, distillation token, registers, patches.
        cls_token: (B, D), the first class token, or None for a model without one.
        distillation_token: (B, D), or None.
        register_tokens: (B, R, D); R may be 0.
        patch_tokens: (B, P, D), row by row.
        patch_grid: (B, rows, columns, D), the same patches where they lie in the image.
        cls_tokens: (B, C, D), for a model with several class tokens.
    """

    hidden_state: Tensor | None = None
    cls_token: Tensor | None = None
    distillation_token: Tensor | None = None
    register_tokens: Tensor | None = None
    patch_tokens: Tensor | None = None
    patch_grid: Tensor | None = None
    cls_tokens: Tensor | None = None


@dataclass
class ViTWithRegistersModelOutput(ModelOutput):
    """Output of `ViTWithRegistersModel`. Tokens are normed by the final norm; `pre_norm` has them before it.

    Args:
        last_hidden_state: (B, N, D), all tokens in order: class tokens, distillation token, registers, patches.
        pooler_output: (B, D), or (B, 2 D) with pooling "cls_mean", or what pooling "cls_concat" reads.
        hidden_states: L + 1 tensors (B, N, D) before the final norm, the input of the first layer first; on request.
        attentions: L tensors (B, H, N, N), probabilities; on request.
        cls_token: (B, D), the first class token, or None for a model without one.
        distillation_token: (B, D), or None.
        register_tokens: (B, R, D); R may be 0.
        patch_tokens: (B, P, D), row by row.
        patch_grid: (B, rows, columns, D), the same patches where they lie in the image.
        pre_norm: the same tokens before the final norm, where outlier norms are measured; on request.
        image_embeds: (B, `config.projection_size`), or None for a model without projection.
        cls_tokens: (B, C, D), for a model with several class tokens.
        reduction: what became of the patches in a model with `config.token_reduction`, a `TokenReduction`,
            `LearnedTokens` or `HaltedTokens`; or None.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    cls_token: Tensor | None = None
    distillation_token: Tensor | None = None
    register_tokens: Tensor | None = None
    patch_tokens: Tensor | None = None
    patch_grid: Tensor | None = None
    pre_norm: ViTWithRegistersTokens | None = None
    image_embeds: Tensor | None = None
    cls_tokens: Tensor | None = None
    reduction: ModelOutput | None = None


_NAMED_TOKENS = ("cls_token", "distillation_token", "register_tokens", "patch_tokens", "patch_grid", "cls_tokens")


@dataclass
class ViTWithRegistersAttentionMaps(ModelOutput):
    """Attention of prefix tokens over the patches, on the patch grid; M is the number of requested layers.

    Probabilities are over all tokens: a map sums to one minus the attention of its query on the prefix tokens.

    Args:
        cls: (B, M, H, rows, columns), or (B, M, rows, columns) when averaged over heads.
        distillation: as `cls`.
        registers: (B, M, R, H, rows, columns), or (B, M, R, rows, columns).
    """

    cls: Tensor | None = None
    distillation: Tensor | None = None
    registers: Tensor | None = None


@dataclass
class ViTWithRegistersClassifierOutput(ImageClassifierOutput):
    """Adds the logits (B, C) of the two classifiers of a distilled model, whose mean is `logits`; and `reduction`, see
    `ViTWithRegistersModelOutput`."""

    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    reduction: ModelOutput | None = None


@dataclass
class ViTWithRegistersSegmenterOutput(SemanticSegmenterOutput):
    """Adds `reduction`, see `ViTWithRegistersModelOutput`."""

    reduction: ModelOutput | None = None


@dataclass
class ViTWithRegistersDepthOutput(DepthEstimatorOutput):
    """Adds `reduction`, see `ViTWithRegistersModelOutput`."""

    reduction: ModelOutput | None = None


# ------------------------------------------------------------------------------------------------------------------
# Embeddings
# ------------------------------------------------------------------------------------------------------------------


def check_image_size(size: Iterable[int], patch_shape: Iterable[int]) -> None:
    """Refuse an image size (height, width) that is not a multiple of the patch (rows, columns), all in pixels.

    Raises:
        ValueError: the message names the nearest sizes that fit.
    """
    for axis, side, patch in zip(("height", "width"), size, patch_shape):
        if side % patch or side < patch:
            below = max(side // patch, 1) * patch
            raise ValueError(
                f"an image {axis} of {side} pixels does not fit patches of {patch} pixels: the nearest sizes that fit "
                f"are {below} and {below + patch}; resize or pad the images"
            )


def check_images(pixel_values: Tensor, *, num_channels: int) -> None:
    """Refuse what is no batch of normalised images.

    Raises:
        ValueError: another shape, another number of channels, or integers.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"expected images (batch, {num_channels}, height, width), got a tensor of shape "
            f"{tuple(pixel_values.shape)}; the number of channels is `config.num_channels`"
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"expected images normalised to floating-point numbers, got {pixel_values.dtype}: prepare them with "
            "AutoImageProcessor.from_pretrained(FOLDER)(images, return_tensors='pt')"
        )


class ViTWithRegistersRegisterTokens(nn.Module):
    """The registers. They are a module so that PEFT can train them through `modules_to_save`."""

    def __init__(self, num_tokens: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, width))

    def forward(self, batch_size: int) -> Tensor:
        """Registers of each image, (B, R, D)."""
        return self.weight.expand(batch_size, -1, -1)


class ViTWithRegistersEmbeddings(nn.Module):
    """Images to the sequence class token, distillation token, registers, patches."""

    def __init__(self, config: ViTWithRegistersConfig, *, use_mask_token: bool):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embeddings = nn.Conv2d(
            config.num_channels,
            width,
            kernel_size=config.patch_shape,
            stride=config.patch_shape,
            bias=config.has_patch_bias,
        )
        self.patch_norm = nn.Identity()
        # CODEPATH: AIMv2.
        if config.has_patch_norm:
            self.patch_norm = make_norm(config)
        # CODEPATH: all but CAPI, SigLIP and timm's gap models; several in RADIO and Pixio.
        self.cls_token = nn.Parameter(torch.empty(1, config.num_cls_tokens, width)) if config.has_cls_token else None
        # CODEPATH: distilled DeiT.
        self.distillation_token = nn.Parameter(torch.empty(1, 1, width)) if config.has_distillation_token else None
        self.register_tokens = None
        # CODEPATH: DINOv2 with registers, DINOv3, CAPI; else ViT, MAE, CLIP.
        if config.num_register_tokens:
            self.register_tokens = ViTWithRegistersRegisterTokens(config.num_register_tokens, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if use_mask_token else None
        self.position_embeddings = None
        # CODEPATH: ViT, DINOv2, CLIP, MAE; else DINOv3, CAPI.
        if config.has_position_table:
            self.position_embeddings = ViTWithRegistersPositionEmbeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Embed images (B, C, height, width) as tokens (B, N, D)."""
        check_images(pixel_values, num_channels=self.config.num_channels)
        check_image_size(pixel_values.shape[2:], self.config.patch_shape)
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype))
        patches = self.patch_norm(patches.flatten(2).transpose(1, 2))  # [B, D, rows, columns] -> [B, P, D]
        if bool_masked_pos is not None:
            patches = self._mask(patches, bool_masked_pos)
        prefix = [token for token in (self.cls_token, self.distillation_token) if token is not None]
        prefix = torch.cat(prefix, dim=1) if prefix else None
        if self.position_embeddings is not None:
            prefix_positions, positions = self.position_embeddings(self.grid_of(pixel_values))
            # In the dtype of the weights, not of the patches: autocast then keeps the residual stream in float32.
            patches = patches + positions.to(self.patch_embeddings.weight.dtype)
            if prefix_positions is not None:
                prefix = prefix + prefix_positions
        parts = [] if prefix is None else [prefix.expand(patches.shape[0], -1, -1)]
        if self.register_tokens is not None:
            parts.append(self.register_tokens(patches.shape[0]))
        return self.dropout(torch.cat([*parts, patches], dim=1))

    def grid_of(self, pixel_values: Tensor) -> tuple:
        """Rows and columns of the patches of these images."""
        return tuple(side // patch for side, patch in zip(pixel_values.shape[2:], self.config.patch_shape))

    def _mask(self, patches: Tensor, bool_masked_pos: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError(
                "this model has no mask token, but `bool_masked_pos` was given: set has_mask_token=True in its "
                "configuration, or use ViTWithRegistersForMaskedImageModeling"
            )
        mask = bool_masked_pos.flatten(1)  # [B, rows, columns] or [B, P] -> [B, P]
        if mask.shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)}, expected {tuple(patches.shape[:2])}: one "
                f"value for each patch of each image"
            )
        return torch.where(mask.bool().unsqueeze(-1), self.mask_token.to(patches.dtype), patches)


# ------------------------------------------------------------------------------------------------------------------
# Layers
# ------------------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention with its probabilities: queries, keys and values (B, H, N, d) -> (B, N, H, d) and (B, H, N, N)."""
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    output = F.dropout(probabilities, p=dropout, training=module.training) @ value
    return output.transpose(1, 2).contiguous(), probabilities


CLOSED_GATE = 1e-8  # of an appended register; its share of the attention is below the rounding of float32
LEAST_GATE = 1e-12  # whose logarithm is finite
GATE_CHANNELS = 8  # of which one is used; kernels like multiples of 8


def make_norm(config: ViTWithRegistersConfig, size: int | None = None) -> nn.Module:
    """The norm of tokens, or of vectors of another size."""
    # CODEPATH: CAPI, AIMv2, Sapiens2; else all others.
    kind = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return kind(size or config.hidden_size, eps=config.layer_norm_eps)


def make_query_key_value(config: ViTWithRegistersConfig, sizes: tuple) -> nn.Linear:
    """The layer of queries, keys and values, (B, N, D) -> (B, N, sum of sizes).

    Its class is `nn.Linear` itself, because quantisation replaces exactly that. The bias always has three parts; those
    that the architecture lacks stay zero and get no gradient.
    """
    has_bias = (config.has_query_bias, config.has_key_bias, config.has_value_bias)
    layer = nn.Linear(config.hidden_size, sum(sizes), bias=any(has_bias))
    if any(has_bias) and not all(has_bias):
        layer.forward = functools.partial(_apply_with_partial_bias, layer, has_bias, sizes)
    return layer


def _apply_with_partial_bias(layer: nn.Linear, has_bias: tuple, sizes: tuple, hidden_states: Tensor) -> Tensor:
    parts = zip(has_bias, layer.bias.split(sizes))
    bias = torch.cat([part if is_present else torch.zeros_like(part) for is_present, part in parts])
    return F.linear(hidden_states, layer.weight, bias)


class ViTWithRegistersAttentionGate(nn.Module):
    """Multiply each of the concatenated heads, or each of their channels, by a sigmoid of the normed input."""

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        # CODEPATH: gates of whole heads; else timm's, of elements.
        size = self.num_heads if config.attention_gate == "head" else config.hidden_size
        self.linear = nn.Linear(config.hidden_size, size, bias=config.has_query_bias)

    def forward(self, attended: Tensor, hidden_states: Tensor) -> Tensor:
        """Gate the concatenated heads (..., D) by the normed input (..., D)."""
        gate = self.linear(hidden_states).sigmoid().unflatten(-1, (self.num_heads, -1))
        return (attended.unflatten(-1, (self.num_heads, -1)) * gate).flatten(-2)


class ViTWithRegistersAttention(AttentionBackend):
    """Multi-head self-attention with the attention implementation of the configuration.

    With gated registers, key j of head h counts w[h, j] times in the softmax: |gate| for a gated register, else 1.
    This is a bias log(w) of the scores. Only the eager implementation takes one for each head, so queries and keys get
    further channels, whose product is the bias.

    Args:
        config: the architecture.
        number: of the layer, from 1 on.
    """

    bias_field = "relative_position_bias"

    def __init__(self, config: ViTWithRegistersConfig, number: int = 1):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        size = config.hidden_size // self.num_heads
        self.scaling = size**-0.5
        self.is_causal = False
        key_value_heads = config.key_value_heads[number - 1]
        self.num_queries_per_key = self.num_heads // key_value_heads
        self.sizes = (config.hidden_size, key_value_heads * size, key_value_heads * size)
        self.qkv = make_query_key_value(config, self.sizes)
        self.query_norm = self.key_norm = self.norm = nn.Identity()
        # CODEPATH: Sapiens2.
        if config.has_query_key_norm:
            self.query_norm, self.key_norm = make_norm(config, size), make_norm(config, size)
        # CODEPATH: EVA-CLIP.
        if config.has_attention_norm:
            self.norm = make_norm(config)
        # CODEPATH: models with gated attention; else all others.
        self.gate = None if config.attention_gate is None else ViTWithRegistersAttentionGate(config)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_gates = None
        # CODEPATH: models to which `retrofit` appended registers.
        if config.num_gated_registers:
            self.register_gates = nn.Parameter(torch.empty(config.num_attention_heads, config.num_gated_registers))
        self.rotate = make_rotation(config, number)
        self.position_bias = None
        # CODEPATH: BEiT, data2vec; a shared bias comes from the model.
        if config.relative_position_bias is not None:
            is_own = config.relative_position_bias == "layer"
            self.position_bias = ViTWithRegistersPositionBias(config) if is_own else nn.Identity()

    def forward(self, hidden_states: Tensor, rotary: tuple | None = None, groups: tuple | None = None) -> Tensor:
        """Attend among the tokens of an image.

        Args:
            hidden_states: (B, N, D), or (T, D) for `groups`.
            rotary: what `ViTWithRegistersModel.embed` says of the positions, or a tuple of it for each group.
            groups: (images, tokens) of each group of images whose tokens lie in one sequence, T in all.
        """
        packed = self.qkv(hidden_states)
        if groups is None:
            return self.mix(self.attend(packed, rotary)[0], hidden_states)
        parts = packed.split([num_images * num_tokens for num_images, num_tokens in groups])
        found = [
            self.attend(part.unflatten(0, group), table)[0].flatten(0, 1)
            for part, group, table in zip(parts, groups, rotary)
        ]
        return self.mix(torch.cat(found) if len(found) > 1 else found[0], hidden_states)

    def mix(self, attended: Tensor, hidden_states: Tensor) -> Tensor:
        """Output of the concatenated heads (..., D), gated by the normed input (..., D) where there is a gate."""
        attended = self.norm(attended)
        if self.gate is not None:
            attended = self.gate(attended, hidden_states)
        return self.dropout(self.proj(attended))

    def split_heads(self, packed: Tensor, rotary: tuple | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, N, d), from (B, N, D + 2 K d), normed and rotated as configured."""
        # In three parts and not by an axis of three: the gradient is then one concatenation, without another copy.
        size = self.sizes[0] // self.num_heads
        parts = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in packed.split(self.sizes, dim=-1))
        query, key, value = parts
        query, key = self.query_norm(query), self.key_norm(key)
        if self.rotate is not None:
            query, key = self.rotate(query, rotary), self.rotate(key, rotary)
        if self.num_queries_per_key > 1:
            key, value = (part.repeat_interleave(self.num_queries_per_key, dim=1) for part in (key, value))
        return query, key, value

    def apply_gates(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, N, d) to (B, H, N, d + 8), whose scores include the biases of the gates."""
        stop = self.config.token_slices["registers"].stop - self.config.num_test_time_registers
        start = stop - self.config.num_gated_registers
        # The gradient of |gate| never vanishes, so a gate may reach 0 and open again.
        bias = self.register_gates.float().abs().clamp(min=LEAST_GATE).log() / self.scaling  # [H, G]
        bias = F.pad(bias, (start, key.shape[2] - stop))[None, :, :, None]  # [1, H, N, 1]
        bias = bias.expand(key.shape[0], -1, -1, -1).to(key.dtype)
        query = F.pad(F.pad(query, (0, 1), value=1.0), (0, GATE_CHANNELS - 1))
        key = F.pad(torch.cat([key, bias], dim=-1), (0, GATE_CHANNELS - 1))
        return query, key, F.pad(value, (0, GATE_CHANNELS))  # back ends want one width for all three

    def attend(
        self, packed: Tensor, rotary: tuple | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Concatenated heads (B, N, D) from queries, keys and values; and probabilities if requested."""
        # Only the eager function has probabilities to return, whatever the back end of the model.
        attend = eager_attention_forward if output_attentions else self.get_attention_function()
        parts = self.split_heads(packed, rotary)
        width = parts[2].shape[-1]
        # CODEPATH: models to which `retrofit` appended registers.
        if self.register_gates is not None:
            parts = self.apply_gates(*parts)
        # Compiled for a CPU, flex attention of torch 2.14 reads what a norm or a rotation made with other strides.
        if self.config._attn_implementation == "flex_attention" and packed.device.type == "cpu":
            parts = [part.contiguous() for part in parts]
        output, probabilities = attend(
            self,
            *parts,
            self.score_bias(rotary, packed.dtype),
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            is_causal=False,
        )
        if self.register_gates is not None:
            output = output[..., :width]
        return output.flatten(2), probabilities if output_attentions else None  # [B, N, H, d] -> [B, N, D]

    def score_bias(self, positions: tuple | Tensor, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores: the relative position bias (1, H, N, N), what token reduction says, or None."""
        if self.position_bias is None:
            return None
        implementation = self.config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"{self.bias_field} needs attention 'eager' or 'sdpa', got {implementation!r}, which takes no "
                "bias of the scores: choose one with model.set_attn_implementation"
            )
        bias = self.position_bias(positions)
        return None if bias is None else bias.to(dtype)

    def prefix_attention(self, hidden_states: Tensor, rotary: tuple | None, num_queries: int) -> Tensor:
        """Probabilities (B, H, Q, N), in float32, of the first Q tokens over all; nothing of size N x N is built."""
        return self.prefix_probabilities(self.qkv(hidden_states), rotary, num_queries)

    def prefix_probabilities(self, packed: Tensor, rotary: tuple | None, num_queries: int | None) -> Tensor:
        """`prefix_attention` from queries, keys and values (B, N, D + 2 K d); of all tokens without a number."""
        parts = self.split_heads(packed, rotary)
        query, key, _ = parts if self.register_gates is None else self.apply_gates(*parts)
        scores = query[:, :, :num_queries].float() @ key.float().transpose(-2, -1) * self.scaling
        bias = None if self.position_bias is None else self.position_bias(rotary)
        if bias is not None:
            scores = scores + bias[:, :, :num_queries].float()
        return scores.softmax(dim=-1)


class ViTWithRegistersMLP(nn.Module):
    """Two linear layers; with SwiGLU the first makes gate and value, in this order, in one product."""

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__()
        self.is_gated = config.hidden_act == "swiglu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size * (2 if self.is_gated else 1))
        self.activation = ACT2FN["silu" if self.is_gated else config.hidden_act]
        # CODEPATH: EVA-02.
        self.norm = make_norm(config, config.intermediate_size) if config.has_mlp_norm else nn.Identity()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.norm(self.activate(hidden_states))))

    def activate(self, hidden_states: Tensor) -> Tensor:
        """Activations of the hidden units: (..., D) -> (..., `intermediate_size`)."""
        hidden_states = self.fc1(hidden_states)
        if not self.is_gated:
            return self.activation(hidden_states)
        gate, value = hidden_states.chunk(2, dim=-1)
        return self.activation(gate) * value


class ViTWithRegistersRegisterNeuronMLP(ViTWithRegistersMLP):
    """An MLP in which some units act on the test-time registers only (Jiang et al. 2025, arXiv 2506.08010).

    for each image and each unit u of `units`:
        a[registers, u] = the activation of largest magnitude over all tokens, with its sign
        a[all other tokens, u] = 0
    """

    def __init__(self, config: ViTWithRegistersConfig, units: list):
        super().__init__(config)
        stop = config.token_slices["registers"].stop
        self.registers = (stop - config.num_test_time_registers, stop)
        self.initial_units = units
        self.units = nn.Buffer(torch.tensor(units), persistent=False)

    def activate(self, hidden_states: Tensor) -> Tensor:
        """As in `ViTWithRegistersMLP`, for whole sequences (B, N, D) only."""
        hidden_states = super().activate(hidden_states)
        activations = hidden_states[..., self.units]  # [B, N, E] -> [B, N, U]
        largest = activations.gather(1, activations.abs().argmax(dim=1, keepdim=True))  # [B, N, U] -> [B, 1, U]
        start, stop = self.registers
        # In place: a copy of all hidden units would cost more than the move, and no gradient reads them.
        hidden_states.index_fill_(-1, self.units, 0)
        hidden_states[:, start:stop, self.units] = largest.expand(-1, stop - start, -1)
        return hidden_states


class ViTWithRegistersLayerScale(nn.Module):
    """A learned factor for each channel of a branch (Touvron et al. 2021)."""

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.weight


class ViTWithRegistersDropPath(nn.Module):
    """Stochastic depth: while training, leave a branch out for some images and scale it up for the others.

    A choice is None for all images, or a pair: indices of the rows that the branch runs on, or None for all of them,
    and a factor for each of these rows. A row is an image of (B, ...), or a token of (T, D).
    """

    def __init__(self, config: ViTWithRegistersConfig, rate: float):
        super().__init__()
        self.rate = rate
        self.mode = config.drop_path_mode

    def choose(self, like: Tensor, *, needs_all: bool = False) -> tuple[Tensor | None, Tensor] | None:
        """Draw which of the images of `like` (B, ...) run a branch; `needs_all` runs it on all of them."""
        if not self.training or self.rate == 0.0:
            return None
        num_images, axes = like.shape[0], (1,) * (like.ndim - 1)
        if self.mode == "batch_subset" and not needs_all:
            num_kept = max(int(num_images * (1 - self.rate)), 1)
            kept = torch.randperm(num_images, device=like.device)[:num_kept]
            return kept, like.new_full((num_kept, *axes), num_images / num_kept)
        return None, like.new_empty(num_images, *axes).bernoulli_(1 - self.rate) / (1 - self.rate)

    def choose_tokens(
        self, hidden_states: Tensor, groups: tuple, *, needs_all: bool = False
    ) -> tuple[tuple[Tensor | None, Tensor] | None, tuple]:
        """Draw for groups of images whose tokens (T, D) lie in one sequence; also the groups that the branch sees."""
        parts = hidden_states.split([num_images * num_tokens for num_images, num_tokens in groups])
        choices = [self.choose(part.unflatten(0, group), needs_all=needs_all) for part, group in zip(parts, groups)]
        if choices[0] is None:
            return None, groups
        rows, factors, kept_groups, start = [], [], [], 0
        for (images, factor), (num_images, num_tokens) in zip(choices, groups):
            factors.append(factor.flatten().repeat_interleave(num_tokens)[:, None])  # [B, 1, 1] -> [B N, 1]
            if images is not None:
                tokens = torch.arange(num_tokens, device=images.device)
                rows.append((start + images[:, None] * num_tokens + tokens).flatten())
            kept_groups.append((len(factor), num_tokens))
            start += num_images * num_tokens
        return (torch.cat(rows) if rows else None, torch.cat(factors)), tuple(kept_groups)

    @staticmethod
    def add(hidden_states: Tensor, branch, choice: tuple | None, *args) -> Tensor:
        """The residual sum with `branch(rows, *args)`, for the rows that were chosen."""
        if choice is None:
            return hidden_states + branch(hidden_states, *args)
        rows, factors = choice
        if rows is None:
            return hidden_states + branch(hidden_states, *args) * factors
        added = branch(hidden_states[rows], *args) * factors
        return hidden_states.index_add(0, rows, added.to(hidden_states.dtype))

    def extra_repr(self) -> str:
        return f"rate={self.rate}, mode={self.mode}"


class ViTWithRegistersLayer(GradientCheckpointingLayer):
    """Attention and MLP, each after a norm, with LayerScale and stochastic depth.

    The two branches have one signature each and no random number, so that they compile to one graph each.
    """

    attention_class = ViTWithRegistersAttention

    def __init__(
        self,
        config: ViTWithRegistersConfig,
        drop_path_rate: float,
        register_neurons: list | None = None,
        number: int = 1,
    ):
        super().__init__()
        has_scale = config.layer_scale_init_value is not None
        self.norm1 = make_norm(config)
        self.attention = self.attention_class(config, number)
        self.layer_scale1 = ViTWithRegistersLayerScale(config) if has_scale else nn.Identity()
        self.norm2 = make_norm(config)
        self.mlp = ViTWithRegistersMLP(config)
        if register_neurons:
            self.mlp = ViTWithRegistersRegisterNeuronMLP(config, register_neurons)
        has_scale = has_scale and bool(config.has_mlp_layer_scale)
        self.layer_scale2 = ViTWithRegistersLayerScale(config) if has_scale else nn.Identity()
        self.drop_path = ViTWithRegistersDropPath(config, drop_path_rate)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple | None = None,
        groups: tuple | None = None,
        reads: Tensor | None = None,
    ) -> Tensor:
        """Tokens to tokens.

        Args:
            hidden_states: (B, N, D), or (T, D) for `groups`.
            rotary, groups: as in `ViTWithRegistersAttention`.
            reads: indices (M,) into the T tokens of the groups; the layer returns only these, as (M, D).
        """
        if groups is not None:
            return self._forward_groups(hidden_states, rotary, groups, reads)
        choice = self.drop_path.choose(hidden_states)
        hidden_states = self.drop_path.add(hidden_states, self.attention_branch, choice, rotary)
        return self.drop_path.add(hidden_states, self.mlp_branch, self.drop_path.choose(hidden_states))

    def attention_branch(self, hidden_states: Tensor, rotary: tuple | None, groups: tuple | None = None) -> Tensor:
        """The update of the tokens by attention."""
        return self.layer_scale1(self.attention(self.norm1(hidden_states), rotary, groups))

    def attention_branch_with_probabilities(self, hidden_states: Tensor, rotary: tuple | None) -> tuple:
        """The same of whole sequences (B, N, D), and the attention probabilities (B, H, N, N), computed eagerly."""
        normed = self.norm1(hidden_states)
        attended, probabilities = self.attention.attend(self.attention.qkv(normed), rotary, output_attentions=True)
        return self.layer_scale1(self.attention.mix(attended, normed)), probabilities

    def mlp_branch(self, hidden_states: Tensor) -> Tensor:
        """The update of the tokens by the MLP."""
        return self.layer_scale2(self.mlp(self.norm2(hidden_states)))

    def forward_with_attentions(self, hidden_states: Tensor, rotary: tuple | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) to tokens, and the attention probabilities (B, H, N, N), computed eagerly."""
        branch, probabilities = self.attention_branch_with_probabilities(hidden_states, rotary)
        choice = self.drop_path.choose(hidden_states, needs_all=True)
        hidden_states = self.drop_path.add(hidden_states, lambda _: branch, choice)
        hidden_states = self.drop_path.add(hidden_states, self.mlp_branch, self.drop_path.choose(hidden_states))
        return hidden_states, probabilities

    def prefix_attention(self, hidden_states: Tensor, rotary: tuple | None, num_queries: int) -> Tensor:
        """Attention probabilities (B, H, Q, N) of the first Q tokens (B, N, D)."""
        return self.attention.prefix_attention(self.norm1(hidden_states), rotary, num_queries)

    def _forward_groups(self, hidden_states: Tensor, rotary: tuple, groups: tuple, reads: Tensor | None) -> Tensor:
        # A subset of images would leave some requested tokens without a branch: run all images, with factors.
        draws = [self.drop_path.choose_tokens(hidden_states, groups, needs_all=reads is not None) for _ in range(2)]
        (choice, kept), (mlp_choice, _) = draws
        hidden_states = self.drop_path.add(hidden_states, self.attention_branch, choice, rotary, kept)
        if reads is not None:
            hidden_states = hidden_states[reads]
            mlp_choice = mlp_choice and (None, mlp_choice[1][reads])
        return self.drop_path.add(hidden_states, self.mlp_branch, mlp_choice)


class ViTWithRegistersMergingAttention(MergingAttention, ViTWithRegistersAttention):
    """Attention among tokens that represent several patches."""


class ViTWithRegistersMergingLayer(MergingLayer, ViTWithRegistersLayer):
    """A layer that joins similar patches."""

    attention_class = ViTWithRegistersMergingAttention


class ViTWithRegistersLearningAttention(LearningAttention, ViTWithRegistersAttention):
    """Attention among learned tokens."""


class ViTWithRegistersLearningLayer(LearningLayer, ViTWithRegistersLayer):
    """A layer that works on learned tokens in place of patches."""

    attention_class = ViTWithRegistersLearningAttention


class ViTWithRegistersHaltingAttention(HaltingAttention, ViTWithRegistersAttention):
    """Attention among the tokens that still run."""


class ViTWithRegistersHaltingLayer(HaltingLayer, ViTWithRegistersLayer):
    """A layer behind which tokens may halt."""

    attention_class = ViTWithRegistersHaltingAttention


LAYER_CLASSES = {
    None: ViTWithRegistersLayer,
    "merge": ViTWithRegistersMergingLayer,
    "learn": ViTWithRegistersLearningLayer,
    "halt": ViTWithRegistersHaltingLayer,
}


class ViTWithRegistersAttentionPooling(nn.Module):
    """One vector of each image from a learned query that attends to all tokens (SigLIP, Perception Encoder, AIMv2)."""

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__()
        width, has_bias = config.hidden_size, config.has_pooling_bias
        self.num_heads = config.pooling_num_heads or config.num_attention_heads
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        # CODEPATH: SigLIP, Perception Encoder; else AIMv2.
        self.query = nn.Linear(width, width, bias=has_bias) if config.has_pooling_query else nn.Identity()
        self.key_value = nn.Linear(width, 2 * width, bias=has_bias)
        self.proj = nn.Linear(width, width)
        hidden = config.pooling_intermediate_size
        hidden = config.intermediate_size if hidden is None else hidden
        self.norm = self.fc1 = self.fc2 = None
        # CODEPATH: SigLIP, Perception Encoder; else AIMv2.
        if hidden:
            self.norm, self.fc1, self.fc2 = make_norm(config), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = ACT2FN["gelu" if config.hidden_act == "swiglu" else config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Tokens (B, N, D) to (B, D)."""
        parts = (self.query(self.probe), *self.key_value(hidden_states).chunk(2, dim=-1))
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query.expand(key.shape[0], -1, -1, -1), key, value)
        pooled = self.proj(attended.transpose(1, 2).flatten(1))  # [B, H, 1, d] -> [B, D]
        if self.norm is None:
            return pooled
        return pooled + self.fc2(self.activation(self.fc1(self.norm(pooled))))


# ------------------------------------------------------------------------------------------------------------------
# Base class
# ------------------------------------------------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROCESSOR_FILE = "preprocessor_config.json"


def read_image_processor(path: str | os.PathLike, *, num_channels: int) -> dict:
    """Read a `preprocessor_config.json` and check its mean, standard deviation and rescale factor.

    Args:
        num_channels: channels of the images; a single mean or deviation is repeated for each of them.

    Raises:
        ValueError: the file is not a JSON object, or a value is not a finite number, or not one for each channel.
    """
    with open(path, encoding="utf-8") as file:
        try:
            settings = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, expected an object of settings")
    for name in ("image_mean", "image_std", "rescale_factor"):
        value = settings.get(name)
        if value is None:
            continue
        values = value if isinstance(value, list) and name != "rescale_factor" else [value]
        is_number = all(type(each) in (int, float) and math.isfinite(each) for each in values)
        lowest = -math.inf if name == "image_mean" else 0
        if not is_number or not values or min(values) <= lowest or len(values) not in (1, num_channels):
            kind = "finite number" if name == "image_mean" else "finite number above 0"
            channels = "" if name == "rescale_factor" else f", or one for each of {num_channels} channels"
            raise ValueError(f"{path} has {name} {value!r}, expected a {kind}{channels}")
        if name != "rescale_factor":
            settings[name] = values if len(values) == num_channels else values * num_channels
    return settings


def _join(settings: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


class ViTWithRegistersMixin:
    """Shared by the models and the dual encoder: saving a folder that runs without the package."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Save as in transformers, with the code, an entry for every Auto class, and an image processor.

        An image processor that is already in the folder is kept. Otherwise the one that the model was loaded with is
        saved, in the class that the pipeline of this model accepts; a new model gets one with ImageNet's statistics.
        """
        to_hub = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags")
        to_hub = {name: kwargs.pop(name) for name in to_hub if name in kwargs}
        self.config.auto_map = self._auto_map()
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if is_main_process and os.path.isdir(save_directory):
            self._save_image_processor(save_directory)
        if push_to_hub:  # after the image processor, which is uploaded too
            repo_id = to_hub.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, token=kwargs.get("token"), **to_hub)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **options):
        checkpoint_func = without_reentrance(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, checkpoint_func, **options)


class ViTWithRegistersPreTrainedModel(ViTWithRegistersMixin, PreTrainedModel):
    """Base class of all models: initialisation, saving, resizing, and attention maps."""

    config_class = ViTWithRegistersConfig
    base_model_prefix = "vitreg"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTWithRegistersEmbeddings", *(layer.__name__ for layer in LAYER_CLASSES.values())]
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.mask_token", r"(^|\.)projection\.weight"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The image processor for a new model; the pipelines of dense tasks accept no other, the rest accept any.
    _image_processor_type = "BitImageProcessor"
    _has_new_channels = False  # since it was loaded: the image processor of then does not fit
    _has_checked_labels = False

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; if weights have other shapes than the configuration, the error says how to resize."""
        try:
            return super().from_pretrained(*args, **kwargs)
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise RuntimeError(
                f"{error}\nTo change the number of registers or the image size, load the model as it was saved, and "
                "call model.resize_register_tokens(NUMBER) or model.resize_position_embeddings(SIZE). "
                "ignore_mismatched_sizes=True starts such weights anew, as for another number of classes"
            ) from error

    # trf-ignore: TRF018 (every kind of module that there is here has its initial law below)
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if getattr(module, "is_zero_initialized", False):
                set_initial(module.weight, nn.init.zeros_)
            else:
                set_initial(module.weight, nn.init.trunc_normal_, std=getattr(module, "initial_std", std))
            set_initial(module.bias, nn.init.zeros_)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d)):
            set_initial(module.weight, nn.init.ones_)
            set_initial(getattr(module, "bias", None), nn.init.zeros_)
            if isinstance(module, nn.BatchNorm2d):
                set_initial(module.running_mean, nn.init.zeros_)
                set_initial(module.running_var, nn.init.ones_)
                set_initial(module.num_batches_tracked, nn.init.zeros_)
        elif isinstance(module, ViTWithRegistersLayerScale):
            set_initial(module.weight, nn.init.constant_, self.config.layer_scale_init_value)
        elif isinstance(module, ViTWithRegistersRegisterTokens):
            # Registers have no position: equal ones would get equal gradients and stay equal.
            set_initial(module.weight, nn.init.trunc_normal_, std=std)
        elif isinstance(module, ViTWithRegistersAttention):
            set_initial(module.register_gates, nn.init.constant_, CLOSED_GATE)
        elif isinstance(module, ViTWithRegistersRegisterNeuronMLP):
            set_initial(module.units, lambda units: units.copy_(torch.tensor(module.initial_units)))
        elif isinstance(module, (ViTWithRegistersPositionEmbeddings, ViTWithRegistersRotaryFrequencies)):
            set_initial(module.weight, module.fill)
        elif isinstance(module, ViTWithRegistersPositionBias):
            set_initial(module.weight, nn.init.zeros_)
        elif isinstance(module, ViTWithRegistersAttentionPooling):
            set_initial(module.probe, nn.init.trunc_normal_, std=std)
        elif isinstance(module, ViTWithRegistersEmbeddings):
            set_initial(module.cls_token, nn.init.trunc_normal_, std=std)
            set_initial(module.distillation_token, nn.init.trunc_normal_, std=std)
            set_initial(module.mask_token, nn.init.zeros_)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.base_model.embeddings.patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the patch embedding, for example by one for images with other channels.

        The configuration takes over the number of channels and whether there is a bias.

        Raises:
            ValueError: the layer is no `nn.Conv2d` of the same form as the present one, it lacks a bias that the
                architecture has, or the model predicts pixels, whose number of channels would change.
        """
        names = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        expected = {name: getattr(self.get_input_embeddings(), name) for name in names}
        wrong = {name: getattr(value, name, None) for name in expected if getattr(value, name, None) != expected[name]}
        if not isinstance(value, nn.Conv2d) or wrong:
            raise ValueError(
                f"expected an nn.Conv2d with {_join(expected)}, got {type(value).__name__}"
                + (f" with {_join(wrong)}" if isinstance(value, nn.Conv2d) else "")
            )
        fields, has_bias = {"num_channels": value.in_channels}, value.bias is not None
        if has_bias != self.config.has_patch_bias:
            fields["has_patch_bias"] = has_bias
        self._change_config(**fields)
        self._check_channels(value.in_channels)
        self._has_new_channels = value.in_channels != self.config.num_channels
        self.config.num_channels, self.config.has_patch_bias = value.in_channels, has_bias
        self.base_model.embeddings.patch_embeddings = value

    def _check_channels(self, num_channels: int) -> None:
        """Refuse a number of channels that other parts of this model do not allow."""

    def no_weight_decay(self) -> set:
        """Names of all token and position parameters, registers and gates included, to be exempt from weight decay."""
        kinds = {"cls_token", "distillation_token", "register_tokens", "mask_token"}
        kinds |= {"position_embeddings", "register_gates", "probe", "rotary_frequencies", "position_bias"}
        return {name for name, _ in self.named_parameters() if kinds & set(name.split("."))}

    def resize_register_tokens(self, num_register_tokens: int) -> None:
        """Change the number of registers in place. The first ones are kept, new ones start distinct.

        Outputs change, because every token takes part in attention: evaluate before and after, or train further.

        Args:
            num_register_tokens: 0 or more.

        Raises:
            ValueError: a number that the configuration does not allow.
        """
        num_registers = self.config.num_register_tokens
        kinds = {"test-time": self.config.num_test_time_registers, "gated": self.config.num_gated_registers}
        for kind, count in kinds.items():
            if count and num_register_tokens != num_registers:
                raise ValueError(
                    f"{count} of the {num_registers} registers are {kind} registers, which stay the last ones: keep "
                    f"{num_registers} registers, or resize those of the original model, then retrofit it again"
                )
        self._change_config(num_register_tokens=num_register_tokens)
        embeddings = self.base_model.embeddings
        old, weight = embeddings.register_tokens, embeddings.patch_embeddings.weight
        new = ViTWithRegistersRegisterTokens(num_register_tokens, self.config.hidden_size).to(weight)
        self._init_weights(new)
        if old is not None:
            kept = min(num_register_tokens, self.config.num_register_tokens)
            new.weight.data[:kept] = old.weight.data[:kept]
            new.requires_grad_(old.weight.requires_grad)
        embeddings.register_tokens = new if num_register_tokens else None
        self.config.num_register_tokens = num_register_tokens

    def resize_position_embeddings(self, image_size: int | tuple) -> None:
        """Make a position table for images of another size, in place, by the interpolation of the configuration.

        The model takes images of other sizes without this call; use it before training at the new size. Models without
        a table change `config.image_size` only.

        Args:
            image_size: side in pixels, or (rows, columns); multiples of the patch.

        Raises:
            ValueError: a size that the configuration does not allow.
        """
        fitting = self._change_config(image_size=image_size)
        self.config.image_size = fitting.image_size
        for module in self.base_model.modules():
            if isinstance(module, (ViTWithRegistersPositionEmbeddings, ViTWithRegistersPositionBias)):
                module.resize(fitting.grid_shape)

    def _change_config(self, **fields) -> ViTWithRegistersConfig:
        """A copy of the configuration with other values, which its constructor checks before the model changes."""
        return type(self.config).from_dict({**self.config.to_dict(), **fields})

    def split_tokens(self, hidden_state: Tensor, grid: tuple) -> ViTWithRegistersTokens:
        """Name the tokens of any layer.

        Args:
            hidden_state: (B, N, D), for example one of `hidden_states`.
            grid: rows and columns of the patches.
        """
        kinds = self.config.token_slices
        patches = hidden_state[:, kinds["patches"]]
        return ViTWithRegistersTokens(
            hidden_state=hidden_state,
            # CODEPATH: all but CAPI and timm's gap models.
            cls_token=hidden_state[:, kinds["cls"].start] if self.config.has_cls_token else None,
            distillation_token=(
                # CODEPATH: distilled DeiT.
                hidden_state[:, kinds["distillation"].start] if self.config.has_distillation_token else None
            ),
            register_tokens=hidden_state[:, kinds["registers"]],
            patch_tokens=patches,
            patch_grid=patches.unflatten(1, tuple(grid)),
            # CODEPATH: RADIO, Pixio.
            cls_tokens=hidden_state[:, kinds["cls"]] if self.config.num_cls_tokens > 1 else None,
        )

    @torch.no_grad()
    def attention_maps(
        self,
        pixel_values: Tensor,
        layers: int | tuple = -1,
        queries: str | tuple = ("cls", "registers"),
        average_heads: bool = False,
    ) -> ViTWithRegistersAttentionMaps:
        """Attention of class token and registers as maps on the patch grid, with any attention implementation.

        Probabilities are computed for the requested layers and queries only; layers after the last one do not run.

        Args:
            pixel_values: images (B, C, height, width).
            layers: layer numbers, from 1 for the first layer, or from -1 backwards. Changed: earlier versions counted
                from 0; as for `output_hidden_states`, 0 is the embedding, which has no attention.
            queries: any of "cls", "distillation", "registers"; the output is None for a token that the model lacks.
            average_heads: average over heads.

        Returns:
            Maps in float32, (B, M, H, rows, columns) of a token and (B, M, R, H, rows, columns) of the registers, with
            the M layers in the requested order, and without H where heads are averaged.

        Raises:
            ValueError: no such layer or query.
        """
        layers = [layers] if isinstance(layers, int) else list(layers)
        queries = (queries,) if isinstance(queries, str) else tuple(queries)
        depth, kinds = self.config.num_hidden_layers, self.config.token_slices
        if not layers or any(not (1 <= layer <= depth or -depth <= layer <= -1) for layer in layers):
            raise ValueError(
                f"expected layers from 1 to {depth}, or from -{depth} to -1 counted from the last, got {layers}; "
                "0 is the embedding, which has no attention"
            )
        kinds.pop("patches")
        if not queries or any(query not in kinds for query in queries):
            raise ValueError(f"expected queries out of {', '.join(kinds)}, got {queries}")
        layers = [layer % (depth + 1) if layer > 0 else depth + 1 + layer for layer in layers]
        probabilities, grid = self.base_model.prefix_attention(pixel_values, layers)
        maps = torch.stack([probabilities[layer] for layer in layers], dim=1)  # [B, M, H, prefix, N]
        maps = maps[..., kinds["registers"].stop :].transpose(2, 3).unflatten(-1, grid)
        maps = maps.mean(dim=3) if average_heads else maps  # [B, M, prefix, (H,) rows, columns]
        output = ViTWithRegistersAttentionMaps()
        for query in queries:
            part = maps[:, :, kinds[query]]
            if query == "registers":
                output["registers"] = part
            elif part.shape[2]:
                output[query] = part[:, :, 0]
        return output

    def image_processor_settings(self) -> dict:
        """Settings of the image processor that is saved with the model, as in `preprocessor_config.json`.

        Raises:
            ValueError: the image processor file of the loaded model has an invalid mean, deviation or rescale factor.
        """
        defaults, loaded = self._default_image_processor(), self._loaded_image_processor()
        kind = self._image_processor_type
        if loaded and (kind == "BitImageProcessor" or loaded["image_processor_type"].startswith(kind)):
            settings = loaded
        else:
            statistics = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
            settings = {**defaults, **{name: loaded[name] for name in statistics if name in loaded}}
        return settings | self._processor_code(settings["image_processor_type"])

    @staticmethod
    def _processor_code(kind: str) -> dict:
        """The entry of the class that reads files as the package does; without trust the one of transformers is used.

        The import makes the file travel with this one.
        """
        from .image_processing_vitreg import PROCESSORS

        found = PROCESSORS.get(kind.removesuffix("Fast").removesuffix("Pil"))
        return {"auto_map": {"AutoImageProcessor": f"image_processing_vitreg.{found.__name__}"}} if found else {}

    def _default_image_processor(self) -> dict:
        channels = self.config.num_channels
        rows, columns = (side * patch for side, patch in zip(self.config.grid_shape, self.config.patch_shape))
        settings = {
            "image_processor_type": self._image_processor_type,
            "do_resize": True,
            "resample": 3,  # bicubic
            "size": {"height": rows, "width": columns},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(IMAGENET_MEAN) if channels == 3 else [0.5] * channels,
            "image_std": list(IMAGENET_STD) if channels == 3 else [0.5] * channels,
        }
        if self._image_processor_type == "BitImageProcessor":
            shortest_edge = round(max(rows, columns) * 256 / 224)  # the protocol of ImageNet: 256 cut to 224
            settings["size"] = {"shortest_edge": shortest_edge}
            settings |= {"do_center_crop": True, "crop_size": {"height": rows, "width": columns}}
            settings |= {"do_convert_rgb": channels == 3}
        elif self._image_processor_type == "DPTImageProcessor":
            settings |= {"keep_aspect_ratio": False, "ensure_multiple_of": 1}
        else:
            settings |= {"do_reduce_labels": False}
        return settings

    def _loaded_image_processor(self) -> dict:
        source = self.config._name_or_path
        if not source or self._has_new_channels:
            return {}
        try:  # local files only, so that saving works offline
            path = cached_file(
                source,
                PROCESSOR_FILE,
                revision=getattr(self.config, "_commit_hash", None),
                local_files_only=True,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except OSError:  # the folder was moved or the repository is private: there is nothing to copy
            return {}
        if path is None:
            return {}
        return read_image_processor(path, num_channels=self.config.num_channels)

    def _auto_map(self) -> dict:
        models = {model._auto_class: f"modeling_vitreg.{model.__name__}" for model in AUTO_MODELS}
        return {"AutoConfig": "configuration_vitreg.ViTWithRegistersConfig", **models}

    def _save_image_processor(self, folder: str | os.PathLike) -> None:
        path = os.path.join(folder, PROCESSOR_FILE)
        if os.path.exists(path):
            return
        try:
            settings = self.image_processor_settings()
        except ValueError as error:  # the model is worth more than the file that came with the one it started from
            logger.warning(f"{error}; saved the default image processor instead")
            settings = self._default_image_processor() | self._processor_code(self._image_processor_type)
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=2, sort_keys=True)
            file.write("\n")
        os.replace(path + ".tmp", path)

    def _encode(
        self,
        pixel_values,
        *,
        stages=(),
        num_layers=None,
        output_hidden_states=None,
        output_attentions=None,
        bool_masked_pos=None,
        interpolate_pos_encoding=None,
    ):
        """Run the base model for a head.

        Args:
            stages: numbers of the layers whose tokens, before the final norm, the head reads.
            num_layers: layers that the head needs; all run if the caller asks for hidden states or attentions.

        Returns:
            The output of the base model, with hidden states only if the caller requested them, and the stages' tokens.
        """
        config = self.config
        wants_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        output = self.vitreg(
            pixel_values,
            bool_masked_pos,
            output_hidden_states=True if wants_states else list(stages),
            output_attentions=wants_attentions,
            num_layers=None if wants_states or wants_attentions else num_layers,
            return_dict=True,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        grid = output.patch_grid.shape[1:3]
        tokens = [self.split_tokens(output.hidden_states[stage], grid) for stage in stages]
        if not wants_states:
            output.hidden_states = None
        return output, tokens

    def _answer(self, kind: type, output: ModelOutput, return_dict: bool | None, **fields) -> ModelOutput | tuple:
        """Output of a head: its own fields, and the hidden states and attentions that the caller requested. A loss
        includes what halting tokens cost."""
        names = {"hidden_states", "attentions", "reduction"} & set(kind.__dataclass_fields__)
        fields |= {name: getattr(output, name) for name in names}
        cost = getattr(output.reduction, "loss", None)
        # CODEPATH: A-ViT; else all others.
        if cost is not None and fields.get("loss") is not None:
            fields["loss"] = fields["loss"] + cost
        return self._as_asked(kind(**fields), return_dict)

    def _as_asked(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list:
        """Names of the parameters that this model does not read. Distributed data parallel training would wait for
        their gradients; other models of the checkpoint need them. Freezing is no alternative: from transformers 5.0
        on, loading resets `requires_grad`."""
        unread = tuple(f"vitreg.{part}" for part in self._unread_parts())
        return [name for name, _ in self.named_parameters() if name.startswith(unread)] if unread else []

    def _unread_parts(self) -> list:
        """Name prefixes of the parameters of the base model that this model does not read."""
        return []

    def _parts_behind(self, stages: list, *, reads_final_norm: bool) -> list:
        """Name prefixes of the parameters that a head on these stages does not read."""
        parts = [f"layers.{number}." for number in range(max(stages), self.config.num_hidden_layers)]
        parts.append("attention_pooling.")
        # CODEPATH: timm's gap models norm the pooled vector.
        return parts + ([] if reads_final_norm and not self.config.has_pooled_norm else ["layernorm."])

    def _may_check_values(self, labels: Tensor) -> bool:
        """Whether to check the values of labels: always on a CPU, and once on an accelerator, because the check waits
        for the device; never for labels without values."""
        if not has_values(labels):
            return False
        is_first, self._has_checked_labels = not self._has_checked_labels, True
        return is_first or labels.device.type == "cpu"

    def _check_class_numbers(self, name: str, labels: Tensor, *, ignored: int) -> Tensor:
        """Class numbers as int64, after a check of their type and range."""
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"{name} have the dtype {labels.dtype}, expected integers, the numbers of classes")
        num_labels = self.config.num_labels
        if self._may_check_values(labels):
            numbers = labels[labels != ignored]
            if numbers.numel() and not 0 <= numbers.min() <= numbers.max() < num_labels:
                raise ValueError(
                    f"{name} lie between {numbers.min()} and {numbers.max()}, expected 0 to {num_labels - 1}: "
                    f"{num_labels} is `config.num_labels`, and {ignored} marks what does not count"
                )
        return labels.long()


def mean_loss(total: Tensor, count: Tensor | int) -> Tensor:
    """Divide a sum of losses by their number. Without any loss the result is zero with a zero gradient, not NaN."""
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, C) and class numbers (B,), where -100 is ignored, or probabilities (B, C)."""
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return mean_loss(total, len(labels) if labels.is_floating_point() else (labels != -100).sum())


# ------------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------------


class ViTWithRegistersModel(ViTWithRegistersPreTrainedModel):
    """Images to named tokens.

    Args:
        config: the architecture.
        use_mask_token: own a mask token; default `config.has_mask_token`.
        use_projection: own the projection of `config.projection_size`. Heads do not read it.

    Example:
        >>> tokens = ViTWithRegistersModel(ViTWithRegistersConfig())(torch.rand(1, 3, 224, 224))
        >>> tokens.cls_token.shape, tokens.register_tokens.shape, tokens.patch_grid.shape
        (torch.Size([1, 768]), torch.Size([1, 4, 768]), torch.Size([1, 14, 14, 768]))
    """

    _auto_class = "AutoModel"

    def __init__(
        self, config: ViTWithRegistersConfig, use_mask_token: bool | None = None, use_projection: bool = True
    ):
        super().__init__(config)
        use_mask_token = config.has_mask_token if use_mask_token is None else use_mask_token
        self.embeddings = ViTWithRegistersEmbeddings(config, use_mask_token=use_mask_token)
        self.pre_layernorm = nn.Identity()
        # CODEPATH: CLIP.
        if config.has_pre_norm:
            self.pre_layernorm = make_norm(config)
        layer_class = LAYER_CLASSES[config.reduction and config.reduction["kind"]]
        self.layers = nn.ModuleList(
            layer_class(config, rate, config.register_neurons.get(str(number)), number=number)
            for number, rate in enumerate(config.drop_path_rates, start=1)
        )
        # CODEPATH: all but RADIO and PE spatial.
        self.layernorm = make_norm(config) if config.has_final_norm else nn.Identity()
        self.track_positions = make_tracker(config)
        self.rotary_frequencies = self.position_bias = self.attention_pooling = None
        # CODEPATH: RoPE-ViT, mixed.
        if config.rope_style == "mixed":
            self.rotary_frequencies = ViTWithRegistersRotaryFrequencies(config)
        # CODEPATH: BEiT before fine-tuning.
        if config.relative_position_bias == "shared":
            self.position_bias = ViTWithRegistersPositionBias(config)
        # CODEPATH: SigLIP, Perception Encoder, AIMv2.
        if config.pooling == "attention":
            self.attention_pooling = ViTWithRegistersAttentionPooling(config)
        self.projection = None
        # CODEPATH: CLIP.
        if use_projection and config.projection_size is not None:
            self.projection = nn.Linear(config.pooled_size, config.projection_size, bias=False)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool | int | list | None = None,
        output_attentions: bool | None = None,
        output_pre_norm: bool = False,
        num_layers: int | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> ViTWithRegistersModelOutput | tuple:
        """Encode images.

        Args:
            pixel_values: (B, C, height, width), normalised by the image processor; sides are multiples of the patch.
            bool_masked_pos: (B, P) or (B, rows, columns), true where a patch is replaced by the mask token.
            output_hidden_states: True for all, or layer numbers: 0 is the input of the first layer, i the output of
                layer i, and negative numbers count from the end. Other entries of the output are None.
            output_attentions: return probabilities, computed eagerly with any attention implementation.
            output_pre_norm: return the tokens before the final norm too.
            num_layers: run only the first layers; all tokens are then those of layer `num_layers`.
            return_dict: False for a tuple.
            interpolate_pos_encoding: False refuses images of other sizes than `config.image_size`.

        Raises:
            ValueError: images of the wrong shape, size or type, a mask that does not fit, or no such layer.
        """
        if pixel_values is None:
            raise ValueError("expected `pixel_values`, images of shape (batch, channels, height, width), got None")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        num_layers = len(self.layers) if num_layers is None else num_layers
        if not 0 <= num_layers <= len(self.layers):
            raise ValueError(f"expected num_layers from 0 to {len(self.layers)}, got {num_layers}")
        if interpolate_pos_encoding is False:
            self._check_native_size(pixel_values)
        wanted = self._wanted_states(output_hidden_states, num_layers)
        hidden_state, rotary, grid = self.embed(pixel_values, bool_masked_pos)
        hidden_states, attentions = [hidden_state if 0 in wanted else None], []
        for number, layer in zip(range(1, num_layers + 1), self.layers):
            if output_attentions:
                hidden_state, probabilities = layer.forward_with_attentions(hidden_state, rotary)
                attentions.append(probabilities)
            else:
                hidden_state = layer(hidden_state, rotary)
            hidden_states.append(hidden_state if number in wanted else None)
        normed = self.norm_tokens(hidden_state)
        tokens = self.split_tokens(normed, grid)
        pooled = self.pool(tokens)
        output = ViTWithRegistersModelOutput(
            last_hidden_state=normed,
            pooler_output=pooled,
            image_embeds=None if self.projection is None else self.projection(pooled),
            hidden_states=tuple(hidden_states) if wanted else None,
            attentions=tuple(attentions) if output_attentions else None,
            pre_norm=self.split_tokens(hidden_state, grid) if output_pre_norm else None,
            reduction=getattr(rotary, "output", None),
            **{name: getattr(tokens, name) for name in _NAMED_TOKENS},
        )
        return self._as_asked(output, return_dict)

    def _check_native_size(self, pixel_values: Tensor) -> None:
        if self.embeddings.grid_of(pixel_values) != self.config.grid_shape:
            raise ValueError(
                f"got images of {tuple(pixel_values.shape[2:])} pixels, expected {self.config.image_size} because of "
                "interpolate_pos_encoding=False: leave it out to resize the positions to the images"
            )

    def embed(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> tuple:
        """The input of the first layer (B, N, D), what the layers need to know of the positions, and the grid.

        Layers need the tables of a rotary embedding, or the grid or the values of a relative position bias, or None;
        with token reduction, the record of what becomes of the patches.
        """
        hidden_state = self.pre_layernorm(self.embeddings(pixel_values, bool_masked_pos))
        grid = self.embeddings.grid_of(pixel_values)
        rotary = None
        # CODEPATH: DINOv3, CAPI, EVA-02, Perception Encoder, RoPE-ViT.
        if self.config.has_rope:
            frequencies = None if self.rotary_frequencies is None else self.rotary_frequencies.weight
            options = {"training": self.training, "device": hidden_state.device, "frequencies": frequencies}
            rotary = rotary_angles(self.config, grid, **options)
        # CODEPATH: BEiT, data2vec.
        elif self.config.relative_position_bias is not None:
            rotary = grid if self.position_bias is None else self.position_bias(grid)
        return hidden_state, self.track_positions(rotary, grid), grid

    def norm_tokens(self, hidden_state: Tensor) -> Tensor:
        """Apply the final norm, unless the model norms the pooled vector instead."""
        # CODEPATH: timm's gap models; else all others.
        return hidden_state if self.config.has_pooled_norm else self.layernorm(hidden_state)

    def pool(self, tokens: ViTWithRegistersTokens) -> Tensor:
        """One vector per image, (B, D) or (B, 2 D), from normed tokens, according to `config.pooling`."""
        # CODEPATH: ViT, DINO, DINOv3, CLIP.
        if self.config.pooling == "cls":
            return tokens.cls_token
        # CODEPATH: distilled DeiT.
        if self.config.pooling == "cls_distillation":
            return (tokens.cls_token + tokens.distillation_token) / 2
        # CODEPATH: SigLIP, Perception Encoder, AIMv2.
        if self.config.pooling == "attention":
            return self.attention_pooling(tokens.hidden_state)
        # CODEPATH: LocAtViT.
        if self.config.pooling == "prr":
            return self._refine(tokens.hidden_state)
        # CODEPATH: Pixio; RADIO.
        if self.config.pooling in ("cls_average", "cls_concat"):
            cls_tokens = tokens.hidden_state[:, self.config.token_slices["cls"]]
            # CODEPATH: Pixio; else RADIO.
            if self.config.pooling == "cls_average":
                return cls_tokens.mean(dim=1)
            chosen = self.config.pooled_cls_tokens
            return (cls_tokens if chosen is None else cls_tokens[:, chosen]).flatten(1)
        mean = tokens.patch_tokens.mean(dim=1)
        # CODEPATH: linear heads of DINOv2; else MAE, CAPI, timm's gap models.
        if self.config.pooling == "cls_mean":
            return torch.cat([tokens.cls_token, mean], dim=-1)
        # CODEPATH: MAE fine-tuned, timm's gap models; else CAPI.
        return self.layernorm(mean) if self.config.has_pooled_norm else mean

    def _refine(self, hidden_state: Tensor) -> Tensor:
        """Attention with tokens (B, N, D) as queries, keys and values; then the class token, or the mean: (B, D)."""
        heads = hidden_state.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)  # [B, H, N, d]
        # CODEPATH: models with a class token, which alone asks; else all tokens ask.
        queries = heads[:, :, :1] if self.config.has_cls_token else heads
        return F.scaled_dot_product_attention(queries, heads, heads).mean(dim=2).flatten(1)

    def prefix_attention(self, pixel_values: Tensor, layers: list) -> tuple[dict, tuple]:
        """Attention probabilities (B, H, prefix, N) of some layers by number, 1 ... L, and the grid."""
        hidden_state, rotary, grid = self.embed(pixel_values)
        probabilities = {}
        for number, layer in zip(range(1, max(layers) + 1), self.layers):
            if number in layers:
                probabilities[number] = layer.prefix_attention(hidden_state, rotary, self.config.num_prefix_tokens)
            if number < max(layers):
                hidden_state = layer(hidden_state, rotary)
        return probabilities, grid

    def _wanted_states(self, output_hidden_states: bool | int | list | None, num_layers: int) -> list:
        states = range(num_layers + 1)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if isinstance(output_hidden_states, bool):
            return list(states) if output_hidden_states else []
        numbers = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
        if any(not -len(states) <= number < len(states) for number in numbers):
            raise ValueError(f"expected hidden states from {-len(states)} to {len(states) - 1}, got {numbers}")
        return [states[number] for number in numbers]


class ViTWithRegistersForImageClassification(ViTWithRegistersPreTrainedModel):
    """One linear classifier on the pooled tokens, or DeiT's two on class and distillation token."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__(config)
        self.vitreg = ViTWithRegistersModel(config, use_mask_token=False, use_projection=False)
        size = config.pooled_size + (config.num_classifier_layers - 1) * config.hidden_size
        self.classifier = self._make_classifier(size)
        self.distillation_classifier = None
        # CODEPATH: distilled DeiT.
        if config.pooling == "cls_distillation":
            self.distillation_classifier = self._make_classifier(size)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        teacher_classes: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> ViTWithRegistersClassifierOutput | tuple:
        """Classify images.

        Args:
            pixel_values: (B, C, height, width).
            labels: (B,) class numbers, -100 where there is none; or (B, classes), and then `config.problem_type` says
                what they are: "single_label_classification" (probabilities, as of mixup), "multi_label_classification"
                (0 or 1 each) or "regression". With one class, (B,) or (B, 1) numbers to predict. With two classifiers
                the loss is the mean of theirs.
            teacher_classes: (B,) classes that a teacher predicts; in a distilled model they take the place of `labels`
                for the second classifier (Touvron et al. 2021, hard distillation).
            output_hidden_states, output_attentions, return_dict, interpolate_pos_encoding: as in
                `ViTWithRegistersModel`.

        Raises:
            ValueError: labels that fit neither the batch and the number of classes nor the type of the problem.
        """
        depth, num_layers = self.config.num_hidden_layers, self.config.num_classifier_layers
        output, earlier = self._encode(
            pixel_values,
            stages=range(depth - num_layers + 1, depth),  # stages before the last, which the pooled vector has
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        cls_logits = distillation_logits = None
        if self.distillation_classifier is None:
            cls_tokens = [self.vitreg.norm_tokens(tokens.cls_token) for tokens in earlier]
            logits = self.classifier(torch.cat([*cls_tokens, output.pooler_output], dim=-1))
            if teacher_classes is not None:
                raise ValueError("teacher_classes need a second classifier: set pooling='cls_distillation'")
        else:
            cls_logits = self.classifier(output.cls_token)
            distillation_logits = self.distillation_classifier(output.distillation_token)
            logits = (cls_logits + distillation_logits) / 2
        loss = None
        if labels is not None:
            loss = self._loss("labels", labels, logits if cls_logits is None else cls_logits)
            if distillation_logits is not None:
                name, targets = ("labels", labels) if teacher_classes is None else ("teacher_classes", teacher_classes)
                loss = (loss + self._loss(name, targets, distillation_logits)) / 2
        return self._answer(
            ViTWithRegistersClassifierOutput,
            output,
            return_dict,
            loss=loss,
            logits=logits,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
        )

    def _make_classifier(self, size: int, kind: type[nn.Linear] = nn.Linear) -> nn.Module:
        if self.config.num_labels == 0:
            return nn.Identity()
        classifier = kind(size, self.config.num_labels)
        classifier.is_zero_initialized = self.config.has_zero_init_classifier
        return classifier

    def _loss(self, name: str, labels: Tensor, logits: Tensor) -> Tensor:
        if self.config.num_labels == 0:
            raise ValueError(f"{name} need a classifier, but `config.num_labels` is 0")
        kind = self._problem_type(name, labels, logits.shape)
        if kind == "single_label_classification":
            if labels.ndim == 1:
                return classification_loss(logits, self._check_class_numbers(name, labels, ignored=-100))
            return classification_loss(logits, labels.float())
        labels = labels.reshape(logits.shape).float()
        if kind == "regression":
            return mean_loss(F.mse_loss(logits.float(), labels, reduction="sum"), labels.numel())
        if self._may_check_values(labels) and not ((labels >= 0) & (labels <= 1)).all():
            raise ValueError(
                f"{name} lie between {labels.min()} and {labels.max()}, expected 0 or 1 for each class: "
                "problem_type is 'multi_label_classification'"
            )
        return mean_loss(F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum"), labels.numel())

    def _problem_type(self, name: str, labels: Tensor, shape: tuple) -> str:
        """Problem type from the configuration, or from the labels; it is not stored, unlike in transformers."""
        kind, num_labels = self.config.problem_type, self.config.num_labels
        if labels.shape not in (shape[:1], shape):
            raise ValueError(
                f"{name} have shape {tuple(labels.shape)}, expected {tuple(shape[:1])} class numbers or "
                f"{tuple(shape)} targets: {num_labels} is `config.num_labels`"
            )
        if kind is None and num_labels == 1:
            return "regression"
        if kind is None and labels.ndim == 1:
            return "single_label_classification"
        if kind is None:
            raise ValueError(
                f"{name} of shape {tuple(labels.shape)} may be several things: set `config.problem_type` to "
                "'single_label_classification' (probabilities of the classes, as of mixup), "
                "'multi_label_classification' (0 or 1 for each class) or 'regression'"
            )
        if kind != "single_label_classification" and labels.ndim == 1 and num_labels > 1:
            raise ValueError(
                f"{name} have shape {tuple(labels.shape)}, but problem_type={kind!r} needs {tuple(shape)}"
            )
        return kind


class ViTWithRegistersForMaskedImageModeling(ViTWithRegistersPreTrainedModel):
    """Predict masked patches with one linear layer: their pixels (SimMIM, Xie et al. 2021) or a teacher's features."""

    _auto_class = "AutoModelForMaskedImageModeling"

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__(config)
        self.vitreg = ViTWithRegistersModel(config, use_mask_token=True, use_projection=False)
        size = config.masked_target_size
        # CODEPATH: SimMIM; else features of a teacher.
        if config.masked_target == "pixels":
            size = config.num_channels * math.prod(config.patch_shape)
        self.decoder = nn.Linear(config.hidden_size, size)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        target_features: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> MaskedImageModelingOutput | tuple:
        """Reconstruct masked patches.

        Args:
            pixel_values: (B, C, height, width).
            bool_masked_pos: (B, P) or (B, rows, columns), true where a patch is masked.
            target_features: (B, P, target width), for masked_target "features".
            output_hidden_states, output_attentions, return_dict, interpolate_pos_encoding: as in
                `ViTWithRegistersModel`.

        Returns:
            `reconstruction` is images (B, C, height, width) or features (B, P, target width). `loss`, over masked
            patches, is the mean absolute error of pixels, or one minus the cosine similarity to the target features.
            Without a mask, all patches count for features, and there is no loss for pixels.

        Raises:
            ValueError: a mask or target that does not fit.
        """
        output, _ = self._encode(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        predicted = self.decoder(output.patch_tokens)
        # CODEPATH: SimMIM; else features of a teacher.
        if self.config.masked_target == "pixels":
            if target_features is not None:
                raise ValueError("target_features need masked_target='features' in the configuration")
            errors = None if bool_masked_pos is None else (predicted - self.patchify(pixel_values)).abs().mean(-1)
            reconstruction = self.unpatchify(predicted, output.patch_grid.shape[1:3])
        else:
            errors = None if target_features is None else self._feature_errors(predicted, target_features)
            reconstruction = predicted
        loss = None
        if errors is not None:
            mask = errors.new_ones(errors.shape) if bool_masked_pos is None else bool_masked_pos.flatten(1)
            loss = mean_loss((errors * mask).sum(), mask.sum())
        return self._answer(MaskedImageModelingOutput, output, return_dict, loss=loss, reconstruction=reconstruction)

    def patchify(self, images: Tensor) -> Tensor:
        """Images (B, C, height, width) to patches (B, P, C x rows x columns of a patch)."""
        return F.unfold(images, self.config.patch_shape, stride=self.config.patch_shape).transpose(1, 2)

    def unpatchify(self, patches: Tensor, grid: tuple) -> Tensor:
        """Undo `patchify`."""
        sizes = tuple(side * patch for side, patch in zip(grid, self.config.patch_shape))
        return F.fold(patches.transpose(1, 2), sizes, self.config.patch_shape, stride=self.config.patch_shape)

    def _check_channels(self, num_channels: int) -> None:
        if self.config.masked_target == "pixels" and num_channels != self.config.num_channels:
            raise ValueError(
                f"this model predicts pixels of {self.config.num_channels} channels: for {num_channels} make a new "
                f"model from a configuration with num_channels={num_channels}"
            )

    def _unread_parts(self) -> list:
        # CODEPATH: timm's gap models.
        return ["attention_pooling."] + (["layernorm."] if self.config.has_pooled_norm else [])

    def _feature_errors(self, predicted: Tensor, target: Tensor) -> Tensor:
        if target.shape != predicted.shape:
            raise ValueError(
                f"target_features have shape {tuple(target.shape)}, expected {tuple(predicted.shape)}: the width is "
                f"`config.masked_target_size`"
            )
        return 1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1)


def segment_patches(patches: Tensor, norm: nn.Module, classifier: nn.Module) -> Tensor:
    """Scores (B, classes, rows, columns) of patches (B, rows, columns, D)."""
    return classifier(norm(patches.permute(0, 3, 1, 2)))


class LinearSegmentationHead(nn.Module):
    """DINOv2's linear head of segmentation, on its own: batch norm and a 1 x 1 convolution."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        """Scores (B, classes, height, width) of pixels from normed patches (B, rows, columns, D)."""
        scores = segment_patches(patches, self.norm, self.classifier).float()
        return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


class ViTWithRegistersForSemanticSegmentation(ViTWithRegistersPreTrainedModel):
    """DINOv2's linear head: batch norm and a 1 x 1 convolution on the normed patches of `config.out_indices`."""

    _auto_class = "AutoModelForSemanticSegmentation"
    _image_processor_type = "SegformerImageProcessor"

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__(config)
        self.vitreg = ViTWithRegistersModel(config, use_mask_token=False, use_projection=False)
        head = LinearSegmentationHead(config.hidden_size * len(config.out_indices), config.num_labels)
        self.segmentation_norm, self.segmentation_classifier = head.norm, head.classifier
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> ViTWithRegistersSegmenterOutput | tuple:
        """Classify every patch.

        Args:
            pixel_values: (B, C, height, width).
            labels: (B, height, width) class numbers, `config.semantic_loss_ignore_index` where there is none.
            output_hidden_states, output_attentions, return_dict, interpolate_pos_encoding: as in
                `ViTWithRegistersModel`.

        Returns:
            `logits` (B, classes, rows, columns), one a patch; the processor's `post_process_semantic_segmentation`
            brings them to the size of the image, as the loss does.

        Raises:
            ValueError: labels of another size than the images, or of a class that does not exist.
        """
        output, stages = self._encode(
            pixel_values,
            stages=self.config.out_indices,
            num_layers=max(self.config.out_indices),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        patches = torch.cat([self.vitreg.norm_tokens(tokens.patch_grid) for tokens in stages], dim=-1)
        logits = segment_patches(patches, self.segmentation_norm, self.segmentation_classifier)
        loss = None
        if labels is not None:
            _check_map(labels, pixel_values)
            ignored = self.config.semantic_loss_ignore_index
            labels = self._check_class_numbers("labels", labels, ignored=ignored)
            scores = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
            total = F.cross_entropy(scores, labels, ignore_index=ignored, reduction="sum")
            loss = mean_loss(total, (labels != ignored).sum())
        return self._answer(ViTWithRegistersSegmenterOutput, output, return_dict, loss=loss, logits=logits)

    def _unread_parts(self) -> list:
        return self._parts_behind(self.config.out_indices, reads_final_norm=True)


def expect_depth(scores: Tensor, size: tuple[int, int], *, min_depth: float, max_depth: float) -> Tensor:
    """Expected depth (B, height, width) in metres, of scores (B, bins, rows, columns) of evenly spaced depths.

    DINOv2 enlarges the features four times and then convolves; the two commute, and 256 bins are fewer than the
    channels, so the scores are enlarged in their place.
    """
    scores = F.interpolate(scores.float(), scale_factor=4, mode="bilinear", align_corners=False).relu() + 0.1
    bins = torch.linspace(min_depth, max_depth, scores.shape[1], device=scores.device)
    depth = torch.einsum("bkhw,k->bhw", scores / scores.sum(dim=1, keepdim=True), bins)
    return F.interpolate(depth[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


class LinearDepthHead(nn.Module):
    """DINOv2's linear head of depth, on its own: a 1 x 1 convolution to bins, and the expected depth."""

    def __init__(self, width: int, *, num_bins: int, min_depth: float, max_depth: float):
        super().__init__()
        self.min_depth, self.max_depth = min_depth, max_depth
        self.classifier = nn.Conv2d(width, num_bins, kernel_size=1)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Depth (B, height, width) in metres from features (B, rows, columns, D)."""
        scores = self.classifier(features.permute(0, 3, 1, 2))
        return expect_depth(scores, size, min_depth=self.min_depth, max_depth=self.max_depth)


class ViTWithRegistersForDepthEstimation(ViTWithRegistersPreTrainedModel):
    """DINOv2's linear depth head: patches, before the final norm, and class token of `config.out_indices` choose among
    bins of depth; the prediction is the expected depth."""

    _auto_class = "AutoModelForDepthEstimation"
    _image_processor_type = "DPTImageProcessor"

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__(config)
        self.vitreg = ViTWithRegistersModel(config, use_mask_token=False, use_projection=False)
        size = config.hidden_size * (1 + config.has_cls_token) * len(config.out_indices)
        self.depth_classifier = nn.Conv2d(size, config.num_depth_bins, kernel_size=1)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> ViTWithRegistersDepthOutput | tuple:
        """Estimate depth.

        Args:
            pixel_values: (B, C, height, width).
            labels: (B, height, width) depth in metres; values outside (0, `config.max_depth`] do not count.
            output_hidden_states, output_attentions, return_dict, interpolate_pos_encoding: as in
                `ViTWithRegistersModel`.

        Returns:
            `predicted_depth` (B, height, width) in metres, in float32.

        Raises:
            ValueError: labels of another size than the images, or in another unit: none of them counts, and the
                median lies more than ten times beyond `config.max_depth`.
        """
        output, stages = self._encode(
            pixel_values,
            stages=self.config.out_indices,
            num_layers=max(self.config.out_indices),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        features = torch.cat([_join_cls_token(tokens.patch_grid, tokens.cls_token) for tokens in stages], dim=-1)
        depth = expect_depth(
            self.depth_classifier(features.permute(0, 3, 1, 2)),
            pixel_values.shape[2:],
            min_depth=self.config.min_depth,
            max_depth=self.config.max_depth,
        )
        loss = None
        if labels is not None:
            _check_map(labels, pixel_values)
            self._check_unit(labels)
            loss = scale_invariant_loss(depth, labels, max_depth=self.config.max_depth)
        return self._answer(ViTWithRegistersDepthOutput, output, return_dict, loss=loss, predicted_depth=depth)

    def _check_unit(self, labels: Tensor) -> None:
        limit = self.config.max_depth
        if not self._may_check_values(labels):
            return
        known = labels[(labels > 0) & labels.isfinite()]
        if known.numel() and known.min() > limit and known.median() > 10 * limit:
            raise ValueError(
                f"no depth in labels counts: they lie between {known.min():g} and {known.max():g}, and "
                f"`config.max_depth` is {limit:g} metres: scale them to metres, or set max_depth"
            )

    def _unread_parts(self) -> list:
        return self._parts_behind(self.config.out_indices, reads_final_norm=False)


def _join_cls_token(patches: Tensor, cls_token: Tensor | None) -> Tensor:
    """Each patch (B, rows, columns, D) beside the class token (B, D), if there is one: (B, rows, columns, 2 D)."""
    if cls_token is None:
        return patches
    return torch.cat([patches, cls_token[:, None, None].expand_as(patches)], dim=-1)


def scale_invariant_loss(depth: Tensor, target: Tensor, *, max_depth: float) -> Tensor:
    """Scale-invariant loss of depth (Eigen et al. 2014; AdaBins, DINOv2), over pixels 0 < target <= max_depth.

    sqrt(variance of g + 0.15 (mean of g)^2), g = log(depth + 0.001) - log(target + 0.001), unbiased variance
    """
    is_valid = (target > 0) & (target <= max_depth)
    count = is_valid.sum()
    error = torch.log(depth.float() + 1e-3) - torch.log(target.float().clamp(min=0) + 1e-3)
    error = torch.where(is_valid, error, 0.0)
    mean = mean_loss(error.sum(), count)
    variance = mean_loss(torch.where(is_valid, (error - mean).square(), 0.0).sum(), count - 1)
    return (variance + 0.15 * mean.square()).clamp(min=1e-12).sqrt()  # the root of zero has no gradient


class ViTWithRegistersBackbone(BackboneMixin, ViTWithRegistersPreTrainedModel):
    """Feature maps for detection and segmentation frameworks. Registers never appear in them."""

    _auto_class = "AutoBackbone"

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__(config)
        set_up_backbone(self, config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.vitreg = ViTWithRegistersModel(config, use_mask_token=False, use_projection=False)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> BackboneOutput | tuple:
        """Feature maps of the stages in `out_features`, each (B, D, rows, columns), or with
        `config.reshape_hidden_states` false (B, 1 + P, D), class token and patches, as DPT reads them."""
        numbers = self._stage_numbers()
        output, stages = self._encode(
            pixel_values,
            stages=numbers,
            num_layers=max(numbers),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        feature_maps = tuple(self._feature_map(tokens) for tokens in stages)
        return self._answer(BackboneOutput, output, return_dict, feature_maps=feature_maps)

    def _stage_numbers(self) -> list:
        return [self.stage_names.index(name) for name in self.out_features]

    def _unread_parts(self) -> list:
        return self._parts_behind(self._stage_numbers(), reads_final_norm=self.config.apply_layernorm)

    def _feature_map(self, tokens: ViTWithRegistersTokens) -> Tensor:
        # CODEPATH: all families; else as DPT was trained.
        norm = self.vitreg.norm_tokens if self.config.apply_layernorm else nn.Identity()
        # CODEPATH: UperNet, detectors; else DPT.
        if self.config.reshape_hidden_states:
            return norm(tokens.patch_grid).permute(0, 3, 1, 2).contiguous()
        prefix = [] if tokens.cls_token is None else [tokens.cls_token[:, None]]
        return norm(torch.cat([*prefix, tokens.patch_tokens], dim=1))


def _check_map(labels: Tensor, pixel_values: Tensor) -> None:
    expected = (pixel_values.shape[0], *pixel_values.shape[2:])
    if labels.shape != expected:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected {tuple(expected)} like the images")


AUTO_MODELS = (
    ViTWithRegistersModel,
    ViTWithRegistersForImageClassification,
    ViTWithRegistersForMaskedImageModeling,
    ViTWithRegistersForSemanticSegmentation,
    ViTWithRegistersForDepthEstimation,
    ViTWithRegistersBackbone,
)

__all__ = [
    "ViTWithRegistersAttentionMaps",
    "ViTWithRegistersBackbone",
    "ViTWithRegistersClassifierOutput",
    "ViTWithRegistersForDepthEstimation",
    "ViTWithRegistersForImageClassification",
    "ViTWithRegistersForMaskedImageModeling",
    "ViTWithRegistersForSemanticSegmentation",
    "ViTWithRegistersModel",
    "ViTWithRegistersModelOutput",
    "ViTWithRegistersPreTrainedModel",
    "ViTWithRegistersTokens",
]
