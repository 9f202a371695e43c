"""The lab's rows: appended as they come, found again so that nothing is measured twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rows

BENCHMARK = "quality"
# names of rows that are no merges
ZERO_SHOT, EXPERTS, ANALYSIS, TERMS = "zero-shot", "experts", "covariances", "error terms"
# what a row is found by
IDENTITY = ("setting", "suite", "kind", "seed", "name", "recipe")

Row = Mapping[str, Any]


class Ledger:
    """Rows of one folder, `quality.jsonl` in it."""

    def __init__(self, results: Path) -> None:
        self.results = results
        path = results / f"{BENCHMARK}.jsonl"
        if path.is_file():
            # what an interruption left of a row would spoil the next one
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._known = {_identity(row) for row in read(path)}

    def __contains__(self, facts: Row) -> bool:
        return _identity(facts) in self._known

    def append(self, facts: Row) -> None:
        """Add a row, with the machine, the versions, the date and the commit."""
        rows.append(self.results, BENCHMARK, facts)
        self._known.add(_identity(facts))


def read(path: Path) -> list[dict[str, Any]]:
    """Every row of a file that may not exist yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _identity(row: Row) -> str:
    return json.dumps([row.get(key) for key in IDENTITY], sort_keys=True)
