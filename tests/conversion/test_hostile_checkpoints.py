"""Damaged and hostile checkpoints end in one error that names the file: nothing runs, hangs, or fills the memory."""

import json
import pathlib
import signal
import subprocess
import sys

import hostile_checkpoints as hostile
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from modeling_vitreg.conversion import ConversionError, ConversionSettings, convert
from modeling_vitreg.conversion.layouts.transformers_files import LAYOUTS
from modeling_vitreg.conversion.sources import open_source
from modeling_vitreg.features.folders import conversion_command


PEAK = 2_500  # MiB, of a program that has imported torch, transformers and timm
QUICK = ["cycles_and_depth", "folders_of_timm", "harmless_architectures", "layers", "layouts_of_tensors", "processors"]


def assert_harmless(found: dict) -> None:
    assert found["outcome"] in ("refused", "converted"), found
    assert not found["ran"] and found["is_clean"] and found["seconds"] < hostile.SECONDS, found
    if found["outcome"] == "converted":
        assert found.get("is_same"), found
    else:
        assert len(found["message"]) > 40, found


@pytest.mark.parametrize("kind", QUICK)
def test_a_hostile_checkpoint_is_refused_in_words(kind, tmp_path):
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for seed in range(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        assert_harmless(hostile.convert_one(kind, folder, seed))


@pytest.mark.slow
def test_hundreds_of_hostile_checkpoints_are_refused_in_words(tmp_path):
    program = pathlib.Path(hostile.__file__)
    command = [sys.executable, program, tmp_path, "240", "0"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=program.parent)
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) >= 200 and {one["kind"] for one in found} == set(hostile.KINDS)
    for one in found:
        assert_harmless(one)
        assert one["kind"].startswith("harmless_") or one["outcome"] == "refused", one
        assert one["peak"] < PEAK, one


def test_a_flipped_bit_inside_an_archive_is_found_by_its_checksum(tmp_path):
    path = hostile.Maker(tmp_path, seed=3).flip_in_the_data_of_an_archive()
    with pytest.raises(ConversionError, match=r"the checksum of dinov2/data/\d+ is wrong, so the file is damaged"):
        open_source(path)


def test_an_archive_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(hostile.STATE, tmp_path / "dinov2.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert open_source(tmp_path / "dinov2.pth").shapes.keys() == hostile.STATE.keys()


def test_a_folder_of_timm_gets_nothing_but_sizes_past_us(tmp_path, monkeypatch):
    # timm 1.0.20 unpickles what checkpoint_path names.
    built = []
    monkeypatch.setattr(timm, "create_model", lambda *names, **arguments: built.append(arguments))
    settings = {"architecture": "vit_tiny_patch16_224", "model_args": {"checkpoint_path": "extra.bin"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file({"cls_token": torch.ones(1, 1, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"config.json: model_args has checkpoint_path='extra.bin'"):
        convert(tmp_path, tmp_path / "out")
    assert not built


def test_a_folder_without_a_class_is_compared_with_the_class_of_its_tensors(tmp_path):
    sizes = {**hostile.SIZES, "num_labels": 5}
    transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes)).save_pretrained(tmp_path / "theirs")
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    del settings["architectures"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(settings))
    report = convert(tmp_path / "theirs", tmp_path / "out", settings=ConversionSettings(is_quiet=True))
    assert report.verification["is_verified"] and "logits" in next(iter(report.verification["errors"].values()))


def test_a_module_of_another_library_is_told_to_become_a_file(tmp_path):
    swin = transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[1]))
    with pytest.raises(ConversionError, match=r"^SwinModel: model type 'swin' cannot be represented"):
        convert(swin, tmp_path / "out")
    with pytest.raises(ConversionError, match=r"Linear: save it with torch.save"):
        convert(torch.nn.Linear(2, 2), tmp_path / "out")


WRAPPED = {
    "DDP": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compile": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "both": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "FSDP": lambda state: {
        name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): t for name, t in state.items()
    },
    "Lightning": lambda state: {"state_dict": {f"model.{name}": t for name, t in state.items()}, "epoch": 3},
    "lightly": lambda state: {
        "state_dict": {f"net.backbone.{name}": t for name, t in state.items()} | {"loss": torch.ones(2)}
    },
    "own key": lambda state: {"network": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_wraps_a_model_does_not_change_it(name, tmp_path):
    state = {key: tensor for key, tensor in hostile.STATE.items() if key not in ("register_tokens", "mask_token")}
    settings = ConversionSettings(config_overrides={"num_attention_heads": 2}, is_quiet=True, skip_verification=True)
    found = []
    for number, content in enumerate((state, WRAPPED[name](state))):
        torch.save(content, tmp_path / f"{number}.pth")
        report = convert(tmp_path / f"{number}.pth", tmp_path / f"out{number}", settings=settings)
        settings_of_model = json.loads((tmp_path / f"out{number}" / "config.json").read_text())
        found.append(
            (
                report.source["layout"],
                settings_of_model,
                (tmp_path / f"out{number}" / "model.safetensors").read_bytes(),
            )
        )
    assert found[0] == found[1]


def test_weights_beside_those_that_were_taken_are_named(tmp_path):
    average = {name: tensor + 1 for name, tensor in hostile.STATE.items()}
    torch.save({"state_dict": hostile.STATE, "state_dict_ema": average}, tmp_path / "a.pth")
    source = open_source(tmp_path / "a.pth")
    assert torch.equal(source.read("norm.weight"), hostile.STATE["norm.weight"])
    assert "took 'state_dict', not 'state_dict_ema' (--checkpoint-key state_dict_ema" in source.notes[0]
    source = open_source(tmp_path / "a.pth", checkpoint_key="state_dict_ema")
    assert torch.equal(source.read("norm.weight"), average["norm.weight"]) and not source.notes


def test_several_models_in_one_file_are_asked_about(tmp_path):
    both = {f"{part}.{name}": tensor for part in ("student", "teacher") for name, tensor in hostile.STATE.items()}
    torch.save(both, tmp_path / "flat.pth")
    torch.save({"a": hostile.STATE, "b": hostile.STATE}, tmp_path / "nested.pth")
    with pytest.raises(ConversionError, match=r"holds several models \(student, teacher\): choose one with --ch"):
        convert(tmp_path / "flat.pth", tmp_path / "out")
    with pytest.raises(ConversionError, match=r"holds several state dicts \(a, b\): choose one with --checkpoint-key"):
        open_source(tmp_path / "nested.pth")
    assert open_source(tmp_path / "flat.pth", checkpoint_key="teacher").shapes.keys() == hostile.STATE.keys()


def test_a_family_that_only_shared_names_suggest_is_called_a_guess(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **hostile.TIMM, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    settings = ConversionSettings(config_overrides={"num_attention_heads": 2}, is_quiet=True, skip_verification=True)
    report = convert(tmp_path / "plain.pth", tmp_path / "out", settings=settings)
    assert report.source["layout"] == "timm"
    assert "the family timm is a guess: the names of the tensors fit mae, deit as well" in report.source["notes"][0]


def test_a_foreign_model_is_told_the_command_that_converts_it(tmp_path):
    transformers.Dinov2Model(transformers.Dinov2Config(**hostile.SIZES)).save_pretrained(tmp_path / "theirs")
    transformers.SwinConfig().save_pretrained(tmp_path / "swin")
    torch.save(hostile.STATE, tmp_path / "dinov2.pth")
    assert f"vitreg convert {tmp_path / 'theirs'} theirs-vitreg" in conversion_command(tmp_path / "theirs")
    assert f"vitreg convert {tmp_path / 'dinov2.pth'} dinov2-vitreg" in conversion_command(tmp_path / "dinov2.pth")
    assert "cannot be converted: expected one of vit, deit" in conversion_command(tmp_path / "swin")
    assert "hf download facebook/dinov2-small --local-dir dinov2-small && vitreg convert" in conversion_command(
        "facebook/dinov2-small"
    )
    assert "no such file or folder" in conversion_command("./no/such")
    assert all(f"vitreg convert {name}" in conversion_command(name) for name in ("timm:vit_tiny_patch16_224",))
    for model_type in LAYOUTS:
        (tmp_path / "swin" / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert "convert it first" in conversion_command(tmp_path / "swin")
