"""Put outliers into a small trained model, and repair it by every method of `vitreg retrofit`.

    accelerate launch examples/pretrain.py
    python benchmarks/retrofit.py outputs/demo-cpu/model --damage trained --measure --seeds 0 1 2 3 4

Small models have no outliers of their own. Three kinds of damage:

    content   One unit of the MLP of the last layer but one is replaced. It fires on the plain patches of scenes, about
              one in twenty, and adds a vector of ten times the median norm to them.
    place     The same at two places of the grid, whatever the content.
    trained   A short fine-tuning. For each image the patches with the largest norms are rewarded until they have eight
              times the median norm, and all other tokens are held where they were, the class token first of all. As in
              large models few units write them: 16 random units of the MLP of the middle layer learn. Images have 96
              pixels, because images of 48 pixels have too few patches.

The repairs: test-time registers, and the recipes retrofit-append-cpu, retrofit-distill-cpu and retrofit-refine-cpu.
Each line gives, on held-out scenes, the share of outliers and the largest norm at the detection layer before and
after, and the cosine of the class token to the damaged model; and on 64 scenes the cosines of patches and class token
of the damaged and of the repaired model with the model before the damage. `--measure` adds the segmentation probe,
CorLoc of LOST and the share of outliers of the verdict of all models, and prints means and deviations over the seeds.
"""

import argparse
import copy
import json
import pathlib
import statistics
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.analysis.survey import SurveySettings, survey
from modeling_vitreg.evaluation import (
    DiscoverySettings,
    EncodingSettings,
    EvaluationSettings,
    SegmentationSettings,
    evaluate,
)
from modeling_vitreg.features import load_encoder
from modeling_vitreg.images import SCENE_COLUMNS, DataOptions, ImageSource, LabelledData, decode_image, open_images
from modeling_vitreg.retrofit import NothingToRepair, RetrofitError, RetrofitSettings, retrofit
from modeling_vitreg.scenes import FIRST_TEST_SCENE, preset_settings


ROOT = pathlib.Path(__file__).parents[1]
METHODS = ("test-time", "append", "distill", "refine")
# Preset of the scenes, and side of the images (None: that of the model).
DAMAGES = {"content": ("scenes:single", None), "place": ("scenes:single", None), "trained": ("scenes", 96)}
NUM_SCENES, SHARE, TIMES = 256, 0.05, 10.0  # planted: share of plain patches, norm in units of the median
NUM_UNITS, TRAINED_SHARE, TRAINED_TIMES = 16, 0.04, 8.0  # trained: units that learn, share of patches, norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model to damage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--set", action="append", default=[], help="change a value of the recipes")
    parser.add_argument("--damage", choices=list(DAMAGES), default="content", help="how outliers are made")
    parser.add_argument("--damage-steps", type=int, default=100, help="steps of the damage 'trained' (default 100)")
    parser.add_argument("--measure", action="store_true", help="measure segmentation, CorLoc and outliers too")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("outputs/retrofit"))
    options = parser.parse_args()
    original = ViTWithRegistersModel.from_pretrained(options.model).eval()
    side = DAMAGES[options.damage][1]
    if side is not None:
        original.resize_position_embeddings(side)
    images = load_scenes(original, options.damage, range(NUM_SCENES))
    rows = []
    for seed in options.seeds:
        folder = options.output / options.damage / f"seed-{seed}"
        if not (folder / "damaged" / "config.json").exists():
            original.save_pretrained(folder / "original")
            damaged(original, images, seed=seed, options=options).save_pretrained(folder / "damaged")
        for method in options.methods:
            changes = [f"seed={seed}", *options.set]
            line = {"damage": options.damage, "seed": seed, "method": method} | repair(folder, method, changes)
            line |= closeness(original, folder, method, images[:64])
            print(json.dumps(line), flush=True)
        if options.measure:
            names = ("original", "damaged", *options.methods)
            rows.append({name: measure(folder / name, options.damage, seed=seed) for name in names})
            print(json.dumps({"seed": seed} | rows[-1]), flush=True)
    if rows:
        print_means(rows)


def open_scenes(damage: str, side: int, numbers: range, **annotations) -> ImageSource:
    preset = DAMAGES[damage][0]
    settings = preset_settings(preset, side=side)
    return open_images(preset, scenes=numbers, scene_settings=settings, **annotations)


def load_scenes(model: ViTWithRegistersModel, damage: str, numbers: range) -> Tensor:
    """Normalised scenes (N, 3, h, w) of the size of the model."""
    source = open_scenes(damage, model.config.image_size, numbers)
    pictures = [decode_image(source.raw(number)) for number in range(len(source))]
    return load_encoder(model).prepare(pictures)


def damaged(
    original: ViTWithRegistersModel, images: Tensor, *, seed: int, options: argparse.Namespace
) -> ViTWithRegistersModel:
    """A copy with outliers."""
    torch.manual_seed(seed)
    if options.damage == "trained":
        return train_outliers(original, images, seed=seed, num_steps=options.damage_steps)
    return plant_outliers(original, images, has_places=options.damage == "place")


@torch.no_grad()
def plant_outliers(original: ViTWithRegistersModel, images: Tensor, *, has_places: bool) -> ViTWithRegistersModel:
    """A copy with a unit that writes outliers, on plain patches or at two places of the grid."""
    model = copy.deepcopy(original)
    number, first = model.config.num_hidden_layers - 1, model.config.num_prefix_tokens
    layer, seen = model.layers[number - 1], []
    handle = layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, first:]))
    norms = model(images, output_hidden_states=[number]).hidden_states[number][:, first:].norm(dim=-1)
    handle.remove()
    tokens = seen[0].flatten(0, 1)  # [N, P, D] -> [N P, D]
    deviations = F.unfold(images, model.config.patch_shape, stride=model.config.patch_shape).std(dim=1).flatten()
    is_chosen = deviations <= deviations.quantile(SHARE)
    if has_places:
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


def train_outliers(
    original: ViTWithRegistersModel, images: Tensor, *, seed: int, num_steps: int
) -> ViTWithRegistersModel:
    """A copy into which outliers were trained: a few random units of the middle layer learn."""
    student = copy.deepcopy(original).train()
    mlp = student.layers[student.config.num_hidden_layers // 2 - 1].mlp
    chosen = torch.randperm(student.config.intermediate_size, generator=torch.Generator().manual_seed(seed))
    is_learning = torch.zeros(student.config.intermediate_size).scatter(0, chosen[:NUM_UNITS], 1.0)
    trained = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight)
    for parameter, mask in zip(trained, (is_learning[:, None], is_learning, is_learning)):
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=num_steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        batch = images[torch.randint(len(images), (8,), generator=order)]
        with torch.no_grad():
            before = original(batch, output_pre_norm=True).pre_norm
        loss = outlier_loss(student(batch, output_pre_norm=True).pre_norm, before)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student.eval()


def outlier_loss(tokens, before) -> Tensor:
    """Reward of the largest norms, and distance of all other tokens from where they were.

    reward   = mean over the 4 % largest patches of relu(log(8 x median norm before / norm))
    distance = mean over tokens of |token - before|^2 / |before|^2
    loss     = 3 reward + distance of the other patches + 10 distance of class token and registers
    """
    patches, old = tokens.patch_tokens, before.patch_tokens  # [B, P, D]
    norms = patches.norm(dim=-1)
    chosen = norms.topk(max(round(TRAINED_SHARE * norms.shape[1]), 1), dim=1)
    reward = (TRAINED_TIMES * old.norm(dim=-1).median() / chosen.values).log().relu().mean()
    is_other = torch.ones_like(norms).scatter(1, chosen.indices, 0.0)
    moved = (patches - old).square().sum(dim=-1) / old.square().sum(dim=-1)
    prefix, old_prefix = (
        torch.cat([part.cls_token[:, None], part.register_tokens], dim=1) for part in (tokens, before)
    )
    moved_prefix = (prefix - old_prefix).square().sum(dim=-1) / old_prefix.square().sum(dim=-1)
    return 3 * reward + (moved * is_other).sum() / is_other.sum() + 10 * moved_prefix.mean()


def repair(folder: pathlib.Path, method: str, changes: list[str]) -> dict:
    """What `retrofit` measures on held-out scenes, and its verdict."""
    output, damage = folder / method, folder.parent.name
    if not (output / "retrofit.json").exists():
        if method == "test-time":
            side = ViTWithRegistersModel.from_pretrained(folder / "damaged").config.image_size
            source = open_scenes(damage, side, range(200))
            try:
                retrofit(folder / "damaged", output, images=source, settings=RetrofitSettings(force=True))
            except (NothingToRepair, RetrofitError) as error:
                return {"error": str(error)}
        else:
            command = [sys.executable, "examples/retrofit.py", "--init", str((folder / "damaged").resolve())]
            command += ["--output", str(output.resolve()), "--data", DAMAGES[damage][0], "--method", method, "--force"]
            command += ["--recipe", f"retrofit-{method}-cpu", "--workers", "1", "--num-eval-images", "200"]
            command += ["--eval-every", "100000", "--save-every", "100000"]
            command += [f"--set={change}" for change in changes]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
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


def measure(folder: pathlib.Path, damage: str, *, seed: int) -> dict[str, float]:
    """Share of outliers, mean IoU of the segmentation probe, and CorLoc of LOST with centred keys, in percent.

    Heads are trained on 120 scenes, and measured with the rest on 60 others.
    """
    encoder = load_encoder(folder)
    side = ViTWithRegistersModel.from_pretrained(folder).config.image_size
    columns = DataOptions(label_column="label", **SCENE_COLUMNS)
    train, test = (
        open_scenes(damage, side, range(start, start + number), options=columns)
        for start, number in ((0, 120), (FIRST_TEST_SCENE, 60))
    )
    settings = EvaluationSettings(
        encoding=EncodingSettings(image_size=side, has_progress_bar=False),
        segmentation=SegmentationSettings(num_steps=300),
        discovery=DiscoverySettings(is_centered=True, has_progress_bar=False),
        seed=seed,
    )
    data = LabelledData(DAMAGES[damage][0], train, test)
    place = folder.with_name(f"{folder.name}-evaluated")
    found = evaluate(encoder, tasks=["segmentation", "discovery"], data=data, settings=settings, output_folder=place)
    values = {result["metric"]: result["value"] for result in found.results}
    looked_at = SurveySettings(num_images=None, image_size=side, num_ablation_images=0, has_progress_bar=False)
    report, _ = survey(encoder, test.only(), settings=looked_at)
    shares = {"outliers": report.verdict["share"], "mean IoU": values["mean_iou"], "CorLoc": values["corloc"]}
    return {name: round(100 * share, 2) for name, share in shares.items()}


def print_means(rows: list[dict]) -> None:
    """Mean and standard deviation over the seeds, one Markdown row for each model."""
    names = list(rows[0]["original"])
    print("\n| model |", " | ".join(names), "|\n| --- |", " --- |" * len(names))
    for model in rows[0]:
        cells = []
        for name in names:
            values = [row[model][name] for row in rows]
            cells.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f} %")
        print(f"| {model} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
