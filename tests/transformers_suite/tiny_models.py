"""The tiny models that transformers' tests run on: five architectures, which together use most options of the family.

As a program, `python tiny_models.py FOLDER` saves one model of every class the way a user would, with its code and its
image processor, in the layout that the pipeline tests look for: `FOLDER/vitreg/<class>/`, and a table of contents.
"""

import json
import pathlib
import sys


SIZES = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "num_depth_bins": 16,
}
ARCHITECTURES = {
    "dinov2": {"num_register_tokens": 3, "layer_scale_init_value": 0.1, "pooling": "cls_mean", "out_indices": [1, 2]},
    "dinov3": {"position_embedding_type": "rope", "hidden_act": "swiglu", "has_key_bias": False},
    "merging": {"num_register_tokens": 3, "token_reduction": {"kind": "merge", "per_layer": 4}},
    "deit": {"num_register_tokens": 1, "has_distillation_token": True, "pooling": "cls_distillation"},
    "mae": {
        "position_embedding_type": "sincos",
        "num_register_tokens": 0,
        "has_cls_token": False,
        "has_pre_norm": True,
        "pooling": "mean",
        "has_pooled_norm": True,
        "drop_path_rate": 0.1,
    },
}
MODELS = (
    "ViTWithRegistersModel",
    "ViTWithRegistersForImageClassification",
    "ViTWithRegistersForMaskedImageModeling",
    "ViTWithRegistersForSemanticSegmentation",
    "ViTWithRegistersForDepthEstimation",
    "ViTWithRegistersBackbone",
)
# Backbones that are no Vision Transformers: configuration, models, sizes.
BACKBONES = {
    "mamba": (
        "MambaRConfig",
        ("MambaRModel", "MambaRForImageClassification"),
        {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_register_tokens": 3},
    ),
}


def save_all(folder: pathlib.Path) -> None:
    """Save one model of every class under `folder`."""
    import transformers

    import modeling_vitreg

    contents = {}
    for name in MODELS:
        config = modeling_vitreg.ViTWithRegistersConfig(**SIZES, **ARCHITECTURES["dinov2"])
        model = getattr(modeling_vitreg, name)(config)
        model.save_pretrained(folder / "vitreg" / name)
        processor = model.image_processor_settings()["image_processor_type"]
        # Some versions have a class for each of two libraries: every one of them must read the file.
        processors = [f"{processor}{suffix}" for suffix in ("", "Pil") if hasattr(transformers, processor + suffix)]
        contents[name] = {"tokenizer_classes": [], "processor_classes": processors, "model_classes": [name]}
    for config, names, sizes in BACKBONES.values():
        for name in names:
            config_class = getattr(modeling_vitreg, config)
            getattr(modeling_vitreg, name)(config_class(**sizes)).save_pretrained(folder / "vitreg" / name)
    (folder / "reports").mkdir()
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(contents, indent=2))


if __name__ == "__main__":
    save_all(pathlib.Path(sys.argv[1]))
