"""Graphs: `torch.compile`, `torch.export` and ONNX, with batch, height and width left open."""

import pytest
import torch
from torch.export import Dim

from modeling_vitreg import ViTWithRegistersForDepthEstimation, ViTWithRegistersModel


ARCHITECTURES = {
    "learned, antialias": {},
    "learned, offset": {"interpolate_antialias": False, "interpolate_offset": 0.1},
    "sincos": {"position_embedding_type": "sincos", "has_cls_token": False, "pooling": "mean"},
    "rope": {"position_embedding_type": "rope", "hidden_act": "swiglu", "has_key_bias": False},
    "none": {"position_embedding_type": "none", "num_register_tokens": 0},
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
