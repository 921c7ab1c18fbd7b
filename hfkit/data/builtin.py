"""The labelled sets that hfkit generates from code, with no file and no download; the built-in corpus is `corpus`."""

from hfkit.data.builtin_sentiment import builtin_sentiment
from hfkit.data.builtin_translation import builtin_translation

__all__ = ["builtin_sentiment", "builtin_translation"]
