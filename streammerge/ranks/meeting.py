"""How processes of one merge find each other, and learn how the others fare: by small files in the folder they fill.

Each process keeps one file up to date in `processes-ID` in `OUT.partial`: what it is about and a count that grows
while it lives. Only whole files are ever seen (rename), and no clock is compared with another host's.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from streammerge.checkpoint import parse_json
from streammerge.errors import CheckpointError, StreamMergeError, escaped, listed, quoted
from streammerge.folder import REPORT_NAME
from streammerge.journal import JOURNAL, os_errors
from streammerge.share_journals import MEETINGS, forget_meeting, share_journal
from streammerge.world import World
from streammerge.write import changed_values

# how long processes wait for each other to come
JOIN_SECONDS = 600.0
# of a process whose lock is not to be seen: longer than what a network file system may keep from view, a minute
SILENT_SECONDS = 150.0
LOOK_SECONDS = 0.5
# how long one that ended is waited for, to leave the folder in order
LEAVE_SECONDS = 5.0
_TELL_SECONDS = 20.0
LAST_WORDS_SECONDS = 2.0
_GO_ON = "What is done is kept: pass `--resume`, with any number of processes, to go on."

Post = Mapping[str, Any]


class Meeting:
    """What a process knows of the others, and tells them, from a thread of its own. Use as a context manager.

    folder    where the output is made
    identity  what is merged and by what versions; all must agree

    A process is joined, working, then done or failed; the first one's meeting is open, working, perhaps ended. Leaving
    it by an exception tells the others, who then end too. `check` raises StreamMergeError where another failed or is
    gone: the lock on its journal tells that at once where it is seen, as on one host; else its count, which stops.
    """

    def __init__(self, folder: Path, world: World, identity: Mapping[str, Any], *, tell: Callable[[str], None]) -> None:
        self._partial, self._world, self._tell = folder, world, tell
        self._identity = json.loads(json.dumps(identity))
        self._place: Path | None = None
        self._others: dict[int, _Other] = {}
        self.host = socket.gethostname()
        # whether no other process is in it any more
        self.is_over = world.is_first
        self._state: dict[str, Any] = {"host": self.host, "process": os.getpid()}
        self._count, self._read = 0, (0, 0)
        self._lock = threading.RLock()
        self._looked = _now()
        self._failure: StreamMergeError | None = None
        # of a meeting that was seen and not entered, also when it is over
        self._why_not = ""
        self._begun = world.is_first
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._published: Callable[[], bool] = lambda: False

    # coming together

    def open(self, facts: Mapping[str, Any]) -> None:
        """As the first process: wait for all others, and let them begin. `facts` is what they need to know.

        Raises StreamMergeError where one does not come, or merges something else.
        """
        self._place = self._partial / MEETINGS.replace("*", secrets.token_hex(8))
        with os_errors(self._partial):
            self._place.mkdir()
            self._say(state="open", size=self._world.size)
        self.is_over = False
        self._others = {rank: _Other(self._post_of(rank)) for rank in range(1, self._world.size)}
        self._start()

        def missing() -> str | None:
            self._look()
            ranks = [str(rank) for rank, other in self._others.items() if other.post is None]
            return f"of {self._world.size} processes rank {', '.join(ranks)} did not come" if ranks else None

        self._await(missing)
        for rank in self._others:
            told = _read(self._place / f"{rank:05d}.identity.json") or {}
            if changes := changed_values(self._identity, told, "{} is {}, and {} there"):
                raise StreamMergeError(
                    f"{self._name(rank)} merges something else than rank 0:{listed(changes)}",
                    hint="Start all processes with the same command, models and versions.",
                )
        self._announce(state="working", **facts)

    def join(self) -> Mapping[str, Any]:
        """As another process: find the first one's meeting; what it lets all know.

        Raises StreamMergeError where there is none in time, or it ends before it begins.
        """
        found: dict[str, Any] = {}

        def missing() -> str | None:
            if not (self._place and self._place.is_dir()) and (why_not := self._enter()):
                return why_not
            self._look()
            first = self._others[0]
            if first.changed and not self._begun:
                # not what is left of an earlier run
                with self._lock:
                    first.watch(self._partial / JOURNAL)
                    self._begun = True
            post = first.post or {}
            found.update(post)
            return None if post.get("state") == "working" else "rank 0 did not begin"

        self._await(missing)
        with os_errors(self._partial):
            self._published = _Published(self._partial)
        with self._lock:
            self._others[0].watch(self._partial / JOURNAL)
        self._begun = True
        return found

    def _enter(self) -> str | None:
        """Go to a meeting that is open, or say why there is none."""
        self._end()
        self._others, self._place = {}, None
        rank, size = self._world.rank, self._world.size
        for place in sorted(self._partial.glob(MEETINGS)):
            post = _read(self._post_of(0, place)) or {}
            if post.get("state") != "open" or post.get("size") != size:
                continue
            # what is left of an earlier run is deleted by the next first process, at any time
            with suppress(FileNotFoundError):
                try:
                    os.close(os.open(place / f"{rank:05d}.claim", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                except FileExistsError:
                    self._why_not = f"another process came as rank {rank} of {size}, and no merge by others was begun"
                    continue
                _write(place / f"{rank:05d}.identity.json", self._identity)
                self._place = place
                self._say(state="joined")
                self._others = {0: _Other(self._post_of(0))}
                self._start()
                return None
        return self._why_not or f"no merge by {size} processes was begun in {quoted(self._partial)}"

    def _await(self, missing: Callable[[], str | None]) -> None:
        """Return when nothing is missing any more. Tells once what is waited for."""
        began, told = time.monotonic(), False
        while (what := missing()) is not None:
            self.check()
            waited = time.monotonic() - began
            # where the first process is seen to wait, it is the one that gives up
            if waited >= JOIN_SECONDS and (self._world.is_first or not self._begun):
                raise StreamMergeError(
                    f"{what} within {JOIN_SECONDS:.0f} s",
                    hint="All processes need the same OUT and `WORLD_SIZE`, and `--resume` or none; "
                    "one that cannot begin says why.",
                )
            if waited > _TELL_SECONDS and not told:
                self._tell(f"{what} yet")
                told = True
            time.sleep(min(LOOK_SECONDS, 0.05 + waited / 10))

    # while it lasts

    def working(self) -> None:
        """Say that this process holds the lock on its journal."""
        self._announce(state="working")

    def check(self) -> None:
        """Raise StreamMergeError where another process failed or is gone."""
        if _now() - self._looked > 10 * LOOK_SECONDS:
            # this process was stopped, perhaps for so long that the others gave it up
            self._look()
        if self._failure is not None:
            raise self._failure

    def progress(self, done_bytes: int, total_bytes: int) -> tuple[int, int]:
        """Note what this process has read, and check; what all have read and will, as far as it is known."""
        # without the lock: it is held while files are read, and this is called for each block
        self._read = done_bytes, total_bytes
        self.check()
        posts = [other.post or {} for other in self._others.values()]
        done, total = zip(self._read, *(post.get("read", (0, 0)) for post in posts), strict=True)
        return sum(done), sum(total)

    def done(self, facts: Mapping[str, Any]) -> None:
        """Say that all that this process had to do is durable and in its journal."""
        self._announce(state="done", facts=dict(facts))

    def all_done(self, waiting: Callable[[], None]) -> list[Mapping[str, Any]]:
        """As the first: what each other process said when it was done. `waiting` is called again and again."""
        while not all(other.is_done() for other in self._others.values()):
            self._look()
            self.check()
            waiting()
            time.sleep(LOOK_SECONDS / 10 + 0.001 * self._world.size)
        return [(other.post or {}).get("facts", {}) for other in self._others.values()]

    def wait_published(self) -> None:
        """As another: return when the folder has its name. Raises StreamMergeError where it will not get it."""
        while not self._published():
            try:
                self.check()
            except StreamMergeError:
                # the first one's end may come to be seen before its folder's name does
                for _ in range(50 if self._others[0].is_gone() else 0):
                    if self._published():
                        return
                    time.sleep(LEAVE_SECONDS / 50)
                raise
            time.sleep(LOOK_SECONDS / 5)

    def close(self) -> None:
        """As the first, when all are done: nothing more is to be told."""
        self._end()
        if self._place is not None:
            with os_errors(self._partial):
                forget_meeting(self._place)

    def __enter__(self) -> Meeting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and self._place is not None and self._place.is_dir():
                self._fail(error)
        finally:
            self._end()

    def _fail(self, error: BaseException) -> None:
        message = _told(error)
        with suppress(OSError):
            self._say(state="ended" if self._world.is_first else "failed", error=message)
        if not self._world.is_first:
            return
        # so that what they had done is in order, and the folder gone if that is nothing
        limit = time.monotonic() + LEAVE_SECONDS
        while not all(other.has_left() for other in self._others.values()):
            if time.monotonic() > limit:
                return
            time.sleep(LOOK_SECONDS / 10)
        self.is_over = True

    def _end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        self._stop.clear()
        for other in self._others.values():
            other.close()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="streammerge-meeting", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            # a full disk, or a server that is away for a while, is no reason to end
            with suppress(OSError):
                self._say()
            self._look()

    def _announce(self, **news: Any) -> None:
        """Say what the others must know."""
        with os_errors(self._partial):
            try:
                self._say(**news)
            except FileNotFoundError:
                self._look()
                self.check()
                raise

    def _say(self, **news: Any) -> None:
        with self._lock:
            if self._place is None:
                return
            state = {**self._state, **news, "read": self._read}
            self._count += 1
            _write(self._post_of(self._world.rank), {**state, "count": self._count})
            self._state = state

    def _look(self) -> None:
        with self._lock:
            # a process that was stopped must not take the others' silence for longer than it saw of it
            seconds = min(_now() - self._looked, 4 * LOOK_SECONDS)
            self._looked = _now()
            if self._begun and self._failure is None and self._is_taken_over():
                self._failure = StreamMergeError(
                    f"the merge in {quoted(self._partial)} was ended or taken over by other processes", hint=_GO_ON
                )
            for rank, other in self._others.items():
                post = other.look(seconds)
                # one that is done may not have closed its journal yet
                if rank and post and post.get("state") in ("working", "done"):
                    other.watch(self._partial / share_journal(rank))
                if self._failure is None:
                    self._failure = self._trouble(rank, other)

    def _is_taken_over(self) -> bool:
        # the first process deletes it when all are done, or whoever goes on with a merge that was given up
        if self._state.get("state") not in ("joined", "open", "working"):
            return False
        with suppress(OSError):
            return self._place is not None and not self._place.is_dir()
        return False

    def _trouble(self, rank: int, other: _Other) -> StreamMergeError | None:
        post = other.post or {}
        if post.get("state") == "failed":
            return StreamMergeError(f"{self._name(rank)} failed: {_shown(post.get('error'))}", hint=_GO_ON)
        if post.get("state") == "ended":
            return StreamMergeError(f"the merge was ended by rank 0: {_shown(post.get('error'))}", hint=_GO_ON)
        if self._begun and other.is_gone() and not self._published():
            return StreamMergeError(
                f"{self._name(rank)} is gone: it ended without a word, or its host did", hint=_GO_ON
            )
        return None

    def _name(self, rank: int) -> str:
        post = self._others[rank].post or {}
        where = f" (process {escaped(post.get('process'))} on {quoted(post.get('host'))})" if post else ""
        return f"rank {rank} of {self._world.size}{where}"

    def _post_of(self, rank: int, place: Path | None = None) -> Path:
        place = place or self._place
        assert place is not None, "there is a meeting"
        return place / f"{rank:05d}.json"


class _Other:
    """Another process as it is seen: its last post, for how long that did not change, and whether its lock is held."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.post: Post | None = None
        self.changed = False
        self._silent_seconds = self._free_seconds = 0.0
        self._descriptor = -1
        # of a lock that was once seen to be held: whether it is held is the truth about its process
        self._held: bool | None = None

    def look(self, seconds: float) -> Post | None:
        """Its post as it is now, or was when it was there; `seconds` went by since the last look."""
        if self._held:
            self._held = self._is_held()
        elif self._held is False:
            self._free_seconds += seconds
        # after the lock: what it said last, before it let go of that, is seen
        post = _read(self._path)
        if post is None or (self.post is not None and post.get("count") == self.post.get("count")):
            self._silent_seconds += seconds
        else:
            self.changed = self.post is not None
            self.post, self._silent_seconds = post, 0.0
        return self.post

    def watch(self, journal: Path) -> None:
        """Watch the lock on its journal from now on, if it can be seen from here."""
        if self._descriptor >= 0:
            return
        with suppress(OSError):
            self._descriptor = os.open(journal, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._held = True if self._is_held() else None

    def is_done(self) -> bool:
        """Whether it has done its share and let go of its journal."""
        return bool(self.post and self.post.get("state") == "done" and not self._held)

    def has_left(self) -> bool:
        """Whether it has taken note of the end, or never came, or cannot take note."""
        state = (self.post or {}).get("state")
        return state is None or self.is_gone() or (not self._held and state == "failed")

    def is_gone(self) -> bool:
        """Whether it ended without a word."""
        if self.post is None or self.post.get("state") == "done":
            return False
        if self._held is None:
            return self._silent_seconds > SILENT_SECONDS
        # it lets go of its lock before it says why it failed
        return not self._held and self._free_seconds > LAST_WORDS_SECONDS

    def close(self) -> None:
        """Close what was opened to watch it."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)

    def _is_held(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            # no locks here, or the file is gone: nothing is known
            return self._held is True
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return False


class _Published:
    """Whether a folder got its final name: asked of the folder itself, whatever stands under that name otherwise."""

    def __init__(self, partial: Path) -> None:
        self._out = partial.with_name(partial.name.removesuffix(".partial"))
        self._folder = os.stat(partial)

    def __call__(self) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.stat(self._out), self._folder) and os.path.exists(self._out / REPORT_NAME)
        return False


def _told(error: BaseException) -> str:
    if isinstance(error, StreamMergeError):
        return error.message + (f" (hint: {error.hint})" if error.hint and error.hint != _GO_ON else "")
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    return f"{type(error).__name__}: {error}"


def _shown(message: object) -> str:
    return "\n".join(escaped(line) for line in str(message).splitlines())


def _read(path: Path) -> Post | None:
    """What a file says; None where it is not there, or is none of ours."""
    with suppress(OSError, CheckpointError):
        found = parse_json(path.read_bytes(), quoted(path))
        return found if isinstance(found, dict) else None
    return None


def _write(path: Path, value: Mapping[str, Any]) -> None:
    staged = path.with_name(f".{path.name}")
    staged.write_bytes(json.dumps(value).encode())
    os.replace(staged, path)


def _now() -> float:
    # goes on while the machine sleeps
    return time.clock_gettime(time.CLOCK_BOOTTIME)
