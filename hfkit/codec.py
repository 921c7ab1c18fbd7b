"""How texts become a translation model's tokens and tokens texts, by language prefix or prompt, cut to a length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hfkit.data.pair_batches import EncodedPairs
from hfkit.data.pairs import Pair
from hfkit.tokenizer import encode_texts, special_around

TARGET_FOLDER = "target_tokenizer"  # inside a model's folder, where each language has a vocabulary of its own


@dataclass(frozen=True)
class Codec:
    """What a model needs besides its weights to translate."""

    tokenizer: PreTrainedTokenizerBase
    kind: str
    prefix: str
    """seq2seq: what stands before every source."""
    prompt: str
    """causal: what the model continues."""
    length: int
    """Tokens of a source, and of a target, at most."""
    start_id: int | None = None
    """seq2seq: the decoder's first input."""
    target_tokenizer: PreTrainedTokenizerBase | None = None
    """seq2seq: of the target's own vocabulary; None where `tokenizer` serves both sides."""

    @property
    def writer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of translations."""
        return self.tokenizer if self.target_tokenizer is None else self.target_tokenizer

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizers into a model's folder, whence plain transformers loads them."""
        self.tokenizer.save_pretrained(folder)
        if self.target_tokenizer is not None:
            self.target_tokenizer.save_pretrained(folder / TARGET_FOLDER)

    def encode_pairs(self, pairs: Sequence[Pair]) -> tuple[EncodedPairs, list[float]]:
        """Return the tokens of pairs, and the shares of sources and of targets that were cut."""
        sources, long_sources = self.encode_sources([pair.source for pair in pairs])
        targets, long_targets = self.encode_targets([pair.target for pair in pairs])
        encoded = EncodedPairs(sources, targets, int(self.tokenizer.pad_token_id), self.start_id)
        return encoded, [long_sources, long_targets]

    def encode_splits(
        self, splits: Mapping[str, Sequence[Pair]]
    ) -> tuple[dict[str, EncodedPairs], dict[str, list[float]]]:
        """Return what ``encode_pairs`` does, for each split that holds pairs."""
        encoded = {split: self.encode_pairs(pairs) for split, pairs in splits.items() if pairs}
        return {split: tokens for split, (tokens, _) in encoded.items()}, {s: cut for s, (_, cut) in encoded.items()}

    def encode_sources(self, texts: Sequence[str]) -> tuple[list[list[int]], float]:
        """Return what the model reads for each text, as a plain tokenizer call gives it but for special
        tokens spelled out, and the share cut."""
        if self.kind == "causal":
            return self._encode_prompts(texts)
        full = self._read([self.prefix + text for text in texts])
        end = len(special_around(self.tokenizer)[1])
        cut = [ids[: self.length - end] + ids[len(ids) - end :] if len(ids) > self.length else ids for ids in full]
        return cut, _share_over(self.length, full)

    def _encode_prompts(self, texts: Sequence[str]) -> tuple[list[list[int]], float]:
        alone = encode_texts(self.tokenizer, texts)
        kept = [
            text if len(ids) <= self.length else str(self.tokenizer.decode(ids[: self.length]))
            for text, ids in zip(texts, alone, strict=True)
        ]
        prompts = [self.prompt.replace("{source}", text) for text in kept]
        return self._read(prompts), _share_over(self.length, alone)

    def _read(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of whole inputs; special tokens spelled out are characters, unless the frame spells one."""
        framed = any(token in self.prefix + self.prompt for token in self.tokenizer.all_special_tokens)
        return self.tokenizer(list(texts), split_special_tokens=not framed, verbose=False)["input_ids"]

    def encode_targets(self, texts: Sequence[str]) -> tuple[list[list[int]], float]:
        """Return the tokens to predict for each text, the last one EOS, and the share cut.

        A target that is cut has no EOS, so that nobody learns to stop in mid-sentence. Special tokens spelled out in it
        are its characters.
        """
        if self.kind == "causal":
            full = [[*ids, self.tokenizer.eos_token_id] for ids in encode_texts(self.tokenizer, texts)]
        elif self.target_tokenizer is not None:
            full = self.target_tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]
        else:
            full = self.tokenizer(text_target=list(texts), split_special_tokens=True, verbose=False)["input_ids"]
        return [ids[: self.length] for ids in full], _share_over(self.length, full)


def _share_over(length: int, rows: Sequence[list[int]]) -> float:
    return sum(len(ids) > length for ids in rows) / max(1, len(rows))
