"""Models on the Hugging Face hub: headers by range, files into the hub's own cache, fetched while others merge."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.budget import format_bytes
from streammerge.checkpoint import ByteFile, FileFacts
from streammerge.errors import CheckpointError, quoted
from streammerge.storage.downloads import Downloads, Place
from streammerge.storage.local import LocalStorage, PositionedFile

if TYPE_CHECKING:
    from tqdm import tqdm

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w][\w./+-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# more than any repository of a model has; what it lists is kept in memory
_MOST_FILES = 100_000
# headers of some hundred tensors, in one request
_HEAD_BYTES = 64 << 10
_HEADS_AT_ONCE = 8
_MOST_HEADS = 1000
_SHARD = re.compile(r"-of-\d+\.safetensors$")
# read by range where they lie; all else is small, and fetched whole
_RANGED = (".safetensors", ".bin", ".pt", ".pth")
# weights, configs and tokenizers
_RUN_WITH = (".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt")
_RETRY_SECONDS = (1.0, 4.0, 16.0)
_TIMEOUT_SECONDS = 30.0
_GO_ONLINE = "Unset `HF_HUB_OFFLINE` to fetch it, or name a local folder."
_LOG_IN = "For a private or gated model log in with `hf auth login`, or set `HF_TOKEN`."


def is_hub_id(location: str) -> bool:
    """Whether text has the form of a model on the hub: `ORG/NAME` or `ORG/NAME@REVISION`."""
    return _ID.fullmatch(location) is not None


class HubStorage:
    """Models by the names that the hub gives them, `ORG/NAME` or `ORG/NAME@REVISION`: a branch, a tag, a commit.

    A revision is resolved once, to a commit: all that is read afterwards is of that commit. Headers are read by range.
    Files are fetched whole, into the cache that huggingface_hub keeps and others share; what lies there is not fetched
    again. With `HF_HUB_OFFLINE` only that is read.

    endpoint, cache  of huggingface_hub, when None: `HF_ENDPOINT`, `HF_HUB_CACHE` and `HF_HOME`
    retry_seconds    how long to wait before each further try to fetch a file

    Raises CheckpointError. No message holds a token or a signed address.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        cache: str | None = None,
        retry_seconds: Sequence[float] = _RETRY_SECONDS,
    ) -> None:
        self._endpoint, self._cache, self._retry_seconds = endpoint, cache, retry_seconds
        self._local = LocalStorage()
        self._lock = threading.Lock()
        self._snapshots: dict[str, _Snapshot] = {}
        self._heads: dict[Place, bytes] = {}
        self._open: dict[Place, list[_HubFile]] = {}
        # blobs that this run brought into the cache, by the places that use them
        self._fetched: dict[Place, Path] = {}
        self._downloads = Downloads(self._fetch)

    # what every storage does

    def files(self, location: str) -> dict[str, FileFacts]:
        """The files beside `config.json`, as the hub lists them; offline, those in the cache."""
        # a commit never changes, so that its files need no time of change
        return {name: FileFacts(file.nbytes, 0) for name, file in self._snapshot(location).files.items()}

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        """A small range of a file. Only that range is fetched of weights, all of a file of another kind."""
        snapshot = self._snapshot(location)
        if self._is_cached(location, name):
            try:
                return self._local.read(str(snapshot.folder), name, offset, nbytes)
            except CheckpointError:
                # another merge may have discarded it just now
                if self._is_cached(location, name):
                    raise
        if name.endswith(_RANGED):
            return self._read_range(location, name, offset, nbytes)
        self._fetch((location, name), lambda: None)
        return self._local.read(str(snapshot.folder), name, offset, nbytes)

    def open(self, location: str, name: str) -> ByteFile:
        """A file whose first `fetch` waits until all of it has arrived."""
        file = _HubFile(self, location, name)
        with self._lock:
            self._open.setdefault((location, name), []).append(file)
        return file

    # what a storage does that fetches: see `streammerge.fetching`

    def pinned(self, location: str) -> str:
        """The location with the commit that its revision stands for now."""
        snapshot = self._snapshot(location)
        with self._lock:
            return self._snapshots.setdefault(snapshot.location, snapshot).location

    def to_fetch(self, location: str, name: str) -> int:
        """Bytes to be fetched before the file can be read: all of them or none."""
        return 0 if self._is_cached(location, name) else self._snapshot(location).files[name].nbytes

    def cache_folder(self, location: str) -> str:
        """Where fetched files are kept."""
        return str(self._cache_path())

    def downloaded(self, location: str) -> str:
        """A folder of the cache that holds all of a model that makes it run: no weights but safetensors, no code."""
        snapshot = self._snapshot(location)
        for name in snapshot.files:
            if name.endswith(_RUN_WITH):
                self.arrived(location, name)
        return str(snapshot.folder)

    def expect(self, places: Sequence[Place], ahead: int) -> None:
        """Fetch these files in this order, beside what else happens, at most `ahead` of them unread."""
        self._downloads.expect([place for place in places if not self._is_cached(*place)], ahead)

    def discard(self, location: str, name: str) -> None:
        """Delete a file that will not be read again, if it was this storage that brought it into the cache."""
        place = location, name
        with self._lock:
            blob = self._fetched.pop(place, None)
            is_shared = blob in self._fetched.values()
            files = self._open.get(place, [])
        for file in files:
            file.let_go()
        self._downloads.forget(place)
        if blob is None:
            return
        with suppress(OSError):
            os.unlink(self._pointer(location, name))
        # under another name the blob is still wanted; of one that is itself a link others may have the use
        if not is_shared and not blob.is_symlink():
            with suppress(OSError):
                os.unlink(blob)

    def stop(self) -> None:
        """End all fetching. Who waits for a file gets an error."""
        self._downloads.stop()

    def arrived(self, location: str, name: str) -> Path:
        """Where a file lies, when all of it is there."""
        if self._is_cached(location, name):
            self._downloads.took((location, name))
        else:
            self._downloads.wait((location, name))
        return self._pointer(location, name)

    # how

    def _snapshot(self, location: str) -> _Snapshot:
        with self._lock:
            if location not in self._snapshots:
                self._snapshots[location] = self._resolve(location)
            return self._snapshots[location]

    def _resolve(self, location: str) -> _Snapshot:
        from huggingface_hub import HfApi, is_offline_mode

        parts = _ID.fullmatch(location)
        repo, revision = (parts["repo"], parts["revision"] or "main") if parts else (location, "")
        if parts is None or any(".." in part or "--" in repo or "//" in part for part in (repo, revision)):
            raise CheckpointError(
                f"{quoted(location)} is no name of a model on the hub",
                hint="Expected `ORG/NAME` or `ORG/NAME@REVISION`: letters, digits, `-`, `_` and `.`.",
            )
        home = self._cache_path() / f"models--{repo.replace('/', '--')}"
        if is_offline_mode():
            return self._cached_snapshot(location, repo, revision, home)
        with self._hub_errors(location):
            info = HfApi(endpoint=self._endpoint).model_info(
                repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS
            )
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit):
            raise _nonsense(location, f"names the commit {quoted(commit)}, which is none")
        if revision != commit:
            # as others do, so that the same name works offline; a cache that cannot be written serves all the same
            with suppress(OSError):
                reference = home / "refs" / revision
                reference.parent.mkdir(parents=True, exist_ok=True)
                reference.write_text(commit)
        return _Snapshot(repo, commit, home / "snapshots" / commit, _listed(location, info.siblings or ()))

    def _cached_snapshot(self, location: str, repo: str, revision: str, home: Path) -> _Snapshot:
        commit = revision
        if not _COMMIT.fullmatch(commit):
            with suppress(OSError, ValueError):
                commit = (home / "refs" / revision).read_text().strip()
        folder = home / "snapshots" / commit
        if not _COMMIT.fullmatch(commit) or not folder.is_dir():
            raise CheckpointError(
                f"{quoted(location)} is no folder here and not in the hub's cache, and `HF_HUB_OFFLINE` is set",
                hint=_GO_ONLINE,
            )
        files = {name: _Listed(facts.size, None) for name, facts in self._local.files(str(folder)).items()}
        # a plan keeps the small files alone
        if not any(name.endswith(_RANGED) for name in files):
            raise CheckpointError(
                f"{quoted(location)} has no weights in the hub's cache, and `HF_HUB_OFFLINE` is set", hint=_GO_ONLINE
            )
        return _Snapshot(repo, commit, folder, files)

    def _cache_path(self) -> Path:
        from huggingface_hub import constants

        return Path(self._cache or constants.HF_HUB_CACHE)

    def _pointer(self, location: str, name: str) -> Path:
        return self._snapshot(location).folder / name

    def _is_cached(self, location: str, name: str) -> bool:
        """Whether all of a file is in the cache. Raises CheckpointError where what is there is not that file."""
        listed = self._snapshot(location).files.get(name)
        pointer = self._pointer(location, name)
        try:
            nbytes = os.stat(pointer).st_size
        except OSError:
            return False
        if listed is not None and listed.nbytes != nbytes:
            raise CheckpointError(
                f"{quoted(pointer)} has {nbytes} bytes, and the hub lists {listed.nbytes}",
                hint="The copy in the cache is damaged. Delete it to have it fetched again.",
            )
        return True

    def _read_range(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        place = location, name
        # kept: a header is asked for when a model is loaded, and again when it was merged and may be deleted
        if place not in self._heads and _SHARD.search(name):
            self._read_heads(location)
        head = self._heads.get(place, b"")
        if offset > max(len(head), _HEAD_BYTES):
            return self._get(location, name, offset, nbytes)
        if len(head) < offset + nbytes:
            wanted = max(offset + nbytes, _HEAD_BYTES) - len(head)
            head = self._heads[place] = head + self._get(location, name, len(head), wanted)
        return head[offset : offset + nbytes]

    def _read_heads(self, location: str) -> None:
        """The beginnings of all of a model's shards at once: one after another they would take seconds each."""
        shards = [name for name in self._snapshot(location).files if _SHARD.search(name)]
        absent = [name for name in shards if not self._is_cached(location, name)][:_MOST_HEADS]

        def read(name: str) -> None:
            # an error is raised when the file is asked for by itself
            with suppress(CheckpointError):
                self._heads.setdefault((location, name), self._get(location, name, 0, _HEAD_BYTES))

        with ThreadPoolExecutor(_HEADS_AT_ONCE, "streammerge-head") as workers:
            list(workers.map(read, absent))

    def _get(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        """A range of a file from the hub; fewer bytes only at the file's end."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        snapshot = self._snapshot(location)
        listed = snapshot.files[name].nbytes
        nbytes = min(nbytes, listed - offset)
        if nbytes <= 0:
            return b""
        url = hf_hub_url(snapshot.repo, name, revision=snapshot.commit, endpoint=self._endpoint)
        headers = build_hf_headers() | {"Range": f"bytes={offset}-{offset + nbytes - 1}", "Accept-Encoding": "identity"}
        found = bytearray()
        with (
            self._hub_errors(location, name),
            http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS, max_retries=3) as response,
        ):
            hf_raise_for_status(response)
            # a server that knows no ranges sends all from the beginning
            skipped = 0 if response.status_code == 206 else offset
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if response.status_code == 206 and total.isdecimal() and int(total) != listed:
                raise _another(location, name, f"has {total} bytes where it is kept, and the hub lists {listed}")
            for piece in response.iter_bytes():
                found += piece
                if len(found) >= skipped + nbytes:
                    break
        found = found[skipped : skipped + nbytes]
        if len(found) < nbytes:
            raise _another(location, name, f"ends after {len(found)} of the {nbytes} bytes asked for")
        return bytes(found)

    def _fetch(self, place: Place, go_on: Callable[[], None]) -> None:
        """Bring a file into the cache, with some patience for the connection."""
        location, name = place
        self._refuse_full_disk(location, name)
        for seconds in self._retry_seconds:
            try:
                self._fetch_once(place, go_on)
                return
            except _LostConnection:
                pause = threading.Event()
                for _ in range(max(round(seconds * 10), 1)):
                    go_on()
                    pause.wait(seconds / max(round(seconds * 10), 1))
        self._fetch_once(place, go_on)

    def _fetch_once(self, place: Place, go_on: Callable[[], None]) -> None:
        from huggingface_hub import hf_hub_download

        location, name = place
        go_on()
        snapshot, pointer = self._snapshot(location), self._pointer(location, name)
        listed = snapshot.files[name]
        blob = snapshot.folder.parent.parent / "blobs" / listed.blob if listed.blob else None
        with self._lock:
            is_ours = blob is not None and (not blob.exists() or blob in self._fetched.values())
        with self._hub_errors(location, name):
            hf_hub_download(
                snapshot.repo,
                name,
                revision=snapshot.commit,
                cache_dir=self._cache_path(),
                endpoint=self._endpoint,
                tqdm_class=_watching(go_on, 2 * listed.nbytes + _HEAD_BYTES),
            )
        if pointer.is_symlink() and listed.blob and os.path.basename(os.readlink(pointer)) != listed.blob:
            raise _another(location, name, "has another checksum than the hub lists")
        self._is_cached(location, name)
        head = self._heads.get(place, b"")
        if head and self._local.read(str(snapshot.folder), name, 0, len(head)) != head:
            raise _another(location, name, "does not begin as it did when its header was read")
        if is_ours and blob is not None:
            with self._lock:
                self._fetched[place] = blob

    def _refuse_full_disk(self, location: str, name: str) -> None:
        nbytes, folder = self._snapshot(location).files[name].nbytes, self._cache_path()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            raise CheckpointError(
                f"{_label(location, name)} has {format_bytes(nbytes)}, and the hub's cache has room for "
                f"{format_bytes(free)}",
                hint="Free some space, or set `HF_HUB_CACHE` to a folder that has it; then pass `--resume`.",
            )

    @contextmanager
    def _hub_errors(self, location: str, name: str | None = None) -> Iterator[None]:
        """What huggingface_hub raises, in our words: its own may hold signed addresses."""
        try:
            yield
        except CheckpointError:
            raise
        except (OSError, ValueError, LookupError) as error:
            # with no cause shown: `--verbose` or not, a trace would print what the message must not
            raise self._refusal(error, location, name) from None
        except Exception as error:
            from huggingface_hub.errors import HTTPError

            if not isinstance(error, HTTPError):
                raise
            raise self._refusal(error, location, name) from None

    def _refusal(self, error: Exception, location: str, name: str | None) -> CheckpointError:
        from huggingface_hub import constants, errors

        label = quoted(location) if name is None else _label(location, name)
        page = f"{self._endpoint or constants.ENDPOINT}/{location.partition('@')[0]}"
        response = getattr(error, "response", None)
        status = response.status_code if response is not None else None
        if isinstance(error, errors.GatedRepoError):
            return CheckpointError(f"{label} is gated", hint=f"Accept its terms at {quoted(page)}. {_LOG_IN}")
        if isinstance(error, errors.RevisionNotFoundError):
            revision = location.partition("@")[2] or "main"
            return CheckpointError(
                f"{quoted(location.partition('@')[0])} has no revision {quoted(revision)} on the hub",
                hint="Name a branch, a tag or a commit.",
            )
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return CheckpointError(f"{label} is gone from the hub", hint="Name another revision.")
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
            return CheckpointError(
                f"{label} is neither a folder here nor a model that the hub shows you",
                hint=f"Check the spelling. {_LOG_IN}",
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return CheckpointError(
                f"{label} cannot be fetched: the disk of the hub's cache is full",
                hint="Free some space, or set `HF_HUB_CACHE` to a folder that has it; then pass `--resume`.",
            )
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return CheckpointError(
                f"{label} cannot be fetched: the hub's cache may not be written",
                hint="Set `HF_HUB_CACHE` to a folder that may.",
            )
        reason = type(error).__name__ if status is None else f"HTTP {status}"
        missing = "is no folder here, and the hub cannot be asked for it" if name is None else "cannot be fetched"
        return _LostConnection(
            f"{label} {missing}: {reason}",
            hint="Check the connection, then pass `--resume` if the merge had begun. "
            "With `HF_HUB_OFFLINE=1` what lies in the hub's cache is read.",
        )


@dataclass(frozen=True, slots=True)
class _Listed:
    """A file as the hub lists it; `blob` is the name that its content has in the cache, where it is known."""

    nbytes: int
    blob: str | None


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """One commit of a model; `folder` is where its files are found in the cache."""

    repo: str
    commit: str
    folder: Path
    files: Mapping[str, _Listed]

    @property
    def location(self) -> str:
        """The model's name with this commit."""
        return f"{self.repo}@{self.commit}"


class _LostConnection(CheckpointError):
    """Worth another try."""


class _HubFile:
    """A file of the cache, opened when it has arrived."""

    def __init__(self, storage: HubStorage, location: str, name: str) -> None:
        self._storage, self._location, self._name = storage, location, name
        self._lock = threading.Lock()
        self._file: PositionedFile | None = None

    def fetch(self, offset: int, nbytes: int, buffer: memoryview) -> memoryview:
        """Read the range into `buffer`, once the file is there."""
        file = self._file
        if file is None:
            # not inside the lock: others must not wait for the network
            path = self._storage.arrived(self._location, self._name)
            with self._lock:
                file = self._file = self._file or PositionedFile(path)
        return file.fetch(offset, nbytes, buffer)

    def release(self, offset: int, nbytes: int) -> None:
        """Drop the range from the page cache."""
        with self._lock:
            if self._file is not None:
                self._file.release(offset, nbytes)

    def let_go(self) -> None:
        """Close the file; a later `fetch` opens it again."""
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            file.close()

    close = let_go


def _listed(location: str, siblings: Sequence[Any]) -> dict[str, _Listed]:
    """The files beside `config.json` in what a server lists, and nothing that could lead elsewhere."""
    if len(siblings) > _MOST_FILES:
        raise _nonsense(location, f"lists {len(siblings)} files, more than {_MOST_FILES}")
    found: dict[str, _Listed] = {}
    for sibling in siblings:
        name, nbytes = sibling.rfilename, sibling.size
        if (
            not isinstance(name, str)
            or not name
            or "\\" in name
            or "\0" in name
            or {"", ".", ".."} & {*name.split("/")}
        ):
            raise _nonsense(location, f"lists the file {quoted(name)}, which leads out of the model")
        if "/" in name:
            # other formats and checkpoints lie in folders of their own
            continue
        if type(nbytes) is not int or not 0 <= nbytes < 2**63:
            raise _nonsense(location, f"lists {quoted(name)} with {quoted(nbytes)} bytes")
        blob = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        found[name] = _Listed(nbytes, blob if isinstance(blob, str) and re.fullmatch("[0-9a-f]{40,64}", blob) else None)
    return found


def _watching(go_on: Callable[[], None], most_bytes: int) -> type[tqdm[Any]]:
    """For huggingface_hub a progress bar, which draws nothing and may end the download."""
    from tqdm import tqdm

    class Watching(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self._arrived = 0

        def update(self, n: float | None = 1) -> bool | None:
            go_on()
            self._arrived += int(n or 0)
            if self._arrived > most_bytes:
                raise CheckpointError(
                    "the hub sends more of a file than it announced", hint="Do not use models of this server."
                )
            return None

    return Watching


def _label(location: str, name: str) -> str:
    return quoted(f"{location}/{name}")


def _nonsense(location: str, what: str) -> CheckpointError:
    return CheckpointError(f"the hub {what}, for {quoted(location)}", hint="Do not use models of this server.")


def _another(location: str, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{_label(location, name)} {what}", hint="The server or the hub's cache is damaged. Delete the cached model."
    )
