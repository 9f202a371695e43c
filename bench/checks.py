"""Time merges with and without their checks, by turns: what the checks cost of the wall time.

python bench/checks.py [--case NAME] [--each]
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from statistics import median

import child
import files
import rows
from generate import Settings, ensure
from unchecked import CHECKS

# where the checks weigh most, as method and parameters: one pass of cheap arithmetic, a vote, looks for the cuts before
# the vote, and products and a solve
CASES: dict[str, tuple[str, dict[str, float]]] = {
    "linear": ("linear", {}),
    "ties": ("ties", {}),
    "ties-half": ("ties", {"density": 0.5}),
    "actmat": ("actmat", {}),
}
CACHE = {"cold": files.make_cold, "warm": files.make_warm}
ALL, NONE = "all checks", "no checks"


def merge(without: tuple[str, ...], recipe: Path, out: Path) -> dict[str, float]:
    """One merge from nothing: the command's seconds, and the merge's own, without Python's start and imports."""
    for old in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(old, ignore_errors=True)
    script = str(rows.ROOT / "bench" / "unchecked.py")
    ran = child.run([sys.executable, script, ",".join(without), "merge", str(recipe), str(out), "--json"])
    return {
        "seconds": ran.json()["elapsed_seconds"],
        "command_seconds": ran.elapsed_seconds,
        "cpu_seconds": ran.cpu_seconds,
    }


def digests(out: Path) -> list[str]:
    """What the weights are."""
    found = []
    for path in files.weight_files([out]):
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 23):
                digest.update(part)
            found.append(digest.hexdigest())
    return found


def measure(given: Namespace, case: str, recipe: Path, inputs: list[Path]) -> dict[str, list[dict[str, float]]]:
    """Every way's runs. Stops this program where a check changes a byte of the weights."""
    ways: dict[str, tuple[str, ...]] = {ALL: (), NONE: tuple(CHECKS)}
    if given.each:
        ways |= {f"no {check}": (check,) for check in CHECKS}
    outs = {way: given.work / f"checks-{way.replace(' ', '-')}" for way in ways}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for repeat in range(given.repeats):
        first = repeat % len(ways)
        for way in [*list(ways)[first:], *list(ways)[:first]]:
            CACHE[given.cache](inputs)
            found[way].append(merge(ways[way], recipe, outs[way]))
            print(f"{repeat + 1}/{given.repeats} {case}, {way}: {found[way][-1]['seconds']:.2f} s", file=sys.stderr)
        if repeat == 0:
            weights = {way: digests(out) for way, out in outs.items()}
            if differing := [way for way in ways if weights[way] != weights[ALL]]:
                raise SystemExit(f"error: {case}: other bytes with {', '.join(differing)}; nothing is timed")
        for out in outs.values():
            shutil.rmtree(out, ignore_errors=True)
    return found


def main() -> None:
    parser = rows.arguments(__doc__)
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; all of them without it")
    parser.add_argument("--cache", choices=CACHE, default="cold", help="warm: nothing hides the checks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--each", action="store_true", help="also leave out each check alone")
    given = parser.parse_args()
    base, *experts = ensure(given.work / given.size, Settings(size=given.size), experts=3)[:4]
    inputs = files.weight_files([base, *experts])
    lines = []
    for case in given.case or CASES:
        method, parameters = CASES[case]
        recipe = child.write_recipe(given.work / "checks.yaml", method, experts, base, parameters)
        runs = measure(given, case, recipe, inputs)
        whole = median(run["seconds"] for run in runs[ALL])
        for way, every in runs.items():
            middle = {key: median(run[key] for run in every) for key in every[0]}
            # of the wall time of a merge with all its checks
            share = 1 - middle["seconds"] / whole
            facts = {"size": given.size, "case": case, "cache": given.cache, "way": way, **middle, "saved_share": share}
            rows.append(given.results, "checks", facts | {"all_seconds": [run["seconds"] for run in every]})
            seconds = f"{middle['seconds']:.2f}", f"{middle['cpu_seconds']:.2f}"
            lines.append((f"{case}, {way}", *seconds, "-" if way == ALL else f"{100 * share:.1f} %"))
    print(rows.table(("merge of 3", "seconds", "of CPU", "of the wall time saved"), lines))


if __name__ == "__main__":
    main()
