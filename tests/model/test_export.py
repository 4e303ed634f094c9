"""Graphs: `torch.compile`, `torch.export`, ONNX and `torch.jit.trace`, with batch, height and width left open; and the
transforms of torch that run the model on tensors without values of their own: vmap, fake tensors, the meta device."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.func import functional_call, stack_module_state, vmap

from modeling_vitreg import (
    ViTWithRegistersForDepthEstimation,
    ViTWithRegistersForImageClassification,
    ViTWithRegistersForMaskedImageModeling,
    ViTWithRegistersForSemanticSegmentation,
    ViTWithRegistersModel,
)
from modeling_vitreg.modeling_vitreg import AUTO_MODELS


ARCHITECTURES = {
    "learned, antialias": {},
    "learned, offset": {"interpolate_antialias": False, "interpolate_offset": 0.1},
    "sincos": {"position_embedding_type": "sincos", "has_cls_token": False, "pooling": "mean"},
    "rope": {"position_embedding_type": "rope", "hidden_act": "swiglu", "has_key_bias": False},
    "none": {"position_embedding_type": "none", "num_register_tokens": 0},
    "gated registers": {"num_gated_registers": 2},
    "test-time registers": {"num_test_time_registers": 1, "register_neurons": {1: [0, 5], 2: [7]}},
}
# The second has the size of the position table; a square one first would tie height and width together.
SHAPES = [(2, 3, 48, 40), (3, 3, 32, 32), (4, 3, 24, 80)]


@pytest.fixture(params=ARCHITECTURES, ids=str)
def model(request, tiny, randomise):
    torch.manual_seed(0)
    torch._dynamo.reset()
    return randomise(ViTWithRegistersModel(tiny(**ARCHITECTURES[request.param])))


@pytest.fixture
def dynamic_shapes():
    """Any batch, any multiple of the patch size of 8 pixels."""
    rows, columns = Dim("rows", min=2, max=64), Dim("columns", min=2, max=64)
    return {"pixel_values": {0: Dim("batch", min=1, max=64), 2: 8 * rows, 3: 8 * columns}}


def _assert_same(traced, model):
    for shape in SHAPES:
        images = torch.randn(shape)
        with torch.no_grad():
            output, expected = traced(images), model(images)
        for name in ("last_hidden_state", "pooler_output", "patch_grid"):
            torch.testing.assert_close(output[name], expected[name], rtol=0, atol=1e-5)


def test_one_full_graph_serves_every_image_size(model):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    _assert_same(compiled, model)
    assert len(graphs) == 1


def test_hidden_states_and_attentions_compile_from_cold(tiny):
    torch._dynamo.reset()
    model = ViTWithRegistersModel(tiny()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = torch.randn(1, 3, 32, 32)
    output = compiled(images, output_hidden_states=True, output_attentions=True, output_pre_norm=True)
    assert len(output.hidden_states) == 4
    assert output.attentions[0].shape == (1, 2, 21, 21)


def test_compiled_training_has_the_gradients_of_eager(tiny):
    torch._dynamo.reset()
    model = ViTWithRegistersModel(tiny())
    images = torch.randn(2, 3, 40, 32)
    model(images).patch_tokens.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(images).patch_tokens.square().sum().backward()
    for name, gradient in expected.items():
        actual = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-4)


HEADS = {
    ViTWithRegistersForImageClassification: {"labels": torch.tensor([0, 2])},
    ViTWithRegistersForMaskedImageModeling: {"bool_masked_pos": torch.arange(40).view(2, 20) % 3 == 0},
    ViTWithRegistersForSemanticSegmentation: {"labels": torch.arange(2560).view(2, 40, 32) % 3},
    ViTWithRegistersForDepthEstimation: {"labels": torch.arange(2560.0).view(2, 40, 32) / 500},
}


@pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
def test_the_loss_of_every_head_compiles_as_a_full_graph(tiny, randomise, cls):
    torch._dynamo.reset()
    model, images = randomise(cls(tiny(num_labels=3, out_indices=[1]))), torch.randn(2, 3, 40, 32)
    loss = torch.compile(model, fullgraph=True, backend="eager")(images, **HEADS[cls]).loss
    torch.testing.assert_close(loss, model(images, **HEADS[cls]).loss)


def test_an_exported_program_serves_every_image_size(model, dynamic_shapes):
    program = torch.export.export(model, (torch.randn(2, 3, 48, 40),), dynamic_shapes=dynamic_shapes)
    _assert_same(program.module(), model)


def test_an_onnx_file_serves_every_image_size(model, dynamic_shapes, tmp_path):
    import onnxruntime

    names = ["last_hidden_state", "pooler_output"]
    program = torch.onnx.export(
        model,
        (torch.randn(2, 3, 48, 40),),
        dynamo=True,
        dynamic_shapes=dynamic_shapes,
        input_names=["pixel_values"],
        output_names=names,
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in SHAPES:
        images = torch.randn(shape)
        with torch.no_grad():
            expected = model(images)
        for name, output in zip(names, session.run(names, {"pixel_values": images.numpy()})):
            torch.testing.assert_close(torch.from_numpy(output), expected[name], rtol=0, atol=1e-5)


def test_a_head_exports_with_open_sizes(tiny, randomise, dynamic_shapes):
    model = randomise(ViTWithRegistersForDepthEstimation(tiny(out_indices=[1, 3])))
    program = torch.export.export(model, (torch.randn(2, 3, 48, 40),), dynamic_shapes=dynamic_shapes)
    for shape in SHAPES:
        images = torch.randn(shape)
        depth = program.module()(images).predicted_depth
        torch.testing.assert_close(depth, model(images).predicted_depth, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated")
@pytest.mark.parametrize("size", [(32, 32), (48, 40)], ids=str)
def test_a_trace_serves_every_image_size(model, size):
    # The oldest exporters, `SummaryWriter.add_graph` and counters of FLOPs trace.
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(2, 3, *size), strict=False, check_trace=False)
    _assert_same(traced, model)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated")
@pytest.mark.parametrize("cls", AUTO_MODELS, ids=lambda cls: cls.__name__)
def test_every_head_is_traced(tiny, randomise, cls):
    model, images = randomise(cls(tiny())), torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        traced = torch.jit.trace(model, images, strict=False, check_trace=False)(images)
        for name, value in model(images).items():
            for found, expected in zip(*((v if isinstance(v, tuple) else (v,)) for v in (traced[name], value))):
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [(32, 32), (48, 40)], ids=str)
def test_an_ensemble_runs_under_vmap(model, randomise, size):
    if model.config.register_neurons:
        pytest.skip("vmap assigns to no indices that are stacked; other forms of this line do not export in torch 2.8")
    members = [model, randomise(ViTWithRegistersModel(model.config))]
    images = torch.randn(2, 3, *size)

    def run(weights, buffers):
        return functional_call(model, (weights, buffers), (images,)).last_hidden_state

    with torch.no_grad():
        found = vmap(run)(*stack_module_state(members))
        torch.testing.assert_close(found, torch.stack([member(images).last_hidden_state for member in members]))


@pytest.mark.parametrize("cls", AUTO_MODELS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("size", [(32, 32), (48, 40)], ids=str)
def test_a_dry_run_gives_shapes_and_leaves_nothing_behind(model, cls, size):
    model = cls(model.config).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(images)
        mode = FakeTensorMode()
        tensors = model.state_dict(keep_vars=True) | dict(model.named_buffers())  # those that are not saved too
        state = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        with mode:
            fake = functional_call(model, state, (torch.randn(2, 3, *size),))
        shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
        meta = functional_call(model, shapes, (images.to("meta"),))
        again = model(images)
    for name, value in expected.items():
        for parts in zip(*(v if isinstance(v, tuple) else (v,) for v in (value, fake[name], meta[name], again[name]))):
            assert len({part.shape for part in parts}) == 1
            assert torch.equal(parts[0], parts[3])
