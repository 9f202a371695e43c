"""Merge OLMo-3-7B's shapes with three experts under 4 GiB, and hold it against the machine's own product rate.

python bench/seven.py [--distinct-layers N]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import mean
from typing import Any

import child
import files
import rows
import truth
from generate import ensure
from memory import imports_only
from olmo3 import SIZES, Olmo3, Olmo3Settings

SAMPLED = "model.layers.1.self_attn.q_proj.weight"
# of what they are held against: see the README
ASKED = {"matrix_share_of_product_rate": 0.85, "waiting_share": 0.05, "seconds_off": 0.25, "memory_off": 0.10}
PRODUCT = """
import sys, time, torch
from streammerge_kernels.matmul import fast_matmul
n = {size}
left, right, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
for line in sys.stdin:
    with fast_matmul():
        torch.mm(left, right, out=out)
        began = time.perf_counter()
        for _ in range(int(line)):
            torch.mm(left, right, out=out)
    print(2 * n**3 * int(line) / (time.perf_counter() - began), flush=True)
"""


class Products:
    """FLOPs per second of square float32 products as the merge computes them, in a process that waits when not asked.

    The machine's rate drifts by a third within minutes: it is taken before, after, and in pauses of the merge.
    """

    def __init__(self, size: str) -> None:
        script = PRODUCT.format(size=4096 if size == "7b" else 256)
        self.rates: list[float] = []
        self._asked = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child.ENVIRONMENT,
        )
        self.take()
        self.rates.clear()

    def take(self) -> None:
        """Measure three products, after one that is not counted."""
        assert self._asked.stdin is not None
        assert self._asked.stdout is not None
        self._asked.stdin.write("3\n")
        self._asked.stdin.flush()
        self.rates.append(float(self._asked.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self._asked.communicate()


def recipe_of(given: Namespace, models: list[Path], layers: int | None) -> Path:
    """The recipe of the whole merge, or of the first `layers` of it."""
    base, *experts = models
    if layers is None:
        return child.write_recipe(given.work / "seven.yaml", "actmat", experts, base)
    sources = [{"model": str(model.resolve()), "layer_range": [0, layers]} for model in models]
    path = child.write_recipe(given.work / "seven-first.yaml", "actmat", [], base, slices=[{"sources": sources}])
    recipe = {key: value for key, value in json.loads(path.read_text()).items() if key != "models"}
    path.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    return path


def command(given: Namespace, shape: Olmo3, *words: str, in_pauses: Callable[[], None] | None = None) -> child.Ran:
    """A command of streammerge over the set, with rates of its own."""
    repeats = shape.distinct_layers < shape.num_hidden_layers
    script = [str(rows.ROOT / "bench" / "repeated.py"), str(shape.distinct_layers)]
    environment = child.ENVIRONMENT | {"XDG_CACHE_HOME": str(given.work / "seven-cache")}
    start = script if repeats else ["-m", "streammerge"]
    return child.run([sys.executable, *start, *words, "--json", "--memory", given.memory], environment, in_pauses)


def refuse_wrong(shape: Olmo3, models: list[Path], out: Path, report: dict[str, Any]) -> float:
    """One matrix's error against float64; stops this program where it is large or twins came out different."""
    digests = {tensor["name"]: tensor["sha256"] for tensor in report["tensors"]}
    if apart := [name for name in digests if digests[name] != digests[shape.twin(name)]]:
        raise SystemExit(f"error: the same inputs gave other outputs: {', '.join(apart[:3])}; nothing is recorded")
    base, *experts = (files.read_tensor(model, SAMPLED) for model in models)
    wanted = base.double() + truth.ridge64(truth.deltas64(base, experts), truth.RIDGE)
    found = files.read_tensor(out, SAMPLED)
    # what is left is rounding to bfloat16
    error = truth.relative_error(found.float() - base.float(), wanted.bfloat16().float() - base.float())
    if not error <= 0.01:
        raise SystemExit(f"error: {SAMPLED} is {error:.1e} off float64; nothing is recorded")
    return error


def measure(given: Namespace, shape: Olmo3, models: list[Path]) -> dict[str, Any]:
    """Plan, then merge cold, with the machine's product rate before, in between and after."""
    out, cache = given.work / "seven-out", given.work / "seven-cache"
    for old in (out, out.with_name(out.name + ".partial"), cache):
        shutil.rmtree(old, ignore_errors=True)
    imports = imports_only().json()
    # the whole's time is predicted from its first layer's
    command(given, shape, "merge", str(recipe_of(given, models, 1)), str(out))
    shutil.rmtree(out)
    recipe = recipe_of(given, models, None)
    plan: dict[str, Any] = command(given, shape, "plan", str(recipe)).json()
    files.make_cold(files.weight_files(models))
    with closing(Products(given.size)) as products:
        products.take()
        ran = command(given, shape, "merge", str(recipe), str(out), in_pauses=products.take)
        products.take()
    report = json.loads((out / "streammerge.json").read_text(encoding="utf-8"))
    error = refuse_wrong(shape, models, out, report)
    if not given.keep:
        shutil.rmtree(out)
        shutil.rmtree(cache, ignore_errors=True)
    return facts_of(plan, report, ran, imports, products.rates) | {"relative_error": error}


def facts_of(
    plan: dict[str, Any], report: dict[str, Any], ran: child.Ran, imports: dict[str, float], rates: list[float]
) -> dict[str, Any]:
    """What a row says of the run."""
    # a merge that is stopped does not know it
    seconds = report["seconds"] | {key: report["seconds"][key] - ran.paused_seconds for key in ("wall", "computing")}
    # the mean of the times is what the run's own time is held against
    product = 1 / mean(1 / rate for rate in rates)
    flops = {step["name"]: step["flops"] for step in plan["steps"] if step["method"] == "actmat"}
    matrix_seconds = (
        sum(tensor["seconds"] for tensor in report["tensors"] if tensor["name"] in flops) - ran.paused_seconds
    )
    matrix_rate = sum(flops.values()) / matrix_seconds
    anonymous = ran.peak_anonymous_bytes - imports["RssAnon"]
    predicted = plan["predicted_seconds"]
    return {
        "elapsed_seconds": ran.elapsed_seconds,
        "paused_seconds": ran.paused_seconds,
        "cpu_seconds": ran.cpu_seconds,
        "merge_seconds": seconds["wall"],
        "matrix_flops": sum(flops.values()),
        "matrix_seconds": matrix_seconds,
        "matrix_flops_per_second": matrix_rate,
        "flops_per_cpu_second": sum(flops.values()) / ran.cpu_seconds,
        "product_flops_per_second": product,
        "all_product_flops_per_second": rates,
        "matrix_share_of_product_rate": matrix_rate / product,
        "run_share_of_product_rate": sum(flops.values()) / ran.elapsed_seconds / product,
        "seconds": seconds,
        "waiting_share": (seconds["waiting_for_input"] + seconds["waiting_for_output"]) / seconds["wall"],
        "read_bytes": report["totals"]["read_bytes"],
        "written_bytes": report["totals"]["written_bytes"],
        "budget_bytes": plan["budget_bytes"],
        "planned_bytes": plan["memory_bytes"],
        "expected_bytes": plan["expected_memory_bytes"],
        "anonymous_above_imports_bytes": anonymous,
        "peak_anonymous_bytes": ran.peak_anonymous_bytes,
        "peak_resident_bytes": ran.peak_resident_bytes,
        "memory_off": plan["expected_memory_bytes"] / anonymous - 1,
        "predicted_seconds": predicted,
        "seconds_off": None if predicted is None else predicted / seconds["wall"] - 1,
        "worst_certificate": report["worst_certificate"],
        "seconds_of_shape": _by_shape(plan, report, seconds["wall"] / report["seconds"]["wall"]),
    }


def _by_shape(plan: dict[str, Any], report: dict[str, Any], running: float) -> dict[str, dict[str, float]]:
    """Of every matrix shape: how many there are, their seconds, and FLOPs per second.

    running  the share of the merge's time in which it was not stopped
    """
    took = {tensor["name"]: tensor["seconds"] * running for tensor in report["tensors"]}
    shapes: dict[str, list[tuple[float, float]]] = {}
    for step in plan["steps"]:
        key = "x".join(map(str, step["shape"])) if step["method"] == "actmat" else step["method"]
        shapes.setdefault(key, []).append((took[step["name"]], step["flops"]))
    return {
        key: {
            "tensors": len(pairs),
            "seconds": sum(seconds for seconds, _ in pairs),
            "flops_per_second": sum(flops for _, flops in pairs) / sum(seconds for seconds, _ in pairs),
        }
        for key, pairs in shapes.items()
    }


def main() -> None:
    parser = rows.arguments(__doc__, sizes=SIZES, size="7b")
    parser.add_argument("--distinct-layers", type=int, help="layers with weights of their own, each in its turn again")
    parser.add_argument("--memory", default="4GiB", help="the budget given to the merge")
    parser.add_argument("--keep", action="store_true", help="leave the merged model in the work folder")
    given = parser.parse_args()
    distinct = given.distinct_layers or SIZES[given.size].distinct_layers
    settings = Olmo3Settings(size=given.size, distinct_layers=distinct)
    shape = settings.shape()
    models = ensure(given.work / f"olmo3-{given.size}", settings, experts=3)[:4]
    taken = measure(given, shape, models)
    facts = {
        "size": given.size,
        "method": "actmat",
        "experts": 3,
        "layers": shape.num_hidden_layers,
        "distinct_layers": distinct,
        "inputs": "all bytes are read and merged; those of layer i are layer i mod distinct_layers's, and lm_head's "
        "the embedding's",
        "files": len(shape.shards(0)),
        "parameters": sum(shape.nbytes().values()) // 2,
    }
    rows.append(given.results, "seven", facts | taken)
    lines = [
        (key.replace("_", " "), f"{taken[key]:.3f}" if taken[key] is not None else "-", f"{asked:.2f}")
        for key, asked in ASKED.items()
    ]
    print(rows.table(("share", "found", "asked"), lines))
    print(f"{taken['merge_seconds'] / 60:.1f} minutes, {rows.mib(taken['anonymous_above_imports_bytes'])} of anonymous "
          f"memory beyond imports, {rows.mib(taken['planned_bytes'])} planned")  # fmt: skip
    if taken["anonymous_above_imports_bytes"] > taken["budget_bytes"]:
        raise SystemExit("error: more than the budget")


if __name__ == "__main__":
    main()
