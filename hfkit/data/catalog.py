"""Datasets by name, through `datasets`: on the Hub, in a `save_to_disk` folder, downloaded or read as a stream."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from hfkit.data.listing import SAVED_DATASET, content_digests
from hfkit.data.readers import Row
from hfkit.settings import BadInput

BATCH = 256  # rows decoded at a time

# Missing names, splits and configurations, no network, damaged files, datasets that need a script.
DATASET_ERRORS = (OSError, ValueError, RuntimeError, TypeError, datasets.exceptions.DatasetsError)


class Name(NamedTuple):
    """What a dataset is called; as text, what messages and reports call it."""

    path: str
    config: str | None
    split: str
    streaming: bool = False

    def __str__(self) -> str:
        return "/".join(part for part in (self.path, self.config, self.split) if part)


@cache
def load_named(name: Name) -> datasets.Dataset | datasets.IterableDataset:
    """Return the dataset, once a process.

    Raises:
        BadInput: if it cannot be had, with what `datasets` says on one line.
    """
    try:
        if is_saved(name.path):
            return _load_saved(name)
        return datasets.load_dataset(name.path, name.config, split=name.split, streaming=name.streaming)
    except BadInput:
        raise
    except DATASET_ERRORS as error:
        raise _bad_input(name, error) from None


def is_saved(path: str) -> bool:
    """Return whether the path is a folder that `save_to_disk` wrote."""
    return any((Path(path) / name).exists() for name in SAVED_DATASET)


def _load_saved(name: Name) -> datasets.Dataset:
    saved = datasets.load_from_disk(name.path)
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if name.split not in splits:
        raise BadInput(f"dataset {name.path} has no split {name.split!r}; it has {', '.join(splits)}")
    return splits[name.split]


def _bad_input(name: Name, error: Exception) -> BadInput:
    return BadInput(f"dataset {name}: {' '.join(str(error).split()) or type(error).__name__}")


def named_rows(dataset: Any, name: Name, first: int = 0) -> Iterator[Row]:
    """Yield a dataset's rows; `first` is the number (from 0) of its first row in the whole dataset.

    Raises:
        BadInput: if the dataset breaks off, such as a stream without network.
    """
    number = first
    try:
        for batch in dataset.iter(BATCH):
            for values in zip(*batch.values(), strict=True):
                yield Row(dict(zip(batch, values, strict=True)), f"{name}:{number}")
                number += 1
    except DATASET_ERRORS as error:
        raise _bad_input(name, error) from None


def identify_named(name: Name, memory: Path | None = None) -> Any:
    """Return what changes whenever the dataset's content does: digests of a folder's files, or the Hub's revision."""
    if is_saved(name.path):
        return [name.split, content_digests(sorted(Path(name.path).rglob("*.arrow")), memory)]
    if not name.streaming:
        return [*name, load_named(name)._fingerprint]
    try:
        builder = datasets.load_dataset_builder(name.path, name.config)
    except DATASET_ERRORS as error:
        raise _bad_input(name, error) from None
    return [*name, builder.hash]
