"""Views of an image by torchvision v2: multi-crop (Caron et al. 2020; DINO, DINOv2), or a supervised recipe's cut.

Maps (masks, depth) are cropped with their image, to the nearest pixel.

Views are uint8, which moves a quarter of the memory; `Objective.to_device` changes their colours and normalises them.

Letters: V views, S changes of colour.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from modeling_vitreg.image_processing_vitreg import MODES
from modeling_vitreg.settings import expect

from .augmentation import DinoColors, RandomColors, ThreeColors


CUTS, COLOURS = ("resized", "simple", "zoomed"), ("dino", "three", "random", "none")
IGNORED, NO_DEPTH = 255, 0  # what pads a mask and a depth
GREY = {1: (116,), 3: (124, 116, 104), 4: (124, 116, 104, 0)}  # what pads an image, by number of channels


@dataclasses.dataclass(frozen=True)
class CropSettings:
    """Crops and augmentation of an image. Defaults are those of DINOv2 at patch 14.

    Args:
        num_global, num_local: views of each kind; MAE and SimMIM take one global view.
        global_size, local_size: side in pixels, a multiple of the patch.
        global_scale, local_scale: smallest and largest share of the image's area.
        flip: probability of a horizontal flip.
        color_jitter: brightness, contrast, saturation, hue; with probability `color_jitter_probability`.
        gray: probability of grayscale.
        blur: probability of a Gaussian blur (kernel 9, sigma 0.1 to 2 pixels) of the first global view, the other
            global views, and local views. DINO has (1.0, 0.1, 0.5); the released code of DINOv2 inverts its argument
            and runs (0.0, 0.9, 0.5).
        solarize: probability of solarisation, of global views but the first.
        cut: "resized", a random part at a random size; "simple": the short side to the size of the view, padded by 4
            pixels, and a square of it (DeiT-III's simple random crop); "zoomed": the short side to the size of the
            view times a random factor, and a square of it, padded where it is smaller (segmentation). Of global views.
        zoom: smallest and largest factor.
        sizes: rows of (global_size, local_size, side of the Gram teacher's views, probability) in place of
            `global_size` and `local_size`, which are the largest of them; a row is drawn for each step (DINOv3's
            high-resolution stage). Of objectives that take sizes.
        color_augmentation: "dino", as the values above say; "three", DeiT-III's 3-Augment: one of gray, solarised and
            blurred, then jitter; "random", two operations of RandAugment at magnitude 9; "none".
    """

    num_global: int = 2
    num_local: int = 8
    global_size: int = 224
    local_size: int = 98
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    flip: float = 0.5
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    color_jitter_probability: float = 0.8
    gray: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    solarize: float = 0.2
    cut: str = "resized"
    zoom: tuple[float, float] = (0.5, 2.0)
    color_augmentation: str = "dino"
    sizes: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self):
        if self.sizes is not None:
            self._check_sizes()
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                wanted = "two fractions of the image area, 0 < low <= high <= 1"
                raise ValueError(f"crops: expected {name} to be {wanted}, got {(low, high)}")
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"crops: expected zoom to be two factors, 0 < low <= high, got {self.zoom}")
        counts = dict.fromkeys(("num_global", "global_size", "local_size"), "[1, inf)")
        expect(self, "crops", num_local="[0, inf)", cut=CUTS, color_augmentation=COLOURS, **counts)
        if len(self.color_jitter) != 4 or len(self.blur) != 3:
            raise ValueError(
                "crops: expected 4 values in color_jitter (brightness, contrast, saturation, hue) and 3 in blur "
                f"(first global view, other global views, local views), got {self.color_jitter} and {self.blur}"
            )
        probabilities = ("flip", "color_jitter_probability", "gray", "solarize", "blur")
        expect(self, "crops", **dict.fromkeys(probabilities, "[0, 1]"))

    def _check_sizes(self) -> None:
        wanted = "crops: expected sizes to be rows of [global_size, local_size, gram_size, probability]"
        rows = self.sizes if isinstance(self.sizes, (list, tuple)) else ()
        rows = tuple(tuple(row) if isinstance(row, (list, tuple)) else () for row in rows)
        if not rows or any(len(row) != 4 or any(type(part) not in (int, float) for part in row) for row in rows):
            raise ValueError(f"{wanted} such as [[512, 112, 768, 0.5], [768, 112, 1152, 0.5]], got {self.sizes!r}")
        if any(part != int(part) or part < 1 for row in rows for part in row[:3]) or min(row[3] for row in rows) <= 0:
            raise ValueError(f"{wanted}, sides of 1 or more pixels and a probability above 0, got {self.sizes!r}")
        if abs(sum(row[3] for row in rows) - 1) > 1e-6:
            raise ValueError(f"{wanted} whose probabilities sum to 1, got {sum(row[3] for row in rows):g}")
        for name, sides in zip(("global_size", "local_size"), zip(*rows)):
            if getattr(self, name) != max(sides):
                raise ValueError(
                    f"crops: {name} {getattr(self, name)} and sizes up to {max(sides)} contradict each other: set "
                    f"crops.{name}={max(sides)}, the size of evaluation and estimates"
                )
        object.__setattr__(self, "sizes", tuple((*map(int, row[:3]), float(row[3])) for row in rows))

    def draw_sizes(self, seed: int) -> tuple[CropSettings, int]:
        """Settings with one row of `sizes`, and its side of the Gram teacher's views."""
        weights = torch.tensor([row[3] for row in self.sizes], dtype=torch.float64)
        place = torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(seed)).item()
        global_size, local_size, gram_size, _ = self.sizes[place]
        return dataclasses.replace(self, global_size=global_size, local_size=local_size, sizes=None), gram_size


class _Mask(tv_tensors.Mask):
    """Class numbers of pixels."""


class _Depth(tv_tensors.Mask):
    """Metres of pixels."""


class MultiCrop:
    """Cut the views of one image; draws from torch's global generator, as torchvision does.

    Args:
        settings: sizes and augmentation.
        num_channels: C, 1 (grey), 3 (RGB) or 4 (RGBA).
        gram_size: side of `gram_views` in pixels, the same parts of the image as the global views show, without
            changes of colour; None for none.
    """

    def __init__(self, settings: CropSettings, *, num_channels: int = 3, gram_size: int | None = None):
        self._mode = MODES[num_channels]
        blur_first, blur_others, blur_local = settings.blur
        cut, cut_local = (_cutter(settings, num_channels, is_local=is_local) for is_local in (False, True))
        if gram_size is not None:
            cut.gram_size = [gram_size, gram_size]
        first = ("global", cut, _colors(settings, blur=blur_first, solarize=0.0))
        others = ("global", cut, _colors(settings, blur=blur_others, solarize=settings.solarize))
        local = ("local", cut_local, _colors(settings, blur=blur_local, solarize=0.0, is_local=True))
        self._views = [first, *[others] * (settings.num_global - 1), *[local] * settings.num_local]

    def __call__(
        self, image: Image.Image, *, mask: np.ndarray | None = None, depth: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """Views of an image, and the changes of their colours, which are yet to be made.

        Args:
            image: PIL image of height x width pixels.
            mask: class numbers, int32 (height, width).
            depth: metres, float32 (height, width).

        Returns:
            `global_views`, uint8 (V, C, global_size, global_size), and, if there are any, `local_views`; with them
            `global_colors` and `local_colors`, (V, S, 7) for `change_colors`, unless the recipe changes none.
            Of the maps the parts that global views show: `semantic_masks`, int32 (V, global_size, global_size), 255
            where the view leaves the image; `depths`, float32, the same, 0 there.
        """
        image = image if image.mode == self._mode else image.convert(self._mode)  # which copies
        maps = {}
        if mask is not None:
            maps["semantic_masks"] = _Mask(torch.from_numpy(mask))
        if depth is not None:
            maps["depths"] = _Depth(torch.from_numpy(depth))
        # Beside maps transforms take only this class for an image; alone, a plain tensor costs less.
        pixels = v2.functional.pil_to_tensor(image)
        pixels = tv_tensors.Image(pixels) if maps else pixels
        views, colors = collections.defaultdict(list), collections.defaultdict(list)
        for kind, cut, draw in self._views:
            parts = {f"{kind}_views": pixels} | (maps if kind == "global" else {})
            for name, view in cut(parts).items():
                views[name].append(view)
            if draw is not None:
                colors[f"{kind}_colors"].append(draw())
        stacked = {name: torch.stack(parts).as_subclass(Tensor) for name, parts in views.items()}
        return stacked | {name: torch.tensor(rows) for name, rows in colors.items()}


@dataclasses.dataclass(frozen=True)
class SizedCrops:
    """Makes the `MultiCrop` of a step, whose sizes are drawn.

    Args:
        settings: with `sizes`.
        num_channels: see `MultiCrop`.
        has_gram: whether there are `gram_views`.
    """

    settings: CropSettings
    num_channels: int
    has_gram: bool

    def of_step(self, seed: int) -> MultiCrop:
        """With the sizes that a seed draws."""
        settings, gram_size = self.settings.draw_sizes(seed)
        return MultiCrop(settings, num_channels=self.num_channels, gram_size=gram_size if self.has_gram else None)


class _ResizedCrop:
    """RandomResizedCrop, then RandomHorizontalFlip, with the same draws and bytes.

    Calling the functions behind both saves what the classes spend on finding images in their arguments.
    """

    def __init__(self, size: int, *, scale: tuple[float, float], flip: float):
        self._crop, self._size, self._flip = v2.RandomResizedCrop(size, scale=scale), [size, size], flip
        self.gram_size: list[int] | None = None

    def __call__(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        window = self._crop.make_params([*parts.values()])
        is_flipped = torch.rand(1).item() < self._flip
        sizes = [(name, part, self._size) for name, part in parts.items()]
        if self.gram_size:
            sizes.append(("gram_views", parts["global_views"], self.gram_size))
        cut = {}
        for name, part, size in sizes:
            # On a tensor of bytes: three to four times as fast as on a PIL image.
            view = v2.functional.resized_crop(part, **window, size=size, interpolation=InterpolationMode.BICUBIC)
            cut[name] = v2.functional.horizontal_flip(view) if is_flipped else view
        return cut


def _cutter(settings: CropSettings, num_channels: int, *, is_local: bool) -> Callable[[dict], dict]:
    size = settings.local_size if is_local else settings.global_size
    if settings.cut == "resized" or is_local:
        scale = settings.local_scale if is_local else settings.global_scale
        return _ResizedCrop(size, scale=scale, flip=settings.flip)
    if settings.cut == "simple":
        resize = v2.Resize(size, interpolation=InterpolationMode.BICUBIC)
        crop = v2.RandomCrop(size, padding=4, padding_mode="reflect")
    else:
        sides = range(round(size * settings.zoom[0]), round(size * settings.zoom[1]) + 1)
        resize = v2.RandomShortestSize(list(sides), interpolation=InterpolationMode.BICUBIC)
        grey = GREY[num_channels]
        fill = {tv_tensors.Image: grey, _Mask: IGNORED, _Depth: NO_DEPTH, torch.Tensor: grey}
        crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)
    return v2.Compose([resize, crop, v2.RandomHorizontalFlip(settings.flip)])


def _colors(
    settings: CropSettings, *, blur: float, solarize: float, is_local: bool = False
) -> Callable[[], list[list[float]]] | None:
    """What draws the changes of colour of a view."""
    if settings.color_augmentation == "none":
        return None
    if settings.color_augmentation == "random":
        return RandomColors(settings.local_size if is_local else settings.global_size)
    jitter = tuple(settings.color_jitter)
    if settings.color_augmentation == "three":
        return ThreeColors(jitter)
    return DinoColors(jitter, settings.color_jitter_probability, settings.gray, blur, solarize)
