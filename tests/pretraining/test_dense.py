"""Training on maps: cuts that keep image and map together, losses beside the models' own, metrics, and the program."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training_program
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_remote_code import run_without_the_package
from torchmetrics.classification import MulticlassJaccardIndex
from training_program import losses_of

from modeling_vitreg import (
    ViTWithRegistersForDepthEstimation,
    ViTWithRegistersForSemanticSegmentation,
    ViTWithRegistersModel,
)
from modeling_vitreg.cards import make_plan
from modeling_vitreg.pretraining.build import make_objective
from modeling_vitreg.pretraining.monitoring.pictures import draw_maps
from modeling_vitreg.pretraining.objectives.dense import (
    DepthEstimation,
    DepthSettings,
    Segmentation,
    SegmentationSettings,
)
from modeling_vitreg.pretraining.run.recipe import Recipe
from modeling_vitreg.pretraining.views.crops import CropSettings, MultiCrop
from modeling_vitreg.scenes import SEMANTIC_NAMES


ONE_VIEW = CropSettings(num_global=1, num_local=0, global_size=32, color_augmentation="none")
CUTS = {
    "resized": {"global_scale": (0.3, 0.9)},
    "simple": {"cut": "simple"},
    "zoomed": {"cut": "zoomed", "zoom": (0.5, 2.0)},
}


@pytest.fixture
def make(tiny):
    def build(kind: str, *, model: dict | None = None, **settings) -> Segmentation | DepthEstimation:
        backbone = ViTWithRegistersModel(tiny(initializer_range=0.2, num_hidden_layers=4, **(model or {})))
        options = {"crops": ONE_VIEW, "num_steps": 10}
        if kind == "depth":
            return DepthEstimation(backbone, settings=DepthSettings(**settings), **options).train()
        settings = SegmentationSettings(**{"num_classes": 5, **settings})
        return Segmentation(backbone, settings=settings, **options).train()

    return build


def make_batch(num_images: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, num_images, 32, 32)
    masks = torch.randint(5, shape, generator=generator, dtype=torch.int32)
    masks[..., :3, :] = 255
    depths = torch.rand(shape, generator=generator) * 12  # the largest do not count
    depths[..., :3, :] = 0
    images = torch.randn(1, num_images, 3, 32, 32, generator=generator)
    return {"global_views": images, "semantic_masks": masks, "depths": depths}


@pytest.mark.parametrize("cut", CUTS)
def test_a_map_is_cut_where_its_image_is(cut):
    # Blocks of 16 pixels: class and depth are the red of the image, so that cut maps can be read off the cut image.
    classes = torch.randint(1, 5, (6, 8)).repeat_interleave(16, dim=0).repeat_interleave(16, dim=1).numpy()
    image = Image.fromarray(np.stack([classes * 50, classes * 0, classes * 0], axis=-1).astype(np.uint8))
    crop = MultiCrop(dataclasses.replace(ONE_VIEW, global_size=64, flip=0.5, **CUTS[cut]))
    num_padded = 0
    for _ in range(20):
        found = crop(image, mask=classes.astype(np.int32), depth=classes.astype(np.float32) / 4)
        view, masks, depths = found["global_views"], found["semantic_masks"], found["depths"]
        assert view.shape == (1, 3, 64, 64) and masks.shape == depths.shape == (1, 64, 64)
        assert (view.dtype, masks.dtype, depths.dtype) == (torch.uint8, torch.int32, torch.float32)
        is_inside = masks != 255
        assert torch.equal(depths[is_inside], masks[is_inside] / 4) and (depths[~is_inside] == 0).all()
        red = torch.where(is_inside, view[:, 0].float() / 50, 0)
        # Bicubic interpolation mixes colours where two blocks meet, and nowhere else.
        is_near = (red - torch.where(is_inside, masks, 0)).abs() < 0.1
        assert is_near.float().mean() > 0.75, cut
        num_padded += int((~is_inside).any())
    assert (num_padded > 0) == (cut == "zoomed")


def test_the_loss_of_segmentation_is_that_of_the_model(make):
    objective, batch = make("segment", num_layers=2), make_batch()
    loss = objective(batch, step=0)["total"]
    expected = objective.model(batch["global_views"][0], labels=batch["semantic_masks"][0].long()).loss
    torch.testing.assert_close(loss, expected)
    assert objective.saved.config.out_indices == [3, 4] and objective.saved.config.id2label[4] == "class 4"


@pytest.mark.parametrize("kind", ["segment", "depth"])
def test_a_batch_without_a_pixel_that_counts_has_no_loss_and_no_gradient(make, kind):
    objective, batch = make(kind), make_batch()
    batch["semantic_masks"].fill_(255)
    batch["depths"].fill_(0)
    loss = objective(batch, step=0)["total"]
    loss.backward()
    assert 0 <= loss < 1e-5 and all(not p.grad.any() for p in objective.parameters() if p.grad is not None)


def test_the_loss_of_depth_is_that_of_the_model(make):
    objective, batch = make("depth", num_layers=2, max_depth=8.0), make_batch()
    loss = objective(batch, step=0)["total"]
    torch.testing.assert_close(loss, objective.model(batch["global_views"][0], labels=batch["depths"][0]).loss)
    config = objective.saved.config
    assert (config.out_indices, config.max_depth) == ([2, 4], 8.0)


@pytest.mark.parametrize("kind", ["segment", "depth"])
def test_everything_that_the_head_reads_gets_a_gradient(make, kind):
    # What learns without a gradient stops distributed training.
    objective = make(kind, model={"num_register_tokens": 3})
    objective(make_batch(), step=0)["total"].backward()
    missing = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    names = [name for part in objective.trained.values() for name, p in part.named_parameters() if p.requires_grad]
    assert len(names) == sum(p.requires_grad for p in objective.parameters())


def test_mean_iou_is_that_of_torchmetrics(make):
    objective, batch = make("segment").eval(), make_batch(8)
    images, masks = batch["global_views"][0], batch["semantic_masks"][0]
    with torch.no_grad():
        logits = F.interpolate(objective.model(images).logits, size=(32, 32), mode="bilinear", align_corners=False)
    found = objective.train().evaluate(objective.saved, images, {"semantic_masks": masks})
    predicted = logits.argmax(dim=1)
    assert torch.equal(objective.predict(objective.saved, images, batch_size=3), predicted) and objective.training
    theirs = MulticlassJaccardIndex(5, ignore_index=255)(predicted, masks)
    assert found["mean_iou"] == pytest.approx(theirs.item(), rel=1e-5)
    is_known = masks != 255
    assert found["pixel_accuracy"] == pytest.approx((predicted == masks)[is_known].float().mean().item(), rel=1e-5)
    assert objective.evaluate(objective.saved, images, {"labels": torch.zeros(8)}) == {}


def test_errors_of_depth_are_those_of_the_formulas(make):
    objective, batch = make("depth"), make_batch(3)
    images, depths = batch["global_views"][0], batch["depths"][0]
    found, predicted = (
        objective.evaluate(objective.saved, images, {"depths": depths}),
        objective.predict(objective.saved, images),
    )
    pairs = []
    for own, true in zip(predicted, depths):
        is_known = (true > 1e-3) & (true < 10)
        pairs.append((own[is_known], true[is_known]))
    rmse = [(own - true).square().mean().sqrt().item() for own, true in pairs]
    assert found["rmse"] == pytest.approx(sum(rmse) / 3, rel=1e-5)
    assert found["abs_rel"] == pytest.approx(sum(((o - t).abs() / t).mean().item() for o, t in pairs) / 3, rel=1e-5)


@pytest.mark.parametrize("kind", ["segment", "depth"])
def test_a_probe_leaves_the_backbone_as_it_is_and_lora_is_merged(make, kind, tmp_path):
    probe = make(kind, freeze_backbone=True)
    probe(make_batch(), step=0)["total"].backward()
    assert not any(p.requires_grad for p in probe.encoder.parameters()) and not probe.encoder.training
    objective, images = make(kind, lora_rank=2), make_batch()["global_views"][0]
    for name, parameter in objective.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    before = objective.predict(objective.saved, images)
    objective.write(objective.saved, tmp_path)
    loaded = make(kind)
    loaded.model = type(objective.model).from_pretrained(tmp_path)
    after = loaded.predict(loaded.saved, images)
    assert torch.allclose(after.float(), before.float(), atol=1e-4) and objective.predict(
        objective.saved, images
    ).equal(before)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("segment", {"num_classes": 0}, "expected class_names or num_classes, 2 to 255"),
        ("segment", {"class_names": ("a", "b")}, "got 2 names and num_classes 5"),
        ("segment", {"num_classes": 300}, "2 to 255 of them"),
        ("segment", {"num_layers": 9}, r"num_layers in 1 \.\.\. 4, got 9"),
        ("depth", {"min_depth": 3.0, "max_depth": 2.0}, "min_depth < max_depth"),
        ("depth", {"lora_rank": 2, "freeze_backbone": True}, "expected lora_rank 0 with freeze_backbone, got 2"),
        ("depth", {"model": {"has_mask_token": True}}, "set has_mask_token=False"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **settings)


def test_a_class_that_does_not_exist_is_refused_before_it_reaches_the_device(make):
    batch = make_batch()
    batch["semantic_masks"][0, 1, 5, 5] = 5
    with pytest.raises(ValueError, match=r"expected classes 0 \.\.\. 4 in a mask, or 255 .*, got 5"):
        make("segment").to_device(batch, device=torch.device("cpu"), mean=[0.5] * 3, std=[0.5] * 3)


def test_a_head_starts_from_a_model_of_another_objective(tiny, tmp_path):
    backbone = ViTWithRegistersModel(tiny(has_mask_token=True, initializer_range=0.3))
    backbone.save_pretrained(tmp_path / "model")
    for name, kind, settings in (
        ("segment", ViTWithRegistersForSemanticSegmentation, {"num_classes": 3}),
        ("depth", ViTWithRegistersForDepthEstimation, {}),
    ):
        recipe = Recipe(objective=name, model={"preset": "tiny/8"}, crops=ONE_VIEW, settings=settings)
        objective = make_objective(recipe, init=tmp_path / "model")
        assert isinstance(objective.saved, kind) and objective.encoder.embeddings.mask_token is None
        assert torch.equal(objective.encoder.layers[0].mlp.fc1.weight, backbone.layers[0].mlp.fc1.weight)


def test_pictures_of_maps_leave_out_what_nobody_knows(tmp_path):
    batch = make_batch(2)
    pixels = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    images, masks = batch["global_views"][0], batch["semantic_masks"][0]
    whites = []
    for number, truth in enumerate((torch.zeros_like(masks), masks, torch.full_like(masks, 255))):
        path = draw_maps(images, truth, masks.clamp(max=4), tmp_path / f"{number}.png", num_classes=5, **pixels)
        whites.append((np.asarray(Image.open(path).convert("RGB")) == 255).all(axis=-1).sum())
    known, partly, unknown = whites
    assert partly - known == pytest.approx((unknown - known) * 3 / 32, rel=0.1) and unknown > known
    draw_maps(images, batch["depths"][0], batch["depths"][0] + 1, tmp_path / "depths.png", **pixels)
    with pytest.raises(ValueError, match=r"expected maps \(2, 32, 32\), got \(1, 32, 32\)"):
        draw_maps(images, masks[:1], masks, tmp_path / "no.png", num_classes=5, **pixels)


# The program ---------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
RECIPE = {
    "model": SIZES,
    "crops": {"global_size": 32, "num_global": 1, "num_local": 0, "cut": "simple", "color_augmentation": "none"},
    "num_steps": 8,
    "batch_size": 8,
}
AUTO = {"segment": "AutoModelForSemanticSegmentation", "depth": "AutoModelForDepthEstimation"}
USUAL = ("--num-scenes", "48", "--num-eval-images", "40")
# The machinery is the same for both.
KINDS = ["segment", pytest.param("depth", marks=pytest.mark.slow)]
SLOW_FOR_DEPTH = pytest.mark.parametrize("folder", KINDS, indirect=True)


@pytest.fixture(scope="module", params=["segment", "depth"])
def folder(request, tmp_path_factory):
    """With the recipe of one objective."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**RECIPE, "objective": request.param}))
    return folder


def run(folder, *options, **settings) -> str:
    return training_program.run("finetune.py", folder, *USUAL, *options, **settings)


def start(folder, *options, **settings) -> training_program.Program:
    return training_program.start("finetune.py", folder, *USUAL, *options, **settings)


@pytest.fixture(scope="module")
def whole(folder) -> str:
    return run(folder, output="whole", draws=True)


def test_a_run_ends_with_its_metric_a_picture_and_a_model_that_loads_without_the_package(folder, whole):
    kind = yaml.safe_load((folder / "tiny.yaml").read_text())["objective"]
    assert {"segment": "mean IoU on", "depth": "RMSE of depth on"}[kind] in whole and "k-NN" not in whole
    assert (folder / "whole" / "maps.png").stat().st_size > 5000
    done = run_without_the_package(
        f"""
        import torch, transformers
        model = transformers.{AUTO[kind]}.from_pretrained("whole/model", trust_remote_code=True)
        print(*next(iter(model(torch.zeros(1, 3, 32, 32)).values())).shape)
        """,
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == {"segment": f"1 {len(SEMANTIC_NAMES)} 4 4", "depth": "1 32 32"}[kind]


def test_the_card_of_a_run_has_its_metric_and_its_picture(folder, whole):
    kind = yaml.safe_load((folder / "tiny.yaml").read_text())["objective"]
    plan = make_plan(folder / "whole", "me/dense", licence="apache-2.0")
    words = {
        "segment": ("image-segmentation", "mean IoU after"),
        "depth": ("depth-estimation", "RMSE of depth"),
    }
    assert all(word in plan.card for word in (*words[kind], "training/maps.png"))


@SLOW_FOR_DEPTH
def test_a_killed_run_goes_on_with_the_same_bits(folder, whole):
    training_program.assert_a_killed_run_goes_on("finetune.py", folder, *USUAL, num_steps=RECIPE["num_steps"])


@SLOW_FOR_DEPTH
def test_two_processes_follow_one(folder, whole):
    run(folder, output="two", processes=2)
    ours, theirs = (torch.tensor(losses_of(folder / name)) for name in ("two", "whole"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours, theirs = (load_file(folder / name / "model" / "model.safetensors") for name in ("two", "whole"))
    for name in theirs:  # running means and variances too
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3, msg=name)


@SLOW_FOR_DEPTH
def test_two_processes_that_share_the_parameters_follow_one(folder, whole):
    run(folder, "--shard", output="sharded", processes=2)
    ours, theirs = (torch.tensor(losses_of(folder / name)) for name in ("sharded", "whole"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours, theirs = (json.loads((folder / name / "training.json").read_text()) for name in ("sharded", "whole"))
    for name in {"mean_iou", "rmse"} & theirs.keys():  # of the model that was gathered
        assert ours[name] == pytest.approx(theirs[name], abs=2e-3)


@pytest.mark.parametrize("folder", ["segment"], indirect=True)
def test_masks_with_more_classes_than_the_recipe_names_are_refused_in_words(folder):
    process = start(folder, "--set", "settings.num_classes=3", output="few")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "expected classes 0 ... 2 in a mask" in err and "Traceback" not in err


@SLOW_FOR_DEPTH
def test_maps_of_a_dataset_on_the_disk_are_named_by_their_columns(folder, whole):
    import datasets

    kind = yaml.safe_load((folder / "tiny.yaml").read_text())["objective"]
    random = np.random.default_rng(0)
    maps = {
        "segment": random.integers(0, 4, (24, 30, 40), np.uint8),
        "depth": random.integers(500, 9000, (24, 30, 40)),
    }
    stored = [Image.fromarray(values.astype(np.int32 if kind == "depth" else np.uint8)) for values in maps[kind]]
    photos = [Image.fromarray(pixels) for pixels in random.integers(0, 255, (24, 30, 40, 3), np.uint8)]
    features = datasets.Features({"photo": datasets.Image(), "truth": datasets.Image()})
    datasets.Dataset.from_dict({"photo": photos, "truth": stored}, features=features).save_to_disk(folder / "saved")
    options = {
        "segment": ["--columns", "mask=truth", "--set", "data.reduce_labels=true", "--set", "settings.num_classes=3"],
        "depth": ["--columns", "depth=truth", "--set", "data.depth_scale=0.001"],
    }
    told = run(folder, "--data", "saved", *options[kind], output="saved-run")
    assert "held-out images of the training data" in told
    process = start(folder, "--data", "saved", *options[kind][2:], output="refused")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "there is no column" in err and "'truth'" in err and "Traceback" not in err
