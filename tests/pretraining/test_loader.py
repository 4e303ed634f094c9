"""The training loader: the same batches whatever the workers, the processes and the interruptions."""

import io
import itertools
import json
import os
import random
import signal
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_vitreg.images import ImageSource, ImageStream, open_images
from modeling_vitreg.pretraining.views.colors import change_batch
from modeling_vitreg.pretraining.views.crops import CropSettings, MultiCrop
from modeling_vitreg.pretraining.views.loader import ViewLoader


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def _encode(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file, "png")
    return file.getvalue()


def _open_folder(folder, *, num_images: int = 22, broken: tuple[int, ...] = ()) -> ImageSource:
    """Images of one grey, which is their number."""
    folder.mkdir(exist_ok=True)
    for number in range(num_images):
        content = _encode(number)
        (folder / f"{number:03}.png").write_bytes(content[:40] if number in broken else content)
    return open_images(str(folder))


def _open_shards(folder, *, num_shards: int = 4, broken: tuple[int, ...] = ()) -> ImageStream:
    """Shards of 6 images; blocks of 5, so that they end within steps, shards and passes."""
    folder.mkdir(exist_ok=True)
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(shard * 6, shard * 6 + 6):
                content = b"" if number in broken else _encode(number)
                entry = tarfile.TarInfo(f"{number:03}.png")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return open_images(str(folder), block_size=5)


OPEN = {"map": _open_folder, "stream": _open_shards}


def _make_views(image: Image.Image) -> dict[str, torch.Tensor]:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    noise = torch.randint(0, 256, (5, 3, 6, 4), dtype=torch.uint8)
    return {"global_views": noise[:2], "local_views": noise[2:, :, :2, :2], "plain": pixels[None, 0, 0, 0]}


def _make_masks(num_images: int, *, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(2, num_images, 6, generator=generator) < 0.5


def _make_loader(source, **changes) -> ViewLoader:
    settings = {"make_views": _make_views, "make_masks": _make_masks, "micro_batch_size": 3, "seed": 7}
    return ViewLoader(source, **{**settings, **changes})


def _take(loader: ViewLoader, count: int) -> list[dict]:
    return list(itertools.islice(loader, count))


def _seen(batches: list[dict]) -> list[int]:
    return torch.cat([batch["plain"][0] for batch in batches]).tolist()


def _assert_equal(batches: list[dict], expected: list[dict]) -> None:
    assert len(batches) == len(expected)
    for place, (batch, other) in enumerate(zip(batches, expected)):
        assert batch.keys() == other.keys()
        for name, value in batch.items():
            is_equal = torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
            assert is_equal, f"{name} of batch {place}"


# What a batch holds


def test_a_batch_holds_views_masks_labels_and_numbers(tmp_path):
    for number in range(4):
        folder = tmp_path / "set" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(_encode(number))
    loader = _make_loader(open_images(str(tmp_path / "set")), num_accumulations=2)
    batch = _take(loader, 2)[1]
    shapes = {name: tuple(value.shape) for name, value in batch.items() if torch.is_tensor(value)}
    views = {"global_views": (2, 3, 3, 6, 4), "local_views": (3, 3, 3, 2, 2), "plain": (1, 3)}
    assert shapes == {**views, "masks": (2, 3, 6), "labels": (3,), "numbers": (3,)}
    assert batch["labels"].tolist() == [number % 2 for number in _seen([batch])]
    assert batch["numbers"].tolist() == [3, 4, 5]
    assert batch["unreadable"] == []
    assert loader.images_per_step == 6


def test_images_without_labels_have_label_minus_one_and_masks_may_be_left_out(tmp_path):
    (batch,) = _take(_make_loader(_open_folder(tmp_path / "set"), make_masks=None), 1)
    assert batch["labels"].tolist() == [-1, -1, -1]
    assert "masks" not in batch


def test_every_image_appears_once_in_a_pass_and_in_another_order_in_the_next(tmp_path):
    seen = _seen(_take(_make_loader(_open_folder(tmp_path / "set")), 22))  # three passes of 22 images
    passes = [seen[:22], seen[22:44], seen[44:]]
    assert all(sorted(images) == list(range(22)) for images in passes)
    assert len(set(map(tuple, passes))) == 3
    assert passes[0] != _seen(_take(_make_loader(_open_folder(tmp_path / "set"), seed=8), 22))[:22]


def test_a_batch_may_hold_several_passes(tmp_path):
    batch, _ = _take(_make_loader(_open_folder(tmp_path / "set", num_images=5), micro_batch_size=12), 2)
    seen = _seen([batch])
    assert sorted(seen[:5]) == sorted(seen[5:10]) == list(range(5))
    assert len(batch["global_views"][0].flatten(1).unique(dim=0)) == 12  # the same image is cut anew each time


# The same batches whatever happens


@pytest.mark.parametrize("kind", OPEN)
def test_an_image_is_repeated_in_a_step_cut_anew_each_time(tmp_path, kind):
    source = OPEN[kind](tmp_path / "images")
    loader = _make_loader(source, micro_batch_size=8, num_repeats=3)
    batches = _take(loader, 4)  # of 3 images, two of them three times and one twice
    for batch in batches:
        seen, counts = np.unique(_seen([batch]), return_counts=True)
        assert len(seen) == 3 and sorted(counts) == [2, 3, 3]
        views = [view.numpy().tobytes() for view in batch["global_views"][0]]
        assert len(set(views)) == 8
    assert len(np.unique(_seen(batches))) == 12  # steps go on with other images
    state = loader.state_after(1)
    resumed = _make_loader(source, micro_batch_size=8, num_repeats=3, first_step=2, state=state)
    _assert_equal(_take(resumed, 2), batches[2:])
    alone = _seen(_take(_make_loader(source, micro_batch_size=8, num_repeats=1), 4))
    assert alone == _seen(_take(_make_loader(source, micro_batch_size=8), 4))


def test_repeats_of_an_image_are_spread_over_the_processes_as_in_deit(tmp_path):
    source = _open_folder(tmp_path / "images")
    parts = [
        _seen(_take(_make_loader(source, micro_batch_size=3, num_repeats=3, rank=rank, num_processes=3), 1))
        for rank in range(3)
    ]
    assert parts[0] == parts[1] == parts[2] and len(set(parts[0])) == 3


@pytest.mark.parametrize("kind", OPEN)
def test_batches_do_not_depend_on_workers_or_on_global_generators(tmp_path, kind):
    expected = _take(_make_loader(OPEN[kind](tmp_path / "set", broken=(3, 4))), 12)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = torch.get_rng_state()
    batches = _take(_make_loader(OPEN[kind](tmp_path / "set", broken=(3, 4)), num_workers=2), 12)
    _assert_equal(batches, expected)
    _assert_equal(_take(_make_loader(OPEN[kind](tmp_path / "set", broken=(3, 4))), 12), expected)
    assert torch.equal(torch.get_rng_state(), before)  # nor do they disturb the generator of the model


@pytest.mark.parametrize("num_accumulations", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", OPEN)
def test_a_run_that_is_interrupted_twice_sees_the_same_batches(tmp_path, kind, num_workers, num_accumulations):
    source = _open_folder(tmp_path / "set", broken=(3, 9))

    def make(**resume) -> ViewLoader:
        # A stream is opened anew, for it could remember where it was.
        opened = source if kind == "map" else _open_shards(tmp_path / "shards", broken=(3, 9))
        return _make_loader(opened, num_accumulations=num_accumulations, num_workers=num_workers, **resume)

    expected = _take(make(), 12 * num_accumulations)
    for stops in [(1, 5), (4, 8)] if num_workers else itertools.pairwise(range(1, 12)):
        batches, state, first = [], None, 0
        for stop in (*stops, 12):
            loader = make(first_step=first, state=state)
            batches += _take(loader, (stop - first) * num_accumulations)
            state, first = json.loads(json.dumps(loader.state_after(stop - 1))), stop
        _assert_equal(batches, expected)


@pytest.mark.parametrize("num_accumulations", [1, 2])
def test_two_processes_together_see_what_one_sees(tmp_path, num_accumulations):
    source = _open_folder(tmp_path / "set", broken=(3,))
    whole = _take(_make_loader(source, micro_batch_size=6, num_accumulations=num_accumulations), 10)
    halves = [
        _take(_make_loader(source, rank=rank, num_processes=2, num_accumulations=num_accumulations), 10)
        for rank in (0, 1)
    ]
    for first, second, batch in zip(*halves, whole):
        for name, value in batch.items():
            if torch.is_tensor(value):
                axis = 1 if name in ("global_views", "local_views", "plain", "masks") else 0
                assert torch.equal(torch.cat([first[name], second[name]], axis), value), name
        assert first["unreadable"] + second["unreadable"] == batch["unreadable"]


def test_a_source_with_an_index_goes_on_with_another_number_of_processes(tmp_path):
    source = _open_folder(tmp_path / "set")
    expected = _take(_make_loader(source, micro_batch_size=6), 8)
    state = _make_loader(source, micro_batch_size=6).state_after(3)
    half = _make_loader(source, rank=1, num_processes=2, first_step=4, state=state)
    assert _seen(_take(half, 4)) == [number for batch in expected[4:] for number in _seen([batch])[3:]]


@pytest.mark.parametrize("num_shards", [4, 3])  # 3 cannot be split, so the images are
def test_two_processes_of_a_stream_share_a_pass(tmp_path, num_shards):
    count = num_shards * 6 // 2
    first, second = (
        _seen(
            _take(_make_loader(_open_shards(tmp_path / "set", num_shards=num_shards), rank=rank, num_processes=2), 8)
        )
        for rank in (0, 1)
    )
    for start in (0, count):
        assert sorted(first[start : start + count] + second[start : start + count]) == list(range(2 * count))


def test_states_of_a_stream_are_kept_for_the_last_steps_only(tmp_path):
    loader = _make_loader(_open_shards(tmp_path / "set"))
    batches = iter(loader)
    for _ in range(40):
        next(batches)
    assert loader.state_after(30)["step"] == 30
    for step in (3, 40):
        with pytest.raises(ValueError, match=rf"expected a step whose state is known, 23 \.\.\. 39, got {step}"):
            loader.state_after(step)


# Images that cannot be read


def test_an_unreadable_image_is_replaced_by_the_next_readable_one(tmp_path):
    whole = _take(_make_loader(_open_folder(tmp_path / "set")), 7)
    batches = _take(_make_loader(_open_folder(tmp_path / "set", broken=(3, 4, 21))), 7)
    substitutes = {3: 5, 4: 5, 21: 0}
    assert _seen(batches) == [substitutes.get(number, number) for number in _seen(whole)]
    for batch, other in zip(batches, whole):
        assert torch.equal(batch["global_views"], other["global_views"])  # cut as the image of this number
        broken = [number for number in _seen([other]) if number in substitutes]
        assert [name for name, _ in batch["unreadable"]] == [str(tmp_path / "set" / f"{n:03}.png") for n in broken]
        assert all(reason for _, reason in batch["unreadable"])


def test_an_unreadable_image_of_a_stream_is_replaced_by_one_read_with_it(tmp_path):
    for size in (1, 12):
        whole = _take(_make_loader(_open_shards(tmp_path / "set"), micro_batch_size=size), 24 // size)
        changes = {"micro_batch_size": size, "max_unreadable_share": 1.0}
        batches = _take(_make_loader(_open_shards(tmp_path / "set", broken=(3, 4)), **changes), 24 // size)
        seen, before = _seen(batches), _seen(whole)
        assert [new == old for new, old in zip(seen, before)] == [number not in (3, 4) for number in before]
        assert not {3, 4} & set(seen)
        assert sorted(name for batch in batches for name, _ in batch["unreadable"]) == ["003.png", "004.png"]
        if size == 12:
            assert all(set(_seen([new])) <= set(_seen([old])) for new, old in zip(batches, whole))


def test_too_many_unreadable_images_stop_the_loader(tmp_path):
    source = _open_folder(tmp_path / "set", num_images=20, broken=(3, 4))
    message = (
        r"2\d of 200 images \(1\d\.\d%\) are unreadable, expected at most 5\.0%\. The first: .*/00[34]\.png: .*"
        r"Repair or remove them, or raise max_unreadable_share\."
    )
    batches = iter(_make_loader(source, micro_batch_size=10))
    for _ in range(19):
        next(batches)
    with pytest.raises(RuntimeError, match=message):
        next(batches)
    assert len(_take(_make_loader(source, micro_batch_size=10, max_unreadable_share=0.11), 40)) == 40
    with pytest.raises(RuntimeError, match=r"[12] of (10|20) images .* expected at most 0\.0%"):
        _take(_make_loader(source, micro_batch_size=10, max_unreadable_share=0.0), 2)


@pytest.mark.parametrize("kind", OPEN)
def test_a_source_of_which_nothing_can_be_read_stops_the_loader_at_once(tmp_path, kind):
    source = OPEN[kind](tmp_path / "set", broken=tuple(range(24)))
    with pytest.raises(RuntimeError, match=r"none of \d+ images in a row can be read; the first: .*png: .*complete"):
        _take(_make_loader(source), 1)


# What goes wrong elsewhere


def _fail(image):
    raise KeyError("mean")


def _die(image):
    os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_make_views_names_the_image(tmp_path, num_workers):
    loader = _make_loader(_open_folder(tmp_path / "set"), make_views=_fail, num_workers=num_workers)
    with pytest.raises(RuntimeError, match=r"failed on image number 0, .*004.png, 8 x 8 pixels: KeyError: 'mean'"):
        _take(loader, 1)


def test_a_worker_that_dies_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds it is waited for
    loader = _make_loader(_open_folder(tmp_path / "set"), make_views=_die, num_workers=1)
    with pytest.raises(RuntimeError, match=r"a worker process died: .*use fewer workers or a smaller micro-batch"):
        _take(loader, 1)


def test_views_and_masks_of_unexpected_shapes_are_refused(tmp_path):
    source = _open_folder(tmp_path / "set")
    with pytest.raises(ValueError, match=r"make_views returned .* all images need the same shapes"):
        _take(_make_loader(source, make_views=lambda image: {"views": torch.zeros(1, image.getpixel((0, 0))[0])}), 1)
    with pytest.raises(ValueError, match=r"torch.float32 \(2, 4, 5\); expected bool \(views, 3, patches\)"):
        _take(_make_loader(source, make_masks=lambda num_images, generator: torch.zeros(2, 4, 5)), 1)


def test_bad_numbers_are_refused(tmp_path):
    source = _open_folder(tmp_path / "set")
    cases = {
        "micro_batch_size to be a positive integer, got 0": {"micro_batch_size": 0},
        "num_accumulations to be a positive integer, got 1.5": {"num_accumulations": 1.5},
        "num_processes to be a positive integer, got -1": {"num_processes": -1},
        "rank in 0 ... 1, got 2": {"rank": 2, "num_processes": 2},
        "seed to be 0 or a positive integer, got None": {"seed": None},
        "num_workers to be 0 or a positive integer, got -1": {"num_workers": -1},
        "first_step to be 0 or a positive integer, got -3": {"first_step": -3},
        r"max_unreadable_share in \[0, 1\], got 5": {"max_unreadable_share": 5},
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            _make_loader(source, **changes)


def test_a_state_of_another_run_is_refused(tmp_path):
    source = _open_folder(tmp_path / "set")
    state = _make_loader(source).state_after(4)
    cases = {
        "step 6, got 4": (source, {"first_step": 7}),
        "seed 8, got 7": (source, {"seed": 8}),
        "images_per_step 6, got 3": (source, {"num_accumulations": 2}),
        "source '.*', got '.*'": (_open_folder(tmp_path / "other", num_images=21), {}),
    }
    for message, (images, changes) in cases.items():
        with pytest.raises(ValueError, match=f"the state belongs to another run: expected .*{message}"):
            _make_loader(images, **{"first_step": 5, "state": state, **changes})
    with pytest.raises(ValueError, match="first_step=5 of a stream needs the state after step first_step - 1"):
        _make_loader(_open_shards(tmp_path / "shards"), first_step=5)


# Colours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_the_device_change_the_same_colours_of_the_same_images(tmp_path, num_workers):
    source = _open_folder(tmp_path / "set", num_images=12)
    crops = {"make_views": MultiCrop(CropSettings(num_local=2, global_size=24, local_size=16)), "make_masks": None}
    painted = _take(_make_loader(source, changes_colors=True, num_workers=num_workers, **crops), 4)
    drawn = _take(_make_loader(source, num_workers=num_workers, **crops), 4)
    for batch, other in zip(painted, drawn):
        assert other["global_colors"].shape[:2] == (2, 3) and other["local_colors"].device.type == "cpu"
        assert not torch.equal(batch["global_views"], other["global_views"])
        _assert_equal([batch], [change_batch(other)])
    # Parameters belong to the number of an image: a step of 6 images has those of two steps of 3.
    larger = _take(_make_loader(source, changes_colors=True, micro_batch_size=6, **crops), 2)
    for name in ("global_views", "local_views"):
        assert torch.equal(
            torch.cat([batch[name] for batch in larger], dim=1), torch.cat([batch[name] for batch in painted], dim=1)
        )
    resumed = _take(_make_loader(source, changes_colors=True, first_step=2, **crops), 2)
    _assert_equal(resumed, painted[2:])
