"""Models behind a URL, served by an object store on this machine that fails as it is told."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

import streammerge
from streammerge.errors import CheckpointError
from streammerge.storage import remote as remote_module
from streammerge.storage.remote import RemoteStorage
from tests.models import recipe_of

pytest.importorskip("obstore")


class Bucket:
    """Objects by key; `status` answers what a path holds with a number."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.status: dict[str, int] = {}
        self.sent_bytes = 0

    def push(self, prefix: str, folder: Path) -> str:
        for path in folder.iterdir():
            self.objects[f"{prefix}/{path.name}"] = path.read_bytes()
        return f"s3://bucket/{prefix}"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    found = Bucket()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(found))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def _handler(bucket: Bucket) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            key = unquote(parts.path).removeprefix("/bucket").lstrip("/")
            query = parse_qs(parts.query)
            status = next((code for path, code in bucket.status.items() if path in self.path), None)
            if status is not None:
                self.reply(status, b"<Error><Code>Told</Code></Error>")
            elif "list-type" in query:
                prefix = query.get("prefix", [""])[0]
                held = {k: v for k, v in bucket.objects.items() if k.startswith(prefix) and "/" not in k[len(prefix) :]}
                each = "".join(
                    f"<Contents><Key>{k}</Key><Size>{len(v)}</Size><ETag>{tag(v)}</ETag>"
                    "<LastModified>2026-01-02T03:04:05.000Z</LastModified></Contents>"
                    for k, v in held.items()
                )
                text = f"<ListBucketResult><KeyCount>{len(held)}</KeyCount>{each}</ListBucketResult>"
                self.reply(200, text.encode())
            elif key not in bucket.objects:
                self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
            elif self.headers.get("If-Match", tag(bucket.objects[key])) != tag(bucket.objects[key]):
                self.reply(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            else:
                data = bucket.objects[key]
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                assert asked, "only ranges are asked for"
                first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
                whole = f"bytes {first}-{last}/{len(data)}"
                self.reply(206, data[first : last + 1], {"ETag": tag(data), "Content-Range": whole})

        def reply(self, status: int, body: bytes, facts: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Last-Modified": formatdate(usegmt=True), **(facts or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            bucket.sent_bytes += len(body)

    return Handler


def tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@pytest.fixture
def family_there(family: dict[str, Path], bucket: Bucket) -> dict[str, Path]:
    return {name: bucket.push(f"models/{name}", folder) for name, folder in family.items()}  # type: ignore[misc]


@pytest.mark.parametrize("method", ["actmat", "linear"])
def test_a_merge_of_models_behind_urls_is_that_of_local_copies(family, family_there, tmp_path, method, monkeypatch):
    # several pieces of a range at a time
    monkeypatch.setattr(remote_module, "_PIECE_BYTES", 1000)
    streammerge.merge(recipe_of(family, method), tmp_path / "local")
    report = streammerge.merge(recipe_of(family_there, method), tmp_path / "out")
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "local" / weights).read_bytes()
    assert report.inputs[0]["location"] == "s3://bucket/models/base"
    assert not streammerge.verify(tmp_path / "out", inputs=True).problems


def test_a_plan_reads_headers_alone(family_there, bucket):
    planned = streammerge.plan(recipe_of(family_there, "linear"))
    assert bucket.sent_bytes < planned.read_bytes / 2 + 20_000
    assert planned.names == ("base", "math", "code", "chat")


def test_an_object_that_is_written_to_during_a_merge_ends_it(family_there, bucket, tmp_path):
    def progress(done: int, total: int) -> None:
        for key in bucket.objects:
            if key.endswith(".safetensors"):
                bucket.objects[key] = bytes(len(bucket.objects[key]))

    with pytest.raises(CheckpointError, match=r"was written to since|inputs changed during the merge"):
        streammerge.merge(recipe_of(family_there, "linear"), tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


def test_an_object_that_was_written_to_since_it_was_listed_is_refused(family_there, bucket):
    storage = RemoteStorage()
    storage.files("s3://bucket/models/base")
    bucket.objects["models/base/config.json"] = b"{}"
    with pytest.raises(CheckpointError, match=r"base/config\.json` was written to since"):
        storage.read("s3://bucket/models/base", "config.json", 0, 2)


def test_an_object_that_ends_inside_a_tensor_is_refused(family_there):
    storage = RemoteStorage()
    nbytes = storage.files("s3://bucket/models/base")["config.json"].size
    file = storage.open("s3://bucket/models/base", "config.json")
    with pytest.raises(CheckpointError, match="ends inside a tensor"):
        file.fetch(nbytes - 3, 10, memoryview(bytearray(10)))
    file.close()


def test_what_is_not_there_or_not_allowed_is_told(family_there, bucket):
    storage = RemoteStorage()
    with pytest.raises(CheckpointError, match="`s3://bucket/nothing` holds no files"):
        storage.files("s3://bucket/nothing")
    with pytest.raises(CheckpointError, match="`s3://bucket/models/base/x` is not there"):
        storage.read("s3://bucket/models/base", "x", 0, 2)
    bucket.status["config.json"] = 403
    with pytest.raises(CheckpointError, match="may not be read") as raised:
        storage.read("s3://bucket/models/base", "config.json", 0, 2)
    assert "AWS_ACCESS_KEY_ID" in raised.value.hint
    bucket.status["config.json"] = 400
    with pytest.raises(CheckpointError, match="cannot be read: GenericError"):
        storage.read("s3://bucket/models/base", "config.json", 0, 2)


@pytest.mark.parametrize("location", ["https://secret@host/x", "s3://key:secret@bucket/x", "s3://b/x?sign=secret"])
def test_other_urls_and_those_with_secrets_are_refused_and_not_repeated(location, tmp_path):
    message = "`https://` is no place" if location.startswith("https") else "a model's URL has the form"
    with pytest.raises(CheckpointError, match=message) as raised:
        streammerge.inspect(location)
    assert "secret" not in raised.value.message
