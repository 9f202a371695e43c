from __future__ import annotations

import ctypes
import mmap
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.checkpoint import ByteFile
from streammerge.errors import CheckpointError
from streammerge.storage import local
from streammerge.storage.local import LocalStorage

WAYS = ("positioned", "mapped")
MIB = 1 << 20
CONTENT = random.Random(0).randbytes(3 * 4096 + 777)
CUT_SHORT = "The file was cut short during the merge. Fetch it again."
MAY_YOU = "Check that it is there and that you may read it."


@pytest.fixture(params=WAYS)
def storage(request: pytest.FixtureRequest) -> LocalStorage:
    return LocalStorage(mapped=request.param == "mapped")


@pytest.fixture
def opened(storage: LocalStorage, tmp_path: Path) -> Iterator[Callable[[bytes], ByteFile]]:
    files: list[ByteFile] = []

    def write_and_open(content: bytes) -> ByteFile:
        (tmp_path / "f").write_bytes(content)
        files.append(storage.open(str(tmp_path), "f"))
        return files[-1]

    yield write_and_open
    for file in files:
        file.close()


def fetched(file: ByteFile, offset: int, nbytes: int) -> bytes:
    return bytes(file.fetch(offset, nbytes, memoryview(bytearray(nbytes + 3))))


# what is read


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=100)
@given(ranges=st.lists(st.tuples(st.integers(0, len(CONTENT)), st.integers(0, len(CONTENT))), max_size=8))
def test_any_ranges_in_any_order_are_the_files_own_bytes(
    way: str, ranges: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ranges")
    (folder / "f").write_bytes(CONTENT)
    file = LocalStorage(mapped=way == "mapped").open(str(folder), "f")
    for first, second in ranges:
        begin, end = sorted((first, second))
        assert fetched(file, begin, end - begin) == CONTENT[begin:end]
        # a second pass after the release reads the same
        file.release(begin, end - begin)
        assert fetched(file, begin, end - begin) == CONTENT[begin:end]
    file.close()


def test_a_buffer_larger_than_the_range_stays_as_it_was_behind_it(opened: Callable[[bytes], ByteFile]) -> None:
    buffer = bytearray(b"." * 10)
    view = opened(b"0123456789").fetch(2, 4, memoryview(buffer))
    assert bytes(view) == b"2345"
    assert bytes(buffer[4:]) == b"......"


def test_an_empty_range_is_empty_even_at_the_files_end(opened: Callable[[bytes], ByteFile]) -> None:
    file = opened(bytes(4096))
    for offset in (0, 5, 4096):
        assert fetched(file, offset, 0) == b""
        file.release(offset, 0)


def test_views_outlive_the_file_that_gave_them(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    file = storage.open(str(tmp_path), "f")
    view = file.fetch(100, 5000, memoryview(bytearray(5000)))
    file.close()
    assert bytes(view) == CONTENT[100:5100]


def test_a_range_larger_than_a_call_moves_is_read_in_several(
    opened: Callable[[bytes], ByteFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_CALL_LIMIT_BYTES", 1000)
    assert fetched(opened(CONTENT), 3, 12_000) == CONTENT[3:12_003]


def test_a_call_that_moves_less_than_asked_is_continued(
    opened: Callable[[bytes], ByteFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, *rest: preadv(fd, [buffers[0][:700]], *rest))
    assert fetched(opened(CONTENT), 0, len(CONTENT)) == CONTENT


def test_writing_into_what_was_fetched_changes_no_file(opened: Callable[[bytes], ByteFile], tmp_path: Path) -> None:
    view = opened(CONTENT).fetch(0, 100, memoryview(bytearray(100)))
    view[:] = bytes(100)
    assert (tmp_path / "f").read_bytes() == CONTENT


# files that are not what they were


@pytest.mark.parametrize("left", [0, 1, 4096, 9000])
def test_a_file_cut_short_while_it_is_read_is_refused(
    left: int, opened: Callable[[bytes], ByteFile], tmp_path: Path
) -> None:
    file = opened(CONTENT)
    assert fetched(file, 0, 4096) == CONTENT[:4096]
    os.truncate(tmp_path / "f", left)
    for offset, nbytes in ((0, len(CONTENT)), (9000, 1), (12_000, 50)):
        with pytest.raises(CheckpointError) as raised:
            fetched(file, offset, nbytes)
        assert raised.value.message == f"`{tmp_path}/f` ends at byte {left}, inside a tensor"
        assert raised.value.hint == CUT_SHORT


def test_a_file_cut_short_before_it_is_opened_is_refused(opened: Callable[[bytes], ByteFile]) -> None:
    with pytest.raises(CheckpointError, match="ends at byte 10, inside a tensor"):
        fetched(opened(bytes(10)), 8, 4)


def test_an_emptied_file_is_refused(opened: Callable[[bytes], ByteFile]) -> None:
    with pytest.raises(CheckpointError, match=r"ends at byte 0, inside a tensor|cannot mmap an empty file"):
        fetched(opened(b""), 0, 1)


def test_a_file_that_is_gone_is_refused(storage: LocalStorage, tmp_path: Path) -> None:
    for read in (lambda: storage.open(str(tmp_path), "f"), lambda: storage.read(str(tmp_path), "f", 0, 1)):
        with pytest.raises(CheckpointError) as raised:
            read()
        assert raised.value.message == f"`{tmp_path}/f` cannot be read: no such file or directory"
        assert raised.value.hint == MAY_YOU


def test_a_folder_in_a_files_place_is_refused(storage: LocalStorage, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        storage.open(str(tmp_path.parent), tmp_path.name)
    assert raised.value.message == f"`{tmp_path}` is not a plain file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_refused(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    (tmp_path / "f").chmod(0)
    with pytest.raises(CheckpointError, match=r"/f` cannot be read: permission denied"):
        storage.open(str(tmp_path), "f")


def test_a_device_that_fails_is_a_checkpoint_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # positioned only: a mapped page that cannot be read kills the process
    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    (tmp_path / "f").write_bytes(CONTENT)
    file = LocalStorage().open(str(tmp_path), "f")
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError) as raised:
        fetched(file, 0, 10)
    file.close()
    assert raised.value.message.endswith("/f` cannot be read: input/output error")


def test_closing_leaves_no_descriptor_behind(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    before = len(os.listdir("/proc/self/fd"))
    file = storage.open(str(tmp_path), "f")
    fetched(file, 0, 100)
    file.close()
    assert len(os.listdir("/proc/self/fd")) == before
    os.truncate(tmp_path / "f", 0)
    for name in ("f", "absent"):
        with pytest.raises(CheckpointError):
            fetched(storage.open(str(tmp_path), name), 0, 1)
    if storage.mapped:
        assert len(os.listdir("/proc/self/fd")) == before


# folders


def test_the_files_of_a_folder_are_its_plain_files_in_order(storage: LocalStorage, tmp_path: Path) -> None:
    for name, content in {"b": b"22", "a": b"1"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("b")
    (tmp_path / "dead link").symlink_to("absent")
    os.mkfifo(tmp_path / "pipe")
    found = storage.files(str(tmp_path))
    assert {name: facts.size for name, facts in found.items()} == {"a": 1, "b": 2, "link": 2}
    assert list(found) == ["a", "b", "link"]
    assert found["a"].modified_ns == (tmp_path / "a").stat().st_mtime_ns


def test_a_small_read_ends_with_the_file(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    assert storage.read(str(tmp_path), "f", 2, 3) == b"234"
    assert storage.read(str(tmp_path), "f", 8, 100) == b"89"
    assert storage.read(str(tmp_path), "f", 100, 1) == b""


# memory


def cached_pages(path: Path) -> int:
    """How many of a file's pages the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        refused = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), pages)
        del first
        assert refused == 0
        return sum(page & 1 for page in pages)


def evict(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def evictable(tmp_path: Path) -> Path:
    """A file of 8 MiB, none of it in the page cache."""
    path = tmp_path / "f"
    path.write_bytes(random.Random(1).randbytes(8 * MIB))
    evict(path)
    if cached_pages(path):
        pytest.skip("this file system keeps all its pages: it lies in memory")
    return path


def stream(file: ByteFile, nbytes: int, step: int) -> None:
    buffer = memoryview(bytearray(step))
    for offset in range(0, nbytes, step):
        bytes(file.fetch(offset, min(step, nbytes - offset), buffer))
        file.release(offset, min(step, nbytes - offset))


def test_reading_leaves_no_page_cache_behind(storage: LocalStorage, evictable: Path) -> None:
    file = storage.open(str(evictable.parent), "f")
    stream(file, 8 * MIB, MIB)
    file.close()
    assert cached_pages(evictable) * mmap.PAGESIZE < MIB // 4


def test_page_cache_that_was_there_before_stays(storage: LocalStorage, evictable: Path) -> None:
    warm = evictable.read_bytes()
    before = cached_pages(evictable)
    file = storage.open(str(evictable.parent), "f")
    stream(file, len(warm), MIB)
    file.close()
    assert cached_pages(evictable) == before == len(warm) // mmap.PAGESIZE


def test_of_a_file_cached_in_part_that_part_stays(storage: LocalStorage, evictable: Path) -> None:
    with evictable.open("rb") as warming:
        # no read-ahead: exactly these two MiB become cached
        os.posix_fadvise(warming.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for block in (2, 5):
            os.pread(warming.fileno(), MIB, block * MIB)
    file = storage.open(str(evictable.parent), "f")
    stream(file, 8 * MIB, MIB // 2)
    file.close()
    assert cached_pages(evictable) * mmap.PAGESIZE == pytest.approx(2 * MIB, abs=MIB // 4)


def test_a_second_pass_does_not_mistake_the_firsts_pages_for_anothers(storage: LocalStorage, evictable: Path) -> None:
    file = storage.open(str(evictable.parent), "f")
    buffer = memoryview(bytearray(8 * MIB))
    for _ in range(2):
        bytes(file.fetch(0, 8 * MIB, buffer))
    file.release(0, 8 * MIB)
    file.close()
    assert cached_pages(evictable) * mmap.PAGESIZE < MIB // 4


def test_of_anothers_file_nobody_can_tell_so_its_pages_are_dropped(
    storage: LocalStorage, evictable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evictable.read_bytes()
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(evictable).st_uid + 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    file = storage.open(str(evictable.parent), "f")
    stream(file, 8 * MIB, MIB)
    file.close()
    assert cached_pages(evictable) * mmap.PAGESIZE < MIB // 4


def test_a_file_system_without_mapping_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object, **__: object) -> mmap.mmap:
        raise OSError(19, "No such device")

    (tmp_path / "f").write_bytes(CONTENT)
    monkeypatch.setattr(mmap, "mmap", refusing)
    file = LocalStorage().open(str(tmp_path), "f")
    stream(file, len(CONTENT), 4096)
    file.close()
    with pytest.raises(CheckpointError, match="cannot be read: no such device"):
        LocalStorage(mapped=True).open(str(tmp_path), "f")


def resident_bytes() -> int:
    """Resident memory of this process, pages of mapped files included."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def test_streaming_takes_memory_for_what_is_in_hand_not_for_the_file(storage: LocalStorage, tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as written:
        for _ in range(64):
            written.write(os.urandom(MIB))
    file = storage.open(str(tmp_path), "f")
    buffer = memoryview(bytearray(MIB))
    total = 0
    bytes(file.fetch(0, MIB, buffer))
    before = most = resident_bytes()
    for offset in range(0, 64 * MIB, MIB):
        view = file.fetch(offset, MIB, buffer)
        total += sum(view[:: mmap.PAGESIZE])
        most = max(most, resident_bytes())
        file.release(offset, MIB)
    file.close()
    assert total > 0
    assert most - before < 6 * MIB
