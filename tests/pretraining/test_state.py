"""States of runs: whole or not there, and damage is found, named and survived."""

import errno
import json
import os
import resource
import shutil

import pytest
import torch

from modeling_vitreg.pretraining.state import (
    DamagedState,
    check_state,
    last_state,
    load_objective,
    load_state,
    read_metadata,
    save_state,
)


FILES = ("objective.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with states of the steps 1 and 2; `bias` is the number of the step."""
    folder = tmp_path_factory.mktemp("saved")
    objective, optimizer = _make()
    for step in (1, 2):
        objective(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            objective.bias.fill_(step)
        save_state(folder, objective=objective, optimizer=optimizer, metadata={"step": step})
    return folder


@pytest.fixture
def states(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "state")


def _make():
    objective = torch.nn.Linear(3, 3)
    return objective, torch.optim.AdamW(objective.parameters())


def _empty(path):
    path.write_bytes(b"")


def _truncate(path):
    path.write_bytes(path.read_bytes()[:40])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def _remove(path):
    path.unlink()


def _write_another_type(path):
    path.write_text("[1, 2]")


DAMAGES = (_empty, _truncate, _flip, _remove, _write_another_type)


@pytest.mark.parametrize("file", [*FILES, "checksums.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_run_continues_from_the_state_before(states, file, damage):
    damage(states / "step-00000002" / file)
    said = []
    state = last_state(states, warn=said.append)
    if (file, damage) == ("checksums.json", _remove):  # looks like a state of an older version, and is whole
        assert (state.name, said) == ("step-00000002", [])
        return
    objective, optimizer = _make()
    assert load_state(state, objective=objective, optimizer=optimizer)["step"] == 1
    assert objective.bias.tolist() == [1, 1, 1]
    assert len(said) == 1
    assert "step-00000002" in said[0] and "step-00000001" in said[0]
    assert file in said[0]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage is not _flip])
def test_without_checksums_damage_is_found_by_reading(states, file, damage):
    (states / "step-00000002" / "checksums.json").unlink()
    damage(states / "step-00000002" / file)
    with pytest.warns(UserWarning, match=rf"step-00000002.{file}"):
        assert last_state(states).name == "step-00000001"


def test_a_state_of_an_older_version_loads(states):
    state = states / "step-00000002"
    (state / "checksums.json").unlink()
    facts = json.loads((state / "state.json").read_text())
    del facts["format"]
    (state / "state.json").write_text(json.dumps(facts))
    objective, optimizer = _make()
    assert load_state(last_state(states), objective=objective, optimizer=optimizer)["step"] == 2
    assert objective.bias.tolist() == [2, 2, 2]


def test_a_state_of_a_newer_version_is_refused_in_words(states):
    path = states / "step-00000002" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    (path.parent / "checksums.json").unlink()
    with pytest.raises(RuntimeError, match=r"state\.json has format 3.*reads formats 1 and 2"):
        last_state(states)


def test_a_state_of_another_model_is_refused_with_its_file(states):
    objective = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(objective.parameters())
    with pytest.raises(RuntimeError, match=r"step-00000002.objective\.safetensors does not fit"):
        load_state(last_state(states), objective=objective, optimizer=optimizer)


@pytest.mark.parametrize("pointer", ["", "step-00000009", "nonsense", "../../elsewhere"])
def test_a_damaged_pointer_is_named_and_the_newest_whole_state_is_taken(states, pointer):
    (states / "LAST").write_text(pointer)
    said = []
    assert last_state(states, warn=said.append).name == "step-00000002"
    assert "LAST" in said[0] or "step-00000009 is missing" in said[0]


def test_states_without_a_pointer_are_found(states):
    (states / "LAST").unlink()
    assert last_state(states).name == "step-00000002"


def test_if_every_state_is_damaged_all_files_are_named(states):
    for name in ("step-00000001", "step-00000002"):
        _truncate(states / name / "state.json")
    with pytest.raises(RuntimeError, match=r"no state.*step-00000002.state\.json.*step-00000001.state\.json"):
        last_state(states)


def test_a_folder_without_states_has_none(tmp_path):
    assert last_state(tmp_path) is None
    (tmp_path / "step-00000009.partial").mkdir()  # as older versions left it when they were killed
    assert last_state(tmp_path) is None


def test_single_files_name_themselves_when_they_cannot_be_read(states):
    state = states / "step-00000002"
    check_state(state)
    _truncate(state / "objective.safetensors")
    _truncate(state / "state.json")
    with pytest.raises(DamagedState, match=r"objective\.safetensors cannot be read"):
        load_objective(state)
    with pytest.raises(DamagedState, match=r"state\.json cannot be read"):
        read_metadata(state)


def test_a_run_that_was_taken_back_keeps_the_states_that_it_writes(states):
    shutil.copytree(states / "step-00000002", states / "step-00000008")
    shutil.copytree(states / "step-00000002", states / "step-00000009")
    (states / "LAST").write_text("step-00000002")
    objective, optimizer = _make()
    save_state(states, objective=objective, optimizer=optimizer, metadata={"step": 3})
    kept = sorted(path.name for path in states.iterdir())
    assert kept == ["LAST", "step-00000002", "step-00000003", "step-00000008", "step-00000009"]
    assert last_state(states).name == "step-00000003"


def test_a_full_disk_keeps_the_state_before_and_leaves_nothing_behind(states):
    before = sorted(states.rglob("*"))
    objective = torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(objective.parameters())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"step 3 could not.*last good state is .*step-00000002"):
            save_state(states, objective=objective, optimizer=optimizer, metadata={"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(states.rglob("*")) == before


def test_a_disk_that_became_read_only_is_named(states, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    objective, optimizer = _make()
    with pytest.raises(RuntimeError, match=r"Read-only file system.*last good state is .*step-00000002"):
        save_state(states, objective=objective, optimizer=optimizer, metadata={"step": 3})
    assert {path.name for path in states.iterdir()} == {"LAST", "step-00000001", "step-00000002"}


def test_the_older_name_of_the_metadata_is_understood(tmp_path):
    objective, optimizer = _make()
    save_state(tmp_path, objective=objective, optimizer=optimizer, facts={"step": 4})
    assert read_metadata(last_state(tmp_path))["step"] == 4
