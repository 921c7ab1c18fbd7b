"""The card says what the run's files say, in metadata that the Hub takes, and its snippet runs."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard, ModelCard, ModelCardData
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
)

from hfkit.card import render_model_card, write_model_card
from hfkit.dataset_card import rules_in_force, write_dataset_card
from hfkit.files import write_json
from hfkit.publisher import publish_run
from hfkit.remote import check_access
from hfkit.settings import HubConfig
from hub_runs import quick  # noqa: F401
from local_hub import WRITE, LocalHub, hub_of_this_process  # noqa: F401

ROOT = Path(__file__).parents[1]
RESULT = {
    "parameters": 3360,
    "tokens": 51200,
    "steps": 100,
    "seconds": 12.5,
    "eval_loss": 1.25,
    "perplexity": math.exp(1.25),
    "bits_per_byte": 0.9,
    "eval_tokens": 5000,
    "eval_bytes": 10017,
    "energy_kwh": 0.002,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished pretraining run with everything that a card may use, and everything that it must not show."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    run = tmp_path / "runs-of-ada" / "first"
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(run / "model")
    vocabulary = {chr(32 + number): number for number in range(64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=" ").save_pretrained(run / "model")
    (run / "config.yaml").write_text(
        f"data: {{train_files: {run}/corpus.txt, dataset: null, sequence_length: 32}}\n"
        "model: {preset: tiny, path: null}\noptim: {name: adamw, learning_rate: 0.001}\n"
        "train: {max_steps: 100, global_batch_size: 16, epochs: null}\nseed: 7\n"
        "hub: {repo_id: me/small-model, license: mit, language: en}\n"
    )
    write_json(run / "result.json", RESULT)
    write_json(
        run / "audit.json",
        {
            "documents": {"read": 1234, "kept": 1200},
            "removed": {"exact_duplicates": 30, "near_duplicates": 4, "contaminated": 0},
            "tokens": 4321,
            "tokenizer": {"vocab_size": 64, "bytes_per_token": 1.5, "round_trip_failures": 0},
            "splits": {"train": {"documents": 1100}},
            "key": "abcd",
        },
    )
    write_json(
        run / "passport.json",
        {
            "command": ["pretrain.py", "--data.train_files", f"{run}/corpus.txt", "--token", WRITE],
            "data": {
                "key": "abcd",
                "files": [{"path": f"{run}/corpus.txt", "sha256": "f" * 64}],
                "sources": [{"name": "books", "documents": 1100, "bytes": 9000}, {"name": "web", "documents": 100}],
                "splits": {"train": {"documents": 1100}},
                "provenance": {"books": "b" * 64, "web": "c" * 64, "validation": "d" * 64},
            },
            "tokenizer": {"sha256": "e" * 64},
            "versions": {"python": "3.11.9", "hfkit": "0.1.0"},
            "hardware": {"cpu": "Some Processor", "cores": 2, "gpus": []},
            "sessions": [{"started": "2026-05-04T03:02:01+00:00", "host": "adas-machine", "num_processes": 2}],
        },
    )
    lines: list[dict[str, Any]] = [{"step": step, "eval_loss": 3 - step / 50} for step in range(1, 101)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 101, "eval_l')
    return run


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def model_data(text: str) -> ModelCardData:
    """Return the metadata as the client reads it."""
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    return data


def test_metadata_holds_the_results(run: Path) -> None:
    text = write_model_card(run)
    assert (run / "model" / "README.md").read_text() == text
    data = model_data(text)
    assert (data.license, data.language, data.tags, data.library_name) == ("mit", "en", ["hfkit"], "transformers")
    assert (data.pipeline_tag, data.base_model, data.datasets) == ("text-generation", None, None)
    figures = {result.metric_type: result.metric_value for result in data.eval_results or []}
    assert figures == {name: RESULT[name] for name in ("eval_loss", "perplexity", "bits_per_byte")}


def test_client_and_hub_accept_the_card(hub: LocalHub, run: Path) -> None:
    ModelCard(write_model_card(run)).validate()
    write_dataset_card(run)
    DatasetCard.load(run / "README.md").validate()
    publish_run(HubConfig(repo_id="me/small-model"), run)
    assert hub.files("me/small-model")["README.md"].decode() == (run / "model" / "README.md").read_text()


def test_sections_state_the_facts(run: Path) -> None:
    text = write_model_card(run)
    assert "| Perplexity per token | 3.49 |" in section(text, "Results")
    assert "5,000 tokens, 10,017 bytes" in section(text, "Results")
    for line in (
        f"| 1 | corpus.txt | {'f' * 64} |",
        "| documents kept | 1,200 |",
        "| removed: exact duplicates | 30 |",
        "| source | name | documents | bytes | content hash |",
        f"| 1 | books | 1,100 | 9,000 | {'b' * 64} |",
        f"| 2 | web | 100 |  | {'c' * 64} |",
        "| train | 1,100 |",
        f"| content hash.validation | {'d' * 64} |",
        "| key | abcd |",
    ):
        assert line in section(text, "Data")
    assert "| file | path | sha256 |" in section(text, "Data")
    assert "| bytes per token | 1.5 |" in section(text, "Tokenizer")
    assert "| num hidden layers | 1 |" in section(text, "Architecture")
    for line in (
        "| seed | 7 |",
        "| peak learning rate | 0.001 |",
        "| batch (sequences) | 16 |",
        "| steps | 100 |",
        "| training time | 12 s |",
        "| optimizer | adamw |",
    ):
        assert line in section(text, "Training")
    assert "| energy, as the devices report it (kWh) | 0.002 |" in section(text, "Environment")
    assert "not trained to follow instructions" in section(text, "Limitations")
    assert "year = {2026}" in section(text, "Citation") and "title = {me/small-model}" in section(text, "Citation")
    assert "author = {me}" in section(text, "Citation")
    assert "python recipes/pretrain.py --data.train_files corpus.txt --token '***'" in section(text, "Repeating it")
    assert "Nothing longer than 32 tokens" in section(text, "Limitations")
    assert "None" not in text and "epochs" not in text and "muon" not in text


def test_curve_ends_with_the_last_evaluation(run: Path) -> None:
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \|$", section(render_model_card(run, run / "model"), "Training"), re.M)
    assert (len(rows), rows[-1]) == (12, ("100", "1"))
    early = section(render_model_card(run, run / "model", step=20), "Training")
    assert re.findall(r"^\| (\d+) \| ([\d.]+) \|$", early, re.M)[-1] == ("20", "2.6")


def test_card_of_a_checkpoint_claims_no_results(run: Path) -> None:
    text = render_model_card(run, run / "model", step=50)
    assert "checkpoint after 50 steps" in text and "## Results" not in text and "model-index" not in text


def test_nothing_private(run: Path) -> None:
    for text in (write_model_card(run), write_dataset_card(run)):
        for secret in (WRITE, str(run), "runs-of-ada", "adas-machine", str(Path.home()) + "/"):
            assert secret not in text, secret


def test_intervals_signatures_base_model_and_languages(run: Path) -> None:
    config = "data: {dataset: ada/pairs, test_split: test, source_key: de, source_code: de, target_code: en}\n"
    config += "model: {path: ada/base}\n"
    passport = json.loads((run / "passport.json").read_text())
    passport["data"]["datasets"] = [{"id": "ada/pairs", "configuration": None, "split": "train", "revision": "c" * 40}]
    write_json(run / "passport.json", passport | {"model": {"id": "ada/base", "revision": "b" * 40}})
    (run / "config.yaml").write_text(config)
    scores = {
        "bleu": 31.5,
        "bleu_interval": [30.0, 33.0],
        "bleu_signature": "nrefs:1|case:mixed",
        "perplexity": math.inf,
    }
    write_json(run / "result.json", {**scores, "perplexity": math.inf, "examples": 1000, "evaluated_on": "test"})
    model = json.loads((run / "model" / "config.json").read_text())
    write_json(run / "model" / "config.json", model | {"architectures": ["MarianMTModel"], "is_encoder_decoder": True})
    text = write_model_card(run, "me/translator")
    data = model_data(text)
    assert (data.language, data.base_model, data.datasets) == (["de", "en"], "ada/base", ["ada/pairs"])
    (entry,) = data.eval_results or []
    assert (entry.metric_type, entry.dataset_type, entry.dataset_split) == ("bleu", "ada/pairs", "test")
    assert entry.dataset_revision == "c" * 40 and f"| 1 | ada/pairs |  | train | {'c' * 40} |" in section(text, "Data")
    assert "Measured on the test split: 1,000 examples." in section(text, "Results")
    assert "| BLEU | 31.5 (95 %: 30 to 33) |" in text and "`nrefs:1|case:mixed`" in text
    assert "AutoModelForSeq2SeqLM" in section(text, "Use") and f"continued from ada/base at commit {'b' * 40}" in text


def test_a_bare_model_folder_gets_a_card(run: Path, tmp_path: Path) -> None:
    text = render_model_card(tmp_path, run / "model", "me/bare")
    ModelCard(text)
    assert "## Architecture" in text and not any(f"## {name}" in text for name in ("Results", "Data", "Training"))


def test_dataset_card(run: Path) -> None:
    text = write_dataset_card(run, "me/corpus")
    data = DatasetCard(text).data.to_dict()
    assert (data["pretty_name"], data["license"], data["tags"]) == ("corpus", "mit", ["hfkit"])
    assert data["size_categories"] == ["1K<n<10K"]
    assert "A corpus of 1,200 documents" in text and "| train | 1,100 |" in text
    assert 'load_dataset("me/corpus")' in section(text, "Use")
    assert "url = {https://huggingface.co/datasets/me/corpus}" in section(text, "Citation")
    assert "personal data were neither searched for nor removed" in section(text, "Limitations")


def test_rules_of_a_dataset_card() -> None:
    clean = {"enabled": True, "nfc": True, "whitespace": False, "min_characters": 20, "max_digit_share": 1.0}
    data = {"clean": clean, "dedup": {"exact": True, "threshold": 0.8}, "decontaminate": False}
    shown = {"clean.nfc": True, "clean.min characters": 20, "dedup.exact": True, "dedup.threshold": 0.8}
    assert rules_in_force(data) == shown
    off = {**data, "clean": {**clean, "enabled": False}}
    assert rules_in_force(off) == {"dedup.exact": True, "dedup.threshold": 0.8}


@pytest.mark.parametrize("chat", [False, True])
def test_snippet_runs(hub: LocalHub, run: Path, capsys: pytest.CaptureFixture[str], chat: bool) -> None:
    # The tokenizer of a pretrained model has a template already; only training on conversations makes it one for chat.
    (run / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    if chat:
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("dataset: null", "messages_column: messages"))
    check_access(HubConfig(repo_id="me/small-model"))
    publish_run(HubConfig(repo_id="me/small-model"), run)
    card = hub.files("me/small-model")["README.md"].decode()
    snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippet) == 1 and ("apply_chat_template" in snippet[0]) == chat
    exec(snippet[0], {})  # the client of this process is led to the local Hub, as a reader's is to the real one
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("kind", ["seq2seq", "causal", "classifier"])
def test_snippets_of_other_tasks_run(run: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    folder = run / "model"
    facts = {"prefix": "TO GERMAN: ", "prompt": "ENGLISH: {source} GERMAN:", "languages": []}
    facts |= {"kind": kind, "source_code": "en", "target_code": "de"}
    shape: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 0}
    if kind == "seq2seq":
        layers = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_start_token_id": 0}
        MarianMTModel(MarianConfig(**shape, **layers, **sizes)).save_pretrained(folder)
    elif kind == "classifier":
        labels = {"id2label": {0: "sad", 1: "glad"}, "label2id": {"sad": 0, "glad": 1}}
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForSequenceClassification(LlamaConfig(**shape, **sizes, **labels)).save_pretrained(folder)
    if kind != "classifier":
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", config | {"translation": facts})
    text = render_model_card(run, folder, str(folder))
    task = "text-classification" if kind == "classifier" else "translation"
    assert model_data(text).pipeline_tag == task
    assert ("| classes | sad, glad |" in text) == (kind == "classifier")
    assert ("for translation from en to de" in text) == (kind != "classifier")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert {"seq2seq": '"TO GERMAN: A s', "causal": '"ENGLISH: A s', "classifier": "pipeline"}[kind] in snippet
    exec(snippet, {})
    out = capsys.readouterr().out.strip()
    assert kind != "classifier" or re.search(r"'label': '(sad|glad)'", out)


def test_curve_tells_tokens_and_training_loss(run: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "loss": 3.5, "tokens": 64},
        {"step": 2, "eval_loss": 3.0, "perplexity": 20.1},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = section(render_model_card(run, run / "model"), "Training")
    assert "| step | tokens | training loss | validation loss | perplexity |" in training
    assert "| 2 | 64 | 3.5 | 3 | 20.1 |" in training


def push(hub: LocalHub, home: Path, *flags: str, token: str | None = WRITE) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    environment |= {**hub.environment(token), "HF_HOME": str(home)}
    command = [sys.executable, "recipes/push.py", *flags]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_push_recipe(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    flags = ["--model.path", str(run), "--hub.repo_id", "me/other-name"]
    hub.fail("commit", 403, times=None)
    failed = push(hub, tmp_path / "home", *flags)
    assert (failed.returncode, failed.stdout) == (4, "")
    command = failed.stderr.strip().splitlines()[-1].removeprefix("to finish the push: python recipes/push.py ")
    hub.heal()
    done = push(hub, tmp_path / "home", *shlex.split(command))  # the command that it printed
    assert (done.returncode, done.stdout) == (0, f"{hub.url}/me/other-name\n"), done.stderr
    files = hub.files("me/other-name")
    assert files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert 'from_pretrained("me/other-name")' in files["README.md"].decode()


@pytest.mark.parametrize(
    ("flags", "token", "message"),
    [
        (["--hub.repo_id", "me/x"], WRITE, "--model.path must be the folder"),
        (["--model.path", "RUN"], WRITE, "--hub.repo_id is missing"),
        (["--model.path", "RUN", "--hub.repo_id", "x"], WRITE, "name/model"),
        (["--model.path", "RUN", "--hub.repo_id", "me/x"], "hf_not_a_token", "refuses the token"),
        (["--model.path", "RUN", "--hub.repo_id", "me/x"], None, "needs a Hub token"),
    ],
)
def test_push_recipe_refuses(
    hub: LocalHub, run: Path, tmp_path: Path, flags: list[str], token: str | None, message: str
) -> None:
    done = push(hub, tmp_path / "home", *[flag.replace("RUN", str(run)) for flag in flags], token=token)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and message in line
