"""Arguments and options that several commands share, the settings of --set, and checks before work begins."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from modeling_vitreg.names import check_image_source, check_model_name


DATA, MODEL, COMPUTE, OUTPUT = "Data", "Model", "Compute", "Output"  # panels of every --help
_SEEDS = 2**32 - 1
_LONGEST = 200  # bytes of the name of a file, to leave room for the names of temporary ones


def option(panel: str, text: str, *names: str, **limits: Any) -> Any:
    """An option in one of the four panels."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **limits)


Model = Annotated[str, typer.Argument(help="Folder of a model, name on the Hub (owner/name), or timm/NAME.")]
Images = Annotated[
    str, typer.Argument(help="Folder of images or of a dataset, .tar shards, Hub dataset, scenes or scenes:single.")
]
Run = Annotated[pathlib.Path, typer.Argument(help="Folder of a model, an adapter or a training run.")]
RepoId = Annotated[str, typer.Argument(metavar="USER/NAME", help="Name of the model on the Hub.")]

Annotations = Annotated[
    pathlib.Path | None,
    option(DATA, "Boxes for a folder of images: a COCO .json file or a folder of Pascal VOC .xml files."),
]
Split = Annotated[str, option(DATA, "Dataset split.")]
NumImages = Annotated[int, option(DATA, "Maximum number of images.", min=1)]

Compare = Annotated[list[str] | None, option(MODEL, "Another model, measured on the same images (repeatable).")]
Parts = Annotated[
    str | None,
    option(MODEL, "Where the parts of a model of an unknown kind lie, such as blocks=encoder.blocks,cls=cls_token."),
]
TrustRemoteCode = Annotated[bool, option(MODEL, "Run the code that comes with the model.", "--trust-remote-code")]

BatchSize = Annotated[int, option(COMPUTE, "Batch size.", min=1)]
Precision = Annotated[
    str | None,
    option(COMPUTE, "float32, bfloat16 or float16. Default: bfloat16 on a GPU that has it, else that of the weights."),
]
Workers = Annotated[
    int | None, option(COMPUTE, "Processes that read images. Default: by the number of cores.", min=0, max=1024)
]
Compile = Annotated[bool, option(COMPUTE, "Compile the layers of the model: slow to start, then faster.", "--compile")]
Device = Annotated[str | None, option(COMPUTE, "Device, such as cuda:1. Default: a GPU if there is one.")]
Seed = Annotated[int, option(COMPUTE, "Random seed.", min=0, max=_SEEDS)]
Set = Annotated[
    list[str] | None,
    option(COMPUTE, "Change a setting, or read a file of settings (repeatable).", "--set", metavar="NAME=VALUE|YAML"),
]

Reports = Annotated[list[pathlib.Path] | None, option(DATA, "Report, or folder of reports (repeatable).")]
License = Annotated[str | None, option(OUTPUT, "License of weights that inherit none, such as apache-2.0.")]
LicenseName = Annotated[str | None, option(OUTPUT, "Name of the license, with --license other.")]
LicenseLink = Annotated[str | None, option(OUTPUT, "Address or file of its text, with --license other.")]
AcceptLicense = Annotated[str | None, option(OUTPUT, "Name of the inherited license, if it has conditions.")]


def check_inputs(models: Sequence[str], images: str, device: str | None) -> tuple[list[str], str]:
    """Check what a verb reads before anything is loaded.

    Returns:
        The models by the names that they are loaded by, and the device.

    Raises:
        ValueError: a model, the images or the device cannot exist.
    """
    check_image_source(images)
    return [check_model_name(name) for name in models], choose_device(device)


def choose_device(name: str | None) -> str:
    """The device of a name; None: a GPU if there is one.

    Raises:
        ValueError: there is no such device on this machine.
    """
    import torch

    if name is None:
        if not torch.cuda.is_available():
            return "cpu"
        own = int(os.environ.get("LOCAL_RANK", "-1"))  # of a process that torchrun or accelerate launch started
        return "cuda" if own < 0 else f"cuda:{own % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu, cuda, cuda:1 or mps, got {name!r}") from None
    is_there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not is_there.get(device.type, hasattr(torch, device.type) and getattr(torch, device.type).is_available()):
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no such device here. Try --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
    return name


def weights_dtype(precision: str | None) -> Any:
    """The dtype to load weights in: float32 where a precision is asked for, which casts in its products alone; None
    leaves them as they were saved."""
    import torch

    return None if precision is None else torch.float32


def scene_settings(source: str, side: int) -> tuple[Any, str]:
    """Settings of rendered scenes for a model that reads `side` pixels, and the name of the source for reports."""
    from modeling_vitreg.scenes import describe_preset, is_scenes, preset_settings

    if not is_scenes(source):
        return None, source
    settings = preset_settings(source, side=side)
    return settings, describe_preset(source, settings)


def check_outside(path: pathlib.Path, images: str | None) -> None:
    """Check that results do not join the images that they come from.

    Raises:
        ValueError: the output lies in the folder of the images.
    """
    home = pathlib.Path(images).expanduser() if images else None
    if home and home.is_dir() and path.resolve().is_relative_to(home.resolve()):
        raise ValueError(
            f"--output {path}: lies in the folder of the images, so the next command would take its pictures for "
            "images: choose a folder outside"
        )


def check_output(path: pathlib.Path, *, is_file: bool = False, images: str | None = None) -> None:
    """Check that results can be written, before anything is computed.

    Args:
        path: folder of results, or a file.
        is_file: which of them it is.
        images: source of images, which pictures in the folder of results must not join.

    Raises:
        ValueError: something of the other kind is in the way, the folder cannot be written to, or it lies in that of
            the images.
    """
    if any(len(os.fsencode(part)) > _LONGEST for part in path.parts):
        raise ValueError(f"--output {path}: expected names of at most {_LONGEST} bytes: choose a shorter one")
    if any(os.path.islink(os.path.realpath(place)) for place in (path, *path.parents)):
        raise ValueError(f"--output {path}: is a link that leads to itself")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"--output {path}: expected a file or a folder to write, and it is a device or a pipe")
    check_outside(path, images)
    if path.exists() and path.is_dir() == is_file:
        found, expected = ("a folder", "a file") if is_file else ("a file", "a folder")
        raise ValueError(f"--output {path}: expected {expected} to write, and {found} of this name exists")
    place = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if is_file and place == path.absolute():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"--output {path}: {place} is a file, so no folder can be made in it")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--output {path}: {place} cannot be written to")


def read_settings(texts: Sequence[str] | None, kinds: dict[str, type]) -> dict[str, dict[str, Any]]:
    """Values of --set, checked, by the group that they belong to.

    Args:
        texts: such as "data.depth_scale=0.001", or the name of a YAML file with a mapping of groups.
        kinds: dataclass of each group.

    Raises:
        ValueError: no such group or name, or a value of another type; with the nearest name.
    """
    from modeling_vitreg.settings import check_values, read_assignments, suggest_name

    values = read_assignments(texts or ())
    for group, inner in values.items():
        if group not in kinds:
            known = [f"{name}.{field}" for name, kind in kinds.items() for field in kind.__dataclass_fields__]
            raise ValueError(f"--set: there is no setting {group!r}; {suggest_name(group, [*kinds, *known])}")
        if not isinstance(inner, dict):
            raise ValueError(f"--set: expected {group}.NAME=VALUE, got {group}={inner!r}")
        values[group] = check_values(kinds[group], inner, of=f"--set {group}")
    return {group: values.get(group, {}) for group in kinds}
