"""One photograph as models see it, in one picture: norms, attention, principal components, and the object of LOST.

look(encoder, image)        what one model makes of one image, as arrays, and one sentence
draw_looks(looks, path)     the picture: one row for each of them
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from modeling_vitreg.analysis.survey import SurveySettings, survey
from modeling_vitreg.analysis.verdict import format_share
from modeling_vitreg.discovery import DiscoverySettings, lost
from modeling_vitreg.discovery.boxes import seed_components
from modeling_vitreg.features import Encoder, extract_many, find_reduction, principal_colours, register_share
from modeling_vitreg.reports import ArtifactReport
from modeling_vitreg.style import make_cells, plain_text, save_figure, show_depth, show_image, show_titles


NUM_REGISTERS = 4  # whose attention is drawn
LEAST_ROWS = 14  # of patches


@dataclass(frozen=True)
class Look:
    """What a model makes of an image. Maps are of the last layer and on the grid of patches.

    Args:
        name: of the model, to draw.
        image: (height, width, 3) as the model reads it, from 0 to 1.
        norms: (rows, columns) of patches before the final norm.
        attention: name of a query, "class token" or "register 1", to its map (rows, columns), mean over heads.
        colours: (rows, columns, 3), principal components of the normed patches.
        mask: (rows, columns), true on the object that LOST finds.
        register_share: share of the update of the class token that comes through registers, see
            `features.register_share`; None where there is none.
        report: of the analysis, with the verdict.
        depth: (rows, columns), layers that each patch runs, in a model whose patches halt; else None.
    """

    name: str
    image: np.ndarray
    norms: np.ndarray
    attention: dict[str, np.ndarray]
    colours: np.ndarray
    mask: np.ndarray
    register_share: float | None
    report: ArtifactReport
    depth: np.ndarray | None = None

    @property
    def sentence(self) -> str:
        """The verdict on this image in one sentence."""
        verdict = self.report.verdict
        parts = [
            f"{self.report.model}: {format_share(verdict['share'])} of the patches of layer {verdict['layer']} are "
            f"outliers (norm above {verdict['threshold']:.4g}), the largest norm of the last layer is "
            f"{self.norms.max() / max(np.median(self.norms), 1e-30):.1f} times the median"
        ]
        if "class token" in self.attention:
            share = self.attention["class token"].sum()
            parts.append(f"the class token puts {format_share(share)} of its attention on patches")
        if self.register_share is not None:
            parts.append(f"{format_share(self.register_share)} of its last update comes through registers")
        return ", and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts) + "."


@torch.no_grad()
def look(encoder: Encoder, image: Image.Image, *, name: str | None = None) -> Look:
    """Look at an image with a model.

    The image is resized and cut to the size of the model, or to the first multiple of it with 14 rows of patches if
    the model takes that. LOST reads the keys of the last layer, as published, or its tokens where not every patch has
    a key. They are centred over the image: models with registers need a bias that differs from model to model
    (Darcet et al. 2024, arXiv 2309.16588), and centred keys need none.

    Args:
        encoder: from `features.load_encoder`.
        image: of any size.
        name: to draw; None: that of the encoder.

    Raises:
        ValueError: an image that the model cannot read, or features that are not finite.
    """
    rows, side = min(encoder.image_size) // max(encoder.patch_shape), min(encoder.image_size)
    side *= -(-LEAST_ROWS // max(rows, 1)) if encoder.takes_any_size else 1
    counts = {"num_images": 1, "batch_size": 1, "num_ablation_images": 0, "num_shown": 1}
    settings = SurveySettings(**counts, image_size=side, has_progress_bar=False)
    report, examples = survey(encoder, [image], settings=settings)
    if not report.layers:
        raise ValueError(f"{encoder.name}: expected finite features, got NaN or infinity: the weights are damaged")
    pixels = encoder.prepare([image], size=side)
    (tokens,) = extract_many(encoder, pixels, wanted=[(encoder.num_layers, "token")])
    try:
        (keys,) = extract_many(encoder, pixels, wanted=[(encoder.num_layers, DiscoverySettings.feature)])
    except (ValueError, RuntimeError):  # windows, or attention of an unknown kind
        keys = tokens
    found = lost(keys, is_centered=True)
    share = register_share(encoder, pixels)
    depth = getattr(find_reduction(encoder, pixels), "halting_depth", None)
    normed = encoder.norm_tokens(tokens.patch_tokens).unflatten(1, tokens.grid)
    return Look(
        name=name or encoder.name,
        image=examples.images[0],
        norms=examples.norms[-1, 0],
        attention={
            query.replace("cls", "class token"): maps[0].mean(axis=0)  # [B, H, rows, columns] -> [rows, columns]
            for query, maps in examples.attention.items()
            if query != "distillation"
        },
        colours=principal_colours(normed)[0].numpy(),
        mask=seed_components(found.mask, found.seeds, grid=keys.grid)[0],
        register_share=None if share is None else share.item(),
        report=report,
        depth=None if depth is None else depth[0].cpu().numpy(),
    )


def draw_looks(looks: Sequence[Look], path: str | os.PathLike) -> pathlib.Path:
    """Draw one row for each look: image, norms, attention of class token and registers, components, LOST, and depth of
    patches that halt.

    Norms are drawn from 0 to the largest of the row, each attention map on a scale of its own. The text of a map is
    the share of attention on patches, and peak over mean. The map of a class token is labelled with the share of its
    update that comes through registers, because the map alone misleads (Lappe and Giese 2025, arXiv 2505.05892).

    Args:
        looks: of several models, several images, or both.
        path: file to write; the suffix chooses the format, PNG without one.

    Raises:
        ValueError: nothing to draw.
    """
    if not looks:
        raise ValueError("expected one look or more, got none")
    names = list(dict.fromkeys(query for each in looks for query in list(each.attention)[: NUM_REGISTERS + 1]))
    has_depth = any(each.depth is not None for each in looks)
    columns = ["norms", *names, "components", "LOST", *["depth"] * has_depth]
    aspect = looks[0].image.shape[0] / looks[0].image.shape[1]
    figure, axes = make_cells(len(looks), len(columns) + 1, aspect=aspect, side=1.6, top=0.3 + 0.2 * len(looks))
    for row, each in zip(axes, looks):
        show_image(row[0], each.image)
        row[0].set_title(plain_text(each.name, max_length=24), fontsize=7.5, loc="left")
        text = f"max {each.norms.max() / max(np.median(each.norms), 1e-30):.1f} x median"
        show_image(row[1], each.norms, cmap="viridis", vmin=0, text=text)
        for ax, query in zip(row[2:], names):
            if (values := each.attention.get(query)) is not None:
                show_image(ax, values, cmap="magma", text=_describe_map(each, query))
        show_image(row[len(names) + 2], each.colours)
        shade = np.kron(each.mask, np.ones([side // cells for side, cells in zip(each.image.shape, each.mask.shape)]))
        show_image(row[len(names) + 3], each.image * (0.25 + 0.75 * shade[..., None]))
        if each.depth is not None:
            show_depth(row[-1], each.depth, num_layers=len(each.report.layers) - 1)
    show_titles(axes[0][1:], columns, size=7.5)
    return save_figure(figure, path, dpi=110)


def _describe_map(each: Look, query: str) -> str:
    values = each.attention[query]
    text = f"{values.sum():.0%}, peak {values.max() / max(values.mean(), 1e-30):.1f}x"
    is_shared = query == "class token" and each.register_share is not None
    return f"{each.register_share:.0%} via registers\n{text}" if is_shared else text
