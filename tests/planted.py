"""A corpus with known defects, each document marked by what is wrong with it."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

CLEAN_TEXTS = (
    "def f(x):\n\treturn  {'a': x}  # two  spaces\n\n\n\nprint(f(1))   \n",
    "Ein Mädchen aß süße Äpfel … „so“, sagte es – naïve café. 😀 1.234,5 %",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。寒來暑往，秋收冬藏。\n閏餘成歲，律呂調陽。",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "كان يا ما كان في قديم الزمان ملك عادل يحب شعبه.",
    "ในครั้งหนึ่งนานมาแล้ว มีพระราชาองค์หนึ่ง",
    "| a | b |\n|---|---|\n| 1 | 2 |  \nhttps://example.org/?q=1&r=é <|endoftext|> <|pad|>",
)
MOJIBAKE = [("schÃ¶n wie der FrÃ¼hling, cafÃ© Nr. {}", "schön wie der Frühling, café Nr. {}")]
CONTROLS = [("a\x00 form\x1b[31m with red\x1b[0m and\x07 bell, number {}", "a form with red and bell, number {}")]


@dataclass
class Planted:
    """What was planted, by where it must end."""

    folder: Path
    documents: int = 0
    untouched: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    exact_copies: int = 0
    near_copies: list[str] = field(default_factory=list)
    """At Jaccard similarity 0.8 or more to an earlier document."""
    far_copies: list[str] = field(default_factory=list)
    """Below 0.5."""
    contaminated: list[str] = field(default_factory=list)
    empty: int = 0
    unreadable: int = 0


def near_pair(draw: random.Random, jaccard: float, length: int = 200) -> tuple[str, str]:
    """Two texts whose sets of 5-word shingles have this Jaccard similarity, to 0.005."""
    shingles = length - 4
    shared = round(2 * shingles * jaccard / (1 + jaccard))
    words = [f"w{number}" for number in draw.sample(range(10**6), 2 * length)]
    return " ".join(words[:length]), " ".join(words[: shared + 4] + words[length : 2 * length - shared - 4])


def plant(folder: Path, seed: int = 0, line: int = 2_000_000, scale: int = 1) -> Planted:
    """Write train.jsonl and test.txt; ``line`` is the length of the longest document, in characters."""
    draw = random.Random(seed)
    planted = Planted(folder)

    def prose(words: int = 60) -> str:
        return " ".join(f"{draw.choice('bcdfgk')}{draw.randrange(10**5)}" for _ in range(words)).capitalize() + "."

    held_out = [prose(40) for _ in range(20)]
    (folder / "test.txt").write_text("\n".join(held_out) + "\n")
    untouched = [*CLEAN_TEXTS, *(prose() for _ in range(120 * scale)), prose(line // 7)]
    copies = [text.replace(" ", "  ").upper() for text in untouched[10:40]]
    for jaccard in (0.8, 0.85, 0.9, 0.95):
        for _ in range(25 * scale):
            first, second = near_pair(draw, jaccard)
            untouched.append(first)
            planted.near_copies.append(second)
    for jaccard in (0.2, 0.4, 0.49):
        for _ in range(35 * scale):
            first, second = near_pair(draw, jaccard)
            untouched.append(first)
            planted.far_copies.append(second)
    for text in held_out:
        start = draw.randrange(40 - 13)
        passage = " ".join(text.rstrip(".").split()[start : start + 13])
        planted.contaminated.append(f"{prose(30)} {passage.upper()}; {prose(30)}")
    broken = [(wrong.format(n), right.format(n)) for n in range(15) for wrong, right in MOJIBAKE + CONTROLS]
    planted.untouched, planted.exact_copies = untouched, len(copies)
    planted.repaired = [right for _, right in broken]
    later = [*copies, *planted.near_copies, *planted.far_copies, *planted.contaminated, *(wrong for wrong, _ in broken)]
    later += [*CLEAN_TEXTS[:1], "", " \n\t "]
    planted.exact_copies, planted.empty = len(copies) + 1, 2
    draw.shuffle(later)
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in [*untouched, *later]]
    lines[50:50] = [
        rb'{"text": "half a pair: \ud83d"}',
        '{"text": "Latin-1: café"}'.encode("latin-1"),
        b'{"text": "cut off',
        b'{"txt": "another column"}',
        b'{"text": null}',
        '{"text": "UTF-16"}'.encode("utf-16"),
    ]
    planted.unreadable = 6
    planted.documents = len(lines)
    (folder / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return planted
