"""Models on the hub: what is asked of it, what is believed of its answers, what its failures become."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.checkpoint import load_checkpoint
from streammerge.errors import CheckpointError
from streammerge.storage import hub as hub_module
from streammerge.storage.hub import HubStorage, is_hub_id
from streammerge.storage.local import LocalStorage
from tests.hub_server import Hub, entry, serving
from tests.models import llama_tensors, save_model

SHARD = "model-00002-of-00002.safetensors"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "local", llama_tensors(), shards=2)


@pytest.fixture
def storage(hub: Hub, folder: Path, tmp_path: Path) -> HubStorage:
    hub.push("org/base", folder)
    return storage_of(hub, tmp_path)


def storage_of(hub: Hub, tmp_path: Path, tries: int = 3) -> HubStorage:
    return HubStorage(endpoint=hub.url, cache=str(tmp_path / "cache"), retry_seconds=(0.01,) * tries)


def content(storage: HubStorage, name: str = SHARD, location: str = "org/base") -> bytes:
    """All of a file, as a merge reads it."""
    nbytes = storage.files(location)[name].size
    file = storage.open(location, name)
    try:
        return bytes(file.fetch(0, nbytes, memoryview(bytearray(nbytes))))
    finally:
        file.close()


def weights_in(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("models--*/snapshots/*/*.safetensors")}


def test_only_names_of_models_are_taken_for_models_on_the_hub():
    for name in ("org/base", "org/base@main", "Org-1/a.b_c@refs/pr/4", "org/base@v1.0"):
        assert is_hub_id(name), name
    for name in (
        "base",
        "./org",
        "../org/base",
        "/org/base",
        "a/b/c",
        "org/base@",
        "org/ba se",
        "s3://org/base",
        "org/é",
    ):
        assert not is_hub_id(name), name


# the first asks for a library that takes its time to load
@settings(deadline=None)
@given(st.text("ab./-@\\", max_size=12))
def test_no_name_leads_out_of_the_cache(name):
    storage = HubStorage(endpoint="http://127.0.0.1:9", cache="/nowhere/cache")
    if is_hub_id(name):
        with pytest.raises(CheckpointError) as raised:
            storage.files(name)
        assert ".." not in name or "no name of a model" in raised.value.message


@pytest.mark.parametrize("name", ["org/ba..se", "org/base@a/../../b", "org/base@a//b", "or--g/base"])
def test_a_name_with_dots_that_climb_is_refused_before_anything_is_asked(hub, storage, name):
    with pytest.raises(CheckpointError, match="no name of a model on the hub"):
        storage.files(name)
    assert not hub.seen


def test_headers_are_read_by_range_and_nothing_else_of_weights_is_asked_for(hub, tmp_path):
    folder = save_model(tmp_path / "large", {f"t{i}": t.repeat(300, 1) for i, t in enumerate(matrices())}, shards=3)
    hub.push("org/large", folder)
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert min(sizes.values()) > 4 * hub_module._HEAD_BYTES
    local = load_checkpoint(HubStorage()._local, str(folder))
    model = load_checkpoint(storage_of(hub, tmp_path), "org/large")
    assert model.tensors == local.tensors
    assert model.header_sha256 == local.header_sha256
    assert hub.sent_bytes < 3 * hub_module._HEAD_BYTES + 10_000
    assert all(seen.range for seen in hub.got(".safetensors"))
    assert not weights_in(tmp_path / "cache")


def matrices():
    return [t for t in llama_tensors().values() if t.dim() == 2]


def test_a_header_longer_than_the_first_request_is_read_to_its_end(hub, storage, monkeypatch):
    monkeypatch.setattr(hub_module, "_HEAD_BYTES", 100)
    assert load_checkpoint(storage, "org/base").tensors
    ranges = [seen.range for seen in hub.got(SHARD) if seen.path.startswith("/elsewhere")]
    assert ranges[0] == "bytes=0-99"
    assert ranges[1].startswith("bytes=100-")


def test_a_server_that_knows_no_ranges_is_read_from_its_beginning(hub, storage, folder, monkeypatch):
    monkeypatch.setattr(hub_module, "_HEAD_BYTES", 100)
    hub.faults["GET /elsewhere"] = ["deaf"] * 10
    assert storage.read("org/base", SHARD, 8, 300) == (folder / SHARD).read_bytes()[8:308]


def test_a_file_arrives_as_it_is_and_is_not_fetched_twice(hub, storage, folder, tmp_path):
    assert content(storage) == (folder / SHARD).read_bytes()
    count = len(hub.got(SHARD))
    assert content(storage) == (folder / SHARD).read_bytes()
    assert content(storage_of(hub, tmp_path)) == (folder / SHARD).read_bytes()
    assert len(hub.got(SHARD)) == count
    assert storage.to_fetch("org/base", SHARD) == 0


@pytest.mark.parametrize(
    ("request_of", "faults"),
    [
        ("GET /elsewhere", ["drop"]),
        ("GET /elsewhere", [500, 503]),
        ("HEAD /org/base/resolve", [500]),
        ("GET /elsewhere", ["short"]),
        ("GET /elsewhere", ["longer"]),
        ("GET /elsewhere", ["drop", 500, "drop"]),
    ],
)
def test_what_goes_wrong_once_is_tried_again(hub, storage, folder, request_of, faults):
    hub.faults[request_of] = list(faults)
    assert content(storage) == (folder / SHARD).read_bytes()
    assert not hub.faults[request_of]


def test_a_connection_that_is_lost_goes_on_where_it_was(hub, storage):
    # huggingface_hub keeps what arrived in pieces of 10 MiB
    piece = huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE
    data = os.urandom(piece) + bytes(piece + 1000)
    hub.push("org/base", {"model.safetensors": data})
    hub.faults["GET /elsewhere"] = ["drop"]
    assert content(storage, "model.safetensors") == data
    first, second = (seen for seen in hub.got("model.safetensors") if seen.path.startswith("/elsewhere"))
    assert (first.range, first.sent) == (None, len(data) // 2)
    assert second.range == f"bytes={piece}-"


@pytest.mark.parametrize("fault", [500, "short"])
def test_what_always_goes_wrong_is_an_error_that_says_how_to_go_on(hub, storage, tmp_path, fault):
    hub.faults["GET /elsewhere"] = [fault] * 100
    with pytest.raises(CheckpointError, match=f"`org/base/{SHARD}` cannot be fetched") as raised:
        content(storage)
    assert "`--resume`" in raised.value.hint
    assert not weights_in(tmp_path / "cache")
    # and when the hub is well again it goes on
    hub.faults.clear()
    assert content(storage_of(hub, tmp_path))


def test_a_model_that_is_not_there_is_named(storage):
    with pytest.raises(CheckpointError, match="`org/nothing` is neither a folder here nor a model") as raised:
        storage.files("org/nothing")
    assert "hf auth login" in raised.value.hint


def test_a_revision_that_is_not_there_is_named(storage):
    with pytest.raises(CheckpointError, match="`org/base` has no revision `v9` on the hub"):
        storage.files("org/base@v9")


def test_a_gated_model_says_where_its_terms_are(hub, storage):
    hub.faults["GET /api/models"] = [403]
    with pytest.raises(CheckpointError, match="`org/base` is gated") as raised:
        storage.files("org/base")
    assert f"`{hub.url}/org/base`" in raised.value.hint


def test_without_a_network_the_error_says_what_was_tried(tmp_path):
    storage = HubStorage(endpoint="http://127.0.0.1:9", cache=str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="`models/lama` is no folder here, and the hub cannot be asked") as raised:
        storage.files("models/lama")
    assert "HF_HUB_OFFLINE=1" in raised.value.hint


def test_a_token_goes_to_the_hub_alone_and_into_no_message(hub, storage, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    storage.read("org/base", SHARD, 0, 8)
    assert content(storage)
    assert {seen.authorized for seen in hub.seen if not seen.path.startswith("/elsewhere")} == {True}
    assert {seen.authorized for seen in hub.seen if seen.path.startswith("/elsewhere")} == {False}
    hub.faults["."] = [401] * 100
    for failing in (lambda: storage.files("org/other"), lambda: content(storage, "model-00001-of-00002.safetensors")):
        with pytest.raises(CheckpointError) as raised:
            failing()
        assert TOKEN not in f"{raised.value} {raised.value.hint} {raised.value.__cause__}"


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../b", "a\\..\\b", "", ".", "..", "a//b", "model\0.safetensors"],
)
def test_a_listing_that_leads_out_of_the_model_is_refused(hub, storage, tmp_path, name):
    hub.listing = [{"rfilename": name, "size": 3, "blobId": "0" * 40}]
    with pytest.raises(CheckpointError, match="which leads out of the model"):
        storage.files("org/base")
    assert not list(tmp_path.glob("cache/models--*/snapshots/*/*"))


@pytest.mark.parametrize("nbytes", [-1, 2**63, 2**80, 1.5, "7", None, True])
def test_a_listing_of_impossible_sizes_is_refused(hub, storage, nbytes):
    hub.listing = [{"rfilename": "model.safetensors", "size": nbytes, "blobId": "0" * 40}]
    with pytest.raises(CheckpointError, match=r"lists `model\.safetensors` with"):
        storage.files("org/base")


def test_a_listing_without_end_is_refused(hub, storage, monkeypatch):
    monkeypatch.setattr(hub_module, "_MOST_FILES", 3)
    with pytest.raises(CheckpointError, match="lists 6 files, more than 3"):
        storage.files("org/base")


def test_a_commit_that_is_none_is_refused(hub, storage, tmp_path):
    hub.commits["org/base"]["../../x"] = {}
    hub.revisions["org/base"]["main"] = "../../x"
    with pytest.raises(CheckpointError, match="names the commit"):
        storage.files("org/base")


def test_files_in_folders_of_a_repository_are_no_part_of_the_model(hub, storage, folder):
    hub.push("org/base", {path.name: path.read_bytes() for path in folder.iterdir()} | {"original/x.pth": b"pickled"})
    assert "x.pth" not in {Path(name).name for name in storage.files("org/base")}


def test_a_huge_file_is_refused_by_its_announced_size(hub, storage):
    hub.listing = [entry("config.json", b"{}"), entry("model.safetensors.index.json", b"{}") | {"size": 10**12}]
    with pytest.raises(CheckpointError, match="over the limit"):
        load_checkpoint(storage, "org/base")
    assert not hub.got("index.json")


def test_a_file_of_another_size_than_announced_is_refused(hub, storage, folder):
    data = (folder / SHARD).read_bytes()
    hub.listing = [entry(SHARD, data) | {"size": len(data) - 8}]
    with pytest.raises(CheckpointError, match=f"has {len(data)} bytes, and the hub lists {len(data) - 8}"):
        content(storage)
    with pytest.raises(CheckpointError, match="and the hub lists"):
        content(storage)


def test_a_range_of_a_file_of_another_size_is_refused(hub, storage, folder):
    data = (folder / SHARD).read_bytes()
    hub.listing = [entry(SHARD, data) | {"size": len(data) + 8}]
    with pytest.raises(CheckpointError, match=f"has {len(data)} bytes where it is kept"):
        storage.read("org/base", SHARD, 0, 8)


def test_much_more_than_announced_is_not_received(hub, storage):
    hub.push("org/base", {"notes.txt": bytes(40 << 20)})
    hub.listing = [{"rfilename": "notes.txt", "size": 10, "blobId": None}]
    with pytest.raises(CheckpointError, match="sends more of a file than it announced"):
        storage.read("org/base", "notes.txt", 0, 10)
    assert hub.sent_bytes < 40 << 20


def test_a_file_of_another_checksum_than_announced_is_refused(hub, storage, folder):
    listed = entry(SHARD, (folder / SHARD).read_bytes())
    hub.listing = [listed | {"lfs": {**listed["lfs"], "sha256": "0" * 64}}]
    with pytest.raises(CheckpointError, match="another checksum than the hub lists"):
        content(storage)


def test_a_file_that_changed_since_its_header_was_read_is_refused(hub, storage, folder):
    data = (folder / SHARD).read_bytes()
    hub.listing = [{"rfilename": SHARD, "size": len(data), "blobId": None}]
    storage.read("org/base", SHARD, 0, 8)
    (files,) = hub.commits["org/base"].values()
    files[SHARD] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(CheckpointError, match="does not begin as it did"):
        content(storage)


def test_a_full_disk_is_told_before_the_file_is_asked_for(hub, storage, monkeypatch):
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="has room for 100 B") as raised:
        content(storage)
    assert "HF_HUB_CACHE" in raised.value.hint
    assert not hub.got(SHARD)


def test_offline_the_cache_is_the_model(hub, storage, folder, tmp_path, monkeypatch):
    for name in storage.files("org/base"):
        content(storage, name)
    commit = storage.pinned("org/base").partition("@")[2]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    count = len(hub.seen)
    offline = storage_of(hub, tmp_path)
    for location in ("org/base", "org/base@main", f"org/base@{commit}"):
        assert load_checkpoint(offline, location).tensors == load_checkpoint(offline._local, str(folder)).tensors
        assert offline.pinned(location) == f"org/base@{commit}"
        assert content(offline, SHARD, location) == (folder / SHARD).read_bytes()
    assert len(hub.seen) == count


def test_offline_a_model_that_was_never_fetched_is_an_error_with_a_hint(hub, storage, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for location in ("org/base", "org/base@v1", f"org/base@{'a' * 40}"):
        with pytest.raises(CheckpointError, match="not in the hub's cache, and `HF_HUB_OFFLINE` is set") as raised:
            storage.files(location)
        assert "Unset `HF_HUB_OFFLINE`" in raised.value.hint
    assert not hub.seen


def test_offline_a_model_that_was_only_planned_with_has_no_weights(hub, storage, tmp_path, monkeypatch):
    storage.read("org/base", "config.json", 0, 2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match="`org/base` has no weights in the hub's cache, and `HF_HUB_OFF"
    ) as raised:
        storage_of(hub, tmp_path).files("org/base")
    assert "Unset `HF_HUB_OFFLINE`" in raised.value.hint


def test_a_link_in_the_cache_that_leaves_it_is_not_read(hub, storage, tmp_path):
    storage.read("org/base", "config.json", 0, 2)
    (tmp_path / "secret").write_bytes(b"x" * storage.files("org/base")["config.json"].size)
    (pointer,) = tmp_path.glob("cache/models--*/snapshots/*/config.json")
    pointer.unlink()
    pointer.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside of the model's folder"):
        storage.read("org/base", "config.json", 0, 2)


def test_what_was_fetched_is_deleted_and_fetched_again_when_asked_for(hub, storage, folder, tmp_path):
    content(storage)
    storage.discard("org/base", SHARD)
    assert not weights_in(tmp_path / "cache")
    assert not any(path.stat().st_size == len((folder / SHARD).read_bytes()) for path in blobs(tmp_path))
    assert content(storage) == (folder / SHARD).read_bytes()


def blobs(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("cache/models--*/blobs/*"))


def test_what_was_there_before_is_never_deleted(hub, storage, tmp_path):
    content(storage)
    later = storage_of(hub, tmp_path)
    content(later)
    later.discard("org/base", SHARD)
    assert weights_in(tmp_path / "cache") == {SHARD}


def test_content_that_was_there_under_another_commit_is_never_deleted(hub, storage, folder, tmp_path):
    content(storage)
    hub.push("org/base", {path.name: path.read_bytes() for path in folder.iterdir()} | {"NOTICE": b"new"}, "next")
    later = storage_of(hub, tmp_path)
    assert content(later, SHARD, "org/base@next") == (folder / SHARD).read_bytes()
    later.discard("org/base@next", SHARD)
    assert content(storage_of(hub, tmp_path)) == (folder / SHARD).read_bytes()
    assert len(hub.got(SHARD)) == 1


def test_content_that_two_commits_share_lives_until_both_are_done_with_it(hub, storage, folder, tmp_path):
    hub.push("org/base", {path.name: path.read_bytes() for path in folder.iterdir()} | {"NOTICE": b"new"}, "next")
    for location in ("org/base", "org/base@next"):
        assert content(storage, SHARD, location)
    storage.discard("org/base", SHARD)
    assert content(storage, SHARD, "org/base@next") == (folder / SHARD).read_bytes()
    assert len(hub.got(SHARD)) == 1
    storage.discard("org/base@next", SHARD)
    assert not weights_in(tmp_path / "cache")
    assert len([path for path in blobs(tmp_path) if path.stat().st_size > 5000]) == 0


def test_a_range_is_fetched_of_a_file_that_is_deleted_while_it_is_asked_for(hub, storage, folder, monkeypatch):
    data = content(storage)
    read = LocalStorage.read

    def too_late(self: LocalStorage, *arguments: object) -> bytes:
        storage.discard("org/base", SHARD)
        return read(self, *arguments)

    monkeypatch.setattr(LocalStorage, "read", too_late)
    assert storage.read("org/base", SHARD, 8, 100) == data[8:108]
    assert not storage._is_cached("org/base", SHARD)


def test_an_open_file_that_was_deleted_comes_again(storage, folder):
    data = (folder / SHARD).read_bytes()
    file = storage.open("org/base", SHARD)
    assert bytes(file.fetch(0, 100, memoryview(bytearray(100)))) == data[:100]
    storage.discard("org/base", SHARD)
    file.release(0, 100)
    assert bytes(file.fetch(100, 100, memoryview(bytearray(100)))) == data[100:200]
    file.close()


def test_no_more_files_are_fetched_ahead_than_allowed(hub, tmp_path):
    folder = save_model(tmp_path / "many", llama_tensors(), shards=6)
    hub.push("org/many", folder)
    storage = storage_of(hub, tmp_path)
    names = [name for name in storage.files("org/many") if name.endswith(".safetensors")]
    storage.expect([("org/many", name) for name in names], 2)
    wait_for(lambda: len(weights_in(tmp_path / "cache")) == 2)
    time.sleep(0.2)
    assert weights_in(tmp_path / "cache") == set(names[:2])
    content(storage, names[0], "org/many")
    wait_for(lambda: len(weights_in(tmp_path / "cache")) == 3)
    # what is asked for goes before what is not
    content(storage, names[5], "org/many")
    assert names[5] in weights_in(tmp_path / "cache")
    storage.stop()


def wait_for(is_so) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_threads_that_have_nothing_left_to_fetch_end(storage):
    content(storage)
    wait_for(lambda: not any(thread.name == "streammerge-fetch" for thread in threading.enumerate()))
    assert content(storage, "model-00001-of-00002.safetensors")


def test_who_waits_for_a_file_is_told_when_fetching_stops(hub, storage, folder):
    hub.gates[SHARD] = threading.Event()
    told: list[BaseException] = []

    def wait() -> None:
        try:
            content(storage)
        except CheckpointError as error:
            told.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_for(lambda: hub.got(SHARD))
    started = time.monotonic()
    storage.stop()
    thread.join(20)
    assert time.monotonic() - started < 10
    assert "stopped" in str(told[0])
    hub.gates[SHARD].set()
    assert content(storage) == (folder / SHARD).read_bytes()


def test_a_cache_that_may_not_be_written_is_told(hub, folder, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    hub.push("org/base", folder)
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="may not be written"):
        content(storage_of(hub, tmp_path))
