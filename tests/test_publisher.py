"""Publishing while training goes on: nothing waits, nothing private leaves, every fault ends well."""

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from hfkit import remote
from hfkit.files import write_json
from hfkit.publisher import Publisher, finish_command, publish_run
from hfkit.remote import HubError, check_access
from hfkit.settings import BadInput, HubConfig
from hub_runs import (  # noqa: F401
    REPO,
    ROOT,
    all_config,
    build_model,
    content,
    finished_run,
    logits,
    quick,
    remote_content,
    wait_for,
)
from hub_store import Commit
from local_hub import WRITE, LocalHub, hub_of_this_process  # noqa: F401


def test_publisher_without_repository_does_nothing(run: Path) -> None:
    publisher = Publisher(HubConfig(), run)
    publisher.submit(run / "model", 1, run / "checkpoints" / "step-00000001")
    assert (publisher.due(1), publisher.finish(run / "model")) == (False, "none")


def test_publisher_is_due(run: Path) -> None:
    assert [step for step in range(1, 9) if Publisher(HubConfig(repo_id=REPO, push_every=4), run).due(step)] == [4, 8]
    assert not any(Publisher(HubConfig(repo_id=REPO), run).due(step) for step in range(1, 9))


@pytest.mark.slow
def test_every_revision_loads_bit_for_bit_in_a_fresh_process(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    publisher = Publisher(all_config(), run)
    for step in (1, 2, 3):
        publisher.submit(run / "model", step, run / "checkpoints" / f"step-{step:08d}")
        wait_for(lambda: not publisher._waiting and publisher._running is None)
    assert publisher.finish(run / "model") == "done"
    assert sorted(hub.repo(REPO).branches) == ["main", "step-00000001", "step-00000002", "step-00000003"]
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "for revision in sys.argv[1:]:\n"
        f"    model = AutoModelForCausalLM.from_pretrained({REPO!r}, revision=revision)\n"
        "    print(model(torch.arange(16)[None]).logits.detach().numpy().tobytes().hex())"
    )
    environment = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    revisions = ["step-00000001", "step-00000002", "main"]
    command = [sys.executable, "-c", code, *revisions]
    printed = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line, step in zip(printed.split(), (1, 2, 3), strict=True):
        assert bytes.fromhex(line) == logits(build_model(step)).numpy().tobytes()


def test_only_what_may_leave_leaves(hub: LocalHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = run.parent / "home-of-ada"
    monkeypatch.setenv("HOME", str(home))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}))
    (run / "predictions.jsonl").write_text("{}")
    (run / "model" / "modeling_x.py").write_text("import os")
    config = json.loads((run / "model" / "config.json").read_text()) | {"_name_or_path": f"{home}/gpt"}
    write_json(run / "model" / "config.json", config)
    command = ["pretrain.py", "--data.train_files", f"{home}/corpus.txt", "--token", WRITE]
    session = {"command": command, "working_directory": str(home), "host": "adas-machine"}
    write_json(run / "passport.json", {"command": command, "data": {"path": f"{home}/a.txt"}, "sessions": [session]})
    (run / "config.yaml").write_text(f"output_dir: {home}/run\nmodel: {{path: {home}/gpt}}\nseed: 0\n")

    publisher = Publisher(all_config(), run)
    publisher.submit(run / "model", 3, run / "checkpoints" / "step-00000003")
    assert publisher.finish(run / "model") == "done"

    model = {"config.json", "generation_config.json", "model.safetensors", "README.md", "passport.json"}
    state = {"checkpoint/manifest.json", "checkpoint/model.safetensors", "checkpoint/optimizer.safetensors"}
    assert set(remote_content(hub)) == model
    assert set(remote_content(hub, "step-00000003")) == model | state
    for path in hub.store.folder.iterdir():
        sent = path.read_bytes()
        for secret in (WRITE, str(home), "home-of-ada", "adas-machine", str(run)):
            assert secret.encode() not in sent, (path, secret)
    assert json.loads(remote_content(hub)["config.json"])["_name_or_path"] == "gpt"
    assert json.loads((run / "model" / "config.json").read_text()) == config  # the local one stays as it is

    publish_run(all_config(include_samples=True), run)
    assert set(remote_content(hub)) == model | {"predictions.jsonl"}


@pytest.mark.parametrize("secret", [WRITE, "HOME/secret/plans.txt"])
def test_a_file_with_a_secret_is_not_sent(hub: LocalHub, run: Path, secret: str) -> None:
    secret = secret.replace("HOME", str(Path.home()))
    (run / "model" / "notes.txt").write_text(f"see {secret}")
    check_access(HubConfig(repo_id=REPO))
    with pytest.raises(HubError, match=r"notes\.txt holds") as error:
        publish_run(HubConfig(repo_id=REPO), run)
    assert secret not in str(error.value) and remote_content(hub) == {}


def test_steps_do_not_wait_for_a_hub_that_hangs(hub: LocalHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 60.0)
    publisher = Publisher(all_config(), run)
    hub.fail("create", "hang", times=None)
    for step in [1, 2, 3] * 10:
        publisher.submit(run / "model", step, run / "checkpoints" / f"step-{step:08d}")
    wait_for(lambda: hub.hits["create"] == 1)
    # All were handed over while the first request has no answer: nothing waited for it.
    assert publisher._running is not None and publisher._outcomes == {}
    assert len(publisher._waiting) == 1 and len(list((run / ".push").iterdir())) <= 2
    assert publisher.finish(run / "model", timeout=0.2) == "failed"
    assert hub.hits["create"] == 1  # nor did the end wait for it: the next push never began


@pytest.mark.slow
def test_a_process_ends_while_the_hub_hangs(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    hub.fail("lfs_put", "hang", times=None)
    code = (
        "from pathlib import Path; from hfkit.publisher import Publisher; from hfkit.settings import HubConfig\n"
        f"run = Path({str(run)!r}); publisher = Publisher(HubConfig(repo_id={REPO!r}, include_checkpoints=True), run)\n"
        "publisher.submit(run / 'model', 3, run / 'checkpoints' / 'step-00000003')\n"
        "print(publisher.finish(run / 'model', timeout=6))"
    )
    environment = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, hub.hits["lfs_put"]) == (0, "failed\n", 1)
    assert "to finish the push: python recipes/push.py --model.path" in done.stderr and WRITE not in done.stderr


def test_newest_checkpoint_wins_and_the_model_is_never_dropped(hub: LocalHub, run: Path) -> None:
    publisher = Publisher(all_config(), run)
    hub.fail("create", "hang", times=1)
    for step in (1, 2, 3):
        publisher.submit(run / "model", step, run / "checkpoints" / f"step-{step:08d}")
        wait_for(lambda: publisher._running is not None)
    assert publisher.finish(run / "model", timeout=60) == "done"
    assert sorted(hub.repo(REPO).branches) == ["main", "step-00000001", "step-00000003"]
    assert "2.5" in remote_content(hub)["README.md"].decode()  # the finished model's card has the results
    assert "2.5" not in remote_content(hub, "step-00000003")["README.md"].decode()
    assert not (run / ".push").exists()


def test_checkpoints_may_be_deleted_after_the_hand_over(hub: LocalHub, run: Path) -> None:
    publisher = Publisher(all_config(), run)
    hub.fail("create", "hang", times=1)
    publisher.submit(run / "model", 1, run / "checkpoints" / "step-00000001")
    shutil.rmtree(run / "checkpoints" / "step-00000001")
    shutil.rmtree(run / "model")
    assert publisher.finish(timeout=60) == "done"
    assert "checkpoint/optimizer.safetensors" in remote_content(hub, "step-00000001")


STATUSES = (401, 403, 404, 409, 412, 429, 500, 503)
FAULTS: list[tuple[str, int | str]] = [
    *((kind, status) for kind in ("preupload", "lfs_put", "commit") for status in STATUSES),
    *((kind, cut) for kind in ("lfs_put", "commit") for cut in ("cut_request", "cut_reply", "hang")),
    ("lfs_put", "corrupt"),
]
QUICK = [("commit", 503), ("lfs_put", 403), ("commit", "hang")]


@pytest.mark.parametrize(
    ("kind", "fault"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in FAULTS]
)
def test_under_every_fault_files_stay_whole_and_a_later_push_completes(
    hub: LocalHub,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    fault: int | str,
) -> None:
    monkeypatch.setattr(remote, "TRIES", 2)
    monkeypatch.setattr(remote, "TIMEOUT", 0.2)
    for step in (1, 2):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    before = content(run)
    hub.fail(kind, fault, times=None)
    publisher = Publisher(all_config(), run)
    publisher.submit(run / "model", 3, run / "checkpoints" / "step-00000003")
    landed = fault == "cut_reply"  # what was sent is there, only the Hub's word for it is missing
    assert publisher.finish(run / "model", timeout=60) == ("done" if landed else "failed")
    assert hub.hits[kind] >= 1
    if not landed:
        lines = capsys.readouterr().err.strip().splitlines()
        assert [line.split(":")[0] for line in lines] == ["warning", "warning", "to finish the push"]
        assert finish_command(publisher.config, run) in lines[-1]
    hub.heal()
    publish_run(all_config(), run)
    assert {path: data for path, data in content(run).items() if not path.startswith(".push")} == before
    assert remote_content(hub)["model.safetensors"] == before["model/model.safetensors"]
    branch = remote_content(hub, "step-00000003")
    assert branch["checkpoint/manifest.json"] == before["checkpoints/step-00000003/manifest.json"]


@pytest.fixture(name="recipe")
def push_recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The recipe push, called with the words of a command line."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    main = importlib.import_module("push").main

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["recipes/push.py", *map(str, words)])
        return int(main())

    return call


@pytest.mark.parametrize("include", [False, True])
def test_the_printed_command_publishes_what_is_missing(
    hub: LocalHub, run: Path, recipe: Callable[..., int], capsys: pytest.CaptureFixture[str], include: bool
) -> None:
    run = run.rename(run.parent / "my 'first' run")
    hub.fail("branch", 403, times=None)
    publisher = Publisher(all_config(push_every=3, include_checkpoints=include), run)
    publisher.submit(run / "model", 3, run / "checkpoints" / "step-00000003")
    assert publisher.finish(run / "model") == "failed"
    assert list(hub.repo(REPO).branches) == ["main"]
    hub.heal()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    words = shlex.split(line.removeprefix("to finish the push: "))
    assert words[:2] == ["python", "recipes/push.py"] and words[3] == str(run)
    assert recipe(*words[2:]) == 0
    assert sorted(hub.repo(REPO).branches) == ["main", "step-00000003"]  # not the kept steps 1 and 2: none were due
    branch = remote_content(hub, "step-00000003")
    assert branch["model.safetensors"] == (run / "checkpoints/step-00000003/model.safetensors").read_bytes()
    assert any(name.startswith("checkpoint/") for name in branch) == include


def test_a_branch_that_nothing_can_bring_back_is_named(
    hub: LocalHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("branch", 403, times=None)
    publisher = Publisher(all_config(), run)
    publisher.submit(run / "model", 2, run / "checkpoints" / "step-00000002")
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    assert publisher.finish(run / "model") == "failed"
    failed, lost, command = capsys.readouterr().err.strip().splitlines()
    assert failed.startswith("warning: pushing step 2") and command.startswith("to finish the push")
    assert lost.startswith("warning: the branch step-00000002 stays missing: its checkpoint is not kept any more")


def test_push_warns_where_it_finds_no_checkpoint(
    hub: LocalHub, run: Path, recipe: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe("--model.path", run, "--hub.repo_id", REPO, "--hub.push_every", 4) == 0
    assert "keeps no checkpoint for a branch: only main is published" in capsys.readouterr().err
    assert list(hub.repo(REPO).branches) == ["main"]


@pytest.mark.parametrize(("required", "code"), [([], 4), (["--hub.required", "false"], 0)])
def test_a_push_that_is_not_required_fails_with_a_warning(
    hub: LocalHub,
    run: Path,
    recipe: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    required: list[str],
    code: int,
) -> None:
    hub.fail("commit", 403, times=None)
    assert recipe("--model.path", run, "--hub.repo_id", REPO, *required) == code
    assert capsys.readouterr().err.startswith("warning: " if required else "error: ")


def test_push_refuses_a_revision(recipe: Callable[..., int], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        recipe("--model.path", run, "--hub.repo_id", REPO, "--hub.revision", "step-00000001")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and "hub.revision" in line


def test_license_and_language_of_a_push_are_on_the_card(hub: LocalHub, run: Path) -> None:
    publish_run(all_config(license="mit", language=["en", "de"]), run)
    for branch in ("main", "step-00000002"):
        data = ModelCard(remote_content(hub, branch)["README.md"].decode()).data.to_dict()
        assert (data["license"], data["language"]) == ("mit", ["en", "de"])
    folder = run.parent / "theirs"
    shutil.copytree(run / "model", folder)
    (folder / "README.md").write_text("A card of its own.")
    with pytest.raises(BadInput, match="has a card of its own"):
        publish_run(HubConfig(repo_id="me/theirs", license="mit"), folder)


def test_only_a_model_is_published(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="neither a run folder"):
        publish_run(all_config(), tmp_path)


def test_publisher_stops_at_another_writer(hub: LocalHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publisher = Publisher(all_config(), run)
    publisher.submit(run / "model", 1, run / "checkpoints" / "step-00000001")
    wait_for(lambda: publisher._outcomes.get("step") == "done")
    huggingface_hub.HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO)
    assert publisher.finish(run / "model") == "failed"
    assert remote_content(hub)["config.json"] == b"{}"
    assert "somebody else changed main" in capsys.readouterr().err


def test_two_runs_that_publish_in_one_place_notice_and_lose_nothing(
    hub: LocalHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = (Publisher(all_config(), run) for _ in range(2))
    for publisher, step in ((ours, 1), (theirs, 2), (ours, 3)):
        publisher.submit(run / "model", step, run / "checkpoints" / f"step-{step:08d}")
        wait_for(lambda publisher=publisher: not publisher._waiting and publisher._running is None)  # type: ignore[misc]
    assert ours.finish() == "failed" and theirs.finish() == "done"
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"warning: pushing step 3 to {REPO} failed: somebody else changed main of {REPO}")
    weights = [(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors").read_bytes() for step in (1, 2)]
    assert remote_content(hub)["model.safetensors"] == weights[1]
    states = [hub.store.content(commit.files["model.safetensors"]) for commit in ours_on_main(hub)]
    assert states == weights  # what was overwritten before anybody noticed is in the history


def ours_on_main(hub: LocalHub) -> list[Commit]:
    """Return the commits of main but the first one, oldest first."""
    repo = hub.repo(REPO)
    commits = [repo.at("main")]
    while commits[0].parent is not None:
        commits.insert(0, repo.commits[commits[0].parent])
    return commits[1:]
