"""A finished run and small helpers for the tests that publish; waits of milliseconds instead of minutes."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hfkit import remote
from hfkit.checkpoint import model_tensors, save_checkpoint
from hfkit.files import write_json
from hfkit.settings import HubConfig
from local_hub import LocalHub

ROOT = Path(__file__).parents[1]
REPO = "me/model"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of milliseconds, and the client's own session limits."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)
    huggingface_hub.close_session()
    remote._download.cache_clear()  # a name belongs to another Hub in each test


def build_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def save_step(run: Path, step: int, keep: int = 9) -> Path:
    """Write a checkpoint whose weights are those of seed ``step``."""
    weights, moments = model_tensors(build_model(step)), {"moment": torch.full((1000,), float(step))}
    return save_checkpoint(
        run / "checkpoints",
        step,
        {
            "model.safetensors": lambda path: save_file(weights, path),
            "optimizer.safetensors": lambda path: save_file(moments, path),
        },
        {"world_size": 1},
        keep,
    )


@pytest.fixture(name="run")
def finished_run(tmp_path: Path) -> Path:
    """A finished run of three steps, the files that matter here."""
    run = tmp_path / "run"
    for step in (1, 2, 3):
        save_step(run, step)
    build_model(3).save_pretrained(run / "model")
    (run / "model" / "training_args.bin").write_bytes(b"pickle")
    (run / "config.yaml").write_text("seed: 0\nhub:\n  repo_id: me/model\n")
    write_json(run / "result.json", {"steps": 3, "perplexity": 2.5})
    write_json(run / "passport.json", {"seed": 0, "data": {}, "sessions": []})
    return run


def kinds(hub: LocalHub) -> list[str]:
    return [kind for kind, _ in hub.requests]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(16)[None]).logits


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def remote_content(hub: LocalHub, revision: str = "main") -> dict[str, bytes]:
    return {path: data for path, data in hub.files(REPO, revision).items() if path != ".gitattributes"}


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def all_config(**changes: Any) -> HubConfig:
    return replace(HubConfig(repo_id=REPO, push_every=1, include_checkpoints=True), **changes)
