"""facebookresearch/mae: the encoders of pretraining, CC-BY-NC-4.0.

python convert/from_mae.py mae_pretrain_vit_base mae-base
"""

from modeling_vitreg.conversion.official import run


BASE = "https://dl.fbaipublicfiles.com/mae/pretrain"
FILES = {f"mae_pretrain_vit_{size}": f"{BASE}/mae_pretrain_vit_{size}.pth" for size in ("base", "large", "huge")}


if __name__ == "__main__":
    run(FILES, title="facebookresearch/mae: the encoders of pretraining, CC-BY-NC-4.0")
