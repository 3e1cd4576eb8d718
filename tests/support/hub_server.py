"""A Hub on loopback: the parts of its HTTP interface that huggingface_hub and yarn-edge use, with faults on demand.

`python -m support.hub_server ROOT --rate 100e6` serves ROOT/ORG/NAME/… for measurements; tests run it in a thread.
Large files are "LFS": their address redirects to /cdn/…, as the Hub redirects to its storage.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
_STEP = 1 << 18


@dataclass
class Faults:
    """What goes wrong. cuts: how many bytes each of the next answers from the storage has before it breaks off. statuses: answers to
    the next requests, any of them (0: as it should be). wrong: a file name -> the hash to state. lying: storage paths whose bytes
    are changed. rate: bytes per second of all answers together; slow_start_s: before each answer. token: required."""

    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    retry_after: str = ""
    wrong: dict[str, str] = field(default_factory=dict)
    lying: set[str] = field(default_factory=set)
    rate: float = 0.0
    slow_start_s: float = 0.0
    token: str = ""
    gated: bool = False
    down_after: int | None = None  # bytes from the storage in all, then every connection is closed
    stall_after: int | None = None  # the same, then nothing comes any more
    no_ranges: bool = False


@lru_cache(maxsize=256)
def _hashes(path: Path, _mtime_ns: int, size: int) -> tuple[str, str]:
    sha, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            sha.update(part)
            git.update(part)
    return sha.hexdigest(), git.hexdigest()


def hashes_of(path: Path) -> tuple[str, str]:
    """(SHA-256, git's SHA-1) of a file."""
    state = path.stat()
    return _hashes(path, state.st_mtime_ns, state.st_size)


class Hub(ThreadingHTTPServer):
    """The server. root: folders ORG/NAME. requests: (method, path, Range, Authorization) of what was asked. commits: what was put."""

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.root = root
        self.faults = Faults()
        self.requests: list[tuple[str, str, str, str]] = []
        self.commits: list[list[dict[str, Any]]] = []
        self.uploads: dict[str, bytes] = {}
        self.sent = 0
        self.lock = threading.Lock()
        self._due = time.monotonic()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def pace(self, n: int) -> None:
        """Wait so long that all answers together keep to the rate."""
        if not self.faults.rate:
            return
        with self.lock:
            self._due = max(self._due, time.monotonic() - 0.02) + n / self.faults.rate
            wait = self._due - time.monotonic()
        if wait > 0:
            time.sleep(wait)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no news."""


def _tree_entry(sibling: dict[str, Any]) -> dict[str, Any]:
    """A file as the list of a folder has it."""
    entry = {"type": "file", "path": sibling["rfilename"], "oid": sibling["blobId"], "size": sibling["size"]}
    lfs = sibling.get("lfs")
    return {**entry, "lfs": {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 130}} if lfs else entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_args: Any) -> None: ...

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _refused(self, parts: list[str]) -> bool:
        faults = self.server.faults
        with self.server.lock:
            self.server.requests.append(
                (self.command, self.path, self.headers.get("Range", ""), self.headers.get("Authorization", ""))
            )
            status = faults.statuses.pop(0) if faults.statuses else 0
        if status:
            self._answer(status, **({"Retry_After": faults.retry_after} if faults.retry_after else {}))
        elif faults.down_after is not None and self.server.sent >= faults.down_after:
            self.close_connection = True
            self.connection.close()
        elif faults.gated:
            self._answer(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
        elif faults.token and parts[0] != "cdn" and self.headers.get("Authorization") != f"Bearer {faults.token}":
            self._answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Invalid credentials")
        else:
            return False
        return True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self._refused(parts):
            return
        if parts[:2] == ["api", "models"]:
            self._listing("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "cdn":
            self._bytes(self.server.root.joinpath(*parts[1:]))
        elif parts[2:3] == ["resolve"]:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._answer(404)

    def _folder(self, repo: str, revision: str) -> Path | None:
        folder = self.server.root / repo
        if not folder.is_dir():
            self._answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif revision not in ("main", COMMIT):
            self._answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="no such revision")
        else:
            return folder
        return None

    def _listing(self, repo: str, rest: list[str]) -> None:
        """The files of a repository: of …/revision/REV in one object, of …/tree/REV as a list."""
        folder = self._folder(repo, rest[1] if rest else "main")
        if folder is None:
            return
        siblings = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name, size = path.relative_to(folder).as_posix(), path.stat().st_size
            sha, git = hashes_of(path)
            entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": self.server.faults.wrong.get(name, git)}
            if name.endswith(LFS_SUFFIXES):
                stated = self.server.faults.wrong.get(name, sha)
                entry["lfs"] = {"sha256": stated, "size": size, "pointerSize": 130}
            siblings.append(entry)
        if rest[:1] == ["tree"]:
            self._json([_tree_entry(sibling) for sibling in siblings])
            return
        self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        folder = self._folder(repo, revision)
        if folder is None:
            return
        path = folder / name
        if not path.is_file():
            self._answer(404, X_Error_Code="EntryNotFound", X_Error_Message="no such entry", X_Repo_Commit=COMMIT)
            return
        sha, git = hashes_of(path)
        if name.endswith(LFS_SUFFIXES):
            where = (
                f"http://localhost:{self.server.server_address[1]}/cdn/{repo}/{name}"  # another host, without the token
            )
            size = str(path.stat().st_size)
            self._answer(
                302, Location=where, X_Repo_Commit=COMMIT, X_Linked_Etag=f'"{sha}"', X_Linked_Size=size, ETag='"x"'
            )
        else:
            self._bytes(path, git)

    def _bytes(self, path: Path, etag: str = "cdn") -> None:
        faults, size = self.server.faults, path.stat().st_size
        begin, end, status = 0, size, 200
        if self.headers.get("Range") and not faults.no_ranges:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            begin, end, status = int(first), min(size, int(last) + 1 if last else size), 206
        time.sleep(faults.slow_start_s)
        self.send_response(status)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        stored = etag == "cdn"
        with self.server.lock:
            cut = faults.cuts.pop(0) if stored and faults.cuts else None
        with path.open("rb") as file:
            file.seek(begin)
            while begin < end:
                data = file.read(min(_STEP, end - begin, *([cut] if cut is not None else [])))
                if not data:
                    break
                if stored and path.name in faults.lying:
                    data = bytes([data[0] ^ 1]) + data[1:]
                self.server.pace(len(data))
                while faults.stall_after is not None and stored and self.server.sent >= faults.stall_after:
                    time.sleep(0.02)
                self.wfile.write(data)
                begin += len(data)
                cut = None if cut is None else cut - len(data)
                if stored:
                    with self.server.lock:
                        self.server.sent += len(data)
                if stored and faults.down_after is not None and self.server.sent >= faults.down_after:
                    break
        if begin < end:
            self.close_connection = True
            self.connection.close()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path).path.strip("/").split("/")
        if self._refused(parts):
            return
        if parts == ["api", "repos", "create"]:
            made = json.loads(body)
            repo = f"{made['organization']}/{made['name']}" if made.get("organization") else made["name"]
            self._json({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})
        elif parts[4:5] == ["preupload"]:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular"}
                for f in files
            ]
            self._json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif parts[-1] == "batch":
            objects = json.loads(body)["objects"]
            put = f"{self.server.url}/put"
            actions = [{**o, "actions": {"upload": {"href": f"{put}/{o['oid']}"}}} for o in objects]
            self._json({"transfer": "basic", "objects": actions})
        elif parts[4:5] == ["commit"]:
            self.server.commits.append([json.loads(line) for line in body.splitlines() if line])
            self._json(
                {
                    "commitUrl": f"{self.server.url}/{'/'.join(parts[2:4])}/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "hookOutput": "",
                }
            )
        else:
            self._json({"message": "ok"})

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def do_PUT(self) -> None:
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = b"".join(self._chunks()) if chunked else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._refused(["put"]):
            return
        self.server.uploads[self.path.rpartition("/")[2]] = body
        self._answer(200)


def committed(commit: list[dict[str, Any]], path: str) -> bytes | str:
    """What a commit put under `path`: the bytes of a small file, the SHA-256 of a large one."""
    for line in commit:
        value = line["value"]
        if line["key"] == "file" and value["path"] == path:
            return base64.b64decode(value["content"])
        if line["key"] == "lfsFile" and value["path"] == path:
            return str(value["oid"])
    raise KeyError(path)


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A server in a thread of this process."""
    with Hub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve ROOT/ORG/NAME as a Hub on loopback.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--rate", type=float, default=0.0, help="bytes per second")
    parser.add_argument("--down-after", type=int, help="bytes, then every connection is closed")
    args = parser.parse_args()
    with Hub(args.root.resolve(), args.port) as hub:
        hub.faults.rate, hub.faults.down_after = args.rate, args.down_after
        for path in hub.root.rglob("*"):
            if path.is_file():
                hashes_of(path)
        run: Callable[[], None] = hub.serve_forever
        run()


if __name__ == "__main__":
    main()
