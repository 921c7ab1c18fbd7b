"""What pretrained translation models call languages, and how they are told which one to write.

mBART, M2M-100 and NLLB have a token for each language, T5 reads a sentence, Marian a >>code<<.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from babel import Locale, UnknownLocaleError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkit.settings import BadInput


def set_languages(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, source: str, target: str
) -> tuple[int, list[str] | None]:
    """Tell a multilingual tokenizer and model what to read and write; return the decoder's first input, and the codes.

    Other models are left as they are, and have no codes.

    Raises:
        BadInput: for a language that the model does not know.
    """
    known = _known_codes(tokenizer) if hasattr(tokenizer, "src_lang") else []
    if not known:
        return model.config.decoder_start_token_id, None
    for code, flag in ((source, "data.source_code"), (target, "data.target_code")):
        _check_code(code, known, flag)
    tokenizer.src_lang, tokenizer.tgt_lang = source, target
    return _set_target_language(tokenizer, model), [source, target]


def _known_codes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the languages of a multilingual tokenizer."""
    if mapping := getattr(tokenizer, "lang_code_to_id", None):
        return sorted(mapping)
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return sorted(token for token in tokens if "_" in token and token[:1].isalpha())


def _check_code(code: str, known: Sequence[str], flag: str) -> None:
    """Raise BadInput where the model does not know a language, with those that it knows."""
    if code not in known:
        near = get_close_matches(code, known, n=1, cutoff=0.3)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise BadInput(f"{flag}: the model does not know the language {code!r}{hint}; it knows {', '.join(known)}")


def _set_target_language(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Make generation begin with the target language's token; return the decoder's first input.

    In most models targets begin with that token, which generation then forces; in mBART-25 it is the decoder's first
    input, and targets end with it.
    """
    ids = tokenizer(text_target="a")["input_ids"]
    language: Any = tokenizer.convert_tokens_to_ids(_language_token(tokenizer))
    if ids[0] == language:
        model.generation_config.forced_bos_token_id = language
        return ids[-1] if model.config.model_type == "mbart" else model.config.decoder_start_token_id
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = language
    model.generation_config.forced_bos_token_id = None
    return language


def _language_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token of the target language; M2M-100 writes __de__ for de."""
    code = str(tokenizer.tgt_lang)
    return tokenizer.get_lang_token(code) if hasattr(tokenizer, "get_lang_token") else code


def find_prefix(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, source: str, target: str) -> str:
    """Return what such a model wants before every source: T5's sentence, Marian's >>code<<, or nothing."""
    marks = sorted(token[2:-2] for token in tokenizer.get_vocab() if token.startswith(">>") and token.endswith("<<"))
    if marks:
        _check_code(target, marks, "data.target_code")
        return f">>{target}<< "
    if model.config.model_type in ("t5", "mt5", "umt5"):
        return f"translate {_english_name(source)} to {_english_name(target)}: "
    return ""


def _english_name(code: str) -> str:
    try:
        name = Locale.parse(code.replace("-", "_")).get_language_name("en")
    except (UnknownLocaleError, ValueError):
        name = None
    if name is None:
        raise BadInput(f"the language {code!r} has no known English name; give --model.prefix")
    return name
