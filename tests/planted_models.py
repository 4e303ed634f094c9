"""Models with artifacts that were put there: the truth that every tool of analysis must find, no more and no less.

The patches of a picture are noise, but for some that are white. One unit of one layer fires on white patches only and
adds a vector of a chosen length to them; no other layer changes a token. So the outliers are the white patches, from
the chosen layer on, and they are redundant: a white patch holds nothing that its neighbours do not.
"""

import zlib

import numpy as np
import torch
from PIL import Image

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel


SIDE, PATCH = 32, 8  # pixels
DEPTH, WIDTH = 4, 32
GRID = (SIDE // PATCH, SIDE // PATCH)


def plain_model(**overrides) -> ViTWithRegistersModel:
    """A model whose layers change no token, with registers and a class token."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    settings = {**sizes, "image_size": SIDE, "patch_size": PATCH, "num_register_tokens": 2, **overrides}
    model = ViTWithRegistersModel(ViTWithRegistersConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # by its name, for libraries draw initial weights in different orders
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        embedding = model.embeddings.patch_embeddings
        embedding.weight *= 2.5
        embedding.weight -= embedding.weight.mean(dim=(1, 2, 3), keepdim=True)  # white has nothing in other channels
        embedding.weight[0] = 1 / embedding.weight[0].numel()  # channel 0 is the mean of the pixels
        for token in (model.embeddings.cls_token, model.embeddings.register_tokens):
            if token is not None:
                (token if isinstance(token, torch.nn.Parameter) else token.weight)[..., 0] = 0
        for layer in model.layers:
            for last in (layer.attention.proj, layer.mlp.fc2):
                last.weight.zero_()
    return model


def planted_model(*, layer: int, magnitude: float, channel: int | None = None, **overrides) -> ViTWithRegistersModel:
    """A model whose white patches are outliers at the output of `layer` (from 1) and of all behind it.

    Args:
        layer: that plants.
        magnitude: length of the vector that is added to a white patch.
        channel: the one that it lies along, a massive activation; None: all channels alike.
    """
    model = plain_model(**overrides)
    mlp = model.layers[layer - 1].mlp
    with torch.no_grad():
        mlp.fc1.weight.zero_()
        mlp.fc1.weight[0, 0], mlp.fc1.bias[0] = 10.0, -35.0  # in channel 0 white has above 5 after the norm, others 2
        if mlp.is_gated:
            mlp.fc1.bias[mlp.fc2.in_features] = 1.0  # the value that the gate of this unit multiplies
        direction = torch.full((WIDTH,), WIDTH**-0.5) if channel is None else torch.eye(WIDTH)[channel]
        output = model(_white(), output_hidden_states=[layer])
        tokens = model.split_tokens(output.hidden_states[layer], GRID).patch_tokens
        unit = mlp.activation(mlp.fc1(model.layers[layer - 1].norm2(tokens)))[..., 0].mean()
        mlp.fc2.weight[:, 0] = magnitude / unit * direction
    return model


def pictures(num_images: int, *, num_white: int = 2, seed: int = 0) -> tuple[list[Image.Image], np.ndarray]:
    """Pictures of noise with white patches, and where they are, (images, rows, columns)."""
    random = np.random.default_rng(seed)
    # Patches of zero mean noise around grey, so that no other patch comes near white.
    pixels = random.integers(60, 170, (num_images, SIDE, SIDE, 3)).astype(np.uint8)
    is_white = np.zeros((num_images, GRID[0] * GRID[1]), bool)
    for row in is_white:
        row[random.permutation(len(row))[:num_white]] = True
    is_white = is_white.reshape(num_images, *GRID)
    pixels[is_white.repeat(PATCH, axis=1).repeat(PATCH, axis=2)] = 255
    return [Image.fromarray(picture) for picture in pixels], is_white


def _white() -> torch.Tensor:
    return torch.full((1, 3, SIDE, SIDE), 2.0)


__all__ = ["DEPTH", "GRID", "PATCH", "SIDE", "WIDTH", "pictures", "plain_model", "planted_model"]
