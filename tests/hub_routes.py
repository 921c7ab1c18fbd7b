"""What the local test Hub answers to each request of the client, and the table of its routes."""

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hub_store import Commit, Refused, Repo, card_errors

if TYPE_CHECKING:
    from local_hub import LocalHub


@dataclass
class Reply:
    """Status, headers and body of an answer."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """What a route's function needs to know of a request."""

    hub: "LocalHub"
    user: str | None
    role: str | None
    path: dict[str, str]
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def repo(self, write: bool = False) -> Repo:
        """Return the repository of the path, if this user may see (or change) it."""
        repo = self.hub.store.repos.get((self.path.get("kind") or "models", self.path["repo"]))
        mine = repo is not None and self.user == repo.id.split("/")[0]
        if repo is None or (repo.private and not mine):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(repo.id)
        return repo

    def may_write(self, repo_id: str) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if self.role != "write":
            raise Refused(403, "you must use a write token to upload to a repository.")
        if repo_id.split("/")[0] != self.user:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{repo_id}"')


def whoami(request: Request) -> Reply:
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    return Reply({"type": "user", "name": request.user, "auth": {"accessToken": {"role": request.role}}, "orgs": []})


def create_repo(request: Request) -> Reply:
    asked = request.json
    repo_id = f"{asked.get('organization') or request.user}/{asked['name']}"
    kind = asked.get("type", "model") + "s"
    url = f"{request.hub.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
    request.may_write(repo_id)
    if (kind, repo_id) in request.hub.store.repos:
        return Reply({"error": f"You already created this repo: {repo_id}", "url": url}, 409)
    request.hub.store.create(kind, repo_id, asked.get("visibility") == "private")
    return Reply({"url": url})


def delete_repo(request: Request) -> Reply:
    asked = request.json
    request.path.update(kind=asked.get("type", "model") + "s", repo=f"{asked['organization']}/{asked['name']}")
    repo = request.repo(write=True)
    del request.hub.store.repos[repo.kind, repo.id]
    return Reply({})


def validate_yaml(request: Request) -> Reply:
    errors, warnings = card_errors(request.json["content"], request.json["repoType"] + "s")
    said = {"errors": [{"message": error} for error in errors], "warnings": [{"message": text} for text in warnings]}
    return Reply(said, 400 if errors else 200)


def auth_check(request: Request) -> Reply:
    request.repo(write="write" in request.path)
    return Reply({})


def preupload(request: Request) -> Reply:
    repo, store = request.repo(write=True), request.hub.store
    files = repo.at(request.path["revision"]).files
    known = {path: blob.sha256 or blob.oid for path, blob in files.items()}
    return Reply(
        {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": store.upload_mode(file["path"], file["size"]),
                    "shouldIgnore": False,
                    "oid": known.get(file["path"]),
                }
                for file in request.json["files"]
            ]
        }
    )


def lfs_batch(request: Request) -> Reply:
    repo, hub = request.repo(write=True), request.hub
    objects = []
    for entry in request.json["objects"]:
        if signature := hub.store.sign(entry["oid"], entry["size"]):
            upload = {"href": f"{hub.url}/lfs-storage/{entry['oid']}?signature={signature}"}
            entry["actions"] = {
                "upload": upload,
                "verify": {"href": f"{hub.url}/{repo.id}.git/info/lfs/objects/verify"},
            }
        objects.append(entry)
    return Reply({"transfer": "basic", "objects": objects})


def lfs_put(request: Request) -> Reply:
    request.hub.store.upload(request.path["oid"], request.query.get("signature", [""])[0], request.body)
    return Reply(b"", headers={"ETag": f'"{request.path["oid"]}"'})


def lfs_verify(request: Request) -> Reply:
    request.hub.store.verify(request.json["oid"], request.json["size"])
    return Reply({})


def commit(request: Request) -> Reply:
    repo = request.repo(write=True)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    made = request.hub.store.commit(repo, request.path["revision"], lines)
    return Reply({"commitUrl": f"{request.hub.url}/{repo.id}/commit/{made.oid}", "commitOid": made.oid})


def change_branch(request: Request) -> Reply:
    repo, name = request.repo(write=True), request.path["name"]
    if request.body:
        if name in repo.branches:
            raise Refused(409, f"Reference already exists: {name}")
        repo.branches[name] = repo.at(request.json.get("startingPoint", "main")).oid
    elif name == "main" or repo.branches.pop(name, None) is None:
        raise Refused(403 if name == "main" else 404, f"cannot delete branch {name}")
    return Reply({})


def change_tag(request: Request) -> Reply:
    repo, name = request.repo(write=True), request.path["name"]
    if request.body:
        if (tag := request.json["tag"]) in repo.tags:
            raise Refused(409, f"Tag reference exists already: {tag}")
        repo.tags[tag] = repo.at(name).oid
    elif repo.tags.pop(name, None) is None:
        raise Refused(404, f"no tag {name}")
    return Reply({})


def refs(request: Request) -> Reply:
    repo = request.repo()

    def listed(names: dict[str, str], where: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": oid} for name, oid in names.items()]

    return Reply({"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []})


def tree(request: Request) -> Reply:
    commit, top = request.repo().at(request.path["revision"]), request.path.get("top", "")
    entries = []
    for path, blob in commit.files.items():
        if top and not path.startswith(top + "/"):
            continue
        lfs = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}} if blob.sha256 else {}
        entries.append({"type": "file", "path": path, "size": blob.size, "oid": blob.oid, **lfs})
    if top and not entries:
        raise Refused(404, f"{top} does not exist", "EntryNotFound")
    return Reply(entries)


def info(request: Request) -> Reply:
    repo = request.repo()
    commit = repo.at(request.path.get("revision", "main"))
    siblings = [{"rfilename": path} for path in commit.files]
    return Reply({"id": repo.id, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings})


def resolve(request: Request) -> Reply:
    commit: Commit = request.repo().at(request.path["revision"])
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if (blob := commit.files.get(request.path["file"])) is None:
        missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return Reply({"error": "Entry not found"}, 404, headers | missing)
    content = request.hub.store.content(blob)
    headers["ETag"] = f'"{blob.oid}"'
    if blob.sha256:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or ""):
        start, end = int(match[1]), min(int(match[2] or blob.size - 1), blob.size - 1)
        if start >= blob.size:
            return Reply(b"", 416, headers | {"Content-Range": f"bytes */{blob.size}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{blob.size}"
        return Reply(content[start : end + 1], 206, headers)
    return Reply(content, 200, headers)


def nothing_here(request: Request) -> Reply:
    raise Refused(404, "Not found")


API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
FILES = r"(?:/(?P<kind>datasets))?/(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    (method, re.compile(pattern), kind, function)
    for method, pattern, kind, function in [
        ("GET", "/api/whoami-v2", "whoami", whoami),
        ("POST", "/api/repos/create", "create", create_repo),
        ("DELETE", "/api/repos/delete", "delete", delete_repo),
        ("POST", "/api/validate-yaml", "validate", validate_yaml),
        ("GET", API + "/auth-check(?:/(?P<write>write))?", "auth", auth_check),
        ("POST", API + "/preupload/(?P<revision>[^/]+)", "preupload", preupload),
        ("POST", FILES + r"\.git/info/lfs/objects/batch", "lfs_batch", lfs_batch),
        ("PUT", "/lfs-storage/(?P<oid>[^/]+)", "lfs_put", lfs_put),
        ("POST", FILES + r"\.git/info/lfs/objects/verify", "lfs_verify", lfs_verify),
        ("POST", API + "/commit/(?P<revision>[^/]+)", "commit", commit),
        ("POST|DELETE", API + "/branch/(?P<name>[^/]+)", "branch", change_branch),
        ("POST|DELETE", API + "/tag/(?P<name>[^/]+)", "tag", change_tag),
        ("GET", API + "/refs", "refs", refs),
        ("GET", API + "/tree/(?P<revision>[^/]+)(?:/(?P<top>.+))?", "tree", tree),
        ("GET", API + "(?:/revision/(?P<revision>[^/]+))?", "info", info),
        ("GET|HEAD", FILES + "/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve", resolve),
        ("GET|HEAD|POST|PUT|DELETE", ".*", "other", nothing_here),
    ]
]
KINDS = {kind for _, _, kind, _ in ROUTES}
