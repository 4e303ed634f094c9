"""The built-in scenes: the same bytes everywhere, truth that agrees with itself and with geometry, datasets."""

import hashlib
import itertools
import pathlib
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from modeling_vitreg.scenes import (
    CLASS_NAMES,
    COLOUR_NAMES,
    FARTHEST,
    SEMANTIC_NAMES,
    SHAPE_NAMES,
    TEXTURE_NAMES,
    SceneSettings,
    describe_preset,
    is_scenes,
    make_scenes_dataset,
    preset_settings,
    render_scene,
    stream_scenes,
)


SMALL = SceneSettings(image_size=48)
DENSE = ("image", "instance_mask", "semantic_mask", "depth")


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(index, settings=SMALL) for index in range(60)]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


def _digest(scene) -> str:
    digest = hashlib.sha256(f"{scene.label} {scene.caption}".encode())
    for array in (scene.boxes, scene.categories, *(getattr(scene, name) for name in DENSE)):
        digest.update(array.tobytes())
    return digest.hexdigest()


def test_zoom_makes_the_main_object_larger_and_leaves_the_scene_alone(scenes):
    near = [render_scene(index, settings=SceneSettings(image_size=48, zoom=1.6)) for index in range(20)]
    areas = [[(scene.instance_mask == 1).mean() for scene in part] for part in (scenes[:20], near)]
    assert 1.8 < np.mean(areas[1]) / np.mean(areas[0]) < 2.56  # 1.6 squared, less what is cut off
    captions = [[scene.caption for scene in part if len(scene.boxes) == 1] for part in (scenes[:20], near)]
    assert set(captions[0]) <= set(captions[1])


def test_colours_are_those_that_the_caption_names(scenes):
    assert len(COLOUR_NAMES) == 60
    for scene in scenes:
        assert COLOUR_NAMES[scene.colours] in scene.caption


def test_presets_have_one_size_for_a_model_and_a_name_that_tells_it():
    single, several = (preset_settings(name, side=48) for name in ("scenes:single", "scenes"))
    assert (single.image_size, single.max_objects, several.max_objects) == (64, 1, 4)
    assert describe_preset("scenes:single", single) == "scenes:single of 64 pixels"
    assert preset_settings("scenes", side=518).image_size == 224 and preset_settings("scenes", side=8).image_size == 16
    assert is_scenes("scenes:single") and not is_scenes("my/scenes") and not is_scenes(pathlib.Path("scenes"))
    with pytest.raises(ValueError, match="no scenes 'scenes:many'; the presets are scenes, scenes:single"):
        is_scenes("scenes:many")


# Determinism -------------------------------------------------------------------------------------------------------


def test_a_scene_does_not_depend_on_what_was_rendered_before(scenes):
    for index in (7, 3, 7):
        assert _digest(render_scene(index, settings=SMALL)) == _digest(scenes[index])


def test_a_scene_is_the_same_in_another_process(scenes):
    program = """
from modeling_vitreg.scenes import SceneSettings, render_scene
scene = render_scene(5, settings=SceneSettings(image_size=48))
print(scene.image.tobytes().hex(), scene.depth.tobytes().hex(), scene.caption)
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=pathlib.Path(__file__).parents[2])
    image, depth, caption = run.stdout.strip().split(" ", 2)
    scene = scenes[5]
    assert (image, depth, caption) == (scene.image.tobytes().hex(), scene.depth.tobytes().hex(), scene.caption)


def test_other_indices_and_seeds_give_other_scenes(scenes):
    other_seed = [render_scene(index, settings=SceneSettings(image_size=48, seed=1)) for index in range(10)]
    digests = {_digest(scene) for scene in scenes + other_seed}
    assert len(digests) == len(scenes) + len(other_seed)


def test_a_larger_image_shows_the_same_arrangement(scenes):
    for index in range(8):
        large = render_scene(index, settings=SceneSettings(image_size=96))
        assert large.label == scenes[index].label
        np.testing.assert_allclose(large.boxes[0] / 2, scenes[index].boxes[0], atol=1.01)


# Truth -------------------------------------------------------------------------------------------------------------


def test_boxes_are_the_extents_of_the_instances(scenes):
    for scene in scenes:
        assert len(scene.boxes) == len(scene.categories) == scene.instance_mask.max()
        for rank, box in enumerate(scene.boxes, start=1):
            rows, columns = np.nonzero(scene.instance_mask == rank)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_the_semantic_mask_gives_each_instance_its_class_and_the_rest_a_background(scenes):
    for scene in scenes:
        is_object = scene.instance_mask > 0
        expected = scene.categories[scene.instance_mask[is_object].astype(int) - 1]
        assert (scene.semantic_mask[is_object] == expected).all()
        background = scene.semantic_mask[~is_object]
        assert background.min() >= len(CLASS_NAMES)
        assert background.max() < len(SEMANTIC_NAMES)
    seen = set(np.concatenate([np.unique(scene.semantic_mask) for scene in scenes]))
    assert set(range(len(CLASS_NAMES), len(SEMANTIC_NAMES))) <= seen


def test_rings_have_one_hole_at_most_and_other_solids_none():
    from skimage.measure import label

    settings = SceneSettings(image_size=144, max_objects=1)
    for index in range(60):
        scene = render_scene(index, settings=settings)
        outside = np.pad(scene.instance_mask == 0, 1, constant_values=True)
        is_ring = CLASS_NAMES[scene.label].endswith("ring")
        assert label(outside, connectivity=1).max() <= 1 + is_ring, index


def test_the_label_is_the_class_of_the_largest_visible_object(scenes):
    for scene in scenes:
        areas = np.bincount(scene.instance_mask.reshape(-1))[1:]
        assert (np.diff(areas.astype(int)) <= 0).all()
        assert scene.label == scene.categories[areas.argmax()]


def test_each_shape_has_several_textures_and_each_texture_several_shapes():
    assert len(set(CLASS_NAMES)) == len(CLASS_NAMES) == 24
    for word in SHAPE_NAMES + TEXTURE_NAMES:
        assert sum(word in name.split() for name in CLASS_NAMES) == 3


def test_objects_are_nearer_than_the_ground_behind_them(scenes):
    # The inverse depth of a plane is affine in the pixel, so visible ground tells where hidden ground lies.
    ground_ids = [SEMANTIC_NAMES.index(name) for name in ("floor", "grass", "sand")]
    rows, columns = np.mgrid[:48, :48]
    affine = np.stack([rows, columns, np.ones_like(rows)], axis=-1).astype(float)
    for scene in scenes:
        is_ground = np.isin(scene.semantic_mask, ground_ids) & (scene.depth < FARTHEST)
        inverse = 1 / scene.depth.astype(float)
        plane, *_ = np.linalg.lstsq(affine[is_ground], inverse[is_ground], rcond=None)
        ground = affine @ plane
        np.testing.assert_allclose(inverse[is_ground], ground[is_ground], atol=2e-2)
        is_object = scene.instance_mask > 0
        assert (inverse[is_object] > ground[is_object] - 2e-2).all()


def test_depth_is_in_metres_everywhere_and_farthest_in_the_sky(scenes):
    for scene in scenes:
        assert scene.depth.dtype == np.float32
        assert scene.depth.min() > 0.1
        assert scene.depth.max() <= FARTHEST
        assert (scene.depth[scene.semantic_mask == SEMANTIC_NAMES.index("sky")] == FARTHEST).all()


def test_the_nearer_of_two_solids_covers_the_other():
    # Every solid but a ring is convex, so the one in front shows a convex outline and the one behind misses a bite.
    from skimage.morphology import convex_hull_image

    count = 0
    for index in range(60):
        scene = render_scene(index, settings=SceneSettings(image_size=128))
        for rank, category in enumerate(scene.categories, start=1):
            mask = scene.instance_mask == rank
            steps = _steps_to_neighbours(scene, rank)
            if (
                steps.size > 4
                and mask.sum() > 300
                and (steps > 0).all()
                and not CLASS_NAMES[category].endswith("ring")
            ):
                assert mask.sum() > 0.95 * convex_hull_image(mask, offset_coordinates=False).sum(), index
                count += 1
    assert count > 20


def _steps_to_neighbours(scene, rank: int) -> np.ndarray:
    """How much farther other objects are, at the pixels where they touch this one in a row or a column."""
    steps = []
    for mask, depth in ((scene.instance_mask, scene.depth), (scene.instance_mask.T, scene.depth.T)):
        first, second, step = mask[:-1], mask[1:], depth[1:] - depth[:-1]
        steps += [step[(first == rank) & (second > 0) & (second != rank)]]
        steps += [-step[(second == rank) & (first > 0) & (first != rank)]]
    return np.concatenate(steps)


def test_captions_name_the_main_object_its_colours_and_its_material(scenes):
    for scene in scenes:
        assert CLASS_NAMES[scene.label] in scene.caption
        assert re.search(r"(matte|glossy|metallic)", scene.caption)
        assert re.fullmatch(r"[A-Z][^.]*\.", scene.caption)
        assert "  " not in scene.caption
        for category in scene.categories:
            assert CLASS_NAMES[category] in scene.caption
    assert len({scene.caption.split()[0] + scene.caption.split()[1] for scene in scenes}) > 5


def test_a_caption_that_says_left_is_true(scenes):
    count = 0
    for scene in scenes:
        for side, sign in (("left", -1), ("right", 1)):
            if f"to the {side} of" in scene.caption:
                middles = (scene.boxes[:, 0] + scene.boxes[:, 2]) / 2
                assert sign * (middles[0] - middles[1]) > 0
                count += 1
    assert count > 10


def test_images_have_large_areas_of_like_patches_and_objects_of_legible_size(scenes):
    backgrounds = [(scene.instance_mask == 0).mean() for scene in scenes]
    mains = [(scene.instance_mask == 1).mean() for scene in scenes]
    assert np.mean(backgrounds) > 0.6
    assert np.median(mains) > 0.08


def test_colour_alone_hardly_tells_the_class():
    from sklearn.neighbors import KNeighborsClassifier

    settings = SceneSettings(image_size=24)
    scenes = [render_scene(index, settings=settings) for index in range(800)]
    histograms = np.stack([_colour_histogram(scene.image) for scene in scenes])
    labels = np.array([scene.label for scene in scenes])
    nearest = KNeighborsClassifier(5).fit(histograms[:600], labels[:600])
    assert nearest.score(histograms[600:], labels[600:]) < 0.11  # chance 0.042, standard deviation 0.014
    assert np.bincount(labels, minlength=len(CLASS_NAMES)).min() > 12


def _colour_histogram(image: np.ndarray) -> np.ndarray:
    bins = (image // 64 @ np.array([16, 4, 1])).reshape(-1)
    return np.bincount(bins, minlength=64) / bins.size


# Sizes and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (16, 64), (64, 16), (33, 47), 16])
def test_images_may_be_small_or_not_square(size):
    settings = SceneSettings(image_size=size, max_objects=8)
    for index in range(20):
        scene = render_scene(index, settings=settings)
        assert scene.image.shape == (*settings.shape, 3)
        assert scene.depth.shape == scene.instance_mask.shape == scene.semantic_mask.shape == settings.shape
        assert np.isfinite(scene.depth).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 8}, "at least 16 pixels, got 8"),
        ({"image_size": (64,)}, r"a side or \(rows, columns\)"),
        ({"image_size": 64.0}, "got 64.0"),
        ({"image_size": (16, 128)}, "at most 4 times the shorter"),
        ({"max_objects": 0}, r"max_objects to be 1 \.\.\. 8, got 0"),
        ({"max_objects": 9}, "got 9"),
        ({"zoom": 3}, r"zoom in \[0.5, 2\], got 3"),
        ({"seed": -1}, "seed to be 0 or a positive integer, got -1"),
    ],
)
def test_settings_outside_their_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneSettings(**arguments)


def test_counts_and_indices_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="the index of a scene to be 0 or a positive integer, got -1"):
        render_scene(-1, settings=SMALL)
    with pytest.raises(ValueError, match="num_scenes to be a positive integer, got -3"):
        make_scenes_dataset(-3, settings=SMALL)
    with pytest.raises(ValueError, match="num_scenes to be a positive integer, got 0"):
        stream_scenes(settings=SMALL, num_scenes=0)
    with pytest.raises(ValueError, match="start to be 0 or a positive integer, got -2"):
        make_scenes_dataset(3, settings=SMALL, start=-2)


# Datasets ----------------------------------------------------------------------------------------------------------


def test_a_dataset_holds_what_was_rendered(scenes):
    dataset = make_scenes_dataset(6, settings=SMALL, start=3)
    assert dataset["index"][:] == list(range(3, 9))
    assert dataset.features["label"].names == list(CLASS_NAMES)
    for row, scene in zip(dataset, scenes[3:9]):
        _assert_row_equals(row, scene)


def test_a_second_call_opens_what_the_first_has_written(monkeypatch):
    first = make_scenes_dataset(3, settings=SMALL)
    monkeypatch.setattr("modeling_vitreg.scenes.dataset.render_scene", None)
    again = make_scenes_dataset(3, settings=SMALL)
    assert again.cache_files == first.cache_files
    assert again[2] == first[2]


def test_a_stream_gives_the_rows_of_the_dataset(scenes):
    stream = stream_scenes(settings=SMALL, start=3, num_scenes=6)
    rows = list(stream)
    assert [row["index"] for row in rows] == list(range(3, 9))
    assert stream.features == make_scenes_dataset(6, settings=SMALL, start=3).features
    for row, scene in zip(rows, scenes[3:9]):
        _assert_row_equals(row, scene)


def test_a_stream_without_end_starts_like_one_with_an_end():
    rows = itertools.islice(stream_scenes(settings=SMALL, start=4), 3)
    assert [row["index"] for row in rows] == [4, 5, 6]


def test_a_stream_resumes_at_the_next_scene_and_renders_nothing_twice(monkeypatch, scenes):
    stream = stream_scenes(settings=SMALL, num_scenes=2000)
    list(itertools.islice(stream, 5))
    state = stream.state_dict()
    rendered = []
    monkeypatch.setattr(
        "modeling_vitreg.scenes.dataset.render_scene",
        lambda index, *, settings: rendered.append(index) or render_scene(index, settings=settings),
    )
    resumed = stream_scenes(settings=SMALL, num_scenes=2000)
    resumed.load_state_dict(state)
    row = next(iter(resumed))
    assert rendered == [row["index"]] == [5]
    _assert_row_equals(row, scenes[5])


def test_workers_of_a_loader_share_the_scenes(scenes):
    from torch.utils.data import DataLoader

    stream = stream_scenes(settings=SMALL, num_scenes=11)
    rows = list(DataLoader(stream, batch_size=None, num_workers=2))
    assert sorted(row["index"] for row in rows) == list(range(11))
    for row in rows:
        _assert_row_equals(row, scenes[row["index"]])


def test_columns_become_tensors_on_request():
    row = make_scenes_dataset(1, settings=SMALL).with_format("torch")[0]
    assert tuple(row["image"].shape) == (3, 48, 48)
    assert tuple(row["boxes"].shape) == (len(row["categories"]), 4)
    assert row["depth"].is_floating_point()


def _assert_row_equals(row: dict, scene) -> None:
    for name in DENSE:
        assert isinstance(row[name], Image.Image)
        assert np.array_equal(np.asarray(row[name]), getattr(scene, name)), name
    assert (row["label"], row["caption"]) == (scene.label, scene.caption)
    assert (row["boxes"], row["categories"]) == (scene.boxes.tolist(), scene.categories.tolist())
