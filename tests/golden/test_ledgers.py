"""What every converter makes of fixed tensors, in and out, as it was recorded: `ledgers.json`.

`python tests/golden/test_ledgers.py` writes the file again, for a change that is meant.
"""

import hashlib
import json
import pathlib
import sys
import zlib

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file


GOLDEN = pathlib.Path(__file__).with_name("ledgers.json")
sys.path[:0] = [str(GOLDEN.parents[1]), str(GOLDEN.parents[1] / "model"), str(GOLDEN.parents[1] / "conversion")]

import timm  # noqa: E402
from test_conversion import OFFICIAL, ONE_WAY, SMALL, TIMM, TRANSFORMERS, TWO_HEADS, make_transformers  # noqa: E402

from modeling_vitreg import ViTWithRegistersConfig  # noqa: E402
from modeling_vitreg.conversion import ConversionError, ConversionSettings, convert, export  # noqa: E402


NAMES = [*OFFICIAL, *(f"timm {name}" for name in TIMM), *(f"transformers {name}" for name in TRANSFORMERS)]


def fill(state: dict, *, keeps_positions: bool) -> dict:
    """Tensors that depend on their names and shapes alone, because names in memory change with versions."""
    filled = {}
    for name, tensor in state.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        is_computed = name.endswith("position_ids") or (keeps_positions and "pos" in name)
        filled[name] = tensor if is_computed else 0.1 * torch.randn(tensor.shape, generator=generator)
    return filled


def write_source(name: str, folder: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """A source, and what of its configuration no tensor shows."""
    library, _, kind = name.partition(" ")
    if name in OFFICIAL:
        file_name, make, _, _ = OFFICIAL[name]
        torch.save(make(), folder / file_name)
        return folder / file_name, TWO_HEADS
    if library == "timm":
        model = timm.create_model(kind, **SMALL, dynamic_img_size=True)
        path, state = folder / f"{kind}.safetensors", model.state_dict()
    else:
        make_transformers(kind).save_pretrained(folder / "theirs")
        path = folder / "theirs" / "model.safetensors"
        state = load_file(path)
    save_file(fill(state, keeps_positions=kind in ONE_WAY), path, metadata={"format": "pt"})
    return (path, TWO_HEADS) if library == "timm" else (folder / "theirs", {})


def digest(tensors: dict) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        found.update(tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def describe(report, folder: pathlib.Path) -> dict:
    ledger = report.ledger
    tensors = load_file(folder / "model.safetensors") if folder.is_dir() else torch.load(folder, weights_only=True)
    found = {"layout": report.source["layout"], "to": report.target["layout"], "tensors": digest(tensors)}
    found |= {"counts": [ledger["num_used"], ledger["num_written"]]}
    found |= {part: sorted(ledger[part]) for part in ("dropped", "filled", "left") if ledger[part]}
    if report.target["layout"] == "vitreg":
        processor = json.loads((folder / "preprocessor_config.json").read_text())
        found["processor"] = [processor.get(name) for name in ("image_mean", "size", "crop_size", "resample")]
        usual, config = ViTWithRegistersConfig().to_dict(), ViTWithRegistersConfig.from_pretrained(folder).to_dict()
        ignored = (
            "architectures",
            "auto_map",
            "dtype",
            "transformers_version",
            "stage_names",
            "out_features",
            "out_indices",
        )
        found["config"] = {
            name: value for name, value in config.items() if name not in ignored and value != usual.get(name)
        }
    elif folder.is_dir():
        found["config"] = json.loads((folder / "config.json").read_text())
    return found


def run(name: str, folder: pathlib.Path) -> dict:
    source, overrides = write_source(name, folder)
    settings = ConversionSettings(is_quiet=True, config_overrides=overrides, skip_verification=True)
    found = {"in": describe(convert(source, folder / "in", settings=settings), folder / "in")}
    for to in ("dinov2", "timm", "transformers"):
        output = folder / (f"{to}.pth" if to == "dinov2" else to)
        try:
            report = export(folder / "in", output, to=to, settings=ConversionSettings(is_quiet=True))
        except ConversionError as error:
            found[to] = str(error).splitlines()[0]
        else:
            found[to] = describe(report, output)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_converter_makes_what_it_made(name, tmp_path):
    is_renamed = name in ("transformers CLIPVisionModel", "transformers ViTMAEForPreTraining")
    if is_renamed and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 gives tensors of this model other names than the ones that were recorded")
    assert json.loads(json.dumps(run(name, tmp_path))) == json.loads(GOLDEN.read_text())[name]


if __name__ == "__main__":
    import tempfile

    recorded = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            recorded[name] = run(name, pathlib.Path(folder))
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in recorded.items())
    GOLDEN.write_text("{\n" + text + "\n}\n")
