"""Token streams for tests: documents are lists of ids, each written as it is."""

from collections.abc import Sequence
from pathlib import Path

from hfkit.data.shards import StreamWriter, TokenStream

EOS = 0


def write_stream(folder: Path, documents: Sequence[list[int]], vocab_size: int = 60000, name: str = "s") -> TokenStream:
    """Write documents and open them."""
    writer = StreamWriter(folder, name, vocab_size)
    writer.write(documents)
    writer.close()
    return TokenStream(folder, name, vocab_size)


def number_documents(lengths: Sequence[int], first: int = 1) -> list[list[int]]:
    """Return documents of these lengths in which no token but EOS, their last, occurs twice."""
    documents = []
    for length in lengths:
        documents.append([*range(first, first + length - 1), EOS])
        first += length - 1
    return documents
