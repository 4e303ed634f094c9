"""Objectives that give registers to a finished model: what they train, what they start from, what they save."""

import pytest
import torch
import torch.nn.functional as F

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.pretraining.build import make_objective
from modeling_vitreg.pretraining.objectives.append_registers import excess
from modeling_vitreg.pretraining.objectives.refine_registers import beside_strip, draw_boxes, record_queries_and_keys
from modeling_vitreg.pretraining.objectives.retrofitting import cosine_distance
from modeling_vitreg.pretraining.run.recipe import make_recipe


MODEL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
CROPS = {"num_global": 1, "num_local": 0, "global_size": 32}
SETTINGS = {
    "append_registers": {"num_copies": 3, "layer": 2, "threshold": 1.0, "lora_rank": 2, "first_layer": 2},
    "distill_registers": {"num_copies": 3},
    "refine_registers": {"lora_rank": 2, "spurious_similarity": 0.9, "register_similarity": 0.9},
}
KINDS = [*SETTINGS, "ring"]


@pytest.fixture
def make(tiny, randomise, tmp_path):
    """The objective of a kind, around a teacher in a folder."""

    def make_it(kind: str, num_registers: int = 3, **settings):
        randomise(ViTWithRegistersModel(tiny(num_register_tokens=0))).save_pretrained(tmp_path / "teacher")
        name = "refine_registers" if kind == "ring" else kind
        settings = {**SETTINGS[name], "teacher": str(tmp_path / "teacher"), **settings}
        settings |= {"registers": "ring"} if kind == "ring" else {}
        model = MODEL | ({"num_gated_registers": num_registers} if name == "append_registers" else {})
        recipe = {"objective": name, "model": model, "crops": CROPS, "settings": settings, "num_steps": 10}
        objective = make_objective(make_recipe({**recipe, "num_register_tokens": num_registers, "batch_size": 4}))
        original = ViTWithRegistersModel.from_pretrained(tmp_path / "teacher").state_dict()
        missing, _ = objective.backbone.load_state_dict(_renamed(objective.backbone, original), strict=False)
        assert all("register" in each or "lora" in each for each in missing)
        return objective.train()

    return make_it


def _renamed(backbone, weights):
    """Weights of a model in the names that they have beside adapters."""
    names = dict.fromkeys(backbone.state_dict())
    renamed = {}
    for name, value in weights.items():
        inner = name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        renamed[inner if inner in names else name] = value
    return renamed


def _batch(seed=0):
    return {"global_views": torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


def _trained(objective):
    return {name for name, parameter in objective.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_published_parameters_are_trained_and_all_of_them_get_a_gradient(make, kind):
    objective = make(kind)
    names, backbone = _trained(objective), objective.backbone
    is_expected = {
        "append_registers": lambda name: "register" in name or ("lora_" in name and ".layers.0." not in name),
        "distill_registers": lambda name: (
            (name.startswith("backbone.embeddings.") and "cls" not in name) or ".2." in name
        ),
        "refine_registers": lambda name: "register_tokens" in name or "lora_" in name,
        "ring": lambda name: "lora_" in name,
    }[kind]
    assert names == {name for name, _ in objective.named_parameters() if is_expected(name)}
    with torch.no_grad():  # adapters start at zero, and their first matrix without a gradient
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    torch.manual_seed(0)
    losses = objective(_batch(), step=9)
    losses["total"].backward()
    grads = {name: parameter.grad for name, parameter in objective.named_parameters()}
    assert all((grads[name] is not None and grads[name].abs().sum() > 0) == (name in names) for name in grads)
    assert not {name for name in objective.state_dict() if "teacher" in name}


def test_more_layers_are_distilled_on_request(make):
    one, two = (_trained(make("distill_registers", num_layers=number)) for number in (1, 2))
    assert one < two and all(".layers.1." in name for name in two - one)


def test_appended_registers_start_as_the_original(make):
    objective = make("append_registers").eval()
    (teacher,) = objective._teacher
    images = _batch()["global_views"][0]
    ours, theirs = objective.backbone(images), teacher(images)
    torch.testing.assert_close(ours.cls_token, theirs.cls_token, rtol=0, atol=5e-6)
    torch.testing.assert_close(ours.patch_tokens, theirs.patch_tokens, rtol=0, atol=5e-6)
    losses = make("append_registers", num_copies=1)(_batch(), step=0)
    assert losses["class_distance"].abs() < 1e-5 and losses["patch_distance"].abs() < 1e-5
    assert losses["gate"].item() == pytest.approx(1e-8)


def test_adapters_wait_for_the_registers(make):
    objective = make("append_registers", registers_only=0.4)
    adapters = {name: p for name, p in objective.named_parameters() if "lora_B" in name}
    for step, waits in ((3, True), (4, False)):
        objective.zero_grad()
        objective(_batch(), step=step)["total"].backward()
        assert all((parameter.grad == 0).all().item() is waits for parameter in adapters.values())


def test_terms_of_the_appended_are_weighted_and_the_excess_is_that_of_its_program(make):
    objective = make("append_registers", class_weight=2.0, patch_weight=3.0, norm_weight=5.0)
    losses = objective(_batch(), step=0)
    total = 2 * losses["class_distance"] + 3 * losses["patch_distance"] + 5 * losses["norm_excess"]
    torch.testing.assert_close(losses["total"], total)
    norms = torch.tensor([[0.5, 2.0], [6.0, 1.0]])
    assert excess(norms, 2.0).item() == pytest.approx((6 / 2 - 1) / 4)


def test_distilled_registers_follow_cosine_and_squared_error_of_the_average(make):
    objective = make("distill_registers", num_copies=1, class_weight=0.5)
    images = _batch()["global_views"][0]
    losses, output = objective(_batch(), step=0), objective.backbone(images)
    (teacher,) = objective._teacher
    target = teacher(images).patch_tokens
    cosine = 1 - F.cosine_similarity(output.patch_tokens, target, dim=-1).mean()
    torch.testing.assert_close(losses["patch_distance"], cosine, rtol=1e-4, atol=1e-6)
    expected = cosine + (output.patch_tokens - target).square().mean() + 0.5 * losses["class_distance"]
    torch.testing.assert_close(losses["total"], expected, rtol=1e-4, atol=1e-6)
    assert cosine_distance(target, 3 * target).abs() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_without_adapters_and_computes_the_same(make, kind, tmp_path):
    objective = make(kind)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    objective.eval().write(objective.saved, tmp_path / "saved")
    loaded, report = ViTWithRegistersModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    images = _batch()["global_views"][0]
    torch.testing.assert_close(loaded(images)[0], objective.backbone(images)[0], rtol=1e-4, atol=1e-5)
    measured = objective.evaluate(objective.saved, images, {})
    assert set(measured) == set(objective.metrics) and -1 <= measured["class_cosine"] <= 1


def test_outliers_of_the_evaluation_are_patches_above_the_threshold(make):
    images = _batch()["global_views"][0]
    torch.manual_seed(1)
    objective = make("append_registers", layer=2).eval()
    state = objective.backbone(images, output_hidden_states=[2]).hidden_states[2]
    norms = state[:, 4:].norm(dim=-1).flatten().sort().values
    torch.manual_seed(1)
    objective = make("append_registers", layer=2, threshold=norms[-10:-8].mean().item()).eval()
    found = objective.evaluate(objective.saved, images, {})
    assert found["outlier_share"] == pytest.approx(9 / 64)
    assert found["class_cosine"] == pytest.approx(1.0, abs=1e-5)


def test_a_crop_stands_beside_a_strip_of_another_image():
    crops, others = torch.ones(2, 3, 48, 48), torch.zeros(2, 3, 48, 48)
    shapes = set()
    for seed in range(12):
        torch.manual_seed(seed)
        composed, is_crop = beside_strip(crops, others, patch_shape=(8, 8))
        patches = F.avg_pool2d(composed[0, 0][None], 8).flatten()  # of ones where the crop is
        assert torch.equal(patches.bool(), is_crop) and is_crop.sum() == 36 and len(is_crop) == 48
        shapes.add((tuple(composed.shape), is_crop[0].item()))
    assert len(shapes) == 4  # strips of two patches on all four sides


def test_boxes_have_the_published_areas_and_ratios():
    boxes = draw_boxes(500, device=torch.device("cpu"))
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(dim=1)
    assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-6
    assert (width * height).min() >= 0.25 and (width * height).max() <= 0.5 + 1e-6
    assert (width / height).min() >= 2 / 3 - 1e-4 and (width / height).max() <= 1.5 + 1e-4


def test_queries_and_keys_are_those_of_the_layers(tiny):
    model = ViTWithRegistersModel(tiny()).eval()
    images = torch.randn(2, 3, 32, 32)
    with record_queries_and_keys(model, range(2, 4)) as recorded:
        state = model(images, output_hidden_states=[1]).hidden_states[1]
    layer = model.layers[1]
    packed = layer.attention.qkv(layer.norm1(state))
    torch.testing.assert_close(recorded[0][0], packed[..., :32])
    torch.testing.assert_close(recorded[0][1], packed[..., 32:64])
    assert len(recorded) == 2 and not layer.attention.qkv._forward_hooks


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("append_registers", {"registers_only": 1.5}, r"registers_only in \[0, 1\]"),
        ("append_registers", {"norm_weight": -1.0}, "expected norm_weight of 0 or more, got -1.0"),
        ("append_registers", {"threshold": -1.0}, "layer and threshold of 0 or more"),
        ("append_registers", {"layer": 9}, r"layer in 0 \.\.\. 3, got 9"),
        ("append_registers", {"num_registers": 0}, "trains gated registers, and the model has none"),
        ("distill_registers", {"num_registers": 0}, "trains registers, and the model has none"),
        ("distill_registers", {"num_copies": 0}, "expected num_copies of 1 or more"),
        ("distill_registers", {"error_weight": -1.0}, "expected error_weight of 0 or more, got -1.0"),
        ("refine_registers", {"absorb_weight": -1.0}, "expected absorb_weight of 0 or more, got -1.0"),
        ("refine_registers", {"num_registers": 0}, "registers='tokens' needs registers"),
        ("refine_registers", {"registers": "pixels"}, "expected registers to be one of tokens, ring, got 'pixels'"),
        ("refine_registers", {"fill": "white"}, "expected fill to be one of zero, rand, randn"),
        ("refine_registers", {"num_crops": 0}, "expected num_crops of 1 or more, got 0"),
        ("refine_registers", {"hijack_layers": [2, 1]}, "first <= last in hijack_layers"),
        ("refine_registers", {"hijack_layers": [2, 9]}, r"hijack_layers in 1 \.\.\. 3"),
    ],
)
def test_contradictions_are_refused(make, kind, changes, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **changes)


def test_a_single_image_has_no_other_to_be_compared_with(make):
    with pytest.raises(ValueError, match="use batches of 2 images or more"):
        make("refine_registers")({"global_views": torch.randn(1, 1, 3, 32, 32)}, step=0)
