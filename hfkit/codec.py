"""How texts become a translation model's tokens, by language prefix or prompt, cut to a length."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hfkit.tokenizer import special_around


@dataclass(frozen=True)
class Codec:
    """How texts become tokens and tokens texts: what a model needs besides its weights to translate."""

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

    def encode_sources(self, texts: Sequence[str]) -> tuple[list[list[int]], float]:
        """Return what the model reads for each text, just as a plain tokenizer call gives it, and the share cut."""
        if self.kind == "causal":
            return self._encode_prompts(texts)
        full = self.tokenizer([self.prefix + text for text in texts], verbose=False)["input_ids"]
        end = len(special_around(self.tokenizer)[1])
        cut = [ids[: self.length - end] + ids[len(ids) - end :] if len(ids) > self.length else ids for ids in full]
        return cut, sum(len(ids) > self.length for ids in full) / max(1, len(full))

    def _encode_prompts(self, texts: Sequence[str]) -> tuple[list[list[int]], float]:
        alone = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        kept = [
            text if len(ids) <= self.length else str(self.tokenizer.decode(ids[: self.length]))
            for text, ids in zip(texts, alone, strict=True)
        ]
        prompts = [self.prompt.replace("{source}", text) for text in kept]
        share = sum(len(ids) > self.length for ids in alone) / max(1, len(alone))
        return self.tokenizer(prompts, verbose=False)["input_ids"], share

    def encode_targets(self, texts: Sequence[str]) -> tuple[list[list[int]], float]:
        """Return the tokens to predict for each text, the last one EOS, and the share cut.

        A target that is cut has no EOS, so that nobody learns to stop in mid-sentence.
        """
        if self.kind == "causal":
            plain = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            full = [[*ids, self.tokenizer.eos_token_id] for ids in plain]
        else:
            full = self.tokenizer(text_target=list(texts), verbose=False)["input_ids"]
        return [ids[: self.length] for ids in full], sum(len(ids) > self.length for ids in full) / max(1, len(full))
