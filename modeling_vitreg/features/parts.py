"""Parts of models that no table names: found by their structure, or named by the user, and measured by one pass.

A model of an unknown class is read from outside: where its blocks lie, and what they return for a blank image. Blocks
may return tokens (B, N, D) or maps (B, rows, columns, D) and (B, D, rows, columns). Of a hierarchical model the blocks
of the last grid are its layers; the stages before have other grids and widths.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modeling_vitreg.modes import eval_mode

from .families import EXPECTED, find_image_size, find_part, find_tower, follow, keywords_of


NAMES = ("blocks", "patches", "norm", "cls", "registers", "distillation")
_STAGES = ("blocks", "layers", "layer")
MAX_DOUBLED = 256  # pixels
_NORMS = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Anatomy:
    """What one pass shows of a model.

    Args:
        layers: blocks of the last grid.
        stride: (rows, columns) of an image that one token of this grid covers, in pixels.
        hidden_size: D of this grid.
        counts: tokens in front of the patches: class tokens, distillation token, registers.
        takes_any_size: whether images of half the size fit too.
        is_partial: whether the model has blocks on other grids.
    """

    layers: list[nn.Module]
    stride: tuple[int, int]
    hidden_size: int
    counts: tuple[int, int, int]
    takes_any_size: bool
    is_partial: bool


def read_parts(text: str | None) -> dict[str, str]:
    """Parts from the text of an option, such as "blocks=encoder.blocks,patches=patch_embed,cls=1".

    Raises:
        ValueError: a name that is none, or a part without place.
    """
    parts = {}
    for item in (text or "").split(",") if text else ():
        name, _, place = (side.strip() for side in item.partition("="))
        if name not in NAMES or not place or name in parts:
            raise ValueError(
                f"--parts: expected NAME=PLACE,... with names out of {', '.join(NAMES)}, got {item!r}; a place is a "
                "path such as encoder.blocks, or a number of tokens"
            )
        parts[name] = place
    if parts and "blocks" not in parts:
        raise ValueError(f"--parts: expected blocks=PLACE, where the blocks of the model lie, got {text!r}")
    return parts


def propose_parts(model: nn.Module) -> str:
    """The option that names the parts of a model, as far as they can be guessed; "" without blocks."""
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, (nn.ModuleList, nn.Sequential))]
    blocks = [name for name, part in lists if name and len(part) > 1 and len({type(block) for block in part}) == 1]
    blocks = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    if not blocks:
        return ""
    inside = [f"{blocks[-1]}.-1.{name}" for name in _STAGES if _blocks_in(follow(model, f"{blocks[-1]}.-1"), name)]
    found = {"blocks": (inside or blocks[-1:])[0]}
    convolution = (name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    found["patches"] = next(convolution, None)
    for name, ends in {"cls": ("cls_token", "class_token", "class_embedding"), "registers": ("reg_token",)}.items():
        found[name] = next((key for key, _ in model.named_parameters() if key.endswith(ends)), None)
    return "--parts " + ",".join(f"{name}={place}" for name, place in found.items() if place)


def open_tower(model: nn.Module, parts: dict[str, str] | None = None) -> tuple[str, nn.Module, bool]:
    """Family, the module that holds blocks and the layer that reads the pixels, and whether the family is known.

    Raises:
        ValueError: there is no such module; the message proposes its parts.
    """
    if parts:
        return _family_of(model), model, False
    if (known := find_tower(model)) is not None:
        return (*known, True)
    for module in model.modules():
        if find_blocks(module, {})[0] and find_patches(module, {}) is not None:
            return _family_of(module), module, False
    kind, proposal = f"{type(model).__module__}.{type(model).__name__}", propose_parts(model)
    raise ValueError(
        f"expected {EXPECTED}, got {kind}" + (f": name its parts, perhaps {proposal}" if proposal else "")
    )


def _family_of(module: nn.Module) -> str:
    return follow(module, "config.model_type") or type(module).__name__


def find_blocks(tower: nn.Module, parts: dict[str, str]) -> tuple[list[nn.Module], bool]:
    """Blocks of a module, none if it has none, and whether they are those of the last stage of several.

    Raises:
        ValueError: the place that is named holds no blocks.
    """
    place = parts.get("blocks")
    found = follow(tower, place) if place else find_part(tower, "layers")
    if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found):
        inner = [name for name in _STAGES if _blocks_in(found[-1], name)]
        return list(getattr(found[-1], inner[0]) if inner else found), bool(inner)
    if place:
        raise ValueError(f"--parts blocks={place}: expected a list of modules in {type(tower).__name__}")
    return [], False


def find_patches(tower: nn.Module, parts: dict[str, str]) -> nn.Module | None:
    """The layer that reads the pixels: a convolution, or a linear layer of flat patches; None where there is none.

    Raises:
        ValueError: the place that is named holds no such layer.
    """
    place = parts.get("patches")
    found = follow(tower, place) if place else find_part(tower, "patches")
    for module in [*(found.modules() if isinstance(found, nn.Module) else ()), *(() if place else tower.modules())]:
        if isinstance(module, nn.Conv2d) or (module is found and isinstance(module, nn.Linear)):
            return module
    if place:
        raise ValueError(f"--parts patches={place}: expected a convolution in {type(tower).__name__}")
    return None


def count_channels(tower: nn.Module, patches: nn.Module) -> int:
    """C, the channels of an image."""
    if isinstance(patches, nn.Conv2d):
        return patches.in_channels
    count = follow(tower, "config.num_channels")
    return count if isinstance(count, int) else 3


def find_norm(tower: nn.Module, parts: dict[str, str]) -> nn.Module | None:
    """The norm of the last tokens, over their channels; None where there is none."""
    norm = follow(tower, parts["norm"]) if "norm" in parts else find_part(tower, "norm")
    is_of_tokens = isinstance(norm, _NORMS) or "RMSNorm" in type(norm).__name__ or "RmsNorm" in type(norm).__name__
    if "norm" in parts and not is_of_tokens:
        raise ValueError(f"--parts norm={parts['norm']}: expected a norm of tokens, got {type(norm).__name__}")
    return norm if is_of_tokens and not type(norm).__name__.endswith("2d") else None


def as_sequence(value: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
    """Tokens (B, N, D) from tokens, from maps (B, rows, columns, D), or from maps (B, D, rows, columns).

    Args:
        grid: (rows, columns), which tells the two kinds of maps apart; None: both axes have one length.
    """
    if value.ndim == 3:
        return value
    is_last = value.shape[1] == value.shape[2] if grid is None else tuple(value.shape[1:3]) == tuple(grid)
    return value.flatten(1, 2) if is_last else value.flatten(2).transpose(1, 2)


@torch.no_grad()
def examine(tower: nn.Module, family: str, parts: dict[str, str], *, name: str) -> Anatomy:
    """Run a model on one blank image, and read from its blocks what they are.

    Args:
        tower: the module with the blocks.
        family: see `families.find_tower`.
        parts: what the user named.
        name: of the model, for messages.

    Raises:
        ValueError: the model does not run on images, or its tokens are no grid with a known prefix.
    """
    (blocks, is_partial), patches = find_blocks(tower, parts), find_patches(tower, parts)
    remedy = f"name its parts: {propose_parts(tower) or '--parts blocks=PLACE,patches=PLACE'}"
    if not blocks or patches is None:
        raise ValueError(
            f"{name}: expected blocks and a layer that reads the pixels in {type(tower).__name__}: {remedy}"
        )
    size = find_image_size(tower, (1, 1))
    shapes = _shapes_of(tower, family, blocks, patches, size)
    if isinstance(shapes, str):
        raise ValueError(f"{name}: {type(tower).__name__} does not run on an image of {size}: {shapes}; {remedy}")
    inputs, outputs = shapes
    one = outputs[-1]
    if not one or one[0] != 1 or len(one) not in (3, 4):
        raise ValueError(f"{name}: expected blocks that return (images, tokens, width), got {one}; {remedy}")
    changes = [n for n, shapes in enumerate(zip(inputs, outputs)) if shapes != (one, one)]
    first = changes[-1] + 1 if changes else 0  # of the blocks of the last grid
    if first == len(blocks):
        raise ValueError(f"{name}: expected a block that keeps the shape of its tokens, got {inputs[-1]} to {one}")
    if (found := _find_grid(tower, patches, parts, size, _count(one))) is None:
        raise ValueError(
            f"{name}: an image of {size[0]} x {size[1]} pixels gives {_count(one)} tokens, and they fill no grid if "
            f"{sum(_prefix(tower, parts))} of them are no patches: name the tokens in front of the patches, such as "
            "--parts blocks=...,cls=1,registers=4"
        )
    counts, stride = found
    width = one[-1] if len(one) == 3 or one[1] == one[2] else one[1]
    other = _other_size(size, stride)
    shapes = _shapes_of(tower, family, blocks, patches, other)
    expected = sum(counts) + math.prod(side // step for side, step in zip(other, stride))
    takes_any = other != size and not isinstance(shapes, str) and _count(shapes[1][-1]) == expected
    return Anatomy(blocks[first:], stride, width, counts, takes_any, is_partial or first > 0)


def _other_size(size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Twice a size, where that is cheap, else half of it: tables of positions may be cut, and not grow."""
    if max(size) <= MAX_DOUBLED:
        return tuple(2 * side for side in size)
    return tuple(max(side // 2 // step, 1) * step for side, step in zip(size, stride))


def _count(shape: tuple) -> int:
    return shape[1] if len(shape) == 3 else shape[1] * shape[2] if shape[1] == shape[2] else shape[2] * shape[3]


@contextlib.contextmanager
def kept_settings(module: nn.Module) -> Iterator[None]:
    """Put numbers and sizes back that a model changes while it runs, as Swin of transformers does with its windows."""
    kinds = (int, float, str, tuple, type(None))
    before = [(part, {k: v for k, v in vars(part).items() if isinstance(v, kinds)}) for part in module.modules()]
    try:
        yield
    finally:
        for part, values in before:
            vars(part).update(values)


def _blocks_in(module: object, name: str) -> bool:
    found = getattr(module, name, None)
    return isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found) > 0


def _shapes_of(
    tower: nn.Module, family: str, blocks: list, patches: nn.Module, size: tuple[int, int]
) -> tuple[list, list] | str:
    """Shapes of what enters and leaves each block for one blank image; or why the model does not run."""
    inputs, outputs = [()] * len(blocks), [()] * len(blocks)
    weight = next(patches.parameters())
    pixels = torch.zeros(1, count_channels(tower, patches), *size, device=weight.device, dtype=weight.dtype)

    def keep(number: int, arguments: tuple, keywords: dict, value: object) -> None:
        inputs[number] = tuple(tensor_of((*arguments, *keywords.values())).shape)
        outputs[number] = tuple(tensor_of(value).shape)

    hooks = [
        block.register_forward_hook(lambda _, a, k, v, number=number: keep(number, a, k, v), with_kwargs=True)
        for number, block in enumerate(blocks)
    ]
    try:
        with eval_mode(tower, is_eager=True), kept_settings(tower):
            tower(pixels, **keywords_of(tower, family, pixels, _patch_shape(tower, patches)))
    except Exception as error:  # whatever the code of other people raises
        if not outputs[-1]:  # what follows the last block, such as a head, does not matter
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, outputs


def tensor_of(value: object) -> Tensor:
    """The first tensor among the arguments or the results of a block."""
    if isinstance(value, Tensor):
        return value
    return next(part for part in value if isinstance(part, Tensor))


def _prefix(tower: nn.Module, parts: dict[str, str]) -> tuple[int, int, int]:
    return tuple(count_tokens(tower, parts, part) for part in ("cls", "distillation", "registers"))


def count_tokens(tower: nn.Module, parts: dict[str, str], part: str) -> int:
    """Number of tokens of a kind, from their parameter, or as the user said."""
    place = parts.get(part, "")
    if place.isdigit():
        return int(place)
    if follow(tower, "embeddings.cls_register_token") is not None:  # C-RADIO of transformers
        return {"cls": tower.config.num_cls_tokens, "registers": tower.config.num_registers}.get(part, 0)
    found = follow(tower, place) if place else find_part(tower, part)
    if place and found is None:
        raise ValueError(f"--parts {part}={place}: there is no such parameter in {type(tower).__name__}")
    found = getattr(found, "weight", found)  # registers of ours are a module
    return 0 if found is None else found.shape[-2] if found.ndim > 1 else 1


def _patch_shape(tower: nn.Module, patches: nn.Module) -> tuple[int, int]:
    if isinstance(patches, nn.Conv2d):
        return tuple(patches.stride)
    side = math.isqrt(patches.in_features // count_channels(tower, patches))
    return side, side


def _find_grid(
    tower: nn.Module, patches: nn.Module, parts: dict[str, str], size: tuple[int, int], num_tokens: int
) -> tuple[tuple, tuple] | None:
    """Tokens in front, and the stride of the grid, under which the number of tokens is what it is."""
    named, steps = _prefix(tower, parts), _patch_shape(tower, patches)
    for counts in (named, (0, 0, 0)):  # a class token may join behind these blocks
        for power in range(7):
            stride = tuple(step * 2**power for step in steps)
            grids = {math.prod(side // step for side, step in zip(size, stride))}
            if num_tokens - sum(counts) in grids and num_tokens > sum(counts):
                return counts, stride
    return None


@contextlib.contextmanager
def told_sizes(name: str, size: tuple[int, int], own: tuple[int, int]) -> Iterator[None]:
    """Errors of a model that does not take images of a size, in one line.

    Raises:
        ValueError: with the size that the model takes.
    """
    try:
        yield
    except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
        if tuple(size) == tuple(own):
            raise
        raise ValueError(
            f"{name}: does not take images of {size[0]} x {size[1]} pixels ({' '.join(str(error).split())[:160]}): it "
            f"was made for {own[0]} x {own[1]}"
        ) from error
