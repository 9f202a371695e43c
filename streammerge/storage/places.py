"""Models wherever they lie: which storage a location means, told by its form."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol, runtime_checkable

from streammerge.checkpoint import ByteFile, FileFacts, Storage
from streammerge.storage.hub import is_hub_id

Place = tuple[str, str]

# the first whose form a location has; a folder that is there is always that folder
_KINDS: tuple[tuple[Callable[[str], bool], str, str], ...] = (
    (os.path.lexists, "local", "LocalStorage"),
    (lambda location: "://" in location, "remote", "RemoteStorage"),
    (is_hub_id, "hub", "HubStorage"),
    (lambda location: True, "local", "LocalStorage"),
)


@runtime_checkable
class Fetching(Storage, Protocol):
    """A storage some of whose files are fetched whole before they can be read."""

    def pinned(self, location: str) -> str:
        """The location with all that could come to mean something else made fast."""

    def to_fetch(self, location: str, name: str) -> int:
        """Bytes to be fetched before the file can be read."""

    def cache_folder(self, location: str) -> str:
        """Where what is fetched of a model is kept."""

    def downloaded(self, location: str) -> str:
        """A folder here that holds all of a model."""

    def expect(self, places: Sequence[Place], ahead: int) -> None:
        """Fetch files in this order, at most `ahead` that nobody reads yet."""

    def discard(self, location: str, name: str) -> None:
        """Delete what was fetched of a file that will not be read again; never what was there before."""

    def stop(self) -> None:
        """End all fetching."""


class Places:
    """Local folders, models on the hub and those behind a URL. Each kind is loaded when it is first named."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._storages: dict[str, Storage] = {}

    def files(self, location: str) -> dict[str, FileFacts]:
        """The plain files of a model."""
        return self._of(location).files(location)

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        """A small range of a file."""
        return self._of(location).read(location, name, offset, nbytes)

    def open(self, location: str, name: str) -> ByteFile:
        """Open a file for reading tensor data."""
        return self._of(location).open(location, name)

    def pinned(self, location: str) -> str:
        """Of a model on the hub, its name with the commit; other locations as they are."""
        storage = self._of(location)
        return storage.pinned(location) if isinstance(storage, Fetching) else location

    def to_fetch(self, location: str, name: str) -> int:
        """Bytes to be fetched before the file can be read."""
        storage = self._of(location)
        return storage.to_fetch(location, name) if isinstance(storage, Fetching) else 0

    def cache_folder(self, location: str) -> str:
        """Where what is fetched of a model is kept; the model's own place, if nothing is."""
        storage = self._of(location)
        return storage.cache_folder(location) if isinstance(storage, Fetching) else location

    def downloaded(self, location: str) -> str:
        """A folder here that holds all of a model: its own, or where it was fetched to."""
        storage = self._of(location)
        return storage.downloaded(location) if isinstance(storage, Fetching) else location

    def expect(self, places: Sequence[Place], ahead: int) -> None:
        """Fetch files in this order."""
        for storage in self._fetching():
            storage.expect([place for place in places if self._of(place[0]) is storage], ahead)

    def discard(self, location: str, name: str) -> None:
        """Delete what was fetched of a file that will not be read again; never what was there before."""
        storage = self._of(location)
        if isinstance(storage, Fetching):
            storage.discard(location, name)

    def stop(self) -> None:
        """End all fetching."""
        for storage in self._fetching():
            storage.stop()

    def _of(self, location: str) -> Storage:
        module, name = next((module, name) for has_form, module, name in _KINDS if has_form(location))
        with self._lock:
            if module not in self._storages:
                self._storages[module] = getattr(import_module(f"streammerge.storage.{module}"), name)()
            return self._storages[module]

    def _fetching(self) -> list[Fetching]:
        return [storage for storage in self._storages.values() if isinstance(storage, Fetching)]
