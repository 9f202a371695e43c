from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.storage import output
from streammerge.storage.output import OutputFile, sync_folder, write_durably


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def refusing(code: int) -> Callable[..., None]:
    """A system call that fails."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def failing_allocation(code: int, *, after: int) -> Callable[[int, int, int], None]:
    """A posix_fallocate that takes `after` bytes and then fails."""

    def allocate(descriptor: int, offset: int, nbytes: int) -> None:
        os.ftruncate(descriptor, after)
        raise OSError(code, os.strerror(code))

    return allocate


def test_a_new_file_has_its_size_at_once_and_reads_as_zeros(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "f", 10_000, create=True)
    assert file.nbytes == (tmp_path / "f").stat().st_size == 10_000
    assert (tmp_path / "f").stat().st_blocks * 512 >= 10_000
    buffer = bytearray(b"x" * 16)
    assert file.read(9_990, memoryview(buffer)) == 10
    assert bytes(buffer) == bytes(10) + b"x" * 6
    file.close()


def test_what_is_written_at_an_offset_is_read_there(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "f", 20, create=True)
    file.write(5, memoryview(b"hello"))
    file.write(10, memoryview(b"world"))
    buffer = bytearray(10)
    assert file.read(5, memoryview(buffer)) == 10
    assert bytes(buffer) == b"helloworld"
    file.sync()
    file.close()
    assert (tmp_path / "f").read_bytes() == bytes(5) + b"helloworld" + bytes(5)


@settings(deadline=None, max_examples=50)
@given(
    blocks=st.lists(st.tuples(st.integers(0, 90), st.binary(max_size=10)), max_size=12),
    call_limit=st.integers(1, 7),
)
def test_blocks_in_any_order_and_calls_of_any_size_give_the_same_file(
    blocks: list[tuple[int, bytes]], call_limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("out") / "f"
    expected = bytearray(100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "_CALL_LIMIT_BYTES", call_limit)
        file = OutputFile(path, 100, create=True)
        for offset, data in blocks:
            file.write(offset, memoryview(data))
            expected[offset : offset + len(data)] = data
        file.close()
    assert path.read_bytes() == expected


def test_a_call_that_writes_less_than_asked_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:3], offset))
    file = OutputFile(tmp_path / "f", 10, create=True)
    file.write(0, memoryview(b"0123456789"))
    file.close()
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_an_existing_file_is_never_taken_for_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"precious")
    before = open_descriptors()
    with pytest.raises(FileExistsError):
        OutputFile(tmp_path / "f", 100, create=True)
    assert (tmp_path / "f").read_bytes() == b"precious"
    assert open_descriptors() == before


@pytest.mark.parametrize("create", [True, False])
def test_a_link_is_not_followed(create: bool, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "f").symlink_to("elsewhere")
    with pytest.raises(OSError) as raised:
        OutputFile(tmp_path / "f", 100, create=create)
    assert raised.value.errno in (errno.EEXIST, errno.ELOOP)
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_reopening_keeps_size_and_content(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    file = OutputFile(tmp_path / "f", 999, create=False)
    file.write(2, memoryview(b"xx"))
    assert file.nbytes == 10
    file.close()
    assert (tmp_path / "f").read_bytes() == b"01xx456789"


def test_reopening_a_missing_file_creates_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        OutputFile(tmp_path / "f", 10, create=False)
    assert not (tmp_path / "f").exists()


def test_a_new_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        OutputFile(tmp_path / "f", 10, create=True).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o644


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_full_disk_gives_back_what_it_had_and_leaves_no_descriptor(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing_allocation(code, after=5000))
    before = open_descriptors()
    with pytest.raises(OSError) as raised:
        OutputFile(tmp_path / "f", 10_000, create=True)
    assert raised.value.errno == code
    assert open_descriptors() == before
    assert (tmp_path / "f").stat().st_size == 0


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_where_allocation_is_not_supported_the_file_has_its_size_all_the_same(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refusing(code))
    file = OutputFile(tmp_path / "f", 10_000, create=True)
    file.write(9_999, memoryview(b"x"))
    assert file.nbytes == 10_000
    file.close()


def test_a_size_that_no_way_can_give_leaves_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refusing(errno.EOPNOTSUPP))
    monkeypatch.setattr(os, "ftruncate", refusing(errno.EFBIG))
    before = open_descriptors()
    with pytest.raises(OSError, match="File too large"):
        OutputFile(tmp_path / "f", 1 << 62, create=True)
    assert open_descriptors() == before


def test_closing_twice_closes_no_other_file(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "f", 10, create=True)
    file.close()
    other = os.open(tmp_path / "f", os.O_RDONLY)
    file.close()
    os.fstat(other)
    os.close(other)


def test_syncing_waits_for_the_device_and_gives_the_page_cache_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: calls.append("sync"))
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: calls.append(arguments[1:]))
    file = OutputFile(tmp_path / "f", 10, create=True)
    file.sync()
    file.close()
    assert calls == ["sync", (0, 0, os.POSIX_FADV_DONTNEED)]


def test_a_folder_and_a_small_file_can_be_made_durable(tmp_path: Path) -> None:
    before = open_descriptors()
    write_durably(tmp_path / "f", b"first, and longer")
    write_durably(tmp_path / "f", b"second")
    sync_folder(tmp_path)
    assert (tmp_path / "f").read_bytes() == b"second"
    assert open_descriptors() == before
    with pytest.raises(NotADirectoryError):
        sync_folder(tmp_path / "f")
