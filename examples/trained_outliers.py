"""Train outliers into a model, repair it by test-time registers, and measure all three.

    python examples/trained_outliers.py outputs/demo-cpu/model

Small models have no outliers of their own. This program puts them there, not by hand, but by a short fine-tuning: for
each image the patches with the largest norms are rewarded until they have several times the median norm, and all other
tokens are held where they were, the class token first of all. As in large models few units write them: 16 random
units of the MLP of the middle layer learn. Then `vitreg retrofit` repairs the model without knowing anything of this.
One row for each seed:
share of outliers, segmentation probe and CorLoc of the original, the damaged and the repaired model.
"""

import argparse
import copy
import pathlib
import statistics
import tempfile

import torch
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
from modeling_vitreg.images import SCENE_COLUMNS, DataOptions, ImageSource, LabelledData, open_images
from modeling_vitreg.retrofit import RetrofitSettings, retrofit
from modeling_vitreg.scenes import FIRST_TEST_SCENE, preset_settings


NUM_UNITS = 16  # that learn
SHARE = 0.04  # of the patches of an image that become outliers
TARGET = 8.0  # norm of an outlier, in units of the median


def main() -> None:
    options = parse_options()
    original = ViTWithRegistersModel.from_pretrained(options.model).eval()
    data = open_data(options)
    rows = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            places = {name: pathlib.Path(folder) / name for name in ("original", "damaged", "repaired")}
            original.save_pretrained(places["original"])
            damage(original, data["learn"], options, seed=seed).save_pretrained(places["damaged"])
            settings = RetrofitSettings(num_images=options.images // 2, image_size=options.size, force=True)
            report = retrofit(places["damaged"], places["repaired"], images=data["search"], settings=settings)
            print(f"seed {seed}: {report.verdict['sentence']} {report.register_neurons}", flush=True)
            rows.append({name: measure(place, data["tasks"], options, seed=seed) for name, place in places.items()})
            print(f"seed {seed}: {describe(rows[-1])}", flush=True)
    for name in ("original", "damaged", "repaired"):
        for measure_name in rows[0][name]:
            values = [row[name][measure_name] for row in rows]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{name:9} {measure_name:13} {100 * statistics.mean(values):6.2f} +- {100 * deviation:.2f} %")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model without outliers")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    parser.add_argument("--steps", type=int, default=200, help="steps of the fine-tuning (default 200)")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels (default 96)")
    parser.add_argument("--images", type=int, default=300, help="scenes to train heads on, and half as many for each "
                        "other purpose (default 300)")  # fmt: skip
    return parser.parse_args()


def open_data(options: argparse.Namespace) -> dict:
    """Four sets of scenes that share none: to learn on, to find units on, to train heads on, to measure on."""
    scenes, half = preset_settings("scenes", side=options.size), options.images // 2

    def read(start: int, number: int) -> ImageSource:
        columns = DataOptions(label_column="label", **SCENE_COLUMNS)
        numbers = range(start, start + number)
        return open_images("scenes", scenes=numbers, scene_settings=scenes, options=columns)

    train, test = read(0, options.images), read(FIRST_TEST_SCENE, half)
    return {
        "learn": read(100_000, 2 * half),
        "search": read(200_000, half),
        "tasks": LabelledData("scenes", train, test),
    }


def damage(
    original: ViTWithRegistersModel, images: ImageSource, options: argparse.Namespace, *, seed: int
) -> ViTWithRegistersModel:
    """A copy of a model into which outliers were trained: a few random units of the middle layer learn."""
    encoder = load_encoder(original)
    pixels = torch.cat([encoder.prepare([images.read(n)[0]], size=options.size) for n in range(len(images))])
    student = copy.deepcopy(original).train()
    mlp = student.layers[student.config.num_hidden_layers // 2 - 1].mlp
    chosen = torch.randperm(student.config.intermediate_size, generator=torch.Generator().manual_seed(seed))
    is_learning = torch.zeros(student.config.intermediate_size).scatter(0, chosen[:NUM_UNITS], 1.0)
    trained = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight)
    for parameter, mask in zip(trained, (is_learning[:, None], is_learning, is_learning)):
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=options.steps)
    order = torch.Generator().manual_seed(seed)
    for step in range(options.steps):
        batch = pixels[torch.randint(len(pixels), (8,), generator=order)]
        with torch.no_grad():
            before = original(batch, output_pre_norm=True).pre_norm
        loss = loss_of(student(batch, output_pre_norm=True).pre_norm, before)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)
    return student.eval()


def loss_of(tokens, before) -> Tensor:
    """Reward of the largest norms, and distance of all other tokens from where they were.

    reward   = mean over the 4 % largest patches of relu(log(8 x median norm before / norm))
    distance = mean over tokens of |token - before|^2 / |before|^2
    loss     = 3 reward + distance of the other patches + 10 distance of class token and registers
    """
    patches, old = tokens.patch_tokens, before.patch_tokens  # [B, P, D]
    norms = patches.norm(dim=-1)
    chosen = norms.topk(max(round(SHARE * norms.shape[1]), 1), dim=1)
    reward = (TARGET * old.norm(dim=-1).median() / chosen.values).log().relu().mean()
    is_other = torch.ones_like(norms).scatter(1, chosen.indices, 0.0)
    moved = (patches - old).square().sum(dim=-1) / old.square().sum(dim=-1)
    prefix, old_prefix = (
        torch.cat([part.cls_token[:, None], part.register_tokens], dim=1) for part in (tokens, before)
    )
    moved_prefix = (prefix - old_prefix).square().sum(dim=-1) / old_prefix.square().sum(dim=-1)
    return 3 * reward + (moved * is_other).sum() / is_other.sum() + 10 * moved_prefix.mean()


def measure(folder: pathlib.Path, data: LabelledData, options: argparse.Namespace, *, seed: int) -> dict[str, float]:
    """Share of outliers, mean IoU of the segmentation probe, and CorLoc of LOST with centred keys."""
    encoder = load_encoder(folder)
    settings = EvaluationSettings(
        encoding=EncodingSettings(image_size=options.size, has_progress_bar=False),
        segmentation=SegmentationSettings(num_steps=300),
        discovery=DiscoverySettings(is_centered=True, has_progress_bar=False),
        seed=seed,
    )
    tasks = {"data": data, "settings": settings, "output_folder": folder.with_name(f"{folder.name}-evaluated")}
    found = evaluate(encoder, tasks=["segmentation", "discovery"], **tasks).results
    values = {result["metric"]: result["value"] for result in found}
    looked_at = SurveySettings(num_images=None, image_size=options.size, num_ablation_images=0, has_progress_bar=False)
    report, _ = survey(encoder, data.test.only(), settings=looked_at)
    return {"outliers": report.verdict["share"], "mean IoU": values["mean_iou"], "CorLoc": values["corloc"]}


def describe(row: dict) -> str:
    return "; ".join(
        f"{name}: " + ", ".join(f"{measure_name} {100 * value:.2f} %" for measure_name, value in values.items())
        for name, values in row.items()
    )


if __name__ == "__main__":
    main()
