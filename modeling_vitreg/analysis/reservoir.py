"""Tokens of the first images, kept for the probes until the threshold of outliers is known.

For each image the reservoir keeps random patches, the patches with the largest norms, class token and registers, all
from the last layer before the final norm, and the pixels of those patches. Outliers are therefore drawn from the
largest patches of an image.

Letters for shapes: B images, P patches, R registers, D width, K patches kept of an image, I images kept.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


NUM_RANDOM = 4  # patches of an image
NUM_LARGEST = 4


class TokenReservoir:
    """Tokens of up to `num_images` images.

    Args:
        num_images: number of images, 0 for none.
        patch_shape: (rows, columns) of a patch in pixels.
        seed: random seed of the patches.
    """

    def __init__(self, num_images: int, *, patch_shape: tuple, seed: int = 0):
        self.num_images = num_images
        self._patch_shape = tuple(patch_shape)
        self._seed, self._order = seed, None
        self._parts: list[dict] = []

    def add(self, tokens, norms: Tensor, *, numbers: Tensor, pixel_values: Tensor, labels: list) -> None:
        """Add a batch; images whose number is not below `num_images` are ignored.

        Args:
            tokens: `TokenFeatures` of the last layer.
            norms: (B, P) of its patches.
            numbers: (B,) places of the images in the source, ascending.
            pixel_values: (B, C, height, width), as the model saw them.
            labels: class numbers or None, B of them.
        """
        size = int((numbers < self.num_images).sum())
        if not size:
            return
        norms = norms[:size].cpu()
        num_patches = norms.shape[1]
        if self._order is None:  # of all images at once, so that it depends on no batch and no process
            draws = torch.rand(self.num_images, num_patches, generator=torch.Generator().manual_seed(self._seed))
            self._order = draws.argsort(dim=1)[:, :NUM_RANDOM].clone()
        order = self._order[numbers[:size]]
        chosen = torch.cat([order, norms.topk(min(NUM_LARGEST, num_patches)).indices], dim=1)  # [B, K]
        pixels = F.unfold(pixel_values[:size].float(), self._patch_shape, stride=self._patch_shape).transpose(1, 2)
        part = {
            "numbers": numbers[:size].numpy(),
            "tokens": _take(tokens.patch_tokens[:size], chosen),
            "pixels": _take(pixels, chosen),  # [B, C height width] -> [B, K, C x patch]
            "places": chosen.numpy(),
            "norms": norms.gather(1, chosen).numpy(),
            "registers": _to_numpy(tokens.register_tokens[:size]),
            "labels": np.array([-1 if label is None else label for label in labels[:size]]),
        }
        if tokens.cls_token is not None:
            part["cls"] = _to_numpy(tokens.cls_token[:size])
        self._parts.append(part)

    def merge(self, other: TokenReservoir) -> None:
        """Add the tokens of other images."""
        self._parts += other._parts

    def __len__(self) -> int:
        return sum(len(part["numbers"]) for part in self._parts)

    def collect(self) -> dict:
        """All tokens: `tokens` (I, K, D), `pixels`, `places`, `norms` (I, K), `registers` (I, R, D), `labels`
        (I,) with -1 for none, `cls` (I, D) if the model has a class token, and `numbers` (I,), ascending."""
        kept = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        order = np.argsort(kept["numbers"])
        return {name: values[order] for name, values in kept.items()}


def make_sample(kept: dict, *, threshold: float) -> dict:
    """Arguments of `probes.TokenSample` from the result of `TokenReservoir.collect`; each patch of an image once."""
    images = np.repeat(np.arange(len(kept["norms"])), kept["norms"].shape[1])
    places = kept["places"].ravel()
    _, first = np.unique(np.stack([images, places]), axis=1, return_index=True)
    return {
        "tokens": kept["tokens"].reshape(len(images), -1)[first],
        "images": images[first],
        "places": places[first],
        "is_outlier": kept["norms"].ravel()[first] >= threshold,
        "pixels": kept["pixels"].reshape(len(images), -1)[first],
    }


def draw_tokens(kept: dict, *, threshold: float, num_draws: int, seed: int = 0) -> dict:
    """One token per image, drawn several times, for `probes.probe_class`: the class token, a random normal patch, a
    random outlier and a random register, as far as they exist."""
    random = np.random.default_rng(seed)
    is_outlier, number = kept["norms"] >= threshold, np.arange(len(kept["norms"]))
    # The largest patches are a biased choice, so normal patches are drawn from the random ones.
    is_normal = ~is_outlier & (np.arange(is_outlier.shape[1]) < NUM_RANDOM)
    draws = {"class token": [(number, kept["cls"])]} if "cls" in kept else {}
    for kind, members in (("normal patch", is_normal), ("outlier patch", is_outlier)):
        images = np.flatnonzero(members.any(axis=1))
        if len(images):
            draws[kind] = [_draw(kept["tokens"], members, images, random) for _ in range(num_draws)]
    registers = kept["registers"]
    if registers.shape[1]:
        everyone = np.ones(registers.shape[:2], bool)
        draws["register"] = [_draw(registers, everyone, number, random) for _ in range(num_draws)]
    return draws


def _draw(tokens: np.ndarray, members: np.ndarray, images: np.ndarray, random: np.random.Generator) -> tuple:
    chosen = np.where(members[images], random.random(members[images].shape), -1).argmax(axis=1)
    return images, tokens[images, chosen]


def _take(values: Tensor, chosen: Tensor) -> np.ndarray:
    index = chosen.to(values.device)[:, :, None].expand(-1, -1, values.shape[2])
    return _to_numpy(values.gather(1, index))


def _to_numpy(values: Tensor) -> np.ndarray:
    return values.detach().float().cpu().numpy()
