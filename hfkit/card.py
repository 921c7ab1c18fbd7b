"""The card of a model, written from the files that the run left, and from nothing else.

A section whose facts are missing is left out. What the public passport hides (paths, users, hosts, credentials) is not
read from anywhere else either: of the configuration, only figures and names go into the card.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from hfkit.files import read_json, write_atomic
from hfkit.markdown import fact_tables, flatten, render_card, rows_table, show, table
from hfkit.passport import public_passport
from hfkit.usage import SNIPPETS, find_task, is_tuned_to_chat

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w][\w.-]*", re.ASCII)
EVALUATIONS = 12  # rows of the training table
# Result's field → name and unit, in the order of their importance.
METRICS = {
    "bleu": "BLEU",
    "chrf": "chrF2++",
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "mcc": "Matthews correlation",
    "majority_baseline": "Majority baseline (accuracy)",
    "bits_per_byte": "Bits per byte",
    "perplexity": "Perplexity per token",
    "eval_loss": "Loss (nats per target token)",
}
SHAPE = (
    *("model_type", "num_hidden_layers", "n_layer", "hidden_size", "n_embd", "d_model", "intermediate_size"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "vocab_size", "max_position_embeddings", "n_positions"),
    *("tie_word_embeddings", "dtype"),
)
COUNTED = ("key", "removed")  # of the data's facts: the audit has them too


def write_model_card(output_dir: Path, repo_id: str | None = None) -> str:
    """Write ``model/README.md`` of a finished run, and return its text."""
    text = render_model_card(output_dir, output_dir / "model", repo_id)
    write_atomic(output_dir / "model" / "README.md", text)
    return text


def render_model_card(output_dir: Path, model_dir: Path, repo_id: str | None = None, step: int | None = None) -> str:
    """Return the card of a model as Markdown.

    Args:
        repo_id: Where it will be; None takes the configuration's, or else the folder `model`.
        step: Step of a checkpoint of a run; None is the finished model, and only then are there results.
    """
    facts = read_facts(output_dir)
    config, model = facts["config"], read_json(model_dir / "config.json") or {}
    result = facts["result"] if step is None else {}
    name = repo_id or config.get("hub", {}).get("repo_id") or "model"
    task = find_task(model)
    metadata = model_metadata(name, task, config, result)
    chat = task == "text-generation" and (model_dir / "chat_template.jinja").exists() and is_tuned_to_chat(config)
    snippet = SNIPPETS["chat" if chat else task].format(name=name)
    sections = {
        "Use": f"```python\n{snippet}\n```",
        "Results": result_table(result),
        "Data": data_section(facts["passport"], facts["audit"]),
        "Tokenizer": table(tokenizer_facts(facts["audit"], facts["passport"])),
        "Architecture": table(architecture_facts(model, result)),
        "Training": table(training_facts(config, result)) + curve_table(facts["metrics"], step),
        "Environment": table(environment_facts(facts["passport"], result)),
        "Limitations": limitations(task, base_model(config), metadata.language, chat),
        "Citation": citation(name, facts["passport"]),
    }
    return render_card(
        metadata.to_yaml(), name.split("/")[-1], introduction(task, model, config, result, step), sections
    )


def read_facts(output_dir: Path) -> dict[str, Any]:
    """Return what a run left: configuration, result, audit, public passport, metrics; empty where a file is missing."""
    path = output_dir / "config.yaml"
    config = yaml.safe_load(path.read_text("utf-8")) if path.exists() else {}
    facts = {name: read_json(output_dir / f"{name}.json") or {} for name in ("result", "audit", "passport")}
    metrics = output_dir / "metrics.jsonl"
    lines = metrics.read_text("utf-8").splitlines() if metrics.exists() else []
    return {
        **facts,
        "config": config or {},
        "passport": public_passport(facts["passport"]),
        "metrics": [json.loads(line) for line in lines if line.endswith("}")],
    }


def model_metadata(name: str, task: str, config: dict[str, Any], result: dict[str, Any]) -> ModelCardData:
    """Return the metadata block, with the results as model-index."""
    hub, dataset = config.get("hub", {}), dataset_id(config)
    codes = [config.get("data", {}).get(key) for key in ("source_code", "target_code")]
    where: dict[str, Any] = {"dataset_type": dataset or "text", "dataset_name": dataset or "evaluation text of the run"}
    return ModelCardData(
        model_name=name.split("/")[-1],
        language=hub.get("language") or [code for code in codes if code] or None,
        license=hub.get("license"),
        datasets=[dataset] if dataset else None,
        base_model=base_model(config),
        library_name="transformers",
        pipeline_tag=task,
        tags=["hfkit"],
        eval_results=[
            EvalResult(task_type=task, metric_type=key, metric_name=METRICS[key], metric_value=result[key], **where)
            for key in METRICS
            if is_figure(result.get(key)) and key != "majority_baseline"
        ]
        or None,
    )


def dataset_id(config: dict[str, Any]) -> str | None:
    """Return the Hub id of the training data; None for local files and folders."""
    name = config.get("data", {}).get("dataset")
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def base_model(config: dict[str, Any]) -> str | None:
    """Return the Hub id of the model that training began from; None for a local folder or a model from scratch."""
    name = config.get("model", {}).get("path")
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def is_figure(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def introduction(task: str, model: dict, config: dict, result: dict, step: int | None) -> str:
    """Return one or two sentences that say what this is."""
    size = f"{result['parameters'] / 1e6:.1f} M parameters, " if is_figure(result.get("parameters")) else ""
    kind = task.replace("-", " ")
    started = config.get("model", {}).get("path")
    begun = f"continued from {base_model(config) or 'a local model'}" if started else "trained from scratch"
    text = f"A {model.get('model_type', 'transformers')} model for {kind} ({size}{begun}), made with hfkit."
    return text + (f" This is the checkpoint after {step} steps of the run." if step is not None else "")


def result_table(result: dict[str, Any]) -> str:
    """Return the figures with their 95 % intervals, and the signatures that make them comparable."""
    rows = []
    for key, name in METRICS.items():
        if is_figure(value := result.get(key)):
            low, high = result.get(f"{key}_interval") or (None, None)
            rows.append((name, show(value) + (f" (95 %: {show(low)} to {show(high)})" if is_figure(low) else "")))
    notes = [f"`{result[key]}`" for key in ("bleu_signature", "chrf_signature") if result.get(key)]
    counted = [
        f"{result[key]:,} {key.split('_')[-1]}" for key in ("examples", "eval_tokens", "eval_bytes") if key in result
    ]
    if rows and counted:
        notes.insert(0, "Measured on " + ", ".join(counted) + ".")
    return table(dict(rows)) + "\n" + "\n".join(f"{note}  " for note in notes)


def data_section(passport: dict[str, Any], audit: dict[str, Any]) -> str:
    """Return sources with revisions and hashes, then what cleaning and deduplication removed."""
    documents, removed = audit.get("documents", {}), audit.get("removed", {})
    counts = {f"documents {key}": value for key, value in documents.items()}
    counts |= {f"removed: {rule.replace('_', ' ')}": number for rule, number in removed.items()}
    counts |= {
        f"documents changed: {rule.replace('_', ' ')}": number for rule, number in audit.get("changed", {}).items()
    }
    counts |= {key: audit[key] for key in ("bytes", "tokens", "key") if key in audit}
    facts = {key: value for key, value in passport.get("data", {}).items() if key not in COUNTED or key not in audit}
    hashes = facts.pop("provenance", {})
    for source in facts.get("sources", []):
        source["content hash"] = hashes.pop(source["name"], None)
    if hashes:
        facts["content hash"] = hashes
    return fact_tables(facts) + "\n" + table(counts)


def tokenizer_facts(audit: dict[str, Any], passport: dict[str, Any]) -> dict[str, Any]:
    """Return vocabulary, compression and round-trip proof, and the hash."""
    return {key.replace("_", " "): value for key, value in audit.get("tokenizer", {}).items()} | flatten(
        passport.get("tokenizer", {})
    )


def architecture_facts(model: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return the model's shape."""
    shape = {name.replace("_", " "): model[name] for name in SHAPE if model.get(name) is not None}
    return ({"parameters": result["parameters"]} if "parameters" in result else {}) | shape


def training_facts(config: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return hyperparameters (figures and choices, no names of places) and what they amounted to."""
    outcome = ["steps", "tokens", "seconds", "tokens_per_second", "train_loss"]
    facts: dict[str, Any] = {key: result[key] for key in outcome if key in result}
    if "seed" in config:
        facts["seed"] = config["seed"]
    if "sequence_length" in config.get("data", {}):
        facts["sequence_length"] = config["data"]["sequence_length"]
    skipped = ("eval_every", "save_every", "log_every", "sample_every", "keep_checkpoints")
    for section in ("optim", "train"):
        chosen = {k: v for k, v in config.get(section, {}).items() if v is not None and k not in skipped}
        facts |= {f"{section}.{key}": value for key, value in chosen.items() if not isinstance(value, (dict, list))}
    return facts


def curve_table(lines: list[dict[str, Any]], step: int | None) -> str:
    """Return at most `EVALUATIONS` evaluations of the run, evenly chosen, the last one among them."""
    known = [line for line in lines if is_figure(line.get("eval_loss")) and (step is None or line["step"] <= step)]
    if not known:
        return ""
    every = math.ceil(len(known) / EVALUATIONS)
    names = [
        name
        for name in ("eval_loss", "perplexity", "bits_per_byte", "accuracy", "macro_f1", "bleu")
        if name in known[-1]
    ]
    rows = [[str(line["step"]), *(show(line.get(name, "")) for name in names)] for line in known[::-1][::every][::-1]]
    return "\n" + rows_table(["step", *names], rows)


def environment_facts(passport: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return hardware, processes and versions; energy only where the run measured it."""
    hardware, sessions = passport.get("hardware", {}), passport.get("sessions") or [{}]
    facts = {
        "processor": hardware.get("cpu"),
        "cores": hardware.get("cores"),
        "GPUs": ", ".join(hardware.get("gpus") or []) or None,
        "processes": sessions[-1].get("num_processes"),
        "sessions": len(sessions) if len(sessions) > 1 else None,
        "energy (kWh)": result.get("energy_kwh"),
        "hfkit commit": passport.get("commit"),
        **passport.get("versions", {}),
    }
    return {name: value for name, value in facts.items() if value is not None}


def limitations(task: str, base: str | None, language: Any, chat: bool) -> str:
    """Return what follows from how the model was made and what the run did not examine."""
    about = f" ({language if isinstance(language, str) else ', '.join(language)})" if language else ""
    known = f"the data of {base} and of this run" if base else "the data named above"
    lines = [
        f"It knows only what is in {known}{about}, and repeats the errors and biases in there.",
        "The figures above hold for the evaluated text; other kinds of text were not measured.",
        "The run measured neither bias, toxicity and truthfulness nor whether training text can be extracted.",
    ]
    if task == "text-generation" and not chat and base is None:
        lines.append("It continues text; it was not trained to follow instructions or to hold a conversation.")
    return "\n".join(f"- {line}" for line in lines)


def citation(name: str, passport: dict[str, Any]) -> str:
    """Return a BibTeX entry made of the run's own facts."""
    started = str((passport.get("sessions") or [{}])[0].get("started", ""))
    year = f"  year = {{{started[:4]}}},\n" if re.match(r"\d{4}", started) else ""
    version = passport.get("versions", {}).get("hfkit")
    made = f"Made with hfkit {version}" if version else "Made with hfkit"
    key = re.sub(r"[^A-Za-z0-9]+", "-", name)
    return f"```bibtex\n@misc{{{key},\n  title = {{{name}}},\n{year}  note = {{{made}}}\n}}\n```"
