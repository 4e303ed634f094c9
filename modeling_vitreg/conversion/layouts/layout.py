"""A layout: names of tensors, the architecture that they show, and the settings of the image processor."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.modeling_vitreg import IMAGENET_MEAN, IMAGENET_STD

from ..rules import ConversionError, Drop, Rule, matches


IMAGENET = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
INCEPTION = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
BILINEAR, BICUBIC = 2, 3
_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """Facts about a checkpoint before it is converted.

    Args:
        shapes: shape of each tensor, under the names of the layout.
        read: returns a tensor by name.
        file_name: name of the file or folder.
        checkpoint_key: key under which the tensors stood in the file, or None.
        settings: content of `config.json`, or None.
        processor: settings of the image processor, or None.
        module: the model itself, if it was given as one.
        config_overrides: fields of our configuration that the caller sets.
    """

    shapes: dict[str, tuple]
    read: Callable[[str], Tensor]
    file_name: str = ""
    checkpoint_key: str | None = None
    settings: dict | None = None
    processor: dict | None = None
    module: object | None = None
    config_overrides: dict = dataclasses.field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether a tensor has this name; `*` matches anything."""
        return next(self._found(name), None) is not None

    def depth(self, pattern: str) -> int:
        """Number of layers, from names such as "blocks.*." in which the star is a number from 0 on."""
        numbers = {match[1] for match in self._found(pattern.replace("*", "(\\d+)", 1) + "*")}
        if not numbers:
            raise ConversionError(f"{self.file_name}: no layers: expected tensors named {pattern}...")
        if missing := [number for number in map(str, range(len(numbers))) if number not in numbers]:
            odd = max(numbers, key=lambda number: (len(number), number))
            raise ConversionError(
                f"{self.file_name}: the layers are numbered up to {odd[:20]}, but layer {missing[0]} is missing: "
                "the file is incomplete, or its names are damaged"
            )
        return len(numbers)

    def size(self, name: str, axis: int) -> int:
        """Length of an axis of a tensor; if `*` matches several tensors, the length that most of them have."""
        counts = collections.Counter(
            self.shapes[match[0]][axis] for match in self._found(name) if len(self.shapes[match[0]]) > abs(axis) - 1
        )
        if not counts:
            near = difflib.get_close_matches(name, self.shapes, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise ConversionError(f"{self.file_name}: no tensor {name}, whose shape gives the size of the model{hint}")
        return counts.most_common(1)[0][0]

    def _found(self, name: str) -> Iterator[re.Match]:
        pattern = re.compile(
            "".join(part if part == "(\\d+)" else ".*" if part == "*" else re.escape(part) for part in _split(name))
        )
        return (match for match in map(pattern.fullmatch, self.shapes) if match)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a project names and shapes the tensors of a Vision Transformer.

    Args:
        name: name on the command line.
        title: name of the project.
        licence: licence of the official weights, as in a card of the Hub; None if every author has another.
        rules: rules for a configuration; for None, those of all architectures.
        configure: fields of our configuration that a checkpoint shows; `num_labels` means that it has a classifier.
        prepare: settings of the image processor.
        canonical: maps the names in a file to those of the layout.
        is_hinted: whether this layout is likely when several know the names.
        hashes: SHA-256 of official files by name, if the names do not carry it.
        model_types: for folders of transformers, the `model_type` of the image model, and of what contains it.
        write_settings: content of the `config.json` of transformers, beside what all models have.
        in_file: maps the names of the layout to those in a file.
        extras: tensors that the layout has and the configuration determines.
        config_class: class of our configuration.
        models: our classes without and with a classifier.
    """

    name: str
    title: str
    licence: str | None
    rules: Callable[[ViTWithRegistersConfig | None], list[Rule]]
    configure: Callable[[CheckpointInfo], dict]
    prepare: Callable[[CheckpointInfo, ViTWithRegistersConfig], dict]
    canonical: Callable[[Iterable[str]], dict[str, str]] = lambda names: {name: name for name in names}
    is_hinted: Callable[[CheckpointInfo], bool] = lambda info: False
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    model_types: tuple[str, ...] = ()
    write_settings: Callable[[ViTWithRegistersConfig], dict] = lambda config: {}
    in_file: Callable[[str], str] = lambda name: name
    extras: Callable[[ViTWithRegistersConfig], dict[str, Tensor]] = lambda config: {}
    config_class: type[ViTWithRegistersConfig] = ViTWithRegistersConfig
    models: tuple[type, type] = (ViTWithRegistersModel, ViTWithRegistersForImageClassification)

    def share(self, names: list[str]) -> float:
        """Share of the names that the layout knows; 0 if it uses none of them."""
        rules = self.rules(None)
        known = [name for name in self.canonical(names).values() if any(matches(rule, name) for rule in rules)]
        used = [name for name in known if not any(isinstance(rule, Drop) and matches(rule, name) for rule in rules)]
        return len(known) / len(names) if used else 0.0


def each(shorten: Callable[[str], str]) -> Callable[[Iterable[str]], dict[str, str]]:
    """A `canonical` that maps one name at a time."""
    return lambda names: {name: shorten(name) for name in names}


def heads_of(info: CheckpointInfo, width: int) -> int:
    """Number of heads, which no shape shows: that of the well-known models of this width.

    Raises:
        ConversionError: there is none.
    """
    if "num_attention_heads" in info.config_overrides:
        return info.config_overrides["num_attention_heads"]
    if width not in _HEADS:
        raise ConversionError(
            f"{info.file_name}: no well-known model has width {width}, and no shape shows its number of heads: set it "
            f"with --set num_attention_heads={max(width // 64, 1)}"
        )
    return _HEADS[width]


def image_size_of(info: CheckpointInfo, num_patches: int, patch: tuple[int, int]) -> int:
    """Side in pixels of the square image that a position table was made for.

    Raises:
        ConversionError: it is not square.
    """
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise ConversionError(
            f"{info.file_name}: a position table of {num_patches} patches is not square: set its size with "
            "--set image_size=ROWS,COLUMNS (pixels)"
        )
    return side * patch[0]


def prepare_crop(image_size: int, *, resize: int | None = None, resample: int = BICUBIC, **statistics) -> dict:
    """Resize the short side to `resize` pixels (default: 256 / 224 of the crop), then crop the centre."""
    return {
        "size": {"shortest_edge": resize or round(image_size * 256 / 224)},
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "resample": resample,
        **statistics,
    }


def prepare_square(image_size: int, *, resample: int = BICUBIC, **statistics) -> dict:
    """Resize both sides to `image_size` pixels, without keeping the aspect ratio."""
    return {
        "size": {"height": image_size, "width": image_size},
        "do_center_crop": False,
        "resample": resample,
        **statistics,
    }


def _split(name: str) -> list[str]:
    return [part for part in re.split(r"(\(\\d\+\)|\*)", name) if part]
