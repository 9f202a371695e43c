from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from streammerge.rates import Rates, Work, load_rates, measured, rates_path, save_rates

RATES = Rates(2e9, 1e9, 5e11, 3e9)


def work(read: int = 0, write: int = 0, flops: int = 0, elements: int = 0) -> Work:
    return Work(read_bytes=read, write_bytes=write, matrix_flops=flops, element_bytes=elements)


def test_nothing_is_known_before_the_first_merge() -> None:
    assert load_rates("element") is None


def test_what_was_measured_is_remembered_for_each_kind() -> None:
    save_rates("element", RATES)
    save_rates("matrix", Rates(1.0, 2.0, 3.0, 4.0))
    assert load_rates("element") == RATES
    assert load_rates("matrix") == Rates(1.0, 2.0, 3.0, 4.0)
    save_rates("matrix", RATES)
    assert load_rates("matrix") == RATES


def test_the_first_kind_that_was_measured_is_taken() -> None:
    save_rates("element", RATES)
    assert load_rates("ties", "element") == RATES
    save_rates("ties", Rates(1.0, 2.0, 3.0, 4.0))
    assert load_rates("ties", "element") == Rates(1.0, 2.0, 3.0, 4.0)


def test_the_slowest_of_reading_writing_and_arithmetic_sets_the_time() -> None:
    assert RATES.seconds(work(read=4_000_000_000, write=1_000_000_000)) == 2.0
    assert RATES.seconds(work(write=3_000_000_000)) == 3.0
    assert RATES.seconds(work(1, 1, flops=5_000_000_000_000)) == 10.0


def test_matrices_and_elements_are_computed_one_after_the_other() -> None:
    assert RATES.seconds(work(flops=500_000_000_000, elements=6_000_000_000)) == 3.0


def test_a_merge_is_predicted_as_it_was_measured() -> None:
    done = work(8_000, 4_000, 6_000_000, 3_000)
    rates = measured(done, reading=2.0, writing=1.0, computing=10.0, matrices=6.0)
    assert rates == Rates(4_000.0, 4_000.0, 1_000_000.0, 750.0)
    assert rates.seconds(done) == pytest.approx(10.0)


@pytest.mark.parametrize("done", [work(8, 8, flops=100), work(8, 8, elements=100)])
def test_of_one_sort_of_work_alone_all_the_time_is_its_own_and_the_other_costs_nothing(done: Work) -> None:
    rates = measured(done, reading=0.0, writing=0.0, computing=10.0, matrices=4.0 if done.matrix_flops else 0.0)
    save_rates("measured", rates)
    assert load_rates("measured") == rates
    assert rates.seconds(done) == pytest.approx(10.0)
    other = work(flops=done.element_bytes, elements=done.matrix_flops)
    assert rates.seconds(other) < 1e-9


def test_steps_that_waited_take_no_more_than_all_the_time_of_arithmetic() -> None:
    rates = measured(work(8, 8, 100, 100), reading=1.0, writing=1.0, computing=5.0, matrices=7.0)
    assert rates.flops_per_second == 20.0
    assert math.isfinite(rates.element_bytes_per_second)


def test_rates_lie_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert rates_path() == tmp_path / "xdg/streammerge/rates.json"
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert rates_path() == tmp_path / ".cache/streammerge/rates.json"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"7",
        b"{}",
        b'{"element": 3}',
        b'{"element": {}}',
        b'{"element": {"read_bytes_per_second": 1}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1, "flops_per_second": 1}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1,'
        b' "flops_per_second": "fast", "element_bytes_per_second": 1}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1,'
        b' "flops_per_second": null, "element_bytes_per_second": 1}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1,'
        b' "flops_per_second": 0, "element_bytes_per_second": 1}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1,'
        b' "flops_per_second": -1, "element_bytes_per_second": 1}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1,'
        b' "flops_per_second": NaN, "element_bytes_per_second": 1}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1,'
        b' "flops_per_second": Infinity, "element_bytes_per_second": 1}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1,'
        b' "flops_per_second": 1, "element_bytes_per_second": 1, "more": 1}}',
    ],
)
def test_a_damaged_memory_is_none_and_is_mended_by_the_next_merge(content: bytes) -> None:
    rates_path().parent.mkdir(parents=True)
    rates_path().write_bytes(content)
    assert load_rates("element") is None
    save_rates("element", RATES)
    assert load_rates("element") == RATES


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    save_rates("element", RATES)
    assert load_rates("element") is None


def test_a_user_without_a_home_can_merge_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    save_rates("element", RATES)
    assert load_rates("element") is None


def test_saving_replaces_the_file_whole_and_leaves_nothing_beside_it() -> None:
    save_rates("element", RATES)
    save_rates("matrix", RATES)
    assert [path.name for path in rates_path().parent.iterdir()] == ["rates.json"]
    table = json.loads(rates_path().read_text())
    assert all(math.isfinite(rate) for kind in table.values() for rate in kind.values())
