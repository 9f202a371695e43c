"""Merges in processes of their own that die at a chosen moment, as from a kill or a power cut."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import streammerge
from streammerge import memory, write

# forked from a process that has torch loaded but no threads, each death costs a tenth of a second
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["__main__", "tests.crashing", "streammerge.write"])

CALLS = ("pwrite", "fdatasync", "fsync", "rename", "posix_fallocate")
SHARD_BYTES = 6000
# no merge of the tests makes so many calls
AFTER_THE_LAST = 1 << 30


def small_pieces() -> None:
    """Make tensors of a few bytes count as large: many blocks, many groups."""
    memory.LARGEST_SLOT_BYTES = 256
    write.GROUP_BYTES = 1500


def dies(
    recipe: Mapping[str, object], out: Path, moment: int, *, power_cut: bool = False, resume: bool = False
) -> bool:
    """Merge in a process that is killed at its `moment`-th call that changes the disk; whether it got there.

    power_cut   what was not synced by then is lost, or not, piece by piece: the seed is `moment`
    """
    process = _PROCESSES.Process(target=_merge, args=(dict(recipe), str(out), moment, power_cut, resume))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), f"the merge ended with {process.exitcode}"
    return process.exitcode != 0


def start(recipe: Mapping[str, object], out: Path, *, resume: bool = False) -> Any:
    """Begin a merge in a process of its own."""
    process = _PROCESSES.Process(target=_merge, args=(dict(recipe), str(out), -1, False, resume))
    process.start()
    return process


def _merge(recipe: dict[str, object], out: str, moment: int, power_cut: bool, resume: bool) -> None:
    small_pieces()
    disk = _Disk(moment, random.Random(moment) if power_cut else None)
    for name in CALLS:
        setattr(os, name, disk.counted(name))
    streammerge.merge(recipe, out, resume=resume, max_shard_size=SHARD_BYTES)
    if moment == AFTER_THE_LAST:
        disk.die("", ())


class _Disk:
    """Counts calls that change the disk, dies at one of them, and knows what was not synced by then."""

    def __init__(self, moment: int, power_cut: random.Random | None) -> None:
        self._moment, self._power_cut = moment, power_cut
        self._calls = 0
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CALLS}
        self._unsynced: dict[int, list[tuple[int, bytes]]] = {}
        self._files: dict[int, int] = {}
        self._journal_synced = 0

    def counted(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self._calls == self._moment:
                self.die(name, arguments)
            self._calls += 1
            if name == "pwrite":
                descriptor, data, offset = arguments
                file = os.fstat(descriptor).st_ino
                if file not in self._files:
                    # of our own, for when the merge has closed its own
                    self._files[file] = os.dup(descriptor)
                self._unsynced.setdefault(file, []).append((offset, os.pread(descriptor, len(data), offset)))
            result = self._real[name](*arguments)
            if name == "fdatasync":
                self._unsynced.pop(os.fstat(arguments[0]).st_ino, None)
            if name == "fsync" and _path(arguments[0]).endswith(write.JOURNAL):
                self._journal_synced = os.fstat(arguments[0]).st_size
            return result

        return call

    def die(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "pwrite":
            # the call is torn
            descriptor, data, offset = arguments
            self._real["pwrite"](descriptor, data[: len(data) // 2], offset)
        if self._power_cut is not None:
            self._lose(self._power_cut)
        os.kill(os.getpid(), signal.SIGKILL)

    def _lose(self, chance: random.Random) -> None:
        for file, writes in self._unsynced.items():
            for offset, before in reversed(writes):
                if chance.random() < 0.5:
                    self._real["pwrite"](self._files[file], before, offset)
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            path = _path(descriptor)
            if path.endswith(write.JOURNAL):
                os.truncate(path, chance.randint(self._journal_synced, os.path.getsize(path)))


def _path(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""
