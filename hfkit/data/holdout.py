"""Which text is held out for validation: whole documents chosen by their content, or the end of the text."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from math import ceil

from hfkit.data.documents import Document
from hfkit.data.sources import Source
from hfkit.settings import DataConfig

Holdout = Callable[[Document], Iterable[tuple[str, bool]]]  # a document → its pieces, and whether each is held out


def choose_split(config: DataConfig, sources: list[Source], evaluation: dict[str, Source]) -> DataConfig:
    """Return the settings, by characters where one document is all there is: it cannot be on both sides."""
    if holds_out(config, sources, evaluation) and len(list(islice(_readable(sources), 2))) == 1:
        return replace(config, split_by="characters")
    return config


def holds_out(config: DataConfig, sources: list[Source], evaluation: dict[str, Source]) -> bool:
    """Return whether validation text is held out from the sources: none is given, and some is wanted."""
    return bool(sources) and "validation" not in evaluation and config.validation_share > 0


def build_holdout(config: DataConfig, sources: list[Source]) -> Holdout:
    """Return the rule that divides the sources' documents into training and validation text."""
    share = config.validation_share
    if config.split_by == "characters":
        return _hold_out_end(sum(len(document.text) for document in _readable(sources)), share)
    # Of few documents a share by hash could be none or all of them: there the smallest hashes are taken.
    border = find_border([content_share(text.text) for text in islice(_readable(sources), ceil(20 / share))], share)

    def by_hash(document: Document) -> Iterable[tuple[str, bool]]:
        return [(document.text, content_share(document.text) <= border)]

    return by_hash


def find_border(shares: list[float], share: float) -> float:
    """Return the content share up to which a document is held out.

    Args:
        shares: `content_share` of the documents, or of the first of many.
        share: The share of them to hold out, above 0.
    """
    few = 0 < len(shares) < ceil(20 / share)
    return sorted(shares)[max(1, round(share * len(shares))) - 1] if few else share


def _readable(sources: list[Source]) -> Iterator[Document]:
    """Documents of all sources; those that cannot be read are dealt with when they are read to be used."""
    return chain.from_iterable(source.documents(lambda _: None) for source in sources)


def _hold_out_end(total: int, share: float) -> Holdout:
    """Return the rule that holds out the last ``share`` of ``total`` characters."""
    cut = round(total * (1 - share))
    seen = 0

    def split(document: Document) -> Iterable[tuple[str, bool]]:
        nonlocal seen
        border = min(max(cut - seen, 0), len(document.text))
        seen += len(document.text)
        pieces = [(document.text[:border], False), (document.text[border:], True)]
        return [(text, held) for text, held in pieces if text]

    return split


def content_share(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone: below the validation share, it is held out."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
