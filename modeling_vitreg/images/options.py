"""Options of data, shared by commands and training: which columns are read, and how annotations are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from modeling_vitreg.settings import expect, suggest_name


BOX_FORMATS = ("auto", "xyxy", "xywh", "cxcywh")  # as in torchvision.ops.box_convert
_CHOICES = {
    "mask_format": ("auto", "classes", "binary", "voc"),
    "box_format": BOX_FORMATS,
    "box_units": ("auto", "pixels", "relative", "percent"),
    "annotation_frame": ("auto", "upright", "stored"),
}


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Columns of a dataset and the meaning of their values.

    Args:
        image_column: None: the only column of type `Image`, or the one with a usual name.
        label_column: class numbers; None: the only `ClassLabel`, or an integer column `label`, `labels` or `cls`.
        text_column: captions; None: not read.
        mask_column: class number of each pixel, an image or an array, 255 where the class is unknown; None: not read.
        depth_column: depth of each pixel, an image or an array; None: not read.
        box_column: boxes of objects, see `modeling_vitreg.images.annotations`; None: not read.
        num_classes: classes of masks; a larger class number is an error; 0: as many as the masks show.
        mask_format: "classes", numbers; "binary", 0 and 255 are two classes; "voc", the colours of Pascal VOC; "auto":
            found from the data.
        reduce_labels: masks hold 0 where the class is unknown, and classes count from 1, as in ADE20k.
        depth_scale: metres per stored unit of depth, 0.001 for millimetres.
        max_depth: metres; larger depths are ignored.
        box_format: format of a box, one of `BOX_FORMATS`; "auto": found from the data.
        box_units: "pixels", or fractions of width and height: "relative" from 0 to 1, "percent" from 0 to 100; "auto":
            found from the data.
        keep_difficult: keep objects that a Pascal VOC file marks as difficult or truncated.
        allows_label_lists: `label_column` may hold lists of classes, or of 0 or 1 for each class.
        annotation_frame: whether annotations were made after ("upright") or before ("stored") the EXIF rotation of an
            image; "auto": found from sizes.

    Raises:
        ValueError: a value outside its range.
    """

    image_column: str | None = None
    label_column: str | None = None
    text_column: str | None = None
    mask_column: str | None = None
    depth_column: str | None = None
    box_column: str | None = None
    num_classes: int = 0
    mask_format: str = "auto"
    reduce_labels: bool = False
    depth_scale: float = 1.0
    max_depth: float = 10.0
    box_format: str = "auto"
    box_units: str = "auto"
    keep_difficult: bool = True
    annotation_frame: str = "auto"
    allows_label_lists: bool = False

    def __post_init__(self):
        expect(self, "data", depth_scale="(0, inf)", max_depth="(0, inf)", **_CHOICES)

    @property
    def box_whole(self) -> int | None:
        """The number that stands for the whole width or height in a box; None: boxes are in pixels."""
        return {"relative": 1, "percent": 100}.get(self.box_units)

    @property
    def maps(self) -> dict[str, str]:
        """Columns of maps by their kind: `mask`, `depth`."""
        kinds = {"mask": self.mask_column, "depth": self.depth_column}
        return {kind: column for kind, column in kinds.items() if column}


# Annotations of rendered scenes, beside the label.
SCENE_COLUMNS = {
    "image_column": "image",
    "mask_column": "semantic_mask",
    "depth_column": "depth",
    "box_column": "boxes",
}
COLUMNS = {field.name.removesuffix("_column"): field.name for field in dataclasses.fields(DataOptions)[:6]}


def parse_columns(texts: Iterable[str]) -> dict[str, str]:
    """Fields of `DataOptions` from texts such as "label=fine,mask=annotation", as the option --columns takes them.

    Raises:
        ValueError: a text without "=", or an unknown kind of column.
    """
    found = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        kind, separator, column = (word.strip() for word in part.partition("="))
        if not (separator and column):
            raise ValueError(f"--columns: expected KIND=COLUMN such as label=fine, got {part!r}")
        if (kind := kind.removesuffix("_column")) not in COLUMNS and kind != "boxes":
            raise ValueError(f"--columns: there is no kind of column {kind!r}; {suggest_name(kind, COLUMNS)}")
        found[COLUMNS["box" if kind == "boxes" else kind]] = column
    return found
