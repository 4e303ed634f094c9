"""Vision Transformers with registers for the Hugging Face ecosystem.

The classes are known to the Auto classes of transformers as soon as both packages are imported, in any order. Nothing
else is imported before a name of this package is used, so that `vitreg --help` is quick.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from modeling_vitreg.registration import HUB_MODULES, register_when_imported


if TYPE_CHECKING:
    from modeling_vitreg.configuration_vitreg import ViTWithRegistersConfig
    from modeling_vitreg.dual_encoder_vitreg import (
        ViTWithRegistersDualEncoderConfig,
        ViTWithRegistersDualEncoderModel,
        ViTWithRegistersDualEncoderOutput,
    )
    from modeling_vitreg.hat_vitreg import HATNetConfig, HATNetForImageClassification, HATNetModel
    from modeling_vitreg.mamba_vitreg import MambaRConfig, MambaRForImageClassification, MambaRModel
    from modeling_vitreg.modeling_vitreg import (
        ViTWithRegistersAttentionMaps,
        ViTWithRegistersBackbone,
        ViTWithRegistersClassifierOutput,
        ViTWithRegistersForDepthEstimation,
        ViTWithRegistersForImageClassification,
        ViTWithRegistersForMaskedImageModeling,
        ViTWithRegistersForSemanticSegmentation,
        ViTWithRegistersModel,
        ViTWithRegistersModelOutput,
        ViTWithRegistersPreTrainedModel,
        ViTWithRegistersTokens,
    )
    from modeling_vitreg.vision_language_vitreg import (
        ViTWithRegistersForConditionalGeneration,
        ViTWithRegistersVisionLanguageConfig,
        ViTWithRegistersVisionLanguageOutput,
    )


def __getattr__(name: str) -> object:
    """A public class, from the file of the Hub that defines it (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        modules = [importlib.import_module(module) for module in HUB_MODULES]
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        raise ImportError(
            f"transformers cannot be imported, because torchvision was built for another torch ({error}). Type: "
            "pip install --force-reinstall torch torchvision"
        ) from error
    for module in modules:
        if hasattr(module, name):
            globals()[name] = getattr(module, name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported(sys.modules)

__all__ = [
    "HATNetConfig",
    "HATNetForImageClassification",
    "HATNetModel",
    "MambaRConfig",
    "MambaRForImageClassification",
    "MambaRModel",
    "ViTWithRegistersAttentionMaps",
    "ViTWithRegistersBackbone",
    "ViTWithRegistersClassifierOutput",
    "ViTWithRegistersConfig",
    "ViTWithRegistersDualEncoderConfig",
    "ViTWithRegistersDualEncoderModel",
    "ViTWithRegistersDualEncoderOutput",
    "ViTWithRegistersForConditionalGeneration",
    "ViTWithRegistersForDepthEstimation",
    "ViTWithRegistersForImageClassification",
    "ViTWithRegistersForMaskedImageModeling",
    "ViTWithRegistersForSemanticSegmentation",
    "ViTWithRegistersModel",
    "ViTWithRegistersModelOutput",
    "ViTWithRegistersPreTrainedModel",
    "ViTWithRegistersTokens",
    "ViTWithRegistersVisionLanguageConfig",
    "ViTWithRegistersVisionLanguageOutput",
]
