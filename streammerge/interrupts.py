"""What Ctrl-C and a scheduler's stop do to a verb: a merge says how it is continued, a batch ends after its tensor."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import click

from streammerge.errors import quoted


@contextmanager
def resumable(out: str) -> Iterator[None]:
    """Let an interrupt within tell how to continue what `out.partial` holds, if there is anything."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        partial = f"{os.path.abspath(out)}.partial"
        hint = f"Pass `--resume` to continue: {quoted(partial)} holds what is done."
        raise click.Abort(*([hint] if os.path.isdir(partial) else [])) from interrupt


class StopRequest:
    """While used as a context manager, the first SIGINT or SIGTERM only asks to stop; the next interrupts."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> bool:
        """Whether a signal came."""
        return self._asked

    def __enter__(self) -> StopRequest:
        self._before = {each: signal.signal(each, self._ask) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        click.echo("stopping after the current tensor; again to stop at once", err=True)
