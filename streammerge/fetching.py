"""Files that a merge fetches before it can read them: in which order, how much disk they take, when they are done with.

A storage that fetches is told by this what the plan will read; one that does not is left alone.
"""

from __future__ import annotations

import os
import shutil
from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from types import TracebackType

from streammerge.budget import format_bytes
from streammerge.checkpoint import Storage, TensorEntry
from streammerge.derived import DerivedEntry
from streammerge.errors import PlanError, quoted
from streammerge.plan import Plan
from streammerge.recipe import Recipe
from streammerge.step import Step
from streammerge.storage.places import Fetching, Place

_FEWEST_AHEAD = 2
# how much output may be merged and not durable yet
_LATE_BYTES = 256 << 20


def pinned(recipe: Recipe, storage: Storage) -> Recipe:
    """The recipe with every model named so that it means the same tomorrow: one on the hub with its commit."""
    if not isinstance(storage, Fetching):
        return recipe
    return recipe.relocated({location: _pinned(location, storage) for location in recipe.locations})


def _pinned(location: str, storage: Fetching) -> str:
    if os.path.lexists(location):
        return location
    # a base and its adapters, each of which may lie elsewhere
    return "+".join(map(storage.pinned, location.split("+")))


def places_read(plan: Plan) -> set[Place]:
    """Every file that a merge reads tensors of."""
    return {place for _, places in _readings(plan, ()) for place in places}


class Fetches:
    """What a merge fetches. As a context manager it has the storage fetch ahead, and stop at its end.

    skip    tensors that an earlier run finished
    delete  delete what this merge fetched when all that is made of it is on the disk, not before: a merge that was
            killed would have to fetch it again

    `nbytes` are to be fetched in all, of which `most_bytes` lie on the disk at a time.
    """

    def __init__(self, plan: Plan, storage: Storage, *, skip: Container[str] = (), delete: bool = False) -> None:
        self._storage = storage if isinstance(storage, Fetching) else None
        self._delete, self._finished = delete, 0
        # as many as are read side by side
        self._ahead = max(len(plan.models), _FEWEST_AHEAD)
        self._order: list[Place] = []
        self._users: dict[Place, set[str]] = {}
        self.nbytes = self.most_bytes = 0
        if self._storage is None:
            return
        for names, places in _readings(plan, skip):
            for place in places:
                self._users.setdefault(place, set()).update(names)
        self._sizes = {place: self._storage.to_fetch(*place) for place in self._users}
        self._order = [place for place, nbytes in self._sizes.items() if nbytes]
        self.nbytes = sum(self._sizes.values())
        self.most_bytes = self._most_at_once(plan, skip) if delete else self.nbytes

    def check_disk(self, out: str, output_bytes: int) -> None:
        """Raise PlanError unless what is fetched, and the output where that shares the disk, find room."""
        if self._storage is None or not self.nbytes:
            return
        cache = self._storage.cache_folder(self._order[0][0])
        there, beside = _existing(cache), _existing(out)
        shared = output_bytes if os.stat(there).st_dev == os.stat(beside).st_dev else 0
        free = shutil.disk_usage(there).free
        if self.most_bytes + shared > free:
            output = f" beside {format_bytes(shared)} of output" if shared else ""
            raise PlanError(
                f"fetching the models takes {format_bytes(self.most_bytes)} in {quoted(cache)}{output}, "
                f"but {format_bytes(free)} are free",
                hint="Free some space, or set `HF_HUB_CACHE` to a folder that has it."
                + ("" if self._delete else " `--delete-consumed` gives space back during the merge."),
            )

    def finished(self, durable: Iterable[str]) -> None:
        """These tensors, more at each call, are merged and on the disk: what was fetched for them alone may go."""
        if self._storage is None or not self._delete:
            return
        # at once, as another thread adds to them
        names = list(durable)
        new, self._finished = names[self._finished :], len(names)
        for place, users in list(self._users.items()) if new else ():
            users.difference_update(new)
            if not users:
                del self._users[place]
                self._storage.discard(*place)

    def __enter__(self) -> Fetches:
        if self._storage is not None:
            self._storage.expect(self._order, self._ahead)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._storage is not None:
            self._storage.stop()

    def _most_at_once(self, plan: Plan, skip: Container[str]) -> int:
        """The most bytes there at a time: files between their first and last use, and those fetched ahead."""
        turns = list(_readings(plan, skip))
        first: dict[Place, int] = {}
        last: dict[Place, int] = {}
        for turn, (_, places) in enumerate(turns):
            for place in places:
                first.setdefault(place, turn)
                last[place] = turn
        written = list(accumulate(sum(plan.layout.placements[name].nbytes for name in names) for names, _ in turns))
        for place, turn in last.items():
            last[place] = bisect_right(written, written[turn] + _LATE_BYTES)
        most = 0
        for turn in range(len(turns)):
            there = [place for place in self._order if first[place] <= turn <= last[place]]
            ahead = [place for place in self._order if first[place] > turn][: self._ahead]
            most = max(most, sum(self._sizes[place] for place in (*there, *ahead)))
        return most


def _readings(plan: Plan, skip: Container[str]) -> Iterator[tuple[list[str], list[Place]]]:
    """What is read in turn: the tensors that it is read for, none for a look at the model, and the files."""
    left = {step.pool or step.name for step in plan.steps if step.name not in skip}
    # a pool of which one matrix is missing is merged as a whole, and a look sees what is finished, too
    merged = [step for step in plan.steps if (step.pool or step.name) in left]
    looking = {step.method for step in merged if step.looks_at_model}
    for step in plan.steps:
        if step.looks_at_model and step.method in looking:
            yield [], _files(plan, step)
    unfinished: dict[str, list[str]] = {}
    for step in merged:
        if step.name not in skip:
            unfinished.setdefault(step.pool or step.name, []).append(step.name)
    for step in merged:
        yield unfinished[step.pool or step.name], _files(plan, step)


def _files(plan: Plan, step: Step) -> list[Place]:
    entries = (*((step.base,) if step.base else ()), *step.experts)
    read = [*zip(step.models, entries, strict=True), *filter(None, step.beside)]
    found: dict[Place, None] = {}
    for model, entry in read:
        location = plan.models[model].location
        if isinstance(entry, DerivedEntry):
            found.update(dict.fromkeys(_stored(entry, location)))
        elif entry.nbytes:
            found[entry.location or location, entry.file] = None
    return list(found)


def _stored(entry: TensorEntry, location: str) -> Iterator[Place]:
    if isinstance(entry, DerivedEntry):
        for part in entry.parts:
            yield from _stored(part, location)
    elif entry.nbytes:
        yield entry.location or location, entry.file


def _existing(path: str) -> Path:
    folder = Path(os.path.abspath(path))
    while not folder.exists():
        folder = folder.parent
    return folder
