"""Views of an image by torchvision v2: multi-crop (Caron et al. 2020; DINO, DINOv2), or a supervised recipe's cut.

Maps (masks, depth) are cropped with their image, to the nearest pixel.

Letters: V views. Views are uint8 and are normalised on the device, which moves a quarter of the memory.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from modeling_vitreg.image_processing_vitreg import MODES


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

    def __post_init__(self):
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"crops: {name} is two fractions of the image area, 0 < low <= high <= 1, got {(low, high)}"
                )
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"crops: zoom is two factors, 0 < low <= high, got {self.zoom}")
        if self.num_global < 1 or self.num_local < 0:
            raise ValueError(
                f"crops: expected at least one global view and no negative number of local ones, got num_global="
                f"{self.num_global}, num_local={self.num_local}"
            )
        for name, known in (("cut", CUTS), ("color_augmentation", COLOURS)):
            if getattr(self, name) not in known:
                raise ValueError(f"crops: {name} is one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("global_size", "local_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"crops: {name} is a side in pixels, 1 or more, got {getattr(self, name)}")
        if len(self.color_jitter) != 4 or len(self.blur) != 3:
            raise ValueError(
                f"crops: color_jitter has 4 values (brightness, contrast, saturation, hue) and blur 3 (first global "
                f"view, other global views, local views), got {self.color_jitter} and {self.blur}"
            )
        for name in ("flip", "color_jitter_probability", "gray", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"crops: {name} is a probability, got {getattr(self, name)}")
        if not all(0 <= probability <= 1 for probability in self.blur):
            raise ValueError(f"crops: blur is three probabilities, got {self.blur}")


class MultiCrop:
    """Cut the views of one image; draws from torch's global generator, as torchvision does.

    Args:
        settings: sizes and augmentation.
        num_channels: C, 1 (grey), 3 (RGB) or 4 (RGBA). Colours of grey and RGBA views change as those of RGB do, and
            alpha stays.
    """

    def __init__(self, settings: CropSettings, *, num_channels: int = 3):
        self.settings, self._mode = settings, MODES[num_channels]
        blur_first, blur_others, blur_local = settings.blur
        sizes = ((settings.global_size, False), (settings.local_size, True))
        cut = [_cutter(size, settings, num_channels, is_local=is_local) for size, is_local in sizes]
        first = (cut[0], _painter(settings, blur=blur_first, solarize=0.0))
        others = (cut[0], _painter(settings, blur=blur_others, solarize=settings.solarize))
        local = (cut[1], _painter(settings, blur=blur_local, solarize=0.0))
        self._global = [first] + [others] * (settings.num_global - 1)
        self._local = [local] * settings.num_local

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        """Views of an image.

        Returns:
            `global_views`, uint8 (V, C, global_size, global_size), and, if there are any, `local_views`.
        """
        pixels = v2.functional.pil_to_tensor(image.convert(self._mode))
        views = {"global_views": torch.stack([_recolour(cut(pixels), paint) for cut, paint in self._global])}
        if self._local:
            views["local_views"] = torch.stack([_recolour(cut(pixels), paint) for cut, paint in self._local])
        return views


class _Mask(tv_tensors.Mask):
    """Class numbers of pixels."""


class _Depth(tv_tensors.Mask):
    """Metres of pixels."""


class MapCrop:
    """Cut one view of an image and of its maps together; draws as `MultiCrop` does."""

    def __init__(self, settings: CropSettings, *, num_channels: int = 3):
        self._mode = MODES[num_channels]
        self._cut = _cutter(settings.global_size, settings, num_channels)
        self._paint = _painter(settings, blur=settings.blur[0], solarize=0.0)

    def __call__(
        self, image: Image.Image, *, mask: np.ndarray | None = None, depth: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """A view, and the same part of its maps.

        Args:
            image: PIL image of height x width pixels.
            mask: class numbers, int32 (height, width).
            depth: metres, float32 (height, width).

        Returns:
            `global_views`, uint8 (1, C, global_size, global_size); `semantic_masks`, int32 (1, global_size,
            global_size), 255 where the view leaves the image; `depths`, float32, the same, 0 there.
        """
        parts = {"global_views": tv_tensors.Image(v2.functional.pil_to_tensor(image.convert(self._mode)))}
        if mask is not None:
            parts["semantic_masks"] = _Mask(torch.from_numpy(mask)[None])
        if depth is not None:
            parts["depths"] = _Depth(torch.from_numpy(depth)[None])
        cut = {name: part.as_subclass(Tensor) for name, part in self._cut(parts).items()}
        return {**cut, "global_views": _recolour(cut["global_views"], self._paint)[None]}


def _recolour(pixels: Tensor, paint: v2.Transform) -> Tensor:
    """Apply a change of RGB colours to a view (C, h, w): to three equal channels where it is grey, without alpha."""
    if len(pixels) == 3:
        return paint(pixels)
    if len(pixels) == 1:
        return paint(pixels.expand(3, -1, -1))[:1]
    return torch.cat([paint(pixels[:3]), pixels[3:]])


def _cutter(size: int, settings: CropSettings, num_channels: int, *, is_local: bool = False) -> v2.Transform:
    scale = settings.local_scale if is_local else settings.global_scale
    if settings.cut == "simple" and not is_local:
        resize = v2.Resize(size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        crop = v2.RandomCrop(size, padding=4, padding_mode="reflect")
        return v2.Compose([resize, crop, v2.RandomHorizontalFlip(settings.flip)])
    if settings.cut == "zoomed" and not is_local:
        sides = range(round(size * settings.zoom[0]), round(size * settings.zoom[1]) + 1)
        resize = v2.RandomShortestSize(list(sides), interpolation=InterpolationMode.BICUBIC, antialias=True)
        grey = GREY[num_channels]
        fill = {tv_tensors.Image: grey, _Mask: IGNORED, _Depth: NO_DEPTH, torch.Tensor: grey}
        crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)
        return v2.Compose([resize, crop, v2.RandomHorizontalFlip(settings.flip)])
    # On a tensor of bytes: three to four times as fast as on a PIL image.
    crop = v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(settings.flip)])


def _painter(settings: CropSettings, *, blur: float, solarize: float) -> v2.Transform:
    if settings.color_augmentation in ("none", "random"):
        return v2.Identity() if settings.color_augmentation == "none" else v2.RandAugment(num_ops=2, magnitude=9)
    if settings.color_augmentation == "three":
        one = [v2.Grayscale(3), v2.RandomSolarize(threshold=128, p=1.0), v2.GaussianBlur(9, sigma=(0.1, 2.0))]
        return v2.Compose([v2.RandomChoice(one), v2.ColorJitter(*settings.color_jitter)])
    steps = []
    if settings.color_jitter_probability and any(settings.color_jitter):
        # Through PIL, whose HSV is a third faster than that of a tensor.
        jitter = v2.Compose([v2.ToPILImage(), v2.ColorJitter(*settings.color_jitter), v2.PILToTensor()])
        steps.append(v2.RandomApply([jitter], p=settings.color_jitter_probability))
    if settings.gray:
        steps.append(v2.RandomGrayscale(settings.gray))
    if blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(9, sigma=(0.1, 2.0))], p=blur))
    if solarize:
        steps.append(v2.RandomSolarize(threshold=128, p=solarize))
    return v2.Compose(steps) if steps else v2.Identity()


__all__ = ["IGNORED", "CropSettings", "MapCrop", "MultiCrop"]
