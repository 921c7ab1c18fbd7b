"""Datasets by name, through `datasets`: on the Hub, in a `save_to_disk` folder, downloaded or read as a stream."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
from datasets.packaged_modules.cache.cache import Cache

from hfkit.data.listing import SAVED_DATASET, content_digests
from hfkit.data.readers import Row
from hfkit.remote import HubError, call
from hfkit.settings import BadInput, RowsConfig, SourceConfig

T = TypeVar("T")
BATCH = 256  # rows decoded at a time

# Missing names, splits and configurations, no network, damaged files, datasets that need a script.
DATASET_ERRORS = (OSError, ValueError, RuntimeError, TypeError, datasets.exceptions.DatasetsError)


class Name(NamedTuple):
    """What a dataset is called; as text, what messages and reports call it."""

    path: str
    config: str | None
    revision: str | None
    split: str
    streaming: bool = False

    def __str__(self) -> str:
        path = f"{self.path}@{self.revision}" if self.revision else self.path
        return "/".join(part for part in (path, self.config, self.split) if part)


def name_of(settings: RowsConfig | SourceConfig, split: str, streaming: bool = False) -> Name:
    """Return the name of a split of the dataset in the settings, which must have one."""
    return Name(str(settings.dataset), settings.dataset_config, settings.revision, split, streaming)


def describe_named(config: RowsConfig) -> dict[str, Any]:
    """Return under `datasets` the id, configuration, split and commit of each one on the Hub that is trained on."""
    items = [config, *getattr(config, "sources", [])]
    names = [name_of(item, item.split) for item in items if item.dataset is not None]
    known = [
        {"id": name.path, "configuration": name.config, "split": name.split, "revision": _find(*name[:3]).hash}
        for name in names
        if not Path(name.path).exists()
    ]
    return {"datasets": known} if known else {}


@cache
def load_named(name: Name) -> datasets.Dataset | datasets.IterableDataset:
    """Return the dataset, once a process.

    Raises:
        BadInput: if it cannot be had, with what `datasets` says on one line.
    """
    if name.revision is not None and Path(name.path).exists():
        raise BadInput(f"data.dataset {name.path} is a folder, so a revision ({name.revision}) means nothing")
    if is_saved(name.path):
        return _try(name, lambda: _load_saved(name))
    builder = _find(*name[:3])
    if name.streaming:
        return _try(name, lambda: builder.as_streaming_dataset(split=name.split))

    def download() -> datasets.Dataset:
        builder.download_and_prepare()
        return builder.as_dataset(split=name.split)

    return _try(name, download)


@cache
def _find(path: str, config: str | None, revision: str | None) -> datasets.DatasetBuilder:
    """Return what gets the splits of a dataset, all of one commit.

    Without network, `datasets` takes whatever it loaded last; a revision says which commit it must be.
    """
    name = "/".join(part for part in (path, config) if part)
    builder = _try(name, lambda: datasets.load_dataset_builder(path, config, revision=revision))
    if revision not in (None, builder.hash) and isinstance(builder, Cache):
        raise BadInput(
            f"dataset {name} cannot be fetched at {revision}, and what was loaded before is commit {builder.hash}; "
            "without network, data.revision must be that"
        )
    return builder


def _try(name: object, action: Callable[[], T]) -> T:
    """Return what ``action`` gives, tried again where the network fails; other failures become one line."""
    try:
        return call(action, tries=3)
    except BadInput:
        raise
    except HubError as failed:
        raise _bad_input(name, failed.__cause__ or failed) from None
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


def _bad_input(name: object, error: BaseException) -> BadInput:
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
    known = _find(*name[:3]).hash if name.streaming else load_named(name)._fingerprint
    return [name.path, name.config, name.split, name.streaming, known]
