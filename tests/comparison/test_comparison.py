"""Cost, quality and artifacts of several models in one table: each number by another way, and what is refused."""

import pathlib

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from planted_models import pictures, plain_model, planted_model
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.analysis.histograms import next_edge
from modeling_vitreg.analysis.norms import OUTLIER_MULTIPLE
from modeling_vitreg.analysis.verdict import format_share
from modeling_vitreg.cli import app
from modeling_vitreg.comparison import ComparisonReport, cost, table
from modeling_vitreg.comparison.survivors import FirstImages, Survivors
from modeling_vitreg.encoding import Crop, PassSettings, run_pass
from modeling_vitreg.features import load_encoder
from modeling_vitreg.mamba_vitreg import MambaRConfig, MambaRModel
from modeling_vitreg.memory import MemoryTracker
from modeling_vitreg.names import check_model_name, split_reduction
from modeling_vitreg.reports import read_report


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def _theirs():
    return Dinov2Model(Dinov2Config(**SIZES)).eval()


def _layer_flops(tokens: int, width: int = 32, inner: int = 128, behind: int | None = None) -> int:
    """Two for each product and sum: queries, keys and values; scores and mixing; projection; the MLP of `behind`."""
    attention = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width
    return 2 * (attention + 2 * (behind or tokens) * width * inner)


def test_tokens_and_operations_of_halting_are_those_that_run(tiny, randomise):
    reduction = {"kind": "halt", "scale": 2.0, "center": 1.0}
    model = randomise(ViTWithRegistersModel(tiny(num_register_tokens=2, token_reduction=reduction)))
    images = torch.randn(3, 3, 32, 32)
    depth = model(images).reduction.halting_depth.flatten(1)
    running = [(depth > number).sum(dim=1) + 3 for number in range(3)]
    assert len({tuple(each.tolist()) for each in running}) == 3
    flops, tokens = cost.count_operations(load_encoder(model), images)
    assert tokens == [each.double().mean().item() for each in (*running, running[2])]
    expected = sum(_layer_flops(number) for each in running for number in each.tolist()) / 3
    assert flops == 2 * 16 * 32 * 3 * 64 + expected
    model.config.token_reduction["has_removal"] = False
    assert cost.count_operations(load_encoder(model), images) == (
        2 * 16 * 32 * 3 * 64 + 3 * _layer_flops(19),
        [19] * 4,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_operations_are_those_of_the_formula(tiny, attention):
    images = torch.randn(2, 3, 32, 32)
    embedding = 2 * 16 * 32 * 3 * 64
    ours = ViTWithRegistersModel(tiny(num_register_tokens=2, attn_implementation=attention))
    theirs = _theirs()
    theirs.set_attn_implementation(attention)
    for model, tokens in ((ours, 19), (theirs, 17)):
        flops, counted = cost.count_operations(load_encoder(model), images)
        assert flops == embedding + 3 * _layer_flops(tokens) and counted == [tokens] * 4
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_tokens_and_operations_of_merging_follow_its_schedule(tiny):
    config = tiny(num_register_tokens=2, token_reduction={"kind": "merge", "per_layer": [6, 0, 2]})
    flops, tokens = cost.count_operations(load_encoder(ViTWithRegistersModel(config)), torch.randn(3, 3, 32, 32))
    assert tokens == [19, 13, 13, 11]
    matching = 2 * 16 * (8 * 8 + 5 * 5)  # cosines of even and odd patches, where patches are merged
    layers = _layer_flops(19, behind=13) + _layer_flops(13) + _layer_flops(13, behind=11)
    assert flops == 2 * 16 * 32 * 3 * 64 + layers + matching


@pytest.mark.parametrize(
    ("name", "sizes", "tokens"),
    [
        ("Swin", {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}, 64),
        ("ConvNext", {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2}, 64),
    ],
)
def test_tokens_of_windows_and_maps_are_those_of_the_whole_grid(name, sizes, tokens):
    config = getattr(transformers, f"{name}Config")(image_size=64, patch_size=4, **sizes)
    encoder = load_encoder(getattr(transformers, f"{name}Model")(config))
    _, counted = cost.count_operations(encoder, torch.randn(1, 3, 64, 64))
    assert counted == [tokens] * (encoder.num_layers + 1)


def test_models_take_turns_and_the_first_round_does_not_count(monkeypatch):
    encoders = [load_encoder(plain_model(), name="a"), load_encoder(_theirs(), name="b")]
    order, seconds = [], iter([9.0, 9.0, 1.0, 2.0, 3.0, 4.0])

    def measure(encoder, *_):
        order.append(encoder.name)
        return next(seconds)

    monkeypatch.setattr(cost, "_time", measure)
    pixels = [torch.randn(12, 3, 32, 32), torch.randn(4, 3, 32, 32)]
    found = cost.measure_costs(encoders, pixels, num_rounds=2, precisions=["float32"] * 2, has_progress_bar=False)
    assert order == ["a", "b"] * 3
    assert [each.images_per_second for each in found] == [[12.0, 4.0], [2.0, 1.0]]
    assert found[1].num_parameters == sum(p.numel() for p in _theirs().parameters())


def test_memory_is_weights_and_the_most_that_is_alive_beside_them():
    values = torch.zeros(1000)
    with MemoryTracker([values]) as tracker:
        doubled = values * 2
        view = doubled.view(10, 100)  # no storage of its own
        other = view + values.view(10, 100)
        del doubled, view
        other = other.double()
    assert tracker.peak == 12_000 and tracker.now == 8000  # float32 and float64 of `other` at once
    model = plain_model()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    found = [
        cost.measure_costs([load_encoder(model)], [torch.randn(size, 3, 32, 32)], num_rounds=1, precisions=["float32"])
        for size in (1, 3)
    ]
    small, large = (each[0].peak_bytes - weights for each in found)
    hidden = 19 * 32 * 4  # bytes of the tokens of an image; the MLP makes four times as many numbers, twice
    assert large == 3 * small and 9 * hidden <= small <= 13 * hidden


def test_surviving_outliers_are_counted_once_for_each_token():
    model = planted_model(layer=2, magnitude=60.0, token_reduction={"kind": "merge", "per_layer": [4, 0, 0, 3]})
    images, _ = pictures(6, num_white=3)
    survivors, first = Survivors(Crop()), FirstImages(5, Crop())
    encoder = load_encoder(model)
    run_pass(encoder, images, [survivors, first], PassSettings(batch_size=4, has_progress_bar=False))
    assert torch.equal(first.pixels, encoder.prepare(images)[:5])
    output = model(encoder.prepare(images), output_pre_norm=True)
    norms = output.pre_norm.patch_tokens.norm(dim=-1).detach()
    outliers, tokens, threshold = 0, 0, next_edge(OUTLIER_MULTIPLE * norms.median().item())
    for image, assignment in enumerate(output.reduction.token_assignment.flatten(1)):
        for token in assignment.unique():
            tokens += 1
            outliers += bool(norms[image][assignment == token][0] >= threshold)
    found = survivors.compute(threshold)
    assert outliers > 0 and tokens == 6 * 9
    assert (found["num_above"], found["share"], found["num_tokens"]) == (outliers, outliers / tokens, 9)


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planted_model(layer=2, magnitude=60.0).save_pretrained("planted")
    _theirs().save_pretrained("theirs")
    for number, image in enumerate(pictures(40)[0]):
        for folder in ("plain", f"labelled/{'ab'[number % 2]}"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            if folder == "plain" and number >= 12:
                continue
            shade = np.asarray(image) // (1 + number % 2 * (folder != "plain"))
            Image.fromarray(shade).save(tmp_path / folder / f"{number}.png")
    return CliRunner()


def test_one_table_has_models_of_both_libraries_and_reductions(models, drawn):
    quick = ["--batch-size", "8", "--workers", "0", "--set", "cost.num_rounds=2", "--output", "out"]
    arguments = ["compare", "planted", "planted@merge=2", "theirs", "--images", "labelled", *quick]
    done = models.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    report = read_report("out/comparison.json", kind=ComparisonReport)
    assert [model["model"] for model in report.models] == ["planted", "planted@merge=2", "theirs"]
    plain, merged, theirs = report.models
    assert plain["cost"]["tokens"] == [19.0] * 5 and merged["cost"]["tokens"] == [19.0, 17.0, 15.0, 13.0, 11.0]
    assert merged["cost"]["flops"] < plain["cost"]["flops"] and len(plain["cost"]["images_per_second"]) == 2
    assert plain["verdict"]["level"] == "many" and theirs["cost"]["tokens"] == [17.0] * 4
    assert plain["survivors"]["share"] == plain["verdict"]["share"] > 0
    (accuracy,) = plain["results"]
    assert accuracy["task"] == "knn" and accuracy["interval"][0] < accuracy["value"] <= accuracy["interval"][1]
    text = pathlib.Path("out/table.md").read_text()
    assert text in done.output
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 5 and {len(row) for row in rows} == {9}
    assert (
        rows[3][3] == "19 → 11"
        and rows[2][7] == format_share(plain["verdict"]["share"])
        and rows[0][8] == "knn, top1 ↑, % |"
    )
    assert [ax.get_ylabel() for ax in drawn[0].axes] == ["knn, top1 ↑, %", "tokens that enter"]
    # Another choice of tasks in the same folder shows its own results only.
    done = models.invoke(app, [*arguments, "--set", "knn.num_neighbors=3"])
    assert done.exit_code == 0, done.output
    (again,) = read_report("out/comparison.json", kind=ComparisonReport).models[0]["results"]
    assert again["settings"]["num_neighbors"] == 3


def test_models_with_learned_tokens_and_without_attention_are_compared(models, drawn):
    learned = plain_model(token_reduction={"kind": "learn", "num_tokens": 3, "layer": 1})
    learned.save_pretrained("learned")
    config = MambaRConfig(hidden_size=16, num_hidden_layers=2, image_size=32, patch_size=8, num_register_tokens=4)
    MambaRModel(config).save_pretrained("mamba")
    quick = ["--workers", "0", "--set", "cost.num_rounds=1", "--output", "out", "--tasks", "none"]
    done = models.invoke(app, ["compare", "learned", "mamba", "--images", "plain", *quick])
    assert done.exit_code == 0, done.output
    learned, mamba = read_report("out/comparison.json", kind=ComparisonReport).models
    assert learned["cost"]["tokens"] == [19.0, 6.0, 6.0, 6.0, 6.0] and learned["survivors"]["num_tokens"] == 3
    assert mamba["cost"]["tokens"] == [20.0] * 3


def test_a_value_outside_of_its_bootstrap_interval_is_drawn(tmp_path, drawn):
    measured = {"num_parameters": 1, "flops": 1.0, "tokens": [5.0, 5.0], "images_per_second": [1.0], "peak_bytes": 1}
    result = {"task": "depth", "metric": "rmse", "value": 0.3, "interval": [0.30000000000000004, 0.4]}
    model = {"model": "a", "cost": measured, "results": [result]}
    report = ComparisonReport(models=[model, model], images={}, settings={}, command="")
    table.draw(report, tmp_path / "plot.png")
    assert drawn[0].axes[0].get_legend_handles_labels()[1] == ["a (1)", "a (2)"]


def test_images_without_labels_have_no_accuracy(models, drawn):
    quick = ["--workers", "0", "--set", "cost.num_rounds=1", "--output", "out"]
    done = models.invoke(app, ["compare", "theirs", "--images", "plain", *quick])
    assert done.exit_code == 0, done.output
    (model,) = read_report("out/comparison.json", kind=ComparisonReport).models
    assert model["results"] == [] and "knn" not in done.output
    assert drawn[0].axes[0].get_ylabel() == "GFLOPs per image"


def test_a_model_is_compared_by_the_parts_that_are_named(models, drawn):
    blocks = next(name for name, part in _theirs().named_modules() if isinstance(part, torch.nn.ModuleList))
    quick = ["--workers", "0", "--set", "cost.num_rounds=1", "--output", "out", "--tasks", "none"]
    arguments = ["compare", "theirs", "--images", "plain", *quick, "--parts"]
    done = models.invoke(app, [*arguments, f"blocks={blocks},cls=1"])
    assert done.exit_code == 0, done.output
    (model,) = read_report("out/comparison.json", kind=ComparisonReport).models
    assert model["cost"]["tokens"] == [17.0] * 4 and model["architecture"]["has_cls_token"]
    done = models.invoke(app, [*arguments, "blocks=nowhere"])
    text = " ".join(done.output.split())
    assert done.exit_code == 1 and "--parts blocks=nowhere: expected a list of modules" in text


def test_what_cannot_be_merged_is_refused_in_words(models):
    def refusal(*names):
        done = models.invoke(app, ["compare", *names, "--images", "plain"])
        assert done.exit_code == 1 and "Traceback" not in done.output
        return " ".join(done.output.split())

    plain_model(token_reduction={"kind": "learn"}).save_pretrained("learned")
    MambaRModel(MambaRConfig(hidden_size=16, num_hidden_layers=1, image_size=32)).save_pretrained("mamba")
    assert "merging needs a ViT of this package, got a model of type dinov2" in refusal("theirs@merge=2")
    assert "got a model of type vitreg_mamba: leave out @merge" in refusal("mamba@merge=2")
    assert "cannot be merged in a model with learned tokens: leave out @merge" in refusal("learned@merge=0")
    assert "expected MODEL@merge=NUMBER" in refusal("planted@prune=2")
    assert "expected MODEL@merge=NUMBER" in refusal("planted@merge=-1")
    assert "which leaves none" in refusal("planted@merge=200")
    assert "there is no such model here" in refusal("missing@merge=2")


def test_a_name_with_a_reduction_is_a_folder_where_one_exists(tmp_path):
    plain_model().save_pretrained(tmp_path / "run" / "model")
    assert check_model_name(f"{tmp_path}/run@merge=3") == f"{tmp_path}/run/model@merge=3"
    (tmp_path / "a@merge=1").mkdir()
    assert split_reduction(f"{tmp_path}/a@merge=1")[1] is None
    with pytest.raises(ValueError, match="runs@home/model': there is no such model here"):
        check_model_name(f"{tmp_path}/runs@home/model")
    encoder = load_encoder(f"{tmp_path}/run/model@merge=3")
    assert encoder.name.endswith("@merge=3") and encoder.tower.config.token_reduction["per_layer"] == 3
