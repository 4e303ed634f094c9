"""facebookresearch/deit: DeiT, distilled DeiT and DeiT-III, Apache-2.0.

    python convert/from_deit.py deit_3_base_224_21k deit3-base

The first eight digits of the hash of a DeiT file stand in its name and are checked; those of DeiT-III carry none.
"""

from modeling_vitreg.conversion.official import run


BASE = "https://dl.fbaipublicfiles.com/deit"
HASHES = {
    "deit_tiny_patch16_224": "a1311bcf",
    "deit_small_patch16_224": "cd65a155",
    "deit_base_patch16_224": "b5f2ef4d",
    "deit_base_patch16_384": "8de9b5d1",
    "deit_tiny_distilled_patch16_224": "b40b3cf7",
    "deit_small_distilled_patch16_224": "649709d9",
    "deit_base_distilled_patch16_224": "df68dfff",
    "deit_base_distilled_patch16_384": "d0272ac0",
}
THIRD = [
    f"{size}_{side}" for size in ("small", "base", "large") for side in ("224_1k", "224_21k", "384_1k", "384_21k")
]
THIRD += ["medium_224_1k", "medium_224_21k", "huge_224_1k", "huge_224_21k_v1"]
FILES = {name: f"{BASE}/{name}-{digest}.pth" for name, digest in HASHES.items()}
FILES |= {f"deit_3_{name}": f"{BASE}/deit_3_{name}.pth" for name in THIRD}


if __name__ == "__main__":
    run(FILES, title="facebookresearch/deit: DeiT, distilled DeiT and DeiT-III, Apache-2.0")
