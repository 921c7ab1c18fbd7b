"""Preparation spread over many tasks, on one machine or a cluster, by datatrove's executors (`hfkit[corpus]`).

The steps, and with them the rules, are those of `hfkit/data/refine.py` and `hfkit/data/tokens.py`; here is only who
does what. A source is cut into parts (files, or ranges of a dataset's rows), and task r of n takes every n-th part:

    clean     each task    read, hold out, clean, hash and sign its parts
    compare   one task     find the duplicates among all documents, gather the passages of the evaluation text
    keep      each task    write what stays of its parts
    encode    each task    tokenize its share of the row groups

The files are put together in the order of the parts, so that they are the same, byte for byte, as one machine's.
What is unfinished lies in a folder beside the target, which all tasks must reach; a task that was completed is not run
again.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfkit.data.account import Account
from hfkit.data.drafts import Draft
from hfkit.data.executors import cancel_jobs, run_tasks
from hfkit.data.holdout import choose_split
from hfkit.data.once import discard, scratch_beside
from hfkit.data.prepare import Work
from hfkit.data.refine import (
    choose_holdout,
    conclude,
    first_numbers,
    join_kept,
    join_validation,
    write_draft,
    write_evaluation,
)
from hfkit.data.shards import join_streams
from hfkit.data.sources import Part, Source, resolve_evaluation, resolve_sources
from hfkit.data.texts import list_groups
from hfkit.data.tokens import Counts, describe_streams, write_groups
from hfkit.data.winnow import compare, open_passages, write_kept
from hfkit.data.words import prepare_tables
from hfkit.settings import BadInput, DataConfig, ExecutorConfig


def spread_over(executor: ExecutorConfig) -> Work:
    """Return the long steps of `prepare_data`, done in tasks of an executor."""
    return Work(partial(refine_spread, executor=executor), partial(write_streams_spread, executor=executor))


def refine_spread(
    folder: Path, config: DataConfig, sources: list[Source], evaluation: dict[str, Source], executor: ExecutorConfig
) -> dict[str, Any]:
    """Do what `refine` does, in tasks."""
    if config.split_by == "characters":
        raise BadInput(
            "data.split_by characters counts through the whole text: set --executor.name none, or split_by document"
        )
    scratch = _scratch_for(folder, executor)
    write_evaluation(scratch, evaluation)
    config = choose_split(config, sources, evaluation)
    run_tasks(executor, scratch, "clean", partial(clean_share, scratch=scratch, config=config))
    run_tasks(executor, scratch, "compare", partial(compare_all, scratch=scratch, config=config), tasks=1)
    run_tasks(executor, scratch, "keep", partial(keep_share, scratch=scratch, config=config))
    drafts = [draft for draft, _ in _list_drafts(scratch, sources)]
    facts = conclude([Account.load(draft.outcome) for draft in drafts])
    join_kept(folder, drafts)
    for path in scratch.glob("*.parquet"):
        if path.stem in ("validation", "test"):
            shutil.copyfile(path, folder / path.name)
    discard(scratch.parent, folder)
    return facts


def write_streams_spread(
    folder: Path, texts: Sequence[Path], tokenizer: PreTrainedTokenizerBase, executor: ExecutorConfig
) -> dict[str, dict[str, Any]]:
    """Do what `write_streams` does, in tasks."""
    scratch = _scratch_for(folder, executor)
    run_tasks(executor, scratch, "encode", partial(encode_share, scratch=scratch, texts=texts, tokenizer=tokenizer))
    parts = [_task_folder(scratch, rank) for rank in range(executor.tasks)]
    for path in texts:
        join_streams(parts, folder, path.stem)
    counts = [json.loads((part / "counts.json").read_text()) for part in parts]
    total = {name: Counts(*map(sum, zip(*(part[name] for part in counts), strict=True))) for name in counts[0]}
    discard(scratch.parent, folder)
    return describe_streams(total, tokenizer)


def clean_share(rank: int, tasks: int, scratch: Path, config: DataConfig) -> None:
    """Clean the parts of one task."""
    prepare_tables()
    sources, given = resolve_sources(config), resolve_evaluation(config, "validation")
    holdout = choose_holdout(config, sources, {} if given is None else {"validation": given})
    for draft, part in _list_drafts(scratch, sources)[rank::tasks]:
        account = Account(sources={draft.name: Counter()})
        write_draft(draft, part, config, holdout, account, workers=1)
        account.save(draft.account)


def compare_all(rank: int, tasks: int, scratch: Path, config: DataConfig) -> None:
    """Compare the documents of all parts."""
    drafts = [draft for draft, _ in _list_drafts(scratch, resolve_sources(config))]
    compare(scratch, drafts, config, join_validation(scratch, drafts))


def keep_share(rank: int, tasks: int, scratch: Path, config: DataConfig) -> None:
    """Write what stays of the parts of one task."""
    drafts = [draft for draft, _ in _list_drafts(scratch, resolve_sources(config))]
    passages = open_passages(scratch, config)
    for draft, first in list(zip(drafts, first_numbers(drafts), strict=True))[rank::tasks]:
        account = Account.load(draft.account)
        write_kept(draft, first, passages, account, workers=1)
        account.save(draft.outcome)


def encode_share(
    rank: int, tasks: int, scratch: Path, texts: Sequence[Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Tokenize a task's share of the row groups: neighbours, so that shares follow each other as their texts do."""
    groups = [group for path in texts for group in list_groups(path)]
    mine = groups[len(groups) * rank // tasks : len(groups) * (rank + 1) // tasks]
    folder = _task_folder(scratch, rank)
    folder.mkdir(exist_ok=True)
    counts = write_groups(folder, texts, mine, tokenizer, workers=1)
    (folder / "counts.json").write_text(json.dumps(counts))


def _list_drafts(scratch: Path, sources: Sequence[Source]) -> list[tuple[Draft, Part | Source]]:
    parts = [(number, source.name, part) for number, source in enumerate(sources) for part in source.separate_parts()]
    return [(Draft(scratch, place, number, name), part) for place, (number, name, part) in enumerate(parts)]


def _task_folder(scratch: Path, rank: int) -> Path:
    return scratch / f"task-{rank:05d}"


def _scratch_for(folder: Path, executor: ExecutorConfig) -> Path:
    """Return the folder of unfinished work; what was spread over another number of tasks begins anew."""
    scratch = scratch_beside(folder) / f"{executor.tasks}-tasks"
    for left in scratch.parent.glob("*-tasks"):
        if left != scratch:
            for logs in left.glob("logs/*"):
                cancel_jobs(logs)
            discard(left, folder)
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch
