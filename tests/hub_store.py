"""Repositories of the local test Hub: commits, branches, tags and files, with the checks that the real Hub makes.

Nothing here speaks HTTP. A refusal is a `Refused` with the status and the headers by which the client tells
the reasons apart.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

REGULAR_LIMIT = 10_000_000  # bytes; larger files must go through LFS
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.npy", "*.parquet", "*.arrow", "*.zst", "*.gz", "*.msgpack")
REPO_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w][\w.-]{0,95}")


class Refused(Exception):
    """A request that the Hub turns down."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Blob:
    """One version of a file: its git id, and for LFS files the SHA-256 of the content."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """One model or dataset repository with its whole history."""

    kind: str
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def add(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        facts = [self.id, parent, title, sorted((path, blob.oid) for path, blob in files.items()), len(self.commits)]
        commit = Commit(hashlib.sha1(json.dumps(facts).encode()).hexdigest(), parent, title, files)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit


class Store:
    """All repositories; file contents lie in `folder`, one file per content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lock = threading.RLock()
        self.signatures: dict[str, tuple[str, int]] = {}  # of upload links handed out: (sha256, size)
        folder.mkdir(parents=True, exist_ok=True)

    def create(self, kind: str, repo_id: str, private: bool) -> Repo:
        if not REPO_NAME.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id:
            raise Refused(400, f"Invalid repo name: {repo_id}")
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
        repo.add("main", "initial commit", {".gitattributes": self.keep(attributes)})
        return repo

    def keep(self, content: bytes) -> Blob:
        """Store a regular file."""
        oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        (self.folder / oid).write_bytes(content)
        return Blob(oid, len(content))

    def content(self, blob: Blob) -> bytes:
        return (self.folder / (blob.sha256 or blob.oid)).read_bytes()

    def upload_mode(self, path: str, size: int) -> str:
        large = size > REGULAR_LIMIT or any(fnmatch(PurePosixPath(path).name, pattern) for pattern in LFS_PATTERNS)
        return "lfs" if large else "regular"

    def sign(self, sha256: str, size: int) -> str | None:
        """Return the signature of an upload link, or None where the content is here already."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise Refused(422, "oid is not a SHA-256")
        if (self.folder / sha256).exists():
            return None
        signature = secrets.token_hex(8)
        self.signatures[signature] = sha256, size
        return signature

    def upload(self, sha256: str, signature: str, content: bytes) -> None:
        """Take an LFS object as the object storage does: by signed link, with its length and digest checked."""
        if self.signatures.get(signature, ("", 0))[0] != sha256:
            raise Refused(403, "SignatureDoesNotMatch")
        if len(content) != self.signatures[signature][1]:
            raise Refused(400, "EntityTooSmall or EntityTooLarge: the size is not the signed one")
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(400, "BadDigest: the content does not have the signed SHA-256")
        part = self.folder / f"{sha256}.{signature}"
        part.write_bytes(content)
        part.replace(self.folder / sha256)

    def verify(self, sha256: str, size: int) -> None:
        path = self.folder / sha256
        if not path.exists() or path.stat().st_size != size:
            raise Refused(404, "LFS object not found or of another size")

    def commit(self, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> Commit:
        """Apply the lines of a commit request, all or nothing."""
        if branch not in repo.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header = lines[0]["value"]
        if not header.get("summary"):
            raise Refused(400, "a commit needs a summary")
        head = repo.at(branch)
        if header.get("parentCommit", head.oid) != head.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            self._apply(repo, files, line["key"], line["value"])
        return repo.add(branch, header["summary"], files)

    def _apply(self, repo: Repo, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/") or ".git" in path.split("/"):
            raise Refused(400, f"Invalid path: {path}")
        if key == "file":
            content = base64.b64decode(value["content"], validate=True)
            if len(content) > REGULAR_LIMIT:
                raise Refused(413, f"{path} is larger than 10 MB: use LFS")
            if path == "README.md" and (errors := card_errors(content.decode(), repo.kind)[0]):
                raise Refused(400, errors[0])
            files[path] = self.keep(content)
        elif key == "lfsFile":
            self._check_object(path, value)
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {value['size']}\n"
            oid = hashlib.sha1(f"blob {len(pointer)}\0{pointer}".encode()).hexdigest()
            files[path] = Blob(oid, value["size"], value["oid"])
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        else:
            raise Refused(400, f"Unknown operation {key}")

    def _check_object(self, path: str, value: dict[str, Any]) -> None:
        stored = self.folder / value["oid"]
        if value.get("algo") != "sha256" or not stored.exists():
            raise Refused(400, f"LFS pointer of {path} points to an object that was not uploaded")
        if stored.stat().st_size != value["size"]:
            raise Refused(400, f"LFS pointer of {path} has the wrong size")


def card_errors(content: str, kind: str) -> tuple[list[str], list[str]]:
    """Return (errors, warnings) of a README.md's metadata, as the Hub's validator reports them."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?(\n|$)", content, re.DOTALL)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {str(error).splitlines()[0]}"], []
    if not isinstance(metadata, dict):
        return ["metadata must be a mapping"], []
    errors = []
    types = {"license": (str,), "language": (str, list), "tags": (list,), "datasets": (str, list)}
    for name, kinds in types.items():
        if name in metadata and not isinstance(metadata[name], kinds):
            errors.append(f'"{name}" has the wrong type')
    if kind == "models":
        errors += [error for entry in metadata.get("model-index", []) for error in _result_errors(entry)]
    return errors, []


def _result_errors(entry: Any) -> list[str]:
    if not isinstance(entry, dict) or not entry.get("name"):
        return ['"model-index[0].name" is required']
    errors = []
    for result in entry.get("results", []):
        errors += [f'"{key}.type" is required' for key in ("task", "dataset") if not result.get(key, {}).get("type")]
        errors += ['"dataset.name" is required'] * (not result.get("dataset", {}).get("name"))
        metrics = result.get("metrics", [])
        errors += ['"metrics" is required'] * (not metrics)
        errors += ['"metrics" need type and value' for metric in metrics if not {"type", "value"} <= set(metric)]
    return errors
