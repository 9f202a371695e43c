from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from streammerge.rates import Rates, load_rates, rates_path, save_rates

RATES = Rates(2e9, 1e9, 5e11)


def test_nothing_is_known_before_the_first_merge() -> None:
    assert load_rates("element") is None


def test_what_was_measured_is_remembered_for_each_kind() -> None:
    save_rates("element", RATES)
    save_rates("matrix", Rates(1.0, 2.0, 3.0))
    assert load_rates("element") == RATES
    assert load_rates("matrix") == Rates(1.0, 2.0, 3.0)
    save_rates("matrix", RATES)
    assert load_rates("matrix") == RATES


def test_the_slowest_of_reading_writing_and_arithmetic_sets_the_time() -> None:
    assert RATES.seconds(4_000_000_000, 1_000_000_000, 0) == 2.0
    assert RATES.seconds(0, 3_000_000_000, 0) == 3.0
    assert RATES.seconds(1, 1, 5_000_000_000_000) == 10.0


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
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1, "flops_per_second": "fast"}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1, "flops_per_second": null}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1, "flops_per_second": 0}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1, "flops_per_second": -1}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1, "flops_per_second": NaN}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1, "flops_per_second": Infinity}}',
        b'{"element": {"read_bytes_per_second": 1, "write_bytes_per_second": 1, "flops_per_second": 1, "more": 1}}',
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
