"""Quality rules, all off by default: which lines and documents a corpus is better without.

Pure functions on strings; `hfkit/text.py` decides by `CleanConfig` which ones apply, and in which order.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from hfkit.settings import BadInput, CleanConfig

# Scripts written without spaces between words, as ranges for a character class: Thai and Lao, Tibetan, Burmese, Khmer,
# Kana, Bopomofo, Han with its extensions and compatibility forms, half-width Kana.
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)

# Lines that web pages carry around their text, as in C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2).
_BOILERPLATE = re.compile(
    r"(?i)\b(javascript (is |must be )?(disabled|enabled|required)|enable javascript|(accept|use of|uses|our) cookies"
    r"|cookie policy|privacy policy|terms (of use|of service|and conditions)|all rights reserved|lorem ipsum"
    r"|skip to (main )?content|subscribe to our newsletter|share (this )?on (facebook|twitter))\b"
    r"|版权所有|保留所有权利|隐私政策|プライバシーポリシー"
)
_LONGEST_BOILERPLATE = 200  # characters; a longer line is prose about cookies, not a notice


def remove_boilerplate(text: str) -> str:
    """Drop short lines that hold a phrase of web pages' frames (cookie notices, newsletters, copyright lines)."""
    lines = text.split("\n")
    return "\n".join(line for line in lines if len(line) > _LONGEST_BOILERPLATE or not _BOILERPLATE.search(line))


def has_wrong_length(text: str, config: CleanConfig) -> bool:
    """Whether the text lies outside the bounds, in characters."""
    return len(text) < config.min_characters or (
        config.max_characters is not None and len(text) > config.max_characters
    )


def has_too_many_symbols(text: str, config: CleanConfig) -> bool:
    """Whether digits, or what is neither letter, mark nor digit, exceed their share of the visible characters."""
    kinds: Counter[str] = Counter()
    for character, count in Counter(text).items():
        kinds[unicodedata.category(character)[0]] += count
    visible = sum(count for kind, count in kinds.items() if kind not in "ZC")
    return kinds["P"] + kinds["S"] > config.max_symbol_share * visible or kinds["N"] > config.max_digit_share * visible


# Gopher's repetition limits (Rae et al. 2021, arXiv:2112.11446, table A1): share of repeated units, share of the
# characters in them, then per n-gram size the share of words in the most frequent one, or in any repeated one.
_MAX_REPEATED = {"\n": (0.30, 0.20), "\n\n": (0.30, 0.20)}
_MAX_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
_MAX_REPEATED_NGRAM = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_WORD = re.compile(f"[{UNSPACED}]|[^\\W{UNSPACED}]+")


def is_repetitive(text: str, config: CleanConfig) -> bool:
    """Whether lines, paragraphs or word n-grams repeat beyond Gopher's limits (shares in words, not characters)."""
    for separator, (max_units, max_characters) in _MAX_REPEATED.items():
        units = [unit for unit in text.split(separator) if unit.strip()]
        repeated = _repeats(units)
        if len(repeated) > max_units * len(units):
            return True
        if sum(map(len, repeated)) > max_characters * sum(map(len, units)):
            return True
    words = _WORD.findall(text.lower())
    # Where most units are single characters, two of them stand for a word: the mean length of words in Chinese.
    units_per_word = 2 if sum(map(len, words)) < 2 * len(words) else 1
    if any(_top_share(words, size * units_per_word) > limit for size, limit in _MAX_TOP_NGRAM.items()):
        return True
    return any(_repeated_share(words, size * units_per_word) > limit for size, limit in _MAX_REPEATED_NGRAM.items())


def _repeats(units: Sequence[str]) -> list[str]:
    """Every unit that occurred before."""
    seen: set[str] = set()
    return [unit for unit in units if unit in seen or seen.add(unit)]  # type: ignore[func-returns-value]


def _ngrams(words: list[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[offset:] for offset in range(size)), strict=False))


def _top_share(words: list[str], size: int) -> float:
    """Share of the words that lie in the most frequent n-gram, where one repeats."""
    count = max(Counter(_ngrams(words, size)).values(), default=0)
    return count * size / len(words) if count > 1 else 0.0


def _repeated_share(words: list[str], size: int) -> float:
    """Share of the words that lie in an n-gram seen before, each word counted once."""
    seen: set[tuple[str, ...]] = set()
    covered = end = 0
    for start, ngram in enumerate(_ngrams(words, size)):
        if ngram in seen:
            covered += start + size - max(start, end)
            end = start + size
        seen.add(ngram)
    return covered / max(len(words), 1)


@lru_cache(maxsize=1)
def _language_detector() -> Any:
    try:
        from lingua import LanguageDetectorBuilder
    except ImportError:
        raise BadInput(
            "data.clean.languages needs lingua: pip install 'hfkit[corpus]', or leave the list empty"
        ) from None
    return LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()


def is_other_language(text: str, config: CleanConfig) -> bool:
    """Whether the text's main language, judged by its first 2,000 characters, is not one of those listed."""
    language = _language_detector().detect_language_of(text[:2000])
    return language is None or language.iso_code_639_1.name.lower() not in config.languages
