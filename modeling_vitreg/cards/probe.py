"""Outputs of a model for one fixed input. The package imports this file, and it also runs alone as a program.

`isolation.run_apart` sends this file to a new process, so it imports nothing of ours. The input is a formula and not
random numbers, which differ between versions and devices.
"""

from __future__ import annotations

import json
import math
import os
import sys

import torch
import transformers
from torch import Tensor, nn


MEASURES = ("largest", "mean", "mean_absolute", "weighted_mean")
NUM_FIRST = 8
_MAX_PATCHES = 16  # on a side, so that a large model takes seconds


def load(folder: str, *, classes: dict[str, type] | None = None) -> nn.Module:
    """A model, or a model with its adapter, in float32 and evaluation mode.

    Args:
        folder: with `config.json` or `adapter_config.json`.
        classes: classes of an installed package by name, in place of the code that lies in the folder.
    """
    if not os.path.exists(f"{folder}/adapter_config.json"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=classes is None)
        model, facts = _load_class(config.architectures[0], config, folder, classes, output_loading_info=True)
        if facts["missing_keys"]:
            raise ValueError(f"tensors are missing from the weights: {', '.join(sorted(facts['missing_keys'])[:5])}")
        return model.eval()
    with open(f"{folder}/adapter_config.json", encoding="utf-8") as file:
        adapter = json.load(file)
    import peft

    base = adapter["base_model_name_or_path"]
    config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=classes is None)
    name = (adapter.get("auto_mapping") or {}).get("base_model_class") or config.architectures[0]
    return peft.PeftModel.from_pretrained(_load_class(name, config, base, classes, **_labels(folder)), folder).eval()


@torch.no_grad()
def take_outputs(model: nn.Module) -> dict:
    """Of each output its shape, largest absolute value, means and first values.

    A dual encoder is given an image and a text, so that both towers run. `weighted_mean` is the mean of value times
    sin(i): unlike `mean`, it changes when two values are swapped.

    Raises:
        ValueError: a value is not finite.
    """
    inputs = {"pixel_values": probe_images(model.config)}
    described = {"shape": list(inputs["pixel_values"].shape), "formula": "sin(0.7 i + 0.1)"}
    if hasattr(model.config, "text_config"):  # a dual encoder
        inputs["input_ids"] = probe_text(model.config.text_config)
        described["text"] = inputs["input_ids"].tolist()
    device = next(model.parameters()).device
    outputs = _name_tensors(model(**{name: value.to(device) for name, value in inputs.items()}))
    summaries = {name: _summarise(tensor) for name, tensor in outputs.items()}
    broken = [name for name, summary in summaries.items() if not math.isfinite(summary["mean_absolute"])]
    if broken:
        raise ValueError(f"the model gives values that are not finite in {', '.join(broken)}")
    return {"input": described, "outputs": summaries}


def probe_images(config) -> Tensor:
    """One image (1, C, height, width) of the size that the model has positions for, or 16 patches a side."""
    config = getattr(config, "vision_config", config)
    patch, image = _pair(config.patch_size), _pair(config.image_size)
    height, width = (min(side, _MAX_PATCHES * of_patch) for side, of_patch in zip(image, patch))
    shape = (1, getattr(config, "num_channels", 3), height, width)
    return (0.7 * torch.arange(math.prod(shape), dtype=torch.float64) + 0.1).sin().float().reshape(shape)


def probe_text(config) -> Tensor:
    """One text (1, at most 8 tokens), spread over the vocabulary, with the end token last."""
    num_tokens = min(8, getattr(config, "max_position_embeddings", 8))
    words = (7919 * torch.arange(1, num_tokens + 1)) % config.vocab_size
    if isinstance(getattr(config, "eos_token_id", None), int):
        words[-1] = config.eos_token_id
    return words[None]


def main() -> None:
    """Load the folder that the first argument names, and print its outputs in JSON as the last line."""
    print(json.dumps(take_outputs(load(sys.argv[1]))))


def _load_class(name: str, config, folder: str, classes: dict[str, type] | None, **options):
    options["dtype"] = torch.float32
    if classes is not None and name in classes:
        return classes[name].from_pretrained(folder, **options)
    reference = getattr(config, "auto_map", None) or {}
    auto = next((auto for auto, value in reference.items() if value.split(".")[-1] == name), None)
    if auto is None:
        return getattr(transformers, name).from_pretrained(folder, **options)
    if auto == "AutoBackbone":  # it asks the network about a local folder
        kind = transformers.dynamic_module_utils.get_class_from_dynamic_module(reference[auto], folder)
        return kind.from_pretrained(folder, **options)
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **options)


def _labels(folder: str) -> dict[str, int]:
    """Classes of a classifier that an adapter brings with it."""
    from safetensors import safe_open

    with safe_open(f"{folder}/adapter_model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.endswith("classifier.weight")]  # noqa: SIM118
        return {"num_labels": file.get_slice(names[0]).get_shape()[0]} if names else {}


def _name_tensors(output) -> dict[str, Tensor]:
    named = {}
    for name, value in output.items():
        values = value if isinstance(value, tuple) else (value,)
        for number, tensor in enumerate(values):
            if isinstance(tensor, Tensor):
                named[f"{name}.{number}" if isinstance(value, tuple) else name] = tensor
    return named


def _summarise(tensor: Tensor) -> dict:
    values = tensor.detach().double().flatten().cpu()
    if not values.numel():  # a model without registers
        return {"shape": list(tensor.shape), **dict.fromkeys(MEASURES, 0.0), "first": []}
    wave = torch.arange(len(values), dtype=torch.float64).sin()
    numbers = (values.abs().max(), values.mean(), values.abs().mean(), (values * wave).mean())
    measured = {name: number.item() for name, number in zip(MEASURES, numbers)}
    return {"shape": list(tensor.shape), **measured, "first": values[:NUM_FIRST].tolist()}


def _pair(side) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else tuple(side)
