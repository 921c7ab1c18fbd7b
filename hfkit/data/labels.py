"""Labelled texts: rows → examples with class numbers, the names of the classes, and how the splits differ."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

from hfkit.data.builtin_sentiment import builtin_sentiment
from hfkit.data.catalog import load_named, name_of
from hfkit.data.holdout import content_share, find_border
from hfkit.data.readers import OnBad, Row, report, text_of
from hfkit.data.sources import read_table
from hfkit.settings import BadInput, LabelDataConfig

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
UNLABELLED = -1


class Example(NamedTuple):
    """A text and the number of its class; -1 is unlabelled."""

    text: str
    label: int


class Raw(NamedTuple):
    """A text, its label as it is spelled in the data (None: unlabelled), and where it stands."""

    text: str
    label: str | None
    where: str


@dataclass(frozen=True)
class Labelled:
    """The examples of a task."""

    label_names: list[str]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    unlabelled: list[str]
    """Texts of the training data that have no label."""
    notes: list[str] = field(default_factory=list)
    """What a person should know: skipped rows, classes that a split lacks, texts on both sides."""

    @property
    def splits(self) -> dict[str, list[Example]]:
        """The examples by split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def texts(self) -> dict[str, list[str]]:
        """The texts of each split that has any."""
        return {split: [example.text for example in examples] for split, examples in self.splits.items() if examples}

    @property
    def labels(self) -> dict[str, list[int]]:
        """The class numbers of each split that has any."""
        return {split: [example.label for example in examples] for split, examples in self.splits.items() if examples}

    @property
    def training_texts(self) -> list[str]:
        """The texts of the training data, labelled or not."""
        return [*self.texts["train"], *self.unlabelled]


def load_labelled(config: LabelDataConfig) -> Labelled:
    """Return the examples that the settings name; the built-in reviews where they name none.

    Labelled rows only are trained and scored on. Without validation data a share of the training texts, chosen by
    their content, is held out.

    Raises:
        BadInput: for a missing column, an empty text, fewer than two classes in training, a label that only the
            validation or test data have, or validation or test data without any label.
    """
    skipped: list[str] = []
    on_bad = skipped.append if config.on_error == "skip" else None
    raw = {split: _read_split(config, split, on_bad) for split in SPLITS}
    if not raw["validation"]:
        raw["train"], raw["validation"] = _hold_out(raw["train"], config.validation_share)
    given = config.label_names or _declared_names(config, "train")
    names = given or _sorted_names(row.label for row in raw["train"] if row.label is not None)
    numbers = _class_numbers(names, counted=bool(given))
    examples: dict[str, list[Example]] = {}
    for split in SPLITS:
        examples[split] = [_number(row, numbers, names) for row in raw[split] if row.label is not None]
        if split == "train":
            _check_classes(examples[split], names)
        elif raw[split] and not examples[split]:
            raise BadInput(
                f"data.label_column {config.label_column}: none of the {len(raw[split])} {split} texts has a label "
                "(null, blank and -1 are none), so they cannot be scored; give labelled ones, or leave them out"
            )
    if not examples["validation"]:
        raise BadInput(
            "there is nothing to choose the best step by: give --data.validation_files or a validation_share"
        )
    notes = [f"{len(skipped)} rows could not be read and were skipped, such as {skipped[0]}"] if skipped else []
    for split in SPLITS:
        if lacking := len(raw[split]) - len(examples[split]):
            notes.append(f"{lacking} of {len(raw[split])} {split} texts have no label")
    for split in SPLITS[1:]:
        _check_seen(raw[split], examples[split], examples["train"])
        notes += _compare(examples["train"], examples[split], names, split)
    unlabelled = [row.text for row in raw["train"] if row.label is None]
    return Labelled(names, examples["train"], examples["validation"], examples["test"], unlabelled, notes)


def read_raw(
    rows: Iterable[Row], text_column: str, label_column: str, on_bad: OnBad = None, names: Sequence[str] = ()
) -> list[Raw]:
    """Return the texts and labels of rows; `on_bad` is told of rows without them, which are left out.

    Args:
        names: Names of the classes, where they are known: -1 is unlabelled unless it is one of them.

    Example:
        >>> rows = [Row({"text": "fine", "label": 1}, "a:1"), Row({"text": "so", "label": -1}, "a:2")]
        >>> read_raw(rows, "text", "label")
        [Raw(text='fine', label='1', where='a:1'), Raw(text='so', label=None, where='a:2')]
    """
    found = []
    for row in rows:
        try:
            text = text_of(row, text_column)
            if not text.strip():
                raise BadInput(f"{row.where}: {text_column}: the text is empty")
            found.append(Raw(text, _spell(row, label_column, names), row.where))
        except BadInput as problem:
            report(str(problem), on_bad)
    return found


def _read_split(config: LabelDataConfig, split: Split, on_bad: OnBad) -> list[Raw]:
    rows: Iterable[Row] | None
    if config.is_builtin:
        values = islice(builtin_sentiment()[split], config.max_documents if split == "train" else None)
        rows = [Row(dict(row), f"built-in {split}:{number}") for number, row in enumerate(values, 1)]
    else:
        rows = read_table(config, split, on_bad)
    declared = _declared_names(config, split)
    if rows and declared and (not config.label_names or set(declared) <= set(config.label_names)):
        rows = (_name_label(row, config.label_column, declared) for row in rows)
    if rows is None and split == "train":
        raise BadInput("there is nothing to train on: give --data.train_files or --data.dataset")
    return read_raw(rows or [], config.text_column, config.label_column, on_bad, config.label_names or declared)


def _name_label(row: Row, column: str, names: Sequence[str]) -> Row:
    """Return the row with the name of its class in place of the number by which a dataset keeps it."""
    number = row.values.get(column)
    if not isinstance(number, int):
        return row
    return row._replace(values={**row.values, column: names[number] if number >= 0 else None})


def _spell(row: Row, column: str, names: Sequence[str]) -> str | None:
    """Return a label as text; None where it is null or blank, or -1 and no class has that name."""
    if column not in row.values:
        columns = ", ".join(row.values)
        raise BadInput(f"{row.where}: no column {column!r}; the columns are {columns}. Set --data.label_column.")
    value: Any = row.values[column]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    none = {"", str(UNLABELLED)}.difference(names)
    if value is None or (isinstance(value, int | str) and str(value).strip() in none):
        return None
    if not isinstance(value, str | int):
        raise BadInput(f"{row.where}: {column}: is {value!r:.40}, not the name or number of a class")
    return str(value).strip()


def _hold_out(rows: list[Raw], share: float) -> tuple[list[Raw], list[Raw]]:
    """Return (training, validation) rows: the smallest hashes of content are held out, equal texts together."""
    hashes = [content_share(row.text) for row in rows]
    labelled = [value for value, row in zip(hashes, rows, strict=True) if row.label is not None]
    if not share or len(labelled) < 2:
        return rows, []
    border = find_border(labelled, share)
    kept = [row for value, row in zip(hashes, rows, strict=True) if value > border]
    return kept, [row for value, row in zip(hashes, rows, strict=True) if value <= border]


def _declared_names(config: LabelDataConfig, split: Split) -> list[str]:
    """Return the names that a dataset declares for the label column of a split; files declare none."""
    own = config.split if split == "train" else getattr(config, f"{split}_split")
    if getattr(config, f"{split}_files") is not None or config.dataset is None or own is None:
        return []
    features = load_named(name_of(config, own)).features or {}
    return list(getattr(features.get(config.label_column), "names", None) or [])


def _sorted_names(labels: Iterable[str]) -> list[str]:
    """Return the different labels: numbers by value, else by name."""
    names = set(labels)
    numeric = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if numeric else sorted(names)


def _class_numbers(names: Sequence[str], counted: bool) -> dict[str, int]:
    """Return the class that each label means: a name, or, where names are counted and none is a number, its number.

    Example:
        >>> _class_numbers(["bad", "good"], counted=True)
        {'0': 0, '1': 1, 'bad': 0, 'good': 1}
    """
    counted = counted and not any(name.removeprefix("-").isdecimal() for name in names)
    spelled = {str(number): number for number in range(len(names))} if counted else {}
    return spelled | {name: number for number, name in enumerate(names)}


def _number(row: Raw, numbers: Mapping[str, int], names: Sequence[str]) -> Example:
    """Return the example with its class number."""
    if row.label is None or row.label not in numbers:
        raise BadInput(f"{row.where}: label {row.label!r} does not occur in the training data; its labels are {names}")
    return Example(row.text, numbers[row.label])


def _check_classes(train: list[Example], names: list[str]) -> None:
    seen = {example.label for example in train}
    if len(seen) < 2:
        only = f"all {len(train)} are {names[min(seen)]!r}" if seen else "none has a label"
        raise BadInput(f"training needs examples of two classes or more; of the training texts {only}")


def _check_seen(rows: list[Raw], examples: list[Example], train: list[Example]) -> None:
    """Raise BadInput for a class that is declared, but that training has no example of."""
    seen = {example.label for example in train}
    labelled = (row for row in rows if row.label is not None)
    for row, example in zip(labelled, examples, strict=True):
        if example.label not in seen:
            raise BadInput(f"{row.where}: label {row.label!r} does not occur in the training data")


def _compare(train: list[Example], others: list[Example], names: list[str], split: str) -> list[str]:
    """Return notes on classes that a split lacks, and on texts that it shares with the training data."""
    notes = []
    counts = Counter(example.label for example in others)
    if others and (lacking := [name for number, name in enumerate(names) if not counts[number]]):
        notes.append(f"the {split} data have no example of {', '.join(lacking)}")
    texts = {example.text for example in train}
    if shared := sum(example.text in texts for example in others):
        notes.append(f"{shared} of {len(others)} {split} texts are in the training data, too")
    return notes
