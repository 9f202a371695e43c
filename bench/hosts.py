"""Time a merge by several processes of one thread each against one process of as many threads, by turns.

python bench/hosts.py [--processes N] [--method NAME]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median

import child
import files
import rows
from checks import digests
from generate import Settings, ensure


def merge(recipe: Path, out: Path, processes: int, memory: str) -> dict[str, float]:
    """Merge once, from nothing; the merge's own seconds, the commands', and what the processor spent on them."""
    for old in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(old, ignore_errors=True)
    command = [sys.executable, "-m", "streammerge", "merge", str(recipe), str(out), "--json", "--memory", memory]
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    environments = [{**child.ENVIRONMENT, **world, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(processes)]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as talk:
        began = time.perf_counter()
        started = [
            subprocess.Popen(command, stdout=output, stderr=talk, cwd=rows.ROOT, env=environment)
            for environment in environments
        ]
        spent = 0.0
        for process in started:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            spent += usage.ru_utime + usage.ru_stime
        elapsed = time.perf_counter() - began
        output.seek(0)
        talk.seek(0)
        if any(process.returncode for process in started):
            raise SystemExit(f"error: a merge by {processes} processes failed\n{talk.read()[-4000:]}")
        told = json.loads(output.read())
    return {"seconds": told["elapsed_seconds"], "command_seconds": elapsed, "cpu_seconds": spent}


def measure(given: Namespace, recipe: Path, inputs: list[Path]) -> dict[int, list[dict[str, float]]]:
    """Every run, by the number of processes. Stops this program where they do not write the same bytes."""
    outs = {count: given.work / f"hosts-{count}" for count in (1, given.processes)}
    found: dict[int, list[dict[str, float]]] = {count: [] for count in outs}
    for repeat in range(given.repeats):
        for count in list(outs)[:: 1 if repeat % 2 else -1]:
            files.make_warm(inputs)
            found[count].append(merge(recipe, outs[count], count, given.memory))
            print(f"{repeat + 1}/{given.repeats} by {count}: {found[count][-1]['seconds']:.2f} s", file=sys.stderr)
        if repeat == 0:
            one, several = (digests(out) for out in outs.values())
            if one != several:
                raise SystemExit(f"error: {given.processes} processes wrote other bytes than one; nothing is timed")
    for out in outs.values():
        shutil.rmtree(out, ignore_errors=True)
    return found


def main() -> None:
    parser = rows.arguments(__doc__)
    parser.add_argument("--method", default="actmat", help="one whose time is arithmetic")
    parser.add_argument("--processes", type=int, default=2, help="and as many threads of the one")
    parser.add_argument("--memory", default="1GiB", help="the budget of each process")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: given.processes]
    if len(cores) < given.processes:
        raise SystemExit(f"error: {given.processes} processes need as many cores, and there are {len(cores)}")
    # children inherit it: one process has a thread for each, several have one thread each
    os.sched_setaffinity(0, cores)
    base, *experts = ensure(given.work / given.size, Settings(size=given.size), experts=3)[:4]
    recipe = child.write_recipe(given.work / "hosts.yaml", given.method, experts, base)
    runs = measure(given, recipe, files.weight_files([base, *experts]))
    middle = {count: {key: median(run[key] for run in every) for key in every[0]} for count, every in runs.items()}
    lines = []
    for count, every in runs.items():
        ratio = middle[count]["seconds"] / middle[1]["seconds"]
        facts = {"size": given.size, "method": given.method, "processes": count, "threads": given.processes // count}
        shared = {**facts, **middle[count], "over_one_process": ratio}
        rows.append(given.results, "hosts", shared | {"all_seconds": [run["seconds"] for run in every]})
        lines.append(
            (
                f"{given.method} by {count} x {given.processes // count}",
                f"{middle[count]['seconds']:.2f}",
                f"{middle[count]['cpu_seconds']:.2f}",
                f"{ratio:.3f}",
            )
        )
    print(rows.table(("processes x threads", "seconds", "of CPU", "over one process"), lines))


if __name__ == "__main__":
    main()
