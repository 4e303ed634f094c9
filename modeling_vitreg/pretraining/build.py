"""From a recipe to what learns: a backbone, new or loaded, inside the objective that the recipe names."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import torch
from transformers import AutoModelForImageClassification, PretrainedConfig

from modeling_vitreg.configuration_vitreg import ViTWithRegistersConfig
from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext
from modeling_vitreg.dual_encoder_vitreg import ViTWithRegistersDualEncoderConfig, ViTWithRegistersDualEncoderModel
from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.settings import make_keywords, make_settings

from .objectives.classify import Classification, ClassificationSettings
from .objectives.clip import CLIP, CLIPSettings
from .objectives.dense import DensePrediction, DepthEstimation, DepthSettings, Segmentation, SegmentationSettings
from .objectives.dinov2 import DINOv2, DINOv2Settings
from .objectives.distill import Distillation, DistillationSettings
from .objectives.mae import MAE, MAESettings
from .objectives.objective import Objective
from .objectives.simmim import SimMIM
from .run.recipe import Recipe
from .state import last_state, load_objective, read_metadata
from .views.masking import MaskSettings


WITH_OWN_HEAD = ("classify", "clip", "segment", "depth")
WITH_MASK_TOKEN = ("dinov2", "simmim")  # with other objectives a mask token would never learn


def make_config(recipe: Recipe) -> ViTWithRegistersConfig:
    """The configuration of the backbone of a recipe.

    Raises:
        ValueError: a value of `model` that the configuration does not know, or does not allow.
    """
    has_mask_token = recipe.objective in WITH_MASK_TOKEN
    keywords = {"has_mask_token": has_mask_token, "image_size": recipe.crops.global_size} | _model_keywords(recipe)
    keywords["num_register_tokens"] = recipe.num_register_tokens
    if "preset" in recipe.model:
        return ViTWithRegistersConfig.from_preset(recipe.model["preset"], **keywords)
    return ViTWithRegistersConfig(**keywords)


def make_objective(
    recipe: Recipe, *, init: str | pathlib.Path | None = None, processes: DistributedContext = SINGLE_PROCESS
) -> Objective:
    """Everything that learns, in one module.

    Args:
        recipe: of the run. With `init`, the architecture is that of the loaded model; of the recipe's, stochastic
            depth and the number of registers hold, and positions are resized to the views of the recipe.
        init: a folder or a name on the Hub to start from, of a dual encoder its image tower; of the output folder of
            another run, heads and teacher are taken too.
        processes: that share a batch.

    Raises:
        ValueError: the recipe contradicts itself, or `init` does not fit it.
    """
    torch.manual_seed(recipe.seed)  # also of what a checkpoint lacks, such as a mask token
    if init is None:
        return _wrap(ViTWithRegistersModel(make_config(recipe)), recipe, processes)
    folder = pathlib.Path(init)
    kept = {name: value for name, value in _model_keywords(recipe).items() if name.startswith("drop_path")}
    kept["has_mask_token"] = recipe.objective in WITH_MASK_TOKEN
    backbone = _load_backbone(_model_in(init), kept)
    objective = _wrap(backbone, recipe, processes)
    state = last_state(folder / "state") if folder.is_dir() else None
    # These start from any model; the heads of what made it are of no use to them.
    is_same_kind = state is not None and (
        recipe.objective not in WITH_OWN_HEAD or read_metadata(state)["recipe"]["objective"] == recipe.objective
    )
    if is_same_kind:
        _take_over(objective, load_objective(state))
    for network in {objective.encoder, objective.trained["backbone"]}:
        torch.manual_seed(recipe.seed)  # student and teacher get the same new registers
        network.resize_register_tokens(recipe.num_register_tokens)
        network.resize_position_embeddings(recipe.crops.global_size)
    if objective.encoder is not objective.trained["backbone"]:
        objective.encoder.requires_grad_(False)  # registers where there were none before are new parameters
    return objective


def _load_backbone(source: str | pathlib.Path, changes: dict) -> ViTWithRegistersModel:
    """The image tower of a folder or a name, whatever head or text tower it is saved with, with other settings."""
    kind = PretrainedConfig.get_config_dict(source)[0].get("model_type")
    if kind != ViTWithRegistersDualEncoderConfig.model_type:
        return ViTWithRegistersModel.from_pretrained(source, dtype=torch.float32, **changes)
    tower = ViTWithRegistersDualEncoderModel.from_pretrained(source, dtype=torch.float32).vision_model
    config = ViTWithRegistersConfig.from_dict({**tower.config.to_dict(), **changes})
    backbone = ViTWithRegistersModel.from_pretrained(None, config=config, state_dict=tower.state_dict())
    backbone.config._name_or_path = str(source)  # where the image processor lies
    return backbone


def _model_keywords(recipe: Recipe) -> dict:
    """What `model` changes of the defaults; the configuration itself would accept any name."""
    if "num_register_tokens" in recipe.model:
        raise ValueError("model: num_register_tokens is a value of the recipe itself: move it out of model")
    values = {name: value for name, value in recipe.model.items() if name != "preset"}
    return make_keywords(ViTWithRegistersConfig, values, of="model")


def _take_over(objective: Objective, weights: dict[str, torch.Tensor]) -> None:
    """Take what another run learned: heads, student, teacher, means."""
    own = objective.state_dict()
    wrong = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if wrong:
        raise ValueError(
            f"init: the run to start from has another objective or other sizes of heads; {len(wrong)} tensors do not "
            f"fit, for example {', '.join(wrong[:3])}. Give the settings of that run, or its model folder, to start "
            f"from its model alone"
        )
    objective.load_state_dict(weights)


def _model_in(source: str | pathlib.Path) -> str | pathlib.Path:
    """The model of the output folder of a run; any other folder or name is one of a model itself."""
    folder = pathlib.Path(source)
    return folder / "model" if (folder / "model" / "config.json").exists() else source


def _wrap(backbone: ViTWithRegistersModel, recipe: Recipe, processes: DistributedContext) -> Objective:
    common = {"num_steps": recipe.num_steps, "processes": processes, "crops": recipe.crops}
    if recipe.objective not in _MAKERS:
        raise ValueError(f"recipe: objective is one of {', '.join(OBJECTIVES)}, got {recipe.objective!r}")
    return _MAKERS[recipe.objective](backbone, recipe, common)


def _make_self_distillation(backbone: ViTWithRegistersModel, recipe: Recipe, common: dict) -> Objective:
    settings = make_settings(DINOv2Settings, recipe.settings, of="settings")
    return DINOv2(backbone, settings=settings, masks=recipe.masks, **common)


def _make_masked_autoencoder(backbone: ViTWithRegistersModel, recipe: Recipe, common: dict) -> Objective:
    settings = make_settings(MAESettings, recipe.settings, of="settings")
    return MAE(backbone, settings=settings, masks=recipe.masks, **common)


def _make_masked_pixels(backbone: ViTWithRegistersModel, recipe: Recipe, common: dict) -> Objective:
    if recipe.settings:
        raise ValueError(
            f"settings: the objective 'simmim' has none, got {', '.join(recipe.settings)}: leave them out"
        )
    return SimMIM(backbone, masks=recipe.masks, **common)


def _make_distillation(backbone: ViTWithRegistersModel, recipe: Recipe, common: dict) -> Objective:
    if recipe.masks != MaskSettings():
        raise ValueError(f"masks: the objective 'distill' hides no patch, got {recipe.masks}: leave them out")
    settings = make_settings(DistillationSettings, recipe.settings, of="settings")
    return Distillation(backbone, teacher=_load_teacher(settings.teacher, recipe), settings=settings, **common)


def _load_teacher(name: str, recipe: Recipe) -> ViTWithRegistersModel:
    """The teacher of a recipe, whole, of this family, and made for the pixels of the recipe."""
    if not name:
        raise ValueError("settings: teacher is the folder or the name on the Hub of the model to learn from, got none")
    source = _model_in(name)
    try:
        kind = PretrainedConfig.get_config_dict(source)[0].get("model_type")
    except OSError as error:
        raise ValueError(f"settings: teacher {name} is neither a folder of a model nor on the Hub: {error}") from None
    if kind != ViTWithRegistersConfig.model_type:
        raise ValueError(
            f"settings: expected a teacher of model_type {ViTWithRegistersConfig.model_type!r}, got {kind!r} in "
            f"{name}: convert it first"
        )
    teacher, report = ViTWithRegistersModel.from_pretrained(
        source, dtype=torch.float32, has_mask_token=False, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(
            f"settings: teacher {name} lacks {len(report['missing_keys'])} tensors, for example "
            f"{min(report['missing_keys'])}: it would teach noise"
        )
    pixels = teacher.image_processor_settings()
    for key, own in (("image_mean", recipe.mean), ("image_std", recipe.std)):
        if any(abs(theirs - ours) > 1e-3 for theirs, ours in zip(pixels[key], own)):
            raise ValueError(
                f"recipe: student and teacher see the same pixels, but {key} of {name} is {pixels[key]} and that of "
                f"the recipe {list(own)}: give the recipe the mean and std of the teacher"
            )
    return teacher


def _make_classification(backbone: ViTWithRegistersModel, recipe: Recipe, common: dict) -> Objective:
    if recipe.masks != MaskSettings():
        raise ValueError(f"masks: the objective 'classify' hides no patch, got {recipe.masks}: leave them out")
    settings = make_settings(ClassificationSettings, recipe.settings, of="settings")
    teacher = _load_class_teacher(settings) if settings.teacher else None
    return Classification(backbone, teacher=teacher, settings=settings, **common)


def _load_class_teacher(settings: ClassificationSettings) -> torch.nn.Module:
    """A classifier of the same classes in the same order."""
    source = _model_in(settings.teacher)
    try:
        teacher = AutoModelForImageClassification.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"settings: teacher {settings.teacher} is no classifier that can be loaded: {error}"
        ) from None
    names = tuple(teacher.config.id2label[number] for number in range(teacher.config.num_labels))
    if names != settings.class_names:
        raise ValueError(
            f"settings: teacher {settings.teacher} knows {len(names)} classes, {', '.join(names[:3])} ..., the data "
            f"has {len(settings.class_names)}, {', '.join(settings.class_names[:3])} ...: they have to be the same"
        )
    return teacher.requires_grad_(False).eval()


def _make_contrast(backbone: ViTWithRegistersModel, recipe: Recipe, common: dict) -> Objective:
    if recipe.masks != MaskSettings():
        raise ValueError(f"masks: the objective 'clip' hides no patch, got {recipe.masks}: leave them out")
    settings = make_settings(CLIPSettings, recipe.settings, of="settings")
    return CLIP(backbone, settings=settings, **common)


def _make_dense(kind: type[DensePrediction], settings: type) -> Callable:
    def make(backbone: ViTWithRegistersModel, recipe: Recipe, common: dict) -> Objective:
        if recipe.masks != MaskSettings():
            raise ValueError(
                f"masks: the objective {recipe.objective!r} hides no patch, got {recipe.masks}: leave them out"
            )
        return kind(backbone, settings=make_settings(settings, recipe.settings, of="settings"), **common)

    return make


_MAKERS = {
    "dinov2": _make_self_distillation,
    "mae": _make_masked_autoencoder,
    "simmim": _make_masked_pixels,
    "distill": _make_distillation,
    "classify": _make_classification,
    "clip": _make_contrast,
    "segment": _make_dense(Segmentation, SegmentationSettings),
    "depth": _make_dense(DepthEstimation, DepthSettings),
}
OBJECTIVES = tuple(_MAKERS)

__all__ = ["OBJECTIVES", "make_config", "make_objective"]
