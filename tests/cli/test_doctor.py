"""What the doctor finds: each defect is planted, and the remedy for a checkpoint is typed as it stands."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_vitreg import ViTWithRegistersModel, doctor


@pytest.fixture
def folder(tiny, tmp_path):
    """A healthy model."""
    path = tmp_path / "model"
    ViTWithRegistersModel(tiny()).save_pretrained(path)
    return path


def _change(folder, name, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    (full,) = (full for full in tensors if name in full)
    tensors[full] = change(tensors[full].clone())
    save_file(tensors, path, metadata={"format": "pt"})


def _problems(checkpoint):
    return [finding for finding in doctor.check_checkpoint(checkpoint) if finding.level != "ok"]


def test_a_healthy_model_has_no_problem(folder):
    assert _problems(folder) == []
    assert _problems(folder.parent) == []  # the folder of a run, with model/ in it


def test_equal_registers_are_found_and_the_remedy_makes_them_distinct(folder):
    _change(folder, "register_tokens", lambda tensor: torch.zeros_like(tensor))
    (finding,) = _problems(folder)
    assert (finding.level, "all of its 4 registers are equal" in finding.what) == ("problem", True)
    command = shlex.split(finding.remedy)
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    assert _problems(f"{folder}-distinct") == []


def test_two_equal_registers_among_others_are_found(folder):
    def copy_the_first(tensor):
        tensor[..., 1, :] = tensor[..., 0, :]
        return tensor

    _change(folder, "register_tokens", copy_the_first)
    assert [finding.what.split(":")[0] for finding in _problems(folder)] == ["some of its 4 registers are equal"]


def test_values_that_are_not_finite_are_found_by_name(folder):
    def spoil(tensor):
        tensor.flatten()[0] = float("nan")
        return tensor

    _change(folder, "layers.1.mlp.fc2.weight", spoil)
    (finding,) = _problems(folder)
    assert "not finite in layers.1.mlp.fc2.weight" in finding.what


@pytest.mark.parametrize("name", ["modeling_vitreg.py", "preprocessor_config.json"])
def test_a_missing_file_is_found_and_the_remedy_writes_it(folder, name):
    (folder / name).unlink()
    (finding,) = _problems(folder)
    assert name in finding.what
    kind, source = "ViTWithRegistersModel", f"from_pretrained('{folder}')"
    assert finding.remedy.startswith('python -c "from modeling_vitreg import') and source in finding.remedy
    ViTWithRegistersModel.from_pretrained(folder).save_pretrained(folder)  # what the remedy says
    assert kind in finding.remedy and _problems(folder) == []


def test_another_number_of_registers_than_configured_is_found(folder):
    config = json.loads((folder / "config.json").read_text()) | {"num_register_tokens": 2}
    (folder / "config.json").write_text(json.dumps(config))
    first, second = [finding.what for finding in _problems(folder)]
    assert first == "the weights hold 4 registers, config.json says 2"
    assert second.startswith("tensors of another shape than config.json says: embeddings.register_tokens")


def test_a_file_that_is_cut_off_is_found(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    (finding,) = _problems(folder)
    assert "damaged or incomplete" in finding.what


def test_equal_registers_of_transformers_own_model_are_found(tmp_path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "theirs")  # starts all registers at zero
    (finding,) = _problems(tmp_path / "theirs")
    assert "registers are equal" in finding.what


def test_no_model_is_said_in_words_with_a_command():
    (finding,) = _problems("user/is-not-there")
    assert (finding.level, finding.remedy) == ("problem", "hf download user/is-not-there")


def test_a_version_outside_its_range_is_a_problem(monkeypatch):
    versions = {"transformers": "5.2.0", "torch": "1.13"}
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: versions.get(name) or real(name))
    found = {finding.what.split()[0]: finding for finding in doctor.check_versions()}
    assert (found["transformers"].level, found["torch"].level) == ("problem", "problem")
    assert found["transformers"].remedy.startswith('pip install --upgrade "transformers')
    assert found["datasets"].level == "ok"


def test_a_torchvision_built_for_another_torch_is_a_problem(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    # transformers cannot be imported in this state, and so the package cannot; the doctor needs neither.
    program = f"import runpy; doctor = runpy.run_path({doctor.__file__!r}); "
    program += "print(doctor['render_findings'](doctor['diagnose']()))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    text = " ".join(run.stdout.split())
    assert "problem torchvision cannot be imported, because it was built for another torch" in text
    assert "operator torchvision::nms does not exist" in text
    assert '-> pip install --force-reinstall "torch==' in text


def test_a_token_is_never_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = doctor.render_findings(list(doctor.check_cache()))
    assert "there is a token" in text and "secret" not in text


def test_offline_mode_is_a_warning():
    (finding,) = (finding for finding in doctor.check_cache() if "offline" in finding.what)  # as conftest sets it
    assert (finding.level, finding.remedy) == ("warning", "unset HF_HUB_OFFLINE")


def test_the_table_names_remedies_and_counts(folder):
    (folder / "preprocessor_config.json").unlink()
    text = doctor.render_findings(doctor.diagnose(folder))
    assert "problem  preprocessor_config.json missing" in text
    assert "         -> python -c" in text
    assert text.splitlines()[-1].startswith("1 problem")
    assert doctor.render_findings([doctor.Finding("ok", "all")]).endswith("no problem was found")


def test_missing_and_misshapen_tensors_are_found_by_name(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = sorted(name for name in tensors if "layers.1" in name)
    for name in names:
        del tensors[name]
    tensors["layernorm.weight"] = torch.ones(7)
    tensors["left.over"] = torch.ones(2)
    save_file(tensors, path, metadata={"format": "pt"})
    found = "\n".join(f"{finding.level} {finding.what}" for finding in _problems(folder))
    assert f"problem {len(names)} tensors are missing, and would be random: {names[0]}" in found
    assert "problem tensors of another shape than config.json says: layernorm.weight" in found
    assert "warning tensors that ViTWithRegistersModel does not read: left.over" in found


def test_parts_that_a_base_model_lacks_are_no_problem(tiny, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ViTForImageClassification(config).save_pretrained(tmp_path / "theirs")
    assert _problems(tmp_path / "theirs") == []


def test_integers_in_place_of_weights_are_found(folder):
    _change(folder, "layers.1.mlp.fc2.weight", lambda tensor: tensor.to(torch.int32))
    finding, *_ = _problems(folder)  # transformers 4 does not load them either
    assert "integers or booleans instead of weights in layers.1.mlp.fc2.weight" in finding.what


def test_weights_of_8_bits_and_damaged_code_are_found(folder):
    _change(folder, "layers.1.mlp.fc2.weight", lambda tensor: tensor.to(torch.float8_e4m3fn))
    assert _problems(folder) == []
    code = folder / "positions_vitreg.py"
    code.write_text(code.read_text().replace("import", "imp\0rt", 1))
    assert _problems(folder) == []  # config.json does not name it
    settings = json.loads((folder / "config.json").read_text())
    code = folder / f"{settings['auto_map']['AutoModel'].split('.')[0]}.py"
    code.write_text(code.read_text().replace("import", "imp0rt", 1))
    assert f"the code in the folder is damaged: {code.name}: invalid syntax" in _problems(folder)[0].what


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"num_hidden_layers": 99999999999}, "num_hidden_layers"),
        ("config.json", {"hidden_size": "wide"}, "hidden_size"),
        ("config.json", {"hidden_size": 33}, "ViTWithRegistersModel cannot be loaded"),
        ("config.json", {"architectures": ["os.system"]}, "os.system"),
        ("config.json", {"architectures": 7}, "architectures"),
        ("config.json", {"auto_map": {"AutoModel": "absent.Model"}}, "absent.py missing"),
        ("config.json", [1, 2], "expected a JSON object, got"),
        ("preprocessor_config.json", {"image_mean": "x"}, "image_mean"),
        ("preprocessor_config.json", {"image_std": [float("nan")] * 3}, "image_std"),
    ],
)
def test_a_hostile_folder_is_named_and_is_not_ok(folder, file, change, words):
    path = folder / file
    content = change if isinstance(change, list) else json.loads(path.read_text()) | change
    path.write_text(json.dumps(content))
    assert any(words in finding.what for finding in _problems(folder)), _problems(folder)


def test_an_index_that_leads_out_of_the_folder_is_found(folder):
    (folder.parent / "evil.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"layernorm.weight": "../evil.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (finding,) = _problems(folder)
    assert "leads out of its folder" in finding.what


def test_a_folder_without_weights_names_the_command_that_makes_them(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (finding,) = _problems(folder)
    assert "weights are missing" in finding.what and finding.remedy.startswith("vitreg convert ")
