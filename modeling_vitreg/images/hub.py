"""A dataset of the Hub, as it is now or at a revision."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from huggingface_hub.errors import HfHubHTTPError

from modeling_vitreg.names import CHECKPOINT_SUFFIXES, is_hub_name, suggest_path
from modeling_vitreg.network import is_hub_known, is_of_network

from .messages import EXPECTED, choose_split
from .opened import OpenedDataset


if TYPE_CHECKING:
    import datasets


# Name, configuration and revision; a revision may be a branch such as refs/pr/1.
_HUB_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::([\w.-]+))?(?:@([\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def split_hub_name(source: str) -> tuple[str, str | None, str | None] | None:
    """Name, configuration and revision of "owner/name:configuration@revision"; None where it is no such name."""
    found = _HUB_NAME.fullmatch(source)
    return found.groups() if found else None


def open_hub(source: str, *, split: str, is_streaming: bool) -> OpenedDataset:
    """Open a dataset of the Hub.

    Raises:
        ValueError: it does not exist, or has no such configuration, revision or split.
        RuntimeError: the Hub could not be reached.
    """
    from datasets.exceptions import DatasetNotFoundError

    parts = split_hub_name(source)
    is_name = parts is not None and is_hub_name(parts[0]) and not parts[0].endswith(CHECKPOINT_SUFFIXES)
    if not is_name or os.path.isdir(parts[0].split("/")[0]):
        if parts and parts[2] and os.path.isdir(parts[0]):  # a folder would win over the Hub, and has no revisions
            raise ValueError(
                f"open_images: {parts[0]!r} is a local folder, which has no revision {parts[2]!r}: leave it out."
            )
        hint = " Datasets of the Hub are named owner/name." if parts and "/" not in parts[0] else ""
        nearest = suggest_path(source)
        raise ValueError(f"open_images: {EXPECTED}; got {source!r}, which does not exist. {nearest}{hint}")
    if not (is_hub_known() or _is_cached(parts[0])):
        raise RuntimeError(
            f"open_images: {source!r} is not a local path, and the Hub did not answer: its address cannot be looked "
            f"up. {suggest_path(source)} If it is a dataset of the Hub, check the connection."
        )
    try:
        builder = _find_builder(source)
        if not is_streaming:
            builder.download_and_prepare()
        splits = builder.as_streaming_dataset() if is_streaming else builder.as_dataset()
    except FileNotFoundError as error:
        is_missing = isinstance(error, DatasetNotFoundError)
        what = "exists neither locally nor on the Hub" if is_missing else "could not be opened"
        words = f"{str(error).rstrip('.')}. {suggest_path(source)}"
        raise ValueError(f"open_images: {EXPECTED}; got {source!r}, which {what}: {words}") from error
    except Exception as error:
        if not (is_of_network(error) or isinstance(error, HfHubHTTPError)):
            raise
        raise RuntimeError(
            f"open_images: {source!r} is not a local path, and the Hub did not answer: {error}. "
            f"{suggest_path(source)} If it is a dataset of the Hub, check the connection and HF_HUB_OFFLINE."
        ) from error
    revision = builder.hash if _COMMIT.fullmatch(builder.hash or "") else None
    return OpenedDataset(choose_split(splits, split, source=source), revision=revision, splits=splits)


def _is_cached(name: str) -> bool:
    import datasets

    return os.path.isdir(os.path.join(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")))


def _find_builder(source: str) -> datasets.DatasetBuilder:
    """The builder of a dataset of the Hub, before any data are read; its `hash` is the commit."""
    import datasets

    name, configuration, revision = split_hub_name(source)
    builder = datasets.load_dataset_builder(name, configuration, revision=revision)
    is_cached = type(builder).__module__.endswith(".cache")  # the Hub did not answer, and revisions do not count
    if revision and is_cached and builder.hash != revision:
        raise RuntimeError(
            f"open_images: the Hub did not answer for {source!r}, and the cache holds {name!r} at {builder.hash}: "
            "connect, or leave out the revision to use the cached one."
        )
    return builder
