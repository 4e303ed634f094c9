"""A position table is resized as `torch.nn.functional.interpolate` resizes it, and the fixed table is that of MAE."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from reference_models import assert_small, relative_error

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.positions_vitreg import resize_position_table, sincos_position_table


# Tables of one patch, one row, one column, of the native sizes of the field, and oblong ones.
GRIDS = ((1, 1), (1, 5), (5, 1), (2, 3), (4, 4), (7, 7), (14, 14), (16, 16), (37, 37), (24, 40), (37, 16))
PAIRS = [(source, target) for source, target in itertools.product(GRIDS, GRIDS) if source != target]


def interpolate(table, grid, *, antialias, offset=0.0):
    """The oracle, on a table (rows, columns, D)."""
    if grid[1] == 1 and grid[0] > 1:
        # On CPU the antialiased kernel of the library mixes up rows and channels of a result with one column, but
        # not those of a result with one row.
        return interpolate(table.transpose(0, 1), grid[::-1], antialias=antialias, offset=offset).transpose(0, 1)
    size = {"size": grid}
    if offset:
        size = {"scale_factor": [(target + offset) / source for target, source in zip(grid, table.shape)]}
    images = table.permute(2, 0, 1)[None]  # [rows, columns, D] -> [1, D, rows, columns]
    resized = F.interpolate(images, mode="bicubic", align_corners=False, antialias=antialias, **size)
    return resized[0].permute(1, 2, 0)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_a_table_is_resized_as_the_library_resizes_it(antialias, offset, record_property):
    errors = {}
    for source, target in PAIRS:
        if antialias and offset and (source[0] == target[0] or source[1] == target[1]):
            continue  # on CPU the antialiased kernel of the library leaves an axis alone that keeps its length
        table = torch.randn(*source, 8)
        ours = resize_position_table(table, target, antialias=antialias, offset=offset)
        errors[source, target] = relative_error(ours, interpolate(table, target, antialias=antialias, offset=offset))
    assert_small(errors, record_property)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_table_that_fits_stays_as_it_is_whatever_the_offset(grid, antialias):
    table = torch.randn(*grid, 8)
    assert torch.equal(resize_position_table(table, grid, antialias=antialias, offset=0.1), table)


@pytest.mark.parametrize("antialias", [False, True])
def test_gradients_of_a_resized_table_are_those_of_the_library(antialias, record_property):
    errors = {}
    for source, target in PAIRS:
        table, upstream = torch.randn(*source, 8, requires_grad=True), torch.randn(*target, 8)
        ours = resize_position_table(table, target, antialias=antialias, offset=0.0)
        theirs = interpolate(table, target, antialias=antialias)
        errors[source, target] = relative_error(
            torch.autograd.grad(ours, table, upstream)[0], torch.autograd.grad(theirs, table, upstream)[0]
        )
    assert_small(errors, record_property)


def test_a_table_in_half_precision_is_resized_in_float32():
    table = torch.randn(16, 16, 8, dtype=torch.bfloat16)
    ours = resize_position_table(table, (24, 40), antialias=False, offset=0.1)
    exact = interpolate(table.float(), (24, 40), antialias=False, offset=0.1)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), exact, rtol=2**-8, atol=1e-5)  # one rounding, at the end


@pytest.mark.parametrize("antialias", [False, True])
def test_autocast_does_not_touch_the_resizing(antialias):
    table = torch.randn(16, 16, 8)
    exact = resize_position_table(table, (24, 40), antialias=antialias, offset=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize_position_table(table, (24, 40), antialias=antialias, offset=0.1), exact)


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 5)])
def test_the_fixed_table_is_the_plain_loop_of_mae(grid):
    width = 16
    table = torch.zeros(*grid, width, dtype=torch.float64)
    for row, column, i in itertools.product(range(grid[0]), range(grid[1]), range(width // 4)):
        frequency = 1 / 10000 ** (i / (width / 4))
        table[row, column, i] = math.sin(column * frequency)
        table[row, column, i + width // 4] = math.cos(column * frequency)
        table[row, column, i + width // 2] = math.sin(row * frequency)
        table[row, column, i + width // 2 + width // 4] = math.cos(row * frequency)
    torch.testing.assert_close(sincos_position_table(grid, width), table.float(), rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("kind", ["learned", "sincos"])
def test_a_table_made_for_another_size_gives_what_interpolation_gave(tiny, kind):
    model = ViTWithRegistersModel(tiny(position_embedding_type=kind)).eval()
    images = torch.randn(1, 3, 48, 40)
    with torch.no_grad():
        before = model(images).last_hidden_state
        model.resize_position_embeddings((48, 40))
        after = model(images).last_hidden_state
    torch.testing.assert_close(after, before)
    assert model.config.image_size == [48, 40]
    assert model.embeddings.position_embeddings.weight.shape[1] == model.config.num_prefix_positions + 6 * 5
    assert isinstance(model.embeddings.position_embeddings.weight, torch.nn.Parameter) == (kind == "learned")


def test_a_resized_table_is_saved_and_loaded(tiny, tmp_path):
    model = ViTWithRegistersModel(tiny()).eval()
    model.resize_position_embeddings(64)
    model.save_pretrained(tmp_path)
    again = ViTWithRegistersModel.from_pretrained(tmp_path)
    assert torch.equal(again.embeddings.position_embeddings.weight, model.embeddings.position_embeddings.weight)


def test_a_table_is_not_made_for_a_size_that_does_not_fit(tiny):
    model = ViTWithRegistersModel(tiny())
    before = model.embeddings.position_embeddings.weight
    with pytest.raises(ValueError, match="image_size 33 is not a multiple of patch_size 8"):
        model.resize_position_embeddings(33)
    assert model.config.image_size == 32
    assert model.embeddings.position_embeddings.weight is before
