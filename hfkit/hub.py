"""Writing to the Hub and reading checkpoints back, so that nothing half-finished is ever seen.

A branch changes in one commit or not at all: files are compared with the remote listing first, so that repeating a push
sends only what is missing, and a commit whose reply was lost is recognised as one that landed.
"""

import fnmatch
import os
import re
import shutil
import sys
import threading
import uuid
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.hf_api import RepoFile

from hfkit.checkpoint import read_checkpoint, set_aside, step_folder
from hfkit.files import digest, sync
from hfkit.remote import HubError, call, find_status, git_digest
from hfkit.settings import BadInput, HubConfig

STATE_FOLDER = "checkpoint"  # of a step's branch; holds the training state beside the model
TEXT_FILES = ("train-*.parquet", "validation.parquet", "test.parquet")  # of a prepared corpus
# An earlier push may have left these; kept, they could be loaded in place of the new ones. All other files stay.
REPLACED = (
    "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "generation_config.json", "samples.jsonl", "predictions.jsonl",
    *TEXT_FILES, f"{STATE_FOLDER}/*",
)  # fmt: skip


class OtherWriter(HubError):
    """Somebody else committed to the branch since this run did."""


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    revision: str = "main",
    start: str = "main",
    message: str,
    repo_type: str = "model",
    parent: str | None = None,
    stopped: threading.Event | None = None,
) -> str:
    """Bring a branch to the content of ``folder`` in at most one commit; return the id of the branch's head then.

    Repeating it is harmless: what is there already is not sent, and with nothing to change there is no commit.

    Args:
        start: Revision that the branch begins from if it does not exist.
        parent: Commit that must be the head of the branch; None takes the one that is.

    Raises:
        OtherWriter: if the head is not ``parent``, and not what is to be pushed either.
        HubError: if it failed for good.
    """
    where = {"revision": revision, "repo_type": repo_type}
    if revision != "main":
        api = HfApi()
        call(
            lambda: api.create_branch(repo_id, branch=revision, revision=start, repo_type=repo_type, exist_ok=True),
            stopped,
        )
    expected = parent or call(lambda: find_head(repo_id, **where), stopped)
    try:
        return call(lambda: _push_once(folder, repo_id, message, expected, **where), stopped)
    except HubError as error:
        if find_status(error) == 412:
            raise OtherWriter(f"somebody else is changing {revision} of {repo_id}; nothing was overwritten") from error
        raise


def find_head(repo_id: str, revision: str, repo_type: str) -> str:
    """Return the id of the commit that a branch is at."""
    return str(HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type).sha)


def _push_once(folder: Path, repo_id: str, message: str, parent: str, revision: str, repo_type: str) -> str:
    """Commit what differs between a branch and ``folder``, if anything does; return the id of the head then."""
    api, head = HfApi(), find_head(repo_id, revision, repo_type)
    local = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    entries = api.list_repo_tree(repo_id, recursive=True, revision=head, repo_type=repo_type)
    remote = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    changed = [name for name, path in local.items() if name not in remote or not is_same(path, remote[name])]
    stale = [name for name in remote if name not in local and is_replaced(name)]
    if not changed and not stale:  # also after a commit whose reply was lost
        return head
    if head != parent:
        raise OtherWriter(f"somebody else changed {revision} of {repo_id} ({head[:8]}); nothing was overwritten")
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=local[name]) for name in changed]
    for addition in additions:
        if addition.path_in_repo.endswith(".safetensors"):
            # One by one: the client's thread pool would keep the process from ending while the Hub hangs.
            api.preupload_lfs_files(
                repo_id, [addition], revision=revision, repo_type=repo_type, num_threads=1, free_memory=False
            )
    made = api.create_commit(
        repo_id,
        [*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
        commit_message=message,
        revision=revision,
        repo_type=repo_type,
        parent_commit=head,
        num_threads=1,
    )
    return str(made.oid)


def is_same(path: Path, remote: RepoFile) -> bool:
    """Return whether a local file has the content that the Hub lists: by SHA-256, or by git's id for small files."""
    if path.stat().st_size != remote.size:
        return False
    return digest(path) == remote.lfs.sha256 if remote.lfs else git_digest(path) == remote.blob_id


def is_replaced(name: str) -> bool:
    """Return whether a remote file that is not in a push is deleted by it.

    Example:
        >>> [is_replaced(name) for name in ("model-00001-of-00002.safetensors", "images/tokenizer.png", "notes.md")]
        [True, False, False]
    """
    return any(fnmatch.fnmatchcase(name, form) and name.count("/") == form.count("/") for form in REPLACED)


def download_checkpoint(config: HubConfig, root: Path, after: int = -1) -> Path:
    """Fetch the newest whole checkpoint of `hub.repo_id`, or that of `hub.revision`, into ``root``; return its folder.

    A checkpoint that does not match its manifest is fetched once more, then named, and the one before it is taken.

    Args:
        after: Step that is here already: only later ones are wanted.

    Raises:
        BadInput: if the repository holds none.
        HubError: if the Hub cannot be reached.
    """
    if config.repo_id is None:
        raise BadInput("--resume hub needs --hub.repo_id")
    repo_id, api = config.repo_id, HfApi()
    if config.revision is not None:
        names = [config.revision]
    else:
        branches = [branch.name for branch in call(lambda: api.list_repo_refs(repo_id)).branches]
        steps = {int(name[5:]): name for name in branches if re.fullmatch(r"step-\d{8,}", name)}
        names = [steps[step] for step in sorted(steps, reverse=True) if step > after]
    for name in names:
        if found := _download_step(repo_id, name, root):
            return found
    raise BadInput(
        f"{repo_id} holds no whole checkpoint"
        + (f" at {config.revision}" if config.revision else "")
        + "; runs put them there with --hub.include_checkpoints true"
    )


def _download_step(repo_id: str, name: str, root: Path) -> Path | None:
    """Return the verified checkpoint of one branch, moved into ``root``; None if there is none or it is damaged."""
    temporary = root / f".tmp-{name}-{uuid.uuid4().hex[:8]}"
    state = temporary / STATE_FOLDER
    try:
        for attempt in range(2):
            call(
                lambda again=attempt > 0: snapshot_download(  # type: ignore[misc]
                    repo_id,
                    revision=name,
                    allow_patterns=f"{STATE_FOLDER}/*",
                    local_dir=temporary,
                    force_download=again,
                )
            )
            try:
                step = int(read_checkpoint(state)["step"])
            except BadInput as error:
                problem = error
                continue
            final = root / step_folder(step)
            if final.exists():
                set_aside(final)
            os.replace(state, final)
            sync(root)
            return final
        if state.exists():
            print(f"warning: {repo_id} at {name}: {problem}; using the checkpoint before it", file=sys.stderr)
        return None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
