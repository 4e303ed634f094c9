"""Comparison of a converted model with its original: every token of both, on the same images, at several sizes.

The images are two photographs in the public domain (a cat by S. van der Walt, Eileen Collins by NASA) and noise. The
error is the largest difference in units of the largest value, in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import pathlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersPreTrainedModel
from modeling_vitreg.modes import eval_mode

from .rules import ConversionError


TOLERANCE = 1e-5
_PHOTOGRAPHS = pathlib.Path(__file__).parent / "photographs"
_MANY_PATCHES = 400  # of a picture, above which one picture is enough at that size


@dataclasses.dataclass(frozen=True)
class Reference:
    """The original model, run by the code of its authors.

    Args:
        title: name and version.
        run: maps images (B, C, height, width) to tensors named as in our outputs.
        module: module with its weights; converted to float32.
        positions: fields of our configuration under which positions are resized as in this code, if that differs from
            the family.
        sizes: sizes of the images that it takes, or None for any that fit the patch.
    """

    title: str
    run: Callable[[Tensor], dict[str, Tensor]]
    module: torch.nn.Module
    positions: dict = dataclasses.field(default_factory=dict)
    sizes: list[tuple[int, int]] | None = None


@torch.no_grad()
def verify(model: ViTWithRegistersPreTrainedModel, reference: Reference, *, is_quiet: bool = False) -> dict:
    """Compare a model with its reference.

    Args:
        model: ours, with the converted weights.
        reference: the original.
        is_quiet: show no progress.

    Returns:
        `reference`, `sizes`, `errors` and `largest_relative_error`, as in `ConversionReport.verification`.
    """
    config, errors = model.config, {}
    held = {name: getattr(config, name) for name in reference.positions}
    for name, value in reference.positions.items():
        setattr(config, name, value)
    try:
        with eval_mode(model.float()), eval_mode(reference.module.float()):
            sizes = reference.sizes or probe_sizes(config)
            for size in tqdm(sizes, desc="verification", unit="size", disable=is_quiet):
                images = probe_images(config, size)
                errors["x".join(map(str, size))] = _compare(_outputs(model, images), reference.run(images))
    finally:
        for name, value in held.items():
            setattr(config, name, value)
    largest = max(error["relative"] for kinds in errors.values() for error in kinds.values())
    return {
        "reference": reference.title,
        "sizes": [list(size) for size in sizes],
        "num_images": sum(len(probe_images(config, size)) for size in sizes),
        "errors": errors,
        "largest_relative_error": largest,
    }


def probe_sizes(config: ViTWithRegistersConfig) -> list[tuple[int, int]]:
    """The size of the position table, a smaller oblong one, and a larger oblong one where that is cheap."""
    rows, columns = config.grid_shape
    if config.position_embedding_type == "rope":
        rows, columns = min(rows, 14), min(columns, 14)
    grids = [(rows, columns), (max(rows // 2, 1), max(rows // 2, 2 * columns // 3 - 1) + 1)]
    if rows * columns <= _MANY_PATCHES:
        grids.append((rows + 3, columns + 1))
    return [tuple(side * patch for side, patch in zip(grid, config.patch_shape)) for grid in grids]


def probe_images(config: ViTWithRegistersConfig, size: tuple[int, int]) -> Tensor:
    """Normalised images (B, C, height, width): photographs and noise; one photograph where they are large."""
    images = torch.stack([_fit(image, size) for image in _pictures()])  # [3, 3, height, width]
    if math.prod(side // patch for side, patch in zip(size, config.patch_shape)) > _MANY_PATCHES:
        images = images[:1]
    repeats = -(-config.num_channels // 3)
    return images.repeat(1, repeats, 1, 1)[:, : config.num_channels].contiguous()


def check_errors(found: dict, *, tolerance: float, title: str) -> None:
    """Refuse results that differ too much.

    Raises:
        ConversionError: an error is above the tolerance; the message has the largest ones.
    """
    too_large = [
        (error["relative"], f"{kind} at {size}: {error['relative']:.1e}")
        for size, kinds in found["errors"].items()
        for kind, error in kinds.items()
        if not error["relative"] <= tolerance  # so that nan is too large
    ]
    if too_large:
        shown = "\n  ".join(text for _, text in sorted(too_large, reverse=True)[:8])
        raise ConversionError(
            f"{title}: differs from {found['reference']} by more than {tolerance:g}, so nothing was saved:\n"
            f"  {shown}\n  Perhaps the family (--family) or a setting (--set FIELD=VALUE) is wrong."
        )


def title_of(package: str, distribution: str | None = None) -> str:
    """A library and its version."""
    return f"{package} {importlib.metadata.version(distribution or package)}"


def _outputs(model: ViTWithRegistersPreTrainedModel, images: Tensor) -> dict[str, Tensor]:
    output = model(images)
    tokens = output if "patch_tokens" in output else model.base_model(images)
    return {name: value for name, value in {**tokens, **output}.items() if isinstance(value, Tensor)}


def _compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    errors = {}
    for kind, expected in theirs.items():
        if expected.numel():
            if ours[kind].shape != expected.shape:
                raise ConversionError(
                    f"{kind}: ours are {tuple(ours[kind].shape)}, those of the reference {tuple(expected.shape)}: the "
                    "architecture was not recognised; set it with --set FIELD=VALUE"
                )
            difference = (ours[kind].float() - expected.float()).abs().max().item()
            largest = expected.abs().max().item()
            if not largest and kind == "patch_tokens":
                raise ConversionError(
                    "all patch tokens of the original are zero, so its weights are zero and not trained"
                )
            errors[kind] = {"absolute": difference, "relative": difference / largest if largest else difference}
    return errors


@functools.cache
def _pictures() -> tuple[Tensor, ...]:
    photographs = [np.asarray(Image.open(_PHOTOGRAPHS / f"{name}.jpg")) for name in ("chelsea", "astronaut")]
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3))
    pictures = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() for picture in (*photographs, noise)]
    return tuple((picture / 255 - 0.45) / 0.23 for picture in pictures)


def _fit(image: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
