"""A hub on this machine, with the endpoints that huggingface_hub uses, that fails as it is told."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from streammerge.storage.hub import HubStorage
from streammerge.storage.places import Places

LFS = (".safetensors", "tokenizer.json")


@dataclass
class Seen:
    """One request, and how many bytes of body were sent."""

    method: str
    path: str
    range: str | None
    authorized: bool
    sent: int = 0


@dataclass
class Hub:
    """Models by name, each revision a commit and its files.

    faults  what happens to requests whose method and path a pattern finds, one after another:
            a number is a status; "drop" cuts the body in the middle; "short" announces fewer bytes; "longer" more;
            "deaf" knows no ranges
    gates   files that are sent whole only once their event is set; ranges of them are not held back
    """

    url: str = ""
    other: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    listing: Any = None
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    gates: dict[str, threading.Event] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def push(self, repo: str, files: Mapping[str, bytes] | Path, revision: str = "main") -> str:
        """A commit, and a branch or tag that names it from now on."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in sorted(files.iterdir())}
        digest = hashlib.sha1(repr(sorted((n, oid_of(n, d)) for n, d in files.items())).encode()).hexdigest()
        self.commits.setdefault(repo, {})[digest] = dict(files)
        self.revisions.setdefault(repo, {})[revision] = digest
        return digest

    def got(self, name: str) -> list[Seen]:
        """The requests for the content of files whose path ends so."""
        return [seen for seen in self.seen if seen.method == "GET" and seen.path.endswith(name)]

    @property
    def sent_bytes(self) -> int:
        return sum(seen.sent for seen in self.seen)

    def fault(self, method: str, path: str) -> int | str | None:
        with self.lock:
            for pattern, faults in self.faults.items():
                if faults and re.search(pattern, f"{method} {path}"):
                    return faults.pop(0)
        return None


def oid_of(name: str, data: bytes) -> str:
    if name.endswith(LFS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    # large files are on another host there too: huggingface_hub tells hosts apart by name
    hub.url, hub.other = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        for gate in hub.gates.values():
            gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            self.note = Seen(self.command, path, self.headers.get("Range"), "Authorization" in self.headers)
            with hub.lock:
                hub.seen.append(self.note)
            self.trouble = hub.fault(self.command, path)
            if isinstance(self.trouble, int):
                self.reply(self.trouble, b"{}", {"X-Error-Code": "GatedRepo"} if self.trouble == 403 else {})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
                self.info(*found.groups())
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.resolve(*found.groups())
            elif found := re.fullmatch(r"/elsewhere/([^/]+/[^/]+)/([^/]+)/(.+)", path):
                self.content(*found.groups())
            else:
                self.reply(404, b"{}")

        def commit(self, repo: str, revision: str) -> str | None:
            if repo not in hub.commits:
                self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})
                return None
            commit = hub.revisions[repo].get(revision, revision)
            if commit not in hub.commits[repo]:
                self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return None
            return commit

        def info(self, repo: str, revision: str) -> None:
            if commit := self.commit(repo, revision):
                listing = hub.listing
                if listing is None:
                    listing = [entry(name, data) for name, data in hub.commits[repo][commit].items()]
                self.reply(200, json.dumps({"id": repo, "sha": commit, "siblings": listing}).encode())

        def resolve(self, repo: str, revision: str, name: str) -> None:
            commit = self.commit(repo, revision)
            if commit is None:
                return
            data = hub.commits[repo][commit].get(name)
            if data is None:
                self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                return
            facts = {"X-Repo-Commit": commit, "ETag": f'"{oid_of(name, data)}"'}
            if name.endswith(LFS):
                facts |= {"X-Linked-Etag": facts["ETag"], "X-Linked-Size": str(len(data))}
                facts["Location"] = f"{hub.other}/elsewhere/{repo}/{commit}/{name}"
                self.reply(302, b"", facts)
            else:
                self.send(data, facts)

        def content(self, repo: str, commit: str, name: str) -> None:
            if name in hub.gates and "Range" not in self.headers:
                hub.gates[name].wait(30)
            self.send(hub.commits[repo][commit][name], {"ETag": f'"{oid_of(name, hub.commits[repo][commit][name])}"'})

        def send(self, data: bytes, facts: Mapping[str, str]) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked is None or self.trouble == "deaf":
                self.reply(200, data, facts)
                return
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            self.reply(206, data[first : last + 1], {**facts, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

        def reply(self, status: int, body: bytes, facts: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (facts or {}).items():
                self.send_header(name, value)
            body = {"short": body[:-8], "longer": body + bytes(8)}.get(str(self.trouble), body)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            part = body[: len(body) // 2] if self.trouble == "drop" else body
            for start in range(0, len(part), 1 << 16):
                try:
                    self.wfile.write(part[start : start + (1 << 16)])
                except OSError:
                    # who asked has enough
                    self.close_connection = True
                    return
                self.note.sent += len(part[start : start + (1 << 16)])
            if len(part) < len(body):
                self.close_connection = True

    return Handler


def entry(name: str, data: bytes) -> dict[str, object]:
    """A file as the hub lists it."""
    listed: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": oid_of("", data)}
    if name.endswith(LFS):
        listed["lfs"] = {"sha256": oid_of(name, data), "size": len(data), "pointerSize": 134}
    return listed


def places_of(hub: Hub, tmp_path: Path) -> Places:
    """A storage that knows this server for the hub, with a cache of its own."""
    places = Places()
    places._storages["hub"] = HubStorage(endpoint=hub.url, cache=str(tmp_path / "hub-cache"), retry_seconds=(0.01,))
    return places
