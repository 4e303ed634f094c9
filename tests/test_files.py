"""Files and folders that are whole or absent, on disks that fail and in processes that are killed."""

import errno
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from modeling_vitreg.files import atomic_folder, atomic_write, checksum, make_folder, write_text


LIMIT = 20_000  # bytes a file may have on the small disk


@pytest.fixture
def small_disk():
    """A disk that is full after a few bytes of each file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path):
    file = tmp_path / "made" / "file"
    write_text(file, "old")
    with atomic_write(file) as part:
        part.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert _names(file.parent) == ["file"]


def test_a_folder_with_files_is_replaced_at_the_end_of_the_block(tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "model") as part:
            (part / content).write_text(content)
    assert _names(tmp_path) == ["model"]
    assert _names(tmp_path / "model") == ["new"]


def test_single_files_of_a_folder_move_beside_it(tmp_path):
    with atomic_folder(tmp_path / "out", files=["a", "b"]) as part:
        for name in ("a", "b", "c"):
            (part / name).write_text(name)
    assert _names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("make", [atomic_write, atomic_folder])
def test_a_block_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, make):
    with make(tmp_path / "out") as part:
        (part / "old" if part.is_dir() else part).write_text("old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyError), make(tmp_path / "out") as part:
        (part / "new" if part.is_dir() else part).write_text("new")
        raise KeyError
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_a_folder_stays_and_its_folder_is_filled(tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to("large disk")
    with atomic_folder(tmp_path / "out") as part:
        (part / "weights").write_text("")
    assert _names(tmp_path) == ["large disk", "out"] and (tmp_path / "out").is_symlink()
    assert _names(tmp_path / "large disk") == ["weights"]


def test_the_current_folder_is_filled_and_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_folder(os.curdir) as part:
        (part / "weights").write_text("")
    assert os.listdir(os.curdir) == ["weights"] == _names(tmp_path)


def test_pipes_and_devices_are_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        write_text(tmp_path / "pipe", "")
    assert (tmp_path / "pipe").is_fifo() and _names(tmp_path) == ["pipe"]


def _write_text(path):
    write_text(path, "x" * 2 * LIMIT)


def _save_tensors(path):
    with atomic_write(path) as part:
        save_file({"a": torch.zeros(LIMIT)}, part)


def _save_pickle(path):
    with atomic_write(path) as part:
        torch.save({"a": torch.zeros(LIMIT)}, part)


def _save_folder(path):
    with atomic_folder(path) as part:
        save_file({"a": torch.zeros(LIMIT)}, part / "model.safetensors")


@pytest.mark.parametrize("save", [_write_text, _save_tensors, _save_pickle, _save_folder])
def test_a_full_disk_is_an_error_of_the_disk_under_the_name_of_the_file(tmp_path, small_disk, save):
    with pytest.raises(OSError) as caught:
        save(tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out")
    assert ".part" not in str(caught.value)
    assert _names(tmp_path) == []


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"a file, but a folder is needed.*file'$"):
        make_folder(tmp_path / "file" / "below" / "it")
    with pytest.raises(NotADirectoryError, match=r"file'$"):
        write_text(tmp_path / "file" / "report.json", "{}")
    assert _names(tmp_path) == ["file"]


def test_what_a_killed_writer_left_behind_goes_with_the_next_one(tmp_path):
    program = f"""
import os, signal
from modeling_vitreg.files import atomic_folder, atomic_write
with atomic_folder({str(tmp_path / "model")!r}) as part, atomic_write({str(tmp_path / "file")!r}) as file:
    file.write_text("half"), (part / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = pathlib.Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", program], cwd=root)
    assert run.returncode == -signal.SIGKILL
    assert len(_names(tmp_path)) == 2
    write_text(tmp_path / "file", "whole")
    with atomic_folder(tmp_path / "model") as part:
        (part / "weights").write_text("whole")
    assert _names(tmp_path) == ["file", "model"]


def test_a_folder_whose_writer_died_between_two_renames_is_found_again(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "model") as part:
        (part / "weights").write_text("old")
    moved = tmp_path / part.with_suffix(".old").name  # as a killed process leaves it
    (tmp_path / "model").rename(moved)
    with pytest.raises(OSError, match="no space"), atomic_folder(tmp_path / "model"):
        raise OSError(errno.ENOSPC, "no space")
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_files_of_a_process_that_still_writes_are_left_alone(tmp_path):
    host_and_process = None
    with atomic_write(tmp_path / "file") as part:
        part.write_text("")
        host_and_process = part.name
    other = tmp_path / host_and_process.replace(f"-{os.getpid()}.", f"-{os.getppid()}.")
    other.write_text("of another process")
    write_text(tmp_path / "file", "")
    assert other.exists()


def test_a_checksum_sees_one_flipped_bit(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    before = checksum(file)
    file.write_bytes(bytes(500) + b"\x01" + bytes(499))
    assert checksum(file) != before
    assert checksum(file) == checksum(file)
