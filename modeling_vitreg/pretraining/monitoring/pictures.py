"""Pictures of evaluation images during a run: attention, norms and components of patches, and predicted maps.

Letters for shapes: B images, P patches, D width.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from torch import Tensor

from modeling_vitreg import ViTWithRegistersPreTrainedModel
from modeling_vitreg.features import load_encoder, principal_colours
from modeling_vitreg.modes import eval_mode
from modeling_vitreg.style import make_cells, save_figure, show_depth, show_image, show_titles


@torch.no_grad()
def draw_attention(
    model: ViTWithRegistersPreTrainedModel,
    images: Tensor,
    path: str | os.PathLike,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> pathlib.Path:
    """Draw one row for each image: image, attention of class token and registers, norms, components; depth if halted.

    Attention is the mean over the heads of the last layer. Each map has its own scale; its text gives the share of the
    attention on patches, and peak over mean (1.0x: uniform). Norms are taken before the final layer norm and share one
    scale; their text gives largest over median. Colours are the first three principal components of the normed patches
    of all images, so that similar patches have similar colours in all rows. The model runs in evaluation mode; the
    mode of each module is restored.

    Args:
        model: with or without a head, a class token, registers, attention; what it lacks has no column.
        images: (B, C, height, width), grey, RGB or RGBA, normalised by `mean` and `std`.
        path: file to write; the suffix chooses the format, PNG without one.
        mean, std: mean and standard deviation of each channel, to show the images as they were.

    Returns:
        The file written.

    Raises:
        ValueError: images or statistics of other channels than 1, 3 and 4, or images that do not fit the model.
    """
    channels = images.shape[1] if images.ndim == 4 else 0
    if channels not in (1, 3, 4) or not len(images) or not len(mean) == len(std) == channels:
        raise ValueError(
            "expected images (batch, 1, 3 or 4 channels, height, width) and a mean and deviation for each channel, "
            f"got {tuple(images.shape)}, {len(mean)} and {len(std)}: take the statistics from the image processor of "
            "the model"
        )
    images = images.to(model.device)
    with eval_mode(model):
        attention = _attention_of_last_layer(model, images)
        tokens = model.base_model(images, output_pre_norm=True, return_dict=True)
    norms = tokens.pre_norm.patch_grid.float().norm(dim=-1).cpu()  # [B, rows, columns, D] -> [B, rows, columns]
    colours = principal_colours(tokens.patch_grid).numpy()
    pictures = _unnormalise(images, mean, std)

    depth = getattr(getattr(tokens, "reduction", None), "halting_depth", None)
    place = len(attention) + 1  # of the norms
    figure, axes = make_cells(len(images), place + 2 + (depth is not None), aspect=images.shape[2] / images.shape[3])
    for row, axs in enumerate(axes):
        show_image(axs[0], pictures[row])
        for ax, values in zip(axs[1:], attention.values()):
            values = values[row].float().cpu().numpy()
            peak = values.max() / max(values.mean(), 1e-30)
            show_image(ax, values, cmap="magma", text=f"{values.sum():.0%}, peak {peak:.1f}x")
        text = f"{norms[row].max() / norms[row].median():.1f}x"
        show_image(axs[place], norms[row].numpy(), cmap="viridis", vmin=norms.min(), vmax=norms.max(), text=text)
        show_image(axs[place + 1], colours[row])
        if depth is not None:
            show_depth(axs[-1], depth[row].cpu().numpy(), num_layers=model.config.num_hidden_layers)
    titles = ["image", *attention, f"norms {norms.min():.3g} to {norms.max():.3g}", "components", "depth"]
    show_titles(axes[0], titles, size=9)
    return save_figure(figure, path, dpi=130)


def _attention_of_last_layer(model: ViTWithRegistersPreTrainedModel, images: Tensor) -> dict[str, Tensor]:
    """Maps (B, rows, columns) of class token and registers, by title; none without them or without attention."""
    encoder = load_encoder(model)
    if not encoder.num_heads or not encoder.num_prefix_tokens:
        return {}
    maps = model.attention_maps(images, layers=-1, average_heads=True)
    attention = {} if maps.cls is None else {"class token": maps.cls[:, 0]}
    for number in range(maps.registers.shape[2]):
        attention[f"register {number + 1}"] = maps.registers[:, 0, number]
    return attention


def draw_maps(
    images: Tensor,
    truth: Tensor,
    predicted: Tensor,
    path: str | os.PathLike,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int | None = None,
) -> pathlib.Path:
    """Draw one row for each image: image, ground truth and prediction.

    Args:
        images: (B, C, height, width), grey, RGB or RGBA, normalised by `mean` and `std`.
        truth, predicted: (B, height, width), class numbers or metres; unknown pixels of the truth are white.
        path: file to write; the suffix chooses the format, PNG without one.
        mean, std: mean and standard deviation of each channel, to show the images as they were.
        num_classes: number of classes; None: depths.

    Returns:
        The file written.

    Raises:
        ValueError: maps of another size than the images.
    """
    expected = (len(images), *images.shape[2:])
    if tuple(truth.shape) != expected or tuple(predicted.shape) != expected:
        raise ValueError(f"expected maps {expected}, got {tuple(truth.shape)} and {tuple(predicted.shape)}")
    pictures, is_depth = _unnormalise(images, mean, std), num_classes is None
    is_known = truth > 0 if is_depth else (truth >= 0) & (truth < num_classes)
    if not is_depth:
        # Neighbouring numbers get colours far from each other.
        places = np.arange(num_classes) * 0.618034 % 1
        scale = {"cmap": ListedColormap(matplotlib.colormaps["turbo"](places)), "vmin": 0, "vmax": num_classes - 1}
    figure, axes = make_cells(len(images), 3, aspect=images.shape[2] / images.shape[3])
    for row, axs in enumerate(axes):
        if is_depth:  # one scale for truth and prediction
            scale = {"cmap": "viridis", "vmin": 0, "vmax": max(truth[row].max().item(), 1e-6)}
        show_image(axs[0], pictures[row])
        text = f"to {scale['vmax']:.3g} m" if is_depth else None
        show_image(axs[1], np.ma.masked_where(~is_known[row].numpy(), truth[row].numpy()), text=text, **scale)
        show_image(axs[2], predicted[row].numpy(), **scale)
    show_titles(axes[0], ("image", "true depth" if is_depth else "true classes", "predicted"), size=9)
    return save_figure(figure, path, dpi=130)


def _unnormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    pixels = (images.float().cpu() * std + mean).clamp(0, 1)[:, :3]  # alpha is not shown
    pixels = pixels.expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).numpy()  # [B, 3, height, width] -> [B, height, width, 3]
