"""hfkit: from plain text to a published language model, in the Hugging Face ecosystem's own formats."""

__version__ = "0.1.0"
