"""The local Hub does what the unmodified client expects, and turns down what the real Hub turns down."""

import hashlib
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from local_hub import OTHER, READ, LocalHub, hub_of_this_process  # noqa: F401

CARD = b"---\nlicense: mit\n---\n# A model\n"


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    """The client, with one private model repository."""
    api = HfApi()
    api.create_repo("me/model", private=True)
    return api


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)


def put(api: HfApi, path: str, content: bytes, revision: str = "main", parent_commit: str | None = None) -> str:
    operations = [add(path, content)]
    made = api.create_commit(
        "me/model", operations, commit_message="put", revision=revision, parent_commit=parent_commit
    )
    return str(made.oid)


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_large_file_branch_tag_and_download(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    large = os.urandom(1 << 20) * 12  # 12 MB
    first = put(api, "model.safetensors", large)
    api.create_branch("me/model", branch="step-00000001")
    api.create_tag("me/model", tag="v1")
    put(api, "README.md", CARD)

    assert {branch.name: branch.target_commit for branch in api.list_repo_refs("me/model").branches} == {
        "main": hub.repo("me/model").branches["main"],
        "step-00000001": first,
    }
    assert [tag.target_commit for tag in api.list_repo_refs("me/model").tags] == [first]
    assert Path(hf_hub_download("me/model", "model.safetensors", revision="v1")).read_bytes() == large
    folder = Path(snapshot_download("me/model"))
    assert (folder / "README.md").read_bytes() == CARD
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).digest() == hashlib.sha256(large).digest()
    (listed,) = [file for file in api.list_repo_tree("me/model", recursive=True) if file.path == "model.safetensors"]
    assert isinstance(listed, RepoFile) and listed.lfs is not None
    assert listed.lfs.sha256 == hashlib.sha256(large).hexdigest()
    assert hub.bytes_in > 12_000_000


def test_unchanged_files_make_no_commit(hub: LocalHub, api: HfApi) -> None:
    head = put(api, "model.safetensors", b"weights")
    received = hub.bytes_in
    assert put(api, "model.safetensors", b"weights") == head
    assert len(hub.repo("me/model").commits) == 2  # the one of the creation, and ours
    assert hub.bytes_in - received < 500


def test_same_content_in_another_repository_is_not_sent_again(hub: LocalHub, api: HfApi) -> None:
    put(api, "model.safetensors", b"weights")
    api.create_repo("me/copy")
    api.create_commit("me/copy", [add("model.safetensors", b"weights")], commit_message="copy")
    assert [kind for kind, _ in hub.requests].count("lfs_put") == 1
    assert hub.files("me/copy")["model.safetensors"] == b"weights"


def test_deletions(hub: LocalHub, api: HfApi) -> None:
    put(api, "checkpoint/state.json", b"{}")
    put(api, "notes.txt", b"hello")
    deletions = [CommitOperationDelete("notes.txt"), CommitOperationDelete("checkpoint/", is_folder=True)]
    api.create_commit("me/model", deletions, commit_message="clean")
    assert set(hub.files("me/model")) == {".gitattributes"}
    with pytest.raises(EntryNotFoundError):
        api.create_commit("me/model", [CommitOperationDelete("notes.txt")], commit_message="again")


def test_dataset_repositories(hub: LocalHub, api: HfApi) -> None:
    api.create_repo("me/corpus", repo_type="dataset")
    api.upload_file(path_or_fileobj=b"a\n", path_in_repo="a.txt", repo_id="me/corpus", repo_type="dataset")
    assert Path(hf_hub_download("me/corpus", "a.txt", repo_type="dataset")).read_bytes() == b"a\n"
    assert api.dataset_info("me/corpus").id == "me/corpus"
    api.delete_repo("me/corpus", repo_type="dataset")
    assert not api.repo_exists("me/corpus", repo_type="dataset")


def test_range_request(hub: LocalHub, api: HfApi) -> None:
    put(api, "a.txt", b"0123456789")
    request = urllib.request.Request(f"{hub.url}/me/model/resolve/main/a.txt", headers={"Range": "bytes=3-5"})
    request.add_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    with urllib.request.urlopen(request) as reply:
        assert (reply.status, reply.read(), reply.headers["Content-Range"]) == (206, b"345", "bytes 3-5/10")


def test_rejects_existing_repository(api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("me/model")
    assert status(error) == 409
    assert api.create_repo("me/model", exist_ok=True).repo_id == "me/model"


def test_rejects_stale_parent(hub: LocalHub, api: HfApi) -> None:
    parent = hub.repo("me/model").branches["main"]
    put(api, "a.txt", b"1")
    with pytest.raises(HfHubHTTPError) as error:
        put(api, "b.txt", b"2", parent_commit=parent)
    assert status(error) == 412
    assert "b.txt" not in hub.files("me/model")


def test_rejects_unknown_token(api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as error:
        HfApi(token="hf_unknown").whoami()
    assert status(error) == 401


def test_rejects_writing_with_reading_token(api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="write token") as error:
        put(HfApi(token=READ), "a.txt", b"1")
    assert status(error) == 403
    HfApi(token=READ).auth_check("me/model")
    with pytest.raises(HfHubHTTPError):
        HfApi(token=READ).auth_check("me/model", write=True)


def test_rejects_another_namespace(api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        HfApi(token=OTHER).create_repo("me/other")
    assert status(error) == 403


def test_hides_private_repository(api: HfApi) -> None:
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=OTHER).repo_info("me/model")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).repo_info("me/model")


def test_rejects_unknown_revision(api: HfApi) -> None:
    with pytest.raises(RevisionNotFoundError):
        api.repo_info("me/model", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        put(api, "a.txt", b"1", revision="v9")


def test_rejects_existing_branch_and_tag(api: HfApi) -> None:
    for make in (lambda: api.create_branch("me/model", branch="b"), lambda: api.create_tag("me/model", tag="t")):
        make()
        with pytest.raises(HfHubHTTPError) as error:
            make()
        assert status(error) == 409
    with pytest.raises(HfHubHTTPError):
        api.delete_branch("me/model", branch="main")


@pytest.mark.parametrize(
    "metadata",
    [
        "license: [unclosed",
        "license: [mit, apache]",
        "model-index:\n- results: []",
        "model-index:\n- name: m\n  results:\n  - dataset: {type: t, name: n}\n    metrics: [{type: bleu, value: 1}]",
        "model-index:\n- name: m\n  results:\n  - task: {type: t}\n    dataset: {type: t, name: n}\n    metrics: []",
    ],
)
def test_rejects_card_metadata(hub: LocalHub, api: HfApi, metadata: str) -> None:
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        put(api, "README.md", f"---\n{metadata}\n---\n".encode())
    assert "README.md" not in hub.files("me/model")


def test_warns_of_missing_card_metadata(api: HfApi) -> None:
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        put(api, "README.md", b"# no metadata\n")


def send_commit(hub: LocalHub, *lines: dict) -> httpx2.Response:
    """Send a commit request that the client would not make."""
    header = {"key": "header", "value": {"summary": "by hand"}}
    body = "\n".join(json.dumps(line) for line in (header, *lines))
    url = f"{hub.url}/api/models/me/model/commit/main"
    return httpx2.post(url, content=body, headers={"Authorization": f"Bearer {os.environ['HF_TOKEN']}"})


@pytest.mark.parametrize(
    ("operation", "code"),
    [
        ({"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}}, 400),
        ({"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "STORED", "size": 3}}, 400),
        ({"key": "file", "value": {"path": "../a.txt", "content": "", "encoding": "base64"}}, 400),
        ({"key": "deletedFile", "value": {"path": "nothing.txt"}}, 404),
        ({"key": "renamedFile", "value": {"path": "a.txt"}}, 400),
    ],
)
def test_rejects_malformed_commit(hub: LocalHub, api: HfApi, operation: dict, code: int) -> None:
    put(api, "model.safetensors", b"weights")
    if operation["value"].get("oid") == "STORED":
        operation["value"]["oid"] = hashlib.sha256(b"weights").hexdigest()
    head = hub.repo("me/model").branches["main"]
    assert send_commit(hub, operation).status_code == code
    assert hub.repo("me/model").branches["main"] == head


def test_rejects_lfs_content_that_is_not_what_was_signed(hub: LocalHub, api: HfApi) -> None:
    oid = hashlib.sha256(b"weights").hexdigest()
    objects = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": 7}]}
    headers = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"}
    batch = httpx2.post(f"{hub.url}/me/model.git/info/lfs/objects/batch", json=objects, headers=headers).json()
    link = batch["objects"][0]["actions"]["upload"]["href"]
    assert httpx2.put(link, content=b"wrong!!").status_code == 400  # another digest
    assert httpx2.put(link, content=b"weight").status_code == 400  # another size
    assert httpx2.put(link.split("?")[0], content=b"weights").status_code == 403  # no signature
    verify = batch["objects"][0]["actions"]["verify"]["href"]
    assert httpx2.post(verify, json={"oid": oid, "size": 7}, headers=headers).status_code == 404
    assert httpx2.put(link, content=b"weights").status_code == 200
    assert httpx2.post(verify, json={"oid": oid, "size": 7}, headers=headers).status_code == 200


@pytest.mark.parametrize("code", [401, 403, 404, 409, 412, 500, 503])
def test_injected_status(hub: LocalHub, api: HfApi, code: int) -> None:
    hub.fail("commit", code)
    with pytest.raises(HfHubHTTPError) as error:
        put(api, "a.txt", b"1")
    assert (status(error), hub.hits["commit"]) == (code, 1)
    put(api, "a.txt", b"1")
    assert hub.files("me/model")["a.txt"] == b"1"


def test_injected_rate_limit_is_waited_out_by_client(hub: LocalHub, api: HfApi) -> None:
    hub.fail("preupload", 429, Retry_After="7")
    put(api, "a.txt", b"1")
    assert [entry for entry in hub.requests if entry[0] == "preupload"] == [("preupload", 429), ("preupload", 200)]


@pytest.mark.parametrize(("how", "landed"), [("cut_request", False), ("cut_reply", True)])
def test_injected_cut_of_commit(hub: LocalHub, api: HfApi, how: str, landed: bool) -> None:
    hub.fail("commit", how)
    with pytest.raises(httpx2.TransportError):
        put(api, "a.txt", b"1")
    assert ("a.txt" in hub.files("me/model")) == landed


def test_injected_cut_of_upload_is_sent_again(hub: LocalHub, api: HfApi) -> None:
    hub.fail("lfs_put", "cut_request", times=2)
    put(api, "model.safetensors", os.urandom(1 << 20))
    assert hub.hits["lfs_put"] == 2


def test_injected_corruption_of_upload_is_noticed(hub: LocalHub, api: HfApi) -> None:
    hub.fail("lfs_put", "corrupt")
    with pytest.raises(RuntimeError, match="Error while uploading") as error:
        put(api, "model.safetensors", b"weights")
    assert isinstance(error.value.__cause__, BadRequestError)


def test_injected_corruption_of_download(hub: LocalHub, api: HfApi) -> None:
    put(api, "a.txt", b"0123456789")
    hub.fail("resolve", "corrupt", times=None)
    assert Path(hf_hub_download("me/model", "a.txt")).read_bytes() == b"01234\x34" + b"6789"


def test_injected_hang(hub: LocalHub, api: HfApi) -> None:
    hub.fail("info", "hang")
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.get(f"{hub.url}/api/models/me/model", timeout=0.2)


def test_runs_by_hand() -> None:
    script = Path(__file__).with_name("local_hub.py")
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split("HF_ENDPOINT=")[1].split()[0]
        assert httpx2.get(f"{url}/api/models/me/model").status_code == 401
    finally:
        process.kill()
        process.wait()
