"""Vision Transformers with registers for the Hugging Face ecosystem.

Importing the package registers the family with the Auto classes of transformers; nothing else happens.
"""

import transformers


try:
    from modeling_vitreg.configuration_vitreg import ViTWithRegistersConfig
    from modeling_vitreg.dual_encoder_vitreg import (
        DUAL_ENCODER_AUTO_CLASSES,
        ViTWithRegistersDualEncoderConfig,
        ViTWithRegistersDualEncoderModel,
        ViTWithRegistersDualEncoderOutput,
    )
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


for _config in (ViTWithRegistersConfig, ViTWithRegistersDualEncoderConfig):
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)
for _model in AUTO_MODELS:
    getattr(transformers, _model._auto_class).register(ViTWithRegistersConfig, _model, exist_ok=True)
for _name in DUAL_ENCODER_AUTO_CLASSES:
    getattr(transformers, _name).register(
        ViTWithRegistersDualEncoderConfig, ViTWithRegistersDualEncoderModel, exist_ok=True
    )

__all__ = [
    "ViTWithRegistersAttentionMaps",
    "ViTWithRegistersBackbone",
    "ViTWithRegistersClassifierOutput",
    "ViTWithRegistersConfig",
    "ViTWithRegistersDualEncoderConfig",
    "ViTWithRegistersDualEncoderModel",
    "ViTWithRegistersDualEncoderOutput",
    "ViTWithRegistersForDepthEstimation",
    "ViTWithRegistersForImageClassification",
    "ViTWithRegistersForMaskedImageModeling",
    "ViTWithRegistersForSemanticSegmentation",
    "ViTWithRegistersModel",
    "ViTWithRegistersModelOutput",
    "ViTWithRegistersPreTrainedModel",
    "ViTWithRegistersTokens",
]
