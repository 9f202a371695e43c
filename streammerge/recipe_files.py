"""The files that recipes come in: YAML, and the reports of merges, which say how to do them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from streammerge import located_yaml
from streammerge.checkpoint import JSON_LIMIT_BYTES
from streammerge.errors import RecipeError, quoted

DAMAGED_REPORT = "The report is damaged, or was written by hand. Write the recipe as YAML instead."


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What a report says of its merge beside the recipe; None where it was written before reports said so.

    max_shard_bytes  the most data that one output file held
    inputs           for each of the recipe's `locations` its weight files: size, modified_ns, header_sha256
    """

    max_shard_bytes: int | None = None
    inputs: tuple[Mapping[str, Mapping[str, object]], ...] | None = None


def contents(path: Path) -> str:
    """The text of a file that a person wrote. Raises RecipeError for one that is not there, too large or no text."""
    try:
        with path.open("rb") as file:
            data = file.read(located_yaml.LARGEST_BYTES + 1)
    except FileNotFoundError as error:
        raise RecipeError(f"{quoted(path)} does not exist") from error
    except OSError as error:
        raise RecipeError(f"{quoted(path)} cannot be read: {error.strerror}") from error
    if len(data) > located_yaml.LARGEST_BYTES:
        raise located_yaml.too_large(str(path))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{quoted(path)} is not UTF-8 text") from error


def read_report(path: Path) -> dict[str, object] | None:
    """A file's content if it is a merge's report, which may be longer than any recipe."""
    try:
        if path.stat().st_size > JSON_LIMIT_BYTES:
            return None
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        # to be said by whoever reads it as a recipe
        return None
    return table if isinstance(table, dict) and {"format", "recipe", "tensors"} <= table.keys() else None


def past_of(report: Mapping[str, object], source: str, locations: int) -> Past:
    """What a report says of its merge; `source` is its name in messages. Raises RecipeError for the impossible."""
    shard, inputs = report.get("max_shard_bytes"), report.get("inputs")
    sound = shard is None or (type(shard) is int and shard > 0)
    if not sound or not (inputs is None or _are_inputs(inputs, locations)):
        raise RecipeError(f"{quoted(source)} says something impossible of its inputs or shards", hint=DAMAGED_REPORT)
    files = tuple(each["files"] for each in inputs) if isinstance(inputs, list) else None
    return Past(max_shard_bytes=cast("int | None", shard), inputs=files)


def _are_inputs(inputs: object, locations: int) -> bool:
    return (
        isinstance(inputs, list)
        and len(inputs) == locations
        and all(isinstance(each, dict) and isinstance(each.get("files"), dict) for each in inputs)
        and all(isinstance(facts, dict) for each in inputs for facts in each["files"].values())
    )
