"""Training runs that publish, from end to end: recipes with an unmodified client against the Hub on this machine."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from huggingface_hub import DatasetCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hfkit.checkpoint import list_checkpoints, read_checkpoint
from hub_home import (  # noqa: F401
    forking_server,
    healthy_hub,
    home_folder,
    hub_of_this_module,
    published_run,
    settings,
    signed_in_environment,
)
from local_hub import WRITE, LocalHub
from runs import Ended, Server, Words, newest_step, wait_for

STEPS = ("step-00000004", "step-00000008", "step-00000012")
PROMPT = torch.arange(24)[None]
LOADER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for revision in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], revision=revision)
    print(len(tokenizer), model(torch.arange(24)[None]).logits.detach().numpy().tobytes().hex())
"""


def local_logits(run: Path, weights: Path) -> bytes:
    """Return the logits of the run's model with the weights of a file."""
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    model.load_state_dict(load_file(weights), strict=False)
    model.tie_weights()
    with torch.no_grad():
        return model(PROMPT).logits.numpy().tobytes()


def test_main_and_each_revision_load_bit_for_bit_in_a_fresh_process(
    hub: LocalHub, published: Ended, environment: dict[str, str], tmp_path: Path
) -> None:
    run = published.output_dir
    assert sorted(hub.repo("me/model").branches) == ["main", *STEPS]
    command = [sys.executable, "-c", LOADER, "me/model", "main", *STEPS]
    fresh = {**environment, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "huggingface")}
    done = subprocess.run(command, env=fresh, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    weights = [run / "model", *(run / "checkpoints" / step for step in STEPS)]
    logits = [local_logits(run, folder / "model.safetensors") for folder in weights]
    assert len(set(logits)) == 3  # the last step and the model are the same
    assert [line.split() for line in done.stdout.splitlines()] == [["300", found.hex()] for found in logits]


def test_resuming_from_the_hub_on_an_empty_machine_equals_the_uninterrupted_run(
    hub: LocalHub, server: Server, published: Ended, home: Path, tmp_path: Path
) -> None:
    shutil.copy(home / "corpus.jsonl", tmp_path / "other-name.jsonl")
    words = settings(home, "me/model", hub__revision=STEPS[0], resume="hub")
    words |= {"data.train_files": str(tmp_path / "other-name.jsonl"), "data.cache_dir": str(tmp_path / "cache")}
    resumed = server.run("pretrain", words, tmp_path / "resumed")
    assert resumed.code == 0, resumed.stderr
    assert "at step 4" in resumed.stderr
    assert resumed.metrics == [line for line in published.metrics if line["step"] > 4]
    assert resumed.weights == published.weights
    results = [json.loads((run.output_dir / "result.json").read_text()) for run in (resumed, published)]
    for result in results:
        for clock in ("seconds", "tokens_per_second", "finished"):
            del result[clock]
    assert results[0] == results[1]


def test_what_the_hub_stores_holds_neither_token_nor_home(hub: LocalHub, published: Ended, home: Path) -> None:
    assert "secret-home" in (published.output_dir / "passport.json").read_text()  # it is there to be given away
    branches = hub.repo("me/model").branches
    sent = {name: data for branch in branches for name, data in hub.files("me/model", branch).items()}
    assert sent.keys() >= {"README.md", "passport.json", "tokenizer.json", "checkpoint/manifest.json"}
    for path in hub.store.folder.rglob("*"):
        stored = path.read_bytes() if path.is_file() else b""
        assert not [secret for secret in ("secret-home", WRITE) if secret.encode() in stored], path
    for path in published.output_dir.rglob("*"):
        assert not path.is_file() or WRITE.encode() not in path.read_bytes(), path
    assert WRITE not in published.stdout + published.stderr


def finish_push(server: Server, ended: Ended) -> Ended:
    """Run the command that a run printed for finishing its push."""
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("to finish the push: ")]
    words = shlex.split(line.removeprefix("to finish the push: python recipes/push.py "))
    settings = {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    assert settings["model.path"] == str(ended.output_dir)
    return server.run("push", settings, ended.output_dir)


def test_required_push_that_fails(hub: LocalHub, server: Server, published: Ended, home: Path) -> None:
    hub.fail("commit", 503, times=None)
    words = settings(home, "me/required", hub__required=True)
    ended = server.run("pretrain", words, home / "required", before="hub_children.impatient")
    status = ended.status
    assert (ended.code, status["state"], status["exit_code"], status["push"]) == (4, "push_failed", 4, "failed")
    assert "error: the push to me/required failed" in ended.stderr and "Traceback" not in ended.stderr
    assert (ended.metrics, ended.weights) == (published.metrics, published.weights)
    kept = [read_checkpoint(folder)["step"] for folder in list_checkpoints(ended.output_dir / "checkpoints")]
    assert kept == [4, 8, 12]
    assert {path.name for path in ended.output_dir.iterdir()} >= {"result.json", "report.html", "model"}
    hub.heal()
    done = finish_push(server, ended)
    assert (done.code, done.stdout) == (0, f"{hub.url}/me/required\n"), done.stderr
    assert hub.files("me/required")["model.safetensors"] == ended.weights
    assert sorted(hub.repo("me/required").branches) == ["main", *STEPS]


def test_push_that_is_not_required_is_a_warning(hub: LocalHub, server: Server, published: Ended, home: Path) -> None:
    hub.fail("commit", 503, times=None)
    ended = server.run("pretrain", settings(home, "me/wanted"), home / "wanted", before="hub_children.impatient")
    assert (ended.code, ended.status["state"], ended.status["push"]) == (0, "done", "failed"), ended.stderr
    assert "to finish the push: python recipes/push.py" in ended.stderr
    assert ended.weights == published.weights


def test_steps_do_not_wait_for_a_hub_that_hangs(hub: LocalHub, server: Server, published: Ended, home: Path) -> None:
    """All steps pass while the first of twelve pushes has no answer: nothing but the last wait ends it."""
    hub.fail("commit", "hang", times=None)
    words = settings(home, "me/hanging", hub__push_every=1)
    during = stop_once(hub, signal.SIGTERM, after_step=12)
    ended = server.run("pretrain", words, home / "hanging", during, before="hub_children.in_a_hurry")
    assert (ended.code, hub.hits["commit"]) == (75, 1), ended.stderr
    assert "warning: pushing step 1 to me/hanging failed: it did not end in time" in ended.stderr
    assert ended.weights == published.weights


def stop_once(hub: LocalHub, number: int, after_step: int = 0, kind: str = "commit") -> Callable[[int, Path], None]:
    """Return what sends a signal to a run when a request of this kind is on its way and a step is saved."""

    def send(pid: int, output_dir: Path) -> None:
        wait_for(lambda: hub.hits[kind] > 0, f"a request of kind {kind}")
        wait_for(lambda: newest_step(output_dir) >= after_step, f"step {after_step}")
        os.kill(pid, number)

    return send


def test_stopped_while_a_checkpoint_is_pushed(hub: LocalHub, server: Server, published: Ended, home: Path) -> None:
    hub.fail("commit", "hang", times=None)
    words = settings(home, "me/stopped", hub__include_checkpoints=True)
    during = stop_once(hub, signal.SIGTERM)
    ended = server.run("pretrain", words, home / "stopped", during, before="hub_children.waiting_for_a_signal")
    assert (ended.code, ended.status["state"], ended.status["push"]) == (75, "preempted", "failed"), ended.stderr
    assert "to finish the push" not in ended.stderr and "run the same command again" in ended.stderr
    assert list(hub.files("me/stopped")) == [".gitattributes"]
    assert [read_checkpoint(folder)["step"] for folder in list_checkpoints(home / "stopped/checkpoints")] == [4, 5]

    hub.heal()
    again = server.run("pretrain", words, home / "stopped", before="hub_children.waiting_for_each_push")
    assert (again.code, again.status["push"], again.weights) == (0, "done", published.weights), again.stderr
    assert sorted(hub.repo("me/stopped").branches) == ["main", *STEPS]  # the one that was interrupted, too
    for branch in ("main", *STEPS):
        folder = home / "stopped" / ("model" if branch == "main" else f"checkpoints/{branch}")
        assert hub.files("me/stopped", branch)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_the_model_is_pushed(
    hub: LocalHub, server: Server, published: Ended, home: Path, number: int
) -> None:
    repo_id, output_dir = f"me/last-{number}", home / f"last-{number}"
    hub.fail("commit", "hang", times=None)
    words = settings(home, repo_id, hub__push_every=None)
    ended = server.run("pretrain", words, output_dir, stop_once(hub, number), before="hub_children.in_a_hurry")
    if number == signal.SIGTERM:
        assert (ended.code, ended.status["state"], ended.status["push"]) == (75, "preempted", "failed"), ended.stderr
    else:
        assert ended.code == -signal.SIGKILL
    assert ended.weights == published.weights

    hub.heal()
    sent = [kind for kind, _ in hub.requests].count("lfs_put")
    again = server.run("pretrain", words, output_dir)
    assert (again.code, again.status["push"], again.weights) == (0, "done", published.weights), again.stderr
    assert f"Published: {hub.url}/{repo_id}" in again.stderr
    assert len(hub.repo(repo_id).commits) == 2  # the repository's first, and ours
    assert hub.files(repo_id)["model.safetensors"] == published.weights
    assert [kind for kind, _ in hub.requests].count("lfs_put") == sent  # the weights had arrived before


def test_a_crash_gives_nothing_away(hub: LocalHub, server: Server, home: Path) -> None:
    words = settings(home, "me/crashed", hub__push_every=1, hub__include_samples=True)
    ended = server.run("pretrain", words, home / "crashed", before="hub_children.leaking")
    assert ended.code == 1 and "signed in with ***" in ended.stderr
    assert WRITE not in ended.stdout + ended.stderr
    for path in [*ended.output_dir.rglob("*"), *hub.store.folder.rglob("*")]:
        assert not path.is_file() or WRITE.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("required", [False, True])
def test_a_hub_that_is_away_at_the_start(hub: LocalHub, server: Server, home: Path, required: bool) -> None:
    hub.fail("whoami", 503, times=None)
    words = settings(home, "me/away", hub__required=required)
    ended = server.run("pretrain", words, home / f"away-{required}", before="hub_children.impatient")
    if required:  # nothing is trained that could not be published
        assert (ended.code, ended.status["step"]) == (4, 0)
        (line,) = ended.stderr.strip().splitlines()
        assert line.startswith("error: hub.required is set and the Hub cannot be reached")
    else:
        assert (ended.code, ended.status["push"]) == (0, "done"), ended.stderr
        assert "warning: the Hub cannot be reached now" in ended.stderr


def test_a_bad_token_is_bad_input_before_anything_is_done(hub: LocalHub, server: Server, home: Path) -> None:
    words = settings(home, "me/refused") | {"data.cache_dir": str(home / "unused")}
    ended = server.run("pretrain", words, home / "refused", before="hub_children.signed_in_wrongly")
    (line,) = ended.stderr.strip().splitlines()
    assert (ended.code, ended.status["exit_code"]) == (2, 2)
    assert line.startswith("error: the Hub refuses the token") and "hf_notAtokenOfAnybody" not in ended.stderr
    assert not (home / "unused").exists()


def test_prepared_text_becomes_a_data_set(
    hub: LocalHub, server: Server, home: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    words: Words = {"data.train_files": str(home / "corpus.jsonl"), "data.cache_dir": str(home / "cache")}
    words |= {"tokenizer.vocab_size": 300, "hub.repo_id": "me/corpus", "hub.license": "mit"}
    hub.fail("commit", 503, times=None)
    failed = server.run("prepare", words, home / "prepared", before="hub_children.impatient")
    assert (failed.code, failed.status["push"]) == (0, "failed") and "run the same command again" in failed.stderr
    required = server.run("prepare", words | {"hub.required": True}, home / "prepared", before="hub_children.impatient")
    assert (required.code, required.status["state"]) == (4, "push_failed")
    hub.heal()
    done = server.run("prepare", words, home / "prepared")
    assert (done.code, done.status["push"]) == (0, "done"), done.stderr

    files = hub.files("me/corpus", kind="datasets")
    assert files.keys() == {".gitattributes", "README.md", "passport.json", "train-0.parquet", "validation.parquet"}
    assert not [name for name, content in files.items() if b"secret-home" in content or WRITE.encode() in content]
    data = DatasetCard(files["README.md"].decode()).data
    assert (data.license, data.pretty_name) == ("mit", "corpus")
    (snippet,) = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    command = [sys.executable, "-c", snippet + '\nprint(*corpus, corpus["validation"].column_names)']
    used = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert used.stdout.endswith("train validation ['text']\n"), used.stderr
    texts = {json.loads(line)["text"] for line in (home / "corpus.jsonl").read_text().splitlines()}
    rows = {}
    for split in ("train-0", "validation"):
        (tmp_path / split).write_bytes(files[f"{split}.parquet"])
        table = pyarrow.parquet.read_table(tmp_path / split)
        assert table.column_names == ["text"]
        rows[split] = table["text"].to_pylist()
    assert set(rows["train-0"]) | set(rows["validation"]) == texts
    audit = json.loads((home / "prepared" / "audit.json").read_text())
    assert [len(part) for part in rows.values()] == [
        audit["splits"][name]["documents"] for name in ("train", "validation")
    ]
