"""A prepared corpus on the Hub: its text, and a card written from what `prepare` left (configuration, audit, passport).

Of the text's columns only `text` leaves the machine: the other one says in which file a document was found.
"""

import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import pyarrow.parquet
from huggingface_hub import DatasetCardData, HfApi

from hfkit.card import citation, dataset_ids, read_facts
from hfkit.files import read_json, write_atomic, write_json
from hfkit.hub import TEXT_FILES, push_folder
from hfkit.markdown import flatten, render_card, table
from hfkit.passport import public_passport
from hfkit.remote import HubError, call
from hfkit.sections import command_section, data_section, tokenizer_facts
from hfkit.settings import RepositoryConfig
from hfkit.staging import check_private

USAGE = """\
from datasets import load_dataset

corpus = load_dataset("{name}")
print(corpus["train"][0]["text"])"""


def write_dataset_card(output_dir: Path, repo_id: str | None = None) -> str:
    """Write ``README.md`` of a prepared corpus into ``output_dir``, and return its text.

    Args:
        repo_id: Where the corpus will be; None takes the configuration's, or else the folder's name.
    """
    facts = read_facts(output_dir)
    config, audit = facts["config"], facts["audit"]
    hub, passport = config.get("hub", {}), facts["passport"]
    kept = audit.get("documents", {}).get("kept")
    name = repo_id or hub.get("repo_id") or output_dir.resolve().name
    metadata = DatasetCardData(
        pretty_name=name.split("/")[-1],
        language=hub.get("language"),
        license=hub.get("license"),
        source_datasets=dataset_ids(config) or None,
        task_categories=["text-generation"],
        size_categories=[size_category(kept)] if isinstance(kept, int) else None,
        tags=["hfkit"],
    )
    size = f" of {kept:,} documents" if isinstance(kept, int) else ""
    rules = rules_in_force(config.get("data", {}))
    sections = {
        "Use": f"```python\n{USAGE.format(name=name)}\n```",
        "Data": data_section(passport.get("data", {}), audit),
        "Rules in force": table(rules),
        "Tokenizer": table(tokenizer_facts(audit, passport)),
        "Versions": table(passport.get("versions", {})),
        "Repeating it": command_section(passport),
        "Limitations": limitations(rules),
        "Citation": citation(name, passport, "datasets/"),
    }
    text = render_card(metadata.to_yaml(), name.split("/")[-1], f"A corpus{size}, prepared with hfkit.", sections)
    write_atomic(output_dir / "README.md", text)
    return text


def size_category(documents: int) -> str:
    """Return the Hub's word for a number of documents.

    Example:
        >>> [size_category(number) for number in (97, 1000, 2_000_000, 10**13)]
        ['n<1K', '1K<n<10K', '1M<n<10M', 'n>1T']
    """
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    passed = sum(documents >= 1000 * 10**number for number in range(len(names)))
    if passed in (0, len(names)):
        return "n<1K" if passed == 0 else "n>1T"
    return f"{names[passed - 1]}<n<{names[passed]}"


def rules_in_force(data: dict[str, Any]) -> dict[str, Any]:
    """Return the rules that could change or drop a document, with their limits."""
    rules = flatten({key: data[key] for key in ("clean", "dedup", "decontaminate") if data.get(key) is not None})
    if rules.pop("clean.enabled", True) is False:
        rules = {key: value for key, value in rules.items() if not key.startswith("clean.")}
    said = {key: value for key, value in rules.items() if value is True or (value and value != 1)}  # 1: no limit
    return {key.replace("_", " "): value for key, value in said.items()}


def limitations(rules: dict[str, Any]) -> str:
    """Return what follows from how the corpus was made and what was not done."""
    lines = ["The text has the errors and biases of its sources; nobody read all of it."]
    if "clean.mask emails" not in rules:
        lines.append("Names, addresses and other personal data were neither searched for nor removed.")
    if "decontaminate" in rules:
        lines.append(
            "Overlap with evaluation text was searched for in this corpus' own validation and test splits only."
        )
    return "\n".join(f"- {line}" for line in lines)


def publish_corpus(config: RepositoryConfig, output_dir: Path, text: Path) -> bool:
    """Publish the text of a prepared corpus with its card and public passport; return whether that succeeded.

    Args:
        text: Folder of the Parquet files, each named after its split.

    Raises:
        HubError: if it failed and is required.
    """
    assert config.repo_id is not None
    repo_id, staging = config.repo_id, output_dir / f".push-{uuid.uuid4().hex[:8]}"
    try:
        staging.mkdir()
        for path in sorted(path for form in TEXT_FILES for path in text.glob(form)):
            copy_text(path, staging / path.name)
        write_atomic(staging / "README.md", write_dataset_card(output_dir, repo_id))
        write_json(staging / "passport.json", public_passport(read_json(output_dir / "passport.json") or {}))
        check_private(staging, output_dir)
        call(lambda: HfApi().create_repo(repo_id, private=config.private, repo_type="dataset", exist_ok=True))
        push_folder(staging, repo_id, message="Publish the corpus", repo_type="dataset")
    except HubError as error:
        if config.required:
            raise
        print(
            f"warning: pushing the corpus to {repo_id} failed: {error}\nto finish the push: run the same command again",
            file=sys.stderr,
        )
        return False
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def copy_text(source: Path, target: Path) -> None:
    """Write the column `text` of a Parquet file into another, a row group at a time."""
    file = pyarrow.parquet.ParquetFile(source)
    schema = file.schema_arrow
    with pyarrow.parquet.ParquetWriter(target, pyarrow.schema([schema.field("text")]), compression="zstd") as writer:
        for group in range(file.num_row_groups):
            writer.write_table(file.read_row_group(group, columns=["text"]))
