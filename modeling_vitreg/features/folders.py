"""JSON files of model folders, which other people wrote: checked, and never followed out of their folder."""

from __future__ import annotations

import json
import os
import pathlib
import re

from modeling_vitreg.names import is_hub_name, list_first


# Largest plausible value of an integer setting: above it, building the model takes hours or all memory.
_LIMITS = {
    "num_hidden_layers": 1_000,
    "hidden_size": 65_536,
    "intermediate_size": 524_288,
    "num_attention_heads": 1_024,
    "image_size": 32_768,
    "patch_size": 4_096,
    "num_channels": 1_024,
    "num_register_tokens": 65_536,
}
_CONVERTIBLE = ("vit", "deit", "ijepa", "vit_mae", "vit_msn", "dinov2", "dinov2_with_registers", "dinov3_vit", "pixio")
_CONVERTIBLE += ("radio", "sapiens2", "beit", "data2vec-vision")
_WITH_TEXT = ("clip", "metaclip_2", "altclip", "chinese_clip", "siglip", "aimv2", "tipsv2")
_CONVERTIBLE += _WITH_TEXT
_MOST_BYTES = 2**24
_FLOATS, _INTEGERS = ("F64", "F32", "F16", "BF16"), ("position_ids", "num_batches_tracked", "position_index")


def read_json(path: str | os.PathLike) -> dict | None:
    """A dictionary from a JSON file, or None if there is no such file.

    Raises:
        ValueError: the file is larger than 16 MiB, is not JSON, names a key twice, or holds another type.
    """
    path = pathlib.Path(path)
    if not path.is_file():  # a named pipe would wait for ever
        return None
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path}: expected at most {_MOST_BYTES:,} bytes of JSON, got {path.stat().st_size:,}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error}): download the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}: download the file again")
    return content


def check_settings(settings: dict, path: str | os.PathLike, *, num_layers: int | None = None) -> None:
    """Refuse settings of a model that have the wrong type or are out of proportion.

    Args:
        settings: settings of a `config.json`, with nested ones such as `vision_config`.
        path: path of the file, for messages.
        num_layers: most layers that the file of the weights can hold, if known.

    Raises:
        ValueError: the message names the setting and the limit.
    """
    for name, value in settings.items():
        if name in ("vision_config", "text_config") and isinstance(value, dict):
            check_settings(value, path)
        if name in ("model_type", "architecture") and not isinstance(value, str):
            raise ValueError(f"{path}: expected {name} to be a string, got {value!r:.60}")
        if name == "architectures" and not (
            value is None or (isinstance(value, list) and all(isinstance(kind, str) for kind in value))
        ):
            raise ValueError(f"{path}: expected architectures to be a list of class names, got {value!r:.60}")
        if name not in _LIMITS or value is None:
            continue
        limit = min(_LIMITS[name], num_layers or _LIMITS[name]) if name == "num_hidden_layers" else _LIMITS[name]
        sizes = value if isinstance(value, list) and name in ("image_size", "patch_size") else [value]
        least = 0 if name == "num_register_tokens" else 1
        if not sizes or any(type(size) is not int or not least <= size <= limit for size in sizes):
            raise ValueError(f"{path}: expected {name} to be an integer from {least} to {limit:,}, got {value!r:.60}")


def check_weights(folder: pathlib.Path, settings: dict | None) -> None:
    """Refuse what transformers would follow out of the folder, build for hours, or cast in silence.

    Raises:
        ValueError: the message names the file.
    """
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.index.json"):
        if not (folder / index.name.removesuffix(".index.json")).is_file():  # which is read in its place
            files += [file for file in list_shards(index) if file.suffix == ".safetensors"]
    types = {name: kind for file in files for name, kind in _types_in(file).items()}
    if settings is not None:
        check_settings(settings, folder / "config.json", num_layers=len(types) or None)
    odd = [name for name, kind in types.items() if kind not in _FLOATS and not name.endswith(_INTEGERS)]
    if odd and "quantization_config" not in (settings or {}):
        raise ValueError(
            f"{folder}: {len(odd)} weights are not floating-point numbers ({odd[0]}: {types[odd[0]]}): the files are "
            "damaged, or quantised without a quantization_config"
        )


def _types_in(file: pathlib.Path) -> dict[str, str]:
    """Type of each tensor of a file of safetensors, from its header."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length) if length <= 10**8 else b"")
            return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: is truncated or not safetensors: download it again") from error


def list_shards(index: pathlib.Path) -> list[pathlib.Path]:
    """Files that a `*.index.json` names, in order.

    Raises:
        ValueError: the index has no map of names to files, names a file outside its folder, or a file is missing.
    """
    weights = (read_json(index) or {}).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise ValueError(f"{index}: expected weight_map, which maps names of tensors to files: download it again")
    names = sorted(set(weights.values()))
    for name in names:
        if pathlib.PurePosixPath(name).is_absolute() or ".." in re.split(r"[/\\]", name) or ":" in name:
            raise ValueError(f"{index}: the weight map leads out of its folder ({name!r:.80}): do not use this model")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index.parent}: {len(missing)} shards are missing: {list_first(missing)}")
    return [index.parent / name for name in names]


def conversion_command(source: str | os.PathLike) -> str | None:
    """How to make a model of this family from another library's, or None if `source` is already one of this family.

    Args:
        source: file, folder, name on the Hub, or "timm:NAME".

    Returns:
        One sentence: the command to type, or why there is none.
    """
    text = os.fspath(source)
    path = pathlib.Path(text)
    folder = f"{path.stem or 'model'}-vitreg"
    if text.startswith(("timm:", "timm/")):
        return f"{text} is a model of timm: convert it first, with: vitreg convert timm:{text[5:]} {folder}"
    if path.is_file():
        return f"{text} is a file of weights: convert it first, with: vitreg convert {text} {folder}"
    if not path.exists():
        if is_hub_name(text):
            name = path.name
            return (
                f"{text} is not a folder here: if it is another library's model on the Hub, download and convert it "
                f"first, with: hf download {text} --local-dir {name} && vitreg convert {name} {folder}"
            )
        return f"{text}: no such file or folder"
    settings = read_json(path / "config.json")
    if settings is None:
        return f"{text} has no config.json: convert its checkpoint first, with: vitreg convert {text} {folder}"
    kind = settings.get("model_type", "timm" if "architecture" in settings else None)
    if kind in ("vitreg", "vitreg_mamba", "vitreg_hat"):
        return None
    if kind in (*_CONVERTIBLE, *(f"{name}_vision_model" for name in _WITH_TEXT), "timm"):
        return f"{text} is a model of type {kind}: convert it first, with: vitreg convert {text} {folder}"
    return (
        f"{text} is a model of type {kind!r}, which is not a plain Vision Transformer and cannot be converted: "
        f"expected one of {', '.join(_CONVERTIBLE)}, or a model of timm"
    )


def _unique(pairs: list[tuple]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.60} occurs twice")
    return content
