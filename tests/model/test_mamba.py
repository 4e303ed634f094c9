"""Mamba-R: the scan equals a plain loop, a layer two mixers of transformers; registers lie where the paper says."""

import pytest
import torch
import torch.nn.functional as F
from other_backbones import assert_loads_through_the_auto_classes, assert_runs_and_learns_without_the_package
from small_training import gradients_without_and_with_checkpointing
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from modeling_vitreg import MambaRConfig, MambaRForImageClassification, MambaRModel, mamba_vitreg
from modeling_vitreg.analysis.survey import SurveySettings, survey
from modeling_vitreg.features import extract_features, load_encoder
from modeling_vitreg.mamba_vitreg import SelectiveScan, scan_places, selective_scan


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_register_tokens": 3, "register_reduction": 2}
TINY |= {"image_size": 16, "patch_size": 4}


def make_model(kind=MambaRForImageClassification, **changes):
    """A tiny model in evaluation mode with all parameters random, those that start at a constant too."""
    torch.manual_seed(0)
    model = kind(MambaRConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


# The scan -----------------------------------------------------------------------------------------------------------


def make_inputs(num_tokens: int, *, batch=2, width=3, states=4, dtype=torch.float64) -> list:
    """Inputs, steps, decay, write and read of a scan."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, num_tokens, width)] * 2 + [(width, states)] + [(batch, num_tokens, states)] * 2
    parts = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    parts[1], parts[2] = F.softplus(parts[1]), -parts[2].exp()
    return [part.requires_grad_() for part in parts]


def plain_scan(inputs, steps, decay, write, read):
    """The recurrence as its formula says, one token after the other."""
    state, outputs = 0.0, []
    for token in range(inputs.shape[1]):
        step = steps[:, token, :, None]
        state = torch.exp(step * decay) * state + step * inputs[:, token, :, None] * write[:, token, None]
        outputs.append((state * read[:, token, None]).sum(dim=-1))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 21])
def test_the_scan_and_its_gradients_equal_autograd_through_the_plain_loop(num_tokens):
    parts = make_inputs(num_tokens)
    ours, expected = selective_scan(*parts), plain_scan(*parts)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((values * weight).sum(), parts) for values in (ours, expected)]
    for our, theirs in zip(*gradients):
        torch.testing.assert_close(our, theirs, rtol=1e-12, atol=1e-12)


def test_the_backward_pass_of_the_scan_passes_gradcheck():
    inputs, steps, decay, write, read = (part.detach() for part in make_inputs(11))
    parts = [part.transpose(0, 1).contiguous() for part in (inputs, steps, write, read)]
    parts.insert(2, decay.t().contiguous())
    assert torch.autograd.gradcheck(SelectiveScan.apply, [part.requires_grad_() for part in parts])


def test_the_backward_pass_keeps_one_state_a_chunk():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part.shape) or part, lambda part: part):
        selective_scan(*make_inputs(64))
    assert [shape for shape in kept if len(shape) == 4] == [(8, 2, 4, 3)]


def test_states_are_in_float32_whatever_the_precision_around():
    parts = make_inputs(9, dtype=torch.float32)
    expected = selective_scan(*parts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = selective_scan(*parts)
    assert torch.equal(inside, expected)
    assert selective_scan(*(part.bfloat16() for part in parts)).dtype == torch.float32


def test_the_kernel_gets_time_last_where_it_is_installed(monkeypatch):
    def kernel(u, delta, A, B, C):  # as the interface of mamba-ssm documents its shapes
        return plain_scan(*(part.transpose(1, 2) for part in (u, delta)), A, *(x.transpose(1, 2) for x in (B, C))).mT

    parts = make_inputs(9)
    expected = selective_scan(*parts)
    monkeypatch.setattr(mamba_vitreg, "_kernel", lambda device, dtype: kernel)
    torch.testing.assert_close(selective_scan(*parts), expected)


# Registers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_registers", [0, 1, 2, 5, 12, 16])
def test_registers_lie_evenly_for_every_number_of_patches(num_registers):
    for num_patches in range(num_registers + 1, 1101):
        share, order = num_patches // (num_registers + 1), []
        for register in range(num_registers):
            order += [("patch", register * share + step) for step in range(share)] + [("register", register)]
        order += [("patch", patch) for patch in range(num_registers * share, num_patches)]
        names = [("register", number) for number in range(num_registers)]
        names += [("patch", number) for number in range(num_patches)]
        assert [names[token] for token in scan_places(num_patches, num_registers).argsort()] == order


def test_published_places():
    assert scan_places(196, 12)[:12].tolist() == list(range(15, 192, 16))
    assert scan_places(576, 16)[:2].tolist() == [33, 67]


def test_too_few_patches_are_refused():
    with pytest.raises(ValueError, match="at least 4 patches to lie around 3 registers, got 3"):
        make_model()(torch.rand(1, 3, 12, 4))


# The model ----------------------------------------------------------------------------------------------------------


def make_mixers(mixer, config) -> list:
    """A mixer of transformers for each direction, with our tensors."""
    theirs = MambaConfig(
        hidden_size=config.hidden_size,
        state_size=config.state_size,
        conv_kernel=config.conv_kernel,
        expand=config.expand,
        time_step_rank=config.time_step_rank,
        use_mambapy=False,
    )
    names = {"conv.weight": "conv1d.weight", "conv.bias": "conv1d.bias"}
    pair = []
    for direction in (mixer.forward_direction, mixer.backward_direction):
        state = {names.get(name, name): tensor for name, tensor in direction.state_dict().items()}
        state |= {f"{name}.weight": getattr(mixer, name).weight for name in ("in_proj", "out_proj")}
        pair.append(MambaMixer(theirs, layer_idx=0))
        pair[-1].load_state_dict(state, strict=True)
    return pair


@pytest.mark.parametrize("changes", [{}, {"register_reduction": 1}, {"num_register_tokens": 0}, {"state_size": 5}])
def test_every_layer_equals_two_mixers_of_transformers(changes):
    model = make_model(**changes)
    base, config, images = model.vitreg, model.config, torch.randn(2, 3, 16, 24)

    def rms(values, weight):
        return values / (values.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight

    with torch.no_grad():
        output = model(images, output_hidden_states=True)
        patches = F.conv2d(images, *base.embeddings.patch_embeddings.parameters(), stride=4).flatten(2).mT
        table = base.embeddings.position_embeddings.weight[0].T.view(1, -1, 4, 4)
        patches = patches + F.interpolate(table, (4, 6), mode="bicubic").flatten(2).mT
        number = config.num_register_tokens
        registers = torch.zeros(2, 0, 16)
        if number:
            registers = (base.embeddings.register_tokens.weight + base.embeddings.register_tokens.positions)[None]
        share, sequence, places = 24 // (number + 1), [], []
        for register in range(number):
            sequence += [patches[:, register * share : (register + 1) * share]]
            sequence += [registers[:, register, None].expand(2, -1, -1)]
            places.append((register + 1) * share + register)
        state = torch.cat([*sequence, patches[:, number * share :]], dim=1)
        others = [place for place in range(state.shape[1]) if place not in places]
        states = [state]
        for layer in base.layers:
            ahead, back = make_mixers(layer.mixer, config)
            normed = rms(state, layer.norm.weight)
            state = state + (ahead(normed) + back(normed.flip(1)).flip(1)) / 2
            states.append(state)
        for ours, theirs in zip(output.hidden_states, states, strict=True):
            torch.testing.assert_close(ours, theirs[:, places + others], rtol=1e-5, atol=1e-5)
        normed = rms(state, base.layernorm.weight)
        pooled = normed[:, places].flatten(1) if number else normed.mean(dim=1)
        if base.neck is not None:
            pooled = rms((normed[:, places] @ base.neck.weight.T).flatten(1), base.neck_norm.weight)
        torch.testing.assert_close(output.logits, model.classifier(pooled), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "size, count", [("tiny", 9_264_232), ("small", 27_801_064), ("base", 99_301_096), ("large", 341_222_376)]
)
def test_sizes_of_the_paper(size, count):
    with torch.device("meta"):
        model = MambaRForImageClassification(MambaRConfig.from_preset(size, num_labels=1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_initial_values_are_those_of_the_official_code():
    torch.manual_seed(0)
    model = MambaRModel(MambaRConfig(**{**TINY, "hidden_size": 256}))
    mixer = model.layers[1].mixer
    direction = mixer.backward_direction
    assert torch.equal(direction.A_log, torch.arange(1.0, 17).log().expand(512, 16))
    assert torch.equal(direction.D, torch.ones(512))
    steps = F.softplus(direction.dt_proj.bias)
    assert 1e-3 <= steps.min() < 1.2e-3 and 0.08 < steps.max() <= 0.1
    torch.testing.assert_close(direction.dt_proj.weight.abs().max().item(), 16**-0.5, rtol=0.01, atol=0)
    torch.testing.assert_close(mixer.out_proj.weight.abs().max().item(), (512 * 2) ** -0.5, rtol=0.01, atol=0)
    kept = model.no_weight_decay()
    assert {"embeddings.register_tokens.positions", "layers.0.mixer.forward_direction.A_log"} <= kept
    assert {"embeddings.position_embeddings.weight", "layers.1.mixer.backward_direction.D"} <= kept


def test_gradients_are_the_same_with_checkpointing_and_reach_every_parameter():
    model, images = make_model(drop_path_rate=0.2).train(), torch.randn(2, 3, 16, 16)
    plain, checkpointed = gradients_without_and_with_checkpointing(model, images, torch.tensor([0, 1]))
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name])


def test_half_precision_keeps_the_sum_over_layers_in_float32():
    model, images = make_model(), torch.randn(2, 3, 16, 16)
    expected = model(images).logits
    half = make_model().bfloat16()
    output = half(images, output_hidden_states=True)
    assert output.logits.dtype == torch.bfloat16
    assert {state.dtype for state in output.hidden_states} == {torch.float32}
    torch.testing.assert_close(output.logits.float(), expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(images).logits.float(), expected, rtol=0.1, atol=0.1)


def test_a_saved_folder_loads_through_the_auto_classes(tmp_path):
    assert_loads_through_the_auto_classes(
        make_model(), torch.randn(1, 3, 16, 20), file="mamba_vitreg.py", folder=tmp_path
    )


def test_a_bare_folder_loads_runs_and_learns_without_the_package(photograph, tmp_path):
    model, images = make_model(num_labels=3), torch.randn(2, 3, 16, 20)
    assert_runs_and_learns_without_the_package(model, images, photograph=photograph, folder=tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_attention_heads": 4}, "got num_attention_heads, which only the Vision Transformer has"),
        ({"has_mask_token": True}, "got has_mask_token"),
        ({"register_reduction": 3}, r"register_reduction divides hidden_size \(16\), got 3"),
        ({"state_size": 0}, "state_size is a positive integer, got 0"),
    ],
)
def test_wrong_values_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        MambaRConfig(**{**TINY, **changes})


def test_what_needs_attention_says_that_there_is_none():
    model, images = make_model(), torch.randn(1, 3, 16, 16)
    for call in (lambda: model(images, output_attentions=True), lambda: model.attention_maps(images)):
        with pytest.raises(ValueError, match="no attention"):
            call()
    encoder = load_encoder(model)
    for call in (
        lambda: encoder.prefix_attention(images, layers=-1),
        lambda: extract_features(encoder, images, feature="key"),
    ):
        with pytest.raises(ValueError, match="no attention"):
            call()
    with pytest.raises(ValueError, match="expected 3 registers, all of which the classifier reads, got 4"):
        model.resize_register_tokens(4)


# Analysis -----------------------------------------------------------------------------------------------------------


def test_a_survey_measures_norms_and_registers_and_says_that_there_is_no_attention():
    from planted_models import pictures

    model = make_model(image_size=64, patch_size=16, num_register_tokens=2)
    images = pictures(8)[0]
    settings = SurveySettings(is_strict=True, batch_size=4, num_ablation_images=4, has_progress_bar=False)
    report, _ = survey(load_encoder(model), images, settings=settings)
    assert report.architecture["family"] == "mamba_r" and report.architecture["num_attention_heads"] == 0
    assert report.attention["skipped"] == "the model has no attention"
    assert len(report.layers) == 2 and len(report.layers[0]["registers"]) == 2
    pixels = load_encoder(model).prepare(images)
    states = model.vitreg(pixels, output_hidden_states=True).hidden_states
    norms = states[1][:, :2].norm(dim=-1).mean(dim=0)
    torch.testing.assert_close(torch.tensor(report.layers[0]["registers"]), norms, rtol=1e-4, atol=1e-4)
    assert report.ablation["num_register_tokens"] == 2
    assert all(mode["patches"]["distance"] > 0 for mode in report.ablation["modes"].values())
