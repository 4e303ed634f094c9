"""facebookresearch/dino: ViT-S and ViT-B with patches of 16 and 8 pixels, Apache-2.0.

python convert/from_dino.py dino_vitbase16 dino-base
"""

from modeling_vitreg.conversion.official import run


BASE = "https://dl.fbaipublicfiles.com/dino"
NAMES = ("dino_deitsmall16", "dino_deitsmall8", "dino_vitbase16", "dino_vitbase8")
FILES = {name: f"{BASE}/{name}_pretrain/{name}_pretrain.pth" for name in NAMES}


if __name__ == "__main__":
    run(FILES, title="facebookresearch/dino: ViT-S and ViT-B with patches of 16 and 8 pixels, Apache-2.0")
