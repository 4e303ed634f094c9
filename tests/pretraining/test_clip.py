"""CLIP: the loss beside open_clip's, one and two processes, captions to tokens, and the program as one runs it."""

import json
import pathlib

import pytest
import torch
import training_program
import yaml
from datasets import Dataset, Features, Image, Value
from open_clip.loss import ClipLoss
from PIL import Image as PILImage
from training_program import losses_of
from transformers import AutoModel, AutoTokenizer, pipeline
from typer.testing import CliRunner

from modeling_vitreg import ViTWithRegistersDualEncoderModel, ViTWithRegistersModel
from modeling_vitreg.cli import app
from modeling_vitreg.distributed import DistributedContext
from modeling_vitreg.features import load_encoder
from modeling_vitreg.images import DataOptions, ImageSource
from modeling_vitreg.pretraining.build import make_objective
from modeling_vitreg.pretraining.objectives.clip import (
    CLIP,
    LARGEST_SCALE,
    CaptionTokens,
    CLIPSettings,
    contrastive_loss,
    embed_images,
    find_words,
    make_tokenizer,
    save_tokenizer,
)
from modeling_vitreg.pretraining.run.recipe import Recipe
from modeling_vitreg.pretraining.views.crops import CropSettings
from modeling_vitreg.pretraining.views.loader import ViewLoader


ROOT = pathlib.Path(__file__).parents[2]
CAPTIONS = ("A red ball on the grass.", "A blue cube, in front of a wall!", "Sand.")
SMALL = {"text_width": 32, "num_text_layers": 1, "num_text_heads": 2, "num_tokens": 12, "projection_size": 16}
ONE_VIEW = CropSettings(num_global=1, num_local=0, global_size=32)


@pytest.fixture
def make(tiny):
    def build(processes=None, **settings) -> CLIP:
        torch.manual_seed(0)
        return CLIP(
            ViTWithRegistersModel(tiny(initializer_range=0.2)),
            settings=CLIPSettings(**{"words": tuple(find_words(CAPTIONS)), **SMALL, **settings}),
            crops=ONE_VIEW,
            num_steps=10,
            **({"processes": processes} if processes else {}),
        ).train()

    return build


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


def test_the_loss_and_its_gradients_are_those_of_open_clip():
    results = []
    for loss in (contrastive_loss, ClipLoss()):
        images, texts = unit(6, 8).requires_grad_(), unit(6, 8, seed=1).requires_grad_()
        scale = torch.tensor(14.0, requires_grad=True)
        value = loss(images, texts, scale)
        value.backward()
        results.append([value, images.grad, texts.grad, scale.grad])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_the_pairs_of_all_processes_compete():
    images, texts, scale = unit(6, 8), unit(6, 8, seed=1), torch.tensor(5.0)
    whole = contrastive_loss(images, texts, scale)
    rest = iter((images[3:], texts[3:]))
    processes = DistributedContext(rank=0, size=2, all_gather=lambda rows: torch.cat([rows, next(rest)]))
    torch.testing.assert_close(contrastive_loss(images[:3], texts[:3], scale, processes=processes), whole)


def test_captions_are_words_between_a_start_and_an_end():
    tokenizer = make_tokenizer(CLIPSettings(words=tuple(find_words(CAPTIONS)), num_tokens=8))
    assert find_words(CAPTIONS)[:4] == ["a", "ball", "blue", "cube"]
    tokens = CaptionTokens(tokenizer, 8)("A RED ball, unheard of.")
    words = tokenizer.convert_ids_to_tokens(tokens[tokens >= 0].tolist())
    assert words == ["<start>", "a", "red", "ball", "<unknown>", "of", "<end>"] and tokens[-1] == -1
    cut = CaptionTokens(tokenizer, 4)("a red ball on the grass")
    assert tokenizer.convert_ids_to_tokens(cut.tolist()) == ["<start>", "a", "red", "<end>"]


def test_a_saved_tokenizer_has_a_name_that_every_version_of_transformers_knows(tmp_path):
    tokenizer = make_tokenizer(CLIPSettings(words=tuple(find_words(CAPTIONS)), num_tokens=8))
    save_tokenizer(tokenizer, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path)
    expected = tokenizer("a red ball", return_tensors="pt")
    assert again("a red ball")["input_ids"] == expected["input_ids"][0].tolist() and again.model_max_length == 8
    assert list(expected) == list(again("a")) == ["input_ids", "attention_mask"]  # all that CLIP's text tower takes


def test_padding_changes_no_text(make):
    objective = make().eval()
    tokens = objective.make_text("a red ball")
    longer = torch.nn.functional.pad(tokens[tokens >= 0], (0, 3), value=-1)
    shorter = tokens[tokens >= 0]
    torch.testing.assert_close(
        objective.embed_texts(objective.saved, longer[None]), objective.embed_texts(objective.saved, shorter[None])
    )


def test_registers_enter_no_loss_and_learn_through_attention(make):
    objective = make()
    batch = {
        "global_views": torch.randn(1, 3, 3, 32, 32),
        "texts": torch.stack(list(map(objective.make_text, CAPTIONS))),
    }
    losses = objective(batch, step=0)
    losses["total"].backward()
    assert objective.encoder.embeddings.register_tokens.weight.grad.abs().sum() > 0
    assert not [
        name for name, parameter in objective.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    trained = {id(parameter) for part in objective.trained.values() for parameter in part.parameters()}
    assert trained == {id(parameter) for parameter in objective.parameters()}


def test_the_scale_stays_below_its_limit(make):
    objective = make(logit_scale=10.0)
    objective.after_step(step=0)
    assert objective.model.logit_scale.item() == pytest.approx(LARGEST_SCALE)


def test_zero_shot_accuracy_is_that_of_the_nearest_name(make):
    objective = make(class_names=("red ball", "blue cube", "sand")).eval()
    images = torch.randn(20, 3, 32, 32)
    with torch.no_grad():
        prompts = torch.stack(
            [objective.make_text(f"a picture of a {name}.") for name in objective.settings.class_names]
        )
        classes = objective.embed_texts(objective.saved, prompts)
        nearest = (embed_images(objective.saved, images) @ classes.T).argmax(dim=1)
    assert objective.evaluate(objective.saved, images, {"labels": nearest}) == {"zero_shot": 1.0}
    assert objective.evaluate(objective.saved, images, {"labels": (nearest + 1) % 3}) == {"zero_shot": 0.0}


def test_the_loader_brings_the_caption_of_each_image():
    images = [PILImage.new("RGB", (40, 40), (10 * number, 0, 0)) for number in range(6)]
    texts = [["a red ball", "on grass"] if number == 2 else "a red ball" for number in range(6)]
    texts = [" ".join(text) if isinstance(text, list) else text for text in texts]
    features = Features({"image": Image(), "caption": Value("string")})
    dataset = Dataset.from_dict({"image": images, "caption": texts}, features=features)
    source = ImageSource(dataset, options=DataOptions(text_column="caption"))
    assert list(source.texts()) == texts and source.raw(2)["text"] == "a red ball on grass"
    loader = ViewLoader(
        source,
        make_views=lambda image: {"global_views": torch.zeros(1, 3, 2, 2)},
        make_masks=None,
        make_text=lambda text: torch.tensor([len(text)]),
        micro_batch_size=6,
        seed=0,
    )
    batch = next(iter(loader))
    assert sorted(batch["texts"].flatten().tolist()) == sorted(map(len, texts))
    with pytest.raises(ValueError, match="opened without text_column"):
        ImageSource(dataset).texts()
    with pytest.raises(ValueError, match="there is no column 'words'"):
        ImageSource(dataset, options=DataOptions(text_column="words"))


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("classify", {"class_names": ["a", "b"]}),
        ("classify", {"class_names": ["a", "b"], "lora_rank": 2}),
        ("clip", {"words": ["a"], **SMALL}),
        ("simmim", {}),
    ],
)
def test_other_objectives_start_from_the_image_tower_of_a_saved_model(make, tmp_path, objective, settings):
    model = make().model
    model.save_pretrained(tmp_path / "model")
    processor = tmp_path / "model" / "preprocessor_config.json"
    processor.write_text(json.dumps(json.loads(processor.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    recipe = Recipe(objective=objective, model={"drop_path_rate": 0.1}, crops=ONE_VIEW, settings=settings)
    encoder = make_objective(recipe, init=tmp_path / "model").encoder
    weights = {name.replace(".base_layer", ""): value for name, value in encoder.state_dict().items()}
    assert all(torch.equal(weights[name], value) for name, value in model.vision_model.state_dict().items())
    assert encoder.config.drop_path_rate == 0.1 and encoder.image_processor_settings()["image_mean"] == [0.1, 0.2, 0.3]
    assert (encoder.embeddings.mask_token is not None) == (objective == "simmim")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": ()}, "expected words .* or a tokenizer, got neither"),
        ({"prompt": "a picture"}, "in place of the class name"),
    ],
)
def test_settings_out_of_range_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


# The program ---------------------------------------------------------------------------------------------------------

RECIPE = {
    "objective": "clip",
    "model": training_program.MODEL,
    "crops": {"global_size": 32, "num_global": 1, "num_local": 0, "color_augmentation": "none"},
    "settings": {**SMALL, "num_tokens": 40},
    "num_steps": 8,
    "batch_size": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


USUAL = ("--num-scenes", "48", "--num-eval-images", "40")


def run(folder, *options, **settings) -> str:
    return training_program.run("pretrain_clip.py", folder, *USUAL, *options, **settings)


def start(folder, *options, **settings) -> training_program.Program:
    return training_program.start("pretrain_clip.py", folder, *USUAL, *options, **settings)


@pytest.fixture(scope="module")
def whole(folder) -> str:
    return run(folder, output="whole")


def test_a_run_ends_with_a_dual_encoder_for_the_zero_shot_pipeline(folder, whole):
    assert "zero-shot accuracy on" in whole and "from transformers import AutoModel; " in whole
    model = AutoModel.from_pretrained(folder / "whole" / "model")
    assert type(model) is ViTWithRegistersDualEncoderModel and model.vision_model.config.num_register_tokens == 4
    assert AutoTokenizer.from_pretrained(folder / "whole" / "model").model_max_length == 40
    classify = pipeline("zero-shot-image-classification", str(folder / "whole" / "model"))
    found = classify(PILImage.new("RGB", (50, 40)), candidate_labels=["red ball", "blue cube"])
    assert sorted(entry["label"] for entry in found) == ["blue cube", "red ball"]


def test_the_objective_is_the_loss_of_the_model_that_it_saves(make):
    objective = make()
    texts = torch.stack(list(map(objective.make_text, CAPTIONS)))
    images = torch.randn(1, 3, 3, 32, 32)
    loss = objective({"global_views": images, "texts": texts}, step=0)["total"]
    output = objective.model(texts.clamp(min=0), images[0], attention_mask=(texts >= 0).long(), return_loss=True)
    torch.testing.assert_close(loss, output.loss)


def test_a_run_is_evaluated_with_prompts_and_looked_at(folder, whole, monkeypatch):
    monkeypatch.chdir(folder)
    usual = ["--num-images", "8,8", "--output", "report"]
    found = CliRunner().invoke(app, ["evaluate", "whole/model", "scenes", "--tasks", "zero_shot", *usual])
    assert found.exit_code == 0 and "| zero_shot | top1" in found.output and "skipped" not in found.output
    (top1, _) = json.loads((folder / "report" / "evaluation.json").read_text())["results"]
    assert (top1["task"], top1["n"]) == ("zero_shot", 8)
    encoder = load_encoder(folder / "whole" / "model")
    assert (encoder.family, encoder.num_register_tokens, encoder.num_layers) == ("vitreg", 4, 2)


def test_a_killed_run_goes_on_with_the_same_bits(folder, whole):
    training_program.assert_a_killed_run_goes_on("pretrain_clip.py", folder, *USUAL, num_steps=RECIPE["num_steps"])


def test_two_processes_follow_one(folder, whole):
    run(folder, output="two", processes=2)
    torch.testing.assert_close(
        torch.tensor(losses_of(folder / "two")),
        torch.tensor(losses_of(folder / "whole")),
        rtol=1e-3,
        atol=1e-3,
    )


def test_sharding_is_refused_in_words_for_the_scale_is_a_single_number(folder):
    process = start(folder, "--shard", output="sharded", processes=2)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "torch cannot shard model.logit_scale" in err and "leave out --shard" in err
