"""Write two folders of real images that need no download, to point `--data` at; needs `pip install -e ".[analysis]"`.

    python examples/real_images.py --output real_images
    accelerate launch examples/pretrain.py --data real_images/digits --output outputs/digits
    accelerate launch examples/pretrain.py --data real_images/photographs --output outputs/photographs

digits: 1,797 handwritten digits of scikit-learn (8 x 8 pixels, enlarged), a quarter of them in `test`.
photographs: windows of twelve photographs that scikit-image and scikit-learn ship; a class is one photograph, `train`
holds windows of its left three quarters, `test` of the right quarter, so that no pixel is in both.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_digits, load_sample_images
from tqdm import tqdm


SIDE = 64  # pixels
WINDOWS = {"train": 150, "test": 40}  # of each photograph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("real_images"), help="folder to write")
    output = parser.parse_args().output
    for folder in (write_digits(output / "digits"), write_photographs(output / "photographs")):
        print(f"wrote {folder}: {len(list(folder.rglob('*.png')))} images")


def write_digits(folder: pathlib.Path) -> pathlib.Path:
    """Class folders 0 ... 9 in `train` and `test`."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        image = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        _save(image, folder / ("test" if number % 4 == 0 else "train") / str(label) / f"{number:04}.png")
    return folder


def write_photographs(folder: pathlib.Path) -> pathlib.Path:
    """Class folders named after the photographs in `train` and `test`."""
    names = ("astronaut", "brick", "cat", "coffee", "grass", "gravel", "hubble_deep_field", "immunohistochemistry")
    photographs = {name: getattr(data, name)() for name in (*names, "retina", "rocket")}
    photographs |= dict(zip(("temple", "flower"), load_sample_images().images))
    random = np.random.default_rng(0)
    for name, pixels in tqdm(photographs.items(), desc="photographs"):
        image = Image.fromarray(pixels).convert("RGB")
        border = image.width * 3 // 4
        for split, (left, right) in {"train": (0, border), "test": (border, image.width)}.items():
            for number in range(WINDOWS[split]):
                side = int(random.uniform(0.5, 1.0) * min(right - left, image.height))
                x, y = int(random.integers(left, right - side + 1)), int(random.integers(0, image.height - side + 1))
                window = image.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                _save(window, folder / split / name / f"{number:03}.png")
    return folder


def _save(image: Image.Image, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


if __name__ == "__main__":
    main()
