"""Make the pictures of README.md and of docs/, or those that are named.

The demo models come first; most pictures are what the first command of their page writes, in at most 256 colours. The
start of a page (.html) is drawn by chromium.

    accelerate launch examples/pretrain.py
    accelerate launch examples/pretrain.py --registers 0 --output outputs/without
    python docs/pictures.py
"""

import argparse
import copy
import pathlib
import shutil
import subprocess
import tempfile

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.features import load_encoder
from modeling_vitreg.images import ImageSource, decode_image, open_images
from modeling_vitreg.look import draw_looks, look
from modeling_vitreg.retrofit import RetrofitSettings, retrofit
from modeling_vitreg.scenes import FIRST_TEST_SCENE, preset_settings


DOCS = pathlib.Path(__file__).parent
BEFORE_AFTER = "before-after.png"
WRITTEN = {  # picture: command of its page, and what the command writes
    "use/look.png": ("vitreg look docs/use/scene.jpg --model outputs/demo-cpu/model", "look.png"),
    "use/analyze.png": ("vitreg analyze outputs/demo-cpu/model", "artifacts/index.html"),
    "use/discover.png": (
        "vitreg discover outputs/demo-cpu/model --set discovery.is_centered=true",
        "discovery/boxes.png",
    ),
    "use/compare.png": (
        "vitreg compare outputs/demo-cpu/model outputs/demo-cpu/model@merge=1",
        "comparison/comparison.png",
    ),
    "train/finetune.png": (
        "accelerate launch examples/finetune.py --init outputs/demo-cpu",
        "outputs/finetune-cpu/curves.png",
    ),
}
MOST_COLOURS, WIDTH, HEIGHT = 256, 1250, 800  # of a picture, and of the start of a page in pixels
SIDE = 112  # pixels of the model with outliers: 14 rows of patches, which `vitreg look` leaves as they are
SHARE, TIMES = 0.03, 10.0  # of the planted unit: share of patches that it fires on, norm in units of the median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join([BEFORE_AFTER, *WRITTEN])}")
    for name in parser.parse_args().names or [BEFORE_AFTER, *WRITTEN]:
        if name == BEFORE_AFTER:
            draw_before_after(DOCS / name)
        else:
            copy_picture(*WRITTEN[name], DOCS / name)
        print(f"wrote {DOCS / name}")


def copy_picture(command: str, written: str, path: pathlib.Path) -> None:
    """Run a command in the root of the repository, and keep the picture or the start of the page that it writes."""
    subprocess.run(command, shell=True, cwd=DOCS.parent, check=True)
    source = DOCS.parent / written
    if source.suffix == ".html":
        shot = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
        subprocess.run([shutil.which("chromium"), *shot, f"--screenshot={path}", source.as_uri()], check=True)
        source = path
    with Image.open(source) as picture:
        picture.convert("RGB").quantize(MOST_COLOURS).save(path, optimize=True)


def draw_before_after(path: pathlib.Path) -> None:
    """A model with planted outliers before and after `vitreg retrofit`, on the scene with most outliers of 24."""
    original = ViTWithRegistersModel.from_pretrained("outputs/without/model").eval()
    original.resize_position_embeddings(SIDE)
    images = load_encoder(original).prepare(read_images(open_scenes(range(128))))
    with tempfile.TemporaryDirectory() as folder:
        before, after = (pathlib.Path(folder) / name for name in ("before", "after"))
        plant_outliers(original, images).save_pretrained(before)
        report = retrofit(before, after, images=open_scenes(range(200)), settings=RetrofitSettings(num_images=200))
        encoders = [load_encoder(place) for place in (before, after)]
        scenes = read_images(open_scenes(range(FIRST_TEST_SCENE, FIRST_TEST_SCENE + 24)))
        scene = max(scenes, key=lambda scene: look(encoders[0], scene).report.verdict["share"])
        looks = [look(each, scene, name=name) for each, name in zip(encoders, ("before", "after: a register added"))]
    print(*(each.sentence for each in looks), report.verdict["sentence"], sep="\n")
    draw_looks(looks, path)


def open_scenes(numbers: range) -> ImageSource:
    return open_images("scenes", scenes=numbers, scene_settings=preset_settings("scenes", side=SIDE))


def read_images(source: ImageSource) -> list[Image.Image]:
    return [decode_image(source.raw(number)) for number in range(len(source))]


@torch.no_grad()
def plant_outliers(original: ViTWithRegistersModel, images: Tensor) -> ViTWithRegistersModel:
    """A copy in which one unit of the MLP of the last layer but one writes outliers, as the units of large models do.

    It fires on a few patches of most images and never on the class token: of all directions, scores along this one
    vary most inside of an image, compared with their variance between images and with the distance of class tokens.
    It writes what one head of the class token attends to in the last layer.
    """
    model = copy.deepcopy(original)
    config, (*_, layer, last), inputs = model.config, model.layers, []
    handle = layer.mlp.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    number = config.num_hidden_layers - 1
    tokens = model(images, output_hidden_states=[number]).hidden_states[number]  # [B, N, D]
    handle.remove()

    patches = inputs[0][:, config.num_prefix_tokens :]  # [B, P, D]
    means = patches.mean(dim=1)
    class_tokens = inputs[0][:, 0] - means
    inside = torch.cov((patches - means[:, None]).flatten(0, 1).T)
    floor = 0.02 * inside.diagonal().mean() * torch.eye(config.hidden_size)
    root = torch.linalg.cholesky(
        torch.cov(means.T) + 10 * class_tokens.T @ class_tokens / len(images) + floor
    ).inverse()
    read = root.T @ torch.linalg.eigh(root @ inside @ root.T).eigenvectors[:, -1]
    read *= ((patches - means[:, None]) @ read).pow(3).mean().sign()  # few patches lie far on this side
    low, high = (patches @ read).quantile(torch.tensor([1 - SHARE, 1 - SHARE / 4]))

    queries, keys, _ = last.attention.qkv.weight.chunk(3)
    query = F.linear(last.norm1(tokens[:, 0]), queries, last.attention.qkv.bias.chunk(3)[0]).mean(dim=0)
    heads = (config.num_attention_heads, -1)
    pulls = torch.einsum("hd,hde->he", query.unflatten(0, heads), (keys * last.norm1.weight).unflatten(0, heads))
    pulls -= pulls.mean(dim=1, keepdim=True)  # layer norm takes the mean away
    written = F.normalize(pulls[pulls.norm(dim=1).argmax()], dim=0)

    median = tokens[:, config.num_prefix_tokens :].norm(dim=-1).median()
    layer.mlp.fc1.weight[0], layer.mlp.fc1.bias[0] = 4 * read / (high - low), -4 * low / (high - low)
    layer.mlp.fc2.weight[:, 0] = TIMES * median / 4 * written
    return model


if __name__ == "__main__":
    main()
