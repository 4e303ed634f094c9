"""Features of images as Parquet files, one for each shard, which `datasets.load_dataset("parquet", ...)` opens.

    OUTPUT/features-00003.parquet

| column | content |
| --- | --- |
| number | place of the image in the source |
| name | its path or key |
| label | class number or null; with its name where the source has names |
| class_token | (D,) float32, if the model has one |
| mean_patch | (D,) float32, mean of the patches |
| registers | (R, D) float16, if asked for |
| patches | (P, D) float16, row by row, if asked for |

The metadata of the schema holds under "vitreg" what the features were made from: hashes of weights and data, settings,
precision, versions, and the images of the shard that were left out. A file appears whole or not at all, so a run that
was killed continues with the next shard. Only one shard of each process is in memory.

Letters for shapes: B images of a batch, P patches, R registers, D width.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext
from modeling_vitreg.features import Encoder
from modeling_vitreg.features.model_hash import hash_weights
from modeling_vitreg.files import atomic_write, check_writable
from modeling_vitreg.images import ImageSource, ImageStream
from modeling_vitreg.settings import expect

from .consumer import Consumer, EncodedBatch, Needs, Shard
from .images import ImageReader
from .one_pass import run_pass
from .precision import choose_precision, to_float16
from .settings import PassCounts, PassSettings
from .transforms import Crop


_NAME = re.compile(r"features-(\d{5,})\.parquet")
_MOST_IMAGES, _MOST_BYTES = 512, 2**27  # of a shard
_KEY = b"vitreg"


@dataclasses.dataclass(frozen=True)
class EmbeddingSettings:
    """What is stored of each image.

    Args:
        image_size: side of the square crop in pixels; None: that of the encoder.
        layer: 0 is the embedding, -1 the output of the last layer.
        is_normed: apply the final norm of the model.
        has_registers, has_patches: store registers, patches.
        patch_precision: "float16" or "float32", of registers and patches.
        shard_size: images of a file; None: at most 512, fewer where their features are large.
    """

    image_size: int | None = None
    layer: int = -1
    is_normed: bool = True
    has_registers: bool = False
    has_patches: bool = False
    patch_precision: str = "float16"
    shard_size: int | None = None

    def __post_init__(self):
        expect(self, "", image_size="[1, inf)", shard_size="[1, inf)", patch_precision=("float16", "float32"))


def embed(
    encoder: Encoder,
    images: ImageSource | ImageStream,
    *,
    output_folder: str | os.PathLike,
    settings: EmbeddingSettings | None = None,
    reading: PassSettings | None = None,
    facts: dict[str, Any] | None = None,
    context: DistributedContext = SINGLE_PROCESS,
) -> PassCounts | None:
    """Store the features of all images; shards that the folder has already are not computed again.

    Args:
        encoder: from `modeling_vitreg.features.load_encoder`.
        images: from `open_images`.
        output_folder: folder of the Parquet files; it is created.
        settings: what is stored.
        reading: batches, workers, precision and limit of the pass; its `shard_size` is chosen here.
        facts: more entries of the metadata, such as `source` and `command`.
        context: processes that share the images; each writes its own shards.

    Returns:
        What all files together hold and leave out; None in all processes but the first.

    Raises:
        ValueError: the folder holds features of another model, other data or other settings, or of more images than
            the limit; or images that do not fit the model.
        RuntimeError: a value that float16 cannot hold; another process died.
        OSError: the folder cannot be written, which is checked before images are read.
    """
    settings, reading = settings or EmbeddingSettings(), reading or PassSettings()
    folder = check_writable(output_folder)
    store = ParquetStore(encoder, images, folder, settings, precision=reading.precision, facts=facts or {})
    store.check(ImageReader(images).total(reading.limit))
    counts = run_pass(
        encoder, images, [store], dataclasses.replace(reading, shard_size=store.shard_size), context=context
    )
    return None if context.rank else store.count(stopped_by=counts.stopped_by)


class ParquetStore(Consumer):
    """Writes the features of a shard when it ends.

    Args:
        encoder, images, folder, settings, facts: as in `embed`.
        precision: as in `PassSettings`.
    """

    def __init__(
        self,
        encoder: Encoder,
        images: ImageSource | ImageStream,
        folder: pathlib.Path,
        settings: EmbeddingSettings,
        *,
        precision: str | None,
        facts: dict[str, Any],
    ):
        self.folder, self.settings = folder, settings
        self.needs = Needs(features=((settings.layer, "token"),), transform=Crop(settings.image_size))
        cut = self.needs.transform.make(encoder)
        num_patches = cut.sides[0] // cut.patch_shape[0] * (cut.sides[1] // cut.patch_shape[1])
        shapes = {"class_token": (encoder.hidden_size,)} if encoder.has_cls_token else {}
        shapes["mean_patch"] = (encoder.hidden_size,)
        if settings.has_registers and encoder.num_register_tokens:
            shapes["registers"] = (encoder.num_register_tokens, encoder.hidden_size)
        if settings.has_patches:
            shapes["patches"] = (num_patches, encoder.hidden_size)
        bytes_of_image = 4 * sum(map(np.prod, shapes.values()))
        self.shard_size = settings.shard_size or int(max(min(_MOST_IMAGES, _MOST_BYTES // bytes_of_image), 1))
        self.identity = {
            "weights_hash": hash_weights(encoder),
            "dataset_hash": images.dataset_hash,
            "settings": {**dataclasses.asdict(settings), "image_size": list(cut.sides)},
            "precision": choose_precision(encoder, precision),
        }
        self.identity["settings"]["shard_size"] = self.shard_size
        self.facts = {**self.identity, "model": encoder.name, **facts, "made_with": encoder.made_with()}
        self._schema = self._make_schema(shapes, images.class_names)
        self._rows: list[dict[str, Any]] = []
        self._done: dict[int, int] = {}

    def check(self, total: int | None) -> None:
        """Find the shards that are there.

        Args:
            total: number of images of the whole pass, None if it is not known.

        Raises:
            ValueError: see `embed`.
        """
        for index, found in self._read_facts():
            other = [name for name, value in self.identity.items() if found.get(name) != value]
            if other:
                raise ValueError(
                    f"{self._file(index)}: expected features of the same {', '.join(other)}: choose another output "
                    "folder, or remove this one"
                )
            start, stop = found["numbers"]
            end = (index + 1) * self.shard_size if total is None else min((index + 1) * self.shard_size, total)
            if total is not None and stop > total:
                raise ValueError(
                    f"{self.folder} holds features of {stop} images or more, expected at most {total}: choose another "
                    "output folder, or raise the number of images"
                )
            if stop == end:  # a shorter one was the last of fewer images
                self._done[index] = stop - start

    def update(self, batch: EncodedBatch) -> None:
        """Keep the features of a batch until the shard ends."""
        tokens, norm = batch.tokens(self.settings.layer), batch.encoder.norm_tokens
        patches = tokens.patch_tokens
        features = {"class_token": tokens.cls_token, "registers": tokens.register_tokens, "patches": patches}
        names = [field.name for field in self._schema if features.get(field.name) is not None]
        found = {name: norm(features[name]) if self.settings.is_normed else features[name] for name in names}
        patches = found.get("patches", norm(patches) if self.settings.is_normed else patches)
        found["mean_patch"] = patches.float().mean(dim=1)  # [B, P, D] -> [B, D]
        columns = {name: _to_numpy(values, self.settings, name) for name, values in found.items()}
        self._rows.append({"number": batch.numbers.numpy(), "name": batch.names, "label": batch.labels, **columns})

    def has_shard(self, index: int) -> bool:
        """Whether the folder has the shard."""
        return index in self._done

    def end_shard(self, shard: Shard) -> None:
        """Write the shard."""
        numbers = [shard.numbers.start, shard.numbers.stop]
        facts = {**self.facts, "numbers": numbers, "counts": shard.counts.to_json()}
        schema = self._schema.with_metadata({**self._schema.metadata, _KEY: json.dumps(facts).encode()})
        with atomic_write(self._file(shard.index)) as part, pq.ParquetWriter(part, schema) as writer:
            for rows in self._rows:
                columns = [_to_column(rows[field.name], field.type) for field in schema]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        self._rows.clear()

    def merge(self, others: Sequence[ParquetStore]) -> None:
        """Nothing: each process has written its own files."""

    def count(self, *, stopped_by: str | None = None) -> PassCounts:
        """What the files hold together."""
        counts = PassCounts.join(PassCounts.from_json(facts["counts"]) for _, facts in self._read_facts())
        return dataclasses.replace(counts, stopped_by=stopped_by)

    def _file(self, index: int) -> pathlib.Path:
        return self.folder / f"features-{index:05}.parquet"

    def _read_facts(self) -> list[tuple[int, dict]]:
        """Number and facts of each file of the folder, in order."""
        found = []
        for file in sorted(self.folder.glob("*.parquet")):
            match = _NAME.fullmatch(file.name)
            try:
                facts = json.loads((pq.read_schema(file).metadata or {})[_KEY]) if match else None
            except (pa.ArrowException, OSError, KeyError, ValueError) as error:
                raise ValueError(f"{file}: is damaged, or was not written by vitreg embed: {error}") from error
            if facts:
                found.append((int(match[1]), facts))
        return sorted(found, key=lambda pair: pair[0])

    def _make_schema(self, shapes: dict[str, tuple[int, ...]], class_names: Sequence[str] | None) -> pa.Schema:
        label = datasets.ClassLabel(names=list(class_names)) if class_names else datasets.Value("int64")
        columns = {"number": datasets.Value("int64"), "name": datasets.Value("string"), "label": label}
        for name, shape in shapes.items():
            is_fine = name in ("class_token", "mean_patch")
            feature = datasets.Value("float32" if is_fine else self.settings.patch_precision)
            for length in reversed(shape):
                feature = datasets.List(feature, length=length)
            columns[name] = feature
        return datasets.Features(columns).arrow_schema


def _to_numpy(values: Tensor, settings: EmbeddingSettings, name: str) -> np.ndarray:
    values = values.float()
    if name in ("registers", "patches") and settings.patch_precision == "float16":
        values = to_float16(values, name=name, remedy="--set embedding.patch_precision=float32")
    return values.cpu().numpy()


def _to_column(values: Sequence | np.ndarray, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(values, type=kind)
    column = pa.array(np.ascontiguousarray(values).reshape(-1))
    for length in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, length)
    return column
