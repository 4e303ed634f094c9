"""Classification: losses beside timm's and plain loops, LAMB beside timm's, and the program as its users run it."""

import collections
import json
import pathlib

import numpy as np
import pytest
import timm.data.mixup
import timm.loss
import timm.optim
import timm.utils
import torch
import training_program
import yaml
from colored_views import ColoredCrop
from PIL import Image, ImageFilter, ImageOps
from small_training import fit
from test_remote_code import run_without_the_package
from torchvision.transforms import v2
from training_program import losses_of

from modeling_vitreg import (
    HATNetConfig,
    HATNetModel,
    MambaRConfig,
    MambaRModel,
    ViTWithRegistersForImageClassification,
    ViTWithRegistersModel,
)
from modeling_vitreg.pretraining.build import make_objective
from modeling_vitreg.pretraining.objectives.classify import (
    Classification,
    ClassificationSettings,
    classification_loss,
    distillation_loss,
)
from modeling_vitreg.pretraining.run.lamb import Lamb
from modeling_vitreg.pretraining.run.recipe import Recipe
from modeling_vitreg.pretraining.views.crops import CropSettings
from modeling_vitreg.scenes import SceneSettings, render_scene


ONE = {"num_global": 1, "num_local": 0}
ROOT = pathlib.Path(__file__).parents[2]
PLAIN = {"class_names": ("cat", "dog", "bird"), "mixup": 0.0, "cutmix": 0.0}
ONE_VIEW = CropSettings(num_global=1, num_local=0, global_size=32)


@pytest.fixture
def make(tiny):
    def build(network=None, model=None, backbone=None, **settings) -> Classification:
        return Classification(
            backbone or ViTWithRegistersModel(tiny(initializer_range=0.2, **(model or {}))),
            settings=ClassificationSettings(**{**PLAIN, **settings}),
            crops=ONE_VIEW,
            teacher=network,
            num_steps=10,
        ).train()

    return build


def make_batch(num_images: int = 6) -> dict:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (num_images,), generator=generator)
    return {"global_views": torch.randn(1, num_images, 3, 32, 32, generator=generator), "labels": labels}


def test_the_softmax_loss_is_that_of_timm():
    logits, labels = torch.randn(7, 5), torch.randint(5, (7,))
    targets = torch.nn.functional.one_hot(labels, 5).float()
    ours = classification_loss(logits, targets, settings=ClassificationSettings(smoothing=0.1))
    torch.testing.assert_close(ours, timm.loss.LabelSmoothingCrossEntropy(0.1)(logits, labels))
    mixed = torch.rand(7, 5).softmax(dim=1)
    ours = classification_loss(logits, mixed, settings=ClassificationSettings(smoothing=0.0))
    torch.testing.assert_close(ours, timm.loss.SoftTargetCrossEntropy()(logits, mixed))


def test_the_binary_loss_is_that_of_timm():
    logits, mixed = torch.randn(7, 5), torch.rand(7, 5) * (torch.rand(7, 5) < 0.4)
    ours = classification_loss(logits, mixed, settings=ClassificationSettings(loss="binary", smoothing=0.0))
    theirs = timm.loss.BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)(logits, mixed)
    torch.testing.assert_close(ours, theirs)


def test_distillation_equals_the_plain_loop_over_images_and_classes():
    logits, taught = torch.randn(4, 3), torch.randn(4, 3)
    hard = ClassificationSettings(distillation="hard", teacher="x")
    expected = sum(-logits[i].log_softmax(0)[taught[i].argmax()] for i in range(4)) / 4
    torch.testing.assert_close(distillation_loss(logits, taught, settings=hard), expected)
    soft = ClassificationSettings(distillation="soft", teacher="x", temperature=2.0)
    total = 0.0
    for image in range(4):
        p, q = (taught[image] / 2).softmax(0), (logits[image] / 2).softmax(0)
        total += sum(p[c] * (p[c].log() - q[c].log()) for c in range(3))
    torch.testing.assert_close(distillation_loss(logits, taught, settings=soft), 4 * total / 4)


def test_lamb_is_that_of_timm_for_many_steps():
    torch.manual_seed(0)
    ours = [
        torch.nn.Parameter(torch.randn(4, 3)),
        torch.nn.Parameter(torch.randn(3)),
        torch.nn.Parameter(torch.zeros(2)),
    ]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    groups = [[0, 2], [1]]
    decays = [0.05, 0.0]
    own = Lamb([{"params": [ours[i] for i in g], "weight_decay": d} for g, d in zip(groups, decays)], lr=0.01)
    other = timm.optim.Lamb(
        [{"params": [theirs[i] for i in g], "weight_decay": d} for g, d in zip(groups, decays)],
        lr=0.01,
        max_grad_norm=None,
    )
    for _ in range(20):
        for left, right in zip(ours, theirs):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        own.step()
        other.step()
    for left, right in zip(ours, theirs):
        torch.testing.assert_close(left, right)


def test_labels_are_mixed_as_images_are(make):
    objective = make(mixup=0.8, cutmix=1.0)
    batch, seen = make_batch(), {}
    objective.model.register_forward_pre_hook(lambda module, inputs: seen.update(images=inputs[0]))
    torch.manual_seed(5)
    loss = objective(batch, step=0)["total"]
    torch.manual_seed(5)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=3), v2.CutMix(alpha=1.0, num_classes=3)])
    images, targets = mix(batch["global_views"][0], batch["labels"])
    assert torch.equal(seen["images"], images)
    expected = classification_loss(objective.model(images).logits, targets, settings=objective.settings)
    torch.testing.assert_close(loss, expected)


def test_a_probe_leaves_the_backbone_as_it_is(make):
    objective = make(freeze_backbone=True, model={"drop_path_rate": 0.5})
    assert not objective.model.vitreg.training and objective.model.classifier.training
    objective(make_batch(), step=0)["total"].backward()
    learned = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    assert learned == {"model.classifier.weight", "model.classifier.bias"}


def make_mamba() -> MambaRModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_register_tokens": 3, "image_size": 32, "patch_size": 8}
    return MambaRModel(MambaRConfig(**sizes))


def make_hat() -> HATNetModel:
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "head_size": 8, "expansions": [1, 1, 1, 1]}
    sizes["pool_sizes"] = [2, 2, 1, 1]  # with one square a query has no choice, and no gradient
    return HATNetModel(HATNetConfig(**sizes, image_size=32, initializer_range=0.3))


@pytest.mark.parametrize(
    "backbone, layers",
    [
        (lambda: None, {"qkv", "proj"}),
        (make_mamba, {"in_proj", "out_proj"}),
        (make_hat, {"qkv", "query", "key_value", "proj"}),
    ],
    ids=["vit", "mamba", "hat"],
)
def test_lora_learns_beside_the_weights_and_is_saved_within_them(backbone, layers, make, tmp_path):
    objective = make(backbone=backbone(), lora_rank=2)
    before = {name: parameter.clone() for name, parameter in objective.named_parameters()}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=1.0)
    for step in range(3):
        objective(make_batch(), step=step)["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, parameter in objective.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all("lora" in name or "classifier" in name or "register_tokens" in name for name in moved)
    assert {name.split(".")[-4] for name in moved if "lora_B" in name} == layers
    objective.write(objective.saved, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = objective.eval().model(images).logits
        loaded = type(objective.model).from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(images).logits, expected, rtol=1e-4, atol=1e-5)
    assert any("lora" in name for name, _ in objective.named_parameters())  # the run goes on as it was


def test_a_distilled_student_learns_from_labels_and_from_the_teacher(make, tiny):
    teacher = ViTWithRegistersForImageClassification(tiny(num_labels=3, initializer_range=0.5)).eval()
    objective = make(
        network=teacher.requires_grad_(False),
        distillation="hard",
        distillation_weight=0.25,
        teacher="somewhere",
        model={"has_distillation_token": True},
    )
    batch = make_batch()
    losses = objective(batch, step=0)
    torch.testing.assert_close(losses["total"], 0.75 * losses["classes"] + 0.25 * losses["teacher"])
    losses["total"].backward()
    assert objective.model.distillation_classifier.weight.grad is not None
    assert not [name for name in objective.state_dict() if "teacher" in name]
    output = objective.eval().model(batch["global_views"][0])
    taught = teacher(batch["global_views"][0]).logits
    expected = distillation_loss(output.distillation_logits, taught, settings=objective.settings)
    torch.testing.assert_close(losses["teacher"], expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_names": ("one",)}, "two or more class_names, got 1"),
        ({"loss": "hinge"}, "expected loss to be one of softmax, binary"),
        ({"loss": "multi_label", "mixup": 0.8}, "the multi_label loss takes no mixup: set mixup and cutmix to 0"),
        ({"loss": "binary"}, "smoothing 0 with the binary loss, got 0.1"),
        ({"distillation": "hard"}, "contradict each other: set both or neither"),
        ({"distillation": "hard", "teacher": "x"}, "set has_distillation_token=True"),
        ({"model": {"has_mask_token": True}}, "would not train a mask token"),
    ],
)
def test_contradictions_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_the_average_of_the_weights_is_that_of_timm_and_is_what_is_saved(make):
    objective = make(ema_decay=0.9)
    theirs = timm.utils.ModelEmaV3(objective.model, decay=0.9)
    assert objective.saved is not objective.model and objective.encoder is objective.saved.vitreg
    for step in range(4):
        with torch.no_grad():
            for parameter in objective.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        objective.after_step(step=step)
        theirs.update(objective.model)
    for ours, other in zip(objective.saved.parameters(), theirs.module.parameters()):
        torch.testing.assert_close(ours, other)
    learned = [parameter for part in objective.trained.values() for parameter in part.parameters()]
    assert {id(p) for p in learned} == {id(p) for p in objective.parameters() if p.requires_grad}
    assert not objective.train().saved.training and objective.model.training


def test_an_image_without_a_label_is_refused(make):
    batch = make_batch()
    batch["labels"][2] = -1
    with pytest.raises(ValueError, match="an image has no label"):
        make().to_device(batch, device=torch.device("cpu"), mean=[0.5] * 3, std=[0.5] * 3)


def test_simple_crops_and_three_augment_do_what_deit_iii_says(photograph):
    settings = CropSettings(
        num_global=1, num_local=0, global_size=64, cut="simple", color_augmentation="none", flip=0.0
    )
    torch.manual_seed(0)
    (view,) = ColoredCrop(settings)(photograph)["global_views"]
    whole = v2.functional.resize(
        v2.functional.pil_to_tensor(photograph), 64, v2.InterpolationMode.BICUBIC, antialias=True
    )
    padded = v2.functional.pad(whole, [4], padding_mode="reflect").float()
    windows = padded.unfold(1, 64, 1).unfold(2, 64, 1)  # [3, 9, 9, 64, 64]
    assert ((windows - view[:, None, None].float()).abs().amax(dim=(0, 3, 4)) == 0).any()
    settings = CropSettings(**ONE, global_size=32, color_augmentation="three", color_jitter=(0.0,) * 4)
    torch.manual_seed(0)
    gray = 0
    for _ in range(60):
        (view,) = ColoredCrop(settings)(photograph)["global_views"]
        gray += bool((view[0] == view[1]).all())
    assert 10 <= gray <= 30  # one of three


def test_each_part_of_three_augment_is_what_deit_does_with_pillow(photograph):
    # DeiT works on images of Pillow: gray, solarised at 128, or blurred by a radius from 0.1 to 2 pixels.
    small = photograph.resize((96, 96))
    radii = np.linspace(0.1, 2.0, 39).tolist()
    theirs = {
        "gray": [np.asarray(small.convert("L").convert("RGB"))],
        "solarised": [np.asarray(ImageOps.solarize(small, 128))],
        "blurred": [np.asarray(small.filter(ImageFilter.GaussianBlur(radius))) for radius in radii],
    }
    size = {"num_global": 1, "num_local": 0, "global_size": 96, "global_scale": (1.0, 1.0), "flip": 0.0}
    crop = ColoredCrop(CropSettings(**size, color_augmentation="three", color_jitter=(0.0, 0.0, 0.0, 0.0)))
    torch.manual_seed(0)
    found = collections.Counter()
    for _ in range(60):
        view = crop(small)["global_views"][0].permute(1, 2, 0).numpy().astype(int)
        errors = {name: min(np.abs(view - other).mean() for other in others) for name, others in theirs.items()}
        best = min(errors, key=errors.get)
        assert errors[best] < {"gray": 0.6, "solarised": 1e-9, "blurred": 1.0}[best], errors  # levels of 255
        found[best] += 1
    assert min(found[name] for name in theirs) >= 12  # each one of three


def test_mixed_labels_are_those_of_timm_for_the_same_share_and_partners():
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 1, 0, 2])
    torch.manual_seed(0)
    mixed, targets = v2.MixUp(alpha=0.8, num_classes=3)(images, labels)
    # torchvision mixes an image with the one before it, timm with that of the mirrored place.
    partners = images.roll(1, 0)
    share = (((mixed - partners) * (images - partners)).sum() / (images - partners).square().sum()).item()
    torch.testing.assert_close(mixed, share * images + (1 - share) * partners)
    # Pairs (image, partner) in an order in which mirrored places are partners.
    ordered = torch.cat([labels, labels.roll(1).flip(0)])
    theirs = timm.data.mixup.mixup_target(ordered, 3, lam=share)[:6]
    torch.testing.assert_close(targets, theirs, atol=1e-5, rtol=0)


def test_a_classifier_starts_from_a_model_of_another_objective(tiny, tmp_path):
    backbone = ViTWithRegistersModel(tiny(has_mask_token=True, initializer_range=0.3))
    backbone.save_pretrained(tmp_path / "model")
    recipe = Recipe(
        objective="classify",
        model={"preset": "tiny/8"},
        crops=ONE_VIEW,
        settings={"class_names": ["a", "b"]},
    )
    objective = make_objective(recipe, init=tmp_path / "model")
    assert torch.equal(objective.encoder.layers[0].mlp.fc1.weight, backbone.layers[0].mlp.fc1.weight)
    assert objective.saved.config.id2label == {0: "a", 1: "b"} and objective.encoder.embeddings.mask_token is None


def test_a_classifier_trains_with_merged_patches(tiny, tmp_path):
    reduction = {"kind": "merge", "per_layer": 3}
    ViTWithRegistersModel(tiny(token_reduction=reduction, initializer_range=0.3)).save_pretrained(tmp_path)
    recipe = Recipe(
        objective="classify",
        model={"preset": "tiny/8"},
        crops=ONE_VIEW,
        settings={"class_names": ["a", "b"]},
    )
    model = make_objective(recipe, init=tmp_path).saved
    output = model.vitreg(torch.randn(2, 3, 32, 32))
    assert output.reduction.token_sizes.shape == (2, 16 - 9)
    model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
    assert model.vitreg.layers[0].mlp.fc1.weight.grad.any()


@pytest.mark.parametrize("has_fuser", [False, True])
def test_a_classifier_learns_with_learned_tokens(make, has_fuser):
    reduction = {"kind": "learn", "num_tokens": 3, "layer": 1, "has_fuser": has_fuser}
    objective, batch = make(model={"token_reduction": reduction}, smoothing=0.0), make_batch()
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    losses = fit(objective, batch, optimizer, num_steps=30)
    assert losses[-1] < losses[0] / 3
    changed = [name for name, parameter in objective.named_parameters() if not torch.equal(parameter, before[name])]
    assert sum("token_learner" in name for name in changed) == (12 if has_fuser else 6)


def test_patches_learn_to_halt_and_the_log_has_what_it_costs(make):
    reduction = {"kind": "halt", "scale": 5.0, "center": 3.0, "ponder_weight": 1.0, "distribution_weight": 0.1}
    objective, batch = make(model={"token_reduction": reduction}, smoothing=0.0), make_batch()
    first = objective(batch, step=0)
    expected = first["classes"] + first["ponder"] + 0.1 * first["distribution"]
    torch.testing.assert_close(first["total"], expected)
    fit(objective, batch, torch.optim.Adam(objective.parameters(), lr=3e-3), num_steps=20)
    last = objective(batch, step=20)
    assert last["halting_depth"] < first["halting_depth"] - 0.5 and last["ponder"] < first["ponder"]
    assert last["classes"] < first["classes"]
    depths = objective.saved(batch["global_views"][0]).reduction.halting_depth
    assert depths.float().mean() == last["halting_depth"]


def test_a_finished_model_starts_to_halt_by_a_line_of_the_recipe(tiny, tmp_path):
    ViTWithRegistersModel(tiny(initializer_range=0.3)).save_pretrained(tmp_path)
    recipe = Recipe(
        objective="classify",
        model={"preset": "tiny/8", "token_reduction": {"kind": "halt", "center": 5.0}},
        crops=ONE_VIEW,
        settings={"class_names": ["a", "b"]},
    )
    assert make_objective(recipe, init=tmp_path).saved.config.token_reduction["center"] == 5.0


# The program ---------------------------------------------------------------------------------------------------------

RECIPE = {
    "objective": "classify",
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "crops": {"global_size": 32, "num_global": 1, "num_local": 0, "color_augmentation": "three"},
    "settings": {"mixup": 0.8, "cutmix": 1.0},
    "optimizer": "lamb",
    "num_steps": 9,
    "batch_size": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a recipe and rendered photographs in class folders."""
    folder = tmp_path_factory.mktemp("finetune")
    RECIPE["model"]["patch_size"] = 8
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    for index in range(40):
        scene = render_scene(index, settings=SceneSettings(image_size=40))
        path = folder / "photos" / "train" / ("round" if scene.label % 2 else "square") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.image).save(path)
    return folder


USUAL = ("--data", "photos")


def run(folder, *options, **settings) -> str:
    return training_program.run("finetune.py", folder, *USUAL, *options, **settings)


def start(folder, *options, **settings) -> training_program.Program:
    return training_program.start("finetune.py", folder, *USUAL, *options, **settings)


@pytest.fixture(scope="module")
def whole(folder) -> str:
    return run(folder, output="whole")


def test_a_run_ends_with_an_accuracy_and_a_classifier_that_loads_without_the_package(folder, whole):
    assert "accuracy on" in whole and "AutoModelForImageClassification" in whole
    assert "accuracy" in json.loads((folder / "whole" / "training.json").read_text())
    done = run_without_the_package(
        """
        from PIL import Image
        from transformers import pipeline
        classify = pipeline("image-classification", "whole/model", trust_remote_code=True)
        print(sorted(found["label"] for found in classify(Image.new("RGB", (50, 40)))))
        """,
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['round', 'square']"


def test_a_killed_run_goes_on_with_the_same_bits(folder, whole):
    training_program.assert_a_killed_run_goes_on("finetune.py", folder, *USUAL, num_steps=RECIPE["num_steps"])


def test_two_processes_follow_one(folder):
    changes = ["--set", "settings.mixup=0.0", "--set", "settings.cutmix=0.0"]  # each process mixes its own images
    run(folder, *changes, output="one")
    run(folder, *changes, output="two", processes=2)
    run(folder, *changes, "--shard", output="sharded", processes=2)
    expected = torch.tensor(losses_of(folder / "one"))
    for name in ("two", "sharded"):
        # Rounding grows from step to step, by how much depends on the initial weights of the version.
        torch.testing.assert_close(torch.tensor(losses_of(folder / name)), expected, rtol=1e-3, atol=1e-3)


def test_data_without_classes_is_refused_with_a_remedy(folder):
    flat = folder / "flat"
    flat.mkdir(exist_ok=True)
    for path in list((folder / "photos").rglob("*.png"))[:4]:
        (flat / path.name).write_bytes(path.read_bytes())
    process = start(folder, "--data", "flat", output="refused")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "classification needs classes" in err and "Traceback" not in err
