"""Calls into the operating system that fail, fall short, or are noted so that a power cut can be made of them."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

# every call that storing makes, and every call that reading models makes
WRITING = (
    "open", "close", "mkdir", "rmdir", "rename", "unlink", "listdir", "stat", "lstat", "fstat", "flock", "pread",
    "preadv", "pwrite", "write", "fdatasync", "fsync", "ftruncate", "posix_fallocate", "posix_fadvise",
)  # fmt: skip
READING = ("open", "close", "scandir", "stat", "fstat", "pread", "preadv", "posix_fadvise")
# those that may move fewer bytes than asked for, and where their bytes stand among the arguments
SHORT = {"pread": 1, "preadv": 1, "pwrite": 1, "write": 1}

Act = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def intercepted(names: tuple[str, ...], root: Path, act: Act) -> Iterator[None]:
    """Pass every call that concerns something under `root` through `act`."""
    with ExitStack() as patches:
        for name in names:
            module = fcntl if name == "flock" else os
            real = getattr(module, name)

            def call(*arguments: Any, name: str = name, real: Callable[..., Any] = real, **named: Any) -> Any:
                if not _path(arguments[0] if arguments else "").startswith(str(root)):
                    return real(*arguments, **named)
                return act(name, real, arguments, named)

            patches.enter_context(mock.patch.object(module, name, call))
        yield


def _path(target: object) -> str:
    try:
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}")
        return os.path.abspath(os.fsdecode(target))  # type: ignore[arg-type]
    except (OSError, TypeError, ValueError):
        return ""


class Failing:
    """The k-th call, counted from 0, fails with `code`, and with `forever` every later one. Counts in `calls`.

    code  an errno; None lets calls that move bytes move half of them, or one
    """

    def __init__(self, k: int, code: int | None, *, forever: bool = False) -> None:
        self._k, self._code, self._forever = k, code, forever
        self._lock = threading.Lock()
        self.calls = 0
        self.failed: str | None = None

    def __call__(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        with self._lock:
            number, self.calls = self.calls, self.calls + 1
        if number < self._k or (number > self._k and not self._forever):
            return real(*arguments, **named)
        if self._code is None:
            return real(*_shortened(name, arguments), **named)
        self.failed = self.failed or name
        if name == "close":
            # as Linux does: the error is told, the descriptor is gone
            real(*arguments)
        raise OSError(self._code, os.strerror(self._code))


def _shortened(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if name not in SHORT:
        return arguments
    first, what, *rest = arguments
    if isinstance(what, int):
        return first, max(what // 2, min(what, 1)), *rest
    if isinstance(what, list):
        (buffer,) = what
        return first, [buffer[: max(len(buffer) // 2, min(len(buffer), 1))]], *rest
    return first, what[: max(len(what) // 2, 1)], *rest


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise AssertionError in the main thread if it takes longer: what hangs is told, not waited for."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still not back after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class _File:
    def __init__(self, content: bytes = b"") -> None:
        self.before = content


class _Folder:
    def __init__(self) -> None:
        self.before: dict[str, _File | _Folder] = {}
        self.now: dict[str, _File | _Folder] = {}


class Disk:
    """Notes all that happens under `root`, to say what a power cut leaves of it.

    As POSIX has it and no more: what a file holds is durable after its fsync or fdatasync, what a folder names after
    the folder's; of all else each change may be lost alone, and a write may be torn or leave zeros. A rename is one
    change: both names or neither.
    """

    CALLS = ("open", "close", "mkdir", "rename", "unlink", "rmdir", "pwrite", "write", "fdatasync", "fsync",
             "ftruncate", "posix_fallocate")  # fmt: skip

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tree = _read_tree(root)
        self._opened: dict[int, _File | _Folder] = {}
        self._lock = threading.RLock()
        # what changed, how, and to what
        self.changes: list[tuple[_File | _Folder, str, tuple[Any, ...]]] = []

    def noting(self) -> Any:
        """While this context is entered, calls are noted."""
        return intercepted(self.CALLS, self._root, self._note)

    def power_cut(self, moment: int, chance: random.Random, target: Path) -> None:
        """Write to `target` what is found when the power goes after `moment` changes."""
        seen = self.changes[:moment]
        last_sync = {id(thing): place for place, (thing, kind, _) in enumerate(seen) if kind == "sync"}
        # all that may be lost is; or as much is kept, in order, as by a journalling file system; or each by itself
        mode = chance.choice(("lost", "ordered", "single", "single"))
        kept_until = chance.randrange(moment + 1)
        contents: dict[int, bytearray] = {}
        names: dict[int, dict[str, _File | _Folder]] = {}
        for place, (thing, kind, facts) in enumerate(seen):
            durable = place < last_sync.get(id(thing), -1) or (mode == "ordered" and place < kept_until)
            if kind == "sync" or not (durable or (mode == "single" and chance.random() < 0.5)):
                continue
            if isinstance(thing, _Folder):
                _rename(names.setdefault(id(thing), dict(thing.before)), kind, facts)
            else:
                torn = None if durable else chance.choice((None, "half", "zeros"))
                _refill(contents.setdefault(id(thing), bytearray(thing.before)), kind, facts, torn)
        _write_tree(self._tree, target, contents, names)

    def _note(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        with self._lock:
            result = real(*arguments, **named)
            if name == "open":
                self._note_open(result, *arguments[:2])
            elif name in ("mkdir", "rename", "unlink", "rmdir"):
                self._note_name(name, self._place(arguments[0]), arguments)
            else:
                self._note_bytes(name, arguments, result)
            return result

    def _place(self, path: Any) -> tuple[_Folder, str]:
        *above, last = Path(os.path.abspath(path)).relative_to(self._root.parent).parts
        folder = _Folder()
        folder.now = {self._root.name: self._tree}
        for part in above:
            below = folder.now[part]
            assert isinstance(below, _Folder)
            folder = below
        return folder, last

    def _note_open(self, descriptor: int, path: Any, flags: int) -> None:
        folder, name = self._place(path)
        if name not in folder.now:
            self._link(folder, name, _File())
        thing = self._opened[descriptor] = folder.now[name]
        if flags & os.O_TRUNC:
            self.changes.append((thing, "size", (0,)))

    def _link(self, folder: _Folder, name: str, thing: _File | _Folder) -> None:
        folder.now[name] = thing
        self.changes.append((folder, "link", (name, thing)))

    def _note_name(self, name: str, place: tuple[_Folder, str], arguments: tuple[Any, ...]) -> None:
        folder, last = place
        if name == "mkdir":
            self._link(folder, last, _Folder())
        elif name == "rename":
            other, new = self._place(arguments[1])
            assert folder is other, "a rename between folders is two changes"
            folder.now[new] = folder.now.pop(last)
            self.changes.append((folder, "rename", (last, new)))
        else:
            del folder.now[last]
            self.changes.append((folder, "unlink", (last,)))

    def _note_bytes(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        descriptor, *rest = arguments
        thing = self._opened[descriptor]
        if name == "close":
            del self._opened[descriptor]
        elif name in ("fsync", "fdatasync"):
            self.changes.append((thing, "sync", ()))
        elif name == "pwrite":
            self.changes.append((thing, "write", (rest[1], bytes(rest[0][:result]))))
        elif name == "write":
            end = os.lseek(descriptor, 0, os.SEEK_CUR)
            self.changes.append((thing, "write", (end - result, bytes(rest[0][:result]))))
        else:
            self.changes.append((thing, "size", (rest[-1],)))


def _rename(names: dict[str, _File | _Folder], kind: str, facts: tuple[Any, ...]) -> None:
    if kind == "link":
        names[facts[0]] = facts[1]
    elif kind == "unlink":
        names.pop(facts[0], None)
    elif facts[0] in names:
        names[facts[1]] = names.pop(facts[0])


def _refill(content: bytearray, kind: str, facts: tuple[Any, ...], torn: str | None) -> None:
    if kind == "size":
        del content[facts[0] :]
        content.extend(bytes(facts[0] - len(content)))
        return
    offset, data = facts
    if torn:
        data = data[: len(data) // 2] if torn == "half" else bytes(len(data))
    content.extend(bytes(max(offset + len(data) - len(content), 0)))
    content[offset : offset + len(data)] = data


def _read_tree(path: Path) -> _Folder:
    folder = _Folder()
    for each in path.iterdir():
        folder.before[each.name] = _read_tree(each) if each.is_dir() else _File(each.read_bytes())
    folder.now = dict(folder.before)
    return folder


def _write_tree(
    folder: _Folder, target: Path, contents: dict[int, bytearray], names: dict[int, dict[str, _File | _Folder]]
) -> None:
    target.mkdir()
    for name, thing in names.get(id(folder), folder.before).items():
        if isinstance(thing, _Folder):
            _write_tree(thing, target / name, contents, names)
        else:
            (target / name).write_bytes(contents.get(id(thing), thing.before))
