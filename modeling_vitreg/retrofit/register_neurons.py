"""Find the MLP units that write outliers, and a model in which they act on a test-time register instead.

Letters for shapes: L layers, B images, N tokens, P patches, D width, E hidden units of an MLP.

Source: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", arXiv 2506.08010. The published search
needs a threshold, a layer and a number of units for each model; here they are chosen from the model itself.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modeling_vitreg.analysis.histograms import NormHistograms
from modeling_vitreg.analysis.verdict import FEW_SHARE, summarise_layer
from modeling_vitreg.configuration_vitreg import ViTWithRegistersConfig
from modeling_vitreg.modeling_vitreg import (
    ViTWithRegistersModel,
    ViTWithRegistersRegisterNeuronMLP,
    ViTWithRegistersRegisterTokens,
)


NUM_UNITS = (1, 2, 5, 10, 20, 50, 100, 200)  # candidates
HIGHEST_SHARE = (
    0.1  # of the outliers of the detection layer: the first layer with more is the highest that is searched
)
LARGEST_SHARE = 0.2  # of the outliers of the original that may remain
LEAST_COSINE = 0.99  # between the class tokens of original and result
TOLERATED_RISE = 1.05  # of the largest norm: fewer units are preferred within it


class NothingToRepair(ValueError):
    """The model has no outliers on these images."""


@dataclass(frozen=True)
class Outliers:
    """Outliers of a model on some images.

    Args:
        layer: the detection layer, from 1: its norms have the deepest valley between two modes.
        threshold: norm above which a patch of this layer is an outlier.
        highest_layer: last layer whose units are searched, from 1.
        shares: share of outliers of each layer, by the automatic rule of `analysis.verdict`.
        masks: for each batch of images (B, P), true on an outlier of the detection layer.
    """

    layer: int
    threshold: float
    highest_layer: int
    shares: tuple[float, ...]
    masks: tuple[Tensor, ...]

    @property
    def share(self) -> float:
        """Share of the patches that are outliers."""
        return sum(mask.sum().item() for mask in self.masks) / sum(mask.numel() for mask in self.masks)


@torch.no_grad()
def find_outliers(
    model: ViTWithRegistersModel,
    batches: Iterable[Tensor],
    *,
    layer: int | None = None,
    threshold: float | None = None,
    highest_layer: int | None = None,
) -> Outliers:
    """Choose the detection layer, its threshold and the highest layer to search, in one pass.

    Args:
        model: in evaluation mode.
        batches: normalised images (B, 3, height, width), all of one size.
        layer, threshold, highest_layer: use these instead of the automatic choice; layers count from 1.

    Raises:
        NothingToRepair: no patch is an outlier.
        ValueError: a layer that does not exist, or a threshold that is not positive.
    """
    num_layers = len(model.layers)
    for name, number in (("layer", layer), ("highest_layer", highest_layer)):
        if number is not None and not 1 <= number <= num_layers:
            raise ValueError(f"expected {name} in 1 ... {num_layers}, got {number}")
    if threshold is not None and not threshold > 0:
        raise ValueError(f"expected a threshold above 0, got {threshold}")
    histograms, norms = NormHistograms(num_layers), []
    for images in batches:
        norms.append(_patch_norms(model, images))
        if not norms[-1].isfinite().all():
            raise ValueError("expected finite features, got NaN or infinity: the weights are damaged")
        histograms.add(norms[-1])
    layers = [summarise_layer(histograms, number) for number in range(num_layers)]
    shares = [summary["rules"]["automatic"]["share"] for summary in layers]
    if layer is None:
        layer = _deepest_valley(layers, shares)
    if threshold is None:
        threshold = layers[layer - 1]["rules"]["automatic"]["threshold"]
    masks = tuple(batch[layer - 1] >= threshold for batch in norms)
    share = sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)
    if share == 0:
        raise NothingToRepair(
            f"nothing to repair: no patch of layer {layer} has a norm above {threshold:.4g} in "
            f"{histograms.num_images} images"
        )
    if highest_layer is None:
        highest_layer = next(
            n for n, each in enumerate(shares[:layer] + [1.0], start=1) if each > HIGHEST_SHARE * share
        )
    return Outliers(layer, float(threshold), min(highest_layer, layer), tuple(shares), masks)


def _deepest_valley(layers: list[dict], shares: list[float]) -> int:
    """Number of the layer with the deepest valley, the last of several; without any, the one with most outliers."""
    candidates = [n for n, share in enumerate(shares) if share >= FEW_SHARE]
    if not candidates:
        raise NothingToRepair(
            f"nothing to repair: no layer has outliers; the largest share is {max(shares):.2g} of the patches, in "
            f"layer {shares.index(max(shares)) + 1}"
        )
    return max(candidates, key=lambda n: (round(layers[n]["valley_depth"], 3), shares[n] * (1 + 1e-6 * n))) + 1


def _patch_norms(model: ViTWithRegistersModel, images: Tensor) -> Tensor:
    """Norms (L, B, P) of the patches after each layer, on the CPU."""
    states = model(images, output_hidden_states=True).hidden_states[1:]
    first = model.config.num_prefix_tokens
    return torch.stack([state[:, first:].float().norm(dim=-1) for state in states]).cpu()


@torch.no_grad()
def score_units(model: ViTWithRegistersModel, batches: Iterable[Tensor], outliers: Outliers) -> Tensor:
    """Mean magnitude of the activation of each unit on outliers, (`highest_layer`, E).

    for each image with an outlier:
        score[l, u] += mean over its outliers of |activation of unit u in layer l|
    divide by the number of these images

    Layers after `outliers.highest_layer` do not run.
    """
    depth, first = outliers.highest_layer, model.config.num_prefix_tokens
    scores = torch.zeros(depth, model.config.intermediate_size, dtype=torch.float64)
    num_images = 0
    for images, mask in zip(batches, outliers.masks):
        has_any = mask.any(dim=1)
        if not has_any.any():
            continue
        weights = mask[has_any].double()
        weights = (weights / weights.sum(dim=1, keepdim=True)).to(images.device)  # [B, P], mean over outliers
        num_images += len(weights)

        def add(number: int, activations: Tensor, weights: Tensor = weights) -> None:
            magnitudes = activations[:, first:].abs().double()  # [B, N, E] -> [B, P, E]
            scores[number] += torch.einsum("bp,bpe->e", weights, magnitudes).cpu()

        with _activations(model, depth, add):
            state, rotary, _ = model.embed(images[has_any.to(images.device)])
            for layer in model.layers[:depth]:
                state = layer(state, rotary)
    return scores / num_images


@contextlib.contextmanager
def _activations(model: ViTWithRegistersModel, depth: int, keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `keep(layer, activations)` inside the block, for the first layers, counted from 0."""
    handles = [
        layer.mlp.fc2.register_forward_pre_hook(lambda _, inputs, number=number: keep(number, inputs[0]))
        for number, layer in enumerate(model.layers[:depth])
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rank_units(scores: Tensor) -> list[tuple[int, int]]:
    """Pairs (layer from 1, unit) by falling score."""
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    return [(index // scores.shape[1] + 1, index % scores.shape[1]) for index in order]


def group_units(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """`register_neurons` of the configuration: the units of each layer."""
    units: dict[int, list[int]] = {}
    for layer, unit in pairs:
        units.setdefault(layer, []).append(unit)
    return {layer: sorted(units[layer]) for layer in sorted(units)}


def add_test_time_register(model: nn.Module, units: dict[int, list[int]], *, num_registers: int = 1) -> nn.Module:
    """A copy of a model with zero registers after its own, to which the activation of `units` moves.

    Args:
        model: of this family, with any head, or a dual encoder of it. It is not changed. Units of an earlier retrofit
            stay, and act on the new registers too.
        units: units of each layer, from 1; empty for a zero token alone, the control.
        num_registers: number of registers that are added.

    Raises:
        ValueError: a layer or unit that does not exist, or an architecture without room for such a register.
    """
    repaired = copy.deepcopy(model)
    tower = image_tower(repaired)
    config = tower.config
    merged = {int(layer): set(earlier) for layer, earlier in config.register_neurons.items()}
    for layer, new in units.items():
        merged[layer] = merged.get(layer, set()) | set(new)
    changes = {
        "num_register_tokens": config.num_register_tokens + num_registers,
        "num_test_time_registers": config.num_test_time_registers + num_registers,
        "register_neurons": {str(layer): sorted(merged[layer]) for layer in sorted(merged)},
    }
    ViTWithRegistersConfig.from_dict(config.to_dict() | changes)  # runs the checks of the constructor
    for name, value in changes.items():
        setattr(config, name, value)
    old, weight = tower.embeddings.register_tokens, tower.embeddings.patch_embeddings.weight
    registers = ViTWithRegistersRegisterTokens(config.num_register_tokens, config.hidden_size).to(weight)
    registers.weight.data.zero_()
    if old is not None:
        registers.weight.data[: len(old.weight)] = old.weight.data
    tower.embeddings.register_tokens = registers
    for number, layer in enumerate(tower.layers, start=1):
        if str(number) in config.register_neurons:
            mlp = ViTWithRegistersRegisterNeuronMLP(config, config.register_neurons[str(number)]).to(weight)
            mlp.load_state_dict(layer.mlp.state_dict())
            layer.mlp = mlp.train(layer.mlp.training)
    return repaired


def image_tower(model: nn.Module) -> ViTWithRegistersModel:
    """The `ViTWithRegistersModel` inside a model with a head or a dual encoder.

    Raises:
        ValueError: there is none.
    """
    towers = [module for module in model.modules() if isinstance(module, ViTWithRegistersModel)]
    if len(towers) != 1:
        raise ValueError(f"expected a model of this family, got {type(model).__name__}: convert it first")
    return towers[0]


@dataclass(frozen=True)
class Observed:
    """What a model makes of B images.

    Args:
        norms: of the patches at the detection layer (B, P).
        vectors: class tokens (B, D), mean patches of a model without one.
    """

    norms: Tensor
    vectors: Tensor

    def __add__(self, other: Observed) -> Observed:
        return Observed(torch.cat([self.norms, other.norms]), torch.cat([self.vectors, other.vectors]))


@torch.no_grad()
def observe(model: ViTWithRegistersModel, batches: Iterable[Tensor], outliers: Outliers) -> Observed:
    """Run a model once over some images."""
    norms, vectors = [], []
    for images in batches:
        output = model(images, output_hidden_states=[outliers.layer])
        state = output.hidden_states[outliers.layer]
        norms.append(state[:, model.config.num_prefix_tokens :].float().norm(dim=-1).cpu())
        vector = output.patch_tokens.mean(dim=1) if output.cls_token is None else output.cls_token
        vectors.append(vector.double().cpu())
    return Observed(torch.cat(norms), torch.cat(vectors))


def measure_repair(before: Observed, after: Observed, outliers: Outliers) -> dict:
    """Compare a repaired model with its original on the same images.

    Returns:
        `share_before`, `share`, of patches above the threshold at the detection layer, with `interval_before` and
        `interval` of 95 % over images (None for one image); `largest_norm_before`, `largest_norm` there; `cosine`, the
        mean cosine of the class tokens (of mean patches, for a model without one); `num_images`.
    """
    shares = [(each.norms >= outliers.threshold).double().mean(dim=1) for each in (before, after)]  # [B, P] -> [B]
    return {
        "share_before": shares[0].mean().item(),
        "interval_before": _interval(shares[0]),
        "share": shares[1].mean().item(),
        "interval": _interval(shares[1]),
        "largest_norm_before": before.norms.max().item(),
        "largest_norm": after.norms.max().item(),
        "cosine": torch.cosine_similarity(before.vectors, after.vectors, dim=-1).mean().item(),
        "num_images": len(before.norms),
    }


def _interval(shares: Tensor) -> list[float] | None:
    """95 % interval of the mean of shares (B,), as that of `NormHistograms.share_above`; None for one image."""
    num_images = len(shares)
    if num_images < 2:
        return None
    reach, mean = 1.96 * shares.std().item() / num_images**0.5, shares.mean().item()
    high = 1 - 0.05 ** (1 / num_images) if not mean else min(mean + reach, 1.0)
    return [max(mean - reach, 0.0), high]


def is_acceptable(measured: dict) -> bool:
    """Whether outliers fall to a fifth or less and the class token stays, by what `measure_repair` returns."""
    is_gone = measured["share"] <= LARGEST_SHARE * measured["share_before"]
    return is_gone and measured["cosine"] >= LEAST_COSINE


def choose_num_units(
    model: ViTWithRegistersModel,
    ranking: list[tuple[int, int]],
    batches: list[Tensor],
    outliers: Outliers,
    *,
    original: Observed,
    candidates: Iterable[int] = NUM_UNITS,
) -> tuple[int, list[dict]]:
    """The smallest number of units whose largest patch norm is within 5 % of the best.

    Only numbers that `is_acceptable` count, if there are any: more units lower norms further and move the class token.

    Args:
        ranking: of `rank_units`.
        batches: held-out images.
        original: what the model makes of these.

    Returns:
        The number, and for each candidate `num_units` and what `measure_repair` returns.
    """
    tried = []
    numbers = [number for number in candidates if number <= len(ranking)]
    if not numbers:
        raise ValueError(
            f"expected num_units of {len(ranking)} or less, all units up to layer {outliers.highest_layer}"
        )
    for number in tqdm(numbers, desc="choose units", unit="candidate"):
        repaired = add_test_time_register(model, group_units(ranking[:number]))
        measured = measure_repair(original, observe(repaired, batches, outliers), outliers)
        tried.append({"num_units": number, **measured})
    allowed = [entry for entry in tried if is_acceptable(entry)] or tried
    lowest = min(entry["largest_norm"] for entry in allowed)
    chosen = next(entry for entry in allowed if entry["largest_norm"] <= TOLERATED_RISE * lowest)
    return chosen["num_units"], tried
