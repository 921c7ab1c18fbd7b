"""Batches of tokenized texts with class numbers; a long text is cut, or becomes several windows.

A row weighs its class's weight over its text's windows, so that every text counts once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hfkit.data.batches import Batch, Plan, Reader, Step
from hfkit.data.order import EMPTY, shuffle
from hfkit.tokenizer import encode_texts, special_around


@dataclass(frozen=True)
class Encoded:
    """Tokenized texts, each one row or several windows."""

    rows: list[list[int]]
    owner: np.ndarray
    """(rows,) the text that each row belongs to."""
    truncated: float
    """Share of the texts that are longer than a row."""


def encode_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, how: str) -> Encoded:
    """Tokenize texts as plain ``tokenizer(text)`` does, but for special tokens spelled out, and cut the long ones.

    Args:
        length: Tokens of a row at most, special tokens included.
        how: What becomes of longer texts: head, head_tail or windows.
    """
    before, after = special_around(tokenizer)
    room = length - len(before) - len(after)
    rows, owner, long = [], [], 0
    for number, ids in enumerate(encode_texts(tokenizer, texts)):
        long += len(ids) > room
        pieces = cut_ids(ids, room, how)
        rows += [before + piece + after for piece in pieces]
        owner += [number] * len(pieces)
    return Encoded(rows, np.array(owner, dtype=np.int64), long / max(1, len(texts)))


def cut_ids(ids: list[int], room: int, how: str) -> list[list[int]]:
    """Return the pieces of a text's tokens that the model sees.

    Head and tail are a quarter and three quarters (Sun et al., 2019, arXiv:1905.05583, section 5.3.1: 128 and 382).

    Example:
        >>> [cut_ids([1, 2, 3, 4, 5, 6], 4, how) for how in ("head", "head_tail", "windows")]
        [[[1, 2, 3, 4]], [[1, 4, 5, 6]], [[1, 2, 3, 4], [5, 6]]]
    """
    if len(ids) <= room:
        return [ids]
    if how == "windows":
        return [ids[start : start + room] for start in range(0, len(ids), room)]
    head = room if how == "head" else room // 4
    return [ids[:head] + ids[len(ids) - (room - head) :]] if head < room else [ids[:room]]


def classification_rows(
    encoded: Encoded,
    labels_of_texts: Sequence[int],
    class_weights: np.ndarray,
    plan: Plan,
    seed: int,
    pad: int,
) -> Reader:
    """Return step → this process's rows; those of a step are sorted by length, so that little is padding."""
    labels = np.array(labels_of_texts)[encoded.owner]  # (rows,)
    windows = np.bincount(encoded.owner)
    weights = class_weights[labels] / windows[encoded.owner]  # (rows,)
    lengths = np.array([len(row) for row in encoded.rows])
    split = plan.split

    def read(step: int) -> Step:
        chosen = shuffle(split.positions(step, plan.last), len(encoded.rows), seed)
        chosen = chosen[np.argsort(-lengths[chosen], kind="stable")]
        batches = []
        for slots in split.share(len(chosen)):
            rows = np.where(slots == EMPTY, chosen[-1], chosen[slots])
            batches.append(
                collate(encoded, rows, pad)
                | {
                    "targets": torch.from_numpy(labels[rows]),
                    "weights": torch.from_numpy(np.where(slots == EMPTY, 0.0, weights[rows])).float(),
                }
            )
        names = ", ".join(map(str, encoded.owner[chosen[:8]]))
        return Step(batches, float(weights[chosen].sum()), int(lengths[chosen].sum()), f"texts {names} …")

    return read


def collate(encoded: Encoded, rows: np.ndarray, pad: int) -> Batch:
    """Return input_ids and attention_mask of rows, padded on the right to the longest."""
    lengths = np.array([len(encoded.rows[row]) for row in rows])
    real = np.arange(max(1, lengths.max()))[None] < lengths[:, None]  # (rows, T)
    ids = np.full(real.shape, pad, dtype=np.int64)
    ids[real] = np.concatenate([encoded.rows[row] for row in rows])
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(real.astype(np.int64))}
