"""Massive activations: entries of the residual stream far above all others, in few channels and few tokens.

An entry is massive if its magnitude is above 100 and above 1000 times the median magnitude of its image and layer
(Sun et al. 2024, arXiv 2402.17762). In Vision Transformers the largest entries stay below 500 and rarely reach that
ratio, so a ratio of 100, and that ratio alone, are counted as well.

Letters for shapes: L layers, B images, N tokens, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


MASSIVE_VALUE = 100.0
MASSIVE_RATIOS = {"language models": 1000.0, "vision": 100.0}  # to the median magnitude
_SAMPLE = 4096  # entries of an image sampled for its median


class MassiveActivations:
    """The largest entries of each layer, batch by batch, in constant memory.

    Args:
        num_layers: L.
        width: D.
        kinds: number of tokens of each kind, in order: class token, distillation token, registers, patches.
    """

    def __init__(self, num_layers: int, *, width: int, kinds: dict):
        self.kinds = dict(kinds)
        self.num_images = 0
        self._largest = np.zeros((num_layers, width))  # of each channel, over images and tokens
        self._ratios = np.zeros(num_layers)  # largest of an image over its median, the largest of all images
        self._medians = np.zeros(num_layers)  # sums
        self._energy = np.zeros((num_layers, width))  # sums of squares of each channel
        self._carriers = np.zeros((num_layers, len(kinds)), np.int64)  # images by the kind of their largest entry
        self._massive = {name: np.zeros((num_layers, len(kinds)), np.int64) for name in (*MASSIVE_RATIOS, "ratio")}

    def add(self, layer: int, parts: list[Tensor]) -> None:
        """Add the tokens (B, n, D) of each of `kinds` of one layer, n may be 0. `count` then counts the images.

        The median is computed over the last kind, the patches, which are most of the tokens.
        """
        sizes = [part.detach().abs().float() for part in parts]
        medians = sample_medians(sizes[-1])  # [B]
        by_token = torch.cat([part.amax(dim=2) for part in sizes], dim=1)  # [B, N]
        peaks, carriers = by_token.max(dim=1)
        filled = [part for part in sizes if part.shape[1]]
        by_channel = torch.stack([part.amax(dim=(0, 1)) for part in filled]).amax(dim=0)  # [D]
        self._largest[layer] = np.maximum(self._largest[layer], _to_numpy(by_channel))
        self._energy[layer] += sum(_to_numpy(part.square().sum(dim=(0, 1))) for part in filled)
        self._medians[layer] += _to_numpy(medians).sum()
        self._ratios[layer] = max(self._ratios[layer], (peaks / medians.clamp(min=1e-12)).max().item())
        ends = np.cumsum(list(self.kinds.values()))
        carriers = np.searchsorted(ends, carriers.cpu().numpy(), side="right")
        self._carriers[layer] += np.bincount(carriers, minlength=len(self.kinds))
        for name, least in self._limits(medians).items():
            if (peaks > least).any():
                found = [(part > least[:, None, None]).sum().item() for part in sizes]
                self._massive[name][layer] += np.array(found)

    def count(self, num_images: int) -> None:
        """Count the images of a batch after all its layers were added."""
        self.num_images += num_images

    def merge(self, other: MassiveActivations) -> None:
        """Add what was found in other images."""
        for name in ("num_images", "_medians", "_energy", "_carriers"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("_largest", "_ratios"):
            setattr(self, name, np.maximum(getattr(self, name), getattr(other, name)))
        self._massive = {name: counts + other._massive[name] for name, counts in self._massive.items()}

    def summarise(self) -> dict:
        """Numbers of all layers.

        Returns:
            `num_images`, `criteria` (descriptions), `channels` that are largest in most layers, and `layers`, each
            with `layer`, `largest`, `median` magnitude, the maximum over images of `largest_over_median`,
            `top_channels` as [channel, largest], `top_shares` (shares of the squared norm in the largest and the three
            largest channels), `carriers` (share of images whose largest entry lies in a token of each kind) and
            `massive` (entries per image by criterion and kind of token).
        """
        layers = [self._summarise_layer(number) for number in range(len(self._largest))]
        leaders, counts = np.unique([layer["top_channels"][0][0] for layer in layers], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {
            "num_images": self.num_images,
            "criteria": {
                **{name: f"above {MASSIVE_VALUE:g} and {ratio:g} x median" for name, ratio in MASSIVE_RATIOS.items()},
                "ratio": f"above {min(MASSIVE_RATIOS.values()):g} x median",
            },
            "channels": [[int(leaders[place]), int(counts[place])] for place in order],
            "layers": layers,
        }

    def _limits(self, medians: Tensor) -> dict:
        limits = {name: (ratio * medians).clamp(min=MASSIVE_VALUE) for name, ratio in MASSIVE_RATIOS.items()}
        return {**limits, "ratio": min(MASSIVE_RATIOS.values()) * medians}

    def _summarise_layer(self, number: int) -> dict:
        largest, energy = self._largest[number], np.sort(self._energy[number])[::-1]
        top = np.argsort(-largest, kind="stable")[:3]
        share = energy / max(energy.sum(), 1e-30)
        return {
            "layer": number + 1,
            "largest": float(largest.max()),
            "median": float(self._medians[number] / self.num_images),
            "largest_over_median": float(self._ratios[number]),
            "top_channels": [[int(channel), float(largest[channel])] for channel in top],
            "top_shares": [float(share[:1].sum()), float(share[:3].sum())],
            "carriers": dict(zip(self.kinds, (self._carriers[number] / self.num_images).tolist())),
            "massive": {
                name: dict(zip(self.kinds, (counts[number] / self.num_images).tolist()))
                for name, counts in self._massive.items()
            },
        }


def sample_medians(sizes: Tensor) -> Tensor:
    """Approximate median (B,) of the entries (B, N, D) of each image, over thousands of evenly spaced ones; the exact
    median would cost more time than the layer itself."""
    entries = sizes.flatten(1)
    # An odd step: one that divides the width would visit few channels.
    step = max(entries.shape[1] // _SAMPLE, 1) | 1
    return entries[:, ::step].median(dim=1).values


def _to_numpy(values: Tensor) -> np.ndarray:
    return values.cpu().double().numpy()
