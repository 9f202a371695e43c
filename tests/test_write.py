"""Writing: each byte where the header says, nothing cited before it is durable, nothing half done published."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from streammerge import write
from streammerge.errors import OutputError
from streammerge.layout import Layout, lay_out
from streammerge.outcome import Block, Outcome
from streammerge.storage import output
from streammerge.storage.output import OutputFile
from streammerge.write import JOURNAL, Writer
from tests.stored import models_under, streammerge_threads, tensors_of

FINGERPRINT = {"recipe": {"merge_method": "linear"}, "shards": {"one": "two"}}
TENSORS = {
    "a": torch.arange(10, dtype=torch.float32),
    "b": torch.ones(3, 5, dtype=torch.bfloat16),
    "c": torch.tensor(7),
    "d": torch.empty(0, 4),
    "e": torch.arange(256, dtype=torch.uint8),
}
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}


def layout(max_shard_bytes: int = 1 << 30) -> Layout:
    return lay_out(((name, CODES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()), max_shard_bytes)


def blocks(tensors: Mapping[str, Tensor], size: int = 16, given_back: list[str] | None = None) -> list[Block]:
    found = []
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        starts = range(0, len(data), size) or [0]
        for start in starts:
            last = start == starts[-1]
            release = (lambda name=name: given_back.append(name)) if given_back is not None else (lambda: None)
            outcome = Outcome(name, "linear") if last else None
            found.append(Block(name, start, memoryview(data[start : start + size]), release, outcome))
    return found


def write_all(out: Path, *, resume: bool = False, max_shard_bytes: int = 1 << 30) -> Writer:
    with Writer(str(out), layout(max_shard_bytes), FINGERPRINT, resume=resume) as writer:
        for block in blocks({n: t for n, t in TENSORS.items() if n not in writer.checksums}):
            writer.write(block)
        writer.flush()
        writer.publish({"config.json": b"{}"})
    return writer


def hand_over(writer: Writer, pieces: list[Block], then: Callable[[], object] | None = None) -> None:
    """Write blocks, then do something else or end well."""
    with writer:
        for block in pieces:
            writer.write(block)
        (then or writer.flush)()


def stop() -> None:
    raise ZeroDivisionError


def interrupted(out: Path, count: int = 3) -> Writer:
    """A merge that ended with an error after some tensors."""
    writer = Writer(str(out), layout(), FINGERPRINT, resume=False)
    with pytest.raises(ZeroDivisionError):
        hand_over(writer, blocks(dict(list(TENSORS.items())[:count])), stop)
    return writer


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Make a call into the operating system fail the k-th time, counted from 0."""

    def fail(name: str, code: int, k: int = 0, *, forever: bool = True) -> list[int]:
        real, calls = getattr(os, name), []

        def call(*arguments: object) -> object:
            calls.append(len(calls))
            if calls[-1] == k or (forever and calls[-1] > k):
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        monkeypatch.setattr(os, name, call)
        return calls

    return fail


@pytest.mark.parametrize("max_shard_bytes", [1, 64, 300, 1 << 30])
def test_every_tensor_lies_where_the_header_says(out, max_shard_bytes):
    writer = write_all(out, max_shard_bytes=max_shard_bytes)
    found = tensors_of(out)
    assert found.keys() == TENSORS.keys() == writer.checksums.keys() == writer.outcomes.keys()
    assert all(torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in TENSORS)
    assert streammerge_threads() == []


def test_one_shard_has_no_index_and_several_are_numbered_as_hugging_face_does(tmp_path):
    write_all(tmp_path / "one")
    assert sorted(os.listdir(tmp_path / "one")) == ["config.json", "model.safetensors"]
    write_all(tmp_path / "many", max_shard_bytes=64)
    files = sorted(os.listdir(tmp_path / "many"))
    shards = [name for name in files if name.endswith(".safetensors")]
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert len(shards) > 1
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())
    for file in shards:
        with safe_open(tmp_path / "many" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {name for name, where in index["weight_map"].items() if where == file}
    assert files == sorted([*shards, "config.json", "model.safetensors.index.json"])


def test_every_buffer_is_given_back(out):
    given_back: list[str] = []
    pieces = blocks(TENSORS, given_back=given_back)
    hand_over(Writer(str(out), layout(), FINGERPRINT, resume=False), pieces)
    assert given_back == [block.name for block in pieces]


def test_every_buffer_is_given_back_also_when_the_disk_is_full(out, failing, monkeypatch):
    given_back: list[str] = []
    writer = Writer(str(out), layout(), FINGERPRINT, resume=False)
    failing("pwrite", errno.ENOSPC, 2)
    pieces = blocks(TENSORS, given_back=given_back)
    # all are handed over before the first is written
    monkeypatch.setattr(writer, "write", writer._queue.put)
    with pytest.raises(OutputError):
        hand_over(writer, pieces)
    assert given_back == [block.name for block in pieces]


@pytest.mark.parametrize("beside_bytes", [1, 1 << 20], ids=["beside", "inline"])
def test_a_checksum_is_of_the_tensors_bytes_whichever_thread_takes_it(out, monkeypatch, beside_bytes):
    monkeypatch.setattr(write, "_HASHED_BESIDE_BYTES", beside_bytes)
    writer = write_all(out)
    for name, tensor in tensors_of(out).items():
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert writer.checksums[name] == hashlib.sha256(data).hexdigest()
    assert streammerge_threads() == []


def test_a_buffer_is_given_back_after_its_checksum_also_when_the_disk_is_full(out, failing, monkeypatch):
    monkeypatch.setattr(write, "_HASHED_BESIDE_BYTES", 1)
    events: list[str] = []

    class Slow:
        def update(self, data: memoryview) -> None:
            time.sleep(0.05)
            events.append(f"hashed {len(data)}")

    monkeypatch.setattr(write.hashlib, "sha256", Slow)
    writer = Writer(str(out), layout(), FINGERPRINT, resume=False)
    failing("pwrite", errno.ENOSPC)
    block = Block("e", 0, memoryview(bytes(256)), lambda: events.append("given back"))
    with pytest.raises(OutputError, match="no space left"):
        hand_over(writer, [block])
    assert events == ["hashed 256", "given back"]
    assert streammerge_threads() == []


def test_a_checksum_that_fails_ends_the_merge_with_its_error(out, monkeypatch):
    monkeypatch.setattr(write, "_HASHED_BESIDE_BYTES", 1)
    given_back: list[str] = []

    class Broken:
        def update(self, data: memoryview) -> None:
            raise MemoryError("no checksum")

    monkeypatch.setattr(write.hashlib, "sha256", Broken)
    writer = Writer(str(out), layout(), FINGERPRINT, resume=False)
    with pytest.raises(MemoryError, match="no checksum"):
        hand_over(writer, blocks({"e": TENSORS["e"]}, 256, given_back))
    assert given_back == ["e"]
    assert writer.checksums == {}
    assert streammerge_threads() == []


def test_the_journal_cites_a_tensor_only_after_its_bytes_are_durable(out, monkeypatch):
    monkeypatch.setattr(write, "GROUP_BYTES", 1)
    events: list[str] = []
    pwrite, fdatasync = os.pwrite, os.fdatasync

    def note_write(descriptor: int, data: memoryview, offset: int) -> int:
        events.append("write")
        return pwrite(descriptor, data, offset)

    def note_sync(descriptor: int) -> None:
        lines = (out.with_name("out.partial") / JOURNAL).read_bytes().count(b"\n")
        events.append(f"sync with {lines} lines")
        fdatasync(descriptor)

    monkeypatch.setattr(os, "pwrite", note_write)
    monkeypatch.setattr(os, "fdatasync", note_sync)
    write_all(out)
    begun = events.index("sync with 0 lines")
    assert events[: begun + 1] == ["write", "sync with 0 lines"]
    # each tensor: its blocks, then the sync, and only then the line that the next sync finds; no sync for no bytes
    stored = [tensor for tensor in TENSORS.values() if tensor.numel()]
    assert [event for event in events[begun + 1 :] if event != "write"] == [
        f"sync with {1 + i} lines" for i in range(len(stored))
    ]
    assert events[-1] != "write"


def test_a_missing_tensor_is_never_published(out):
    writer = Writer(str(out), layout(), FINGERPRINT, resume=False)

    def publish() -> None:
        writer.flush()
        writer.publish({"config.json": b"{}"})

    with pytest.raises(OutputError, match="1 tensors were never written, such as `e`"):
        hand_over(writer, blocks({name: t for name, t in TENSORS.items() if name != "e"}), publish)
    assert not out.exists()
    assert models_under(out.parent) == []


def test_a_tensor_whose_last_block_never_came_is_not_cited(out):
    writer = Writer(str(out), layout(), FINGERPRINT, resume=False)
    with pytest.raises(ZeroDivisionError):
        hand_over(writer, blocks({"b": TENSORS["b"], "a": TENSORS["a"]})[:-1], stop)
    assert writer.checksums.keys() == {"b"}


def test_an_interrupted_merge_leaves_what_no_loader_takes_for_a_model(out):
    interrupted(out)
    partial = out.with_name("out.partial")
    assert sorted(os.listdir(partial)) == [JOURNAL, "model.safetensors.partial"]
    assert not out.exists()


def test_an_interruption_before_the_first_tensor_leaves_nothing(out):
    interrupted(out, 0)
    assert os.listdir(out.parent) == []


def test_resuming_begins_with_what_the_journal_cites(out):
    first = interrupted(out)
    with Writer(str(out), layout(), FINGERPRINT, resume=True) as writer:
        assert writer.checksums == first.checksums
        assert writer.outcomes == first.outcomes
        assert writer.checksums.keys() == {"a", "b", "c"}
        writer.flush()


def test_resuming_writes_a_damaged_header_again(out):
    interrupted(out)
    staged = out.with_name("out.partial") / "model.safetensors.partial"
    with staged.open("r+b") as file:
        file.seek(12)
        file.write(b"????")
    write_all(out, resume=True)
    assert tensors_of(out).keys() == TENSORS.keys()


@pytest.mark.parametrize("resume", [False, True])
def test_an_output_that_is_not_empty_is_refused(out, resume):
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="out` is not empty") as caught:
        write_all(out, resume=resume)
    assert caught.value.hint == "Choose another folder, or delete this one first."
    assert (out / "notes.txt").read_text() == "mine"
    assert os.listdir(out.parent) == ["out"]


def test_an_output_that_is_a_file_is_refused(out):
    out.write_text("mine")
    with pytest.raises(OutputError, match="out` is a file") as caught:
        write_all(out)
    assert caught.value.hint == "Choose another name for the output folder."
    assert out.read_text() == "mine"


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_an_output_that_is_a_link_is_refused(out, target):
    (out.parent / "elsewhere").mkdir()
    out.symlink_to(out.parent / target)
    with pytest.raises(OutputError, match="out` is a link") as caught:
        write_all(out)
    assert caught.value.hint == "Choose another name for the output folder."
    assert out.is_symlink()


def test_an_empty_output_folder_is_filled(out):
    out.mkdir()
    write_all(out)
    assert tensors_of(out).keys() == TENSORS.keys()


def test_missing_parents_are_made(tmp_path):
    write_all(tmp_path / "some" / "where" / "out")
    assert tensors_of(tmp_path / "some" / "where" / "out").keys() == TENSORS.keys()


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"file/out\.partial` cannot be written: not a directory") as caught:
        write_all(tmp_path / "file" / "out")
    assert caught.value.hint == "A part of the path is a file. Choose another folder."


@pytest.mark.parametrize(
    ("code", "reason", "hint"),
    [
        (errno.EACCES, "permission denied", "Choose a folder that you may write to."),
        (errno.EPERM, "operation not permitted", "Choose a folder that you may write to."),
        (errno.EROFS, "read-only file system", "The file system is read-only. Choose another folder."),
        (errno.ENAMETOOLONG, "file name too long", "Choose a shorter name for the output folder."),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_with_a_hint(out, failing, code, reason, hint):
    failing("mkdir", code)
    with pytest.raises(OutputError) as caught:
        write_all(out)
    assert caught.value.message == f"`{out}.partial` cannot be written: {reason}"
    assert caught.value.hint == hint
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync", "fsync"])
def test_a_full_disk_before_the_first_tensor_leaves_nothing(out, failing, call, code):
    before = open_descriptors()
    failing(call, code)
    with pytest.raises(OutputError, match=r"out\.partial` cannot be written") as caught:
        write_all(out, max_shard_bytes=64)
    assert caught.value.hint is not None
    assert "Free some space" in caught.value.hint
    assert os.listdir(out.parent) == []
    assert open_descriptors() == before


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_system_that_cannot_allocate_still_works(out, failing):
    failing("posix_fallocate", errno.EOPNOTSUPP)
    write_all(out)
    assert tensors_of(out).keys() == TENSORS.keys()


@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "fsync", "rename"])
def test_a_disk_that_fills_at_any_moment_leaves_a_merge_to_resume(tmp_path, failing, monkeypatch, call, group_bytes):
    monkeypatch.setattr(write, "GROUP_BYTES", group_bytes)
    whole = tmp_path / "whole"
    calls = failing(call, 0, 10**9)
    write_all(whole, max_shard_bytes=64)
    monkeypatch.undo()
    monkeypatch.setattr(write, "GROUP_BYTES", group_bytes)
    assert len(calls) > 3
    for k in calls:
        out = tmp_path / f"at{k}" / "out"
        out.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            real, seen = getattr(os, call), []

            def fails(*arguments: object, real=real, seen=seen, k=k) -> object:
                seen.append(0)
                if len(seen) > k:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*arguments)

            patch.setattr(os, call, fails)
            with pytest.raises(OutputError, match="cannot be written: no space left on device") as caught:
                write_all(out, max_shard_bytes=64)
        assert caught.value.hint == "The disk is full. Free some space, then pass `--resume`."
        assert streammerge_threads() == []
        for model in models_under(out.parent):
            # what looks like one is one: the disk filled after the last file had its name
            assert same_files(model, whole)
        if not out.exists():
            write_all(out, resume=True, max_shard_bytes=64)
        assert same_files(out, whole)


def same_files(one: Path, other: Path) -> bool:
    names = [sorted(name for name in os.listdir(folder) if name != JOURNAL) for folder in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def test_a_failed_sync_is_not_taken_back_by_one_that_succeeds(out, failing):
    # after an error the kernel forgets which pages it could not store
    writer = Writer(str(out), layout(), FINGERPRINT, resume=False)
    failing("fdatasync", errno.EIO, forever=False)
    with pytest.raises(OutputError, match="input/output error"):
        hand_over(writer, blocks(TENSORS))
    assert writer.checksums == {}
    assert not out.with_name("out.partial").exists()


def test_writing_goes_on_after_a_short_write(out, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:3], offset))
    write_all(out)
    assert all(torch.equal(tensors_of(out)[name], TENSORS[name]) for name in TENSORS)


def test_an_error_that_is_no_disks_fault_shows_itself(out, monkeypatch):
    def broken(self: OutputFile, offset: int, data: memoryview) -> None:
        raise ZeroDivisionError("a mistake of ours")

    writer = Writer(str(out), layout(), FINGERPRINT, resume=False)
    monkeypatch.setattr(OutputFile, "write", broken)
    with pytest.raises(ZeroDivisionError, match="a mistake of ours"):
        hand_over(writer, blocks(TENSORS))
    assert streammerge_threads() == []


def test_a_partial_folder_is_refused_without_resume(out):
    interrupted(out)
    before = sorted(os.listdir(out.with_name("out.partial")))
    with pytest.raises(OutputError, match=r"out\.partial` holds an interrupted merge") as caught:
        write_all(out)
    assert caught.value.hint == "Pass `--resume` to continue it, or delete that folder."
    assert sorted(os.listdir(out.with_name("out.partial"))) == before


def test_a_partial_folder_without_a_journal_is_refused(out):
    partial = out.with_name("out.partial")
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.partial` has no journal, so it cannot be resumed") as caught:
        write_all(out, resume=True)
    assert caught.value.hint == "Delete that folder and merge again."
    assert (partial / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_process_writes_is_refused(out, resume):
    interrupted(out)
    journal = out.with_name("out.partial") / JOURNAL
    code = "import fcntl; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; " + code, str(journal)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(OutputError, match=r"out\.partial` is being written by another process") as caught:
            write_all(out, resume=resume)
        assert caught.value.hint == "Wait for it, or choose another folder."
        holder.communicate("\n")
    write_all(out, resume=True)
    assert tensors_of(out).keys() == TENSORS.keys()


def test_two_writers_of_one_process_do_not_share_a_folder_either(out):
    with Writer(str(out), layout(), FINGERPRINT, resume=False) as writer:
        with pytest.raises(OutputError, match="is being written by another process"):
            Writer(str(out), layout(), FINGERPRINT, resume=True)
        writer.flush()


def test_the_journal_is_gone_from_a_published_folder(out):
    write_all(out)
    assert JOURNAL not in os.listdir(out)


def test_the_kernel_is_asked_to_store_large_runs_and_none_twice(tmp_path, monkeypatch):
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(output, "_start_writeback", lambda descriptor, *place: asked.append(place))
    megabyte = 1 << 20
    file = OutputFile(tmp_path / "file", 8 * megabyte, create=True)
    for offset in range(0, 3 * megabyte, 4096):
        file.write(offset, memoryview(bytes(4096)))
    file.write(5 * megabyte, memoryview(bytes(2 * megabyte)))
    # of a run that ends before there is enough, the sync takes care
    file.write(3 * megabyte, memoryview(bytes(4096)))
    file.close()
    assert asked == [(number * megabyte, megabyte) for number in range(3)] + [(5 * megabyte, 2 * megabyte)]
