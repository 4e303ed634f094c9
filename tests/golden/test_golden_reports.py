"""Reports of tiny models keep their numbers: `python tests/golden/test_golden_reports.py` records them anew.

The files are reports that commit d162533 wrote, so this also tests that old reports are still read: `read_report`
renames the keys that have changed since, and no number may differ. Sentences, fingerprints, versions and times are not
compared.
"""

import json
import math
import pathlib
import sys
import tempfile
import zlib

import pytest
import torch
from annotated_scenes import annotated_scenes
from planted_models import pictures, planted_model

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.features import load_encoder
from modeling_vitreg.reports import ArtifactReport, DiscoveryReport, EvaluationReport, read_report
from modeling_vitreg.scenes import SceneSettings


FOLDER = pathlib.Path(__file__).parent
NOT_COMPARED = {
    "architecture", "bins", "box_format", "box_layout", "command", "commit", "criteria", "data", "dataset_hash",
    "classes", "dataset",
    "interval_method", "made_with", "meaning", "measured", "model", "weights_hash", "note", "rule",
    "automatic_rule", "seconds", "sentence", "settings", "skipped", "source", "stopped_by", "unreadable",
}  # fmt: skip
TOLERANCE = 1e-5


def _filled(**changes) -> ViTWithRegistersModel:
    """A tiny model whose weights depend on their names alone, and on no order in which a library draws them."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = ViTWithRegistersModel(ViTWithRegistersConfig(**{**sizes, "num_register_tokens": 2, **changes})).eval()
    fill_by_name(model, std=0.2)
    return model


def fill_by_name(model: torch.nn.Module, *, std: float) -> None:
    """Draw all parameters, each from a generator of its own."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(drawn + float(name.endswith("weight") and parameter.ndim == 1))


def _analyze(folder: pathlib.Path):
    from modeling_vitreg.analysis.survey import SurveySettings, survey

    images, _ = pictures(24)
    pairs = [(image, number % 3) for number, image in enumerate(images)]
    model = planted_model(layer=3, magnitude=30.0, channel=5)
    settings = SurveySettings(
        batch_size=8,
        num_attention_images=8,
        num_ablation_images=4,
        num_probe_images=24,
        has_progress_bar=False,
        is_strict=True,
    )
    return survey(load_encoder(model, name="planted"), pairs, settings=settings)[0]


def _discover(method: str):
    from modeling_vitreg.discovery import DiscoverySettings, Sweep, discover

    settings = DiscoverySettings(method=method, head=1, batch_size=4, has_progress_bar=False)
    images = annotated_scenes(range(8), settings=SceneSettings(image_size=64))
    sweep = Sweep(layers=(-1, 2)) if method == "lost" else None
    return discover(load_encoder(_filled(), name="filled"), images, settings=settings, sweep=sweep)


def _evaluate(folder: pathlib.Path):
    from modeling_vitreg import evaluation

    quick = evaluation.EvaluationSettings(
        encoding=evaluation.EncodingSettings(has_progress_bar=False, shard_size=32, workers=0),
        linear=evaluation.LinearSettings(num_steps=20, learning_rates=(0.01, 0.1)),
        logistic=evaluation.LogisticSettings(num_strengths=3, max_steps=20),
        segmentation=evaluation.SegmentationSettings(num_steps=5),
        depth=evaluation.DepthSettings(num_steps=5, num_bins=8),
    )
    data = evaluation.open_data("scenes", image_size=32, num_train=60, num_test=24)
    generator = torch.Generator().manual_seed(0)
    return evaluation.evaluate(
        load_encoder(_filled(), name="filled"),
        tasks=list(evaluation.TASKS),
        data=data,
        settings=quick,
        class_embeddings=torch.randn(24, 32, generator=generator),
        output_folder=folder,
        is_strict=True,
    )


RUNS = {
    "analyze": (ArtifactReport, _analyze),
    "discover-lost": (DiscoveryReport, lambda _: _discover("lost")),
    "discover-tokencut": (DiscoveryReport, lambda _: _discover("tokencut")),
    "discover-dino_seg": (DiscoveryReport, lambda _: _discover("dino_seg")),
    "evaluate": (EvaluationReport, _evaluate),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_report_has_the_numbers_that_it_always_had(name, tmp_path):
    kind, run = RUNS[name]
    torch.manual_seed(0)
    found = json.loads(json.dumps(vars(run(tmp_path))))
    recorded = vars(read_report(FOLDER / f"{name}.json", kind=kind))
    differences = list(_differences(recorded, found, ()))
    assert not differences, "\n".join(differences[:20])


def test_a_number_that_moved_is_named():
    recorded = {"layers": [{"share": 0.25, "note": "a"}], "n": 3}
    assert not list(_differences(recorded, {"layers": [{"share": 0.25 * (1 + 1e-6), "note": "b"}], "n": 3}, ()))
    assert list(_differences(recorded, {"layers": [{"share": 0.2501}], "n": 3}, ())) == [
        "layers.0.share: recorded 0.25, found 0.2501"
    ]
    assert list(_differences(recorded, {"layers": [], "n": 4}, ())) == [
        "layers: recorded 1 entries, found 0",
        "n: recorded 3, found 4",
    ]
    assert list(_differences({"a": 1}, {"b": 1}, ())) == [": keys recorded ['a'], found ['b']"]


def _differences(recorded: object, found: object, path: tuple):
    where = ".".join(map(str, path))
    if isinstance(recorded, dict) and isinstance(found, dict):
        old, new = recorded.keys() - NOT_COMPARED, found.keys() - NOT_COMPARED
        if old - new:  # a key that is new is no lost number
            yield f"{where}: keys recorded {sorted(old)}, found {sorted(new)}"
        for key in [key for key in recorded if key in old & new]:
            yield from _differences(recorded[key], found[key], (*path, key))
    elif isinstance(recorded, list) and isinstance(found, list):
        if len(recorded) != len(found):
            yield f"{where}: recorded {len(recorded)} entries, found {len(found)}"
        else:
            for place, pair in enumerate(zip(recorded, found)):
                yield from _differences(*pair, (*path, place))
    elif not _is_same(recorded, found):
        yield f"{where}: recorded {recorded!r}, found {found!r}"


def _is_same(recorded: object, found: object) -> bool:
    if isinstance(recorded, float) and isinstance(found, (int, float)):
        return math.isclose(recorded, found, rel_tol=TOLERANCE, abs_tol=1e-6)
    return recorded == found


def _round(value: object) -> object:
    """Floats of seven figures, so that the files are small."""
    if isinstance(value, dict):
        return {name: _round(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_round(part) for part in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _record() -> None:
    for name, (kind, run) in RUNS.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            report = run(pathlib.Path(folder))
        content = {"kind": kind.kind, "version": kind.version, **_round(vars(report))}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent))
    _record()
