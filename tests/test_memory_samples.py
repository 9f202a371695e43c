"""Memory over time: few samples, none of the peaks lost."""

from __future__ import annotations

import mmap

import pytest

from streammerge import memory_samples
from streammerge.memory_samples import MemorySamples, anonymous_bytes


def fresh_memory(nbytes: int) -> mmap.mmap:
    """Pages that were never the allocator's, written to: what it hands out may be memory that it kept."""
    held = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for place in range(0, nbytes, mmap.PAGESIZE):
        held[place] = 1
    return held


def test_anonymous_memory_is_counted_and_that_of_files_is_not(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(64 << 20))
    before = anonymous_bytes()
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        assert anonymous_bytes() - before < 32 << 20
    with fresh_memory(64 << 20):
        assert anonymous_bytes() - before > 60 << 20


def test_samples_tell_what_came_on_top():
    samples = MemorySamples()
    with fresh_memory(64 << 20):
        samples.take()
    assert samples.samples[0] == (0.0, 0)
    assert samples.samples[1][1] > 60 << 20


def test_a_long_merge_keeps_few_samples_and_its_peak(monkeypatch):
    now, held = [0.0], [0]
    monkeypatch.setattr(memory_samples.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(memory_samples, "anonymous_bytes", lambda: held[0])
    samples = MemorySamples()
    for tenth in range(36_000):
        now[0], held[0] = tenth / 10, 7 if tenth == 20_001 else tenth % 5
        samples.take() if tenth == 20_001 else samples.look()
    assert 100 < len(samples.samples) < 240
    assert max(bytes_ for _, bytes_ in samples.samples) == 7
    assert [seconds for seconds, _ in samples.samples] == sorted(seconds for seconds, _ in samples.samples)


def test_merges_side_by_side_read_the_system_once(monkeypatch):
    now, reads = [0.0], [0]

    def read() -> int:
        reads[0] += 1
        return reads[0]

    monkeypatch.setattr(memory_samples.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(memory_samples, "anonymous_bytes", read)
    merges = [MemorySamples() for _ in range(12)]
    reads[0] = 0
    for hundredth in range(1, 1001):
        now[0] = hundredth / 100
        for samples in merges:
            samples.look()
    assert 30 <= reads[0] <= 40
    assert all(len(samples.samples) == len(merges[0].samples) for samples in merges)


def test_a_system_that_does_not_tell_leaves_no_samples(monkeypatch):
    monkeypatch.setattr(memory_samples, "anonymous_bytes", lambda: None)
    samples = MemorySamples()
    samples.take()
    assert samples.samples == []


@pytest.mark.parametrize("text", ["", "1 2", "a b c"])
def test_a_strange_proc_is_no_error(monkeypatch, tmp_path, text):
    path = tmp_path / "statm"
    path.write_text(text)
    opened = open
    monkeypatch.setattr(
        "builtins.open", lambda name, *rest: opened(path if name == "/proc/self/statm" else name, *rest)
    )
    assert anonymous_bytes() is None
