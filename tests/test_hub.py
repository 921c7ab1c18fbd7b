"""Pushing and fetching through a local Hub: complete, idempotent, patient, and safe against a second writer."""

import email.utils
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM

from hfkit import remote
from hfkit.hub import OtherWriter, download_checkpoint, push_folder
from hfkit.model import load_causal_lm
from hfkit.publisher import publish_run
from hfkit.remote import HubError, check_access, resolve_model
from hfkit.resume import choose_checkpoint
from hfkit.settings import BadInput, HubConfig, ModelConfig
from hub_runs import (  # noqa: F401
    REPO,
    ROOT,
    all_config,
    build_model,
    content,
    finished_run,
    kinds,
    logits,
    quick,
    remote_content,
)
from local_hub import OTHER, READ, WRITE, LocalHub, hub_of_this_process  # noqa: F401

# check_access


def test_access_makes_a_private_repository(hub: LocalHub) -> None:
    check_access(HubConfig(repo_id=REPO))
    assert hub.repo(REPO).private
    check_access(HubConfig(repo_id=REPO))
    check_access(HubConfig(repo_id="me/open", private=False))
    assert not hub.repo("me/open").private


def test_access_without_repository_asks_nothing(hub: LocalHub) -> None:
    check_access(HubConfig())
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "needs a Hub token"),
        ("hf_unknown_token", "refuses the token"),
        (READ, "may only read"),
        (OTHER, "no perm"),
    ],
)
def test_access_with_a_bad_token(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, token: str | None, message: str
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(BadInput, match=message) as error:
        check_access(HubConfig(repo_id=REPO))
    assert "\n" not in str(error.value) and (token is None or token not in str(error.value))
    assert len(hub.requests) <= 3


@pytest.mark.parametrize("name", ["model", "me/", "a/b/c", "me/mo del", "../x", "https://hf.co/me/x"])
def test_repository_names(name: str) -> None:
    with pytest.raises(BadInput, match="name/model"):
        HubConfig(repo_id=name)


@pytest.mark.parametrize("fault", [503, 429, "cut_reply", "hang"])
def test_access_while_the_hub_is_down(hub: LocalHub, capsys: pytest.CaptureFixture[str], fault: int | str) -> None:
    hub.fail("whoami", fault, times=None)
    check_access(HubConfig(repo_id=REPO))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("warning: the Hub cannot be reached now")
    with pytest.raises(HubError, match="required"):
        check_access(HubConfig(repo_id=REPO, required=True))


def test_access_offline(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE"):
        check_access(HubConfig(repo_id=REPO))


# push_folder


@pytest.fixture
def folder(hub: LocalHub, tmp_path: Path) -> Path:
    """A folder with a large, two small files and one in a subfolder, and an empty repository."""
    check_access(HubConfig(repo_id=REPO))
    folder = tmp_path / "folder"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "checkpoint" / "state.json").write_text("{}")
    hub.requests.clear()
    return folder


def test_push_is_one_commit_and_repeating_it_none(hub: LocalHub, folder: Path) -> None:
    head = push_folder(folder, REPO, message="first")
    assert (len(hub.repo(REPO).commits), remote_content(hub)) == (2, content(folder))
    hub.requests.clear()
    assert push_folder(folder, REPO, message="again") == head
    assert set(kinds(hub)) == {"info", "tree"}


def test_push_sends_only_what_changed(hub: LocalHub, folder: Path) -> None:
    push_folder(folder, REPO, message="first")
    received = hub.bytes_in
    (folder / "config.json").write_text('{"a": 1}')
    push_folder(folder, REPO, message="second")
    assert hub.bytes_in - received < 2000
    assert remote_content(hub) == content(folder)


def test_push_removes_stale_weights_and_keeps_what_others_added(hub: LocalHub, folder: Path) -> None:
    push_folder(folder, REPO, message="first")
    huggingface_hub.HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="picture.png", repo_id=REPO)
    shutil.rmtree(folder / "checkpoint")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    push_folder(folder, REPO, message="second")
    assert remote_content(hub) == content(folder) | {"picture.png": b"x"}


KINDS = ("info", "tree", "branch", "validate", "preupload", "lfs_batch", "lfs_put", "lfs_verify", "commit")
RETRIED: list[tuple[str, int | str, int]] = [(kind, fault, 1) for kind in KINDS for fault in (503, 429, "cut_reply")]
RETRIED += [(kind, fault, 2) for kind in ("lfs_put", "commit") for fault in (500, 408, "cut_request")]
RETRIED += [(kind, "hang", 1) for kind in ("info", "tree", "lfs_put", "commit")]
QUICK = [
    ("info", 503, 1),
    ("lfs_put", "cut_request", 2),
    ("commit", 503, 1),
    ("commit", "cut_reply", 1),
    ("tree", "hang", 1),
]
CASES = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in RETRIED]


@pytest.mark.parametrize(("kind", "fault", "times"), CASES)
def test_push_outlasts_passing_faults(hub: LocalHub, folder: Path, kind: str, fault: int | str, times: int) -> None:
    hub.fail(kind, fault, times)
    push_folder(folder, REPO, revision="step-00000001", message="push")
    assert hub.hits[kind] == times
    assert remote_content(hub, "step-00000001") == content(folder)
    assert len(hub.repo(REPO).commits) == 2  # the first one, and exactly one of ours


def test_push_recognises_a_commit_whose_reply_was_lost(hub: LocalHub, folder: Path) -> None:
    hub.fail("commit", "cut_reply")
    head = push_folder(folder, REPO, message="push")
    assert kinds(hub).count("commit") == 1
    assert (head, len(hub.repo(REPO).commits)) == (hub.repo(REPO).branches["main"], 2)


def test_push_sends_a_damaged_upload_again(hub: LocalHub, folder: Path) -> None:
    hub.fail("lfs_put", "corrupt", times=2)
    push_folder(folder, REPO, message="push")
    assert hub.hits["lfs_put"] == 2
    assert remote_content(hub) == content(folder)


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412])
def test_push_asks_once_where_asking_again_is_useless(hub: LocalHub, folder: Path, status: int) -> None:
    hub.fail("commit", status, times=None)
    with pytest.raises(HubError) as error:
        push_folder(folder, REPO, message="push")
    assert hub.hits["commit"] == 1
    assert "\n" not in str(error.value) and WRITE not in str(error.value)
    hub.heal()
    push_folder(folder, REPO, message="push")
    assert remote_content(hub) == content(folder)


@pytest.mark.parametrize("fault", [500, 503, "cut_request", "cut_reply"])
def test_push_gives_up_in_the_end(hub: LocalHub, folder: Path, fault: int | str) -> None:
    hub.fail("commit" if fault != "cut_reply" else "preupload", fault, times=None)
    with pytest.raises(HubError):
        push_folder(folder, REPO, message="push")
    assert sum(hub.hits.values()) >= remote.TRIES
    assert remote_content(hub) == {}


def test_push_waits_as_long_as_it_is_asked_to(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("commit", 429, Retry_After="1")
    begun = time.monotonic()
    push_folder(folder, REPO, message="push")
    assert time.monotonic() - begun >= 1.0
    hub.fail("info", 429, times=None, Retry_After="3600")
    with pytest.raises(HubError, match="429"):
        push_folder(folder, REPO, message="push")


def test_waits_that_a_server_asks_for(hub: LocalHub) -> None:
    check_access(HubConfig(repo_id=REPO))
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    for asked, seconds in (("7", 7.0), (date, 100.0), ("soon", 0.0), ("-1", 0.0)):
        hub.fail("info", 429, Retry_After=asked)
        with pytest.raises(HfHubHTTPError) as error:
            huggingface_hub.HfApi().repo_info(REPO)
        assert remote.retry_after(error.value) == pytest.approx(seconds, abs=5)


def test_push_refuses_to_overwrite_another_writer(hub: LocalHub, folder: Path) -> None:
    head = push_folder(folder, REPO, message="ours")
    api = huggingface_hub.HfApi()
    api.upload_file(path_or_fileobj=b"theirs", path_in_repo="config.json", repo_id=REPO)
    with pytest.raises(OtherWriter, match="somebody else"):
        push_folder(folder, REPO, message="ours again", parent=head)
    assert remote_content(hub)["config.json"] == b"theirs"


def test_writer_between_listing_and_commit_is_noticed(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_commit = huggingface_hub.HfApi.create_commit

    def squeeze_in(*args: Any, **options: Any) -> Any:
        hub.repo(REPO).add("main", "theirs", {})
        return create_commit(*args, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", squeeze_in)
    with pytest.raises(OtherWriter):
        push_folder(folder, REPO, message="ours")
    assert remote_content(hub) == {}


def test_killed_push_repeated_is_one_consistent_commit(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    """A process is killed while its commit hangs, all files sent; the same command then ends in one commit."""
    hub.fail("commit", "hang")
    code = "import sys; from pathlib import Path; from hfkit.hub import push_folder\n"
    code += f"push_folder(Path({str(folder)!r}), {REPO!r}, message='push')"
    environment = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "home")}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT)
    deadline = time.monotonic() + 60
    while hub.hits["commit"] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert hub.hits["commit"] == 1 and remote_content(hub) == {}
    sent = kinds(hub).count("lfs_put")
    push_folder(folder, REPO, message="push")
    assert (sent, kinds(hub).count("lfs_put")) == (1, 1)  # the large file was not sent twice
    assert len(hub.repo(REPO).commits) == 2
    assert remote_content(hub) == content(folder)


# download_checkpoint


def test_checkpoint_comes_back_on_an_empty_machine(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    publish_run(all_config(), run)
    folder = download_checkpoint(HubConfig(repo_id=REPO), tmp_path / "new" / "checkpoints")
    assert folder == tmp_path / "new" / "checkpoints" / "step-00000003"
    assert content(folder) == content(run / "checkpoints" / "step-00000003")
    older = download_checkpoint(HubConfig(repo_id=REPO, revision="step-00000001"), tmp_path / "new" / "checkpoints")
    assert content(older) == content(run / "checkpoints" / "step-00000001")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-00000001", "step-00000003"]


def test_damaged_checkpoint_is_passed_over(
    hub: LocalHub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_run(all_config(), run)
    repo = hub.repo(REPO)
    files = dict(repo.at("step-00000003").files)
    files["checkpoint/optimizer.safetensors"] = hub.store.keep(b"torn")
    repo.add("step-00000003", "damage", files)
    assert download_checkpoint(HubConfig(repo_id=REPO), tmp_path / "new").name == "step-00000002"
    assert "optimizer.safetensors is damaged; using the checkpoint before it" in capsys.readouterr().err


def test_checkpoint_that_arrives_damaged_is_fetched_again(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    publish_run(all_config(), run)
    hub.fail("resolve", "corrupt", times=6)  # the files of the first try: HEAD and GET of three
    folder = download_checkpoint(HubConfig(repo_id=REPO), tmp_path / "new")
    assert hub.hits["resolve"] == 6
    assert content(folder) == content(run / "checkpoints" / "step-00000003")


def test_no_checkpoint_to_resume_from(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    publish_run(HubConfig(repo_id=REPO), run)
    with pytest.raises(BadInput, match="holds no whole checkpoint"):
        download_checkpoint(HubConfig(repo_id=REPO), tmp_path / "new")
    with pytest.raises(BadInput, match=r"needs --hub\.repo_id"):
        download_checkpoint(HubConfig(), tmp_path / "new")


def test_resuming_takes_the_newest_of_both(
    hub: LocalHub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_run(all_config(), run)
    config = SimpleNamespace(resume="hub", hub=all_config())

    def chosen(here: int | None, **changed: Any) -> int:
        output_dir = tmp_path / f"{here}-{len(changed)}-{len(hub.faults)}"
        if here is not None:
            shutil.copytree(run / f"checkpoints/step-{here:08d}", output_dir / f"checkpoints/step-{here:08d}")
        found = choose_checkpoint(SimpleNamespace(resume="hub", hub=all_config(**changed)), output_dir, {})
        assert found is not None and found[0] == output_dir / "checkpoints" / f"step-{found[1]['step']:08d}"
        return int(found[1]["step"])

    assert [chosen(None), chosen(1), chosen(3)] == [3, 3, 3]
    assert [chosen(None, revision="step-00000001"), chosen(2, revision="step-00000001")] == [1, 2]
    hub.fail("refs", 503, times=None)
    assert chosen(2) == 2
    assert "HTTP 503: injected; going on from what is here" in capsys.readouterr().err
    with pytest.raises(BadInput, match="resume: HTTP 503"):
        choose_checkpoint(config, tmp_path / "empty", {})


# resolve_model


def test_models_resolve_to_folders(hub: LocalHub, run: Path) -> None:
    assert resolve_model(run / "model") == run / "model"
    publish_run(all_config(), run)
    folder = resolve_model(REPO)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(build_model(3)))
    pinned = resolve_model(REPO, hub.repo(REPO).branches["step-00000001"])
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(pinned)), logits(build_model(1)))
    assert not (pinned / "checkpoint").exists()


def test_offline_mode_uses_what_was_downloaded(hub: LocalHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_run(HubConfig(repo_id=REPO), run)
    folder = resolve_model(REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    remote._download.cache_clear()
    hub.requests.clear()
    assert resolve_model(REPO) == folder
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE"):
        resolve_model("me/another")
    assert hub.requests == []


def test_model_that_arrives_damaged_is_fetched_again(hub: LocalHub, run: Path) -> None:
    publish_run(HubConfig(repo_id=REPO), run)
    hub.fail("resolve", "corrupt", times=None)
    with pytest.raises(BadInput, match="arrived damaged"):
        resolve_model(REPO)
    hub.heal()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(resolve_model(REPO))), logits(build_model(3)))


def test_models_that_do_not_exist(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    publish_run(HubConfig(repo_id=REPO), run)
    wrong = {
        "me/nothing": "neither a folder nor a repository",
        "./nowhere": "no such folder",
        "/no/where/at/all": "no such folder",
        str(tmp_path): "no config.json",
    }
    for path, message in wrong.items():
        with pytest.raises(BadInput, match=message):
            resolve_model(path)
    with pytest.raises(BadInput, match="no revision 'v9'"):
        resolve_model(REPO, "v9")
    with pytest.raises(BadInput, match="is a folder"):
        resolve_model(run / "model", "main")
    hub.fail("info", "cut_reply", times=None)
    with pytest.raises(BadInput, match="cannot be fetched"):
        resolve_model("me/elsewhere")


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
open({marker!r}, "w").close()
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_code_of_a_repository_runs_only_where_it_is_trusted(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    config = json.loads((run / "model" / "config.json").read_text())
    names = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    (run / "model" / "config.json").write_text(json.dumps(config | {"model_type": "odd", "auto_map": names}))
    (run / "model" / "odd.py").write_text(CODE.format(marker=str(marker)))
    api = huggingface_hub.HfApi()
    api.create_repo(REPO)
    api.upload_folder(folder_path=run / "model", repo_id=REPO)
    with pytest.raises(BadInput, match=r"model\.path me/model") as error:
        load_causal_lm(ModelConfig(path=REPO))
    assert "\n" not in str(error.value) and not marker.exists()
    trusted = load_causal_lm(ModelConfig(path=REPO, trust_remote_code=True))
    assert marker.exists() and torch.equal(logits(trusted.eval()), logits(build_model(3)))
