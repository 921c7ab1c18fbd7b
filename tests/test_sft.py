"""Fine-tuning end to end: what the result holds, that the saved model ends its turns, and resumes exactly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hfkit.adapters import add_embedding_noise
from hfkit.losses import CausalLMLoss
from hfkit.tokenizer import END_OF_TURN

ROOT = Path(__file__).parent.parent
TOY = (
    "--data.sequence_length 64 --tokenizer.vocab_size 400 --train.global_batch_size 4 --generation.max_new_tokens 8 "
    '--model.config_overrides {"hidden_size":32,"num_hidden_layers":1,"intermediate_size":64} --train.eval_every 0 '
    "--optim.schedule constant"
).split()


def run_sft(output: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "recipes/sft.py", *TOY, "--output_dir", str(output), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sft")
    done = run_sft(output, "--train.max_steps", "6", "--train.save_every", "3", "--neftune_alpha", "5")
    assert done.returncode == 0, done.stderr
    assert "in use" in done.stderr
    return output


def test_result_has_the_loss_before_and_after(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["step"] == 0)
    assert result["eval_loss"] < first["eval_loss"] and result["end_token_loss"] < first["end_token_loss"]
    assert 0 <= result["ended_share"] <= 1 and result["eval_tokens"] > 0


def test_saved_model_ends_turns_and_carries_the_template(finished: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    ends = [tokenizer.convert_tokens_to_ids(END_OF_TURN), tokenizer.eos_token_id]
    assert model.generation_config.eos_token_id == ends
    assert (model.generation_config.do_sample, model.generation_config.temperature) == (True, 0.8)  # as it was drawn
    assert "{% generation %}" in tokenizer.chat_template


def test_resumed_run_matches_uninterrupted_run(finished: Path, tmp_path: Path) -> None:
    words = ("--train.save_every", "3", "--neftune_alpha", "5")
    assert run_sft(tmp_path, "--train.max_steps", "3", *words).returncode == 0
    assert run_sft(tmp_path, "--train.max_steps", "6", *words).returncode == 0
    ours, whole = ((folder / "model/model.safetensors").read_bytes() for folder in (tmp_path, finished))
    assert ours == whole


@pytest.mark.slow
def test_quantized_lora_resumes_exactly_and_leaves_a_plain_model(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    words = "--adapter.rank 4 --adapter.quantize int8 --train.save_every 3 --optim.learning_rate 1e-2 --train.max_steps"
    for steps, name in ((6, "whole"), (3, "halves"), (6, "halves")):
        done = run_sft(tmp_path / name, *words.split(), str(steps))
        assert done.returncode == 0, done.stderr
    whole, halves = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "halves"))
    assert whole == halves
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/model", output_loading_info=True)
    assert not any(report.values()) and not hasattr(loaded.config, "quantization_config")
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert evaluated[-1] < evaluated[0]


@pytest.mark.slow
def test_a_tuned_models_answers_end_and_keep_the_form_of_three_turns(tmp_path: Path) -> None:
    words = (
        "--data.sequence_length 256 --tokenizer.vocab_size 600 --train.max_steps 100 --train.eval_every 0 "
        "--optim.learning_rate 3e-3 --generation.temperature 0 --generation.max_new_tokens 40"
    ).split()
    command = [sys.executable, "recipes/sft.py", *words, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["ended_share"] >= 0.95
    command = [sys.executable, "benchmarks/turns.py", str(tmp_path / "model")]
    held = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert held["conversations"] >= 20 and min(held["form_kept"]) >= 0.95


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    )


def test_embedding_noise_has_its_size_and_only_in_training() -> None:
    model = small()
    ids = torch.arange(50)[None]
    clean = model.get_input_embeddings()(ids)
    add_embedding_noise(model, 5.0)
    noise = (model.get_input_embeddings()(ids) - clean).abs()
    limit = 5 / (50 * 32) ** 0.5
    assert 0.95 * limit < noise.max() <= limit * 1.0001 and abs(noise.mean() - limit / 2) < 0.05 * limit
    assert torch.equal(model.eval().get_input_embeddings()(ids), clean)


def test_label_smoothing_is_torchs_in_training_and_absent_in_evaluation() -> None:
    model = small()
    module = CausalLMLoss(model, label_smoothing=0.1)
    ids, targets = torch.arange(12)[None], torch.arange(1, 13)[None]
    logits = model(ids).logits[0]
    smoothed = torch.nn.functional.cross_entropy(logits, targets[0], reduction="sum", label_smoothing=0.1)
    plain = torch.nn.functional.cross_entropy(logits, targets[0], reduction="sum")
    assert torch.allclose(module(ids, targets)[0], smoothed) and not torch.allclose(smoothed, plain)
    assert torch.allclose(module.eval()(ids, targets)[0], plain)


@pytest.mark.parametrize("row", ['{"messages": [{"role": "assistant", "content": "a"}]}', '{"prompt": "a"}'])
def test_bad_rows_end_with_one_line_that_names_them(tmp_path: Path, row: str) -> None:
    (tmp_path / "bad.jsonl").write_text(f"{row}\n")
    refused = run_sft(tmp_path / "out", "--data.train_files", str(tmp_path / "bad.jsonl"))
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 and "bad.jsonl:1: " in refused.stderr
