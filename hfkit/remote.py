"""Talking to the Hub: sign-in, time limits, repeated tries, errors as one line, and models that arrive whole.

The installed client waits for ever for an answer, sends a commit once, and checks a download's size but not its
digest; `call` and `resolve_folder` add what is missing. It reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is
imported.
"""

import email.utils
import functools
import hashlib
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token, logging, set_client_factory, snapshot_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory

from hfkit.files import digest
from hfkit.settings import BadInput, RepositoryConfig

TIMEOUT = 120.0  # seconds of silence after which a request counts as lost
CONNECT_TIMEOUT = 10.0  # seconds; a cluster's nodes without a way out swallow what is sent
TRIES = 6  # with the waits below, half a minute, and a minute at worst
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds
LONGEST_RETRY_AFTER = 300.0  # seconds; a server that asks for more is down for this run
TRANSIENT = {408, 429}
OTHER_FRAMEWORKS = ["*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf", "onnx/*", "original/*", "checkpoint/*"]
T = TypeVar("T")


class HubError(RuntimeError):
    """The Hub refused or could not be reached; the message is one line without credentials."""


@functools.cache
def set_up_client() -> None:
    """Let every request give up after `TIMEOUT` seconds of silence, also where the client asks to wait for ever."""
    logging.set_verbosity_error()  # its warnings hold signed links

    def limit(request: Any) -> None:
        limits = {"connect": min(CONNECT_TIMEOUT, TIMEOUT), "read": TIMEOUT, "write": TIMEOUT, "pool": TIMEOUT}
        asked = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {key: asked.get(key) or limit for key, limit in limits.items()}

    def build() -> Any:
        client = default_client_factory()
        client.event_hooks = {"request": [*client.event_hooks["request"], limit]}
        return client

    set_client_factory(build)


def call(action: Callable[[], T], stopped: threading.Event | None = None, tries: int | None = None) -> T:
    """Return ``action()``, tried again with growing, random waits while its error may pass.

    Lost connections, 408, 429 and 5xx may pass, and so may a file that arrived damaged. ``action`` must be safe to
    repeat, also when it succeeded and only its reply was lost.

    Raises:
        HubError: when the error will not pass, the tries are used up, or ``stopped`` is set.
    """
    set_up_client()
    stopped, tries = stopped or threading.Event(), tries or TRIES
    for attempt in range(tries):
        try:
            return action()
        except (HTTPError, RuntimeError, ValueError, OSError) as error:
            if isinstance(error, (HubError, BadInput)):
                raise
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.5)
            wait = max(wait, retry_after(error))
            last = attempt == tries - 1
            if last or not may_pass(error) or wait > LONGEST_RETRY_AFTER or stopped.wait(wait):
                raise HubError(explain(error)) from error
    raise AssertionError("unreachable")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def find_status(error: BaseException) -> int | None:
    """Return the HTTP status at the root of an error, if it is one."""
    return next((cause.response.status_code for cause in causes(error) if isinstance(cause, HfHubHTTPError)), None)


def retry_after(error: BaseException) -> float:
    """Return the seconds that the server asked to wait, 0 where it did not."""
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError):
            asked = cause.response.headers.get("Retry-After", "")
            if asked.isdigit():
                return float(asked)
            date = email.utils.parsedate_tz(asked)  # the other form that HTTP allows (RFC 9110, section 10.2.3)
            return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0
    return 0.0


def may_pass(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    status = find_status(error)
    if status is None:  # the connection failed, not the Hub
        return any(isinstance(cause, (HTTPError, ConnectionError)) for cause in causes(error)) and not is_offline_mode()
    uploading = not isinstance(error, HfHubHTTPError)  # the client wraps what happens while it sends a large file
    return status in TRANSIENT or status >= 500 or (uploading and status == 400)  # 400: the digest did not match


def explain(error: BaseException) -> str:
    """Return one line that says what went wrong, without credentials."""
    if isinstance(error, HubError):
        return str(error)
    status = find_status(error)
    if status is None:
        root = [*causes(error)][-1]
        text = f"{type(root).__name__}: {root}"
    else:
        cause = next(cause for cause in causes(error) if isinstance(cause, HfHubHTTPError))
        said = cause.server_message or cause.response.headers.get("X-Error-Message") or cause.response.reason_phrase
        text = f"HTTP {status}: {said}"
    if token := get_token():
        text = text.replace(token, "***")
    return " ".join(text.split())[:500]


def check_access(config: RepositoryConfig, repo_type: str = "model") -> None:
    """Make sure, before any work, that `hub.repo_id` can be written: sign-in, permission, repository (made if missing).

    An unreachable Hub is only a warning, unless `hub.required`.

    Raises:
        BadInput: if the token is missing or refused, or may not write there.
        HubError: if `hub.required` and the Hub cannot be reached.
    """
    if config.repo_id is None:
        return
    if is_offline_mode():
        raise BadInput("hub.repo_id is set, but HF_HUB_OFFLINE forbids to use the Hub; unset one of them")
    if get_token() is None:
        raise BadInput("hub.repo_id needs a Hub token that may write: set HF_TOKEN or run `hf auth login`")
    repo_id, api = config.repo_id, HfApi()
    try:
        role = call(lambda: api.whoami(), tries=3).get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise BadInput(
                "the Hub token may only read: make one that may write at https://huggingface.co/settings/tokens"
            )
        call(lambda: api.create_repo(repo_id, private=config.private, repo_type=repo_type, exist_ok=True), tries=3)
        call(lambda: api.auth_check(repo_id, repo_type=repo_type, write=True), tries=3)
    except HubError as error:
        status = find_status(error)
        if status == 401:
            raise BadInput(f"the Hub refuses the token (HF_TOKEN or `hf auth login`): {error}") from error
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            raise BadInput(f"no permission to write to hub.repo_id {repo_id}: {error}") from error
        if config.required:
            raise HubError(f"hub.required is set and the Hub cannot be reached: {error}") from error
        print(
            f"warning: the Hub cannot be reached now ({error}); the work goes on, pushes are tried later",
            file=sys.stderr,
        )


def resolve_model(path: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a model: ``path`` itself, or the local copy of what the Hub has under that id.

    Raises:
        BadInput: if there is neither such a folder nor such a repository, if it holds no model, or if the Hub cannot
            be reached.
    """
    folder = resolve_folder(path, revision)
    if not (folder / "config.json").exists():
        raise BadInput(f"{path} holds no config.json, so it is not a model")
    return folder


def resolve_folder(path: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """Return ``path`` if it is a folder, or the local copy of the model repository with that id on the Hub.

    Offline mode is respected: then only what was downloaded before is found. Files are checked against the digests
    under which the Hub lists them. Nothing of what is downloaded is run.

    Args:
        revision: Branch, tag or commit; None is the head of main. A process sees one commit of it, whatever is pushed
            meanwhile.
        weights: Whether the weights are wanted; a tokenizer comes without.

    Raises:
        BadInput: if there is neither such a folder nor such a repository, or the Hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise BadInput(f"{path} is a folder, so a revision ({revision}) means nothing; drop it or give a Hub id")
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path), re.ASCII):
        raise BadInput(f"{path}: no such folder, and not a Hub id (name/model)")
    try:  # few tries: someone waits, perhaps for a misspelt folder
        return call(lambda: _download(str(path), revision, weights), tries=3)
    except HubError as error:
        raise BadInput(_why_not_found(str(path), revision, error)) from error


def describe_model(path: str | None, revision: str | None = None) -> dict[str, str]:
    """Return id and commit of the model on the Hub that a run begins from; nothing where it is a folder or none."""
    if path is None or Path(path).expanduser().is_dir():
        return {}
    return {"id": path, "revision": resolve_folder(path, revision).name}  # the client's cache names it by its commit


@functools.cache
def _download(repo_id: str, revision: str | None, weights: bool) -> Path:
    """Fetch the files that transformers needs; pickled weights only where there are no safetensors."""
    pickles = ["*.bin", "*.pt", "*.pth"]
    ignored = [*OTHER_FRAMEWORKS, *pickles, *([] if weights else ["*.safetensors"])]
    folder = Path(snapshot_download(repo_id, revision=revision, ignore_patterns=ignored))
    if weights and not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(repo_id, revision=revision, ignore_patterns=OTHER_FRAMEWORKS))
    if damaged := damaged_files(folder):
        for file in damaged:
            file.resolve().unlink()  # the next try fetches it again
        raise ConnectionError(f"{damaged[0].name} arrived damaged")
    return folder


def _why_not_found(path: str, revision: str | None, error: HubError) -> str:
    """Return what a user understands of a model that could not be fetched."""
    cause = error.__cause__
    if isinstance(cause, RepositoryNotFoundError):
        return f"{path} is neither a folder nor a repository on the Hub that you may read (private ones need HF_TOKEN)"
    if isinstance(cause, RevisionNotFoundError):
        return f"{path} has no revision {revision!r} on the Hub"
    if isinstance(cause, LocalEntryNotFoundError) and is_offline_mode():
        return f"{path} is not a folder, was not downloaded before, and HF_HUB_OFFLINE forbids to ask the Hub"
    return f"{path} is not a folder and cannot be fetched from the Hub: {error}"


def damaged_files(folder: Path) -> list[Path]:
    """Return the files of a snapshot in the client's cache whose content is not what their name there promises.

    The cache keeps a file under the id by which the Hub lists it, SHA-256 or git's, and links to it; where the file
    system has no symbolic links, nothing is checked.
    """
    digests = {64: digest, 40: git_digest}
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    named = [path for path in links if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", path.resolve().name)]
    return [path for path in named if digests[len(path.resolve().name)](path) != path.resolve().name]


def git_digest(path: Path) -> str:
    """Return the id that git gives a file's content."""
    sha = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    sha.update(path.read_bytes())
    return sha.hexdigest()
