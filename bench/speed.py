"""Time one 2048 x 2048 matrix of three experts: the paper's formula against streammerge's actmat.

python bench/speed.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import files
import rows
import torch
import truth
from generate import Settings, ensure
from torch import Tensor

from streammerge.delta import TensorDeltas
from streammerge.methods.actmat import actmat

TENSOR = "model.layers.0.self_attn.q_proj.weight"


def seconds_of(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = rows.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    models = ensure(given.work / given.size, Settings(size=given.size), experts=3)[:4]
    base, *experts = (files.read_tensor(model, TENSOR) for model in models)
    ways: dict[str, Callable[[], Tensor]] = {"paper": partial(truth.paper32, base, experts)}
    for regulariser in truth.REGULARISERS:
        ways[regulariser] = partial(actmat_once, base, experts, regulariser)
    errors = check(ways, base, experts)
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.repeats):
        for name, way in ways.items():
            spent[name].append(seconds_of(way))
    middle = {name: median(times) for name, times in spent.items()}
    lines = []
    for name, seconds in middle.items():
        facts = {
            "size": given.size,
            "shape": list(base.shape),
            "experts": len(experts),
            "threads": torch.get_num_threads(),
            "way": name,
            "seconds": seconds,
            "speed_up": middle["paper"] / seconds,
            "relative_error": errors[name],
            "all_seconds": spent[name],
        }
        rows.append(given.results, "speed", facts)
        lines.append((name, f"{1000 * seconds:.0f} ms", f"{facts['speed_up']:.1f}", f"{errors[name]:.1e}"))
    print(rows.table(("actmat", "median", "speed-up", "error against float64"), lines))


def actmat_once(base: Tensor, experts: list[Tensor], regulariser: str) -> Tensor:
    """streammerge's method on tensors in memory."""
    merged: Tensor = actmat(TensorDeltas(base, experts), regulariser=regulariser)
    return merged


def check(ways: dict[str, Callable[[], Tensor]], base: Tensor, experts: list[Tensor]) -> dict[str, float]:
    """Each way's error against its own formula in float64; no times without it. This run also warms up."""
    deltas = truth.deltas64(base, experts)
    errors = {}
    for name, way in ways.items():
        formula = "pinv" if name == "paper" else name
        errors[name] = truth.relative_error(way(), truth.formula64(formula, deltas))
        if errors[name] > truth.TOLERANCES[formula] and name != "paper":
            print(
                f"error: {name} is {errors[name]:.1e} off in float64; no speed-up is printed", file=sys.stderr
            )
            raise SystemExit(1)
    return errors


if __name__ == "__main__":
    main()
