"""Bits per byte that a text needs without a language model: gzip, and an order-3 byte model of the training text.

    python benchmarks/byte_models.py TRAIN VALIDATION

A language model that does not beat these has learned nothing. Files are .txt or .jsonl (column `text`), plain or .gz.
"""

import gzip
import math
import sys
from collections import Counter
from pathlib import Path

from hfkit.data.documents import Rules, read_documents

ORDER = 3


def read_bytes(path: str) -> bytes:
    """Return all text of a file."""
    return "".join(document.text for document in read_documents(Path(path), Rules())).encode()


def order_n_bits(train: bytes, text: bytes, order: int = ORDER) -> float:
    """Return bits per byte under byte counts of the last ``order`` bytes, backed off by Witten and Bell (1991)."""
    counts = [Counter(zip(*(train[k:] for k in range(n + 1)), strict=False)) for n in range(order + 1)]
    totals, kinds = [], []
    for table in counts:
        total: Counter[tuple[int, ...]] = Counter()
        kind: Counter[tuple[int, ...]] = Counter()
        for gram, count in table.items():
            total[gram[:-1]] += count
            kind[gram[:-1]] += 1
        totals.append(total)
        kinds.append(kind)
    bits = 0.0
    for end in range(len(text)):
        probability = 1 / 256
        for n in range(min(order, end) + 1):
            context = tuple(text[end - n : end])
            if seen := totals[n][context]:
                new = kinds[n][context]
                probability = (counts[n][(*context, text[end])] + new * probability) / (seen + new)
        bits -= math.log2(probability)
    return bits / len(text)


def main() -> None:
    """Print both figures."""
    train, text = (read_bytes(path) for path in sys.argv[1:3])
    print(f"gzip -9: {8 * len(gzip.compress(text, 9)) / len(text):.4f} bits per byte")
    print(f"order-{ORDER} byte model: {order_n_bits(train, text):.4f} bits per byte")


if __name__ == "__main__":
    main()
