"""Prepare text for training: read, clean, deduplicate, decontaminate, tokenize, and write down what was done.

    python recipes/prepare.py --data.train_files 'corpus/*.jsonl.gz' --data.validation_files held_out.txt

The result lies in `data.cache_dir` under a key of its content; every recipe with the same settings uses it. The audit
(audit.json and audit.html in `output_dir`) says what came in, what each rule removed and how good the tokenizer is.
What is printed ends with the folder of the text, which opens as a dataset:

    datasets.load_dataset("parquet", data_files="FOLDER/train-*.parquet")

With --hub.repo_id me/corpus the text becomes a data set on the Hub, with a card made of the audit.

A mixture of sources is written in YAML, see recipes/configs/prepare/mixture.yaml. What one machine cannot prepare is
spread over a cluster that shares `data.cache_dir`, and gives the same files:

    python recipes/prepare.py --data.train_files '/shared/corpus/*.jsonl.zst' --data.cache_dir /shared/cache \\
        --executor.name slurm --executor.tasks 500 --executor.options '{"time": "10:00:00", "partition": "cpu"}'
"""

from dataclasses import dataclass, field
from pathlib import Path

from hfkit.config import parse_config
from hfkit.settings import DataConfig, ExecutorConfig, RepositoryConfig, TokenizerConfig


@dataclass
class PrepareConfig:
    """Turn raw text into tokenized shards and an audit."""

    data: DataConfig = field(default_factory=DataConfig)
    """Which text, and how it is cleaned, deduplicated and packed."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Byte-level BPE trained on `data`, or a tokenizer that exists."""
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    """Who does the long steps: this machine, or many tasks through datatrove."""
    hub: RepositoryConfig = field(default_factory=RepositoryConfig)
    """Where to publish the text as a dataset; nothing leaves the machine unless `repo_id` is set."""
    output_dir: Path = Path("runs/prepare")
    """Where the audit goes."""
    seed: int = 0
    """Unused by preparation, which depends on the content alone; accepted so that every recipe takes it."""


if __name__ == "__main__":  # before anything heavy is imported: help and mistakes answer at once
    config = parse_config(PrepareConfig)

from hfkit.audit_page import write_audit_page
from hfkit.config import save_config
from hfkit.data.catalog import describe_named
from hfkit.data.prepare import prepare_data
from hfkit.dataset_card import publish_corpus
from hfkit.facts import Facts
from hfkit.files import write_json
from hfkit.launch import current_status, launch
from hfkit.passport import write_passport
from hfkit.status import as_text, is_main_process


def main(config: PrepareConfig) -> None:
    """Prepare, or find what was prepared, and write the audit."""
    work = None
    if config.executor.name != "none":
        from hfkit.data.spread import spread_over  # datatrove is optional

        work = spread_over(config.executor)
    data = prepare_data(config.data, config.tokenizer, work=work)
    if not is_main_process():
        return
    facts = Facts.of(data)
    save_config(config, config.output_dir / "config.yaml")
    write_json(config.output_dir / "audit.json", data.audit)
    write_audit_page(data.audit, config.output_dir / "audit.html")
    known = facts.data | describe_named(config.data)
    write_passport(config.output_dir, data=known, tokenizer=facts.tokenizer, seed=config.seed)
    shown = {name: data.audit[name] for name in ("documents", "removed", "splits", "tokenizer", "reused")}
    print(as_text({**shown, "text": str(data.text)}))
    if config.hub.repo_id and (status := current_status()):
        status.update(push="failed")
        if publish_corpus(config.hub, config.output_dir, data.text):
            status.update(push="done")


if __name__ == "__main__":
    launch(main, config)
