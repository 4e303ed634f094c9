"""Vision Transformers with registers for the Hugging Face ecosystem.

Importing the package registers the family with the Auto classes of transformers; nothing else happens.
"""

import transformers


try:
    from modeling_vitreg.configuration_vitreg import ViTWithRegistersConfig
    from modeling_vitreg.modeling_vitreg import (
        AUTO_MODELS,
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
except RuntimeError as error:
    if "torchvision" not in str(error):
        raise
    raise ImportError(
        f"transformers cannot be imported, for torchvision was built for another torch ({error}). Type: "
        "pip install --force-reinstall torch torchvision"
    ) from error


transformers.AutoConfig.register(ViTWithRegistersConfig.model_type, ViTWithRegistersConfig, exist_ok=True)
for _model in AUTO_MODELS:
    getattr(transformers, _model._auto_class).register(ViTWithRegistersConfig, _model, exist_ok=True)

__all__ = [
    "ViTWithRegistersAttentionMaps",
    "ViTWithRegistersBackbone",
    "ViTWithRegistersClassifierOutput",
    "ViTWithRegistersConfig",
    "ViTWithRegistersForDepthEstimation",
    "ViTWithRegistersForImageClassification",
    "ViTWithRegistersForMaskedImageModeling",
    "ViTWithRegistersForSemanticSegmentation",
    "ViTWithRegistersModel",
    "ViTWithRegistersModelOutput",
    "ViTWithRegistersPreTrainedModel",
    "ViTWithRegistersTokens",
]
