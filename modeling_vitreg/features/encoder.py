"""One interface to the tokens and the attention of every supported model.

Letters for shapes: B images, N tokens, P patches, R registers, Q prefix tokens, D width, H heads, L layers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from modeling_vitreg.image_processing_vitreg import MODES
from modeling_vitreg.images import check_channels
from modeling_vitreg.modeling_vitreg import check_image_size
from modeling_vitreg.modes import eval_mode
from modeling_vitreg.reports import made_with

from .families import (
    WITHOUT_ATTENTION,
    any_image_size,
    count_heads,
    find_image_size,
    find_layers,
    find_part,
    keywords_of,
)
from .hooks import record_attention, record_checked_attention
from .parts import (
    as_sequence,
    count_channels,
    count_tokens,
    examine,
    find_norm,
    find_patches,
    kept_settings,
    open_tower,
    told_sizes,
)
from .pixels import crop_image, normalise


NO_ATTENTION = "the model has no attention"


class Encoder:
    """A model of a supported family, with the names of its parts. `load_encoder` makes one.

    Args:
        model: the module, with or without a head; it is used as it is and never changed.
        name: for reports.
        statistics: mean and standard deviation of each channel, for pixels in 0 ... 1.
        parts: where the parts of a model lie that is not known, see `parts.read_parts`.

    Attributes:
        model, name, parts, family: as above; the family is a short word such as "dinov2" or "timm".
        tower, layers: the module that holds embeddings, layers and final norm, and its layers.
        num_layers, num_heads, hidden_size: L, H and D; H is 0 without attention, and None where it is of an
            unknown kind.
        patch_shape: (rows, columns) of a patch in pixels; of a hierarchical model, of a token of its last grid.
        image_size: (rows, columns) that the model was trained at, in pixels.
        num_register_tokens, num_cls_tokens, has_cls_token, has_distillation_token: the prefix.
        takes_any_size: whether it reads images of several sizes.
        is_partial: whether the layers are those of the last grid of several.
        image_mean, image_std: one value a channel.
        device, dtype: device and dtype of the weights.

    Raises:
        ValueError: a model that cannot be measured; the message proposes its parts.
    """

    def __init__(self, model: nn.Module, *, name: str, statistics: tuple, parts: dict[str, str] | None = None):
        self.model, self.name, parts = model, name, parts or {}
        self.family, self.tower, self._is_known = open_tower(model, parts)
        self.parts = parts
        self._patches = find_patches(self.tower, parts)
        self.takes_any_size, self.is_partial = True, False
        if self._is_known:
            self.layers, self.hidden_size = find_layers(self.tower), self._patches.out_channels
            self.patch_shape = tuple(self._patches.kernel_size)
            counts = (count_tokens(self.tower, {}, part) for part in ("cls", "distillation", "registers"))
        else:
            found = examine(self.tower, self.family, parts, name=name)
            self.layers, self.hidden_size, self.patch_shape = found.layers, found.hidden_size, found.stride
            self.takes_any_size, self.is_partial, counts = found.takes_any_size, found.is_partial, found.counts
        self.num_cls_tokens, num_distillation, self.num_register_tokens = counts
        self.has_distillation_token = bool(num_distillation)
        self.num_layers = len(self.layers)
        attention = find_part(self.layers[0], "attention")
        self.num_heads = 0 if self.family in WITHOUT_ATTENTION else count_heads(self.tower, attention)
        self.image_size = find_image_size(self.tower, self.patch_shape)
        self._is_compiled = False
        self.image_mean, self.image_std = (_for_channels(values, self.num_channels) for values in statistics)

    @property
    def has_cls_token(self) -> bool:
        """Whether the sequence begins with a class token."""
        return self.num_cls_tokens > 0

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
            **({"num_cls_tokens": self.num_cls_tokens} if self.num_cls_tokens > 1 else {}),
            **({"layers": f"the {self.num_layers} blocks of the last of several grids"} if self.is_partial else {}),
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
        """Tokens in front of the patches: class tokens, distillation token and registers."""
        return self.num_cls_tokens + self.has_distillation_token + self.num_register_tokens

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self._patches.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self._patches.parameters()).dtype

    @property
    def num_channels(self) -> int:
        """C, the channels of an image."""
        return count_channels(self.tower, self._patches)

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
        """(B, P, D): what the patch embedding makes of images (B, C, height, width), before positions.

        Of a hierarchical model it is the mean over the patches under each token of the last grid.
        """
        if self._is_known:
            return self._patches(self._check(pixel_values)).flatten(2).transpose(1, 2)

        def hooks(keep: Callable) -> Iterator:
            yield self._patches.register_forward_hook(lambda _, __, value: keep("patches", value))

        value = self.run(pixel_values, hooks, num_expected=1)["patches"]
        if value.ndim == 4:  # of a convolution
            grid = [side // patch for side, patch in zip(pixel_values.shape[2:], self.patch_shape)]
            value = F.adaptive_avg_pool2d(value, grid)
        return as_sequence(value, grid=(0, 0))

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
            ValueError: images that do not fit, no such layer, no attention, or attention that is more than a softmax
                of the products of queries and keys, in a model of a family that is not known.
        """
        if self.num_heads == 0:
            raise ValueError(NO_ATTENTION)
        numbers = layer_numbers(layers, self.num_layers, first=1)
        sizes = {"num_heads": self.num_heads, "num_queries": self.num_prefix_tokens}
        record = record_attention if self._is_known else record_checked_attention

        def hooks(keep: Callable) -> Iterator:
            for number in set(numbers):
                yield from record(self.layers[number - 1], functools.partial(keep, number), **sizes)

        found = self.run(pixel_values, hooks, num_expected=len(set(numbers)))
        return [found[number] for number in numbers]

    def norm_tokens(self, tokens: Tensor) -> Tensor:
        """Apply the final norm to tokens (B, N, D), unless the model norms the pooled vector instead."""
        norm = getattr(self.tower, "norm_tokens", None)
        if norm is None:
            norm = find_part(self.tower, "norm") if self._is_known else find_norm(self.tower, self.parts)
        return tokens if norm is None else norm(tokens)

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
            if not self._is_known:
                stack.enter_context(kept_settings(self.tower))
                stack.enter_context(told_sizes(self.name, tuple(pixel_values.shape[2:]), self.image_size))
            self.tower(pixel_values, **keywords_of(self.tower, self.family, pixel_values, self.patch_shape))
        if len(found) != num_expected:
            raise RuntimeError(f"{self.name}: the model did not call all of its expected modules")
        return found

    def _check(self, pixel_values: Tensor) -> Tensor:
        channels = self.num_channels
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
