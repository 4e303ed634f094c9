"""OpenAI's CLIP: image towers with their projections, MIT.

    python convert/from_clip.py ViT-B-16 clip-base

The files are archives of TorchScript, read without running their code; the address of each carries its hash.
"""

from modeling_vitreg.conversion.layouts.clip import HASHES
from modeling_vitreg.conversion.official import run


BASE = "https://openaipublic.azureedge.net/clip/models"
FILES = {name.removesuffix(".pt"): f"{BASE}/{digest}/{name}#sha256={digest}" for name, digest in HASHES.items()}


if __name__ == "__main__":
    run(FILES, title="OpenAI's CLIP: image towers with their projections, MIT")
