"""The real clients of the Hub against a stand-in: which commit of a dataset was read, and what is said if none was."""

import io
import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
from hub_stand_in import Cut, HubStandIn
from PIL import Image


# Opens what each line of its input says; the network is used here only.
WORKER = """
import itertools, json, sys
import numpy as np
from modeling_vitreg.evaluation import open_data
from modeling_vitreg.images import DataOptions, decode_image, open_images
def grey(image):
    return int(np.asarray(image)[0, 0, 0])
def numbers(images, count):
    if hasattr(images, "read"):
        return [grey(images.read(index)[0]) for index in range(len(images))]
    rows = itertools.islice(images.examples(seed=0), count)
    return sorted(grey(decode_image(raw)) for raw, _ in rows)
def summarise(data):
    example = data.test[0]
    answer = {"name": data.name, "revision": data.revision, "sizes": [len(data.train), len(data.test)]}
    maps = {"mask": example.mask, "depth": example.depth}
    return answer | {kind: float(values[0, 0]) for kind, values in maps.items() if values is not None}
for line in sys.stdin:
    options = json.loads(line)
    count, is_data = options.pop("count", 0), options.pop("is_data", False)
    try:
        if is_data and "options" in options:
            options["options"] = DataOptions(**options["options"])
        opened = open_data(**options) if is_data else open_images(**options)
        answer = summarise(opened) if is_data else {"revision": opened.revision, "numbers": numbers(opened, count)}
    except Exception as error:
        answer = {"error": type(error).__name__, "words": str(error)}
    print("ANSWER" + json.dumps(answer), flush=True)
"""


class Reader:
    """A process that opens datasets, with the settings that the clients read when they are imported."""

    def __init__(self, hub, home):
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=hub.environment(home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, source, **options):
        self._process.stdin.write(json.dumps({"source": source, **options}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER"):
                return json.loads(line.removeprefix("ANSWER"))
        raise AssertionError("the reader died")

    def kill(self):
        self._process.kill()
        self._process.communicate()


def _parquet(numbers, **columns):
    """Images of one grey, which is their number."""
    pixels = [Image.fromarray(np.full((8, 8, 3), number, np.uint8)) for number in numbers]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])}
    kinds |= {name: datasets.Image() for name in columns}
    content = {"image": pixels, "label": [number % 2 for number in numbers], **columns}
    file = io.BytesIO()
    datasets.Dataset.from_dict(content, features=datasets.Features(kinds)).to_parquet(file)
    return file.getvalue()


def _map(number, kind):
    return Image.fromarray(np.full((8, 8), number, kind))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    datasets.disable_progress_bars()
    with HubStandIn(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def commits(hub):
    """Two commits of user/greys, the second with other training images."""
    files = {
        "data/train-00000-of-00001.parquet": _parquet(range(4)),
        "data/test-00000-of-00001.parquet": _parquet([4]),
    }
    first = hub.add("datasets/user/greys", files)
    return first, hub.add("datasets/user/greys", {"data/train-00000-of-00001.parquet": _parquet(range(10, 15))})


@pytest.fixture(scope="module")
def read(hub, commits, tmp_path_factory):
    reader = Reader(hub, tmp_path_factory.mktemp("home"))
    yield reader
    reader.kill()


@pytest.fixture(autouse=True)
def _without_faults(hub):
    hub.cut = None


@pytest.mark.parametrize("is_streaming", [False, True])
def test_the_revision_is_the_commit_and_a_pinned_one_gives_the_old_data(read, commits, is_streaming):
    first, second = commits
    now = read("user/greys", is_streaming=is_streaming, count=5)
    assert now == {"revision": second, "numbers": [10, 11, 12, 13, 14]}
    pinned = read(f"user/greys@{first}", is_streaming=is_streaming, count=4)
    assert pinned == {"revision": first, "numbers": [0, 1, 2, 3]}
    assert read("user/greys:default@main", is_streaming=is_streaming, count=5) == now


def test_maps_of_the_hub_are_read_with_the_commit_that_they_are_of(hub, read):
    maps = {"mask": [_map(3, np.uint8)] * 4, "depth": [_map(2000, np.uint16)] * 4}
    commit = hub.add("datasets/user/maps", {"train.parquet": _parquet(range(4), **maps)})
    columns = {"mask_column": "mask", "depth_column": "depth", "depth_scale": 0.001}
    found = read("user/maps@main", is_data=True, options=columns)
    assert found == {"name": "user/maps", "revision": commit, "sizes": [3, 1], "mask": 3.0, "depth": 2.0}
    assert read("user/greys", is_data=True)["sizes"] == [5, 1]  # its own test split


def test_what_the_hub_does_not_have_is_named(hub, read, tmp_path):
    cases = {
        "user/nothing": "got 'user/nothing', which exists neither locally nor on the Hub: Dataset 'user/nothing'",
        "user/greys@v9": "Revision 'v9' doesn't exist for dataset 'user/greys'",
        "user/greys:rare": "'rare' not found. Available: ['default']",
    }
    for source, words in cases.items():
        answer = read(source)
        assert answer["error"] == "ValueError" and words in answer["words"], answer
    assert "has no split 'dev'; it has 'test', 'train'" in read("user/greys", split="dev")["words"]
    hub.add("datasets/user/empty", {"notes.txt1": b"nothing"})
    assert "could not be opened" in read("user/empty")["words"]


def test_a_cut_network_is_told_from_a_name_that_does_not_exist(hub, read, commits):
    hub.cut = Cut("user/unseen")
    answer = read("user/unseen")
    assert answer["error"] == "RuntimeError" and "the Hub did not answer" in answer["words"], answer
    assert "check the connection and HF_HUB_OFFLINE" in answer["words"]


def test_a_download_that_breaks_off_says_so_and_the_next_one_succeeds(hub, read):
    commit = hub.add("datasets/user/broken", {"train.parquet": _parquet([7])})
    hub.cut = Cut("GET .*parquet")
    answer = read("user/broken")
    assert answer["error"] == "RuntimeError" and "the Hub did not answer" in answer["words"], answer
    hub.cut = None
    assert read("user/broken") == {"revision": commit, "numbers": [7]}


def test_without_network_the_cache_is_read_but_never_in_place_of_another_revision(hub, commits, tmp_path):
    # The library itself takes the latest of its cache, whatever revision was asked for.
    first, second = commits
    read = Reader(hub, tmp_path / "home")
    assert read(f"user/greys@{first}")["revision"] == first
    hub.cut = Cut("user/greys")
    assert read("user/greys")["revision"] == first == read(f"user/greys@{first}")["revision"]
    answer = read(f"user/greys@{second}")
    assert answer["error"] == "RuntimeError" and f"the cache holds 'user/greys' at {first}" in answer["words"]
    read.kill()


def test_a_folder_here_has_no_revision(tmp_path, monkeypatch):
    from modeling_vitreg.images import open_images

    (tmp_path / "greys").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'greys' is a local folder, which has no revision 'v1'"):
        open_images("greys@v1")
