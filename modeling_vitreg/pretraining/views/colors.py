"""Changes of colour for a batch of images, on any device, each image with parameters of its own.

A worker that cuts a view also draws how its colours change (`augmentation.py`): S changes in a row, each the number of
an operation and its parameters. They travel as a tensor beside the views, and `change_colors` applies them. The host
knows from them which images an operation changes, so nothing waits for the device.

Every operation takes images (N, 3, h, w), float32 with whole numbers from 0 to 255, and parameters (N, K). It returns
what torchvision's v2 function of this name makes of the bytes of each image, to one level, again as whole numbers in
float32. It may overwrite its images. An image gets the same bits alone and in any batch: sums are of whole numbers,
and no product is fused with a sum.

Letters: N images, S changes, K parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as torchvision


LEVELS = 255
BLUR_RADIUS = 4  # pixels; kernels have 9
NUM_PARAMETERS = 6  # the most that an operation takes
_NUM_AT_ONCE = 2**18  # values of images that stay in the cache of a core


def change_colors(images: Tensor, changes: Tensor) -> Tensor:
    """Images with their colours changed, float32 with whole numbers from 0 to 255.

    for each image n, for each step s:
        operation number changes[n, s, 0] is applied to image n with parameters changes[n, s, 1:]; 0: none

    Args:
        images: (N, C, h, w), uint8. One channel changes as three equal ones do; alpha, the last of four, stays.
        changes: (N, S, 7), float32 on the CPU, rows of `change`.
    """
    num_channels = images.shape[1]
    if num_channels == 1:
        return change_colors(images.expand(-1, 3, -1, -1), changes)[:, :1].contiguous()
    if num_channels == 4:
        return torch.cat([change_colors(images[:, :3], changes), images[:, 3:].float()], dim=1)
    device, numbers = images.device, changes[..., 0]
    images = images.float(memory_format=torch.contiguous_format)
    parts = []
    for step in range(changes.shape[1]):
        for number in numbers[:, step].unique().tolist():
            if number:
                rows = (numbers[:, step] == number).nonzero().squeeze(1)
                parts.append((_OPERATIONS[int(number)], rows, changes[rows, step, 1:]))
    if not parts:
        return images
    operations, rows, values = zip(*parts)
    sizes = [len(part) for part in rows]
    rows, values = (torch.cat(part).to(device, non_blocking=True).split(sizes) for part in (rows, values))
    for (operation, num_parameters), rows_of_part, values_of_part in zip(operations, rows, values):
        changed = operation(images.index_select(0, rows_of_part), values_of_part[:, :num_parameters])
        images.index_copy_(0, rows_of_part, changed)
    return images


def change_batch(batch: dict) -> dict:
    """A batch of `ViewLoader` with the colours of its views changed, in place, and without the changes; on the CPU."""
    for kind in ("global", "local"):
        if f"{kind}_colors" in batch:
            changes = batch.pop(f"{kind}_colors").flatten(0, 1)
            images = batch[f"{kind}_views"].flatten(0, 1)  # [V, B, 3, h, w] -> [V B, 3, h, w], a view
            num_images = max(1, _NUM_AT_ONCE // images[0].numel())
            for part, changes_of_part in zip(images.split(num_images), changes.split(num_images)):
                part.copy_(change_colors(part, changes_of_part))
    return batch


def change(name: str | None = None, *parameters: float) -> list[float]:
    """A row of `changes`: an operation and its parameters; without a name, none."""
    number = 0 if name is None else _NUMBERS[name]
    return [number, *parameters, *[0.0] * (NUM_PARAMETERS - len(parameters))]


# Operations ----------------------------------------------------------------------------------------------------------


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """floor(clamp(factor * image))."""
    return _to_levels(images.mul_(_per_image(factors)))


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """floor(clamp(factor * image + (1 - factor) * mean)), with the mean of the gray image."""
    gray = _gray(images)
    # A row of an image sums to less than 2**24, the sum of rows needs integers: both are exact in any order.
    mean = gray.sum(dim=-1).long().sum(dim=-1)[..., None, None].float() / gray[0].numel()
    return _blend(images, mean, factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """floor(clamp(factor * image + (1 - factor) * gray image))."""
    return _blend(images, _gray(images), factors)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Colours with their hue moved by a share of the circle, from -0.5 to 0.5.

    hue = (g - b) / chroma, 2 + (b - r) / chroma or 4 + (r - g) / chroma, where r, g or b is the largest
    red = low + chroma * clamp(|hue - 3| - 1, 0, 1); green and blue = low + chroma * clamp(2 - |hue - 2 or 4|, 0, 1)

    with low the smallest of r, g, b, chroma = largest - smallest, and hue in 0 ... 6: the hexagon of HSV.
    """
    red, green, blue = images.unbind(dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    is_red, is_green = _mask(torch.eq, high, red), _mask(torch.eq, high, green)
    is_other = 1 - is_red
    chroma = high.sub_(low)
    hue = (green - blue).mul_(is_red)
    hue.add_((blue - red).mul_(is_green).add_((red - green).mul_(1 - is_green)).mul_(is_other))
    hue.div_(chroma.clamp(min=1)).add_(is_other.mul_(is_green.mul_(-2).add_(4))).add_(6 * turns.view(-1, 1, 1))
    hue.sub_((hue / 6).floor_().mul_(6))
    for channel, place in ((red, 3), (green, 2), (blue, 4)):  # views of the images
        torch.sub(hue, place, out=channel).abs_()
    red.sub_(1)
    images[:, 1:].neg_().add_(2)
    images.clamp_(0, 1).mul_(chroma[:, None]).add_(low[:, None])
    return images.mul_((LEVELS + 1 - 1e-3) / LEVELS).floor_()  # as torchvision turns floats into bytes


def to_grayscale(images: Tensor, _: Tensor | None = None) -> Tensor:
    return images.copy_(_gray(images).expand_as(images))


def gaussian_blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Images blurred by a kernel of 9 pixels in each direction.

    Args:
        kernels: (N, 5), weights of distances 0 ... 4 pixels; see `gaussian_kernel`.
    """
    for axis in (3, 2):
        margin = (BLUR_RADIUS, BLUR_RADIUS, 0, 0) if axis == 3 else (0, 0, BLUR_RADIUS, BLUR_RADIUS)
        padded, size = F.pad(images, margin, mode="reflect"), images.shape[axis]
        images = padded.narrow(axis, BLUR_RADIUS, size) * _per_image(kernels[:, 0])
        for distance in range(1, BLUR_RADIUS + 1):
            pair = padded.narrow(axis, BLUR_RADIUS - distance, size) + padded.narrow(
                axis, BLUR_RADIUS + distance, size
            )
            images.add_(pair.mul_(_per_image(kernels[:, distance])))
    return images.round_()


def gaussian_kernel(sigma: float) -> list[float]:
    """Weights of distances 0 ... 4 pixels of the kernel that torchvision has for 9 pixels."""
    # Its samples are 1 / sqrt(2) apart: the kernel is that of sigma pixels.
    weights = [math.exp(-((distance / sigma) ** 2) / 2) for distance in range(BLUR_RADIUS + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    return [weight / total for weight in weights]


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Levels from the threshold on are inverted."""
    is_bright = _mask(torch.ge, images, _per_image(thresholds))
    return images.mul_(1 - 2 * is_bright).add_(is_bright.mul_(LEVELS))


def posterize(images: Tensor, steps: Tensor) -> Tensor:
    """Levels rounded down to a multiple of the step, 2 ** (8 - bits)."""
    step = _per_image(steps)
    return images.div_(step).floor_().mul_(step)


def adjust_sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """floor(clamp(factor * image + (1 - factor) * smoothed image)); the outermost pixels stay."""
    height, width = images.shape[2:]
    if height <= 2 or width <= 2:
        return images
    inner = images[:, :, 1:-1, 1:-1]
    columns = images[..., :-2] + images[..., 1:-1] + images[..., 2:]
    smooth = columns[:, :, :-2] + columns[:, :, 1:-1] + columns[:, :, 2:] + 4 * inner
    smooth.div_(13).round_().sub_(inner)
    inner.add_(smooth.mul_(1 - _per_image(factors)))
    return _to_levels(images)


def autocontrast(images: Tensor, _: Tensor | None = None) -> Tensor:
    """Every channel stretched to 0 ... 255, unless it is of one level."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    is_flat = high == low
    scale = torch.where(is_flat, 1, (high - low) * (1 / LEVELS))
    return _to_levels(images.sub_(torch.where(is_flat, 0, low)).div_(scale))


def equalize(images: Tensor, _: Tensor | None = None) -> Tensor:
    return torchvision.equalize(images.to(torch.uint8)).float()


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """The nearest pixel of an affine map for every pixel, black outside.

    Args:
        matrices: (N, 6), the two rows of the map from places in the result to places in the image, in pixels from the
            centre: x' = m0 x + m1 y + m2, y' = m3 x + m4 y + m5.
    """
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    m = matrices[:, :, None, None].unbind(dim=1)
    # To the coordinates of grid_sample, in which the borders of an image are -1 and 1.
    column = (m[0] * x + m[1] * y + m[2]) * (2 / width)
    row = (m[3] * x + m[4] * y + m[5]) * (2 / height)
    return F.grid_sample(images, torch.stack([column, row], dim=-1), mode="nearest", align_corners=False)


def _gray(images: Tensor) -> Tensor:
    """Rounded down, (N, 1, h, w)."""
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989).add_(green * 0.587).add_(blue * 0.114).floor_()


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    factors = _per_image(factors)
    return _to_levels(images.mul_(factors).add_(others * (1 - factors)))


def _mask(compare: Callable, first: Tensor, second: Tensor) -> Tensor:
    """1 and 0 in float32: on a CPU ten times as fast as truth values and `torch.where`."""
    return compare(first, second, out=torch.empty_like(first))


def _to_levels(images: Tensor) -> Tensor:
    return images.clamp_(0, LEVELS).floor_()


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


_BY_NAME = {  # and the number of parameters
    "brightness": (adjust_brightness, 1),
    "contrast": (adjust_contrast, 1),
    "saturation": (adjust_saturation, 1),
    "hue": (adjust_hue, 1),
    "gray": (to_grayscale, 0),
    "blur": (gaussian_blur, 1 + BLUR_RADIUS),
    "solarize": (solarize, 1),
    "sharpness": (adjust_sharpness, 1),
    "posterize": (posterize, 1),
    "autocontrast": (autocontrast, 0),
    "equalize": (equalize, 0),
    "affine": (affine, 6),
}
_NUMBERS = {name: number for number, name in enumerate(_BY_NAME, start=1)}
_OPERATIONS = dict(enumerate(_BY_NAME.values(), start=1))
