"""Measure how a merge's time and memory grow with experts, depth, width and parameters, and how well its plan knew.

python bench/growth.py [--method NAME …] [--axis NAME …]
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import child
import files
import rows
from generate import Settings, ensure
from llama import Shape
from memory import imports_only

METHODS = ("actmat", "linear")
# of how far a plan may be off: seconds either way, memory either way
ASKED = {"seconds_off": 0.25, "memory_off": 0.10}
MEASURED = {"seconds": "merge_seconds", "CPU seconds": "cpu_seconds", "memory": "anonymous_above_imports_bytes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point(Settings):
    """One set of models, by its experts and the sizes of its Llama decoder."""

    experts: int
    depth: int
    width: int
    vocabulary: int

    def shape(self) -> Shape:
        return Shape(
            hidden_size=self.width,
            intermediate_size=11 * self.width // 4,
            num_hidden_layers=self.depth,
            num_attention_heads=self.width // 64,
            num_key_value_heads=max(self.width // 512, 1),
            head_dim=64,
            vocab_size=self.vocabulary,
        )

    @property
    def parameters(self) -> int:
        """Of one model."""
        return sum(self.shape().nbytes().values()) // 2


START = {
    "1.1b": Point(size="grown", experts=3, depth=4, width=2048, vocabulary=32000),
    "tiny": Point(size="grown", experts=3, depth=2, width=128, vocabulary=256),
}
# how many times the start's
TIMES: dict[str, tuple[float, ...]] = {
    "experts": (2 / 3, 1, 5 / 3, 8 / 3),
    "depth": (1 / 2, 1, 2, 4),
    "width": (1 / 2, 1, 2),
    "parameters": (1 / 2, 1, 2),
}


def points(axis: str, start: Point) -> list[Point]:
    """The sets along one axis. Along `parameters` models become deeper and wider by the same factor."""
    grown = {"parameters": ("depth", "width")}.get(axis, (axis,))
    return [
        replace(start, **{name: round(getattr(start, name) * times) for name in grown})  # type: ignore[arg-type]
        for times in TIMES[axis]
    ]


def place(axis: str, point: Point) -> float:
    """Where a set stands on an axis."""
    return float(getattr(point, axis))


def exponent(pairs: Sequence[tuple[float, float]]) -> float:
    """The p of y = c·x^p that is nearest in the least squares of logarithms."""
    xs, ys = [math.log(x) for x, _ in pairs], [math.log(y) for _, y in pairs]
    middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)
    across = sum((x - middle_x) ** 2 for x in xs)
    return sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True)) / across


def command(given: Namespace, rates: str, *words: str) -> child.Ran:
    """A command of streammerge that keeps its rates in a folder of its own."""
    environment = child.ENVIRONMENT | {"XDG_CACHE_HOME": str(given.work / rates)}
    budget = ("--json", "--memory", given.memory)
    return child.run([sys.executable, "-m", "streammerge", *words, *budget], environment)


def merged(given: Namespace, method: str, models: list[Path], rates: str) -> tuple[child.Ran, dict[str, Any]]:
    """One merge from nothing, and its report."""
    base, *experts = models
    recipe = child.write_recipe(given.work / "growth.yaml", method, experts, base)
    out = given.work / "growth-out"
    for old in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(old, ignore_errors=True)
    files.make_cold(files.weight_files(models))
    ran = command(given, rates, "merge", str(recipe), str(out))
    report: dict[str, Any] = json.loads((out / "streammerge.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    return ran, report


def measure(given: Namespace, method: str, models: list[Path], imports: Mapping[str, float]) -> dict[str, Any]:
    """What the plan says by the start's rates, and what happens."""
    base, *experts = models
    recipe = child.write_recipe(given.work / "growth.yaml", method, experts, base)
    plan: dict[str, Any] = command(given, "growth-start", "plan", str(recipe)).json()
    runs = [merged(given, method, models, "growth-others") for _ in range(given.repeats)]
    ran, report = min(runs, key=lambda run: float(run[1]["seconds"]["wall"]))
    wall, anonymous = report["seconds"]["wall"], ran.peak_anonymous_bytes - imports["RssAnon"]
    predicted = plan["predicted_seconds"]
    return {
        "merge_seconds": wall,
        "all_merge_seconds": [run[1]["seconds"]["wall"] for run in runs],
        "elapsed_seconds": ran.elapsed_seconds,
        "cpu_seconds": ran.cpu_seconds,
        "seconds": report["seconds"],
        "flops": plan["flops"],
        "read_bytes": report["totals"]["read_bytes"],
        "written_bytes": report["totals"]["written_bytes"],
        "planned_bytes": plan["memory_bytes"],
        "expected_bytes": plan["expected_memory_bytes"],
        "anonymous_above_imports_bytes": anonymous,
        "budget_bytes": plan["budget_bytes"],
        "memory_off": plan["expected_memory_bytes"] / anonymous - 1,
        "predicted_seconds": predicted,
        "seconds_off": None if predicted is None else predicted / wall - 1,
    }


def main() -> None:
    parser = rows.arguments(__doc__, sizes=START)
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable; both without")
    parser.add_argument("--axis", action="append", choices=TIMES, help="repeatable; all without")
    parser.add_argument("--memory", default="4GiB", help="the budget given to the merges")
    parser.add_argument("--repeats", type=int, default=1, help="merges of each set, of which the fastest counts")
    given = parser.parse_args()
    methods, start = given.method or METHODS, START[given.size]
    imports = imports_only().json()
    wanted = {axis: points(axis, start) for axis in given.axis or TIMES}
    # sets that differ in their experts alone are one set
    sets = sorted(
        {replace(point, experts=0) for along in wanted.values() for point in along}, key=lambda p: p.parameters
    )
    sets = [replace(start, experts=0), *(each for each in sets if each != replace(start, experts=0))]
    found: dict[tuple[str, Point], dict[str, Any]] = {}
    for number, each in enumerate(sets):
        here = {point for along in wanted.values() for point in along if replace(point, experts=0) == each} | (
            {start} if number == 0 else set()
        )
        directory = given.work / "growth"
        shutil.rmtree(directory, ignore_errors=True)
        models = ensure(directory, each, experts=max(point.experts for point in here))
        for method in methods:
            if number == 0:
                shutil.rmtree(given.work / "growth-start", ignore_errors=True) if method == methods[0] else None
                merged(given, method, models[: 1 + start.experts], "growth-start")
            for point in sorted(here, key=lambda p: p.experts):
                taken = measure(given, method, models[: 1 + point.experts], imports)
                found[method, point] = taken
                facts = {"experts": point.experts, "depth": point.depth, "width": point.width}
                facts |= {"size": given.size, "method": method, "parameters": point.parameters}
                rows.append(given.results, "growth", facts | taken)
                print(f"{method} of {point.experts}, {point.depth} layers {point.width} wide: "
                      f"{taken['merge_seconds']:.1f} s", file=sys.stderr)  # fmt: skip
    for old in ("growth", "growth-start", "growth-others"):
        shutil.rmtree(given.work / old, ignore_errors=True)
    report(given, methods, wanted, found)


def report(
    given: Namespace,
    methods: Sequence[str],
    wanted: Mapping[str, Sequence[Point]],
    found: Mapping[tuple[str, Point], dict[str, Any]],
) -> None:
    """The table of all sets, and the exponent of each axis, also as rows."""
    lines = [
        (f"{method} of {p.experts}, {p.depth} x {p.width}", f"{p.parameters / 1e6:.0f} M",
         f"{taken['merge_seconds']:.1f}", _share(taken["seconds_off"]),
         rows.mib(taken["anonymous_above_imports_bytes"]), _share(taken["memory_off"]))
        for (method, p), taken in found.items()
    ]  # fmt: skip
    print(rows.table(("merge", "parameters", "seconds", "plan's off", "memory", "plan's off"), lines))
    fits = []
    for method in methods:
        for axis, along in wanted.items():
            fitted = {
                name: exponent([(place(axis, point), found[method, point][key]) for point in along])
                for name, key in MEASURED.items()
            }
            rows.append(given.results, "growth", {"size": given.size, "method": method, "axis": axis, "fitted": fitted})
            fits.append((f"{method}, {axis}", *(f"{value:.2f}" for value in fitted.values())))
    print("\n" + rows.table(("grows with the power of", *MEASURED), fits))
    for key, most in ASKED.items():
        off = [taken[key] for taken in found.values() if taken[key] is not None]
        if off:
            print(f"{key.replace('_', ' ')}: {max(map(abs, off)):.2f} at most, asked {most:.2f}")


def _share(off: float | None) -> str:
    return "-" if off is None else f"{off:+.0%}"


if __name__ == "__main__":
    main()
