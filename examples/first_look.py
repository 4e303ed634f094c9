"""First look: train a small model on photographs, save it, load it as remote code, and look at tokens and attention.

    accelerate launch examples/first_look.py

A ViT with 4 registers learns to fill in masked patches (SimMIM) of photographs that scikit-image and scikit-learn
ship, for a minute and a half on 2 CPU cores; nothing is downloaded. The folder it saves is then loaded by a process in
which this package cannot be imported, the way anyone loads it from the Hub. Pictures and model land in `--output`.
"""

import argparse
import pathlib
import subprocess
import sys

import matplotlib
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2
from tqdm import tqdm

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersForMaskedImageModeling


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from skimage import data


SIZE, PATCH, MASKED = 128, 16, 0.5
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet

REMOTE = """
import sys
sys.modules["modeling_vitreg"] = None  # whoever loads from the Hub has only the folder
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

folder, photograph, found = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
image = Image.open(photograph).convert("RGB")
# Twice the size that the model was trained on: 16 x 16 patches.
size = {"size": {"shortest_edge": 256}, "crop_size": {"height": 256, "width": 256}}
pixel_values = processor(image, return_tensors="pt", **size)["pixel_values"]
with torch.no_grad():
    tokens = model(pixel_values)
for name in ("cls_token", "register_tokens", "patch_tokens", "patch_grid"):
    print(f"    tokens.{name:16} {tuple(tokens[name].shape)}")
maps = model.attention_maps(pixel_values, average_heads=True)
torch.save({"image": pixel_values[0], **maps}, found)
"""


def main() -> None:
    options = parse_options()
    accelerator = Accelerator()
    set_seed(options.seed, device_specific=True)
    folder = options.output / "model"

    # Photographs, cut at random: four fifths of each to learn from, the rest to judge by.
    photographs = load_photographs()
    cut = v2.Compose([v2.RandomResizedCrop(SIZE, scale=(0.1, 0.5)), v2.RandomHorizontalFlip()])
    learn = [photo[:, :, : photo.shape[2] * 4 // 5] for photo in photographs]
    judge = [photo[:, :, photo.shape[2] * 4 // 5 :] for photo in photographs]
    held_out = torch.stack([v2.functional.resize(photo, [SIZE, SIZE]) for photo in judge]).to(accelerator.device)
    held_out_mask = draw_mask(len(held_out), device=accelerator.device)

    # The model, and its parameters in two groups: tokens, positions and vectors are not decayed.
    config = ViTWithRegistersConfig.from_preset(
        f"tiny/{PATCH}", num_hidden_layers=6, image_size=SIZE, num_register_tokens=4, layer_scale_init_value=0.1
    )
    model = ViTWithRegistersForMaskedImageModeling(config)
    exempt = model.no_weight_decay() | {name for name, p in model.named_parameters() if p.ndim == 1}
    groups = [
        {"params": [p for name, p in model.named_parameters() if name not in exempt], "weight_decay": 0.05},
        {"params": [p for name, p in model.named_parameters() if name in exempt], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=options.steps)
    model, optimizer = accelerator.prepare(model, optimizer)

    def held_out_error() -> float:
        model.eval()
        with torch.no_grad():
            return model(held_out, bool_masked_pos=held_out_mask).loss.item()

    # Untrained, it predicts the mean colour, zero.
    before = held_out_error()
    bar = tqdm(range(options.steps), disable=not accelerator.is_main_process, unit="step", desc="masked modelling")
    for _ in bar:
        chosen = torch.randint(len(learn), (options.batch_size,)).tolist()
        images = torch.stack([cut(learn[index]) for index in chosen]).to(accelerator.device)
        model.train()
        loss = model(images, bool_masked_pos=draw_mask(len(images), device=images.device)).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    after = held_out_error()

    if not accelerator.is_main_process:
        return
    accelerator.print(f"error of masked pixels on held-out parts: {before:.3f} untrained, {after:.3f} trained")
    trained = accelerator.unwrap_model(model).cpu().eval()
    trained.vitreg.save_pretrained(folder)
    draw_reconstructions(trained, held_out.cpu(), held_out_mask.cpu(), options.output / "reconstruction.png")

    # A new process that has only the folder.
    photograph, found = options.output / "photograph.png", options.output / "attention.pt"
    plt.imsave(photograph, data.astronaut())
    accelerator.print(f"loaded from {folder} by a process without this package:")
    subprocess.run([sys.executable, "-c", REMOTE, str(folder), str(photograph), str(found)], check=True)
    draw_attention(torch.load(found, weights_only=True), options.output / "attention.png")
    accelerator.print(
        f"wrote {folder}, {options.output / 'reconstruction.png'} and {options.output / 'attention.png'}"
    )
    accelerator.print(
        f'next: python -c "from transformers import AutoModel; '
        f"print(AutoModel.from_pretrained('{folder}', trust_remote_code=True))\""
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("outputs/first_look"), help="folder to write"
    )
    parser.add_argument("--steps", type=int, default=250, help="training steps (default 250)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step and process (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same numbers (default 0)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def load_photographs() -> list:
    """Colour photographs as tensors (3, height, width), normalised with ImageNet's statistics."""
    images = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), data.stereo_motorcycle()[0]]
    images += load_sample_images().images
    normalise = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return [normalise(image.copy()).as_subclass(torch.Tensor) for image in images]


def to_colours(image: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation: (3, rows, columns) to (rows, columns, 3) in [0, 1]."""
    return (image.permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)).clamp(0, 1)


def draw_mask(num_images: int, *, device: torch.device) -> torch.Tensor:
    """The same number of patches of each image, at random: (images, patches), true where masked."""
    noise = torch.rand(num_images, (SIZE // PATCH) ** 2, device=device)
    return noise.argsort(dim=1) < MASKED * noise.shape[1]


def draw_reconstructions(model, images: torch.Tensor, mask: torch.Tensor, path: pathlib.Path) -> None:
    """Three rows: photographs, what the model saw of them, and what it made of that."""
    with torch.no_grad():
        predicted = model(images, bool_masked_pos=mask).reconstruction
    grid = mask.unflatten(1, (SIZE // PATCH, SIZE // PATCH))[:, None]
    hidden = grid.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    rows = {"photograph": images, "seen": images.masked_fill(hidden, 0), "filled in": predicted.where(hidden, images)}
    figure, axes = plt.subplots(len(rows), len(images), figsize=(1.7 * len(images), 5.4), squeeze=False)
    for line, (title, row) in zip(axes, rows.items()):
        for axis, image in zip(line, row):
            colours = image.permute(1, 2, 0) * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor(
                [0.485, 0.456, 0.406]
            )
            axis.imshow(colours.clamp(0, 1))
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    figure.suptitle("Held-out parts of photographs, half of the patches masked")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_attention(found: dict, path: pathlib.Path) -> None:
    """The photograph beside the attention of class token and registers, last layer, mean of heads."""
    panels = {"class token": found["cls"][0, 0]}
    panels |= {f"register {number}": part for number, part in enumerate(found["registers"][0, 0])}
    figure, axes = plt.subplots(1, 1 + len(panels), figsize=(2.2 * (1 + len(panels)), 2.8))
    axes[0].imshow(to_colours(found["image"]))
    axes[0].set_title("photograph")
    for axis, (title, panel) in zip(axes[1:], panels.items()):
        picture = axis.imshow(100 * panel, vmin=0)
        axis.set_title(title)
        figure.colorbar(picture, ax=axis, shrink=0.7)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    figure.suptitle("Attention over the patches in the last layer, mean of heads, % of all attention")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
