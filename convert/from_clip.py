"""OpenAI's CLIP: image towers with their projections, MIT.

    python convert/from_clip.py ViT-B-16 clip-base

The files are archives of TorchScript, read without running their code; the address of each carries its hash.
"""

from modeling_vitreg.conversion.official import run


BASE = "https://openaipublic.azureedge.net/clip/models"
HASHES = {
    "ViT-B-32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L-14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L-14-336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
FILES = {name: f"{BASE}/{digest}/{name}.pt#sha256={digest}" for name, digest in HASHES.items()}


if __name__ == "__main__":
    run(FILES, title="OpenAI's CLIP: image towers with their projections, MIT")
