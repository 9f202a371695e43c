from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.budget import available_memory_bytes, format_bytes, parse_bytes
from streammerge.errors import StreamMergeError

MACHINE = 100 << 30
GIB = 1 << 30


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        ("4GiB", 4 << 30),
        ("4gib", 4 << 30),
        (" 4 GiB ", 4 << 30),
        ("5GB", 5_000_000_000),
        ("500 MB", 500_000_000),
        ("1.5KiB", 1536),
        ("0.5TiB", 1 << 39),
        ("2TB", 2_000_000_000_000),
        ("100B", 100),
        ("1073741824", 1 << 30),
        (1 << 30, 1 << 30),
        ("1.9", 1),
        (2**53 + 1, 2**53 + 1),
    ],
)
def test_a_size_is_a_number_and_a_unit(size: str | int, nbytes: int) -> None:
    assert parse_bytes(size) == nbytes


@pytest.mark.parametrize(
    "size",
    [
        "", "GiB", "four", "-1GiB", "0", "0.5", "0GiB", 0, -5, True, "4 G iB", "4Gi", "4PiB",
        "1e3", "1,5GiB", ".5GiB", "nan", "inf", "9" * 400, 10**30, "0x10",
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_an_example(size: str | int) -> None:
    with pytest.raises(StreamMergeError) as raised:
        parse_bytes(size)
    shown = str(size) if len(str(size)) <= 200 else str(size)[:200] + "…"
    assert raised.value.message == f"`{shown}` is not a size"
    assert raised.value.hint == "Write a number and a unit, for example `4GiB` or `500MB`."


@given(st.integers(1, 10**18 - 1))
def test_whole_bytes_are_taken_exactly(nbytes: int) -> None:
    assert parse_bytes(nbytes) == parse_bytes(str(nbytes)) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (4 << 30, "4.0 GiB"),
        (10 << 40, "10.0 TiB"), (5000 << 40, "5000.0 TiB"), (-2048, "-2.0 KiB"), (2**20 - 1, "1.0 MiB"),
    ],
)  # fmt: skip
def test_a_size_for_people_has_one_decimal(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(1, 2**50))
def test_a_size_for_people_can_be_passed_back(nbytes: int) -> None:
    assert parse_bytes(format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.06)


# what the machine and its cgroups leave


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = MACHINE

    monkeypatch.setattr(psutil, "virtual_memory", Memory)


def group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def membership(folder: Path, text: str) -> Path:
    (folder / "membership").write_text(text)
    return folder / "membership"


@pytest.mark.usefixtures("machine")
class TestCgroups:
    def test_without_any_the_machine_decides(self, tmp_path: Path) -> None:
        assert available_memory_bytes(tmp_path / "absent", tmp_path / "absent") == MACHINE

    def test_of_version_2_limit_the_process(self, tmp_path: Path) -> None:
        group(tmp_path / "job", {"memory.max": 8 * GIB, "memory.current": 3 * GIB, "memory.stat": "anon 5"})
        assert available_memory_bytes(tmp_path, membership(tmp_path, "0::/job\n")) == 5 * GIB

    def test_of_version_2_count_clean_page_cache_as_free(self, tmp_path: Path) -> None:
        stat = f"anon 5\ninactive_file {GIB}\nactive_file {GIB}\nfile_dirty 9"
        group(tmp_path / "job", {"memory.max": 8 * GIB, "memory.current": 3 * GIB, "memory.stat": stat})
        assert available_memory_bytes(tmp_path, membership(tmp_path, "0::/job\n")) == 7 * GIB

    def test_of_version_2_all_bind_from_the_root_down(self, tmp_path: Path) -> None:
        group(tmp_path / "a", {"memory.max": 4 * GIB, "memory.current": 1 * GIB, "memory.stat": ""})
        group(tmp_path / "a/b", {"memory.max": "max", "memory.current": 1 * GIB, "memory.stat": ""})
        group(tmp_path / "a/b/c", {"memory.max": 9 * GIB, "memory.current": 1 * GIB, "memory.stat": ""})
        assert available_memory_bytes(tmp_path, membership(tmp_path, "0::/a/b/c\n")) == 3 * GIB

    def test_without_a_limit_leave_the_machine_to_decide(self, tmp_path: Path) -> None:
        group(tmp_path, {"memory.max": "max", "memory.current": GIB, "memory.stat": ""})
        assert available_memory_bytes(tmp_path, membership(tmp_path, "0::/\n")) == MACHINE

    def test_of_a_container_are_seen_though_its_path_is_the_hosts(self, tmp_path: Path) -> None:
        group(tmp_path, {"memory.max": 2 * GIB, "memory.current": 0, "memory.stat": ""})
        assert available_memory_bytes(tmp_path, membership(tmp_path, "0::/system.slice/docker-1\n")) == 2 * GIB

    def test_without_statistics_still_limit(self, tmp_path: Path) -> None:
        group(tmp_path, {"memory.max": 2 * GIB, "memory.current": GIB})
        assert available_memory_bytes(tmp_path, tmp_path / "absent") == GIB
        (tmp_path / "memory.stat").write_text("inactive_file\n")
        assert available_memory_bytes(tmp_path, tmp_path / "absent") == GIB

    def test_that_are_over_their_limit_leave_nothing(self, tmp_path: Path) -> None:
        group(tmp_path, {"memory.max": 2 * GIB, "memory.current": 3 * GIB, "memory.stat": ""})
        assert available_memory_bytes(tmp_path, membership(tmp_path, "0::/\n")) == 0

    def test_of_version_1_limit_a_container(self, tmp_path: Path) -> None:
        files = {"memory.limit_in_bytes": 8 * GIB, "memory.usage_in_bytes": 6 * GIB, "memory.stat": ""}
        group(tmp_path / "memory", files)
        assert available_memory_bytes(tmp_path, membership(tmp_path, "4:memory:/docker/1\n0::/\n")) == 2 * GIB

    def test_of_version_1_limit_a_batch_job(self, tmp_path: Path) -> None:
        unlimited = {"memory.limit_in_bytes": 2**63 - 4096, "memory.usage_in_bytes": 50 * GIB, "memory.stat": ""}
        stat = f"inactive_file 0\ntotal_inactive_file {GIB}\nactive_file 0\ntotal_active_file 0"
        job = {"memory.limit_in_bytes": 8 * GIB, "memory.usage_in_bytes": 6 * GIB, "memory.stat": stat}
        group(tmp_path / "memory", unlimited)
        group(tmp_path / "memory/slurm/job_7", job)
        lines = "9:name=systemd:/\n4:cpuset,memory:/slurm/job_7\n2:cpu:/slurm\n0::/\n"
        assert available_memory_bytes(tmp_path, membership(tmp_path, lines)) == 3 * GIB

    def test_of_other_controllers_do_not_count(self, tmp_path: Path) -> None:
        group(tmp_path / "memory/other", {"memory.limit_in_bytes": 1, "memory.usage_in_bytes": 1, "memory.stat": ""})
        assert available_memory_bytes(tmp_path, membership(tmp_path, "2:cpu:/other\n")) == MACHINE


def test_this_machine_has_memory_to_spare() -> None:
    assert 0 < available_memory_bytes() <= psutil.virtual_memory().total
