"""Changes of colour: torchvision on one image after the other is the oracle; batch and device change nothing."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from modeling_vitreg.pretraining.objectives.objective import Objective
from modeling_vitreg.pretraining.views.augmentation import DinoColors, RandomColors, ThreeColors
from modeling_vitreg.pretraining.views.colors import change, change_batch, change_colors, gaussian_kernel


JITTER = (0.4, 0.4, 0.2, 0.1)
SIZES = ((32, 32), (33, 47), (9, 5), (1, 7))
# Each operation: the parameters of three images, and what torchvision does to one of them.
FACTORS = (0.3137, 1.0, 1.7193)  # products with round ones lie on the border of two levels
ORACLES = {
    "brightness": (FACTORS, functional.adjust_brightness),
    "contrast": (FACTORS, functional.adjust_contrast),
    "saturation": (FACTORS, functional.adjust_saturation),
    "hue": ((-0.5, 0.03, 0.4), functional.adjust_hue),
    "gray": ((None,) * 3, lambda image, _: functional.rgb_to_grayscale(image, 3)),
    "blur": ((0.1, 0.9, 2.0), lambda image, sigma: functional.gaussian_blur(image, [9, 9], [sigma, sigma])),
    "solarize": ((0.0, 128, 178.5), functional.solarize),
    "sharpness": (FACTORS, functional.adjust_sharpness),
    "posterize": ((1, 4, 8), functional.posterize),
    "autocontrast": ((None,) * 3, lambda image, _: functional.autocontrast(image)),
    "equalize": ((None,) * 3, lambda image, _: functional.equalize(image)),
}
PARAMETERS = {"blur": gaussian_kernel, "posterize": lambda bits: [2.0 ** (8 - bits)]}


def _images(height: int, width: int) -> list[Tensor]:
    """Bytes (3, 3, height, width): noise, gray noise, dark noise; then images of one colour, white, and black."""
    generator = torch.Generator().manual_seed(height)
    noise = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8, generator=generator)
    noise[1] = noise[1, :1]
    noise[2] //= 4
    flat = torch.tensor([[200, 60, 128], [255, 255, 255], [0, 0, 0]], dtype=torch.uint8)
    return [noise, flat[:, :, None, None].expand(3, 3, height, width).contiguous()]


def _rows(name: str, values: tuple) -> Tensor:
    """(3, 1, 7)."""
    listed = [() if value is None else PARAMETERS.get(name, lambda value: [value])(value) for value in values]
    return torch.tensor([[change(name, *parameters)] for parameters in listed])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_an_operation_is_torchvisions_on_each_image_with_its_own_parameters(name, size):
    if name == "blur" and min(size) < 5:
        pytest.skip("torchvision blurs images larger than the margin of its kernel")
    values, oracle = ORACLES[name]
    for images in _images(*size):
        before = images.clone()
        expected = torch.stack([oracle(image, value) for image, value in zip(images, values)]).float()
        changed = change_colors(images, _rows(name, values))
        assert changed.dtype == torch.float32 and torch.equal(images, before)
        errors = (changed - expected).abs()
        assert errors.max() <= 1
        assert (errors > 0).float().mean() < 0.02  # where a value lies on the border of two levels


@pytest.mark.parametrize("side", [32, 47])
def test_operations_of_rand_augment_are_torchvisions_for_both_signs(side):
    augment, images = v2.RandAugment(num_ops=1, magnitude=9), _images(side, side)[0][:1]
    names = list(augment._AUGMENTATION_SPACE)
    for number, name in enumerate(names):
        magnitudes, is_signed = augment._AUGMENTATION_SPACE[name]
        magnitude = magnitudes(31, side, side)
        magnitude = 0.0 if magnitude is None else float(magnitude[9])
        changes = RandomColors(side)._operations[number]
        assert len(changes) == 1 + is_signed
        for row, sign in zip(changes, (1, -1)):
            expected = augment._apply_image_or_video_transform(
                images[0],
                name,
                sign * magnitude,
                interpolation=v2.InterpolationMode.NEAREST,
                fill={torch.Tensor: None},
            )
            changed = change_colors(images, torch.tensor([[row]]))[0]
            assert (changed - expected.float()).abs().max() <= 1, (name, sign)


def _torchvision_of_dino(colors: DinoColors) -> v2.Transform:
    return v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(*colors.jitter)], p=colors.jitter_probability),
            v2.RandomGrayscale(colors.gray),
            v2.RandomApply([v2.GaussianBlur(9, sigma=(0.1, 2.0))], p=colors.blur),
            v2.RandomSolarize(threshold=128, p=colors.solarize),
        ]
    )


def _torchvision_of_three(colors: ThreeColors) -> v2.Transform:
    one = [v2.Grayscale(3), v2.RandomSolarize(threshold=128, p=1.0), v2.GaussianBlur(9, sigma=(0.1, 2.0))]
    return v2.Compose([v2.RandomChoice(one), v2.ColorJitter(*colors.jitter)])


RECIPES = {
    "dino": (DinoColors(JITTER, 0.8, 0.2, 0.5, 0.2), _torchvision_of_dino),
    "dino without hue": (DinoColors((0.4, 0.4, 0.2, 0.0), 0.8, 0.2, 0.5, 0.2), _torchvision_of_dino),
    "three": (ThreeColors((0.3, 0.3, 0.3, 0.0)), _torchvision_of_three),
    "random": (RandomColors(40), lambda colors: v2.RandAugment(num_ops=2, magnitude=9)),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_draws_and_does_what_torchvisions_transforms_do_from_the_same_seed(recipe, photograph):
    colors, make_oracle = RECIPES[recipe]
    image, oracle = functional.pil_to_tensor(photograph.convert("RGB").resize((40, 40))), make_oracle(colors)
    num_exact = 0
    for seed in range(80):
        torch.manual_seed(seed)
        expected, next_expected = oracle(image).float(), torch.rand(1)
        torch.manual_seed(seed)
        changed = change_colors(image[None], torch.tensor([colors()]))[0]
        assert torch.equal(torch.rand(1), next_expected)  # as many numbers were drawn
        # A level more before another operation can be several after it: solarisation, equalisation.
        is_other = (changed - expected).abs() > 0
        assert is_other.float().mean() < 0.02, seed
        num_exact += int(not is_other.any())
    assert num_exact >= 40


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_image_has_the_same_bits_alone_and_in_any_batch(recipe):
    colors, _ = RECIPES[recipe]
    torch.manual_seed(0)
    images = torch.randint(0, 256, (37, 3, 39, 39), dtype=torch.uint8)
    changes = torch.tensor([colors() for _ in images])
    together = change_colors(images, changes)
    for size in (1, 5):
        parts = zip(images.split(size), changes.split(size))
        assert torch.equal(torch.cat([change_colors(*part) for part in parts]), together)
    order = torch.randperm(37)
    assert torch.equal(change_colors(images[order], changes[order]), together[order])
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(num_threads, 2))
    try:
        assert torch.equal(change_colors(images, changes), together)
    finally:
        torch.set_num_threads(num_threads)
    batch = {"global_views": images[None].clone(), "global_colors": changes[None], "labels": 0}
    assert torch.equal(change_batch(batch)["global_views"][0], together.to(torch.uint8))
    assert batch.keys() == {"global_views", "labels"}


class _Plain:
    """What `to_device` needs of an objective."""

    to_device = Objective.to_device


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_device_is_never_waited_for(recipe):
    # Tensors on "meta" have no values: reading one, or a shape that depends on one, is an error.
    colors, _ = RECIPES[recipe]
    changes = torch.tensor([[colors() for _ in range(30)] for _ in range(2)])
    batch = {"global_views": torch.zeros(2, 30, 3, 40, 40, dtype=torch.uint8), "global_colors": changes}
    place = {"device": torch.device("meta"), "mean": [0.5] * 3, "std": [0.25] * 3}
    views = _Plain().to_device(batch, **place)["global_views"]
    assert views.device.type == "meta" and views.shape == (2, 30, 3, 40, 40) and views.dtype == torch.float32


def test_to_device_changes_colours_and_normalises():
    torch.manual_seed(0)
    views = torch.randint(0, 256, (2, 3, 3, 20, 20), dtype=torch.uint8)
    changes = torch.tensor([[RECIPES["dino"][0]() for _ in range(3)] for _ in range(2)])
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    place = {"device": torch.device("cpu"), "mean": mean, "std": std}
    found = _Plain().to_device({"local_views": views, "local_colors": changes}, **place)["local_views"]
    changed = change_batch({"local_views": views.clone(), "local_colors": changes})["local_views"]
    expected = functional.normalize(changed.float() / 255, mean, std)
    torch.testing.assert_close(found, expected)
