"""Grey images and images with alpha, through the loader, every objective and the training programs."""

import json
import pathlib

import datasets
import numpy as np
import pytest
import torch
import training_program
import yaml
from colored_views import ColoredCrop
from PIL import Image

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.features import load_encoder
from modeling_vitreg.images import DataOptions, ImageSource
from modeling_vitreg.pretraining.build import make_config, make_objective
from modeling_vitreg.pretraining.run.recipe import make_recipe
from modeling_vitreg.pretraining.views.crops import CropSettings, MultiCrop
from modeling_vitreg.pretraining.views.loader import ViewLoader
from modeling_vitreg.pretraining.views.masking import MaskMaker


ROOT = pathlib.Path(__file__).parents[2]
RUNS = json.loads((ROOT / "tests" / "golden" / "losses.json").read_text())["runs"]
COLOURS = {"flip": 0.5, "color_jitter_probability": 1.0, "gray": 0.5, "blur": (1.0, 0.5, 0.5), "solarize": 0.5}
ONE_VIEW = {"num_global": 1, "num_local": 0, "global_size": 32}


def _cells(*channels: int) -> np.ndarray:
    cells = np.random.default_rng(0).integers(0, 256, (6, 6, *channels), dtype=np.uint8)
    return cells.repeat(8, axis=0).repeat(8, axis=1)


def _views(settings: CropSettings, image: Image.Image, num_channels: int) -> torch.Tensor:
    torch.manual_seed(3)
    return ColoredCrop(settings, num_channels=num_channels)(image)["global_views"]


@pytest.mark.parametrize("cut", ["resized", "simple", "zoomed"])
@pytest.mark.parametrize("colours", ["dino", "three", "random", "none"])
def test_a_grey_view_is_a_channel_of_the_colour_view_of_the_same_image(cut, colours):
    settings = CropSettings(
        num_global=4, num_local=0, global_size=32, zoom=(1.0, 2.0), cut=cut, color_augmentation=colours, **COLOURS
    )
    image = Image.fromarray(_cells())
    grey, colour = _views(settings, image, 1), _views(settings, image.convert("RGB"), 3)
    assert grey.shape == (4, 1, 32, 32)
    # Conversions between colour spaces round; nothing else differs.
    assert (grey.int() - colour[:, :1].int()).abs().max() <= 1


@pytest.mark.parametrize("cut", ["resized", "simple", "zoomed"])
@pytest.mark.parametrize("colours", ["dino", "three", "none"])
def test_alpha_is_cut_with_the_colours_and_keeps_its_values(cut, colours):
    image = _cells(3)
    with_alpha = Image.fromarray(np.dstack([image, image[..., 0]]))
    settings = CropSettings(**ONE_VIEW, zoom=(1.0, 2.0), cut=cut, color_augmentation=colours, **COLOURS)
    found, expected = _views(settings, with_alpha, 4), _views(settings, Image.fromarray(image), 3)
    assert torch.equal(found[:, :3], expected)
    plain = CropSettings(**ONE_VIEW, zoom=(1.0, 2.0), cut=cut, color_augmentation="none", flip=0.5)
    assert torch.equal(found[:, 3], _views(plain, with_alpha, 4)[:, 0])


@pytest.mark.parametrize(("num_channels", "colour"), [(1, [116]), (3, [124, 116, 104]), (4, [124, 116, 104, 0])])
def test_a_view_beyond_the_image_is_grey_and_transparent(num_channels, colour):
    settings = CropSettings(**ONE_VIEW, cut="zoomed", zoom=(0.5, 0.5), color_augmentation="none")
    (view,) = _views(settings, Image.fromarray(_cells(4)), num_channels)
    assert view[:, 0, 0].tolist() == colour


@pytest.mark.parametrize("num_channels", [1, 4])
def test_maps_are_cut_with_an_image_of_any_channels(num_channels):
    image = Image.fromarray(np.dstack([_cells(3), _cells()]) if num_channels == 4 else _cells())
    settings = CropSettings(**ONE_VIEW, color_augmentation="none", cut="zoomed")
    views = MultiCrop(settings, num_channels=num_channels)(image, mask=_cells().astype(np.int32) // 200)
    assert views["global_views"].shape == (1, num_channels, 32, 32)
    assert views["semantic_masks"].shape == (1, 32, 32)


def test_operations_that_move_pixels_are_refused_where_alpha_would_not_follow(tiny):
    recipe = make_recipe(RUNS["mae"]["recipe"]).with_changes(
        {"model.num_channels": 4, "crops.color_augmentation": "random"}
    )
    with pytest.raises(ValueError, match=r"color_augmentation=random also moves pixels.*expected dino, three or none"):
        make_objective(recipe)


@pytest.mark.parametrize(
    ("values", "num_channels", "expected"),
    [
        ([0.2, 0.4, 0.6], 1, [0.4]),
        ([0.2, 0.4, 0.6], 3, [0.2, 0.4, 0.6]),
        ([0.2, 0.4, 0.6], 4, [0.2, 0.4, 0.6, 0.4]),
        ([0.5], 4, [0.5] * 4),
        ([0.1, 0.2, 0.3, 0.4], 4, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_statistics_have_a_value_for_each_channel(values, num_channels, expected):
    recipe = make_recipe({**RUNS["mae"]["recipe"], "mean": values, "std": values})
    assert recipe.statistics(num_channels)["std"] == pytest.approx(expected)
    assert make_recipe(recipe.as_dict()) == recipe


@pytest.mark.parametrize("wrong", [[0.1, 0.2], [0.1] * 4])
def test_statistics_of_other_channels_are_refused_with_the_name(wrong):
    recipe = make_recipe({**RUNS["mae"]["recipe"], "mean": wrong})
    with pytest.raises(ValueError, match="recipe: mean: expected one value, or one for each of the 3 channels"):
        make_config(recipe)


@pytest.mark.parametrize("wrong", [[], ["a"], [float("nan")], [True], None])
def test_statistics_are_numbers(wrong):
    with pytest.raises(ValueError, match=r"recipe: std: expected finite numbers"):
        make_recipe({**RUNS["mae"]["recipe"], "std": wrong})


@pytest.mark.parametrize("count", [2, 5])
def test_channels_that_no_image_file_has_are_refused(count):
    recipe = make_recipe(RUNS["mae"]["recipe"]).with_changes({"model.num_channels": count})
    with pytest.raises(ValueError, match=f"{count} channels, but image files have 1"):
        make_config(recipe)


def _save_teachers(folder: pathlib.Path, num_channels: int) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = ViTWithRegistersConfig(**sizes, num_channels=num_channels)
    model = ViTWithRegistersModel(config)
    model.save_pretrained(folder / "teacher")
    processor = folder / "teacher" / "preprocessor_config.json"
    statistics = make_recipe(RUNS["distill"]["recipe"]).statistics(num_channels)
    found = {f"image_{name}": list(values) for name, values in statistics.items()}
    processor.write_text(json.dumps(json.loads(processor.read_text()) | found))


@pytest.mark.parametrize("num_channels", [1, 4])
@pytest.mark.parametrize("name", [name for name in RUNS if not name.endswith(("probe", "lora"))])
def test_every_objective_trains_a_model_of_other_channels(tmp_path, name, num_channels):
    _save_teachers(tmp_path, num_channels)
    values = json.loads(json.dumps(RUNS[name]["recipe"]).replace("TEACHER", str(tmp_path / "teacher")))
    recipe = make_recipe(values).with_changes({"model.num_channels": num_channels})
    objective = make_objective(recipe).train()
    pixels = np.dstack([_cells(3), 255 - _cells()])
    image = Image.fromarray(pixels if num_channels == 4 else pixels[..., 0])
    columns = {
        "image": [image] * 4,
        "label": [0, 1, 2, 0],
        "mask": [Image.fromarray(_cells() // 100)] * 4,
        "depth": [Image.fromarray(_cells() // 40 + 1)] * 4,
        "caption": ["a red ball"] * 4,
    }
    kinds = {"text": "text_column", "mask": "mask_column", "depth": "depth_column"}
    column = "caption" if objective.annotation == "text" else objective.annotation
    options = DataOptions(**({kinds[objective.annotation]: column} if objective.annotation in kinds else {}))
    grid = tuple(objective.crops.global_size // side for side in objective.encoder.config.patch_shape)
    masks = objective.masks
    dataset = datasets.Dataset.from_dict(columns).cast_column("label", datasets.Value("int64"))
    loader = ViewLoader(
        ImageSource(dataset, options=options),
        num_channels=num_channels,
        make_views=objective.make_views,
        make_masks=masks and MaskMaker(num_views=objective.crops.num_global, grid=grid, settings=masks),
        make_text=objective.make_text,
        micro_batch_size=4,
        seed=0,
    )
    batch = next(iter(loader))
    assert batch["global_views"].shape[2] == num_channels
    batch = objective.to_device(batch, device=torch.device("cpu"), **recipe.statistics(num_channels))
    loss = objective(batch, step=0)["total"]
    loss.backward()
    patches = objective.trained["backbone"].embeddings.patch_embeddings
    (weight,) = [parameter for parameter in patches.parameters() if parameter.ndim > 1]
    # Registers that are added to a finished model leave its patch embeddings frozen.
    trained = [weight] if weight.requires_grad else [each for each in objective.parameters() if each.grad is not None]
    assert loss.isfinite() and sum(each.grad.abs().sum() for each in trained) > 0


def test_a_teacher_of_other_channels_is_refused(tmp_path):
    _save_teachers(tmp_path, 3)
    values = json.loads(json.dumps(RUNS["distill"]["recipe"]).replace("TEACHER", str(tmp_path / "teacher")))
    recipe = make_recipe(values).with_changes({"model.num_channels": 1})
    with pytest.raises(ValueError, match="expected a teacher with num_channels 1, that of the student, got 3"):
        make_objective(recipe)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two recipes, and grey photographs with alpha in two class folders."""
    folder = tmp_path_factory.mktemp("channels")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    crops = {"global_size": 16, "num_global": 1, "num_local": 0}
    usual = {"model": sizes, "crops": crops, "num_steps": 4, "batch_size": 4}
    decoder = {"decoder_width": 16, "decoder_layers": 1, "decoder_heads": 2}
    mae = {**usual, "objective": "mae", "settings": decoder}
    mae["masks"] = {"kind": "random", "ratio": [0.75, 0.75], "share": 1}
    (folder / "mae.yaml").write_text(yaml.safe_dump(mae))
    (folder / "classes.yaml").write_text(yaml.safe_dump({**usual, "objective": "classify"}))
    random = np.random.default_rng(0)
    for number in range(12):
        path = folder / "photos" / ("bright" if number % 2 else "dark") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 128, (24, 24, 4), dtype=np.uint8) + 127 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("num_channels", [1, 4])
def test_the_programs_pretrain_and_finetune_a_model_of_other_channels(folder, num_channels):
    pretrained, tuned = f"pretrained-{num_channels}", f"tuned-{num_channels}"
    usual = ("--data", "photos", "--num-eval-images", "6", "--eval-every", "4")
    options = ("--recipe", "mae.yaml", "--set", f"model.num_channels={num_channels}")
    training_program.run("pretrain.py", folder, *usual, *options, output=pretrained, draws=True)
    options = ("--recipe", "classes.yaml", "--init", pretrained)
    training_program.run("finetune.py", folder, *usual, *options, output=tuned)
    model = ViTWithRegistersForImageClassification.from_pretrained(folder / tuned / "model")
    assert model.config.num_channels == num_channels and model.config.num_labels == 2
    for name in (pretrained, tuned):
        encoder = load_encoder(str(folder / name / "model"))
        assert (encoder.num_channels, len(encoder.image_mean)) == (num_channels, num_channels)
        recipe = make_recipe(json.loads((folder / name / "training.json").read_text())["recipe"])
        assert encoder.image_mean == pytest.approx(recipe.statistics(num_channels)["mean"])
    assert (folder / pretrained / "attention.png").exists()
