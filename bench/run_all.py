"""Run every benchmark in order, in less than 30 GB of disk, and sum up.

python bench/run_all.py [--work DIR]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import child
import rows
from generate import trim
from llama import SIZES

HERE = Path(__file__).resolve().parent
SHALLOW = ("actmat-3", "actmat-8", "linear-3")


def main() -> None:
    given = rows.arguments(__doc__).parse_args()
    shared = ["--work", str(given.work), "--size", given.size, "--results", str(given.results)]
    lines: list[tuple[object, ...]] = []

    def bench(script: str, *options: str) -> None:
        print(f"\n{script} {' '.join(options)}", flush=True)
        began = time.perf_counter()
        command = [sys.executable, str(HERE / f"{script}.py"), *shared, *options]
        done = subprocess.run(command, env=child.ENVIRONMENT, check=False)
        minutes = (time.perf_counter() - began) / 60
        lines.append((script, "red" if done.returncode else "green", f"{minutes:.1f}"))

    model_set = given.work / given.size
    deep_set = given.work / f"{given.size}-{2 * SIZES[given.size].num_hidden_layers}"
    # nine models, then four, then the four deep ones alone: never more than 22 GB of them at 1.1b
    trim(deep_set, experts=0)
    bench("memory", *(word for name in SHALLOW for word in ("--case", name)))
    trim(model_set, experts=3)
    for script in ("correctness", "speed", "linear_io", "readers", "checks", "batch"):
        bench(script)
    bench("hosts")
    trim(model_set, experts=0)
    bench("moe")
    bench("memory", "--case", "actmat-3-deep")
    trim(deep_set, experts=0)
    print("\n" + rows.table(("benchmark", "outcome", "minutes"), lines))
    if any(outcome == "red" for _, outcome, _ in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
