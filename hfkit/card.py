"""The card of a model, written from the files that the run left, and from nothing else.

A section whose facts are missing is left out. What the public passport hides (paths, users, hosts, credentials) is not
read from anywhere else either: of the configuration, only figures and names go into the card.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from hfkit.files import read_json, write_atomic
from hfkit.markdown import render_card, table
from hfkit.passport import public_passport
from hfkit.sections import (
    METRICS,
    architecture_facts,
    command_section,
    curve_section,
    data_section,
    environment_facts,
    is_figure,
    metric_name,
    result_section,
    tokenizer_facts,
    training_facts,
)
from hfkit.usage import find_task, is_tuned_to_chat, usage

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w][\w.-]*", re.ASCII)


def write_model_card(output_dir: Path, repo_id: str | None = None, said: dict[str, Any] | None = None) -> str:
    """Write ``model/README.md`` of a finished run, and return its text; arguments as of ``render_model_card``."""
    text = render_model_card(output_dir, output_dir / "model", repo_id, said=said)
    write_atomic(output_dir / "model" / "README.md", text)
    return text


def render_model_card(
    output_dir: Path,
    model_dir: Path,
    repo_id: str | None = None,
    step: int | None = None,
    said: dict[str, Any] | None = None,
) -> str:
    """Return the card of a model as Markdown.

    Args:
        repo_id: Where it will be; None takes the configuration's, or else the folder `model`.
        step: Step of a checkpoint of a run; None is the finished model, and only then are there results.
        said: `license` and `language` in place of the configuration's; what is None here stays.
    """
    facts = read_facts(output_dir)
    config, passport, audit = facts["config"], facts["passport"], facts["audit"]
    config["hub"] = config.get("hub", {}) | {key: value for key, value in (said or {}).items() if value is not None}
    model = read_json(model_dir / "config.json") or {}
    result = facts["result"] if step is None else {}
    name = repo_id or config["hub"].get("repo_id") or "model"
    task = find_task(model)
    metadata = model_metadata(name, task, config, result, passport)
    chat = task == "text-generation" and (model_dir / "chat_template.jinja").exists() and is_tuned_to_chat(config)
    sections = {
        "Use": f"```python\n{usage(name, 'chat' if chat else task, model)}\n```",
        "Results": result_section(result),
        "Data": data_section(passport.get("data", {}), audit),
        "Tokenizer": table(tokenizer_facts(audit, passport)),
        "Architecture": table(architecture_facts(model, result)),
        "Training": table(training_facts(config, result)) + curve_section(facts["metrics"], step),
        "Environment": table(environment_facts(passport, result)),
        "Repeating it": command_section(passport),
        "Limitations": limitations(task, config, metadata.language, chat),
        "Citation": citation(name, passport),
    }
    title, start = name.split("/")[-1], introduction(task, model, config, result, passport, step)
    return render_card(metadata.to_yaml(), title, start, sections)


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


def model_metadata(
    name: str, task: str, config: dict[str, Any], result: dict[str, Any], passport: dict[str, Any]
) -> ModelCardData:
    """Return the metadata block, with the results as model-index."""
    hub, data = config.get("hub", {}), config.get("data", {})
    codes = [data.get(key) for key in ("source_code", "target_code")]
    return ModelCardData(
        model_name=name.split("/")[-1],
        language=hub.get("language") or [code for code in codes if code] or None,
        license=hub.get("license"),
        datasets=dataset_ids(config) or None,
        base_model=base_model(config),
        library_name="transformers",
        pipeline_tag=task,
        tags=["hfkit"],
        eval_results=[
            EvalResult(
                task_type=task,
                metric_type=key,
                metric_name=metric_name(key, result),
                metric_value=result[key],
                **evaluated(config, result, passport),
            )
            for key in METRICS
            if is_figure(result.get(key)) and key != "majority_baseline"
        ]
        or None,
    )


def evaluated(config: dict[str, Any], result: dict[str, Any], passport: dict[str, Any]) -> dict[str, Any]:
    """Return what the results were measured on, in the words of `model-index`: a dataset of the Hub where it is one."""
    data = config.get("data", {})
    split = result.get("evaluated_on", "validation")
    if data.get(f"{split}_files") or data.get("dataset") not in dataset_ids(config):
        return {"dataset_type": "text", "dataset_name": "evaluation text of the run", "dataset_split": split}
    commits = {facts["id"]: facts["revision"] for facts in passport.get("data", {}).get("datasets", [])}
    trained = str(data.get("split"))
    source = trained if split == "train" else data.get(f"{split}_split") or f"{trained} (held out)"
    name = data["dataset"]
    where = {"dataset_type": name, "dataset_name": name, "dataset_split": source, "dataset_revision": commits.get(name)}
    return where | {"dataset_config": data.get("dataset_config")}


def dataset_ids(config: dict[str, Any]) -> list[str]:
    """Return the Hub ids of the training data; local files and folders have none."""
    data = config.get("data", {})
    names = [data.get("dataset"), *(source.get("dataset") for source in data.get("sources") or [])]
    return list(dict.fromkeys(name for name in names if is_hub_id(name)))


def base_model(config: dict[str, Any]) -> str | None:
    """Return the Hub id of the model that training began from; None for a local folder or a model from scratch."""
    name = config.get("model", {}).get("path")
    return name if is_hub_id(name) else None


def is_hub_id(name: Any) -> bool:
    """Return whether a setting names something on the Hub and not a place on this machine."""
    return isinstance(name, str) and HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def introduction(task: str, model: dict, config: dict, result: dict, passport: dict, step: int | None) -> str:
    """Return one or two sentences that say what this is."""
    size = f"{result['parameters'] / 1e6:.1f} M parameters, " if is_figure(result.get("parameters")) else ""
    kind = task.replace("-", " ")
    if task == "translation" and (facts := model.get("translation")):
        kind += f" from {facts['source_code']} to {facts['target_code']}"
    begun = "trained from scratch"
    if config.get("model", {}).get("path"):
        commit = passport.get("model", {}).get("revision")
        begun = f"continued from {base_model(config) or 'a local model'}" + (f" at commit {commit}" if commit else "")
    text = f"A {model.get('model_type', 'transformers')} model for {kind} ({size}{begun}), made with hfkit."
    return text + (f" This is the checkpoint after {step} steps of the run." if step is not None else "")


def limitations(task: str, config: dict[str, Any], language: Any, chat: bool) -> str:
    """Return what follows from how the model was made and what the run did not examine."""
    base, length = base_model(config), config.get("data", {}).get("sequence_length")
    about = f" ({language if isinstance(language, str) else ', '.join(language)})" if language else ""
    known = f"the data of {base} and of this run" if base else "the data named above"
    lines = [
        f"It knows only what is in {known}{about}, and repeats the errors and biases in there.",
        "The figures above hold for the evaluated text; other kinds of text were not measured.",
        "The run measured neither bias, toxicity and truthfulness nor whether training text can be extracted.",
    ]
    if length:
        lines.append(f"Nothing longer than {length:,} tokens was trained on or evaluated.")
    if task == "text-generation" and not chat and base is None:
        lines.append("It continues text; it was not trained to follow instructions or to hold a conversation.")
    return "\n".join(f"- {line}" for line in lines)


def citation(name: str, passport: dict[str, Any], kind: str = "") -> str:
    """Return a BibTeX entry made of the run's own facts; ``kind`` stands before the name in an address of the Hub."""
    started = str((passport.get("sessions") or [{}])[0].get("started", ""))
    version = passport.get("versions", {}).get("hfkit")
    owner, slash, _ = name.partition("/")
    fields = {
        "title": name,
        "author": owner if slash else None,
        "year": started[:4] if re.match(r"\d{4}", started) else None,
        "url": f"https://huggingface.co/{kind}{name}" if slash else None,
        "note": f"Made with hfkit {version}" if version else "Made with hfkit",
    }
    key = re.sub(r"[^A-Za-z0-9]+", "-", name)
    lines = [f"  {field} = {{{value}}}" for field, value in fields.items() if value]
    return "```bibtex\n@misc{{{},\n{}\n}}\n```".format(key, ",\n".join(lines))
