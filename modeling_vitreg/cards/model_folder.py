"""A folder that is published: which of its files are uploaded, and whether they are all there.

    MODEL/  config.json, model.safetensors (or shards with an index), preprocessor_config.json, the code of the family;
            for a dual encoder also the files of its tokenizer
    MODEL/  adapter_config.json, adapter_model.safetensors
    RUN/    model/, one of the above, with training.json, recipe.yaml and pictures of a training run beside it

Other files in a model's folder, such as optimiser states, are skipped.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open

from modeling_vitreg import ViTWithRegistersConfig
from modeling_vitreg.features import folders
from modeling_vitreg.modeling_vitreg import read_image_processor

from .errors import CardError


EXPECTED_OUTPUTS, OLD_EXPECTED_OUTPUTS = "expected_outputs.json", "fingerprint.json"
REPORTS = ("artifacts", "evaluation")  # names that files of reports begin with
_SUFFIXES = (".json", ".safetensors", ".py", ".txt", ".model")  # of files of a model
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


@dataclass(frozen=True)
class ModelFolder:
    """A model or an adapter on the disk.

    Args:
        path: folder of `config.json` or `adapter_config.json`.
        run: folder of the training run that it is part of, or None.
        settings: content of that file.
        is_adapter: whether it holds an adapter.
        files: to upload, by name.
        skipped: files and folders that are not uploaded, each with the reason.
        shapes: shapes of all tensors, by name.
    """

    path: pathlib.Path
    run: pathlib.Path | None
    settings: dict
    is_adapter: bool
    files: dict[str, pathlib.Path]
    skipped: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @property
    def num_parameters(self) -> int:
        """Values of all tensors that are trained, without fixed positions and running statistics."""
        fixed = list(_STATISTICS)
        if not self.is_adapter and self.architecture["position_embedding_type"] == "sincos":
            fixed.append("position_embeddings")
        trained = (shape for name, shape in self.shapes.items() if not any(part in name for part in fixed))
        return sum(math.prod(shape) for shape in trained)

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
    """Read a folder and check that nothing is missing.

    Raises:
        CardError: it is no model, adapter or training run, a file is missing, damaged or of another kind, or the run
            did not finish.
    """
    run, model = _find(pathlib.Path(path))
    is_adapter = (model / "adapter_config.json").is_file()
    settings = read_json(model / ("adapter_config.json" if is_adapter else "config.json"))
    files, skipped = _choose_files(model)
    weights = ["adapter_model.safetensors"]
    if not is_adapter:
        _check_settings(model, settings)
        weights = _weights(model)
        _require(model, files, [*weights, "preprocessor_config.json", *_code(model, settings, files)])
        if "text_config" in settings and "tokenizer_config.json" not in files:
            raise CardError(
                f"{model}: has no tokenizer (tokenizer_config.json), so the model cannot read text: save the "
                "tokenizer in the same folder with tokenizer.save_pretrained"
            )
    _require(model, files, weights)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in weights:
        shapes |= read_shapes(model / name)
    try:
        folders.check_weights(model, None if is_adapter else settings)
    except ValueError as error:
        raise CardError(str(error)) from None
    return ModelFolder(model, run, settings, is_adapter, files, skipped, shapes)


def read_json(path: pathlib.Path) -> dict:
    """A dictionary from a file.

    Raises:
        CardError: the file is missing, or holds no dictionary in JSON.
    """
    try:
        content = folders.read_json(path)
    except ValueError as error:
        raise CardError(str(error)) from None
    if content is None:
        raise CardError(f"{path} is missing")
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
        raise CardError(f"{path}: is damaged or incomplete ({error}): save the model again") from None


def list_code(settings: dict) -> set[str]:
    """Names of the files of a folder whose code its `auto_map` refers to."""
    references = settings.get("auto_map") or {}
    values = references.values() if isinstance(references, dict) else ()
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    return {f"{text.split('.')[0]}.py" for text in texts if isinstance(text, str) and "--" not in text}


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
            f"{path}: the training run has not finished, training.json is missing: continue it with the same command, "
            f"or publish {path / 'model'}"
        )
    return path, path / "model"


def _holds_model(path: pathlib.Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def _choose_files(model: pathlib.Path) -> tuple[dict[str, pathlib.Path], dict[str, str]]:
    files, skipped = {}, {}
    for entry in sorted(model.iterdir()):
        if entry.name.startswith(REPORTS):
            continue  # reports have a place of their own
        if entry.name == "README.md":
            skipped[entry.name] = "replaced by the card made from the reports"
        elif entry.is_dir():
            skipped[f"{entry.name}/"] = "a folder"
        elif entry.name.startswith(".") or (entry.suffix not in _SUFFIXES and entry.stem != "LICENSE"):
            skipped[entry.name] = "not a file of a model"
        elif not _is_inside(entry, model):
            skipped[entry.name] = "a link to a file outside of the folder"
        else:
            files[entry.name] = entry
    return files, skipped


def _is_inside(entry: pathlib.Path, folder: pathlib.Path) -> bool:
    """Whether a file lies in its folder; in the cache of the Hub, files are links to its folder `blobs`."""
    homes = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    return not entry.is_symlink() or entry.resolve().parent in homes


def _check_settings(model: pathlib.Path, settings: dict) -> None:
    """That config.json describes a model of this family."""
    path, processor = model / "config.json", model / "preprocessor_config.json"
    vision = settings.get("vision_config", settings)
    vision = vision if isinstance(vision, dict) else {}
    try:
        folders.check_settings(settings, path)
        if processor.is_file():
            folders.read_json(processor)
            read_image_processor(processor, num_channels=vision.get("num_channels", 3))
    except ValueError as error:
        raise CardError(str(error)) from None
    if not settings.get("architectures"):
        raise CardError(f"{path}: names no architecture: save the model with save_pretrained")
    kind = vision.get("model_type")
    if kind != "vitreg":
        raise CardError(f"{model}: expected a model of this family, vitreg, got the type {kind!r}")
    try:
        ViTWithRegistersConfig.from_dict(vision)
    except Exception as error:  # transformers raises errors of any class on values of another type
        raise CardError(f"{path}: is no valid configuration of this family: {error}") from None


def _require(model: pathlib.Path, files: dict[str, pathlib.Path], names: Iterable[str]) -> None:
    missing = sorted(set(names) - set(files))
    if missing:
        raise CardError(f"{model}: {', '.join(missing)} missing: save the model again with save_pretrained")


def _weights(model: pathlib.Path) -> list[str]:
    index = model / "model.safetensors.index.json"
    if (model / "model.safetensors").exists() or not index.exists():
        return ["model.safetensors"]
    try:
        return [path.name for path in folders.list_shards(index)]
    except ValueError as error:
        raise CardError(f"{error}: save the model again with save_pretrained") from None


def _code(model: pathlib.Path, settings: dict, files: dict[str, pathlib.Path]) -> list[str]:
    """Files with the code that the configuration names, and those that they import."""
    names = list_code(settings)
    if not names:
        raise CardError(
            f"{model / 'config.json'}: has no auto_map to code in the folder, so it cannot be loaded without this "
            "package: save the model with save_pretrained"
        )
    found: set[str] = set()
    while names - found:
        name = (names - found).pop()
        found.add(name)
        if name in files:
            text = files[name].read_text(encoding="utf-8", errors="replace")
            names |= {f"{module}.py" for module in _RELATIVE_IMPORT.findall(text)}
    return sorted(found)
