"""Ablation: replace the registers, or the class token, inside a trained network and compare the final tokens.

A model has never seen registers of zeros, so zeros overstate the effect. Plausible values without information about
the image (the mean over images, noise around it, registers of another image) are the controls (arXiv 2604.14433):
their effect is the loss of information, and the further effect of zeros is that of unusual inputs.

Registers are replaced at the input of each layer from `from_layer` on, by values computed from the unchanged model.

Letters for shapes: B images, L layers, R registers, P patches, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.modeling_vitreg import ViTWithRegistersRegisterNeuronMLP
from modeling_vitreg.modes import changed_attributes, eval_mode


MODES = {
    "zeroed": "zeros",
    "mean": "mean over the images",
    "noise": "random, with the mean and standard deviation over the images",
    "shuffled": "registers of another image",
    "removed": "removed from the sequence",
}


@torch.no_grad()
def ablate_registers(
    model: nn.Module,
    pixel_values: Tensor,
    *,
    from_layer: int = 1,
    seed: int = 0,
    score: Callable[[Tensor | None, Tensor], float] | None = None,
) -> dict:
    """Replace the registers of a model in five ways, and measure the change of class token and patches.

    Args:
        model: a model of this package, with or without a head; it is not changed.
        pixel_values: (B, C, height, width), two images or more.
        from_layer: first layer whose input is changed, from 1; "removed" removes the registers from the embedding on.
        seed: random seed of the noise.
        score: function of normed class tokens (B, D) or None and patch tokens (B, P, D), such as a probe accuracy.

    Returns:
        `num_images`, `num_register_tokens`, `from_layer`, `measured` (a description), `score` of the unchanged model
        if a score was given, and `modes`: for each of `MODES` its `meaning`, its `score`, and for `cls` (None without
        a class token) and `patches` the mean `cosine` with the tokens of the unchanged model, and the mean `distance`
        relative to their norm with `distance_error`, its standard error over images.

    Raises:
        ValueError: a model of another package or without registers, fewer than two images, or no such layer.
    """
    base = _check(model, pixel_values, from_layer)
    if not base.config.num_register_tokens:
        raise ValueError("expected a model with registers, got a model without registers")
    place = base.config.token_slices["registers"]
    with eval_mode(base):
        states, whole = _run_and_record(base, pixel_values, place)
        modes = {}
        for mode in MODES:
            if mode == "removed":
                changed = _removed(base)
            else:
                changed = _replaced(base, place, _substitutes(states, mode, seed), from_layer)
            with changed:
                tokens = _tokens(base, pixel_values)
            modes[mode] = {
                "meaning": MODES[mode],
                "cls": None if whole[0] is None else _compare(tokens[0][:, None], whole[0][:, None]),
                "patches": _compare(tokens[1], whole[1]),
            }
            if score is not None:
                modes[mode]["score"] = float(score(*tokens))
    report = {
        "num_images": len(pixel_values),
        "num_register_tokens": base.config.num_register_tokens,
        "from_layer": from_layer,
        "measured": "normed tokens of the last layer, compared with those of the unchanged model",
        "modes": modes,
    }
    return report if score is None else {**report, "score": float(score(*whole))}


@torch.no_grad()
def ablate_class_token(model: nn.Module, pixel_values: Tensor, *, seed: int = 0) -> dict:
    """Replace the class token at the input of every layer in the same five ways; measure the change of the patches.

    A model whose patches change has put information about the image into the class token; registers take over this
    role (arXiv 2604.14433). "removed" takes the token out of the sequence behind the embedding.

    Args:
        model, pixel_values, seed: as in `ablate_registers`.

    Returns:
        `num_images` and `modes`: for each of `MODES` its `meaning` and `patches`, as in `ablate_registers`; without
        "removed" for a model that knows the place of the class token (relative position bias, gated and test-time
        registers, merged patches).

    Raises:
        ValueError: a model of another package or without class token, or fewer than two images.
    """
    base = _check(model, pixel_values, 1)
    if not base.config.has_cls_token:
        raise ValueError("expected a model with a class token, got a model without")
    config, place, modes = base.config, slice(0, base.config.num_cls_tokens), {}
    is_fixed = config.relative_position_bias is not None or config.token_reduction is not None
    is_fixed = is_fixed or config.num_gated_registers or config.num_test_time_registers
    with eval_mode(base):
        states, (_, whole) = _run_and_record(base, pixel_values, place)
        for mode in (mode for mode in MODES if not (mode == "removed" and is_fixed)):
            if mode == "removed":
                state, rotary, _ = base.embed(pixel_values)
                state = state[:, place.stop :]
                if config.has_rope:
                    rotary = tuple(table[..., place.stop :, :] for table in rotary)
                for layer in base.layers:
                    state = layer(state, rotary)
                patches = base.norm_tokens(state)[:, -whole.shape[1] :].float()
            else:
                with _replaced(base, place, _substitutes(states, mode, seed), 1):
                    patches = _tokens(base, pixel_values)[1]
            modes[mode] = {"meaning": MODES[mode].replace("registers", "that"), "patches": _compare(patches, whole)}
    return {"num_images": len(pixel_values), "modes": modes}


def _check(model: nn.Module, pixel_values: Tensor, from_layer: int) -> ViTWithRegistersModel:
    base = getattr(model, "base_model", model)
    if not isinstance(base, ViTWithRegistersModel):
        raise ValueError(f"expected a model of this package, got {type(model).__name__}: convert it first")
    if len(pixel_values) < 2:
        raise ValueError(f"expected two images or more, got {len(pixel_values)}: tokens are exchanged between images")
    if not 1 <= from_layer <= base.config.num_hidden_layers:
        raise ValueError(f"expected from_layer in 1 ... {base.config.num_hidden_layers}, got {from_layer}")
    return base


def _tokens(base: ViTWithRegistersModel, pixel_values: Tensor) -> tuple:
    output = base(pixel_values, return_dict=True)
    return None if output.cls_token is None else output.cls_token.float(), output.patch_tokens.float()


def _run_and_record(base: ViTWithRegistersModel, pixel_values: Tensor, place: slice) -> tuple:
    """Tokens (B, n, D) of a place at the input of each layer, and the normed class and patch tokens."""
    states = []
    record = lambda _, inputs: states.append(inputs[0][:, place].clone())  # noqa: E731
    hooks = [layer.register_forward_pre_hook(record) for layer in base.layers]
    try:
        return states, _tokens(base, pixel_values)
    finally:
        for hook in hooks:
            hook.remove()


def _substitutes(states: list[Tensor], mode: str, seed: int) -> list[Tensor]:
    """Values that replace the tokens (B, n, D) at the input of each layer."""
    if mode == "zeroed":
        return [torch.zeros_like(state) for state in states]
    if mode == "shuffled":
        return [state.roll(1, dims=0) for state in states]  # no image keeps its own
    means = [state.mean(dim=0, keepdim=True).expand_as(state) for state in states]
    if mode == "mean":
        return means
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(state.shape, generator=generator).to(state) for state in states]
    return [mean + state.std(dim=0) * part for mean, state, part in zip(means, states, noise)]


@contextlib.contextmanager
def _replaced(base: ViTWithRegistersModel, place: slice, substitutes: list[Tensor], from_layer: int) -> Iterator[None]:
    def hook_for(substitute: Tensor):
        def replace(_, inputs: tuple) -> tuple:
            tokens = inputs[0].clone()
            tokens[:, place] = substitute
            return (tokens, *inputs[1:])

        return replace

    pairs = list(zip(base.layers, substitutes))[from_layer - 1 :]
    hooks = [layer.register_forward_pre_hook(hook_for(substitute)) for layer, substitute in pairs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _removed(base: ViTWithRegistersModel) -> AbstractContextManager:
    """Without registers: gates have no token to act on, and units of test-time registers none to move to."""
    counts = ("num_register_tokens", "num_gated_registers", "num_test_time_registers")
    changes = [(base.embeddings, "register_tokens", None), *((base.config, name, 0) for name in counts)]
    for module in base.modules():
        if isinstance(module, ViTWithRegistersRegisterNeuronMLP):
            changes.append((module, "registers", (0, 0)))
        elif getattr(module, "register_gates", None) is not None:
            changes.append((module, "register_gates", None))
    return changed_attributes(changes)


def _compare(changed: Tensor, whole: Tensor) -> dict:
    """Cosine and relative distance of tokens (B, P, D), averaged over tokens, then over images."""
    cosine = F.cosine_similarity(changed, whole, dim=-1).mean(dim=1)  # [B, P, D] -> [B]
    distance = ((changed - whole).norm(dim=-1) / whole.norm(dim=-1).clamp(min=1e-12)).mean(dim=1)
    return {
        "cosine": cosine.mean().item(),
        "distance": distance.mean().item(),
        "distance_error": (distance.std() / len(distance) ** 0.5).item(),
    }
