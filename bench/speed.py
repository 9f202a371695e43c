"""Time one 2048 x 2048 matrix of three experts: the paper's code against streammerge's actmat, and its Gram.

python bench/speed.py
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import nullcontext
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
from streammerge.solve.cost import normal_equations
from streammerge.workspace import Workspace
from streammerge_kernels.gram import add_gram_, mirror_
from streammerge_kernels.matmul import fast_matmul

TENSOR = "model.layers.0.self_attn.q_proj.weight"
GRAM_TOLERANCE = 1e-5

Way = Callable[[], Tensor]


def main() -> None:
    parser = rows.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    models = ensure(given.work / given.size, Settings(size=given.size), experts=3)[:4]
    base, *experts = (files.read_tensor(model, TENSOR) for model in models)
    merges(given, base, experts)
    grams(given, experts[0].float() - base.float())


def merges(given: Namespace, base: Tensor, experts: list[Tensor]) -> None:
    """The whole merge of one matrix, from bf16 weights to the merged change."""
    deltas = truth.deltas64(base, experts)
    ways: dict[str, Way] = {"paper": partial(truth.paper32, base, experts)}
    errors = {"paper": truth.relative_error(ways["paper"](), truth.formula64("pinv", deltas))}
    # one workspace for all runs, as a streamed merge has one for all matrices
    shape = (base.shape[0], base.shape[1])
    needed = max(normal_equations(shape, 3, {"solver": solver}, 4).workspace_bytes for solver in truth.SOLVERS)
    workspace = Workspace(needed)
    for solver in truth.SOLVERS:
        ways[solver] = partial(_actmat, base, experts, solver, workspace)
        errors[solver] = truth.relative_error(ways[solver](), truth.formula64(solver, deltas))
        refuse(solver, errors[solver], truth.TOLERANCES[solver])
    lines = []
    for name, (seconds, every) in timed(ways, given.repeats).items():
        if name == "paper":
            paper = seconds
        facts = {"part": "merge", "experts": len(experts), "speed_up": paper / seconds, "relative_error": errors[name]}
        record(given, base, name, seconds, every, facts)
        lines.append((name, f"{1000 * seconds:.1f} ms", f"{paper / seconds:.1f}", f"{errors[name]:.1e}"))
    print(rows.table(("actmat", "median", "speed-up", "error against float64"), lines))


def grams(given: Namespace, delta: Tensor) -> None:
    """DᵀD as half of a product, against the whole product, in torch's two matrix libraries."""
    truth64 = delta.T.double() @ delta.double()
    out = torch.empty(len(truth64), len(truth64))
    ways: dict[str, Way] = {}
    for mode in ("default", "fast"):
        ways[f"product, {mode}"] = partial(_in_mode, mode, lambda: torch.mm(delta.T, delta, out=out))
        ways[f"half, {mode}"] = partial(_in_mode, mode, lambda: add_gram_(out.zero_(), delta))
        ways[f"half and mirror, {mode}"] = partial(_in_mode, mode, lambda: mirror_(add_gram_(out.zero_(), delta)))
    for name, way in ways.items():
        found, wanted = way(), truth64
        if name.startswith("half,"):
            found, wanted = found.tril(), wanted.tril()
        refuse(name, truth.relative_error(found, wanted), GRAM_TOLERANCE)
    taken = timed(ways, 3 * given.repeats)
    lines = []
    for name, (seconds, every) in taken.items():
        mode = name.rpartition(" ")[2]
        gflops = 2 * delta.shape[0] * delta.shape[1] ** 2 / seconds / 1e9
        over = {m: taken[f"product, {m}"][0] / seconds for m in (mode, "default")}
        facts = {"part": "gram", "full_product_gflops": gflops, "over_same_mode": over[mode]}
        record(given, delta, name, seconds, every, facts | {"over_default_mode": over["default"]})
        ratios = (f"{over[mode]:.2f}", f"{over['default']:.2f}")
        lines.append((name, f"{1000 * seconds:.1f} ms", f"{gflops:.0f}", *ratios))
    print("\n" + rows.table(("gram", "median", "GFLOP/s of a product", "over its mode", "over default"), lines))


def timed(ways: Mapping[str, Way], repeats: int) -> dict[str, tuple[float, list[float]]]:
    """Median and all times in seconds; the ways alternate. Each has run before."""
    every: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            every[name].append(time.perf_counter() - began)
    return {name: (median(times), times) for name, times in every.items()}


def refuse(name: str, error: float, tolerance: float) -> None:
    """No times for a result that is wrong."""
    if not error <= tolerance:
        raise SystemExit(f"error: {name} is {error:.1e} off float64, more than {tolerance:.0e}; nothing is timed")


def record(
    given: Namespace, tensor: Tensor, way: str, seconds: float, every: list[float], facts: Mapping[str, object]
) -> None:
    """Append one way's row."""
    shared = {"size": given.size, "shape": list(tensor.shape), "threads": torch.get_num_threads(), "way": way}
    rows.append(given.results, "speed", shared | {"seconds": seconds} | dict(facts) | {"all_seconds": every})


def _actmat(base: Tensor, experts: list[Tensor], solver: truth.Solver, workspace: Workspace) -> Tensor:
    workspace.reset()
    return actmat(TensorDeltas(base, experts, workspace=workspace), solver=solver)


def _in_mode(mode: str, way: Way) -> Tensor:
    with fast_matmul() if mode == "fast" else nullcontext():
        return way()


if __name__ == "__main__":
    main()
