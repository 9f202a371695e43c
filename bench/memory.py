"""Measure the memory that a merge takes beyond its imports: more experts, deeper models, other methods.

python bench/memory.py [--case NAME]
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass

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


def imports_only() -> child.Ran:
    """A child that imports what a merge imports, and reports its memory once it has."""
    modules = ", ".join(IMPORTS)
    report = "import json, child; print(json.dumps(child.memory_of('self')))"
    environment = dict(child.ENVIRONMENT)
    environment["PYTHONPATH"] += f":{rows.ROOT / 'bench'}"
    return child.run([sys.executable, "-c", f"import {modules}\n{report}"], environment)


def main() -> None:
    parser = rows.arguments(__doc__)
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; all of them without it")
    parser.add_argument("--memory", default="1GiB", help="the budget given to the merge")
    given = parser.parse_args()
    cases = {name: CASES[name] for name in given.case or CASES}
    imports = imports_only().json()
    lines = []
    for name, case in cases.items():
        layers = SIZES[given.size].num_hidden_layers * case.depth if case.depth > 1 else None
        directory = given.work / (given.size if layers is None else f"{given.size}-{layers}")
        # a larger set serves the smaller case too: expert i is the same whatever their number
        most = max(other.experts for other in cases.values() if other.depth == case.depth)
        base, *experts = ensure(directory, Settings(size=given.size, layers=layers), experts=most)
        experts = experts[: case.experts]
        recipe = child.write_recipe(given.work / "memory.yaml", case.method, experts, base)
        out = given.work / "memory-out"
        files.make_cold(files.weight_files([base, *experts]))
        ran = child.merge(recipe, out, "--memory", given.memory)
        shutil.rmtree(out)
        anonymous = ran.peak_anonymous_bytes - imports["RssAnon"]
        resident = ran.peak_resident_bytes - imports["VmHWM"]
        inputs = sum(file.stat().st_size for file in files.weight_files([base, *experts]))
        facts = {
            "size": given.size,
            "case": name,
            "method": case.method,
            "experts": case.experts,
            "layers": layers or SIZES[given.size].num_hidden_layers,
            "budget": given.memory,
            "input_bytes": inputs,
            "anonymous_above_imports_bytes": anonymous,
            "resident_above_imports_bytes": resident,
            "peak_anonymous_bytes": ran.peak_anonymous_bytes,
            "peak_resident_bytes": ran.peak_resident_bytes,
            "imports_anonymous_bytes": imports["RssAnon"],
            "imports_resident_bytes": imports["VmHWM"],
            "samples": ran.samples,
            "elapsed_seconds": ran.elapsed_seconds,
            "cpu_seconds": ran.cpu_seconds,
            "merge": ran.json(),
        }
        rows.append(given.results, "memory", facts)
        taken = [rows.mib(n) for n in (inputs, anonymous, resident)]
        lines.append((name, *taken, given.memory, f"{ran.elapsed_seconds:.0f} s"))
    columns = ("merge", "inputs", "anonymous above imports", "resident above imports", "budget", "time")
    print(rows.table(columns, lines))


if __name__ == "__main__":
    main()
