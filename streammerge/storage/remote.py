"""Models behind `s3://` and `gs://`: ranges of objects, read straight into slots."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from streammerge.checkpoint import ByteFile, FileFacts
from streammerge.errors import CheckpointError, quoted

_SCHEMES = ("s3://", "gs://")
_MOST_FILES = 100_000
# one request is slower than a network, and what it brings is in memory twice until it is copied
_PIECE_BYTES = 8 << 20
_AT_ONCE = 4


class RemoteStorage:
    """Prefixes in S3 and in Google Cloud Storage, and in what speaks as they do, with obstore's settings.

    Those are the environment's: `AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT_URL` and so on. Nothing is kept on
    this machine's disk. What was written to since it was listed is refused by the server that holds it.

    Raises CheckpointError.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stores: dict[str, Any] = {}
        # of the first listing, by place: all that is read belongs to it
        self._versions: dict[tuple[str, str], str | None] = {}

    def files(self, location: str) -> dict[str, FileFacts]:
        """The objects right below a prefix."""
        store = self._store(location)
        import obstore

        with _errors(location):
            objects = obstore.list_with_delimiter(store)["objects"]
        if not objects:
            raise CheckpointError(f"{quoted(location)} holds no files", hint="Name the prefix that the files share.")
        if len(objects) > _MOST_FILES:
            raise CheckpointError(
                f"{quoted(location)} holds {len(objects)} files, more than {_MOST_FILES}",
                hint="Name the prefix that one model's files share.",
            )
        found = {}
        for each in objects:
            name = each["path"].rpartition("/")[2]
            self._versions.setdefault((location, name), each["e_tag"])
            found[name] = FileFacts(each["size"], round(each["last_modified"].timestamp() * 1e9))
        return dict(sorted(found.items()))

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        """A small range of an object."""
        return bytes(self.range(location, name, offset, nbytes))

    def open(self, location: str, name: str) -> ByteFile:
        """An object, read in ranges."""
        return _RemoteFile(self, location, name)

    def range(self, location: str, name: str, offset: int, nbytes: int) -> memoryview:
        """A range of an object as it was when it was listed; shorter only at its end."""
        import obstore

        if not nbytes:
            return memoryview(b"")
        options: dict[str, Any] = {"range": (offset, offset + nbytes)}
        if version := self._versions.get((location, name)):
            options["if_match"] = version
        with _errors(f"{location.rstrip('/')}/{name}"):
            return memoryview(obstore.get(self._store(location), name, options=options).bytes())  # type: ignore[arg-type]

    def _store(self, location: str) -> Any:
        if not location.startswith(_SCHEMES):
            raise CheckpointError(
                f"{quoted(location.partition('://')[0] + '://')} is no place that models are read from, expected "
                "`s3://` or `gs://`",
                hint="Fetch the model into a folder, and name that.",
            )
        if {"@", "?", "#"} & {*location}:
            # not quoted: what is not meant to be there may be a secret
            raise CheckpointError(
                "a model's URL has the form `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`, and holds no credentials",
                hint="Set them in the environment, as for other programs: `AWS_ACCESS_KEY_ID` and so on.",
            )
        try:
            from obstore.store import from_url
        except ImportError as error:
            raise CheckpointError(
                f"{quoted(location)} needs the package `obstore`", hint="Install `streammerge[remote]`."
            ) from error
        with self._lock, _errors(location):
            if location not in self._stores:
                self._stores[location] = from_url(location)
            return self._stores[location]


class _RemoteFile:
    """Reads a range in pieces, several at a time."""

    def __init__(self, storage: RemoteStorage, location: str, name: str) -> None:
        self._storage, self._location, self._name = storage, location, name
        self._workers = ThreadPoolExecutor(_AT_ONCE, "streammerge-range")

    def fetch(self, offset: int, nbytes: int, buffer: memoryview) -> memoryview:
        """Read the range into `buffer`. Raises CheckpointError when the object ends early."""

        def read(start: int) -> None:
            size = min(_PIECE_BYTES, nbytes - start)
            piece = self._storage.range(self._location, self._name, offset + start, size)
            if len(piece) < size:
                raise CheckpointError(
                    f"{quoted(f'{self._location}/{self._name}')} ends inside a tensor", hint="Upload it again."
                )
            buffer[start : start + size] = piece

        list(self._workers.map(read, range(0, nbytes, _PIECE_BYTES)))
        return buffer[:nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """End the threads."""
        self._workers.shutdown()


@contextmanager
def _errors(label: str) -> Iterator[None]:
    """What obstore raises, in our words: its own may hold addresses and headers."""
    try:
        yield
    except Exception as error:
        from obstore import exceptions

        if not isinstance(error, (exceptions.BaseError, OSError)):
            raise
        if isinstance(error, (exceptions.NotFoundError, FileNotFoundError)):
            reason, hint = "is not there", "Check the bucket and the prefix."
        elif isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError)):
            reason, hint = "may not be read", "Set credentials in the environment: `AWS_ACCESS_KEY_ID` and so on."
        elif isinstance(error, exceptions.PreconditionError):
            reason, hint = "was written to since the merge began", "Restore it as it was, then pass `--resume`."
        else:
            reason = f"cannot be read: {type(error).__name__}"
            hint = "Check the address, the connection and the credentials, then pass `--resume` if the merge had begun."
        raise CheckpointError(f"{quoted(label)} {reason}", hint=hint) from None
