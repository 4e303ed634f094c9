"""Norms of tokens before the final layer norm, and the one definition of an outlier.

An outlier is a patch whose norm is above a multiple of the median of its layer. The median is stable as long as fewer
than half of the patches are outliers, so the rule tells whether a model has outliers, and how many. A percentile marks
the same share of every model, mean plus standard deviations moves with the outliers, and a fixed norm cannot be
transferred between models.

Letters for shapes: L layers, B images, P patches, R registers, D width.

Source: Darcet et al. 2024, arXiv 2309.16588, section 2.1: artifacts are tokens of large norm at the output.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeling_vitreg import ViTWithRegistersPreTrainedModel
from modeling_vitreg.features.parts import as_sequence
from modeling_vitreg.modes import eval_mode


OUTLIER_MULTIPLE = 3.0  # of the median
QUANTILES = {"median": 0.5, "q90": 0.9, "q99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class TokenNorms:
    """L2 norms of the output of every layer, before the final layer norm, in float32 and on the device of the model.

    Args:
        patches: (L, B, P), row by row.
        registers: (L, B, R), or None for a model without registers.
        cls: (L, B), or None for a model without a class token.
        first_layer: number of the first of these layers; above 1 in hierarchical models.
    """

    patches: Tensor
    registers: Tensor | None = None
    cls: Tensor | None = None
    first_layer: int = 1


@torch.no_grad()
def token_norms(model: ViTWithRegistersPreTrainedModel, pixel_values: Tensor) -> TokenNorms:
    """Norms of the tokens of each layer, computed in evaluation mode; the modes of all modules are restored.

    All layers are in memory at once, (L + 1) x B x N x D numbers, so use small batches. Of a hierarchical model these
    are the layers on its last grid.

    Args:
        model: with or without a head.
        pixel_values: (B, C, height, width), normalised by the image processor.

    Raises:
        ValueError: images that do not fit the model.
    """
    encoder = model.base_model
    with eval_mode(model):
        output = encoder(pixel_values, output_hidden_states=True, return_dict=True)
    grid = output.patch_grid.shape[1:3]
    *states, last = output.hidden_states[1:]
    states = [state for state in states if state.shape == last.shape] + [last]
    layers = [encoder.split_tokens(as_sequence(state, grid=grid), grid) for state in states]
    has_registers, has_cls = model.config.num_register_tokens > 0, model.config.has_cls_token
    return TokenNorms(
        patches=_norms([layer.patch_tokens for layer in layers]),
        registers=_norms([layer.register_tokens for layer in layers]) if has_registers else None,
        cls=_norms([layer.cls_token for layer in layers]) if has_cls else None,
        first_layer=len(output.hidden_states) - len(states),
    )


def _norms(layers: list) -> Tensor:
    # float32 before the square: half precision overflows at a norm of 256, well below that of known outliers.
    return torch.stack([tokens.float().norm(dim=-1) for tokens in layers])


def outlier_threshold(norms: Tensor, *, multiple: float = OUTLIER_MULTIPLE) -> float:
    """The norm above which a patch is an outlier: `multiple` times the median.

    Args:
        norms: patch norms of one layer, any shape; the more images, the better the median.
        multiple: multiple of the median, above 1.

    Returns:
        Threshold in units of the residual stream; it is valid for this layer of this model only.

    Raises:
        ValueError: norms that are empty, not finite or half of them zero, or a multiple that is not above 1.
    """
    if not multiple > 1:
        raise ValueError(
            f"expected a multiple of the median above 1, got {multiple}: below, most patches are outliers"
        )
    return multiple * _quantiles(norms)["median"]


def outlier_share(norms: Tensor, *, threshold: float) -> float:
    """Share of patches, from 0 to 1, whose norm is above `threshold`.

    Args:
        norms: patch norms of one layer, any shape.
        threshold: in units of the residual stream, from `outlier_threshold`.

    Raises:
        ValueError: no norms, or a threshold that is not positive.
    """
    if not norms.numel():
        raise ValueError(f"expected the norm of at least one patch, got shape {tuple(norms.shape)}")
    if not threshold > 0:
        raise ValueError(f"expected a threshold above 0, got {threshold}: take it from `outlier_threshold`")
    return (norms > threshold).sum().item() / norms.numel()


def summarise_norms(norms: TokenNorms) -> dict:
    """Numbers for the log of a training run, layer by layer; all are plain JSON values.

    Returns:
        `num_images`, `num_patches` (of an image), `multiple`, and `layers`: for each its `layer` from 1 on, quantiles
        `median`, `q90`, `q99`, `max` of patch norms, `max_over_median`, `outlier_share` above `multiple` times its own
        median, `cls` (mean norm, or None) and `registers` (mean norm of each; empty without registers).

    Raises:
        ValueError: norms that are not finite; the message names the layer.
    """
    _, num_images, num_patches = norms.patches.shape
    layers = [_summarise_layer(norms, number) for number in range(len(norms.patches))]
    return {
        "num_images": num_images,
        "num_patches": num_patches,
        "multiple": OUTLIER_MULTIPLE,
        "layers": layers,
    }


def _summarise_layer(norms: TokenNorms, number: int) -> dict:
    patches = norms.patches[number]
    try:
        quantiles = _quantiles(patches)
    except ValueError as error:
        raise ValueError(f"layer {norms.first_layer + number}: {error}") from error
    return {
        "layer": norms.first_layer + number,
        **quantiles,
        "max_over_median": quantiles["max"] / quantiles["median"],
        "outlier_share": outlier_share(patches, threshold=OUTLIER_MULTIPLE * quantiles["median"]),
        "cls": None if norms.cls is None else norms.cls[number].mean().item(),
        "registers": [] if norms.registers is None else norms.registers[number].mean(dim=0).tolist(),  # [B, R] -> [R]
    }


def _quantiles(norms: Tensor) -> dict:
    if not norms.numel() or not norms.isfinite().all():
        raise ValueError(
            f"expected finite norms of at least one patch, got shape {tuple(norms.shape)} with "
            f"{(~norms.isfinite()).sum().item()} that are not finite: the model may have diverged; check its "
            f"training loss"
        )
    # NumPy, for torch.quantile refuses more than 16 million numbers.
    values = np.quantile(norms.detach().double().cpu().numpy(), list(QUANTILES.values()))
    quantiles = dict(zip(QUANTILES, values.tolist()))
    if not quantiles["median"] > 0:
        raise ValueError("expected a median norm above 0, got 0: half of the patches or more are zero vectors")
    return quantiles
