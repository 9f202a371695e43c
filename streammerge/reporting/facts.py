"""What the page of a merge shows: `streammerge.json` and results of evaluations, read and distrusted.

A folder may hold files named `results*.json`, of any evaluation: {"tasks": {name: {metric: value}}}, where names and
metrics are text and values finite numbers. Other keys beside `tasks` are left alone.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from streammerge.checkpoint import JSON_LIMIT_BYTES
from streammerge.errors import OutputError, quoted

REPORT_NAME = "streammerge.json"
_FORMAT = 1
_RESULTS_LIMIT_BYTES, _MOST_RESULTS = 1 << 20, 16
_LONGEST_RECIPE = 20_000
MATRICES = frozenset({"matrix", "router"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFacts:
    """What a report says of one tensor: see `Outcome`, and the notes of `solve_normal_equations`."""

    name: str
    method: str
    kind: str
    norm_ratio: float | None
    growth: float | None
    rounding_loss: float | None
    changed: float | None
    seconds: float | None
    base_norm: float | None
    expert_norms: tuple[float | None, ...]
    interference: float | None
    effective_rank: float | None
    certificate: float | None
    escalation: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeFacts:
    """What a report says of one merge.

    label    what pages call it
    results  task -> metric -> value
    """

    label: str
    method: str
    experts: tuple[str, ...]
    recipe: str
    device: str
    tensors: tuple[TensorFacts, ...]
    warnings: tuple[str, ...]
    totals: Mapping[str, float | None]
    seconds: Mapping[str, float | None]
    memory: Mapping[str, float | None]
    samples: tuple[tuple[float, float], ...]
    versions: Mapping[str, str]
    results: Mapping[str, Mapping[str, float]]

    @property
    def matrices(self) -> list[TensorFacts]:
        """The tensors that merge methods by matrix are for; all of them, in a report that does not say."""
        found = [tensor for tensor in self.tensors if tensor.kind in MATRICES]
        return found or [tensor for tensor in self.tensors if not tensor.kind]

    @property
    def peak_bytes(self) -> float | None:
        """The most anonymous memory that a sample saw."""
        return max((held for _, held in self.samples), default=None)


def read_merge(folder: str | os.PathLike[str], label: str | None = None) -> MergeFacts:
    """What a merged folder says of its merge.

    Raises OutputError for a folder without a report, and for files that are not what their names say.
    """
    path = Path(folder) / REPORT_NAME
    told = _object(_json(path, JSON_LIMIT_BYTES))
    tensors = told.get("tensors")
    if told.get("format") != _FORMAT or not isinstance(tensors, list):
        raise OutputError(
            f"{quoted(path)} is not a report of streammerge", hint="Name folders that `streammerge merge` wrote."
        )
    recipe = _object(told.get("recipe"))
    return MergeFacts(
        label=label or Path(os.path.abspath(folder)).name,
        method=_text(recipe.get("merge_method")),
        experts=_experts(recipe),
        recipe=_shown(recipe, path),
        device=_text(told.get("device")) or "cpu",
        tensors=tuple(_tensor(entry, path) for entry in tensors),
        warnings=tuple(_text(line) for line in _list(told.get("warnings"))),
        totals=_numbers(told.get("totals")),
        seconds=_numbers(told.get("seconds")),
        memory=_numbers(told.get("memory_bytes")),
        samples=_samples(told.get("memory_samples")),
        versions={_text(name): _text(version) for name, version in _object(told.get("versions")).items()},
        results=_results(Path(folder)),
    )


def _tensor(entry: object, path: Path) -> TensorFacts:
    told = _object(entry)
    name, facts = told.get("name"), _object(told.get("facts"))
    if not isinstance(name, str):
        raise OutputError(f"{quoted(path)} has a tensor without a name", hint="The file is damaged: merge again.")
    escalation = facts.get("escalation")
    return TensorFacts(
        name=name,
        method=_text(told.get("method")),
        kind=_text(told.get("kind")),
        norm_ratio=_positive(told.get("norm_ratio")),
        growth=_positive(told.get("growth")),
        rounding_loss=_positive(told.get("rounding_loss")),
        changed=_positive(told.get("changed")),
        seconds=_positive(told.get("seconds")),
        base_norm=_positive(told.get("base_norm")),
        expert_norms=tuple(_positive(norm) for norm in _list(told.get("expert_norms"))),
        interference=_positive(facts.get("interference")),
        effective_rank=_positive(facts.get("effective_rank")),
        certificate=_positive(facts.get("certificate")),
        escalation=escalation if isinstance(escalation, str) and escalation != "none" else None,
    )


def _experts(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    models = _list(recipe.get("models"))
    for part in _list(recipe.get("slices")):
        models = models or _list(_object(part).get("sources"))
    return tuple(Path(_text(_object(model).get("model"))).name for model in models)


def _shown(recipe: Mapping[str, Any], path: Path) -> str:
    try:
        plain = json.dumps(recipe, indent=1)
        # YAML of what has no end would take its time
        short = len(plain) <= _LONGEST_RECIPE
        return yaml.safe_dump(recipe, sort_keys=False) if short else f"{plain[:_LONGEST_RECIPE]}\n…"
    except RecursionError as error:
        raise OutputError(
            f"{quoted(path)} holds a recipe that is nested too deep", hint="The file is damaged: merge again."
        ) from error


def _samples(told: object) -> tuple[tuple[float, float], ...]:
    pairs = [
        (_positive(pair[0]), _number(pair[1])) for pair in _list(told) if isinstance(pair, list) and len(pair) == 2
    ]
    return tuple(sorted((seconds, held) for seconds, held in pairs if seconds is not None and held is not None))


def _results(folder: Path) -> dict[str, dict[str, float]]:
    """Of several files' tasks of one name, each file's own."""
    paths = sorted(folder.glob("results*.json"))
    if len(paths) > _MOST_RESULTS:
        raise OutputError(
            f"{quoted(folder)} holds {len(paths)} files `results*.json`, expected at most {_MOST_RESULTS}",
            hint="Put the others elsewhere.",
        )
    found: dict[str, dict[str, float]] = {}
    for path in paths:
        tasks = _object(_json(path, _RESULTS_LIMIT_BYTES)).get("tasks")
        if not isinstance(tasks, dict) or not all(isinstance(metrics, dict) for metrics in tasks.values()):
            raise OutputError(
                f"{quoted(path)} holds no results",
                hint='Expected {"tasks": {name: {metric: number}}}, or another name.',
            )
        for task, metrics in tasks.items():
            values = {metric: _number(value) for metric, value in metrics.items()}
            bad = next((metric for metric, value in values.items() if value is None), None)
            if bad is not None:
                raise OutputError(
                    f"{quoted(path)}: {quoted(bad)} of {quoted(task)} is no finite number",
                    hint="Leave out what was not measured.",
                )
            name = f"{task} ({path.stem})" if task in found else task
            found[name] = {metric: value for metric, value in values.items() if value is not None}
    return found


def _json(path: Path, limit_bytes: int) -> object:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OutputError(f"{quoted(path)} is not a plain file")
            data = file.read(limit_bytes + 1)
    except FileNotFoundError as error:
        raise OutputError(
            f"{quoted(path)} does not exist", hint="Name folders that `streammerge merge` wrote."
        ) from error
    except OSError as error:
        raise OutputError(f"{quoted(path)} cannot be read: {(error.strerror or str(error)).lower()}") from error
    if len(data) > limit_bytes:
        raise OutputError(f"{quoted(path)} has more than {limit_bytes} bytes", hint="No merge writes so much.")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise OutputError(f"{quoted(path)} is not JSON", hint="The file is damaged: merge again.") from error


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _positive(value: object) -> float | None:
    number = _number(value)
    return number if number is not None and number >= 0.0 else None


def _numbers(told: object) -> dict[str, float | None]:
    return {key: _number(value) for key, value in _object(told).items()}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
