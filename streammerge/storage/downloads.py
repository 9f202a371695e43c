"""Files fetched in the order in which they will be read, by a few threads, a bounded number ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from streammerge.errors import CheckpointError

Place = tuple[str, str]
"""A file: a model's location and the file's name."""

AT_ONCE = 4
# a download looks whether it is still wanted at each piece that arrives
_STOP_SECONDS = 3.0


class Downloads:
    """Fetches files before they are asked for.

    fetch  fetches one file and returns when all of it is there. It calls what it is given whenever it may be
           stopped: that raises when nobody wants the file any more

    Use: `expect` says what will be asked for; `wait` returns when a file is there, also one that was never expected,
    and raises what fetching it raised; `took` says that a file was there already; `forget` makes one absent again;
    `stop` ends everything, also who waits.
    """

    def __init__(self, fetch: Callable[[Place, Callable[[], None]], None]) -> None:
        self._fetch = fetch
        self._changed = threading.Condition()
        self._queue: list[Place] = []
        self._results: dict[Place, Future[None]] = {}
        self._begun: set[Place] = set()
        self._asked: set[Place] = set()
        self._ahead = 0
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def expect(self, places: Sequence[Place], ahead: int) -> None:
        """Begin to fetch files in this order, at most `ahead` of them that were not asked for yet."""
        with self._changed:
            self._ahead = ahead
            for place in places:
                self._enqueue(place)
            self._begin()

    def wait(self, place: Place) -> None:
        """Return when the file is there. Raises what fetching it raised."""
        with self._changed:
            self._asked.add(place)
            result = self._enqueue(place)
            self._begin()
        result.result()

    def took(self, place: Place) -> None:
        """The file was there without waiting: the next one may be fetched."""
        with self._changed:
            self._asked.add(place)
            self._changed.notify_all()

    def forget(self, place: Place) -> None:
        """The file is gone: who asks for it again has it fetched again."""
        with self._changed:
            self._results.pop(place, None)
            self._begun.discard(place)
            self._asked.discard(place)

    def stop(self) -> None:
        """End all fetching; who waits for a file gets an error. A later `wait` or `expect` begins anew."""
        with self._changed:
            self._stopped.set()
            threads = list(self._threads)
            unfinished = [result for result in self._results.values() if not result.done()]
            self._changed.notify_all()
        for result in unfinished:
            _settle(result, _no_longer_wanted())
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in threads:
            # not for ever: a connection that stands still is left to the end of the process
            thread.join(max(deadline - time.monotonic(), 0))
        with self._changed:
            self._threads, self._stopped = [], threading.Event()
            self._queue, self._results = [], {}
            self._begun, self._asked = set(), set()

    def _enqueue(self, place: Place) -> Future[None]:
        if place not in self._results:
            self._results[place] = Future()
            self._queue.append(place)
        return self._results[place]

    def _begin(self) -> None:
        # threads of its own, not an executor's: the interpreter would wait for those at its end
        while self._queue and len(self._threads) < AT_ONCE:
            self._threads.append(
                threading.Thread(target=self._run, args=(self._stopped,), name="streammerge-fetch", daemon=True)
            )
            self._threads[-1].start()
        self._changed.notify_all()

    def _run(self, stopped: threading.Event) -> None:
        def go_on() -> None:
            if stopped.is_set():
                raise _no_longer_wanted()

        while True:
            with self._changed:
                # with nothing left it ends: who asks for more begins others
                self._changed.wait_for(lambda: stopped.is_set() or not self._queue or self._next() is not None)
                place = None if stopped.is_set() else self._next()
                if place is None:
                    with suppress(ValueError):
                        self._threads.remove(threading.current_thread())
                    return
                self._queue.remove(place)
                self._begun.add(place)
                result = self._results[place]
            try:
                self._fetch(place, go_on)
            except BaseException as error:  # noqa: BLE001 - handed over to who waits for the file
                _settle(result, error)
            else:
                _settle(result, None)

    def _next(self) -> Place | None:
        """What somebody waits for; else the next in order, if not too many are there unasked."""
        urgent = next((place for place in self._queue if place in self._asked), None)
        if urgent is not None or len(self._begun - self._asked) >= self._ahead:
            return urgent
        return self._queue[0] if self._queue else None


def _settle(result: Future[None], error: BaseException | None) -> None:
    # `stop` may have been faster
    with suppress(InvalidStateError):
        if error is None:
            result.set_result(None)
        else:
            result.set_exception(error)


def _no_longer_wanted() -> CheckpointError:
    return CheckpointError("fetching was stopped", hint="Pass `--resume` to continue.")
