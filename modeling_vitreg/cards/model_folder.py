"""What a folder is that shall be published, which of its files travel, and whether they are all there.

    MODEL/  config.json, model.safetensors (or shards with an index), preprocessor_config.json, the code of the family;
            for a dual encoder tokenizer_config.json and what it needs
    MODEL/  adapter_config.json, adapter_model.safetensors
    RUN/    model/, one of the above, with training.json, recipe.yaml and pictures of a training run beside it

Of other files in a model's folder, such as optimiser states and settings of editors, none travels.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open

from modeling_vitreg import ViTWithRegistersConfig

from .errors import CardError


FINGERPRINT_FILE = "fingerprint.json"
REPORTS = ("artifacts", "evaluation")  # names that files of reports begin with
# Of a model folder; whatever else lies there is somebody's own.
_SUFFIXES = (".json", ".safetensors", ".py", ".txt", ".model")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


@dataclass(frozen=True)
class ModelFolder:
    """A model or an adapter on the disk.

    Args:
        path: folder of `config.json` or `adapter_config.json`.
        run: folder of the training run that it is part of, or None.
        settings: what that file holds.
        is_adapter: whether it holds an adapter.
        files: that travel, by name.
        left: files and folders that do not, each with the reason.
        shapes: of all tensors, by name.
    """

    path: pathlib.Path
    run: pathlib.Path | None
    settings: dict
    is_adapter: bool
    files: dict[str, pathlib.Path]
    left: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @property
    def num_parameters(self) -> int:
        """Values in all tensors that learn: fixed positions and running statistics are stored, too."""
        fixed = list(_STATISTICS)
        if not self.is_adapter and self.architecture["position_embedding_type"] == "sincos":
            fixed.append("position_embeddings")
        learnt = (shape for name, shape in self.shapes.items() if not any(part in name for part in fixed))
        return sum(math.prod(shape) for shape in learnt)

    @property
    def architecture(self) -> dict:
        """Every field of the configuration, that of the vision model in a dual encoder; not of an adapter."""
        return ViTWithRegistersConfig.from_dict(self.settings.get("vision_config", self.settings)).to_dict()

    @property
    def class_name(self) -> str:
        """Class of the model, or of the model that an adapter belongs to."""
        if self.is_adapter:
            return (self.settings.get("auto_mapping") or {}).get("base_model_class") or "ViTWithRegistersModel"
        return self.settings["architectures"][0]


def open_folder(path: str | os.PathLike) -> ModelFolder:
    """Read what a folder is, and check that nothing is missing.

    Raises:
        CardError: it is no model, adapter or training run, a file is missing or damaged, or the run did not finish.
    """
    path = pathlib.Path(path)
    run, model = _find(path)
    is_adapter = (model / "adapter_config.json").is_file()
    settings = read_json(model / ("adapter_config.json" if is_adapter else "config.json"))
    files, left = _choose_files(model)
    if is_adapter:
        _require(model, files, ["adapter_model.safetensors"])
        weights = ["adapter_model.safetensors"]
    else:
        if not settings.get("architectures"):
            raise CardError(f"{model / 'config.json'}: names no architecture: save the model with save_pretrained")
        weights = _weights(model)
        kind = settings.get("vision_config", settings).get("model_type")
        if kind != "vitreg":
            raise CardError(f"{model}: is a model of type {kind!r}: expected one of this family, vitreg")
        _require(model, files, [*weights, "preprocessor_config.json", *_code(model, settings)])
        if "text_config" in settings and "tokenizer_config.json" not in files:
            raise CardError(
                f"{model}: has no tokenizer, tokenizer_config.json, so nobody could give it a text: save that too, by "
                "its own save_pretrained"
            )
    shapes: dict[str, tuple[int, ...]] = {}
    for name in weights:
        shapes |= read_shapes(model / name)
    return ModelFolder(model, run, settings, is_adapter, files, left, shapes)


def read_json(path: pathlib.Path) -> dict:
    """A dictionary from a file.

    Raises:
        CardError: it is not there, or no dictionary in JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CardError(f"{path} is missing") from None
    except ValueError as error:
        raise CardError(f"{path}: expected JSON, got a file that does not parse: {error}") from None
    if not isinstance(content, dict):
        raise CardError(f"{path}: expected a dictionary, got a {type(content).__name__}")
    return content


def read_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a file, without reading them.

    Raises:
        CardError: the file is no safetensors file, or is cut off.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CardError(f"{path}: is damaged or not whole ({error}): save the model again") from None


def _find(path: pathlib.Path) -> tuple[pathlib.Path | None, pathlib.Path]:
    """The folder of the run, if there is one, and that of the model."""
    if _holds_model(path):
        is_in_run = path.name == "model" and (path.parent / "training.json").is_file()
        return (path.parent if is_in_run else None), path
    if not _holds_model(path / "model"):
        raise CardError(
            f"{path}: expected a model (config.json), an adapter (adapter_config.json) or the output folder of a "
            "training run (model/config.json), found none of them"
        )
    if not (path / "training.json").is_file():
        raise CardError(
            f"{path}: the training run has not finished, training.json is missing: the command that began it goes on; "
            f"or take {path / 'model'} as it is"
        )
    return path, path / "model"


def _holds_model(path: pathlib.Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def _choose_files(model: pathlib.Path) -> tuple[dict[str, pathlib.Path], dict[str, str]]:
    files, left = {}, {}
    for entry in sorted(model.iterdir()):
        if entry.name.startswith(REPORTS):
            continue  # reports have a place of their own
        if entry.name == "README.md":
            left[entry.name] = "the card is written anew from the reports"
        elif entry.is_dir():
            left[f"{entry.name}/"] = "a folder"
        elif entry.name.startswith(".") or (entry.suffix not in _SUFFIXES and entry.stem != "LICENSE"):
            left[entry.name] = "no file of a model"
        else:
            files[entry.name] = entry
    return files, left


def _require(model: pathlib.Path, files: dict[str, pathlib.Path], names: list[str]) -> None:
    missing = sorted(set(names) - set(files))
    if missing:
        raise CardError(f"{model}: {', '.join(missing)} missing: save the model again with save_pretrained")


def _weights(model: pathlib.Path) -> list[str]:
    index = model / "model.safetensors.index.json"
    if (model / "model.safetensors").exists() or not index.exists():
        return ["model.safetensors"]
    return sorted(set(read_json(index)["weight_map"].values()))


def _code(model: pathlib.Path, settings: dict) -> list[str]:
    """Files with the code that the configuration names, and those that they import."""
    names = {f"{value.split('.')[0]}.py" for value in (settings.get("auto_map") or {}).values() if "--" not in value}
    if not names:
        raise CardError(
            f"{model / 'config.json'}: has no auto_map, so nobody can load it: save the model with save_pretrained"
        )
    found: set[str] = set()
    while names - found:
        name = (names - found).pop()
        found.add(name)
        if (model / name).is_file():
            names |= {f"{module}.py" for module in _RELATIVE_IMPORT.findall((model / name).read_text())}
    return sorted(found)


__all__ = ["FINGERPRINT_FILE", "REPORTS", "ModelFolder", "open_folder", "read_json", "read_shapes"]
