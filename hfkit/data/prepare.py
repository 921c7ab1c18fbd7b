"""Prepared data: text → refined text → tokenizer → token streams, each in a folder named by what it depends on.

The same settings and the same content give the same keys, and then nothing is computed again; one byte of input, one
rule or another tokenizer changes a key. Called by every process before there is a process group; one works, the others
wait for the folders on disk.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from hfkit.data.hooks import identify_hooks
from hfkit.data.once import build_once
from hfkit.data.refine import refine
from hfkit.data.shards import TokenStream, damaged_file, read_manifest, seal
from hfkit.data.sources import Source, resolve_evaluation, resolve_sources
from hfkit.data.texts import forget_files, list_groups, read_table, read_texts, text_sizes
from hfkit.data.tokens import compare_with_gpt2, count_round_trip_failures, write_streams
from hfkit.files import digest_of
from hfkit.progress import Progress
from hfkit.settings import BadInput, DataConfig, TokenizerConfig
from hfkit.tokenizer import load_tokenizer, tokenizer_hash, train_tokenizer

TEXT_FORMAT = 3  # raised when the same settings would give other text or another account


@dataclass(frozen=True)
class Prepared:
    """Data that is ready to train on."""

    tokenizer: PreTrainedTokenizerBase
    train: list[TokenStream]
    weights: list[float]
    validation: TokenStream | None
    test: TokenStream | None
    bytes: dict[str, int]
    """UTF-8 bytes of the text of each split: train, validation, test."""
    key: str
    """Names this text under this tokenizer."""
    audit: dict[str, Any]
    reused: bool
    """Whether nothing had to be computed."""
    tokenizer_hash: str
    text: Path
    """Folder of the refined text."""


class Work(NamedTuple):
    """Who does the two steps that are long: this machine, or many (`hfkit/data/spread.py`)."""

    refine: Callable[[Path, DataConfig, list[Source], dict[str, Source]], dict[str, Any]]
    write_streams: Callable[[Path, Sequence[Path], PreTrainedTokenizerBase], dict[str, dict[str, Any]]]


def cache_folder(config: DataConfig) -> Path:
    """Return where prepared data is kept."""
    default = os.environ.get("HFKIT_CACHE") or Path.home() / ".cache" / "hfkit"
    return Path(config.cache_dir or default).expanduser().absolute()


def prepare_data(
    config: DataConfig,
    tokenizer: TokenizerConfig,
    tokenizer_path: str | Path | None = None,
    only_evaluation: bool = False,
    work: Work | None = None,
) -> Prepared:
    """Prepare text and tokens, or open what was prepared before.

    Args:
        tokenizer_path: Used where ``tokenizer.path`` is not given, such as the folder of the model to go on from.
        only_evaluation: Leave the training text out where validation or test text is given.
        work: Who does what is long; None is this machine. What is prepared does not depend on it.

    Raises:
        BadInput: for text that cannot be found or read, or of which nothing is left.
    """
    work = work or Work(refine, write_streams)
    cache = cache_folder(config)
    given = {name: resolve_evaluation(config, name) for name in ("validation", "test")}
    evaluation = {name: source for name, source in given.items() if source is not None}
    sources = [] if only_evaluation and evaluation else resolve_sources(config)

    text_key = _text_key(config, sources, evaluation, cache)
    text = cache / f"text-{text_key}"
    worked = _build(text, partial(_build_text, work=work, config=config, sources=sources, evaluation=evaluation))

    if path := tokenizer.path or tokenizer_path:
        chosen = load_tokenizer(path, tokenizer.revision if tokenizer.path else None)
    else:
        folder = cache / f"tokenizer-{digest_of([text_key, asdict(tokenizer)])[:16]}"
        worked |= _build(folder, partial(_build_tokenizer, text=text, config=tokenizer, sources=len(sources)))
        chosen = load_tokenizer(folder / "tokenizer")

    hashed = tokenizer_hash(chosen)
    key = digest_of([text_key, hashed])[:16]
    tokens = cache / f"tokens-{key}"
    worked |= _build(tokens, partial(_build_tokens, work=work, text=text, tokenizer=chosen, sources=len(sources)))
    return _open(text, tokens, chosen, hashed, key, [source.weight for source in sources], reused=not worked)


def _text_key(config: DataConfig, sources: list[Source], evaluation: dict[str, Source], cache: Path) -> str:
    memory = cache / "contents.json"
    return digest_of(
        {
            "format": TEXT_FORMAT,
            "sources": [[source.name, source.fingerprint(memory)] for source in sources],
            "evaluation": {name: source.fingerprint(memory) for name, source in evaluation.items()},
            "hooks": identify_hooks(config.hooks),
            "clean": asdict(config.clean),
            "dedup": asdict(config.dedup),
            "rest": [config.decontaminate, config.split_by, config.validation_share, config.on_error],
        }
    )[:16]


def _build(folder: Path, fill: Callable[[Path], None]) -> bool:
    """Build a keyed folder unless it is there and whole; a damaged file is named."""

    def whole(target: Path) -> bool:
        if not target.is_dir():
            return False
        if (name := damaged_file(target)) is None:
            return True
        print(f"warning: {target}: {name} is damaged; preparing it again", file=sys.stderr)
        return False

    def work(target: Path) -> None:
        try:
            fill(target)
        finally:
            forget_files()

    return build_once(folder, work, whole)


def _build_text(
    folder: Path, work: Work, config: DataConfig, sources: list[Source], evaluation: dict[str, Source]
) -> None:
    provenance = {source.name: source.fingerprint() for source in [*sources, *evaluation.values()]}
    seal(folder, {"audit": work.refine(folder, config, sources, evaluation), "provenance": provenance})


def _build_tokenizer(folder: Path, text: Path, config: TokenizerConfig, sources: int) -> None:
    paths = [text / f"train-{number}.parquet" for number in range(sources)]
    with Progress(None, "train tokenizer", "document") as progress:
        trained = train_tokenizer(_sample(paths, config.sample_bytes, progress), config)
    if config.kind == "bpe" and len(trained) < config.vocab_size:
        print(
            f"The corpus supports {len(trained)} tokens; tokenizer.vocab_size asked for {config.vocab_size}.",
            file=sys.stderr,
        )
    trained.save_pretrained(folder / "tokenizer")
    seal(folder, {"vocab_size": len(trained)})


def _sample(paths: Sequence[Path], budget: int, progress: Progress) -> Iterator[str]:
    """Yield training texts within a budget of bytes, an equal part from each source, spread evenly over it."""
    for path in paths:
        size = sum(sum(text_sizes(read_table(group))) for group in list_groups(path))
        share = min(1.0, budget / len(paths) / max(1, size))
        for index, text in enumerate(read_texts(path)):
            if int((index + 1) * share) > int(index * share):  # every 1/share-th document
                progress.update(1)
                yield text


def _build_tokens(folder: Path, work: Work, text: Path, tokenizer: PreTrainedTokenizerBase, sources: int) -> None:
    train = [text / f"train-{number}.parquet" for number in range(sources)]
    held_out = [path for name in ("validation", "test") if (path := text / f"{name}.parquet").exists()]
    streams = work.write_streams(folder, [*train, *held_out], tokenizer)
    if sources and not any(streams[path.stem]["tokens"] > 1 for path in train):
        raise BadInput("the training text is empty after tokenization")
    proved_on = streams[(held_out or train)[0].stem]
    report = {
        "vocab_size": len(tokenizer),
        "bytes_per_token": proved_on["bytes_per_token"],
        "round_trip_failures": count_round_trip_failures(folder, [*held_out, *train], tokenizer),
        **compare_with_gpt2([*held_out, *train]),
    }
    seal(folder, {"vocab_size": len(tokenizer), "streams": streams, "tokenizer": report})


def _open(
    text: Path,
    tokens: Path,
    tokenizer: PreTrainedTokenizerBase,
    hashed: str,
    key: str,
    weights: list[float],
    reused: bool,
) -> Prepared:
    manifest, account = read_manifest(tokens), read_manifest(text)
    assert manifest is not None and account is not None, "both were found whole a moment ago"
    streams, size = manifest["streams"], manifest["vocab_size"]
    names = [f"train-{number}" for number in range(len(weights))]
    used = [number for number, name in enumerate(names) if streams[name]["tokens"] > 1]
    by_split = {
        "train": [streams[name] for name in names],
        **{name: [streams[name]] for name in ("validation", "test") if name in streams},
    }
    splits = {
        name: {k: sum(s[k] for s in parts) for k in ("documents", "tokens", "bytes")}
        for name, parts in by_split.items()
    }
    audit = {
        **account["audit"],
        "tokens": splits["train"]["tokens"],
        "sources": _with_tokens(account["audit"]["sources"], by_split["train"], weights),
        "tokenizer": manifest["tokenizer"],
        "splits": splits,
        "key": key,
        "provenance": account["provenance"],
        "reused": reused,
    }

    def stream(name: str) -> TokenStream | None:
        return TokenStream(tokens, name, size) if streams.get(name, {}).get("documents") else None

    return Prepared(
        tokenizer,
        [TokenStream(tokens, names[number], size) for number in used],
        [weights[number] for number in used],
        stream("validation"),
        stream("test"),
        {name: facts["bytes"] for name, facts in splits.items()},
        key,
        audit,
        reused,
        hashed,
        text,
    )


def _with_tokens(
    sources: list[dict[str, Any]], streams: list[dict[str, Any]], weights: list[float]
) -> list[dict[str, Any]]:
    """Return the sources' rows with their tokens, and how often each is read in one pass of the mixture.

    A pass is as many tokens as all sources hold: with the weights in the proportion of the tokens, each is read once.
    """
    used = [weight if stream["tokens"] > 1 else 0.0 for stream, weight in zip(streams, weights, strict=True)]
    total = sum(stream["tokens"] for stream in streams)
    return [
        {
            **row,
            "tokens": stream["tokens"],
            "bytes_per_token": stream["bytes_per_token"],
            "weight": weight,
            "epochs": round(weight / sum(used) * total / stream["tokens"], 3) if weight else 0.0,
        }
        for row, stream, weight in zip(sources, streams, used, strict=True)
    ]
