"""Self-contained HTML pages: one file each, with its figures embedded, which loads nothing from a network.

Everything that comes from a report is escaped by the templates. All pages share the layout, the tables and the figures
of `templates/`.
"""

from __future__ import annotations

import base64
import pathlib
import re
from collections.abc import Callable, Mapping

import jinja2


_HOME = pathlib.Path(__file__).parent / "templates"


def render_template(
    template: pathlib.Path,
    *,
    figures: Mapping[str, pathlib.Path],
    captions: Mapping[str, str],
    wide: tuple[str, ...] = (),
    filters: Mapping[str, Callable] | None = None,
    functions: Mapping[str, Callable] | None = None,
    **content: object,
) -> str:
    """The text of a page.

    Args:
        template: file of the template; it may extend `base.html` and import from `macros.html`.
        figures: name of a figure to its PNG file; the macro `figure(name)` leaves out one that is missing.
        captions: name of each figure to its caption.
        wide: figures that are shown in full width.
        filters, functions: for templates and their macros, besides the filter `number`.
        content: what the template reads; a missing value is an error, not an empty place.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _HOME]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "headings": _headings, **(filters or {})}
    environment.globals |= {
        "figures": {name: base64.b64encode(path.read_bytes()).decode("ascii") for name, path in figures.items()},
        "captions": captions,
        "wide": wide,
        **(functions or {}),
    }
    page = environment.get_template(template.name).render(**content).rstrip() + "\n"
    return page.encode("utf-8", "backslashreplace").decode("utf-8")  # file names may hold bytes that are no text


def _headings(content: str) -> list[tuple[str, str]]:
    """Names and titles of the sections of a page, for its navigation; titles are HTML."""
    return re.findall(r'<section id="([\w-]+)"><h2>(.*?)</h2>', content)


def format_number(value: float | None) -> str:
    """A number of three figures; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
