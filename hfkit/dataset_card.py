"""The card of a prepared corpus, written from what `prepare` left: configuration, audit and public passport."""

from pathlib import Path

from huggingface_hub import DatasetCardData

from hfkit.card import data_section, dataset_id, read_facts, tokenizer_facts
from hfkit.files import write_atomic
from hfkit.markdown import flatten, render_card, table


def write_dataset_card(output_dir: Path, repo_id: str | None = None) -> str:
    """Write ``README.md`` of a prepared corpus into ``output_dir``, and return its text.

    Args:
        repo_id: Where the corpus will be; None takes the configuration's, or else the folder's name.
    """
    facts = read_facts(output_dir)
    config, audit = facts["config"], facts["audit"]
    hub, source = config.get("hub", {}), dataset_id(config)
    name = repo_id or hub.get("repo_id") or output_dir.resolve().name
    metadata = DatasetCardData(
        pretty_name=name.split("/")[-1],
        language=hub.get("language"),
        license=hub.get("license"),
        source_datasets=[source] if source else None,
        task_categories=["text-generation"],
        tags=["hfkit"],
    )
    kept = audit.get("documents", {}).get("kept")
    size = f" of {kept:,} documents" if isinstance(kept, int) else ""
    cleaning = {key: config.get("data", {}).get(key) for key in ("clean", "dedup", "decontaminate")}
    sections = {
        "Data": data_section(facts["passport"], audit),
        "Splits": table(flatten(audit.get("splits", {}))),
        "Rules": table(flatten({key: value for key, value in cleaning.items() if value is not None})),
        "Tokenizer": table(tokenizer_facts(audit, facts["passport"])),
        "Versions": table(facts["passport"].get("versions", {})),
    }
    text = render_card(metadata.to_yaml(), name.split("/")[-1], f"A corpus{size}, prepared with hfkit.", sections)
    write_atomic(output_dir / "README.md", text)
    return text
