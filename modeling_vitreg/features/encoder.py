"""One interface to the tokens and the attention of every supported model.

Letters for shapes: B images, N tokens, P patches, R registers, Q prefix tokens, D width, H heads, L layers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from modeling_vitreg.image_processing_vitreg import MODES
from modeling_vitreg.images import check_channels
from modeling_vitreg.modeling_vitreg import check_image_size
from modeling_vitreg.modes import eval_mode
from modeling_vitreg.reports import made_with

from .families import (
    any_image_size,
    count_heads,
    find_image_size,
    find_layers,
    find_part,
    find_tower,
    keywords_of,
)
from .hooks import record_attention
from .pixels import crop_image, normalise


class Encoder:
    """A model of a supported family, with the names of its parts. `load_encoder` makes one.

    Args:
        model: the module, with or without a head; it is used as it is and never changed.
        name: for reports.
        statistics: mean and standard deviation of each channel, for pixels in 0 ... 1.

    Attributes:
        model, name, family: as above; the family is a short word such as "dinov2" or "timm".
        tower, layers: the module that holds embeddings, layers and final norm, and its layers.
        num_layers, num_heads, hidden_size: L, H and D.
        patch_shape: (rows, columns) of a patch in pixels.
        image_size: (rows, columns) that the model was trained at, in pixels.
        num_register_tokens, has_cls_token, has_distillation_token: the prefix.
        image_mean, image_std: one value a channel.
        device, dtype: device and dtype of the weights.

    Raises:
        ValueError: a model of another family.
    """

    def __init__(self, model: nn.Module, *, name: str, statistics: tuple):
        self.model, self.name = model, name
        self.family, self.tower = find_tower(model)
        self._convolution = find_part(self.tower, "patches")
        self.layers = find_layers(self.tower)
        self.num_layers = len(self.layers)
        self.num_heads = count_heads(self.tower, find_part(self.layers[0], "attention"))
        self.hidden_size = self._convolution.out_channels
        self.patch_shape = tuple(self._convolution.kernel_size)
        self.image_size = find_image_size(self.tower, self.patch_shape)
        self._is_compiled = False
        self.image_mean, self.image_std = (_for_channels(values, self.num_channels) for values in statistics)

    @property
    def has_cls_token(self) -> bool:
        """Whether the sequence begins with a class token."""
        return find_part(self.tower, "cls") is not None

    @property
    def has_distillation_token(self) -> bool:
        """Whether a distillation token follows it."""
        return find_part(self.tower, "distillation") is not None

    @property
    def num_register_tokens(self) -> int:
        """R."""
        registers = find_part(self.tower, "registers")
        registers = getattr(registers, "weight", registers)  # ours are a module
        return 0 if registers is None else registers.shape[-2]

    def describe(self) -> dict:
        """Family, sizes and prefix, as reports write them."""
        return {
            "family": self.family,
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "hidden_size": self.hidden_size,
            "patch_shape": list(self.patch_shape),
            "num_register_tokens": self.num_register_tokens,
            "has_cls_token": self.has_cls_token,
            "has_distillation_token": self.has_distillation_token,
        }

    def made_with(self) -> dict:
        """Versions, device and precision that a measurement of this model is made with."""
        return made_with(device=str(self.device), dtype=str(self.dtype).removeprefix("torch."))

    @contextlib.contextmanager
    def compiled_layers(self, *, backend: str = "inductor") -> Iterator[None]:
        """Compile each layer inside the block; what is inside a layer (queries, attention) is still read eagerly.

        Layers of one kind share their code, so it is compiled once for all of them, and once more when the number of
        images changes.
        """
        try:
            for layer in self.layers:  # not the module, whose hooks would be compiled and then never change
                layer.forward = torch.compile(layer.forward, backend=backend)
            self._is_compiled = True
            yield
        finally:
            self._is_compiled = False
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: class token, distillation token and registers."""
        return self.has_cls_token + self.has_distillation_token + self.num_register_tokens

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._convolution.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self._convolution.weight.dtype

    @property
    def num_channels(self) -> int:
        """C, the channels of an image."""
        return self._convolution.in_channels

    @property
    def image_mode(self) -> str:
        """Mode of Pillow for images of this model.

        Raises:
            ValueError: image files do not have as many channels.
        """
        check_channels(self.num_channels, reader=self.name)
        return MODES[self.num_channels]

    def prepare(self, images: Sequence[Image.Image], *, size: int | None = None) -> Tensor:
        """Images to pixels: resized (bicubic) until the short side fits, cut in the centre, normalised.

        Args:
            images: images of any sizes.
            size: side of the square that is cut out; None: `image_size`.

        Returns:
            Pixels (B, C, rows, columns) in float32, on the CPU.

        Raises:
            ValueError: no images, or a size that does not fit the patches.
        """
        if not len(images):
            raise ValueError("expected one image or more, got none")
        sides = self.image_size if size is None else (size, size)
        check_image_size(sides, self.patch_shape)
        mode = self.image_mode
        pixels = np.stack([crop_image(image.convert(mode), sides) for image in images])  # [B, C, rows, columns]
        return self.normalise(torch.from_numpy(pixels))

    def normalise(self, pixels: Tensor, *, sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Bytes (B, C, rows, columns) as the model reads them, in float32; see `pixels.normalise`."""
        return normalise(pixels, mean=self.image_mean, std=self.image_std, sizes=sizes)

    @torch.no_grad()
    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        """(B, P, D): what the patch embedding makes of images (B, C, height, width), before positions."""
        return self._convolution(self._check(pixel_values)).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def prefix_attention(self, pixel_values: Tensor, *, layers: int | Sequence[int]) -> list[Tensor]:
        """Attention probabilities of the prefix tokens over all tokens, under any attention back end.

        Nothing of size N x N is built, and layers after the last one asked for do not run.

        Args:
            pixel_values: (B, C, height, width).
            layers: from 1, or from -1 backwards.

        Returns:
            For each layer (B, H, Q, N) in float32; queries and tokens in the order class token, distillation token,
            registers, patches. Q is 0 for a model without prefix.

        Raises:
            ValueError: images that do not fit, or no such layer.
        """
        numbers = layer_numbers(layers, self.num_layers, first=1)
        sizes = {"num_heads": self.num_heads, "num_queries": self.num_prefix_tokens}

        def hooks(keep: Callable) -> Iterator:
            for number in set(numbers):
                yield from record_attention(self.layers[number - 1], functools.partial(keep, number), **sizes)

        found = self.run(pixel_values, hooks, num_expected=len(set(numbers)))
        return [found[number] for number in numbers]

    def norm_tokens(self, tokens: Tensor) -> Tensor:
        """Apply the final norm to tokens (B, N, D), unless the model norms the pooled vector instead."""
        norm = getattr(self.tower, "norm_tokens", None) or find_part(self.tower, "norm")
        return norm(tokens)

    def run(
        self,
        pixel_values: Tensor,
        hooks: Callable[[Callable], Iterator],
        *,
        num_expected: int,
        is_inside_layers: bool = True,
    ) -> dict:
        """Run the model, in evaluation mode, until its hooks have found everything.

        Modes of modules and hooks are restored, also after an error.

        Args:
            pixel_values: (B, C, height, width).
            hooks: makes them; they call what it is given with a key and what they found.
            num_expected: number of keys; after the last one the model stops.
            is_inside_layers: whether a hook is inside a layer, which then runs eagerly.

        Returns:
            What was found, by its key.

        Raises:
            ValueError: images that do not fit.
            RuntimeError: the model never called a module with a hook.
        """
        found = {}

        def keep(key: object, value: Tensor) -> None:
            found[key] = value
            if len(found) == num_expected:
                raise _Enough

        pixel_values = self._check(pixel_values)
        handles = []
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: [handle.remove() for handle in handles])
            handles.extend(hooks(keep))
            stack.enter_context(eval_mode(self.tower, is_eager=is_inside_layers or not self._is_compiled))
            stack.enter_context(any_image_size(self.tower, self.family, pixel_values))
            stack.enter_context(contextlib.suppress(_Enough))
            self.tower(pixel_values, **keywords_of(self.family, pixel_values, self.patch_shape))
        if len(found) != num_expected:
            raise RuntimeError(f"{self.name}: the model did not call all of its expected modules")
        return found

    def _check(self, pixel_values: Tensor) -> Tensor:
        channels = self._convolution.in_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or not len(pixel_values):
            raise ValueError(
                f"expected images (batch, {channels}, height, width), got a tensor of shape "
                f"{tuple(pixel_values.shape)}; `Encoder.prepare` converts PIL images"
            )
        check_image_size(tuple(pixel_values.shape[2:]), self.patch_shape)
        return pixel_values.to(self.device, self.dtype)


def layer_numbers(layers: int | Sequence[int], num_layers: int, *, first: int) -> list[int]:
    """Numbers of layers that may be counted from either end.

    Args:
        layers: one or several; -1 is the last layer.
        num_layers: number of layers of the model.
        first: smallest number that makes sense: 0, the input of the first layer, or 1.

    Raises:
        ValueError: no layer, or one that does not exist.
    """
    layers = [layers] if isinstance(layers, int) else list(layers)
    lowest = first - num_layers - 1
    if not layers or any(not (lowest <= layer < 0 or first <= layer <= num_layers) for layer in layers):
        raise ValueError(
            f"expected layers from {first} to {num_layers}, or from {lowest} to -1 counted from the end, got {layers}"
        )
    return [layer % (num_layers + 1) for layer in layers]


def _for_channels(values: Sequence[float], num_channels: int) -> tuple[float, ...]:
    """Mean or standard deviation of each channel; for other numbers of channels, the average over the colours."""
    values = tuple(values)
    return values if len(values) == num_channels else (sum(values) / len(values),) * num_channels


class _Enough(Exception):
    """Everything that was asked for is there: the rest of the model need not run."""
