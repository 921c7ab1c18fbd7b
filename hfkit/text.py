"""Cleaning rules as pure string functions: each has a name, a switch in `CleanConfig`, and is counted by its name.

Under the defaults a clean document in any language passes byte for byte: on are the rules that touch only what is
broken (lone surrogates, mojibake, control characters), and Unicode's normal form C. What changes well-formed text, such
as trimming spaces (two at a line's end are a line break in Markdown), is off, as are the rules of `hfkit/quality.py`:
evaluation text is never cleaned, and a model should be trained on text like that which it is evaluated on.

Time is linear in the text's length for every rule.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator

import ftfy
from ftfy.badness import BADNESS_RE, is_bad

from hfkit.quality import (
    has_too_many_symbols,
    has_wrong_length,
    is_other_language,
    is_repetitive,
    remove_boilerplate,
)
from hfkit.settings import CleanConfig

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
    witnesses alone decides the same at 85 to 190 MB/s on English books and Chinese prose (one CPU core).
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
