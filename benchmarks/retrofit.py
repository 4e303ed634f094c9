"""Plant outliers in a small trained model, and repair it by every method of `vitreg retrofit`.

    accelerate launch examples/pretrain.py
    python benchmarks/retrofit.py outputs/demo-cpu/model --seeds 0 1 2

The damage: one unit of the MLP of the last layer but one is replaced. It fires on the plain patches of scenes,
about one in twenty, or at two places of the grid whatever the content (`--damage place`), and adds a vector of ten
times the median norm to them. The repairs: test-time registers, and the recipes retrofit-append-cpu, retrofit-
distill-cpu and retrofit-refine-cpu. Each line gives, on held-out scenes, the share of outliers and the largest
norm at the detection layer before and after, and the cosine of the class token to the damaged model; and on 64
scenes the cosines of patches and class token of the damaged and of the repaired model with the model before the
damage.
"""

import argparse
import copy
import json
import pathlib
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.features import load_encoder
from modeling_vitreg.images import decode_image, open_images
from modeling_vitreg.retrofit import NothingToRepair, RetrofitError, RetrofitSettings, retrofit
from modeling_vitreg.scenes import preset_settings


ROOT = pathlib.Path(__file__).parents[1]
METHODS = ("test-time", "append", "distill", "refine")
NUM_SCENES, SHARE, TIMES = 256, 0.05, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model to damage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--set", action="append", default=[], help="change a value of the recipes")
    parser.add_argument("--damage", choices=("content", "place"), default="content", help="where outliers are planted")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("outputs/retrofit"))
    options = parser.parse_args()
    original = ViTWithRegistersModel.from_pretrained(options.model).eval()
    images = load_scenes(original, range(NUM_SCENES))
    for seed in options.seeds:
        folder = options.output / options.damage / f"seed-{seed}"
        if not (folder / "damaged" / "config.json").exists():
            damage(original, images, seed=seed, kind=options.damage).save_pretrained(folder / "damaged")
        for method in options.methods:
            changes = [f"seed={seed}", *options.set]
            line = {"damage": options.damage, "seed": seed, "method": method} | repair(folder, method, changes)
            line |= closeness(original, folder, method, images[:64])
            print(json.dumps(line), flush=True)


def load_scenes(model: ViTWithRegistersModel, numbers: range) -> Tensor:
    """Normalised scenes (N, 3, h, w) of the size of the model."""
    settings = preset_settings("scenes:single", side=model.config.image_size)
    source = open_images("scenes:single", scenes=numbers, scene_settings=settings)
    pictures = [decode_image(source.raw(number)) for number in range(len(source))]
    return load_encoder(model).prepare(pictures)


@torch.no_grad()
def damage(original: ViTWithRegistersModel, images: Tensor, *, seed: int, kind: str) -> ViTWithRegistersModel:
    """A copy with a unit that writes outliers, on plain patches or at two places of the grid."""
    torch.manual_seed(seed)
    model = copy.deepcopy(original)
    number, first = model.config.num_hidden_layers - 1, model.config.num_prefix_tokens
    layer, seen = model.layers[number - 1], []
    handle = layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, first:]))
    norms = model(images, output_hidden_states=[number]).hidden_states[number][:, first:].norm(dim=-1)
    handle.remove()
    tokens = seen[0].flatten(0, 1)  # [N, P, D] -> [N P, D]
    deviations = F.unfold(images, model.config.patch_shape, stride=model.config.patch_shape).std(dim=1).flatten()
    is_chosen = deviations <= deviations.quantile(SHARE)
    if kind == "place":
        places = torch.randperm(seen[0].shape[1])[:2]
        is_chosen = torch.isin(torch.arange(len(tokens)) % seen[0].shape[1], places)
    spread = torch.cov(tokens.T) + 0.01 * tokens.var() * torch.eye(tokens.shape[1])
    direction = torch.linalg.solve(spread, tokens[is_chosen].mean(dim=0) - tokens.mean(dim=0))
    scores = tokens @ direction
    low, high = scores.quantile(1 - SHARE), scores.quantile(1 - SHARE / 4)
    gain = 4 / (high - low)
    mlp = layer.mlp
    mlp.fc1.weight[0], mlp.fc1.bias[0] = gain * direction, -gain * low
    written = F.normalize(torch.randn(len(direction)), dim=0)
    mlp.fc2.weight[:, 0] = TIMES * norms.median() / 4 * written
    return model


def repair(folder: pathlib.Path, method: str, changes: list[str]) -> dict:
    """What `retrofit` measures on held-out scenes, and its verdict."""
    output = folder / method
    if not (output / "retrofit.json").exists():
        if method == "test-time":
            side = ViTWithRegistersModel.from_pretrained(folder / "damaged").config.image_size
            settings = preset_settings("scenes:single", side=side)
            source = open_images("scenes:single", scenes=range(200), scene_settings=settings)
            try:
                retrofit(folder / "damaged", output, images=source, settings=RetrofitSettings(force=True))
            except (NothingToRepair, RetrofitError) as error:
                return {"error": str(error)}
        else:
            command = [sys.executable, "examples/retrofit.py", "--init", str((folder / "damaged").resolve())]
            command += ["--output", str(output.resolve()), "--data", "scenes:single", "--method", method, "--force"]
            command += ["--recipe", f"retrofit-{method}-cpu", "--workers", "1", "--num-eval-images", "200"]
            command += ["--eval-every", "100000", "--save-every", "100000"]
            command += [f"--set={change}" for change in changes]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report = json.loads((output / "retrofit.json").read_text())
    names = ("share_before", "share", "largest_norm_before", "largest_norm", "cosine")
    return {name: round(report["result"][name], 4) for name in names} | {"repaired": report["verdict"]["is_repaired"]}


@torch.no_grad()
def closeness(original: ViTWithRegistersModel, folder: pathlib.Path, method: str, images: Tensor) -> dict:
    """Mean cosine of patches and class tokens with those before the damage."""
    found = {}
    for name, place in (("damaged", folder / "damaged"), ("repaired", folder / method)):
        if (place / "config.json").exists():
            output, wanted = ViTWithRegistersModel.from_pretrained(place).eval()(images), original(images)
            for kind in ("patch_tokens", "cls_token"):
                cosine = F.cosine_similarity(output[kind], wanted[kind], dim=-1).mean().item()
                found[f"{name}_{kind}"] = round(cosine, 4)
    return found


if __name__ == "__main__":
    main()
