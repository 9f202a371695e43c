"""Merges in processes of their own that die at a chosen moment, as from a kill or a power cut."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import streammerge
from streammerge import memory, methods, stream, write
from tests import odd_methods

# forked from a process that has torch loaded but no threads, each death costs a tenth of a second
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["__main__", "tests.crashing", "streammerge.write"])

CALLS = ("pwrite", "write", "fdatasync", "fsync", "rename", "unlink", "posix_fallocate", "ftruncate")
# in slow motion a merge rests before each of these, so that a kill may land anywhere
SLOW_CALLS = (*CALLS, "mkdir", "pread", "preadv")
PAUSE_SECONDS = 0.0003
SHARD_BYTES = 6000
# what a merge goes through, by its calls: while it merges it reads, writes and makes durable at the same time
PHASES = (
    "planning", "laying out", "looking", "reading", "writing", "committing", "flushing", "checking", "publishing",
    "tidying",
)  # fmt: skip
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


def start(recipe: Mapping[str, object], out: Path, *, resume: bool = False, rests_after: int = -1) -> Any:
    """Begin a merge in a process of its own; `rests_after` so many calls it does nothing more."""
    process = _PROCESSES.Process(target=_merge, args=(dict(recipe), str(out), -1, False, resume, rests_after))
    process.start()
    return process


class Stopped(NamedTuple):
    """What became of a merge: its exit code, None when it hangs, where the signal hit, the phase of each call."""

    code: int | None
    hit: str
    phases: list[str]


def stopped(
    recipe: Mapping[str, object], out: Path, moment: int | tuple[str, int], after: float = 0.0, *,
    number: int = signal.SIGKILL, resume: bool = False,
) -> Stopped:  # fmt: skip
    """Run the command line in slow motion and send a signal `after` seconds into its `moment`-th call.

    A moment in a phase is kept: the merge rests in that call until the signal. What it says goes to `out`.stderr.
    """
    receive, send = _PROCESSES.Pipe(duplex=False)
    rests_at = moment if isinstance(moment, tuple) else None
    process = _PROCESSES.Process(target=_merge_slowly, args=(dict(recipe), str(out), resume, send, rests_at))
    process.start()
    send.close()
    phases: list[str] = []
    with suppress(EOFError):
        while phases.count(rests_at[0]) < rests_at[1] if rests_at else len(phases) < moment:  # type: ignore[operator]
            phases.append(receive.recv_bytes().decode())
        time.sleep(after)
    assert process.pid is not None
    hit = len(phases)
    # it may have ended by itself
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)
    # a pipe that is full must not be what it waits for
    with suppress(EOFError):
        while receive.poll(60):
            phases.append(receive.recv_bytes().decode())
    process.join(60)
    code = process.exitcode
    process.kill()
    process.join()
    # in the call that rested, or in the last of all
    return Stopped(code, phases[hit - 1 if rests_at else -1], phases)


def _merge_slowly(
    recipe: dict[str, object], out: str, resume: bool, send: Any, rests_at: tuple[str, int] | None
) -> None:
    from streammerge import cli

    small_pieces()
    methods.METHODS.update(dict.fromkeys(odd_methods.NAMES, "tests.odd_methods"))
    with open(f"{out}.stderr", "wb") as file:
        os.dup2(file.fileno(), 2)
    Path(f"{out}.yaml").write_text(json.dumps(recipe))
    stages = _Stages(out)
    lock = threading.Lock()
    seen: Counter[str] = Counter()
    for name, real in [(name, getattr(os, name)) for name in SLOW_CALLS]:

        def slow(*arguments: Any, name: str = name, real: Callable[..., Any] = real, **named: Any) -> Any:
            with lock:
                phase = stages.phase(name)
                seen[phase] += 1
                send.send_bytes(phase.encode())
                rests = rests_at == (phase, seen[phase])
            time.sleep(60 if rests else PAUSE_SECONDS)
            done = real(*arguments, **named)
            if name == "rename":
                stages.renamed(*arguments)
            return done

        setattr(os, name, slow)
    sys.argv = ["streammerge", "merge", f"{out}.yaml", out, "-q", "--max-shard-size", str(SHARD_BYTES)]
    sys.argv += ["--resume"] if resume else []
    cli.main()


class _Stages:
    """How far a merge has come, told by which of its functions run."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._now = "planning"
        self._around(write.Writer, "__init__", "laying out", "merging")
        self._around(stream.Stream, "_look_at_model", "looking", "merging")
        self._around(write.Writer, "flush", "flushing", "checking")
        self._around(write.Writer, "publish", "publishing", "over")

    def phase(self, call: str) -> str:
        """The phase that a call belongs to."""
        if self._now != "merging":
            return self._now
        return {"preadv": "reading", "pwrite": "writing"}.get(call, "committing")

    def renamed(self, source: object, target: object) -> None:
        """After its last rename only the journal is in the way."""
        if str(target) == self._out:
            self._now = "tidying"

    def _around(self, owner: Any, name: str, during: str, after: str) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def staged(*arguments: Any, **named: Any) -> Any:
            self._now = during
            result = real(*arguments, **named)
            self._now = after
            return result

        setattr(owner, name, staged)


def _merge(
    recipe: dict[str, object], out: str, moment: int, power_cut: bool, resume: bool, rests_after: int = -1
) -> None:
    small_pieces()
    disk = _Disk(moment, random.Random(moment) if power_cut else None, rests_after)
    for name in CALLS:
        setattr(os, name, disk.counted(name))
    streammerge.merge(recipe, out, resume=resume, max_shard_size=SHARD_BYTES)
    if moment == AFTER_THE_LAST:
        disk.die("", ())


class _Disk:
    """Counts calls that change the disk, dies at one of them, and knows what was not synced by then."""

    def __init__(self, moment: int, power_cut: random.Random | None, rests_after: int) -> None:
        self._moment, self._power_cut, self._rests_after = moment, power_cut, rests_after
        self._calls = 0
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CALLS}
        self._unsynced: dict[int, list[tuple[int, bytes]]] = {}
        self._files: dict[int, int] = {}
        self._journal_synced = 0

    def counted(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self._calls == self._moment:
                self.die(name, arguments)
            if self._calls == self._rests_after:
                time.sleep(600)
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
