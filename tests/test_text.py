"""Cleaning: clean text of any language passes byte for byte, broken text is mended, and the time is linear."""

import random
import time
import unicodedata

import ftfy
import pytest
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad

from hfkit import quality
from hfkit import text as rules
from hfkit.settings import BadInput, CleanConfig
from hfkit.text import clean

CLEAN = {
    "python": "def f(x):\n\tif x:\n\t\treturn  {'a': 1}  # two  spaces\n\n\n\n\nclass A:\n    pass   \n    \n",
    "c": '#include <stdio.h>\r\n\f\nint main() { printf("\\033[1m&amp;%d\\n", 1 << 3); }\r\n',
    "markdown": "# Title\n\nA line break:  \nhere & there &lt;b&gt;\n\n| a | b |\n|---|---|\n\n- [ ] to do\n",
    "english": "“Curly” and ‘single’ quotes — dashes… ﬁne ligatures, naïve café, 5 µm, 20 °C, £5, §3, 1½, ™ and ©.",
    "french": "« L’Âge d’Or », où ça ? À Pâques ; ÉCOLE À NÎMES, œuvre, Œdipe, garçon — 5 €.",
    "portuguese": "A MAÇÃ É BOA. IRMÃ E IRMÃO, NÃO À ÂNCORA; São João à mesa, pão e avó.",
    "german": "Straße, Übermut, „Größe“, ÄÖÜ — süß‑sauer…",
    "vietnamese": "Tiếng Việt: Đường phố Hà Nội rất đẹp, ĐÃ ĐẾN GIỜ.",
    "turkish": "İstanbul’da ığdır, ŞİŞLİ, çağ, göğüs.",
    "polish": "Zażółć gęślą jaźń; „ŁÓDŹ”.",
    "romanian": "ÎN ȚARĂ, Â și â, România.",
    "russian": "Съешь ещё этих мягких «французских» булок — ВСЁ. Груша №5; Р°.",
    "greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία· ΆΈΉ «ναι».",
    "arabic": "مرحبا بالعالم، ١٢٣ «نعم»\u200f لا\u200cشيء.",
    "hebrew": "שָׁלוֹם עולם",
    "hindi": "नमस्ते दुनिया, क्षत्रिय १२३।",
    "thai": "ภาษาไทยไม่มีช่องว่าง",
    "chinese": "　　你好，世界！“引号”…… ＡＢＣ　１２３；（全角）。\n\n神\ufa19福\ufa1b",
    "japanese": "｢半角ｶﾀｶﾅ｣と全角カタカナ、ひらがな。Ｔｏｋｙｏ　２０２４年〜",
    "korean": "안녕하세요, 세계! 한국어 문장입니다.",
    "emoji": "👩‍👩‍👧‍👦 ❤️ 🇫🇷 👍🏽 ✔ ☃",
    "mathematics": "∀x∈ℝ: x² ≥ 0 ∧ √2 ≈ 1.414, ∑ ±½, α→β, 10³",
    "box": "┌──┬──┐\n│ a│ b│\n└──┴──┘  ███▌ 50 %",
    "polytonic": unicodedata.normalize("NFC", "ἄνδρα μοι ἔννεπε, Μοῦσα"),
}


@pytest.mark.parametrize("name", CLEAN)
def test_clean_text_passes_byte_for_byte(name: str) -> None:
    assert clean(CLEAN[name], CleanConfig()) == (CLEAN[name], [])


@pytest.mark.parametrize(
    ("broken", "mended", "acted"),
    [
        ("cafÃ© Ã  la carte", "café à la carte", ["mojibake"]),
        ("It’s cafÃ©; voilÃ le", "It’s café; voilà le", ["mojibake"]),
        ("clean line “é”\nItâ€™s broken\nclean “à”", "clean line “é”\nIt’s broken\nclean “à”", ["mojibake"]),
        ("ÐŸÑ€Ð¸Ð²ÐµÑ‚", "Привет", ["mojibake"]),
        ("ä½\xa0å¥½ä¸–ç•Œ", "你好世界", ["mojibake"]),
        ("Windows \x93quotes\x94", "Windows “quotes”", ["mojibake"]),
        ("bell\x07 null\x00 tab\tstays\x7f", "bell null tab\tstays", ["controls"]),
        ("\ufeff\x1b[1;31mred\x1b[0m", "red", ["controls"]),
        ("cafe\u0301", "café", ["nfc"]),
        ("e\u0301 \ufa19", "é \ufa19", ["nfc"]),
        ("\ud83d\ude00 \ud83d x", "😀 \ufffd x", ["surrogates"]),
        ("", None, ["empty"]),
        (" \n\u3000\t", None, ["empty"]),
        ("\x00\x01", None, ["controls", "empty"]),
    ],
)
def test_broken_text_is_mended_and_the_rule_named(broken: str, mended: str | None, acted: list[str]) -> None:
    assert clean(broken, CleanConfig()) == (mended, acted)
    assert mended is None or clean(mended, CleanConfig()) == (mended, [])


def test_a_switch_turns_its_rule_off() -> None:
    broken = "\ud800 cafÃ© \x00 e\u0301"
    off = CleanConfig(surrogates=False, mojibake=False, controls=False, nfc=False)
    assert clean(broken, off) == (broken, [])
    assert clean("", CleanConfig(enabled=False)) == ("", [])


def test_the_fast_gate_never_misses_what_ftfy_would_change() -> None:
    """Random strings of the very characters that ftfy's heuristic is about, in plain surroundings."""
    rng = random.Random(0)
    named = "".join(MOJIBAKE_CATEGORIES.values()) + "ÂÃÎÐØÙàŒœ×√≈‚вЂГўВβā€ŠΒΞΟ \xa0ab1 \n"
    alphabet = [*named.replace("-", ""), *map(chr, range(0x80, 0x180))]
    bad = 0
    for _ in range(40_000):
        text = "x" * rng.randrange(8) + "".join(rng.choices(alphabet, k=rng.randrange(1, 7))) + "文" * rng.randrange(20)
        bad += is_bad(text)
        assert rules.may_be_mojibake(text) or not is_bad(text), ascii(text)
    assert 4_000 < bad < 36_000  # both answers are exercised


@pytest.mark.parametrize("broken", ["Ø§Ù„", "ГўВЂВxa", "вЂ", "x Ã ", "â€™", "½“", "‚Äì"])
def test_the_fast_gate_sees_mojibake_at_any_distance_from_harmless_characters(broken: str) -> None:
    for gap in range(15):
        for text in ("“" + "z" * gap + broken, "z" * gap + broken + "z" * gap + "”"):
            assert is_bad(text)
            assert rules.may_be_mojibake(text)


def test_skipping_and_cutting_give_what_ftfy_gives_on_whole_lines() -> None:
    rng = random.Random(1)
    sentences = [*CLEAN.values(), "cafÃ© au lait", "Itâ€™s", "voilÃ le travail", "ÐŸÑ€Ð¸Ð²ÐµÑ‚ мир"]
    for _ in range(200):
        text = "\n".join(rng.choices(sentences, k=rng.randrange(1, 6)))
        assert rules.fix_mojibake(text) == ftfy.fix_text(text, rules._FTFY)
    assert rules.fix_mojibake("cafÃ© " * 40_000) == "café " * 40_000  # longer than a piece: cut between words


@pytest.mark.parametrize("unit", ["plain words ", "cafÃ© and It’s ", "文字。", "\x00bad\x1b[", "a@b.c http://x.y/z "])
def test_a_huge_line_takes_linear_time(unit: str) -> None:
    config = CleanConfig(whitespace=True, boilerplate=True, mask_urls=True, mask_emails=True, max_symbol_share=0.9)

    def seconds(characters: int) -> float:
        text = unit * (characters // len(unit))
        return min(_timed(text, config) for _ in range(2))

    assert seconds(160_000) < 3 * 8 * seconds(20_000) + 0.05  # quadratic would be 64 times as long


def _timed(text: str, config: CleanConfig) -> float:
    begin = time.process_time()
    clean(text, config)
    return time.process_time() - begin


def test_whitespace_rule_keeps_indentation() -> None:
    text = "def f():\r\n\tif x:\r\n\t    y  \n\n\n\n\n\nend\n"
    assert clean(text, CleanConfig(whitespace=True)) == ("def f():\n\tif x:\n\t    y\n\n\nend", ["whitespace"])


def test_masks_and_boilerplate() -> None:
    config = CleanConfig(mask_urls=True, mask_emails=True, boilerplate=True)
    text = "Read www.example.org/x, or (http://a.b/c?d=e).\nAll rights reserved.\nAsk a.b+c@mail.example.org."
    assert clean(text, config) == ("Read [url], or ([url]).\nAsk [email].", ["boilerplate", "urls", "emails"])


@pytest.mark.parametrize(
    ("text", "config", "rule"),
    [
        ("short", CleanConfig(min_characters=6), "length"),
        ("long", CleanConfig(max_characters=3), "length"),
        ("ab!?", CleanConfig(max_symbol_share=0.49), "symbols"),
        ("ab12", CleanConfig(max_digit_share=0.49), "symbols"),
        ("buy now\n" * 3 + "one other line\n" * 2, CleanConfig(repetition=True), "repetition"),
        ("the same five words again " * 4, CleanConfig(repetition=True), "repetition"),
        ("好" * 20, CleanConfig(repetition=True), "repetition"),
    ],
)
def test_filters_drop_and_are_named(text: str, config: CleanConfig, rule: str) -> None:
    assert clean(text, config) == (None, [rule])
    assert clean(text, CleanConfig())[0] == text


def test_filters_keep_what_lies_on_their_bound() -> None:
    assert clean("ab!?", CleanConfig(max_symbol_share=0.5, min_characters=4, max_characters=4)) == ("ab!?", [])
    assert clean("क्षत्रिय", CleanConfig(max_symbol_share=0.0))[0] == "क्षत्रिय"  # marks are no symbols
    prose = " ".join(f"word{number} and" for number in range(50))
    assert quality._repeated_share(prose.split(), 5) == 0
    assert clean(CLEAN["english"], CleanConfig(repetition=True)) == (CLEAN["english"], [])
    chinese = "深度学习是机器学习的一个分支，学习多层神经网络。"
    assert clean(chinese, CleanConfig(repetition=True)) == (chinese, [])


def test_repeated_words_are_counted_once() -> None:
    words = "a b c d e a b c d e f".split()
    assert quality._repeated_share(words, 5) == 5 / 11
    assert quality._repeated_share(list("aaaaaa"), 2) == 5 / 6
    assert quality._top_share(words, 2) == 4 / 11


def test_language_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    quality._language_detector.cache_clear()
    config = CleanConfig(languages=["de"])
    try:
        import lingua  # noqa: F401
    except ImportError:
        with pytest.raises(BadInput, match=r"hfkit\[corpus\]"):
            clean("ein Text", config)
        return
    assert clean("Das ist ein ganz gewöhnlicher deutscher Satz.", config)[0]
    assert clean("This is a perfectly ordinary English sentence.", config) == (None, ["language"])


def test_impossible_bounds_are_refused() -> None:
    with pytest.raises(BadInput, match="max_symbol_share"):
        CleanConfig(max_symbol_share=1.5)
    with pytest.raises(BadInput, match="max_characters 1 is below min_characters 2"):
        CleanConfig(min_characters=2, max_characters=1)
