"""What a run is, besides its settings: compared at resume, and written into its passport."""

from dataclasses import dataclass, field
from typing import Any

from hfkit.data.prepare import Prepared


@dataclass
class Facts:
    """What a run is, besides its settings."""

    data_key: str
    tokenizer_hash: str
    identity: dict[str, Any] = field(default_factory=dict)
    """Task-specific settings that a resumed run must share."""
    data: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Prepared, **identity: Any) -> "Facts":
        """Return the facts of prepared text."""
        passport = {name: data.audit[name] for name in ("key", "sources", "splits", "removed", "provenance")}
        tokenizer = {"sha256": data.tokenizer_hash, **data.audit["tokenizer"]}
        if len(data.weights) > 1:
            identity = {"data.weights": data.weights, **identity}
        return cls(data.key, data.tokenizer_hash, identity, passport, tokenizer, data.audit)
