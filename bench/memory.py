"""Measure the memory that a merge takes beyond its imports: more experts, deeper models, other methods.

python bench/memory.py [--case NAME]
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import child
import files
import rows
from generate import Settings, ensure
from llama import SIZES

# what a merge imports, and nothing that it does not
IMPORTS = (
    "torch",
    "numpy",
    "streammerge.cli",
    "streammerge.api",
    "streammerge.stream",
    "streammerge.write",
    "streammerge.report",
    "streammerge.storage.local",
    "streammerge.methods.linear",
    "streammerge.methods.actmat",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One merge: how many experts, and how many times the size's own depth."""

    method: str
    experts: int
    depth: int = 1


CASES = {
    "actmat-3": Case(method="actmat", experts=3),
    "actmat-8": Case(method="actmat", experts=8),
    "linear-3": Case(method="linear", experts=3),
    "actmat-3-deep": Case(method="actmat", experts=3, depth=2),
}


COLUMNS = {
    "inputs": "input_bytes",
    "anonymous above imports": "anonymous_above_imports_bytes",
    "resident above imports": "resident_above_imports_bytes",
    "planned": "planned_bytes",
    "budget": "budget_bytes",
}


def imports_only() -> child.Ran:
    """A child that imports what a merge imports, and reports its memory once it has."""
    modules = ", ".join(IMPORTS)
    report = "import json, child; print(json.dumps(child.memory_of('self')))"
    environment = dict(child.ENVIRONMENT)
    environment["PYTHONPATH"] += f":{rows.ROOT / 'bench'}"
    return child.run([sys.executable, "-c", f"import {modules}\n{report}"], environment)


def measure(given: Namespace, case: Case, models: list[Path], imports: Mapping[str, float]) -> dict[str, Any]:
    """Merge once, cold, and note what the plan said and what the process took."""
    base, *experts = models
    recipe = child.write_recipe(given.work / "memory.yaml", case.method, experts, base)
    out = given.work / "memory-out"
    files.make_cold(files.weight_files(models))
    budget = ("--memory", given.memory)
    plan = child.run([sys.executable, "-m", "streammerge", "plan", str(recipe), "--json", *budget]).json()
    ran = child.merge(recipe, out, *budget)
    shutil.rmtree(out)
    return {
        "input_bytes": sum(file.stat().st_size for file in files.weight_files(models)),
        "budget_bytes": plan["budget_bytes"],
        "planned_bytes": plan["memory_bytes"],
        "anonymous_above_imports_bytes": ran.peak_anonymous_bytes - imports["RssAnon"],
        "resident_above_imports_bytes": ran.peak_resident_bytes - imports["VmHWM"],
        "peak_anonymous_bytes": ran.peak_anonymous_bytes,
        "peak_resident_bytes": ran.peak_resident_bytes,
        "imports_anonymous_bytes": imports["RssAnon"],
        "imports_resident_bytes": imports["VmHWM"],
        "samples": ran.samples,
        "elapsed_seconds": ran.elapsed_seconds,
        "cpu_seconds": ran.cpu_seconds,
        "merge": ran.json(),
    }


def main() -> None:
    parser = rows.arguments(__doc__)
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; all of them without it")
    parser.add_argument("--memory", default="1GiB", help="the budget given to the merge")
    given = parser.parse_args()
    cases = {name: CASES[name] for name in given.case or CASES}
    imports = imports_only().json()
    lines, red = [], []
    for name, case in cases.items():
        layers = SIZES[given.size].num_hidden_layers * case.depth
        directory = given.work / (given.size if case.depth == 1 else f"{given.size}-{layers}")
        settings = Settings(size=given.size, layers=None if case.depth == 1 else layers)
        # a larger set serves the smaller case too: expert i is the same whatever their number
        most = max(other.experts for other in cases.values() if other.depth == case.depth)
        models = ensure(directory, settings, experts=most)[: 1 + case.experts]
        taken = measure(given, case, models, imports)
        facts = {"size": given.size, "case": name, "method": case.method, "experts": case.experts, "layers": layers}
        rows.append(given.results, "memory", facts | taken)
        lines.append((name, *(rows.mib(taken[column]) for column in COLUMNS.values())))
        if taken["anonymous_above_imports_bytes"] > taken["budget_bytes"]:
            red.append(name)
    print(rows.table(("merge", *COLUMNS), lines))
    if red:
        raise SystemExit(f"error: more than the budget: {', '.join(red)}")


if __name__ == "__main__":
    main()
