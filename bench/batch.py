"""Time a batch of twelve merges of the same experts beside twelve commands: what is shared, of reading and of products.

python bench/batch.py [--models BASE EXPERT EXPERT …]
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from statistics import median

import child
import files
import rows
from generate import Settings, ensure

METHODS = ("actmat", "wudi", "tact")
RIDGES = (0.01, 0.1, 0.3, 1.0)


def demo_models() -> list[Path]:
    """The base and the experts that `make demo` made last, if it did."""
    newest: dict[str, Path] = {}
    for done in sorted((rows.ROOT / ".cache" / "demo").glob("*/complete.json"), key=lambda path: path.stat().st_mtime):
        # a folder's name ends with what decided its bytes
        newest[done.parent.name.rpartition("-")[0]] = done.parent / "model"
    experts = [newest[name] for name in sorted(newest) if name.startswith("expert-")]
    return [newest["base"], *experts] if "base" in newest else []


def write_night(path: Path, recipe: Path, out: Path) -> Path:
    """A batch of every method with every ridge."""
    axes = {"merge_method": list(METHODS), "parameters.ridge": list(RIDGES)}
    jobs = [{"name": "g", "recipe": json.loads(recipe.read_text(encoding="utf-8")), "grid": axes}]
    path.write_text(json.dumps({"out": str(out.resolve()), "jobs": jobs}) + "\n", encoding="utf-8")
    return path


def digest(out: Path) -> str:
    """Of a model's weights."""
    found = hashlib.sha256()
    for path in files.weight_files([out]):
        with path.open("rb") as file:
            while part := file.read(1 << 23):
                found.update(part)
    return found.hexdigest()


def main() -> None:
    parser = rows.arguments(__doc__)
    parser.add_argument("--models", nargs="+", type=Path, metavar="DIR", help="the base first; else the demo's")
    parser.add_argument("--repeats", type=int, default=1, help="of each separate merge")
    given = parser.parse_args()
    models = given.models or (demo_models() if given.size == "1.1b" else [])
    if not models:
        models = ensure(given.work / given.size, Settings(size=given.size), experts=3)[:4]
    base, *experts = models
    given.work.mkdir(parents=True, exist_ok=True)
    inputs, out = files.weight_files(models), given.work / "night"
    shutil.rmtree(out, ignore_errors=True)
    recipe = child.write_recipe(given.work / "batch.yaml", "actmat", experts, base)
    night = write_night(given.work / "night.yaml", recipe, out)
    files.make_cold(inputs)
    batch = child.run([sys.executable, "-m", "streammerge", "batch", str(night)])
    print(f"batch: {batch.elapsed_seconds:.1f} s", file=sys.stderr)
    apart: list[child.Ran] = []
    for method in METHODS:
        for ridge in RIDGES:
            recipe = child.write_recipe(given.work / "batch.yaml", method, experts, base, {"ridge": ridge})
            every = []
            for _ in range(given.repeats):
                files.make_cold(inputs)
                every.append(child.merge(recipe, given.work / "alone"))
            apart.append(sorted(every, key=lambda ran: ran.elapsed_seconds)[len(every) // 2])
            together = out / f"g-merge_method={method}-ridge={ridge}"
            if digest(together) != digest(given.work / "alone"):
                raise SystemExit(f"error: `{together.name}` differs from the merge alone; nothing is timed")
            print(f"{method}, ridge {ridge}: {apart[-1].elapsed_seconds:.1f} s", file=sys.stderr)
    stored = sum(path.stat().st_size for path in inputs)
    seconds, cpu = sum(ran.elapsed_seconds for ran in apart), sum(ran.cpu_seconds for ran in apart)
    facts = {
        "models": [model.parent.name if model.name == "model" else model.name for model in models],
        "jobs": len(apart),
        "batch_seconds": batch.elapsed_seconds,
        "apart_seconds": seconds,
        "time_share": batch.elapsed_seconds / seconds,
        "batch_cpu_seconds": batch.cpu_seconds,
        "apart_cpu_seconds": cpu,
        "batch_disk_read_bytes": batch.disk_read_bytes,
        "stored_bytes": stored,
        "batch_peak_anonymous_bytes": batch.peak_anonymous_bytes,
        "apart_peak_anonymous_bytes": median(ran.peak_anonymous_bytes for ran in apart),
    }
    rows.append(given.results, "batch", facts)
    lines = [
        (
            "one batch",
            f"{batch.elapsed_seconds:.1f}",
            f"{batch.cpu_seconds:.1f}",
            f"{batch.disk_read_bytes / stored:.2f}",
        ),
        (
            f"{len(apart)} commands",
            f"{seconds:.1f}",
            f"{cpu:.1f}",
            f"{sum(r.disk_read_bytes for r in apart) / stored:.2f}",
        ),
        ("share", f"{facts['time_share']:.2f}", f"{batch.cpu_seconds / cpu:.2f}", "-"),
    ]
    print(rows.table(("12 merges, equal bytes", "seconds", "of CPU", "times the inputs read from disk"), lines))
    for made in (out, given.work / "alone"):
        shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    main()
