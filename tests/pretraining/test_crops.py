"""Views: sizes, what share of the image they show, how often they lose colours, and where chance comes from."""

import pytest
import torch
from colored_views import ColoredCrop
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from modeling_vitreg.pretraining.views.crops import CropSettings


SIDE = 256
PLAIN = {"flip": 0.0, "color_jitter_probability": 0.0, "gray": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": 0.0}
SMALL = {"global_size": 32, "local_size": 16}


def _coordinates() -> Image.Image:
    """Red is the column, green the row."""
    column = torch.arange(SIDE).expand(SIDE, SIDE)
    pixels = torch.stack([column, column.T, torch.full_like(column, 128)], dim=-1)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def _noise() -> Image.Image:
    return Image.fromarray(torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy())


def _share_of_image(view: Tensor) -> float:
    """Share of the area of `_coordinates` that a view shows."""
    sides = []
    for channel, axis in ((0, 2), (1, 1)):
        places = view[channel].float().mean(dim=2 - axis)  # along the axis in which the channel changes
        size = len(places)
        sides.append((places[-1] - places[0]).abs().item() * size / (size - 1))
    return sides[0] * sides[1] / SIDE**2


def test_views_have_their_numbers_and_sizes_and_are_bytes(photograph):
    crop = ColoredCrop(CropSettings(num_global=3, num_local=5, global_size=48, local_size=24))
    views = crop(photograph)
    assert views["global_views"].shape == (3, 3, 48, 48)
    assert views["local_views"].shape == (5, 3, 24, 24)
    assert {view.dtype for view in views.values()} == {torch.uint8}


def test_without_local_views_there_is_no_entry_for_them(photograph):
    assert set(ColoredCrop(CropSettings(num_local=0, global_size=32))(photograph)) == {"global_views"}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_any_mode_become_three_channels(photograph, mode):
    views = ColoredCrop(CropSettings(num_local=0, global_size=32))(photograph.convert(mode))
    assert views["global_views"].shape == (2, 3, 32, 32)


def test_the_global_generator_of_torch_decides_the_views(photograph):
    crop = ColoredCrop(CropSettings(**SMALL))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(crop(photograph))
    for name in ("global_views", "local_views"):
        assert torch.equal(draws[0][name], draws[1][name])
        assert not torch.equal(draws[0][name], draws[2][name])


def test_views_of_one_image_differ(photograph):
    views = ColoredCrop(CropSettings(**SMALL))(photograph)
    for group in views.values():
        assert len({view.numpy().tobytes() for view in group}) == len(group)


def test_crops_show_the_share_of_the_image_that_they_are_told_to():
    scales = {"global_scale": (0.4, 0.8), "local_scale": (0.05, 0.2)}
    crop, image = ColoredCrop(CropSettings(num_global=20, num_local=20, **SMALL, **scales, **PLAIN)), _coordinates()
    for name, (low, high) in (("global_views", (0.4, 0.8)), ("local_views", (0.05, 0.2))):
        shares = torch.tensor([_share_of_image(view) for _ in range(6) for view in crop(image)[name]])
        assert low * 0.93 < shares.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < shares.max() < high * 1.07
        # The area is uniform in the range.
        assert shares.mean().item() == pytest.approx((low + high) / 2, rel=0.08)


def test_a_crop_of_the_whole_square_image_is_the_image_resized():
    settings = CropSettings(num_global=1, num_local=0, global_size=64, global_scale=(1.0, 1.0), **PLAIN)
    whole = [ColoredCrop(settings)(_coordinates())["global_views"][0] for _ in range(20)]
    # Whatever is drawn has aspect 1 or does not fit; then the largest crop of an allowed aspect is taken.
    assert max(_share_of_image(view) for view in whole) == pytest.approx(1, abs=0.02)


def test_each_probability_is_the_share_of_views_that_it_changes():
    image, num_draws = _noise(), 60
    whole = {"global_scale": (1.0, 1.0), "local_scale": (1.0, 1.0), "global_size": 64, "local_size": 64}

    def share(changes: dict, *, of: str, number: int | None = None, is_changed) -> float:
        crop = ColoredCrop(CropSettings(num_global=3, num_local=2, **{**whole, **PLAIN, **changes}))
        views = torch.cat([crop(image)[of][slice(number)] for _ in range(num_draws)])
        return sum(bool(is_changed(view)) for view in views) / len(views)

    def is_gray(view):
        return torch.equal(view[0], view[1]) and torch.equal(view[1], view[2])

    assert share({}, of="global_views", is_changed=is_gray) == 0
    assert share({"gray": 0.3}, of="global_views", is_changed=is_gray) == pytest.approx(0.3, abs=0.12)
    assert share({"gray": 1.0}, of="local_views", is_changed=is_gray) == 1

    flat = Image.new("RGB", (64, 64), (200, 60, 90))
    image = flat

    def is_other_colour(view):
        return view[:, 0, 0].tolist() != [200, 60, 90]

    assert share({}, of="local_views", is_changed=is_other_colour) == 0
    jittered = share({"color_jitter_probability": 0.5}, of="local_views", is_changed=is_other_colour)
    assert jittered == pytest.approx(0.5, abs=0.15)
    assert share({"solarize": 1.0}, of="local_views", is_changed=is_other_colour) == 0
    assert share({"solarize": 1.0}, of="global_views", number=1, is_changed=is_other_colour) == 0
    solarized = share({"solarize": 0.4}, of="global_views", is_changed=is_other_colour)
    assert solarized == pytest.approx(0.4 * 2 / 3, abs=0.12)  # of three global views, never the first


def test_solarisation_inverts_what_is_bright():
    settings = CropSettings(num_global=2, num_local=0, global_size=16, **{**PLAIN, "solarize": 1.0})
    views = ColoredCrop(settings)(Image.new("RGB", (32, 32), (200, 60, 128)))["global_views"]
    assert views[0, :, 0, 0].tolist() == [200, 60, 128]
    assert views[1, :, 0, 0].tolist() == [55, 60, 127]


@pytest.mark.parametrize("blurred", [0, 1, 2])
def test_each_kind_of_view_has_its_own_probability_of_blur(blurred):
    blur = tuple(float(kind == blurred) for kind in range(3))
    changes = {"blur": blur, "global_scale": (1.0, 1.0), "local_scale": (1.0, 1.0)}
    settings = CropSettings(num_global=3, num_local=3, global_size=64, local_size=64, **{**PLAIN, **changes})
    image, crop = _noise(), ColoredCrop(settings)
    views = [crop(image) for _ in range(8)]
    kinds = [
        torch.stack([view["global_views"][0] for view in views]),
        torch.cat([view["global_views"][1:] for view in views]),
        torch.cat([view["local_views"] for view in views]),
    ]
    spreads = [kind.float().std().item() for kind in kinds]
    for kind, spread in enumerate(spreads):
        assert (spread < 50) == (kind == blurred), spreads  # noise of bytes spreads by 74, less at a resized border


def test_a_flip_mirrors_columns_and_keeps_rows():
    changes = {**PLAIN, "flip": 1.0}
    view = ColoredCrop(CropSettings(num_global=1, num_local=0, global_size=32, **changes))(_coordinates())[
        "global_views"
    ][0]
    assert (view[0].float().diff(dim=1) < 0).all()
    assert (view[1].float().diff(dim=0) > 0).all()
    flipped = [
        ColoredCrop(CropSettings(num_global=20, num_local=0, global_size=32, **{**PLAIN, "flip": 0.5}))(_coordinates())
        for _ in range(10)
    ]
    shares = torch.cat([views["global_views"] for views in flipped])[:, 0, 0].float()
    assert (shares[:, -1] < shares[:, 0]).float().mean().item() == pytest.approx(0.5, abs=0.14)


def test_one_global_view_without_colours_is_what_mae_takes():
    settings = CropSettings(
        num_global=1, num_local=0, global_size=32, global_scale=(0.2, 1.0), **{**PLAIN, "flip": 0.5}
    )
    colour = (13, 200, 77)
    views = ColoredCrop(settings)(Image.new("RGB", (50, 40), colour))
    assert views["global_views"].shape == (1, 3, 32, 32)
    assert torch.equal(
        views["global_views"][0], torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"global_scale": (0.5, 0.3)}, "global_scale"),
        ({"local_scale": (0.0, 0.3)}, "local_scale"),
        ({"local_scale": (0.1, 1.3)}, "local_scale"),
        ({"num_global": 0}, "expected num_global of 1 or more"),
        ({"num_local": -1}, "num_local of 0 or more, got -1"),
        ({"color_jitter": (0.4, 0.4)}, "4 values in color_jitter"),
        ({"blur": (1.0, 0.1)}, "3 in blur"),
        ({"blur": (1.0, 0.1, 1.5)}, "blur"),
        ({"gray": 1.5}, r"expected gray in \[0, 1\]"),
        ({"flip": -0.1}, r"expected flip in \[0, 1\]"),
        ({"global_size": 0}, "global_size"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        CropSettings(**values)


def test_a_resized_crop_is_that_of_torchvisions_transforms_from_the_same_seed(photograph):
    settings = CropSettings(num_global=1, num_local=0, global_size=48, color_augmentation="none")
    oracle = v2.Compose(
        [
            v2.RandomResizedCrop(48, scale=settings.global_scale, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(settings.flip),
        ]
    )
    crop, pixels = ColoredCrop(settings), v2.functional.pil_to_tensor(photograph.convert("RGB"))
    for seed in range(20):
        torch.manual_seed(seed)
        (view,), next_draw = crop(photograph)["global_views"], torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(view, oracle(pixels)) and torch.equal(next_draw, torch.rand(1))
