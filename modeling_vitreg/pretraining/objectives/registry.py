"""The objectives that a recipe can name."""

from __future__ import annotations

import importlib

from modeling_vitreg.settings import suggest_name

from .objective import Objective


# Name in recipes: module and class, which is imported when it is asked for.
OBJECTIVES = {
    "dinov2": f"{__package__}.dinov2:DINOv2",
    "mae": f"{__package__}.mae:MAE",
    "lejepa": f"{__package__}.lejepa:LeJEPA",
    "simmim": f"{__package__}.simmim:SimMIM",
    "distill": f"{__package__}.distill:Distillation",
    "classify": f"{__package__}.classify:Classification",
    "clip": f"{__package__}.clip:CLIP",
    "segment": f"{__package__}.dense:Segmentation",
    "depth": f"{__package__}.dense:DepthEstimation",
    "append_registers": f"{__package__}.append_registers:AppendRegisters",
    "distill_registers": f"{__package__}.distill_registers:DistillRegisters",
    "refine_registers": f"{__package__}.refine_registers:RefineRegisters",
}


def objective_class(name: str) -> type[Objective]:
    """The class of an objective.

    Raises:
        ValueError: no objective has this name.
    """
    if name not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise ValueError(
            f"recipe: expected objective to be one of {known}, got {name!r}; {suggest_name(name, OBJECTIVES)}"
        )
    module, _, attribute = OBJECTIVES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def describe_objective(name: object) -> str:
    """Description of an objective for cards; an unknown name is returned unchanged."""
    return objective_class(name).description if _is_known(name) else str(name)


def citation_of(name: object) -> str | None:
    """Family in `cards.citations` or BibTeX entry; None if the objective is unknown or has none."""
    return objective_class(name).citation if _is_known(name) else None


def _is_known(name: object) -> bool:
    return isinstance(name, str) and name in OBJECTIVES
