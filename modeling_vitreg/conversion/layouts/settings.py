"""What the `config.json` of a folder of transformers says, with the defaults of the library."""

from __future__ import annotations

import transformers

from modeling_vitreg import ViTWithRegistersConfig
from modeling_vitreg.reports import versions

from ..rules import ConversionError
from .layout import CheckpointInfo


def complete(info: CheckpointInfo) -> dict:
    """Settings of the image model, with what `config.json` leaves out filled in by the library's own configuration.

    Raises:
        ConversionError: the installed version does not know the model type.
    """
    settings = info.settings
    model_type = settings["model_type"]
    if model_type not in transformers.CONFIG_MAPPING:
        raise ConversionError(
            f"{info.file_name}: transformers {versions('transformers')['transformers']} does not know model type "
            f"{model_type!r}: install a newer version"
        )
    config = transformers.CONFIG_MAPPING[model_type].from_dict(settings)
    return getattr(config, "vision_config", config).to_dict()


def labels_of(info: CheckpointInfo, name: str = "classifier") -> dict:
    """Fields of a classifier, where there is one, with the names of the classes."""
    if not info.has(f"{name}.weight"):
        return {}
    fields = {"num_labels": info.size(f"{name}.weight", 0)}
    settings = info.settings or {}
    if len(settings.get("id2label") or {}) == fields["num_labels"]:
        fields["id2label"] = {int(number): label for number, label in settings["id2label"].items()}
        fields["label2id"] = {label: number for number, label in fields["id2label"].items()}
    return fields


def side_of(config: ViTWithRegistersConfig) -> int:
    """Shorter side, in pixels, of the images of the position table."""
    return config.image_size if isinstance(config.image_size, int) else min(config.image_size)
