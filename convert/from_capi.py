"""facebookresearch/capi: ViT-L with 16 registers, Apache-2.0.

    python convert/from_capi.py capi_vitl14_lvd capi-large --code CLONE

No library has this family: the verification needs a clone of its repository, with its requirements.
"""

from modeling_vitreg.conversion.official import run


BASE = "https://dl.fbaipublicfiles.com/capi"
FILES = {
    f"capi_vitl14_{name}": f"{BASE}/capi_vitl14_{file}.pth"
    for name, file in {"lvd": "lvd", "p205": "p205", "in22k": "i22k", "in1k": "in1k"}.items()
}


if __name__ == "__main__":
    run(FILES, title="facebookresearch/capi: ViT-L with 16 registers, Apache-2.0")
