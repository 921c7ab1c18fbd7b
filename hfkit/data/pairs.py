"""Translation pairs: reading them, cleaning the training part, and batches by token budget."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from hfkit.data.builtin_translation import builtin_translation
from hfkit.data.holdout import content_share, find_border
from hfkit.data.readers import OnBad, Row, report, text_of
from hfkit.data.sources import read_table
from hfkit.settings import BadInput, PairDataConfig

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

MAX_LENGTH_RATIO = 5.0
SLACK_BYTES = 20  # added to both lengths, so that "OK" may be "In Ordnung"


class Pair(NamedTuple):
    """A text and its translation."""

    source: str
    target: str


def read_pairs(rows: Iterable[Row], source_key: str, target_key: str, on_bad: OnBad = None) -> Iterator[Pair]:
    """Yield the pairs of rows ``{"translation": {source_key: …, target_key: …}}`` or with a column for each language.

    Args:
        on_bad: Is told of each row that has no such pair, and the row is left out.

    Raises:
        BadInput: at the first such row, if `on_bad` is not given; names its place and the columns there are.

    Example:
        >>> list(read_pairs([Row({"translation": {"en": "yes", "de": "ja"}}, "a.jsonl:1")], "en", "de"))
        [Pair(source='yes', target='ja')]
    """
    for row in rows:
        nested = row.values.get("translation")
        texts = Row(dict(nested), f"{row.where}: translation") if isinstance(nested, Mapping) else row
        try:
            pair = Pair(text_of(texts, source_key, "data.source_key"), text_of(texts, target_key, "data.target_key"))
        except BadInput as problem:
            report(str(problem), on_bad)
        else:
            yield pair


@dataclass(frozen=True)
class Pairs:
    """The pairs of a task by split; the training part is clean."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    removed: dict[str, int]
    """How many training pairs each rule dropped; `unreadable` counts rows of any split that were skipped."""

    @property
    def splits(self) -> dict[str, list[Pair]]:
        """The pairs by split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def load_pairs(config: PairDataConfig) -> Pairs:
    """Return the pairs that the settings name; the built-in set where they name none.

    Without validation data a share of the training pairs, chosen by their sources, is held out.

    Raises:
        BadInput: for a missing language, an empty side of a pair to score, and where no training pair is left.
    """
    skipped: list[str] = []
    on_bad = skipped.append if config.on_error == "skip" else None
    train, validation, test = (_read_split(config, split, on_bad) for split in SPLITS)
    if not validation and config.validation_share and len(train) > 1:
        shares = [content_share(_normalize(pair.source)) for pair in train]
        border = find_border(shares, config.validation_share)
        validation = [pair for pair, share in zip(train, shares, strict=True) if share <= border]
        train = [pair for pair, share in zip(train, shares, strict=True) if share > border]
    if not validation and not test:
        raise BadInput("there is nothing to score: give --data.validation_files or a --data.validation_share above 0")
    for split, pairs in (("validation", validation), ("test", test)):
        for number, pair in enumerate(pairs, 1):
            if not pair.source.strip() or not pair.target.strip():
                raise BadInput(f"{split} pair {number}: one side is empty, so it cannot be scored: {tuple(pair)}")
    kept, removed = clean_pairs(train, [pair.source for pair in validation + test])
    return Pairs(kept, validation, test, {**removed, "unreadable": len(skipped)})


def _read_split(config: PairDataConfig, split: Split, on_bad: OnBad) -> list[Pair]:
    rows: Iterable[Row] | None
    if config.is_builtin:
        if config.source_key != "en":
            raise BadInput(f"the built-in translation set goes from en, not from {config.source_key!r}")
        values = islice(
            builtin_translation(config.target_key)[split], config.max_documents if split == "train" else None
        )
        rows = [Row(dict(row), f"built-in {split}:{number}") for number, row in enumerate(values, 1)]
    else:
        rows = read_table(config, split, on_bad)
    if rows is None and split == "train":
        raise BadInput("there is nothing to train on: give --data.train_files or --data.dataset")
    return list(read_pairs(rows or [], config.source_key, config.target_key, on_bad))


def clean_pairs(pairs: Iterable[Pair], test_sources: Iterable[str]) -> tuple[list[Pair], dict[str, int]]:
    """Return the training pairs to keep, unchanged and in order, and how many were dropped by each rule.

    The first rule that fits counts: `empty` (either side is blank), `copied` (both sides are the same), `length_ratio`
    (one side is more than five times as long, in UTF-8 bytes, which weigh scripts more alike than characters do),
    `contaminated` (the source is one of the test's), `exact_duplicates` (the pair came before; another translation of
    the same source stays). Case and spaces make no difference.

    Args:
        test_sources: Sources of the validation and test pairs.

    Raises:
        BadInput: if no pair is left.

    Example:
        >>> kept, dropped = clean_pairs([Pair("yes", "ja"), Pair("Yes ", "Ja"), Pair("no", "no")], [])
        >>> kept, dropped["exact_duplicates"], dropped["copied"]
        ([Pair(source='yes', target='ja')], 1, 1)
    """
    held_out = {_normalize(source) for source in test_sources}
    dropped = dict.fromkeys(("empty", "copied", "length_ratio", "contaminated", "exact_duplicates"), 0)
    seen: set[tuple[str, str]] = set()
    kept = []
    for pair in pairs:
        source, target = _normalize(pair.source), _normalize(pair.target)
        if not source or not target:
            dropped["empty"] += 1
        elif source == target:
            dropped["copied"] += 1
        elif _length_ratio(source, target) > MAX_LENGTH_RATIO:
            dropped["length_ratio"] += 1
        elif source in held_out:
            dropped["contaminated"] += 1
        elif (source, target) in seen:
            dropped["exact_duplicates"] += 1
        else:
            seen.add((source, target))
            kept.append(pair)
    if not kept:
        reasons = ", ".join(f"{rule} {count}" for rule, count in dropped.items())
        raise BadInput(f"no training pair is left after cleaning (dropped: {reasons}); check data.train_files")
    return kept, dropped


def plan_batches(lengths: np.ndarray, tokens_per_batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return an epoch's batches as arrays of row numbers: every row once, rows of similar length together.

    A pure function of its arguments, so a resumed run, on any number of processes, has the same batches. Rows of equal
    length are dealt anew, and the batches shuffled, each epoch.

    Args:
        lengths: Tokens of each row, (rows,); for a pair the longer side.
        tokens_per_batch: Most tokens a batch may have once its rows are padded to the longest.

    Raises:
        BadInput: if a row alone is over the budget.

    Example:
        >>> batches = plan_batches(np.array([5, 1, 4, 1]), tokens_per_batch=10, seed=0, epoch=0)
        >>> sorted(sorted(batch.tolist()) for batch in batches)
        [[0, 2], [1, 3]]
    """
    if len(lengths) and (longest := int(lengths.max())) > tokens_per_batch:
        raise BadInput(
            f"a row of {longest} tokens does not fit a batch of {tokens_per_batch}; raise the budget or cut the rows"
        )
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    ascending = np.maximum(lengths[order], 1)
    batches, start = [], 0
    while start < len(order):
        candidates = ascending[start : start + tokens_per_batch // ascending[start]]
        padded = candidates * np.arange(1, len(candidates) + 1)  # tokens of a batch that ends here
        end = start + int(np.searchsorted(padded, tokens_per_batch, side="right"))
        batches.append(order[start:end])
        start = end
    return [batches[place] for place in generator.permutation(len(batches))]


def _normalize(text: str) -> str:
    return " ".join(text.split()).casefold()


def _length_ratio(source: str, target: str) -> float:
    shorter, longer = sorted(len(text.encode()) + SLACK_BYTES for text in (source, target))
    return longer / shorter
