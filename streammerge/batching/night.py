"""A batch as it is written: recipes and grids of them, what is done with each merge, and what is kept."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from streammerge import located_yaml
from streammerge.errors import RecipeError, quoted
from streammerge.evaluation import Evaluation, read_evaluation
from streammerge.located_yaml import Located
from streammerge.recipe import Recipe
from streammerge.recipe_files import contents
from streammerge.settings import required

MOST_JOBS = 10_000

_KEYS = ("out", "jobs", "evaluate", "keep", "memory")
_JOB_KEYS = ("recipe", "name", "grid")
_KEEP_KEYS = ("best", "by", "order")
# what a batch writes beside its models
_OWN_FILES = ("report.html", "results.jsonl")
_UNFIT = re.compile(r"[^A-Za-z0-9._=+-]+")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One merge: the folder `name` below the batch's, by this recipe."""

    name: str
    recipe: Recipe

    @cached_property
    def digest(self) -> str:
        """Equal for jobs that ask for the same merge."""
        return hashlib.sha256(json.dumps(self.recipe.to_dict(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Which models stay once they were evaluated: the `best` so many by a metric; all where `best` is None.

    by       `task.metric`, as `results.jsonl` has it
    largest  whether the most counts as best, rather than the least
    """

    best: int | None = None
    by: str = ""
    largest: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """A batch: its folder, its jobs in order, and what follows each."""

    out: str
    jobs: tuple[Job, ...]
    evaluation: Evaluation | None = None
    keep: Keep = Keep()
    memory: str | None = None


def read_night(path: str | os.PathLike[str]) -> Night:
    """Read a batch file. Every recipe is read, none is planned: models may still be missing.

    Relative paths start at the current folder or else at the file's. Raises RecipeError with the line.
    """
    text = contents(Path(path))
    root = located_yaml.parse(text, str(path))
    fields = root.fields(_KEYS)
    folder = os.path.dirname(path)
    out = fields["out"].text("a folder") if "out" in fields else os.path.splitext(os.fspath(path))[0]
    jobs = [
        job
        for node in required(fields, "jobs", root).items("a list of jobs")
        for job in _jobs(node, folder)
    ]  # fmt: skip
    if not jobs:
        raise fields["jobs"].error("`jobs` lists no job", "List at least one `recipe`.")
    if len(jobs) > MOST_JOBS:
        raise fields["jobs"].error(f"the grids have {len(jobs)} jobs, more than {MOST_JOBS}", "Split the batch.")
    name, count = Counter(job.name for job in jobs).most_common(1)[0]
    if count > 1:
        raise fields["jobs"].error(f"{count} jobs are called {quoted(name)}", "Give each its own `name`.")
    evaluation = read_evaluation(fields["evaluate"]) if "evaluate" in fields else None
    keep = _keep(fields["keep"]) if "keep" in fields else Keep()
    if keep.best is not None and evaluation is None:
        raise fields["keep"].error("`keep` deletes models but nothing evaluates them", "Set `evaluate`.")
    memory = fields["memory"].text("a size, such as 8GiB") if "memory" in fields else None
    return Night(out=out, jobs=tuple(jobs), evaluation=evaluation, keep=keep, memory=memory)


def _jobs(node: Located, folder: str) -> Iterator[Job]:
    fields = node.fields(_JOB_KEYS)
    recipe = _recipe(required(fields, "recipe", node), folder)
    name = fields["name"].text("a name") if "name" in fields else recipe.name or _stem(fields["recipe"], recipe)
    if "grid" not in fields:
        yield Job(name=_folder_name(name, node), recipe=recipe)
        return
    axes = fields["grid"].mapping("a mapping of lists")
    places = [place.items("a list of values") for place in axes.values()]
    if not all(places) or not places:
        raise fields["grid"].wrong("a mapping of lists, none of them empty")
    plain = recipe.to_dict()
    for values in itertools.product(*places):
        varied = copy.deepcopy(plain)
        for path, value in zip(axes, values, strict=True):
            _set(varied, path, value)
        parts = (f"{path.split('.')[-1]}={value.plain()}" for path, value in zip(axes, values, strict=True))
        each = "-".join((name, *parts))
        varied["name"] = each
        try:
            read = Recipe.from_dict(varied)
        except RecipeError as error:
            raise fields["grid"].error(f"{quoted(each)}: {error.message}", error.hint) from error
        yield Job(name=_folder_name(each, node), recipe=read)


def _recipe(node: Located, folder: str) -> Recipe:
    if isinstance(node.value, dict):
        return Recipe.from_located(node, folder)
    path = node.text("a recipe: its file, or itself")
    beside = os.path.join(folder, path)
    return Recipe.from_file(beside if os.path.exists(beside) and not os.path.exists(path) else path)


def _stem(node: Located, recipe: Recipe) -> str:
    return recipe.method if isinstance(node.value, dict) else Path(node.text()).stem


def _folder_name(name: str, node: Located) -> str:
    fit = _UNFIT.sub("-", name).strip("-.")[:150]
    if not fit:
        raise node.error(f"{quoted(name)} has no letter or digit that a folder's name could have", "Set `name`.")
    if fit in _OWN_FILES:
        raise node.error(f"a job cannot be called {quoted(fit)}, as a file of the batch is", "Set another `name`.")
    return fit


def _set(plain: dict[str, Any], path: str, value: Located) -> None:
    """Set what a dotted path names, such as `parameters.ridge` or `models.0.parameters.weight`."""
    *above, last = path.split(".")
    place: Any = plain
    for step in above:
        place = _below(place, step, value)
    if isinstance(place, list):
        place[_index(place, last, value)] = value.plain()
    elif isinstance(place, dict):
        place[last] = value.plain()
    else:
        raise value.error(f"{quoted(path)} leads into a value that has no parts", "Name a key of the recipe.")


def _below(place: Any, step: str, value: Located) -> Any:
    if isinstance(place, list):
        return place[_index(place, step, value)]
    if isinstance(place, dict):
        return place.setdefault(step, {})
    raise value.error(f"{quoted(step)} is no part of the recipe", "Name a key of the recipe.")


def _index(place: list[Any], step: str, value: Located) -> int:
    if not re.fullmatch("[0-9]{1,6}", step) or int(step) >= len(place):
        raise value.error(f"{quoted(step)} is no number from 0 to {len(place) - 1}", "Count the list's items from 0.")
    return int(step)


def _keep(node: Located) -> Keep:
    if isinstance(node.value, str):
        return Keep() if node.choice(("all", "none")) == "all" else Keep(best=0)
    fields = node.fields(_KEEP_KEYS)
    best = required(fields, "best", node).whole()
    if best < 1:
        raise fields["best"].wrong("1 or more, or `keep: none`")
    by = required(fields, "by", node).text("a metric, such as `task.acc`")
    order = fields["order"].choice(("max", "min")) if "order" in fields else "max"
    return Keep(best=best, by=by, largest=order == "max")
