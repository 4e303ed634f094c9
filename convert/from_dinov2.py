"""facebookresearch/dinov2: backbones with and without registers, Apache-2.0.

    python convert/from_dinov2.py dinov2_vits14_reg4 dinov2-small-registers

The names carry no hash, and none is published: what was downloaded is recorded in conversion.json.
"""

from modeling_vitreg.conversion.official import run


BASE = "https://dl.fbaipublicfiles.com/dinov2"
FILES = {
    f"dinov2_vit{size}14{registers}": f"{BASE}/dinov2_vit{size}14/dinov2_vit{size}14{registers}_pretrain.pth"
    for size in "sblg"
    for registers in ("", "_reg4")
}


if __name__ == "__main__":
    run(FILES, title="facebookresearch/dinov2: backbones with and without registers, Apache-2.0")
