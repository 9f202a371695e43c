"""Time methods of both on three experts against mergekit, cold, in one run.

python bench/beside_mergekit.py [--method NAME …] [--repeats N]
"""

from __future__ import annotations

import math
import shutil
import sys
from functools import partial
from pathlib import Path
from statistics import median

import child
import files
import rows
import torch
from generate import Settings, ensure
from linear_io import MERGEKIT, mergekit, mergekit_command, streammerge
from safetensors import safe_open

# parameters that both take, and whether the result is drawn at random
METHODS: dict[str, tuple[dict[str, float | bool], bool]] = {
    "linear": ({"weight": 1.0}, False),
    "ties": ({"weight": 1.0, "density": 0.5, "normalize": True}, False),
    "dare_ties": ({"weight": 1.0, "density": 0.5}, True),
}
# mergekit computes in `dtype`; in bfloat16 it loses up to half of a small change
DTYPES = {"dtype": "float32", "out_dtype": "bfloat16"}
# of the change from the base, by norm: what rounding to bfloat16 leaves, and for random draws their spread
LARGEST_DIFFERENCE = 0.01


def compare(base: Path, experts: list[Path], one: Path, other: Path, method: str) -> float:
    """How far two merges are apart relative to their change: the difference's norm or, of random ones, the norms'.

    Of `ties` entries do not count whose magnitude is where an expert's trim ends: many are equal in bfloat16, and
    which of them stay is mergekit's sort's choice.
    """
    parameters, random = METHODS[method]
    models = [files.tensor_places(folder) for folder in (base, one, other, *experts)]
    if models[1].keys() != models[2].keys():
        raise SystemExit(f"error: only one output has {sorted(models[1].keys() ^ models[2].keys())}")
    apart = mine = theirs = 0.0
    for name in models[1]:
        tensors = []
        for places in models[: None if method == "ties" else 3]:
            with safe_open(places[name], "pt") as file:
                tensors.append(file.get_tensor(name).float().flatten())
        origin, x, y, *changed = tensors
        for expert in changed:
            magnitudes = (expert - origin).abs()
            kept = int(parameters["density"] * magnitudes.numel())
            at_cut = magnitudes == magnitudes.kthvalue(magnitudes.numel() - kept + 1).values
            x = torch.where(at_cut, y, x)
        apart += float((x - y).norm()) ** 2
        mine += float((x - origin).norm()) ** 2
        theirs += float((y - origin).norm()) ** 2
    return abs(math.sqrt(mine / theirs) - 1) if random else math.sqrt(apart / theirs)


def main() -> None:
    parser = rows.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--method", choices=METHODS, action="append", help="all three without")
    given = parser.parse_args()
    base, *experts = ensure(given.work / given.size, Settings(size=given.size), experts=3)[:4]
    inputs = files.weight_files([base, *experts])
    command = mergekit_command(given.work)
    lines, red = [], []
    for method in given.method or METHODS:
        parameters, _ = METHODS[method]
        # with a weight for all, mergekit would merge the base too
        origin = None if method == "linear" else base
        recipe = child.write_recipe(given.work / f"{method}.yaml", method, experts, origin, parameters, **DTYPES)
        ways = {
            "streammerge": partial(streammerge, recipe),
            "mergekit": partial(mergekit, command, ("--async-write", "--out-shard-size", "500M"), recipe),
        }
        outs = {name: given.work / f"{method}-{name}" for name in ways}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        difference = 0.0
        for repeat in range(given.repeats):
            for name, way in ways.items():
                shutil.rmtree(outs[name], ignore_errors=True)
                files.make_cold(inputs)
                found[name].append(way(outs[name]))
                print(
                    f"{repeat + 1}/{given.repeats} {method} by {name}: {found[name][-1]['seconds']:.1f} s",
                    file=sys.stderr,
                )
            if repeat == 0:
                difference = compare(base, experts, *outs.values(), method)
                print(f"{method}: {difference:.2g} apart", file=sys.stderr)
        for out in outs.values():
            shutil.rmtree(out, ignore_errors=True)
        middle = {name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
        green = difference <= LARGEST_DIFFERENCE
        red += [] if green else [method]
        for name, facts in middle.items():
            ratio = {"seconds_over_streammerge": facts["seconds"] / middle["streammerge"]["seconds"]} if green else {}
            row = {"size": given.size, "method": method, "way": name, "mergekit": MERGEKIT, **facts, **ratio}
            rows.append(given.results, "beside_mergekit", {**row, "difference": difference, "repeats": given.repeats})
            lines.append(
                (f"{method} by {name}", f"{facts['seconds']:.1f}", f"{facts['cpu_seconds']:.1f}",
                 f"{ratio['seconds_over_streammerge']:.2f}" if green else "differs",
                 rows.mib(facts["peak_anonymous_bytes"]))
            )  # fmt: skip
    files.make_cold(inputs)
    print(rows.table(("three experts", "seconds", "CPU seconds", "over streammerge", "anonymous memory"), lines))
    if red:
        raise SystemExit(
            f"error: outputs of {', '.join(red)} are further apart than {LARGEST_DIFFERENCE:.0%} of the change"
        )


if __name__ == "__main__":
    main()
