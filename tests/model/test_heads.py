"""The heads, each against a plain program of its published definition."""

import pytest
import torch
import torch.nn.functional as F

from modeling_vitreg import (
    ViTWithRegistersBackbone,
    ViTWithRegistersForDepthEstimation,
    ViTWithRegistersForImageClassification,
    ViTWithRegistersForMaskedImageModeling,
    ViTWithRegistersForSemanticSegmentation,
)


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 48)


# Classification ----------------------------------------------------------------------------------------------------


def test_a_zero_classifier_starts_at_chance_and_only_when_asked(tiny, images):
    model = ViTWithRegistersForImageClassification(tiny(num_labels=5, has_zero_init_classifier=True))
    output = model(images, labels=torch.tensor([1, 4]))
    assert (output.logits == 0).all()
    assert output.loss.item() == pytest.approx(torch.tensor(5.0).log().item())
    assert ViTWithRegistersForImageClassification(tiny(num_labels=5))(images).logits.abs().min() > 0


def test_the_distilled_form_averages_two_classifiers(tiny, randomise, images):
    config = tiny(num_labels=5, has_distillation_token=True, pooling="cls_distillation")
    model = randomise(ViTWithRegistersForImageClassification(config))
    labels, teacher = torch.tensor([1, 4]), torch.tensor([0, 2])
    output = model(images, labels=labels, teacher_classes=teacher)
    tokens = model.vitreg(images)
    torch.testing.assert_close(output.cls_logits, model.classifier(tokens.cls_token))
    torch.testing.assert_close(output.distillation_logits, model.distillation_classifier(tokens.distillation_token))
    torch.testing.assert_close(output.logits, (output.cls_logits + output.distillation_logits) / 2)
    hard = F.cross_entropy(output.cls_logits, labels) / 2 + F.cross_entropy(output.distillation_logits, teacher) / 2
    torch.testing.assert_close(output.loss, hard)
    alone = model(images, labels=labels).loss
    torch.testing.assert_close(
        alone, F.cross_entropy(output.cls_logits, labels) / 2 + F.cross_entropy(output.distillation_logits, labels) / 2
    )


def test_a_linear_head_over_several_layers_reads_class_tokens_in_order_then_the_mean(tiny, randomise, images):
    # DINOv2's 4-layer linear head: [class tokens of the last layers, earliest first; mean of the last patches].
    config = tiny(num_labels=5, pooling="cls_mean", num_classifier_layers=3)
    model = randomise(ViTWithRegistersForImageClassification(config))
    assert model.classifier.in_features == 4 * 32
    states = model.vitreg(images, output_hidden_states=True).hidden_states
    normed = [model.vitreg.layernorm(state) for state in states[1:]]
    features = torch.cat([*(state[:, 0] for state in normed), normed[-1][:, 5:].mean(1)], dim=1)
    torch.testing.assert_close(model(images).logits, model.classifier(features))
    assert model(images).hidden_states is None


def test_multi_label_and_regression_losses_follow_the_problem_type(tiny, images):
    targets = torch.rand(2, 5)
    model = ViTWithRegistersForImageClassification(tiny(num_labels=5, problem_type="multi_label_classification"))
    output = model(images, labels=targets)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, targets))
    model = ViTWithRegistersForImageClassification(tiny(num_labels=5, problem_type="regression"))
    output = model(images, labels=targets)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits, targets))


def test_labels_that_do_not_fit_are_refused(tiny, images):
    model = ViTWithRegistersForImageClassification(tiny(num_labels=5))
    with pytest.raises(
        ValueError, match=r"labels have shape \(3,\), expected \(2,\) class numbers or \(2, 5\) targets"
    ):
        model(images, labels=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"teacher_classes need a second classifier: set pooling='cls_distillation'"):
        model(images, labels=torch.tensor([1, 2]), teacher_classes=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"labels lie between 0 and 7, expected 0 to 4: 5 is `config.num_labels`"):
        model(images, labels=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"labels have the dtype torch.float32, expected integers"):
        model(images, labels=torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"labels need a classifier, but `config.num_labels` is 0"):
        ViTWithRegistersForImageClassification(tiny(num_labels=0))(images, labels=torch.tensor([0, 1]))
    distilled = tiny(num_labels=5, has_distillation_token=True, pooling="cls_distillation")
    with pytest.raises(ValueError, match=r"teacher_classes lie between 2 and 9, expected 0 to 4"):
        ViTWithRegistersForImageClassification(distilled)(
            images, labels=torch.tensor([0, 1]), teacher_classes=torch.tensor([2, 9])
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_class_numbers_may_be_integers_of_any_size(tiny, images, dtype):
    masks = torch.randint(0, 3, (2, 32, 48))
    for cls, labels in (
        (ViTWithRegistersForImageClassification, torch.tensor([0, 2])),
        (ViTWithRegistersForSemanticSegmentation, masks),
    ):
        model = cls(tiny(num_labels=3))
        assert torch.equal(model(images, labels=labels.to(dtype)).loss, model(images, labels=labels).loss)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32], ids=str)
def test_multi_label_targets_may_be_numbers_of_any_type(tiny, images, dtype):
    hot = torch.tensor([[1, 0, 0], [0, 1, 1]])
    model = ViTWithRegistersForImageClassification(tiny(num_labels=3, problem_type="multi_label_classification"))
    output = model(images, labels=hot.to(dtype))
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, hot.float()))
    with pytest.raises(ValueError, match=r"labels lie between 0.0 and 2.0, expected 0 or 1 for each class"):
        model(images, labels=2 * hot)
    with pytest.raises(ValueError, match=r"labels have shape \(2,\), but problem_type='multi_.*' needs \(2, 3\)"):
        model(images, labels=torch.tensor([1, 2]))


def test_labels_of_shape_batch_by_classes_need_the_type_of_the_problem(tiny, images):
    soft, hot = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([[1, 0, 0], [0, 0, 1]])
    model = ViTWithRegistersForImageClassification(tiny(num_labels=3))
    for labels in (soft, hot):
        with pytest.raises(ValueError, match=r"labels of shape \(2, 3\) may be several things: set"):
            model(images, labels=labels)
    model.config.problem_type = "single_label_classification"
    output = model(images, labels=soft)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, soft))
    assert torch.equal(model(images, labels=hot).loss, model(images, labels=torch.tensor([0, 2])).loss)


def test_a_forward_pass_never_edits_the_configuration(tiny, images):
    maps = torch.zeros(2, 32, 48)
    batches = [
        (ViTWithRegistersForImageClassification, {"num_labels": 3}, {"labels": torch.tensor([0, 2])}),
        (ViTWithRegistersForImageClassification, {"num_labels": 1}, {"labels": torch.rand(2)}),
        (
            ViTWithRegistersForImageClassification,
            {"num_labels": 2, "problem_type": "multi_label_classification"},
            {"labels": torch.rand(2, 2)},
        ),
        (ViTWithRegistersForMaskedImageModeling, {}, {"bool_masked_pos": torch.rand(2, 24) < 0.5}),
        (ViTWithRegistersForSemanticSegmentation, {"num_labels": 3}, {"labels": maps.long()}),
        (ViTWithRegistersForDepthEstimation, {}, {"labels": maps}),
        (ViTWithRegistersBackbone, {}, {"output_hidden_states": True, "output_attentions": True}),
    ]
    for cls, settings, inputs in batches:
        model = cls(tiny(**settings))
        before = model.config.to_dict()
        model(images, **inputs)
        assert model.config.to_dict() == before, cls.__name__


# A mean over nothing -----------------------------------------------------------------------------------------------


NOTHING = {
    "classes": (ViTWithRegistersForImageClassification, {"num_labels": 3}, {"labels": torch.full((2,), -100)}),
    "masks": (
        ViTWithRegistersForSemanticSegmentation,
        {"num_labels": 3},
        {"labels": torch.full((2, 32, 48), 255, dtype=torch.uint8)},
    ),
    "masks with another number": (
        ViTWithRegistersForSemanticSegmentation,
        {"num_labels": 3, "semantic_loss_ignore_index": -1},
        {"labels": torch.full((2, 32, 48), -1)},
    ),
    "no patch": (ViTWithRegistersForMaskedImageModeling, {}, {"bool_masked_pos": torch.zeros(2, 24).bool()}),
    "no feature": (
        ViTWithRegistersForMaskedImageModeling,
        {"masked_target": "features"},
        {"bool_masked_pos": torch.zeros(2, 24).bool(), "target_features": torch.randn(2, 24, 32)},
    ),
    "depth 0": (ViTWithRegistersForDepthEstimation, {}, {"labels": torch.zeros(2, 32, 48)}),
    "depth unknown": (ViTWithRegistersForDepthEstimation, {}, {"labels": torch.full((2, 32, 48), torch.nan)}),
    "depth just beyond": (ViTWithRegistersForDepthEstimation, {}, {"labels": torch.full((2, 32, 48), 11.0)}),
}
DISTILLED = {"num_labels": 3, "has_distillation_token": True, "pooling": "cls_distillation"}
NOTHING["classes of two"] = (ViTWithRegistersForImageClassification, DISTILLED, NOTHING["classes"][2])
SETTINGS = {
    "classes": {"num_labels": 3},
    "probabilities": {"num_labels": 3, "problem_type": "single_label_classification"},
    "multi-label": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1},
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_loss_over_nothing_is_zero_with_a_gradient(tiny, randomise, images, name):
    cls, settings, inputs = NOTHING[name]
    model = randomise(cls(tiny(**settings))).train()
    loss = model(images, **inputs).loss
    loss.backward()
    assert loss.item() < 1e-5
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 10 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loss_over_no_image_is_zero_with_a_gradient(tiny, randomise, name):
    # The last batch of a process may be empty; the library's "sdpa" takes none.
    kind = ViTWithRegistersForImageClassification
    model = randomise(kind._from_config(tiny(**SETTINGS[name]), attn_implementation="eager"))
    labels = torch.empty(0, dtype=torch.long) if name == "classes" else torch.empty(0, model.config.num_labels)
    loss = model(torch.randn(0, 3, 32, 48), labels=labels).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_labels_of_which_some_count_weigh_as_the_library_weighs_them(tiny, images):
    model = ViTWithRegistersForImageClassification(tiny(num_labels=3))
    output = model(images, labels=torch.tensor([-100, 2]))
    assert torch.equal(output.loss, F.cross_entropy(output.logits, torch.tensor([-100, 2])))
    model = ViTWithRegistersForSemanticSegmentation(tiny(num_labels=3))
    masks = torch.randint(0, 3, (2, 32, 48))
    masks[0] = 255
    output = model(images, labels=masks)
    scores = F.interpolate(output.logits, size=(32, 48), mode="bilinear")
    assert torch.equal(output.loss, F.cross_entropy(scores, masks, ignore_index=255))


# Masked image modelling --------------------------------------------------------------------------------------------


def test_masked_pixels_are_scored_by_mean_absolute_error(tiny, randomise, images):
    model = randomise(ViTWithRegistersForMaskedImageModeling(tiny(patch_size=(8, 16))))
    mask = torch.rand(2, 4, 3) < 0.5
    output = model(images, bool_masked_pos=mask)
    assert output.reconstruction.shape == images.shape
    pixels = mask.repeat_interleave(8, 1).repeat_interleave(16, 2)[:, None].expand_as(images)
    torch.testing.assert_close(output.loss, (output.reconstruction - images)[pixels].abs().mean())
    assert model(images).loss is None


def test_patches_of_pixels_fold_back_into_the_image(tiny, images):
    model = ViTWithRegistersForMaskedImageModeling(tiny(patch_size=(8, 16)))
    patches = model.patchify(images)
    assert torch.equal(patches[1, 4].view(3, 8, 16), images[1, :, 8:16, 16:32])
    assert torch.equal(model.unpatchify(patches, (4, 3)), images)


def test_teacher_features_are_scored_by_cosine(tiny, randomise, images):
    model = randomise(ViTWithRegistersForMaskedImageModeling(tiny(masked_target="features", masked_target_size=12)))
    target, mask = torch.randn(2, 24, 12), torch.rand(2, 24) < 0.5
    output = model(images, bool_masked_pos=mask, target_features=target)
    assert output.reconstruction.shape == (2, 24, 12)
    errors = 1 - F.cosine_similarity(output.reconstruction, target, dim=-1)
    torch.testing.assert_close(output.loss, errors[mask].mean())
    everywhere = model(images, target_features=target)
    torch.testing.assert_close(
        everywhere.loss, 1 - F.cosine_similarity(everywhere.reconstruction, target, dim=-1).mean()
    )


def test_targets_of_masked_modelling_that_do_not_fit_are_refused(tiny, images):
    model = ViTWithRegistersForMaskedImageModeling(tiny(masked_target="features", masked_target_size=12))
    with pytest.raises(ValueError, match=r"target_features have shape \(2, 24, 9\), expected \(2, 24, 12\)"):
        model(images, target_features=torch.randn(2, 24, 9))
    with pytest.raises(ValueError, match=r"target_features need masked_target='features'"):
        ViTWithRegistersForMaskedImageModeling(tiny())(images, target_features=torch.randn(2, 24, 32))


# Segmentation ------------------------------------------------------------------------------------------------------


def test_segmentation_is_batch_norm_and_one_linear_map_a_patch(tiny, randomise, images):
    model = randomise(ViTWithRegistersForSemanticSegmentation(tiny(num_labels=4, out_indices=[1, 3]))).train()
    states = model.vitreg(images, output_hidden_states=True).hidden_states
    features = torch.cat([model.vitreg.layernorm(states[i])[:, 5:] for i in (1, 3)], dim=-1)
    flat = features.flatten(0, 1)
    normed = (flat - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-5).sqrt()
    normed = normed * model.segmentation_norm.weight + model.segmentation_norm.bias
    expected = normed @ model.segmentation_classifier.weight[:, :, 0, 0].T + model.segmentation_classifier.bias
    labels = torch.randint(0, 4, (2, 32, 48))
    labels[:, :5] = 255
    output = model(images, labels=labels)
    torch.testing.assert_close(output.logits, expected.view(2, 4, 6, 4).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)
    large = F.interpolate(output.logits, size=(32, 48), mode="bilinear").permute(0, 2, 3, 1)
    torch.testing.assert_close(output.loss, F.cross_entropy(large[labels != 255], labels[labels != 255]))


def test_maps_of_labels_have_the_size_of_the_images(tiny, images):
    for cls in (ViTWithRegistersForSemanticSegmentation, ViTWithRegistersForDepthEstimation):
        with pytest.raises(
            ValueError, match=r"labels have shape \(2, 32, 32\), expected \(2, 32, 48\) like the images"
        ):
            cls(tiny())(images, labels=torch.zeros(2, 32, 32, dtype=torch.long))


def test_masks_of_classes_that_do_not_exist_are_refused(tiny, images):
    model = ViTWithRegistersForSemanticSegmentation(tiny(num_labels=3))
    with pytest.raises(ValueError, match=r"labels lie between 0 and 7, expected 0 to 2: .* and 255 marks"):
        model(images, labels=torch.arange(2 * 32 * 48).view(2, 32, 48) % 8)
    with pytest.raises(ValueError, match=r"labels have the dtype torch.float32, expected integers"):
        model(images, labels=torch.zeros(2, 32, 48))


# Depth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_cls_token", [True, False])
def test_depth_is_the_expectation_over_bins(tiny, randomise, images, has_cls_token):
    # The order of DINOv2: class token beside every patch, enlarge four times, then convolve, over un-normed layers.
    config = tiny(out_indices=[2, 3], max_depth=80.0, has_cls_token=has_cls_token, pooling="mean")
    model = randomise(ViTWithRegistersForDepthEstimation(config))
    states = model.vitreg(images, output_hidden_states=True).hidden_states
    parts = []
    for state in (states[2], states[3]):
        patches = state[:, config.num_prefix_tokens :].unflatten(1, (4, 6))
        parts += [patches, *([state[:, 0, None, None].expand_as(patches)] if has_cls_token else [])]
    features = torch.cat(parts, dim=-1).permute(0, 3, 1, 2)
    enlarged = F.interpolate(features, size=(16, 24), mode="bilinear", align_corners=False)
    scores = model.depth_classifier(enlarged).relu() + 0.1
    bins = torch.linspace(1e-3, 80.0, 256)[:, None, None]
    depth = (scores / scores.sum(1, keepdim=True) * bins).sum(1, keepdim=True)
    expected = F.interpolate(depth, size=(32, 48), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(model(images).predicted_depth, expected, rtol=1e-4, atol=1e-4)


def test_depth_loss_is_the_scale_invariant_loss_over_valid_pixels(tiny, randomise, images):
    model = randomise(ViTWithRegistersForDepthEstimation(tiny()))
    labels = torch.rand(2, 32, 48) * 12 - 1
    output = model(images, labels=labels)
    valid = (labels > 0) & (labels <= 10)
    error = torch.log(output.predicted_depth[valid] + 1e-3) - torch.log(labels[valid] + 1e-3)
    torch.testing.assert_close(output.loss, (error.var() + 0.15 * error.mean() ** 2).sqrt())


@pytest.mark.parametrize("scale", [100, 1000, 256], ids=["centimetres", "millimetres", "KITTI"])
def test_depth_in_another_unit_is_refused_in_words(tiny, images, scale):
    model = ViTWithRegistersForDepthEstimation(tiny())
    depths = torch.rand(2, 32, 48) * 8 + 1
    depths[:, :4] = 0
    message = (
        r"no depth in labels counts: they lie between .* and `config.max_depth` is 10 metres: scale them to metres"
    )
    with pytest.raises(ValueError, match=message):
        model(images, labels=(scale * depths).to(torch.int32))
    assert model(images, labels=depths).loss > 1e-3
    # On an accelerator the first labels are looked at; here the second too.
    with pytest.raises(ValueError, match=message):
        model(images, labels=scale * depths)


def test_the_trainer_finds_the_labels_of_every_head_and_nothing_else():
    # It evaluates without loss unless a batch has every argument with "label" in its name.
    from transformers.utils import find_labels

    for cls in (
        ViTWithRegistersForImageClassification,
        ViTWithRegistersForSemanticSegmentation,
        ViTWithRegistersForDepthEstimation,
    ):
        assert find_labels(cls) == ["labels"]


@pytest.fixture
def process_group(tmp_path):
    """Distributed training of one process, which has the rules of many."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


STAGES = ([0], [1], [1, 2], [0, 3])


@pytest.mark.parametrize("out_indices", STAGES, ids=str)
@pytest.mark.parametrize("settings", [{}, {"apply_layernorm": False}, {"reshape_hidden_states": False}], ids=str)
def test_a_head_on_early_stages_runs_no_layer_behind_them_and_no_parameter_waits(
    tiny, images, process_group, out_indices, settings
):
    inputs = {
        ViTWithRegistersBackbone: {},
        ViTWithRegistersForSemanticSegmentation: {"labels": torch.zeros(2, 32, 48, dtype=torch.long)},
        ViTWithRegistersForDepthEstimation: {"labels": torch.rand(2, 32, 48)},
    }
    for cls, extra in inputs.items():
        model, ran = cls(tiny(out_indices=out_indices, has_distillation_token=True, **settings)), []
        for number, layer in enumerate(model.vitreg.layers, start=1):
            layer.register_forward_hook(lambda *_, number=number, ran=ran: ran.append(number))
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            output = parallel(images, **extra)
            loss = output.loss if extra else sum(part.square().sum() for part in output.feature_maps)
            loss.backward()
        assert ran == 2 * list(range(1, max(out_indices) + 1))
        without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert without == set(model._ddp_params_and_buffers_to_ignore)
        assert len(model(images, output_attentions=True).attentions) == 3


def test_stages_that_are_chosen_later_decide_what_is_run(tiny, images):
    model, ran = ViTWithRegistersBackbone(tiny(out_indices=[3])), []
    for number, layer in enumerate(model.vitreg.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    model.out_features = ["stage1"]
    model(images)
    assert ran == [1]
    assert {name.split(".")[2] for name in model._ddp_params_and_buffers_to_ignore} == {"1", "2"}


@pytest.mark.parametrize("has_pooled_norm", [False, True])
def test_every_head_trains_under_distributed_data_parallel(tiny, images, process_group, tmp_path, has_pooled_norm):
    # It stops in the second step if a trained parameter got no gradient in the first.
    inputs = {
        ViTWithRegistersForImageClassification: {"labels": torch.tensor([0, 1])},
        ViTWithRegistersForMaskedImageModeling: {"bool_masked_pos": torch.rand(2, 24) < 0.5},
        ViTWithRegistersForSemanticSegmentation: {"labels": torch.zeros(2, 32, 48, dtype=torch.long)},
        ViTWithRegistersForDepthEstimation: {"labels": torch.rand(2, 32, 48)},
    }
    for cls, extra in inputs.items():
        config = tiny(has_mask_token=True, pooling="mean", has_pooled_norm=has_pooled_norm)
        cls(config).save_pretrained(tmp_path / cls.__name__)
        for model in (cls(config), cls.from_pretrained(tmp_path / cls.__name__)):
            parallel = torch.nn.parallel.DistributedDataParallel(model)
            for _ in range(2):
                parallel(images, **extra).loss.backward()


# Backbone ----------------------------------------------------------------------------------------------------------


def test_feature_maps_are_normed_patches_without_registers(tiny, randomise, images):
    model = randomise(ViTWithRegistersBackbone(tiny(out_features=["stem", "stage2", "stage3"])))
    assert model.channels == [32, 32, 32]
    output = model(images)
    states = model.vitreg(images, output_hidden_states=True).hidden_states
    for feature_map, stage in zip(output.feature_maps, (0, 2, 3)):
        expected = model.vitreg.layernorm(states[stage])[:, 5:].transpose(1, 2).unflatten(2, (4, 6))
        torch.testing.assert_close(feature_map, expected)
    assert output.hidden_states is None
    assert len(model(images, output_hidden_states=True).hidden_states) == 4
    model.config.apply_layernorm = False
    torch.testing.assert_close(model(images).feature_maps[1], states[2][:, 5:].transpose(1, 2).unflatten(2, (4, 6)))


def test_feature_maps_as_tokens_are_class_token_and_patches(tiny, randomise, images):
    model = randomise(ViTWithRegistersBackbone(tiny(reshape_hidden_states=False)))
    tokens = model.vitreg(images)
    expected = torch.cat([tokens.cls_token[:, None], tokens.patch_tokens], dim=1)
    torch.testing.assert_close(model(images).feature_maps[0], expected)


def test_upernet_and_dpt_run_on_the_backbone(tiny, images):
    # DPT expects exactly class token and patches: transformers' own register backbones fail there.
    from transformers import DPTConfig, DPTForDepthEstimation, UperNetConfig, UperNetForSemanticSegmentation

    backbone = tiny(out_indices=[0, 1, 2, 3])
    upernet = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=backbone, hidden_size=16, num_labels=4, use_auxiliary_head=False)
    )
    assert upernet.eval()(images).logits.shape == (2, 4, 32, 48)
    dpt = DPTConfig(
        backbone_config=tiny(out_indices=[0, 1, 2, 3], reshape_hidden_states=False),
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
    )
    assert DPTForDepthEstimation(dpt).eval()(torch.randn(1, 3, 32, 32)).predicted_depth.shape[1:] == (64, 64)
