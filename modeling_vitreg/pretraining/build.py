"""The objective that a recipe names, around a new or a pretrained backbone."""

from __future__ import annotations

import pathlib

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig

from modeling_vitreg.configuration_vitreg import ViTWithRegistersConfig
from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext
from modeling_vitreg.dual_encoder_vitreg import ViTWithRegistersDualEncoderConfig, ViTWithRegistersDualEncoderModel
from modeling_vitreg.features.folders import conversion_command, is_hub_name
from modeling_vitreg.hat_vitreg import HATNetModel
from modeling_vitreg.images import check_channels
from modeling_vitreg.mamba_vitreg import MambaRModel
from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.names import list_first
from modeling_vitreg.settings import make_keywords

from .objectives.objective import Objective
from .objectives.registry import OBJECTIVES, objective_class
from .objectives.teachers import model_of_run
from .run.recipe import Recipe
from .state import last_state, load_objective, read_metadata


_MODELS = {model.config_class.model_type: model for model in (ViTWithRegistersModel, MambaRModel, HATNetModel)}


def backbone_class(model_type: str) -> type[ViTWithRegistersModel]:
    """The class of backbones of a type.

    Raises:
        ValueError: there is no such type.
    """
    if model_type not in _MODELS:
        raise ValueError(f"model: expected a model_type out of {', '.join(_MODELS)}, got {model_type!r}")
    return _MODELS[model_type]


def make_config(recipe: Recipe) -> ViTWithRegistersConfig:
    """The configuration of the backbone of a recipe.

    Raises:
        ValueError: a value of `model` that the configuration does not know, or does not allow.
    """
    has_mask_token = objective_class(recipe.objective).needs_mask_token
    keywords = {"has_mask_token": has_mask_token, "image_size": recipe.crops.global_size} | _model_keywords(recipe)
    keywords["num_register_tokens"] = recipe.num_register_tokens
    kind = _config_class(recipe)
    config = kind.from_preset(recipe.model["preset"], **keywords) if "preset" in recipe.model else kind(**keywords)
    check_channels(config.num_channels, reader="recipe: the model")
    recipe.statistics(config.num_channels)
    return config


def make_objective(
    recipe: Recipe,
    *,
    init: str | pathlib.Path | None = None,
    config: ViTWithRegistersConfig | None = None,
    processes: DistributedContext = SINGLE_PROCESS,
) -> Objective:
    """The objective of a recipe, with all trained modules.

    Args:
        recipe: of the run. With `init`, the architecture is that of the loaded model; of the recipe's, stochastic
            depth, the number of registers and a `token_reduction` without weights of its own hold, and positions are
            resized to the views of the recipe.
        init: a folder or a name on the Hub to start from, of a dual encoder its image tower; of the output folder of
            another run, heads and teacher are taken too.
        config: of a new backbone, when a run continues that started from another architecture; None: the recipe's.
        processes: processes that share a batch.

    Raises:
        ValueError: the recipe contradicts itself, or `init` does not fit it.
    """
    torch.manual_seed(recipe.seed)  # also of what a checkpoint lacks, such as a mask token
    if init is None:
        config = config or make_config(recipe)
        return _wrap(backbone_class(config.model_type)(config), recipe, processes)
    folder = pathlib.Path(init)
    keywords = _model_keywords(recipe)
    kept = {name: value for name, value in keywords.items() if name.startswith("drop_path")}
    reduction = keywords.get("token_reduction")
    if reduction is not None and not (isinstance(reduction, dict) and reduction.get("kind") == "learn"):
        kept["token_reduction"] = reduction
    kept["has_mask_token"] = objective_class(recipe.objective).needs_mask_token
    backbone = _load_backbone(model_of_run(init), kept)
    objective = _wrap(backbone, recipe, processes)
    state = last_state(folder / "state") if folder.is_dir() else None
    # These start from any model and do not use the heads of the run that trained it.
    is_same_kind = state is not None and (
        not objective_class(recipe.objective).has_head
        or read_metadata(state)["recipe"]["objective"] == recipe.objective
    )
    if is_same_kind:
        _take_over(objective, load_objective(state))
    for network in {objective.encoder, objective.trained["backbone"]}:
        torch.manual_seed(recipe.seed)  # student and teacher get the same new registers
        network.resize_register_tokens(recipe.num_register_tokens)
        network.resize_position_embeddings(recipe.crops.global_size)
    if objective.encoder is not objective.trained["backbone"]:
        objective.encoder.requires_grad_(False)  # registers where there were none before are new parameters
    objective.begin()
    return objective


def _load_backbone(source: str | pathlib.Path, changes: dict) -> ViTWithRegistersModel:
    """The image tower of a folder or a name, without its head or text tower, with other settings."""
    if not is_of_this_family(source):
        raise ValueError(f"init: {conversion_command(source)}")
    dual = ViTWithRegistersDualEncoderModel
    try:
        kind = PretrainedConfig.get_config_dict(source)[0].get("model_type")
        is_dual = kind == ViTWithRegistersDualEncoderConfig.model_type
        own, options = ViTWithRegistersModel if is_dual else backbone_class(kind), {} if is_dual else changes
        model, report = (dual if is_dual else own).from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"init: {source} cannot be loaded: {error}") from error
    # A mask token is new where the model was trained without one.
    missing = sorted(name for name in report["missing_keys"] if not name.endswith("embeddings.mask_token"))
    if missing:
        raise ValueError(
            f"init: {source} lacks {len(missing)} tensors, which would be random: {list_first(missing, 20)}. "
            "Download or save the model again"
        )
    if not is_dual:
        return model
    tower = model.vision_model
    config = ViTWithRegistersConfig.from_dict({**tower.config.to_dict(), **changes})
    backbone = own.from_pretrained(None, config=config, state_dict=tower.state_dict())
    backbone.config._name_or_path = str(source)  # where the image processor lies
    return backbone


def is_of_this_family(source: str | pathlib.Path) -> bool:
    """Whether a folder or a name on the Hub holds a model or a dual encoder of this family.

    Raises:
        ValueError: the configuration of a model on the Hub cannot be read.
    """
    kinds = (*_MODELS, ViTWithRegistersDualEncoderConfig.model_type)
    is_folder = pathlib.Path(source).is_dir()
    if not is_folder and not is_hub_name(str(source)):
        return False
    try:
        return PretrainedConfig.get_config_dict(source)[0].get("model_type") in kinds
    except (OSError, ValueError) as error:
        if not is_folder:
            raise ValueError(f"{source} cannot be loaded: {error}") from error
        return False


def _model_keywords(recipe: Recipe) -> dict:
    """What `model` changes of the defaults; the configuration itself would accept any name."""
    if "num_register_tokens" in recipe.model:
        raise ValueError("model: num_register_tokens belongs to the top level of the recipe: move it out of model")
    values = {name: value for name, value in recipe.model.items() if name not in ("preset", "model_type")}
    return make_keywords(_config_class(recipe), values, of="model")


def _config_class(recipe: Recipe) -> type[ViTWithRegistersConfig]:
    return backbone_class(recipe.model.get("model_type", ViTWithRegistersConfig.model_type)).config_class


def _take_over(objective: Objective, weights: dict[str, torch.Tensor]) -> None:
    """Take what another run learned: heads, student, teacher, means."""
    own = objective.state_dict()
    # The Gram teacher of a run is its own.
    kept = {name: value for name, value in own.items() if name.startswith("gram_teacher.")}
    weights = {name: value for name, value in weights.items() if not name.startswith("gram_teacher.")} | kept
    wrong = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if wrong:
        raise ValueError(
            f"init: the run to start from has another objective or other sizes of heads; {len(wrong)} tensors do not "
            f"fit, for example {list_first(wrong, 3)}. Use the settings of that run, or start from its model alone: "
            f"--init RUN/model"
        )
    objective.load_state_dict(weights)


def _wrap(backbone: ViTWithRegistersModel, recipe: Recipe, processes: DistributedContext) -> Objective:
    kind, plain = objective_class(recipe.objective), ViTWithRegistersConfig.model_type
    if backbone.config.model_type != plain and not kind.takes_any_backbone:
        others = [name for name in OBJECTIVES if objective_class(name).takes_any_backbone]
        raise ValueError(
            f"objective {recipe.objective} trains models of type {plain}, got {backbone.config.model_type}: choose "
            f"the objective {' or '.join(others)}"
        )
    if kind.needs_all_patches and backbone.config.token_reduction is not None:
        raise ValueError(
            f"objective: {recipe.objective} needs all patches, and the model has token_reduction="
            f"{backbone.config.token_reduction}: train with classify, or set model.token_reduction to null"
        )
    return kind.from_recipe(backbone, recipe, num_steps=recipe.num_steps, processes=processes)
