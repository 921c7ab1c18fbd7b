"""Text to training shards: hfkit's preparation against the two-map `group_texts` recipe of transformers' run_clm.py.

    python benchmarks/prepare_speed.py --prose books.jsonl [--code code.jsonl] [--tokenizer folder] [--pairs 5]

Both sides get the same tokenizer and the same JSON Lines files with a `text` column, start in a process of their own
with empty caches, and run in turn; a pair is one run of each, and the speed-up is the median of the pairs' ratios. Time
runs from after the imports to the finished shards. The recipe runs with the process count (1, its tokenizer on all
cores, or 2) that was faster in a trial. It neither cleans nor deduplicates; hfkit does exact and near deduplication in
every run but those that show what a rule costs. Without --code, the standard library's sources are the code, which is
not cleaned; without --tokenizer, one is trained on the beginning of both.
"""

import argparse
import json
import multiprocessing
import os
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoTokenizer

from hfkit.data.prepare import prepare_data
from hfkit.settings import CleanConfig, DataConfig, DedupConfig, TokenizerConfig
from hfkit.tokenizer import train_tokenizer
from results import save_result, spread

BLOCK = 1024  # tokens a row
VOCABULARY = 16384
# What hfkit does, by name; the first two are compared with the recipe, the others show each rule's cost.
VARIANTS: dict[str, dict[str, Any]] = {
    "cleaning off": {"clean": False},
    "cleaning on": {},
    "nothing but shards": {"clean": False, "exact": False, "near": False},
    "exact only": {"clean": False, "near": False},
    "near only": {"clean": False, "exact": False},
    "cleaning only": {"exact": False, "near": False},
    "decontamination only": {"clean": False, "exact": False, "near": False, "decontaminate": True},
}


def run_hfkit(corpus: str, tokenizer: str, folder: Path, variant: str) -> float:
    """Prepare the corpus with one variant; return seconds."""
    chosen = {"clean": True, "exact": True, "near": True, "decontaminate": False, **VARIANTS[variant]}
    config = DataConfig(
        train_files=corpus,
        cache_dir=folder,
        validation_share=0.01,
        clean=CleanConfig(enabled=chosen["clean"]),
        dedup=DedupConfig(exact=chosen["exact"], near=chosen["near"]),
        decontaminate=chosen["decontaminate"],
    )
    begin = time.perf_counter()
    prepare_data(config, TokenizerConfig(path=tokenizer))
    return time.perf_counter() - begin


def run_recipe(corpus: str, tokenizer: str, folder: Path, processes: int) -> float:
    """Tokenize and group as transformers' examples/pytorch/language-modeling/run_clm.py does; return seconds."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)

    def tokenize(examples: dict[str, list[str]]) -> Any:
        return loaded(examples["text"])

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain(*examples[name])) for name in examples}
        length = len(joined["input_ids"]) // BLOCK * BLOCK
        cut = {name: [ids[i : i + BLOCK] for i in range(0, length, BLOCK)] for name, ids in joined.items()}
        cut["labels"] = cut["input_ids"].copy()
        return cut

    begin = time.perf_counter()
    raw = load_dataset("json", data_files=corpus, split="train", cache_dir=str(folder))
    tokenized = raw.map(tokenize, batched=True, num_proc=processes, remove_columns=raw.column_names)
    tokenized.map(group_texts, batched=True, num_proc=processes)
    return time.perf_counter() - begin


def measure(side: str, corpus: Path, tokenizer: Path, detail: str) -> dict[str, float]:
    """Run one side in a process of its own with empty caches; return its wall and CPU seconds."""
    context = multiprocessing.get_context("fork")  # everything is imported, and nothing has started a thread
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        run = context.Process(target=work, args=(send, side, str(corpus), str(tokenizer), folder, detail))
        run.start()
        send.close()
        figures = receive.recv()
        run.join()
    return figures


def work(send: Any, side: str, corpus: str, tokenizer: str, folder: str, detail: str) -> None:
    """Run one side; send its figures."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if detail == "2" else "true"
    before = os.times()
    if side == "hfkit":
        seconds = run_hfkit(corpus, tokenizer, Path(folder), detail)
    else:
        seconds = run_recipe(corpus, tokenizer, Path(folder), int(detail))
    after = os.times()
    send.send({"seconds": seconds, "cpu": sum(after[:4]) - sum(before[:4])})


def compare(corpus: Path, tokenizer: Path, pairs: int, variants: Sequence[str]) -> dict[str, Any]:
    """Run the recipe and hfkit's variants in turn."""
    size = sum(len(json.loads(line)["text"].encode()) for line in corpus.open()) / 1e6
    trial = {count: measure("recipe", corpus, tokenizer, count)["seconds"] for count in ("1", "2")}
    processes = min(trial, key=lambda count: trial[count])
    result: dict[str, Any] = {"megabytes": round(size, 1), "recipe_processes": int(processes)}
    runs: dict[str, list[dict[str, float]]] = {"recipe": [], **{variant: [] for variant in variants}}
    for _ in range(pairs):
        runs["recipe"].append(measure("recipe", corpus, tokenizer, processes))
        for variant in variants:
            runs[variant].append(measure("hfkit", corpus, tokenizer, variant))
    for side, figures in runs.items():
        paired = list(zip(runs["recipe"], figures, strict=True))
        result[side] = {
            "megabytes_per_second": spread([size / run["seconds"] for run in figures]),
            "times_the_recipe": spread([base["seconds"] / run["seconds"] for base, run in paired]),
            "times_the_recipe_in_cpu_time": spread([base["cpu"] / run["cpu"] for base, run in paired]),
        }
    return result


def cost_of_rules(corpus: Path, tokenizer: Path, megabytes: float) -> dict[str, float]:
    """Return the CPU milliseconds that a megabyte takes without any rule, and those that each rule adds."""
    cpu = {name: measure("hfkit", corpus, tokenizer, name)["cpu"] / megabytes * 1000 for name in list(VARIANTS)[2:]}
    base = cpu.pop("nothing but shards")
    added = {name.removesuffix(" only"): round(value - base, 1) for name, value in cpu.items()}
    return {"nothing but shards": round(base, 1), **added}


def write_code(path: Path, limit: int = 20_000_000) -> None:
    """Write the standard library's sources, a file a row, `limit` characters of them."""
    written = 0
    with path.open("w") as file:
        for source in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            if "site-packages" in source.parts or written > limit:
                continue
            try:
                text = source.read_text("utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                written += len(text)
                file.write(json.dumps({"text": text}) + "\n")


def write_tokenizer(folder: Path, corpora: list[Path]) -> None:
    """Train the tokenizer that both sides use on the first 4 MB of each corpus."""
    texts = [json.loads(line)["text"] for corpus in corpora for line in corpus.open().readlines(4_000_000)]
    train_tokenizer(texts, TokenizerConfig(vocab_size=VOCABULARY)).save_pretrained(folder)


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", type=Path, required=True)
    parser.add_argument("--code", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        code = options.code or Path(folder) / "code.jsonl"
        if options.code is None:
            write_code(code)
        tokenizer = options.tokenizer or Path(folder) / "tokenizer"
        if options.tokenizer is None:
            # In a child: a tokenizer that has used threads keeps its forks from using any.
            child = multiprocessing.get_context("fork").Process(
                target=write_tokenizer, args=(tokenizer, [options.prose, code])
            )
            child.start()
            child.join()
        result: dict[str, Any] = {"pairs": options.pairs, "load_before": round(os.getloadavg()[0], 1)}
        result["prose"] = compare(options.prose, tokenizer, options.pairs, ("cleaning off", "cleaning on"))
        save_result("prepare_speed", result)  # after each part: a run that is cut short leaves what it measured
        result["code"] = compare(code, tokenizer, options.pairs, ("cleaning off",))
        save_result("prepare_speed", result)
        result["cpu_ms_per_megabyte"] = cost_of_rules(options.prose, tokenizer, result["prose"]["megabytes"])
        save_result("prepare_speed", result)


if __name__ == "__main__":
    main()
