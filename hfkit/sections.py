"""The sections of a card: what a run's files say, as tables and sentences; empty where the facts are missing."""

import math
import re
import shlex
from typing import Any

from hfkit.markdown import fact_tables, flatten, rows_table, show, table

EVALUATIONS = 12  # rows of the training table
# Result's field → name and unit, in the order of their importance.
METRICS = {
    "bleu": "BLEU",
    "chrf": "chrF2++",
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "mcc": "Matthews correlation",
    "majority_baseline": "Majority baseline (accuracy)",
    "expected_calibration_error": "Expected calibration error",
    "bits_per_byte": "Bits per byte",
    "perplexity": "Perplexity per token",
    "eval_loss": "Loss (nats per target token)",
    "end_token_loss": "Loss at the end of a turn (nats)",
    "ended_share": "Share of outputs that end by themselves",
}
COUNTS = ("examples", "eval_pairs", "eval_tokens", "eval_bytes")
SHAPE = (
    *("model_type", "num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"),
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "encoder_ffn_dim", "d_ff"),
    *("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "num_key_value_heads", "vocab_size"),
    *("max_position_embeddings", "n_positions", "tie_word_embeddings", "dtype"),
)
# Settings that say how often somebody looked, or nothing of the result.
UNSAID = (
    "eval_every",
    "save_every",
    "log_every",
    "sample_every",
    "keep_checkpoints",
    "max_skipped_steps",
    "compile",
    "micro_batch_size",
)
SAID_AS = {
    "name": "optimizer",
    "learning_rate": "peak learning rate",
    "global_batch_size": "batch (sequences)",
    "global_batch_tokens": "batch (tokens)",
    "max_steps": "steps asked for",
    "max_grad_norm": "gradients clipped at norm",
    "min_learning_rate_share": "final learning rate (share of the peak)",
}


COUNTED = {"documents": "documents", "removed": "removed:", "changed": "changed:"}  # facts of the data, by rule
TOTALS = ("cut_at_a_turn", "bytes", "tokens", "key")
ONE_OF = {"splits": "split", "sources": "source", "datasets": "dataset", "files": "file"}


def is_figure(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def metric_name(key: str, result: dict[str, Any]) -> str:
    """Return what a figure of a result is called."""
    if key == "accuracy" and "margin" in result:
        return "Pairs whose chosen answer gained more (share)"
    return "Loss (nats per text)" if key == "eval_loss" and "accuracy" in result else METRICS[key]


def result_section(result: dict[str, Any]) -> str:
    """Return the figures with their 95 % intervals, what they were measured on, and what makes them comparable."""
    rows = {}
    for key in METRICS:
        if is_figure(value := result.get(key)):
            low, high = result.get(f"{key}_interval") or (None, None)
            interval = f" (95 %: {show(low)} to {show(high)})" if is_figure(low) else ""
            rows[metric_name(key, result)] = show(value) + interval
    if not rows:
        return ""
    notes = [f"`{result[key]}`" for key in ("bleu_signature", "chrf_signature") if result.get(key)]
    if counted := [f"{result[key]:,} {key.split('_')[-1]}" for key in COUNTS if key in result]:
        split = f"the {result['evaluated_on']} split: " if "evaluated_on" in result else ""
        notes.insert(0, f"Measured on {split}{', '.join(counted)}.")
    if result.get("averaged_steps"):
        notes.append(f"The weights are the mean of those after steps {', '.join(map(str, result['averaged_steps']))}.")
    elif result.get("best_step") is not None:
        notes.append(f"The weights are those after step {result['best_step']}, the best on the validation text.")
    classes = result.get("per_class") or {}
    names = list(next(iter(classes.values()), {}))
    lines = [[label, *(show(figures[name]) for name in names)] for label, figures in classes.items()]
    parts = [
        table(rows),
        "\n".join(f"{note}  " for note in notes),
        rows_table(["class", *names], lines) if lines else "",
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part)


def data_section(data: dict[str, Any], audit: dict[str, Any]) -> str:
    """Return sources with revisions and hashes, then what cleaning and deduplication removed.

    Args:
        data: What the public passport says of the data.
        audit: Of prepared text; it repeats some of that.
    """
    known = data | {name: audit[name] for name in (*COUNTED, *TOTALS) if name in audit}
    counts = {
        f"{what} {name.replace('_', ' ')}": number
        for key, what in COUNTED.items()
        for name, number in known.pop(key, {}).items()
    }
    counts |= {name.replace("_", " "): known.pop(name) for name in TOTALS if name in known}
    hashes = dict(known.pop("provenance", {}))
    known.pop("label_names", None)  # they are part of the architecture
    known["sources"] = [
        {name: value for name, value in source.items() if not isinstance(value, dict)}
        | {"content hash": hashes.pop(source["name"], None)}
        for source in known.pop("sources", [])
    ]
    known["content hash"] = hashes
    tables = fact_tables({ONE_OF.get(name, name): value for name, value in known.items() if value})
    return "\n".join(part for part in (tables, table(counts)) if part.strip())


def tokenizer_facts(audit: dict[str, Any], passport: dict[str, Any]) -> dict[str, Any]:
    """Return vocabulary, compression and round-trip proof, and the hash."""
    known = flatten(passport.get("tokenizer", {})) | audit.get("tokenizer", {})
    return {key.replace("_", " "): value for key, value in known.items()}


def architecture_facts(model: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return the model's shape, and the classes that it tells apart."""
    facts = {name.replace("_", " "): model[name] for name in SHAPE if model.get(name) is not None}
    if (model.get("architectures") or [""])[0].endswith("ForSequenceClassification") and model.get("id2label"):
        facts["classes"] = ", ".join(map(str, model["id2label"].values()))
    return ({"parameters": result["parameters"]} if "parameters" in result else {}) | facts


def training_facts(config: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return what the run amounted to, and the settings that had a part in it (no names of places)."""
    facts: dict[str, Any] = {name: result[name] for name in ("steps", "tokens") if name in result}
    if is_figure(result.get("seconds")):
        facts["training time"] = duration(result["seconds"])
    facts |= {name: result[name] for name in ("tokens_per_second", "train_loss") if is_figure(result.get(name))}
    facts |= {"seed": config["seed"]} if "seed" in config else {}
    data, optim, train = (dict(config.get(name) or {}) for name in ("data", "optim", "train"))
    if "sequence_length" in data:
        facts["tokens of a row"] = data["sequence_length"]
    idle = {
        "muon_learning_rate": optim.get("name") != "muon",
        "decay_share": optim.get("schedule") != "wsd",
        "min_learning_rate_share": optim.get("schedule") not in ("cosine", "linear"),
        "global_batch_size": train.get("global_batch_tokens") is not None,
        "precision": train.get("precision") == "auto",
    }
    chosen = {name: value for name, value in (optim | train).items() if name not in UNSAID and not idle.get(name)}
    if stages := train.get("batch_stages"):
        chosen["smaller steps at the start"] = ", ".join(f"{steps} of {size} sequences" for steps, size in stages)
    if (config.get("adapter") or {}).get("rank"):
        chosen |= {f"LoRA {name}": value for name, value in config["adapter"].items()}
    plain = {name: value for name, value in chosen.items() if value is not None and not isinstance(value, (dict, list))}
    return {name.replace("_", " "): value for name, value in facts.items()} | {
        SAID_AS.get(name, name.replace("_", " ")): value for name, value in plain.items()
    }


def duration(seconds: float) -> str:
    """Return a time as people say it.

    Example:
        >>> [duration(value) for value in (0.72, 75, 7265)]
        ['1 s', '1 min 15 s', '2 h 1 min']
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def curve_section(lines: list[dict[str, Any]], step: int | None) -> str:
    """Return at most `EVALUATIONS` evaluations of the run, evenly chosen, the last one among them.

    Args:
        lines: Of metrics.jsonl; each evaluation gets tokens and loss of the training line before it.
        step: The last one that counts; None is the end.
    """
    rows, trained = [], {}
    for line in lines:
        if step is not None and line["step"] > step:
            continue
        if "loss" in line:
            trained = {"tokens": line.get("tokens"), "training loss": line["loss"]}
        if is_figure(line.get("eval_loss")):
            rows.append({"step": line["step"], **trained, **line})
    if not rows:
        return ""
    names = ["step", "tokens", "training loss", "eval_loss", "perplexity", "bits_per_byte", "accuracy", "macro_f1"]
    columns = [name for name in names if rows[-1].get(name) is not None]
    every = math.ceil(len(rows) / EVALUATIONS)
    shown = [[show(row.get(name, "")) for name in columns] for row in rows[::-1][::every][::-1]]
    header = [{"eval_loss": "validation loss"}.get(name, name.replace("_", " ")) for name in columns]
    return "\n" + rows_table(header, shown)


def environment_facts(passport: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return hardware, processes and versions; energy only where the run measured it."""
    hardware, sessions = passport.get("hardware", {}), passport.get("sessions") or [{}]
    facts = {
        "processor": hardware.get("cpu"),
        "cores": hardware.get("cores"),
        "GPUs": ", ".join(hardware.get("gpus") or []) or None,
        "processes": sessions[-1].get("num_processes"),
        "sessions": len(sessions) if len(sessions) > 1 else None,
        "energy, as the devices report it (kWh)": result.get("energy_kwh"),
        "hfkit commit": passport.get("commit"),
        **passport.get("versions", {}),
    }
    return {name: value for name, value in facts.items() if value is not None}


def command_section(passport: dict[str, Any]) -> str:
    """Return the command of the run, with files by their names; their hashes are in the passport."""
    words = [re.sub(r" \(sha256 [0-9a-f]+\)", "", word) for word in passport.get("command") or []]
    if not words:
        return ""
    note = "The command of the run; of files, only the names are shown, and `passport.json` has their hashes."
    recipe = f"recipes/{words[0].rsplit('/', 1)[-1]}"
    return f"{note}\n\n```bash\npython {shlex.join([recipe, *words[1:]])}\n```"
