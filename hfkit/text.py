"""Cleaning rules as pure string functions: each has a name, a switch in `CleanConfig`, and is counted by its name.

Three rules are on by default and touch only what is broken, so that a clean document in any language passes byte for
byte: broken encodings (mojibake), control characters and lone surrogates. NFC is the one normal form applied. What
changes well-formed text, such as trimming spaces (two at a line's end are a line break in Markdown) or dropping pages,
is off by default: evaluation text is never cleaned, and a model should be trained on what it is evaluated on.

Time is linear in the text's length for every rule.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import ftfy
from ftfy.badness import BADNESS_RE, is_bad

from hfkit.settings import BadInput, CleanConfig

# Scripts written without spaces between words, as ranges for a character class: Thai and Lao, Tibetan, Burmese, Khmer,
# Kana, Bopomofo, Han with its extensions and compatibility forms, half-width Kana.
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)

# Everything that rewrites well-formed text is off: quotes, widths, ligatures, HTML entities (code and documentation
# write them on purpose), line breaks, and lossy sequences, whose "repair" puts U+FFFD where text was.
_FTFY = ftfy.TextFixerConfig(
    explain=False,
    unescape_html=False,
    remove_terminal_escapes=False,
    replace_lossy_sequences=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    fix_surrogates=False,
    remove_control_chars=False,
    normalization=None,
)
_LONGEST_PIECE = 100_000  # characters; ftfy itself cuts lines each million, through a broken character if one is there

_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# As ftfy's list: without tab, line feed, form feed (a page break in GNU sources) and carriage return.
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u206a-\u206f\ufeff\ufff9-\ufffc]")
_TERMINAL_ESCAPE = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]")
_COMPATIBILITY = re.compile("([\uf900-\ufaff\U0002f800-\U0002fa1f]+)")


def _mojibake_witness() -> re.Pattern[str]:
    """A class of characters one of which is in every match of ftfy's BADNESS_RE.

    Each alternative of BADNESS_RE names a non-ASCII character. Greek and Cyrillic letters count there only beside a
    character of another class, but for U+0402; leaving them out spares text in those scripts the slow pattern.
    """
    named = {character for character in BADNESS_RE.pattern if character > "\x7f"}
    for first, last in re.findall("([^\x00-\x7f])-([^\x00-\x7f])", BADNESS_RE.pattern):
        named.update(map(chr, range(ord(first), ord(last) + 1)))
    witnesses = {character for character in named if not "\u0386" <= character <= "\u045f"} | {"\u0402"}
    return re.compile(f"[{re.escape(''.join(sorted(witnesses)))}]")


_WITNESS = _mojibake_witness()


def may_be_mojibake(text: str) -> bool:
    """Whether ftfy could find mojibake in the text: never false where ftfy would change it, and rarely true elsewhere.

    BADNESS_RE runs at 3 to 10 MB/s; it spans at most 6 characters, so that running it on the neighbourhoods of its
    witnesses alone decides the same at 95 to 250 MB/s (books, zh-d2l and zh-yuanqu; one core of a 2-core CPU).
    """
    if text.isascii():
        return False
    neighbourhoods = []
    position = 0
    while found := _WITNESS.search(text, position):
        # Witnesses up to `start + 6` share this window: five characters before the first, five after the last.
        start = found.start()
        neighbourhoods.append(text[max(start - 5, 0) : start + 12])
        position = start + 7
    # A window cut out of a line may gain a match at its own beginning, never lose one.
    return is_bad("\n".join(neighbourhoods))


def _pieces(text: str) -> Iterator[str]:
    """Lines with their ends; longer ones are cut after a space, so that no broken character is cut in two."""
    for line in text.split("\n"):
        start = 0
        while len(line) - start > _LONGEST_PIECE:
            cut = line.rfind(" ", start, start + _LONGEST_PIECE) + 1 or start + _LONGEST_PIECE
            yield line[start:cut]
            start = cut
        yield line[start:] + "\n"


def fix_mojibake(text: str) -> str:
    """Undo text that was decoded as something else than it was encoded in, line by line, with ftfy (0.3 to 1 MB/s).

    Example:
        >>> fix_mojibake("schÃ¶n, sagte sie; â€œcafÃ©â€\x9d")
        'schön, sagte sie; “café”'
    """
    if not may_be_mojibake(text):
        return text
    pieces = (ftfy.fix_text(piece, _FTFY) if may_be_mojibake(piece) else piece for piece in _pieces(text))
    return "".join(pieces)[:-1]  # _pieces ends the last line, too


def join_surrogates(text: str) -> str:
    """Join surrogate pairs into their character; a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    joined = _SURROGATE_PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
    return _SURROGATE.sub("\ufffd", joined)


def remove_controls(text: str) -> str:
    """Drop control characters, terminal escapes and stray byte-order marks; tabs, line ends and form feeds stay."""
    if not _CONTROL.search(text):
        return text
    return _CONTROL.sub("", _TERMINAL_ESCAPE.sub("", text))


def compose(text: str) -> str:
    """Unicode's normal form C, without folding CJK compatibility ideographs into other shapes (as in names)."""
    if unicodedata.is_normalized("NFC", text):
        return text
    parts = _COMPATIBILITY.split(text)  # even places hold what lies between the compatibility ideographs
    parts[::2] = (unicodedata.normalize("NFC", part) for part in parts[::2])
    return "".join(parts)


def trim_whitespace(text: str) -> str:
    """Unix line ends, no spaces at line ends, at most two blank lines in a row; indentation stays.

    Example:
        >>> trim_whitespace("def f():\\r\\n\\treturn 1  \\n\\n\\n\\n\\n")
        'def f():\\n\\treturn 1'
    """
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return re.sub("\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n")


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


def mask_urls(text: str) -> str:
    """Put ``[url]`` in place of web addresses.

    Example:
        >>> mask_urls("See https://example.org/a?b=1.")
        'See [url].'
    """
    return re.sub(r"(?i)\b(?:https?://|ftp://|www\.)[^\s<>\"'`(){}\[\]]*[\w/#=&-]", "[url]", text, flags=re.ASCII)


def mask_emails(text: str) -> str:
    """Put ``[email]`` in place of e-mail addresses.

    Example:
        >>> mask_emails("Write to jane.doe@example.org!")
        'Write to [email]!'
    """
    if "@" not in text:
        return text
    # Bounded by RFC 5321's lengths, which also keep a long line without "@" linear.
    return re.sub(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b", "[email]", text, flags=re.ASCII)


def is_empty(text: str, config: CleanConfig) -> bool:
    """Whether nothing but white space is left."""
    return not text or text.isspace()


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
    if any(_top_share(words, size) > limit for size, limit in _MAX_TOP_NGRAM.items()):
        return True
    return any(_repeated_share(words, size) > limit for size, limit in _MAX_REPEATED_NGRAM.items())


def _repeats(units: Sequence[str]) -> list[str]:
    """Every unit that occurred before."""
    seen: set[str] = set()
    return [unit for unit in units if unit in seen or seen.add(unit)]  # type: ignore[func-returns-value]


def _ngrams(words: list[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[offset:] for offset in range(size)), strict=False))


def _top_share(words: list[str], size: int) -> float:
    """Share of the words that lie in the most frequent n-gram, where one repeats."""
    [(_, count)] = Counter(_ngrams(words, size)).most_common(1) or [(None, 0)]
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


Change = tuple[str, Callable[[CleanConfig], bool], Callable[[str], str]]
Filter = tuple[str, Callable[[CleanConfig], bool], Callable[[str, CleanConfig], bool]]

# Name, switch, rule; in the order in which they apply. Surrogates come first: no codec takes a lone one.
CHANGES: tuple[Change, ...] = (
    ("surrogates", lambda config: config.surrogates, join_surrogates),
    ("mojibake", lambda config: config.mojibake, fix_mojibake),
    ("controls", lambda config: config.controls, remove_controls),
    ("nfc", lambda config: config.nfc, compose),
    ("whitespace", lambda config: config.whitespace, trim_whitespace),
    ("boilerplate", lambda config: config.boilerplate, remove_boilerplate),
    ("urls", lambda config: config.mask_urls, mask_urls),
    ("emails", lambda config: config.mask_emails, mask_emails),
)
FILTERS: tuple[Filter, ...] = (
    ("empty", lambda config: True, is_empty),
    ("length", lambda config: config.min_characters > 0 or config.max_characters is not None, has_wrong_length),
    ("symbols", lambda config: config.max_symbol_share < 1 or config.max_digit_share < 1, has_too_many_symbols),
    ("repetition", lambda config: config.repetition, is_repetitive),
    ("language", lambda config: bool(config.languages), is_other_language),
)


def clean(text: str, config: CleanConfig) -> tuple[str | None, list[str]]:
    """Apply the rules that are on; return the text, or None where one dropped it, and the names of those that acted.

    Example:
        >>> clean("caf\\u00c3\\u00a9\\x00", CleanConfig())
        ('café', ['mojibake', 'controls'])
        >>> clean("  ", CleanConfig())
        (None, ['empty'])
    """
    if not config.enabled:
        return text, []
    acted = []
    for name, is_on, change in CHANGES:
        if is_on(config) and (changed := change(text)) != text:
            acted.append(name)
            text = changed
    for name, is_on, drops in FILTERS:
        if is_on(config) and drops(text, config):
            return None, [*acted, name]
    return text, acted
