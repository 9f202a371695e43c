"""Progress on stderr: a bar on a terminal, a line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from streammerge.budget import format_bytes

_LINE_SECONDS = 30.0


class ProgressLine:
    """Shows bytes, rate and time left while used as a context manager."""

    def __init__(self, label: str, *, silent: bool) -> None:
        self._label = label
        self._silent = silent
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None
        if not silent and sys.stderr.isatty():
            self._bar = tqdm(
                desc=label,
                total=0,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                file=sys.stderr,
                leave=False,
            )

    def show(self, done_bytes: int, total_bytes: int) -> None:
        """So many bytes are read, of so many."""
        if self._bar is not None:
            self._bar.total = total_bytes
            self._bar.update(done_bytes - self._bar.n)
            return
        now = time.monotonic()
        if self._silent or now - self._last_line < _LINE_SECONDS:
            return
        self._last_line = now
        rate = done_bytes / (now - self._started)
        left = (total_bytes - done_bytes) / rate if rate else 0.0
        print(
            f"{self._label}: {done_bytes / max(total_bytes, 1):.0%}, {format_bytes(done_bytes)} of "
            f"{format_bytes(total_bytes)}, {format_bytes(rate)}/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
