"""Images and texts in one space: beside transformers' dual encoder and open_clip's loss, and from a bare folder."""

import json
import pathlib

import pytest
import torch
import transformers
from open_clip.loss import ClipLoss
from safetensors.torch import load_file, save_file
from test_remote_code import run_without_the_package
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    BertConfig,
    CLIPTextConfig,
    CLIPTextModel,
    DistilBertConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    pipeline,
)

from modeling_vitreg import (
    ViTWithRegistersDualEncoderConfig,
    ViTWithRegistersDualEncoderModel,
    ViTWithRegistersDualEncoderOutput,
    ViTWithRegistersModel,
)
from modeling_vitreg.dual_encoder_vitreg import matching_loss
from modeling_vitreg.pretraining.objectives.clip import CLIPSettings, make_tokenizer, save_tokenizer


WORDS = ("a", "ball", "blue", "cube", "photo", "red")
SIZES = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT_TOWERS = {
    "clip": CLIPTextConfig(
        vocab_size=10, max_position_embeddings=12, bos_token_id=1, eos_token_id=3, pad_token_id=0, **SIZES
    ),
    "bert": BertConfig(vocab_size=10, max_position_embeddings=12, pad_token_id=0, **SIZES),
}
PARTS = ("configuration", "image_processing", "positions", "token_reduction", "modeling", "dual_encoder")
CODE = {f"{name}_vitreg.py" for name in PARTS}
PAIRS = {
    "input_ids": torch.tensor([[1, 4, 9, 5, 3], [1, 6, 7, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
    "pixel_values": torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)),
}


@pytest.fixture
def make(tiny, randomise):
    """A dual encoder in which every parameter has a random value."""

    def build(text="clip", **settings) -> ViTWithRegistersDualEncoderModel:
        config = ViTWithRegistersDualEncoderConfig(tiny(**settings), TEXT_TOWERS[text], projection_dim=16)
        return randomise(ViTWithRegistersDualEncoderModel(config))

    return build


def write(model: ViTWithRegistersDualEncoderModel, folder: pathlib.Path) -> pathlib.Path:
    """Save a model with its tokenizer."""
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: pathlib.Path) -> None:
    """Save one of ten words, as many as the text towers have."""
    save_tokenizer(make_tokenizer(CLIPSettings(words=WORDS, num_tokens=12)), folder)


@pytest.mark.parametrize("text", TEXT_TOWERS)
def test_outputs_loss_and_gradients_are_those_of_transformers_with_the_same_weights(make, text):
    if text == "clip" and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 gives CLIP's text tower token_type_ids, which it refuses")
    ours = make(text)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ours.config.vision_config, ours.config.text_config, projection_dim=16
    )
    theirs = VisionTextDualEncoderModel(config).eval()
    theirs.load_state_dict(ours.state_dict())
    found, expected = (model(**PAIRS, return_loss=True) for model in (ours, theirs))
    for name in ("loss", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        torch.testing.assert_close(found[name], expected[name], msg=name)
    assert found.logits_per_image.shape == (2, 2) and list(found) == list(expected)
    found.loss.backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert len(gradients) > 60
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.get(name), msg=name)


def test_the_loss_is_that_of_open_clip(make):
    model = make()
    output = model(**PAIRS, return_loss=True)
    expected = ClipLoss()(output.image_embeds, output.text_embeds, model.logit_scale.exp())
    torch.testing.assert_close(output.loss, expected)
    assert model(**PAIRS).loss is None


def test_the_loss_over_no_pair_is_zero_with_a_gradient():
    logits = torch.empty(0, 0, requires_grad=True)
    loss = matching_loss(logits)
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 0)


def test_features_are_the_embeddings_before_their_length_is_taken_away(make):
    model = make()
    output, texts = model(**PAIRS), {name: PAIRS[name] for name in ("input_ids", "attention_mask")}
    images, texts = model.get_image_features(PAIRS["pixel_values"]), model.get_text_features(**texts)
    torch.testing.assert_close(torch.nn.functional.normalize(images, dim=-1), output.image_embeds)
    torch.testing.assert_close(torch.nn.functional.normalize(texts, dim=-1), output.text_embeds)
    assert images.norm(dim=-1).min().item() > 1.1


def test_the_outputs_of_both_towers_come_along(make):
    model = make()
    output = model(**PAIRS, output_hidden_states=True)
    assert output.vision_model_output.patch_grid.shape == (2, 4, 6, 32)
    assert len(output.vision_model_output.hidden_states) == 4 and len(output.text_model_output.hidden_states) == 3
    values = model(**PAIRS, return_dict=False)
    assert [type(value) for value in values[-2:]] == [tuple, tuple]
    assert torch.equal(values[0], output.logits_per_image) and isinstance(output, ViTWithRegistersDualEncoderOutput)


def test_towers_that_are_given_keep_their_weights_and_their_owner_his_configurations(tiny, randomise, tmp_path):
    towers = [randomise(ViTWithRegistersModel(tiny())), randomise(CLIPTextModel(TEXT_TOWERS["clip"]))]
    loaded = []
    for tower in towers:
        tower.save_pretrained(tmp_path / type(tower).__name__)
        loaded.append(type(tower).from_pretrained(tmp_path / type(tower).__name__))
    for image, text in (loaded, towers):
        before = [tower.config.to_dict() for tower in (image, text)]
        config = ViTWithRegistersDualEncoderConfig(image.config, text.config)
        assert [tower.config.to_dict() for tower in (image, text)] == before
        expected = [{name: value.clone() for name, value in tower.state_dict().items()} for tower in (image, text)]
        model = ViTWithRegistersDualEncoderModel(config, vision_model=image, text_model=text)
        for tower, weights in zip((model.vision_model, model.text_model), expected):
            weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
            assert all(torch.equal(value, weights[name]) for name, value in tower.state_dict().items())
    model.save_pretrained(tmp_path / "dual")
    assert str(tmp_path) not in (tmp_path / "dual" / "config.json").read_text()


@pytest.mark.parametrize("name", ["visual_projection.weight", "text_projection.weight", "logit_scale"])
def test_what_a_checkpoint_lacks_starts_anew_and_the_rest_survives(make, tmp_path, name):
    model = make()
    model.save_pretrained(tmp_path)
    # Cloned, for older versions read lazily, and the file is written anew.
    weights = {kept: value.clone() for kept, value in load_file(tmp_path / "model.safetensors").items()}
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = ViTWithRegistersDualEncoderModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[kept], value) for kept, value in weights.items())
    if name == "logit_scale":
        assert again[name].item() == pytest.approx(2.6592)
    else:
        assert again[name].std().item() == pytest.approx(0.02, rel=0.2)


def test_a_folder_is_flat_complete_and_lists_every_auto_class(make, tmp_path):
    folder = write(make(), tmp_path)
    texts = {"tokenizer.json", "tokenizer_config.json"}
    texts |= {path.name for path in folder.glob("special_tokens_map.json")}  # transformers 4 writes it too
    assert {path.name for path in folder.iterdir()} == CODE | texts | {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    model = "dual_encoder_vitreg.ViTWithRegistersDualEncoderModel"
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "dual_encoder_vitreg.ViTWithRegistersDualEncoderConfig",
        "AutoModel": model,
        "AutoModelForZeroShotImageClassification": model,
    }


def test_every_field_of_both_towers_comes_back(make, tmp_path):
    # A width of the MLP that is the default of another width, and a table that is not: none may be left out as usual.
    model = make(intermediate_size=3072, masked_target_size=768, position_embedding_type="rope", num_register_tokens=2)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for name in ("vision_config", "text_config"):
        found, expected = (getattr(each, name).to_dict() for each in (config, model.config))
        assert {key for key in expected if found[key] != expected[key]} <= {"dtype", "architectures"}


@pytest.mark.parametrize("loader", [AutoModel, AutoModelForZeroShotImageClassification])
def test_the_auto_classes_know_it_where_the_package_is_imported(make, tmp_path, loader):
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    again = loader.from_pretrained(tmp_path)
    assert type(again) is ViTWithRegistersDualEncoderModel and len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(again(**PAIRS).logits_per_image, model(**PAIRS).logits_per_image)


def test_a_new_process_without_the_package_gives_the_same_numbers_and_classifies(make, tmp_path, photograph):
    models = {text: write(make(text), tmp_path / text) for text in TEXT_TOWERS}
    save_file(PAIRS, tmp_path / "pairs.safetensors")
    photograph.resize((64, 48)).save(tmp_path / "photograph.png")
    run = run_without_the_package(
        """
        import json
        from safetensors.torch import load_file, save_file

        pairs, logits, features = load_file("pairs.safetensors"), {}, {}
        for text in ("clip", "bert"):
            model = transformers.AutoModel.from_pretrained(text, trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules."), type(model)
            same = transformers.AutoModelForZeroShotImageClassification.from_pretrained(text, trust_remote_code=True)
            with torch.no_grad():
                logits[text] = model(**pairs).logits_per_image.contiguous()
                assert torch.equal(same(**pairs).logits_per_image, logits[text])
        save_file(logits, "logits.safetensors")
        classify = transformers.pipeline("zero-shot-image-classification", model="clip", trust_remote_code=True)
        found = classify("photograph.png", candidate_labels=["red ball", "blue cube"])
        json.dump(found, open("found.json", "w"))
        """,
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    logits = load_file(tmp_path / "logits.safetensors")
    for text, folder in models.items():
        model = AutoModel.from_pretrained(folder)
        assert torch.equal(model(**PAIRS).logits_per_image, logits[text])
    classify = pipeline("zero-shot-image-classification", model=str(models["clip"]))
    expected = classify(str(tmp_path / "photograph.png"), candidate_labels=["red ball", "blue cube"])
    assert isinstance(classify.model, ViTWithRegistersDualEncoderModel)
    assert json.loads((tmp_path / "found.json").read_text()) == expected
    assert sum(entry["score"] for entry in expected) == pytest.approx(1)


def test_a_remote_model_saves_again_with_code_and_processor(make, tmp_path):
    folder = write(make(), tmp_path / "first")
    processor = folder / "preprocessor_config.json"
    processor.write_text(json.dumps(json.loads(processor.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    run = run_without_the_package(
        """
        model = transformers.AutoModel.from_pretrained("first", trust_remote_code=True)
        model.save_pretrained("second")
        """,
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    first, second = (
        {path.name: path.read_text() for path in (tmp_path / name).iterdir() if path.suffix in (".py", ".json")}
        for name in ("first", "second")
    )
    assert {name: first[name] for name in CODE} == {name: second[name] for name in CODE}
    settings = json.loads(second["preprocessor_config.json"])
    assert settings == json.loads(first["preprocessor_config.json"])
    first, second = (json.loads(files["config.json"]) for files in (first, second))
    assert first["auto_map"] == second["auto_map"]
    assert first["vision_config"] == second["vision_config"]
    tower = ViTWithRegistersDualEncoderModel.from_pretrained(folder).vision_model
    assert tower.image_processor_settings()["image_mean"] == [0.1, 0.2, 0.3]


def test_saving_to_the_hub_saves_first_and_then_uploads_everything(make, tmp_path, monkeypatch):
    uploads, folder = [], tmp_path / "name"

    def push(self, *args, **kwargs):
        uploads.append((args, kwargs, (folder / "preprocessor_config.json").exists()))

    monkeypatch.setattr(ViTWithRegistersDualEncoderModel, "push_to_hub", push)
    make().save_pretrained(folder, push_to_hub=True, private=True, token="t")
    assert uploads == [(("name",), {"private": True, "token": "t"}, True)]


def test_the_attention_of_both_towers_is_chosen_and_switched_together(make, tmp_path):
    make().save_pretrained(tmp_path)
    outputs = []
    for name in ("eager", "sdpa"):
        model = ViTWithRegistersDualEncoderModel.from_pretrained(tmp_path, attn_implementation=name)
        outputs.append(model(**PAIRS).logits_per_image)
        model.set_attn_implementation("eager")
        for tower in (model.vision_model, model.text_model):
            assert tower.config._attn_implementation == "eager"
        outputs.append(model(**PAIRS).logits_per_image)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[3])
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-5, atol=1e-4)


def test_bfloat16_is_loaded_in_both_towers_and_saved(make, tmp_path):
    make().save_pretrained(tmp_path / "exact")
    model = ViTWithRegistersDualEncoderModel.from_pretrained(tmp_path / "exact", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "rounded")
    again = AutoModel.from_pretrained(tmp_path / "rounded", dtype="auto")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again(**PAIRS).logits_per_text, model(**PAIRS).logits_per_text)


def test_checkpointing_of_activations_changes_no_gradient(make):
    gradients = []
    for is_on in (False, True):
        model = make().train()
        if is_on:
            model.gradient_checkpointing_enable()
        calls = []
        for layers in (model.vision_model.layers, model.text_model.encoder.layers):
            layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(0)
        model(**PAIRS, return_loss=True).loss.backward()
        assert len(calls) == (4 if is_on else 2)
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_what_is_missing_is_said_with_what_to_do(make, tiny):
    model, texts = make(), torch.tensor([[1, 4, 3]])
    with pytest.raises(ValueError, match="got no pixel_values: for one of them alone use get_text_features"):
        model(input_ids=texts)
    with pytest.raises(ValueError, match="got no input_ids"):
        model(pixel_values=PAIRS["pixel_values"])
    with pytest.raises(ValueError, match=r"as many texts as images, in pairs, got logits of shape \(1, 2\)"):
        model(texts, PAIRS["pixel_values"], return_loss=True)
    bare = DistilBertConfig(vocab_size=10, dim=24, hidden_dim=48, n_layers=1, n_heads=2, max_position_embeddings=12)
    model = ViTWithRegistersDualEncoderModel(ViTWithRegistersDualEncoderConfig(tiny(), bare))
    with pytest.raises(ValueError, match="pooled vector, `pooler_output`, got DistilBertModel: use another one"):
        model.get_text_features(texts)
    with pytest.raises(ValueError, match="nothing_known"):
        ViTWithRegistersDualEncoderConfig(tiny(), {"model_type": "nothing_known"})


def test_the_defaults_are_those_of_the_base_model_of_clip():
    config = ViTWithRegistersDualEncoderConfig()
    assert (config.vision_config.hidden_size, config.vision_config.patch_size, config.projection_dim) == (768, 16, 512)
    assert (config.text_config.model_type, config.text_config.hidden_size) == ("clip_text_model", 512)
