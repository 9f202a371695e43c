"""What the process holds of anonymous memory while a merge runs, sampled so seldom that it costs nothing."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_INTERVAL_SECONDS = 0.25
# a report holds no more of them than a screen has room for
_MOST = 240


class MemorySamples:
    """Pairs of seconds since the beginning and bytes of anonymous memory beyond what was there then.

    A sample costs one read of some 30 bytes from /proc. Where that is not to be had there are none. Of a long merge
    every other sample is given up, again and again, and the interval doubled, so that at most 240 are left.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._interval = self._due = _INTERVAL_SECONDS
        self._at_first = anonymous_bytes()
        self.samples: list[tuple[float, int]] = [] if self._at_first is None else [(0.0, 0)]

    def look(self) -> None:
        """Take a sample, if the last was long enough ago."""
        if time.monotonic() - self._started >= self._due:
            self._add(_LATEST.anonymous_bytes())

    def take(self) -> None:
        """Take a sample now."""
        self._add(anonymous_bytes())

    def _add(self, held: int | None) -> None:
        if held is None or self._at_first is None:
            return
        seconds = time.monotonic() - self._started
        self.samples.append((round(seconds, 3), held - self._at_first))
        if len(self.samples) >= _MOST:
            # the most that was held must stay to be seen
            pairs = zip(self.samples[::2], self.samples[1::2], strict=False)
            self.samples = [max(pair, key=lambda sample: sample[1]) for pair in pairs]
            self._interval *= 2
        self._due = seconds + self._interval


class _Latest:
    """What was read last: merges side by side would each read the same number at about the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = float("-inf")
        self._bytes: int | None = None

    def anonymous_bytes(self) -> int | None:
        with self._lock:
            now = time.monotonic()
            if not 0 <= now - self._seconds < _INTERVAL_SECONDS / 2:
                self._seconds, self._bytes = now, anonymous_bytes()
            return self._bytes


_LATEST = _Latest()


def anonymous_bytes() -> int | None:
    """Resident memory of this process that no file backs; None where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        with open("/proc/self/statm", "rb") as file:
            fields = file.read(128).split()
        return (int(fields[1]) - int(fields[2])) * _PAGE_BYTES
    return None
