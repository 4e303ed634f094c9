"""Contents of the files of transformers: `config.json`, the class of a folder, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterable

from modeling_vitreg import ViTWithRegistersConfig

from . import aimv2, beit, pixio, radio, sapiens2, siglip, tipsv2
from .layout import Layout
from .transformers import CLIP_TOWERS, CLIP_WHOLE
from .transformers import LAYOUTS as WITH_NAMES_OF_VIT


# Beginning of the names of classes, by model type.
_CLASSES = {
    "vit": "ViT",
    "deit": "DeiT",
    "ijepa": "IJepa",
    "vit_mae": "ViTMAE",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
    "dinov3_vit": "DINOv3ViT",
    "vit_msn": "ViTMSN",
    "clip_vision_model": "CLIPVision",
    "clip": "CLIP",
    "metaclip_2_vision_model": "MetaClip2Vision",
    "metaclip_2": "MetaClip2",
    "altclip_vision_model": "AltCLIPVision",
    "altclip": "AltCLIP",
    "chinese_clip_vision_model": "ChineseCLIPVision",
    "chinese_clip": "ChineseCLIP",
    "siglip_vision_model": "SiglipVision",
    "siglip": "Siglip",
    "aimv2_vision_model": "Aimv2Vision",
    "aimv2": "Aimv2",
    "tipsv2_vision_model": "Tipsv2Vision",
    "tipsv2": "Tipsv2",
    "pixio": "Pixio",
    "radio": "Radio",
    "sapiens2": "Sapiens2",
    "beit": "Beit",
    "data2vec-vision": "Data2VecVision",
}
_WITH_OWN_NAMES = (siglip, aimv2, tipsv2, pixio, radio, sapiens2, beit)
# Layout of each model type of transformers.
LAYOUTS: dict[str, Layout] = {
    **WITH_NAMES_OF_VIT,
    **{name: module.LAYOUT for module in _WITH_OWN_NAMES for name in module.LAYOUT.model_types},
}


def transformers_settings(layout: Layout, config: ViTWithRegistersConfig, *, is_classifier: bool) -> dict:
    """The `config.json` of the class of transformers that a layout belongs to.

    Args:
        layout: one of `LAYOUTS`.
        config: our configuration.
        is_classifier: whether there is a classifier.
    """
    model_type = next(name for name, known in LAYOUTS.items() if known is layout)
    settings = {
        "architectures": [_class_name(model_type, config, is_classifier)],
        "model_type": model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "qkv_bias": config.has_query_bias,
        "initializer_range": config.initializer_range,
    }
    is_gated = config.hidden_act == "swiglu"
    if model_type.startswith("dinov2"):
        ratio = config.intermediate_size / config.hidden_size
        settings |= {
            # SwiGLU takes two thirds of the ratio, and whole numbers stay whole, for types are checked.
            "mlp_ratio": 4 if is_gated else int(ratio) if ratio == int(ratio) else ratio,
            "use_swiglu_ffn": is_gated,
            "layerscale_value": config.layer_scale_init_value,
            "hidden_act": "gelu" if is_gated else config.hidden_act,
        }
        if model_type == "dinov2_with_registers":
            settings["num_register_tokens"] = config.num_register_tokens
    if model_type == "dinov3_vit":
        settings |= {
            "num_register_tokens": config.num_register_tokens,
            "rope_theta": config.rope_theta,
            "layerscale_value": config.layer_scale_init_value,
            "use_gated_mlp": is_gated,
            "hidden_act": "silu" if is_gated else config.hidden_act,
            "query_bias": config.has_query_bias,
            "key_bias": config.has_key_bias,
            "value_bias": config.has_value_bias,
        }
    if model_type == "clip_vision_model" and config.projection_size is not None:
        settings["projection_dim"] = config.projection_size
    settings |= layout.write_settings(config)
    if is_classifier:
        settings |= {"id2label": config.id2label, "label2id": config.label2id}
    return settings


def _class_name(model_type: str, config: ViTWithRegistersConfig, is_classifier: bool) -> str:
    base = _CLASSES[model_type]
    if model_type == "clip_vision_model" and config.projection_size is not None:
        return "CLIPVisionModelWithProjection"
    if not is_classifier:
        return f"{base}Model"
    return f"{base}ForImageClassification" + ("WithTeacher" if config.pooling == "cls_distillation" else "")


def transformers_class(settings: dict, names: Iterable[str]) -> str:
    """The class of transformers of a folder: the one that `config.json` names, else one that has its tensors.

    Args:
        settings: settings of `config.json`, with a `model_type` of `LAYOUTS`.
        names: names of the tensors.
    """
    names, base = list(names), _CLASSES[settings["model_type"]]
    has = {part: any(part in name for name in names) for part in ("text_model.", "visual_projection", "decoder")}
    heads = {
        "ForImageClassificationWithTeacher": any(name.startswith("cls_classifier.") for name in names),
        "ForImageClassification": any(name.startswith("classifier.") for name in names),
        "ForPreTraining": base == "ViTMAE" and has["decoder"],
        "ModelWithProjection": settings["model_type"] in CLIP_TOWERS and has["visual_projection"],
    }
    if settings["model_type"] in CLIP_WHOLE and not has["text_model."]:
        base += "Vision"
        heads["ModelWithProjection"] = has["visual_projection"]
    named = (settings.get("architectures") or [None])[0]
    if named in {base + ending for ending in (*heads, "Model")}:
        return named
    return base + next((ending for ending, is_there in heads.items() if is_there), "Model")


def name_in_file(layout: Layout, settings: dict, name: str) -> str:
    """A tensor's name in the file of the class that the settings name: classes with a head put a word in front."""
    model_type, kind, name = settings["model_type"], settings["architectures"][0], layout.in_file(name)
    if kind.endswith("Model") or "classifier" in name or name == "visual_projection.weight":
        return name
    return f"{'vision_model' if model_type == 'clip_vision_model' else model_type}.{name}"
