"""Sizes of views that are drawn for each step: published shares, the same in all processes, resumed bit for bit."""

import collections
import re

import pytest
import torch
import training_program

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.images import open_images
from modeling_vitreg.pretraining.build import make_objective
from modeling_vitreg.pretraining.run.recipe import make_recipe
from modeling_vitreg.pretraining.views.batches import SEED_OF_SIZES
from modeling_vitreg.pretraining.views.crops import CropSettings, SizedCrops
from modeling_vitreg.pretraining.views.loader import ViewLoader
from modeling_vitreg.pretraining.views.masking import MaskMaker, MaskSettings


ROWS = ((16, 8, 32, 0.5), (32, 8, 48, 0.25), (32, 16, 48, 0.25))
CROPS = {"num_local": 1, "global_size": 32, "local_size": 16, "sizes": [list(row) for row in ROWS]}
RECIPE = {
    "objective": "dinov2",
    "model": {**training_program.MODEL, "initializer_range": 0.2},
    "num_register_tokens": 2,
    "crops": CROPS,
    "settings": {
        "num_prototypes": 24,
        "hidden_width": 32,
        "bottleneck_width": 16,
        "gram": {"weight": 2.0, "teacher": "ema", "begin": 2},
    },
    "num_steps": 8,
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return training_program.make_run_folder(tmp_path_factory.mktemp("sizes"), RECIPE)


def _loader(folder, *, rank=0, num_processes=1, num_workers=0, first_step=0):
    masks = MaskMaker(2, (4, 4), MaskSettings(), patch_shape=(8, 8))
    return iter(
        ViewLoader(
            open_images(str(folder / "photos")),
            make_views=SizedCrops(CropSettings(**CROPS), 3, has_gram=True),
            make_masks=masks,
            micro_batch_size=4 // num_processes // 2,
            num_accumulations=2,
            rank=rank,
            num_processes=num_processes,
            seed=5,
            num_workers=num_workers,
            first_step=first_step,
        )
    )


def _sides(batch: dict) -> tuple[int, ...]:
    sides = tuple(batch[f"{kind}_views"].shape[-1] for kind in ("global", "local", "gram"))
    assert batch["masks"].shape[2] == (sides[0] // 8) ** 2
    return sides


def test_a_step_has_one_row_of_sizes_in_all_processes_and_micro_batches_whenever_it_begins(folder):
    whole = [next(loader) for loader in [_loader(folder)] for _ in range(16)]
    steps = [_sides(batch) for batch in whole]
    assert steps[::2] == steps[1::2] and len(set(steps)) == 3  # two micro-batches a step
    ranks = [_loader(folder, rank=rank, num_processes=2, num_workers=rank) for rank in (0, 1)]
    for number, batch in enumerate(whole):
        parts = [next(rank) for rank in ranks]
        assert [_sides(part) for part in parts] == [steps[number]] * 2
        for name in ("global_views", "local_views", "gram_views", "masks"):
            assert torch.equal(torch.cat([part[name] for part in parts], dim=1), batch[name])
    later = _loader(folder, first_step=5)
    for batch in whole[10:]:
        resumed = next(later)
        assert all(torch.equal(resumed[name], batch[name]) for name in ("global_views", "gram_views", "masks"))


def test_rows_are_drawn_as_often_as_they_say():
    crops, counts = CropSettings(**CROPS), collections.Counter()
    for step in range(2000):
        drawn, gram_size = crops.draw_sizes(SEED_OF_SIZES + 10 * step)
        counts[drawn.global_size, drawn.local_size, gram_size] += 1
        assert drawn.sizes is None and drawn.num_local == crops.num_local
    for *sides, share in ROWS:
        assert counts[tuple(sides)] / 2000 == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops.sizes": [[32, 16, 48]]}, "crops: expected sizes to be rows of [global_size, local_size, gram_size"),
        ({"crops.sizes": [[32, 16, 48, 0.7]]}, "whose probabilities sum to 1, got 0.7"),
        ({"crops.sizes": [[32, 16, 48.5, 1]]}, "sides of 1 or more pixels and a probability above 0"),
        ({"crops.sizes": 32}, "such as [[512, 112, 768, 0.5], [768, 112, 1152, 0.5]], got 32"),
        (
            {"crops.global_size": 64},
            "crops: global_size 64 and sizes up to 32 contradict each other: set crops.global",
        ),
        ({"settings.gram.resolution": 2.0}, "settings: gram.resolution 2 and crops.sizes contradict each other"),
        ({"crops.sizes": [[32, 16, 50, 1]]}, "crops.sizes 50 and the teacher's patch of 8 contradict each other"),
        ({"crops.sizes": [[32, 16, 48, 0.5], [20, 16, 48, 0.5]]}, "views of 20 pixels, no multiple of the patch of 8"),
    ],
)
def test_wrong_sizes_are_refused_with_what_to_set(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_objective(make_recipe(RECIPE).with_changes(changes))


def test_other_objectives_refuse_sizes():
    values = RECIPE | {"objective": "lejepa", "settings": {}}
    with pytest.raises(
        ValueError, match=r"sizes are read by the objective dinov2, not by LeJEPA: leave out crops.sizes"
    ):
        make_objective(make_recipe(values))


@pytest.mark.slow
def test_a_killed_run_draws_the_same_sizes_and_two_processes_follow_one(folder):
    options = ("--data", "photos")
    training_program.run("pretrain.py", folder, *options, output="whole")
    training_program.assert_a_killed_run_goes_on("pretrain.py", folder, *options, num_steps=8)
    training_program.run("pretrain.py", folder, *options, output="two", processes=2)
    losses = [torch.tensor(training_program.losses_of(folder / run)) for run in ("two", "whole")]
    torch.testing.assert_close(*losses, rtol=2e-3, atol=2e-3)
    assert ViTWithRegistersModel.from_pretrained(folder / "whole" / "model").config.image_size == 32
