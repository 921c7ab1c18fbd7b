"""Benchmarks of lm-eval on a model folder: the figures, found again by hand, and what is said when it cannot run."""

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfkit.settings import BadInput, ModelConfig, TokenizerConfig
from hfkit.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
QUESTIONS = [
    {"question": f"{number} and {number} is", "choices": [str(2 * number), str(number + 3), "none"], "answer": 0}
    for number in range(12)
]
TASK = """
task: doubling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def run_score(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "recipes/score.py", *words], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer([row["question"] for row in QUESTIONS], TokenizerConfig(vocab_size=280))
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_a_task_of_ones_own_gives_the_accuracy_found_by_hand(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "doubling.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "doubling.yaml").write_text(TASK.format(tmp_path / "doubling.jsonl"))
    words = ("--model.path", str(folder), "--output_dir", str(tmp_path / "out"))
    done = run_score(*words, "--tasks", str(tmp_path / "doubling.yaml"))
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "out/result.json").read_text())["tasks"]["doubling"]
    right = sum(best_choice(folder, row) == row["answer"] for row in QUESTIONS)
    assert 0 < right < len(QUESTIONS)
    assert scores["acc"] == right / len(QUESTIONS) and scores["examples"] == len(QUESTIONS)
    assert scores["acc_stderr"] > 0

    for task in ("no_such_task", str(tmp_path / "no_such_file.yaml")):
        refused = run_score(*words, "--tasks", task)
        assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith("error: tasks: ")


def best_choice(folder: Path, row: dict) -> int:
    """The choice that the model finds most probable after the question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    question = tokenizer(row["question"])["input_ids"]
    nats = []
    for choice in row["choices"]:
        ids = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
        nats.append(float(log_probs[len(question) - 1 :].sum()))
    return nats.index(max(nats))


def test_tasks_without_lm_eval_or_on_several_processes_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    score = importlib.import_module("score")
    monkeypatch.setattr(score, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'hfkit\[eval\]'"):
        score.ScoreConfig(model=ModelConfig(path="nowhere"), tasks="arc_easy")
    monkeypatch.setattr(score, "find_spec", lambda name: object())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="one process"):
        score.ScoreConfig(model=ModelConfig(path="nowhere"), tasks="arc_easy")
