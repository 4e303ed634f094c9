"""One style for all figures: whole files, and names from outside that matplotlib cannot misread."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from modeling_vitreg.style import make_cells, make_panels, plain_text, save_figure


@pytest.mark.parametrize(
    "name, shown",
    [("a\nb\tc", "a b c"), ("$x_{", r"\$x_{"), ("p" * 50, "…" + "p" * 39), ("plain", "plain"), ("\x07bell", "bell")],
)
def test_names_are_one_short_line(name, shown):
    assert plain_text(name) == shown


def test_a_name_with_dollars_is_drawn(tmp_path):
    figure, (ax,) = make_panels(1)
    ax.set_title(plain_text(r"$\frac{$ outputs/$HOME"))
    assert Image.open(save_figure(figure, tmp_path / "a" / "figure.png")).size[0] > 100


def test_a_figure_that_cannot_be_saved_leaves_nothing(tmp_path, monkeypatch):
    def fail(_, path, **__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        save_figure(Figure(), tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


def test_panels_and_cells_fill_a_grid():
    figure, axes = make_panels(3, num_columns=2)
    assert len(axes) == len(figure.axes) == 3
    _, cells = make_cells(2, 5, aspect=0.5)
    assert cells.shape == (2, 5) and not cells[0, 0].axison
