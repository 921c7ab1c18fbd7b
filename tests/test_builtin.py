"""The generated sets: deterministic, balanced, without overlap between splits, and not solved by counting words."""

import hashlib
import json
import re
from datetime import date
from itertools import combinations

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from hfkit.data.builtin import builtin_sentiment, builtin_translation
from hfkit.data.builtin_sentiment import MODIFIERS, NEGATIVE, POSITIVE, SUBJECTS
from hfkit.data.builtin_translation import Time, say_date, say_number, say_time
from hfkit.settings import BadInput

CLAUSE = re.compile(
    f"the ({'|'.join(SUBJECTS)}) was (?:({'|'.join(filter(None, MODIFIERS))}) )?({'|'.join(POSITIVE + NEGATIVE)})",
    re.IGNORECASE,
)


def digest(splits: object) -> str:
    return hashlib.sha256(json.dumps(splits, ensure_ascii=False).encode()).hexdigest()[:16]


def test_sentiment_is_always_the_same_balanced_and_distinct() -> None:
    splits = builtin_sentiment()
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 6000, "validation": 600, "test": 1200}
    assert digest(splits) == "c597c8433378757e"
    for rows in splits.values():
        assert sum(row["label"] == "positive" for row in rows) * 2 == len(rows)
        assert {row["label"] for row in rows} == {"positive", "negative"}
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_sentiment_splits_share_no_combination_but_every_word() -> None:
    combinations_of: dict[str, set[tuple[str, str]]] = {}
    words: dict[str, set[str]] = {}
    for split, rows in builtin_sentiment().items():
        clauses = [clause for row in rows for clause in CLAUSE.findall(row["text"].lower())]
        assert len(clauses) > 1.5 * len(rows)
        combinations_of[split] = {(part, clause[2]) for clause in clauses for part in clause[:2]}
        words[split] = {word for row in rows for word in re.findall(r"\w+", row["text"])}
    for one, other in combinations(combinations_of.values(), 2):
        assert not one & other
    assert words["test"] | words["validation"] <= words["train"]


def test_bag_of_words_does_not_solve_the_sentiment_set() -> None:
    splits = builtin_sentiment()
    texts = {split: [row["text"] for row in rows] for split, rows in splits.items()}
    labels = {split: [row["label"] for row in rows] for split, rows in splits.items()}
    for ngrams in (1, 2):
        counts = CountVectorizer(ngram_range=(1, ngrams)).fit(texts["train"])
        model = LogisticRegression(max_iter=1000).fit(counts.transform(texts["train"]), labels["train"])
        for split in ("validation", "test"):
            assert model.score(counts.transform(texts[split]), labels[split]) <= 0.75, (ngrams, split)


@pytest.mark.parametrize(
    ("text", "label"),
    [("hardly", None), (", but ", "second"), ("Although ", "second"), (", even if ", "first"), ("; ", "strong")],
)
def test_sentiment_labels_follow_the_rule(text: str, label: str | None) -> None:
    rows = [row for rows in builtin_sentiment().values() for row in rows if text in row["text"]]
    assert len(rows) > 100
    for row in rows:
        clauses = CLAUSE.findall(row["text"].lower())
        if label is None and len(clauses) > 1:
            continue
        if label == "strong":
            chosen = next(clause for clause in clauses if clause[1] in MODIFIERS[-5:])
        else:
            chosen = clauses[-1] if label == "second" else clauses[0]
        negated = chosen[1] in ("not", "never", "hardly", "anything but", "far from")
        assert (row["label"] == "positive") == ((chosen[2] in POSITIVE) != negated), row


@pytest.mark.parametrize(
    ("target", "expected"), [("de", "17d4bf01748cb45b"), ("fr", "f660bdef08a95b76"), ("es", "f75abbaba1f4eed8")]
)
def test_translation_is_always_the_same_unambiguous_and_unseen(target: str, expected: str) -> None:
    splits = builtin_translation(target)
    assert digest(splits) == expected  # recorded with num2words 0.5.14 and Babel 2.18
    sizes = {split: len(rows) for split, rows in splits.items()}
    assert sizes == {"train": 8267, "validation": 1007, "test": 1007}
    pairs = [row["translation"] for rows in splits.values() for row in rows]
    assert all(pair.keys() == {"en", target} for pair in pairs)
    assert len({pair["en"] for pair in pairs}) == len(pairs)
    assert len({pair[target] for pair in pairs}) == len(pairs)
    language = ("en",) if target == "de" else ("en", target)  # German writes a number as one word
    for side in language:
        words = {split: {word for row in rows for word in re.findall(r"\w+", row["translation"][side])}
                 for split, rows in splits.items()}  # fmt: skip
        assert words["test"] | words["validation"] <= words["train"]


def test_numbers_in_words() -> None:
    assert say_number(281_391, "en") == "two hundred and eighty-one thousand, three hundred and ninety-one"
    assert say_number(281_391, "de") == "zweihunderteinundachtzigtausenddreihunderteinundneunzig"
    assert say_number(101_001, "de") == "einhunderteintausendeins"
    assert say_number(80_080, "fr") == "quatre-vingt mille quatre-vingts"
    assert say_number(71_200, "fr") == "soixante et onze mille deux cents"
    assert say_number(131_121, "es") == "ciento treinta y un mil ciento veintiuno"
    assert say_number(21_000, "es") == "veintiún mil"
    assert say_number(1_001, "es") == "mil uno"


def test_dates_in_words() -> None:
    day = date(1901, 3, 1)
    assert say_date(day, "en") == "Friday, the first of March, nineteen oh-one"
    assert say_date(day, "de") == "Freitag, der erste März neunzehnhunderteins"
    assert say_date(day, "fr") == "vendredi premier mars mille neuf cent un"
    assert say_date(day, "es") == "viernes, uno de marzo de mil novecientos uno"


@pytest.mark.parametrize(
    ("time", "sayings"),
    [
        (Time(1, 0, 1), ("one o'clock in the afternoon", "ein Uhr nachmittags", "une heure de l'après-midi",
                         "la una en punto de la tarde")),
        (Time(11, 30, 0), ("half past eleven in the morning", "halb zwölf morgens", "onze heures et demie du matin",
                               "las once y media de la mañana")),
        (Time(6, 45, 2), ("a quarter to seven in the evening", "Viertel vor sieben abends",
                          "sept heures moins le quart du soir", "las siete menos cuarto de la noche")),
        (Time(1, 1, 1), ("one minute past one in the afternoon", "eine Minute nach eins nachmittags",
                         "une heure une de l'après-midi", "la una y uno de la tarde")),
        (Time(8, 39, 0), ("twenty-one minutes to nine in the morning", "einundzwanzig Minuten vor neun morgens",
                          "neuf heures moins vingt et une du matin", "las nueve menos veintiuno de la mañana")),
    ],
)  # fmt: skip
def test_times_in_words(time: Time, sayings: tuple[str, ...]) -> None:
    assert tuple(say_time(time, language) for language in ("en", "de", "fr", "es")) == sayings


def test_unknown_target_is_refused() -> None:
    with pytest.raises(BadInput, match="goes from en to de, fr, es, not to 'it'"):
        builtin_translation("it")
