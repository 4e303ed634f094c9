"""Half precision against float32, quantisation, gradient checkpointing, and large-model loading."""

import copy
import io

import pytest
import torch
from torch import nn

from modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.modeling_vitreg import AUTO_MODELS
from modeling_vitreg.positions_vitreg import rotary_tables, rotate


PARTIAL_BIASES = [
    {"has_key_bias": False},
    {"has_query_bias": False, "has_key_bias": False},
    {"has_value_bias": False},
    {"has_query_bias": False, "has_key_bias": False, "has_value_bias": False},
]
HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rotation_in_half_precision_is_the_float32_rotation_rounded_once(tiny, dtype):
    config = tiny(hidden_size=128, position_embedding_type="rope")
    rotary = rotary_tables(config, (32, 32), training=False, device="cpu")
    query = torch.randn(1, 2, 1024 + 5, 64).to(dtype)
    exact = rotate(query.float(), rotary)
    assert torch.equal(rotate(query, rotary), exact.to(dtype))
    cos, sin = (table.to(dtype) for table in rotary)
    first, second = query.chunk(2, dim=-1)
    in_half = query * cos + torch.cat([-second, first], dim=-1) * sin  # as transformers rotates
    ours = (rotate(query, rotary).float() - exact).abs().mean()
    assert (in_half.float() - exact).abs().mean() > 1.4 * ours


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_norm_in_half_precision_is_the_float32_norm_rounded_once(tiny, dtype):
    norm = ViTWithRegistersModel(tiny()).layernorm
    tokens = (100 + torch.randn(2, 5, 32)).to(dtype)  # a large mean, which half precision sums would lose
    expected = norm(tokens.float()).to(dtype)
    torch.testing.assert_close(norm.to(dtype)(tokens), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_half_precision_stays_within_its_rounding_of_float32(tiny, dtype, position):
    model = ViTWithRegistersModel(tiny(position_embedding_type=position, initializer_range=0.1)).eval()
    images = torch.randn(2, 3, 48, 32)
    exact = model(images).last_hidden_state
    half = model.to(dtype)(images)
    assert half.last_hidden_state.dtype == dtype
    error = (half.last_hidden_state.float() - exact).norm() / exact.norm()
    assert error < 8 * torch.finfo(dtype).eps  # about ten roundings in sequence for three layers


@pytest.mark.parametrize("position", ["learned", "sincos", "rope", "none"])
def test_a_model_loaded_in_half_precision_computes_in_it(tiny, position, tmp_path):
    ViTWithRegistersModel(tiny(position_embedding_type=position)).save_pretrained(tmp_path)
    model = ViTWithRegistersModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    states = model(torch.randn(1, 3, 48, 32), output_hidden_states=True).hidden_states
    assert {state.dtype for state in states} == {torch.bfloat16}


@pytest.mark.parametrize("position", ["learned", "sincos", "rope", "none"])
def test_autocast_keeps_the_residual_stream_in_float32(tiny, position):
    model = ViTWithRegistersModel(tiny(position_embedding_type=position)).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model(torch.randn(1, 3, 32, 32), output_hidden_states=True).hidden_states
    assert {state.dtype for state in states} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("biases", [{}, *PARTIAL_BIASES], ids=str)
def test_quantisation_of_linear_layers_reaches_all_of_them(tiny, randomise, biases):
    for cls in AUTO_MODELS:
        model = randomise(cls(tiny(num_labels=3, projection_size=8, **biases)))
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        # What replaces exactly nn.Linear passes over its subclasses without a word.
        assert {type(model.get_submodule(name)) for name in linear} == {nn.Linear}
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert not [name for name in linear if isinstance(quantised.get_submodule(name), nn.Linear)]
        images = torch.randn(2, 3, 32, 32)
        assert quantised(images)[0] is not None


@pytest.mark.parametrize("biases", PARTIAL_BIASES[:3], ids=str)
def test_a_bias_that_the_architecture_lacks_counts_nowhere(tiny, randomise, tmp_path, biases):
    # Whatever its values are, and however the layer was copied, stored, offloaded or adapted.
    from peft import LoraConfig, get_peft_model

    model = randomise(ViTWithRegistersModel(tiny(**biases)))
    model.save_pretrained(tmp_path)
    cleared, stored = copy.deepcopy(model), io.BytesIO()
    for layer in cleared.layers:
        for name, part in zip(("has_query_bias", "has_key_bias", "has_value_bias"), layer.attention.qkv.bias.chunk(3)):
            part.data.mul_(biases.get(name, True))
    torch.save(model, stored)
    stored.seek(0)
    device_map = {"embeddings": "cpu", "pre_layernorm": "cpu", "layernorm": "cpu", "layers": "disk"}
    others = {
        "copied": copy.deepcopy(model),
        "stored": torch.load(stored, weights_only=False),
        "loaded": ViTWithRegistersModel.from_pretrained(tmp_path),
        "offloaded": ViTWithRegistersModel.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
        ),
        "adapted": get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["qkv"])),
    }
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = cleared(images).last_hidden_state
        for name, other in {"itself": model, **others}.items():
            assert torch.equal(other.eval()(images).last_hidden_state, expected), name
        for name in ("copied", "stored"):  # with weights of their own
            others[name].layers[0].attention.qkv.weight.zero_()
            assert not torch.equal(others[name](images).last_hidden_state, expected), name
        assert torch.equal(model(images).last_hidden_state, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tiny, use_reentrant):
    model = ViTWithRegistersForImageClassification(tiny(num_labels=3)).train()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])

    def gradients():
        model.zero_grad()
        model(images, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    calls = []
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.vitreg.layers[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients()
    assert len(calls) == 2  # forward, and again in the backward pass
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-6)


def test_a_sharded_folder_loads_across_devices(tiny, tmp_path):
    model = ViTWithRegistersForImageClassification(tiny()).eval()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    images = torch.randn(1, 3, 32, 32)
    # Layers on disk, the rest in memory: the map that a machine too small for the model gets.
    device_map = {"vitreg.embeddings": "cpu", "vitreg.pre_layernorm": "cpu", "vitreg.layernorm": "cpu"}
    device_map |= {"vitreg.layers.0": "cpu", "vitreg.layers.1": "disk", "vitreg.layers.2": "disk", "classifier": "cpu"}
    loaded = ViTWithRegistersForImageClassification.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(loaded(images).logits, model(images).logits)
    automatic = ViTWithRegistersForImageClassification.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(automatic(images).logits, model(images).logits)


def test_lora_trains_attention_and_registers_and_nothing_else(tiny, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = ViTWithRegistersForImageClassification(tiny(num_labels=3))
    base.save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=["qkv", "proj"], modules_to_save=["register_tokens", "classifier"])
    model = get_peft_model(base, settings)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "register_tokens" in name or "classifier" in name for name in trained)
    assert sum("lora_A" in name for name in trained) == 2 * 3  # qkv and proj of three layers
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    registers = base.vitreg.embeddings.register_tokens
    before = registers.weight.detach().clone()
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
    assert (registers.weight != before).all(dim=1).all()
    model.save_pretrained(tmp_path / "adapter")
    fresh = ViTWithRegistersForImageClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(images).logits, model.eval()(images).logits)


def test_weights_survive_a_partial_checkpoint_and_missing_ones_are_initialised(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    model = ViTWithRegistersModel(tiny(layer_scale_init_value=0.1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(5.0)
    model.save_pretrained(tmp_path)
    # Cloned, for older versions read lazily, and the file is written anew.
    saved = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    for missing in ("embeddings.register_tokens.weight", "layers.1.norm1.bias", "layers.0.attention.qkv.weight"):
        save_file({k: v for k, v in saved.items() if k != missing}, tmp_path / "model.safetensors", {"format": "pt"})
        state = ViTWithRegistersModel.from_pretrained(tmp_path).state_dict()
        assert all((tensor == 5).all() for name, tensor in state.items() if name != missing)
        assert state[missing].abs().max() < 0.2
        assert isinstance(model.layernorm, nn.LayerNorm)
