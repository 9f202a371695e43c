"""Processes that merge together, as a launcher would start them: on one host, or on several that share a folder."""

from __future__ import annotations

import ctypes
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from streammerge import methods
from tests import crashing, looking_methods, odd_methods

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["__main__", "tests.crashing", "tests.processes", "streammerge.ranks.run"])

# as many in each run; what processes tell each other, again and again, is not among them
CALLS = (*crashing.CALLS, "mkdir", "rmdir")
_NEW_HOST_NAME = 0x04000000


class Ended(NamedTuple):
    """What became of a process: its exit code, what it said, and how many of CALLS it made."""

    code: int | None
    stdout: str
    stderr: str
    calls: int


class Rank:
    """One process of a merge, under way.

    host, blind  on a host of that name, with a working folder of its own; `blind` hosts see no locks of others
    dies_at      it is killed at that of its calls; `rests_at` it stops there until `go_on`
    silent       after how long a process whose lock is not seen counts as gone
    join         how long it waits for the others
    aside        sets apart what it says from another's of the same rank
    """

    def __init__(
        self, recipe: Mapping[str, object], out: Path, rank: int, size: int, *options: str, host: str | None = None,
        blind: bool = False, dies_at: int = -1, rests_at: int = -1, silent: float = 20.0, join: float = 30.0,
        aside: str = "",
    ) -> None:  # fmt: skip
        self.rank = rank
        self._talk = out.with_name(f"{out.name}.{aside}rank{rank}")
        self._receive, send = _PROCESSES.Pipe(duplex=False)
        told = {
            "recipe": dict(recipe), "out": str(out), "rank": rank, "size": size, "options": options, "host": host,
            "blind": blind, "dies_at": dies_at, "rests_at": rests_at, "silent": silent, "join": join,
        }  # fmt: skip
        self.process: Any = _PROCESSES.Process(target=_run, args=(told, str(self._talk), send))
        self.process.start()
        send.close()

    def end(self, seconds: float = 60.0) -> Ended:
        """Wait for its end. AssertionError where it goes on for ever."""
        calls = 0
        deadline = time.monotonic() + seconds
        with suppress(EOFError):
            while self._receive.poll(max(deadline - time.monotonic(), 0)):
                calls = self._receive.recv()
        self.process.join(max(deadline - time.monotonic(), 0.1))
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"rank {self.rank} was still there after {seconds} s: {self._said('stderr')}")
        return Ended(self.process.exitcode, self._said("stdout"), self._said("stderr"), calls)

    def rests(self) -> None:
        """Return when it has come to the call at which it rests."""
        assert self._receive.poll(60)
        assert self.process.is_alive()

    def go_on(self) -> None:
        """Let it go on."""
        Path(f"{self._talk}.go").touch()

    def _said(self, stream: str) -> str:
        said = Path(f"{self._talk}.{stream}")
        # it may have died before it could speak
        return said.read_text() if said.exists() else ""


def together(recipe: Mapping[str, object], out: Path, size: int, *options: str, **more: Any) -> list[Ended]:
    """Merge with so many processes of one host, to their ends."""
    ranks = [Rank(recipe, out, rank, size, *options, **more) for rank in range(size)]
    return [rank.end() for rank in ranks]


def _run(told: dict[str, Any], talk: str, send: Any) -> None:
    from streammerge import cli
    from streammerge.ranks import meeting

    for number, stream in ((1, "stdout"), (2, "stderr")):
        with open(f"{talk}.{stream}", "wb") as file:
            os.dup2(file.fileno(), number)
    crashing.small_pieces()
    methods.METHODS.update(dict.fromkeys(odd_methods.NAMES, "tests.odd_methods"))
    methods.METHODS.update(dict.fromkeys(looking_methods.NAMES, "tests.looking_methods"))
    meeting.LOOK_SECONDS = 0.05
    meeting.LAST_WORDS_SECONDS = 0.4
    meeting.JOIN_SECONDS, meeting.SILENT_SECONDS = told["join"], told["silent"]
    os.environ |= {"RANK": str(told["rank"]), "WORLD_SIZE": str(told["size"])}
    if told["host"]:
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        _on_host(told["host"], Path(f"{talk}.home"))
    if told["blind"]:
        fcntl.flock = lambda *arguments: None
    calls = _Calls(told["dies_at"], told["rests_at"], Path(f"{talk}.go"), send)
    for name in CALLS:
        setattr(os, name, calls.counted(getattr(os, name)))
    recipe = Path(f"{talk}.yaml")
    recipe.write_text(json.dumps(told["recipe"]))
    sys.argv = ["streammerge", "merge", str(recipe), told["out"], "--max-shard-size", str(crashing.SHARD_BYTES)]
    sys.argv += told["options"]
    try:
        cli.main()
    finally:
        send.send(calls.number)


def _on_host(name: str, home: Path) -> None:
    home.mkdir(exist_ok=True)
    os.chdir(home)
    # a host name of its own takes root's rights
    if ctypes.CDLL(None).unshare(_NEW_HOST_NAME) == 0:
        with suppress(OSError):
            socket.sethostname(name)
    socket.gethostname = lambda: name  # type: ignore[assignment]


class _Calls:
    def __init__(self, dies_at: int, rests_at: int, go_on: Path, send: Any) -> None:
        self.number = 0
        self._dies_at, self._rests_at, self._go_on, self._send = dies_at, rests_at, go_on, send
        self._lock = threading.Lock()

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                number, self.number = self.number, self.number + 1
            if number == self._dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == self._rests_at:
                self._send.send(number)
                while not self._go_on.exists():
                    time.sleep(0.01)
            return real(*arguments, **named)

        return call
