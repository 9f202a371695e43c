"""GPU check: the seven matrices of a 7B model's layer, three experts, by `actmat` as the engine calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import truth
from gpu_kernels import chosen
from gpu_machine import SHAPES
from gpu_run import Run, Way, relative_error
from torch import Tensor

from streammerge import methods
from streammerge.checkpoint import TensorEntry
from streammerge.device_deltas import DeviceDeltas
from streammerge.methods.actmat import actmat
from streammerge.rules import Role, TensorClass
from streammerge.solve import cholesky
from streammerge.step import Step

EXPERTS = 3
SMALL_SHAPES = ((64, 64), (176, 64), (64, 176))
# of one layer: attention, gate and up, down
COUNTS = (4, 2, 1)
# where the solvers without a ridge, which may take float64 and a spectrum, are compared too
MODEST, SMALL_MODEST = (1024, 1024), (64, 64)
LANES = (1, 2, 4)
# what the engine trusts: a certificate is within a factor of two of the true error
TRUSTED = 5e-4


def layer(run: Run) -> None:
    """One matrix of each shape against float64 and in every way, then a layer's matrices in a row and at once."""
    for kind in ("sft", "rl"):
        for shape in run.pick(SHAPES, SMALL_SHAPES):
            run.part(f"{kind} {shape[0]}x{shape[1]}", _matrix, kind, shape, "ridge")
    run.part("layer", _whole)
    for solver in ("exact", "pinv"):
        run.part(f"{solver}", _matrix, "sft", run.pick(MODEST, SMALL_MODEST), solver)
    run.part("exact", _matrix, "sft", run.pick(SHAPES, SMALL_SHAPES)[0], "exact", needs=10.0)


def step_of(shape: tuple[int, int], solver: str) -> Step:
    """The plan's step for a bf16 matrix."""
    nbytes = 2 * shape[0] * shape[1]
    entry = TensorEntry(name="w", dtype="BF16", shape=shape, file="", offset=0, nbytes=nbytes)
    arguments = {"solver": solver, "ridge": truth.RIDGE}
    cost = methods.describe("actmat").cost(shape, EXPERTS, arguments, 4)
    return Step(
        name="w",
        role=Role(TensorClass.MATRIX),
        method="actmat",
        arguments=arguments,
        base=entry,
        experts=(entry,) * EXPERTS,
        models=tuple(range(EXPERTS + 1)),
        dtype="BF16",
        by_matrix=True,
        passes=cost.passes,
        flops=cost.flops,
        workspace_bytes=cost.workspace_bytes,
        device_bytes=cost.workspace_bytes if cost.device_bytes is None else cost.device_bytes,
    )


def merged(step: Step, base: Tensor, experts: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The merged change, and what the method noted."""
    deltas = DeviceDeltas(step, base, experts)
    found = actmat(deltas, **step.arguments)
    return found, deltas.facts


@contextmanager
def inverted(smallest: int) -> Iterator[None]:
    """Systems of this size and more solved by their inverse."""
    before, cholesky.INVERSE_FROM = cholesky.INVERSE_FROM, smallest
    try:
        yield
    finally:
        cholesky.INVERSE_FROM = before


def _by_inverse(function: Callable[[], Any]) -> Any:
    with inverted(0):
        return function()


def _by_triangles(function: Callable[[], Any]) -> Any:
    with inverted(1 << 62):
        return function()


def _ways(function: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """As it runs by default, with all ops from one side, and with either solve."""
    return {
        "default": function,
        "torch": chosen("torch", function),
        "triton": chosen("triton", function),
        "triangles": partial(_by_triangles, function),
        "inverse": partial(_by_inverse, function),
    }


def _matrix(run: Run, kind: str, shape: tuple[int, int], solver: truth.Solver) -> None:
    base, experts = run.experts(kind, *shape, EXPERTS)
    # float64's own temporaries are made where the deltas are
    with run.device:
        exact = truth.formula64(solver, truth.deltas64(base, list(experts)))
    step = step_of(shape, solver)
    facts: dict[str, Any] = {}

    def error(call: Callable[[], tuple[Tensor, dict[str, Any]]]) -> float:
        found, noted = call()
        facts.update(noted)
        return relative_error(found, exact)

    calls = _ways(partial(merged, step, base, experts))
    ways = {
        name: Way(call=call, error=partial(error, call), tolerance=truth.TOLERANCES[solver])
        for name, call in calls.items()
    }
    case = f"actmat, {solver}, {kind}"
    run.compare(case, ways, flops=step.flops, over="default", wall=True, shape=[EXPERTS, *shape])
    taken = _peak_bytes(run, calls["default"])
    outcome = "red" if taken > step.device_bytes else "green"
    run.row(
        f"{case}: memory", outcome, shape=[EXPERTS, *shape], taken_bytes=taken, planned_bytes=step.device_bytes,
        noted=facts,
    )  # fmt: skip


def _peak_bytes(run: Run, call: Callable[[], object]) -> int:
    """The most that a call takes beyond its inputs; nothing is known of it on the CPU."""
    if not run.on_gpu:
        call()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _whole(run: Run) -> None:
    shapes = [s for s, count in zip(run.pick(SHAPES, SMALL_SHAPES), COUNTS, strict=True) for _ in range(count)]
    inputs = [(step_of(shape, "ridge"), *run.experts("sft", *shape, EXPERTS)) for shape in shapes]
    noted: list[dict[str, Any]] = [{} for _ in inputs]

    def lane(first: int, lanes: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if run.on_gpu else nullcontext():
            for number in range(first, len(inputs), lanes):
                noted[number] = merged(*inputs[number])[1]
            if run.on_gpu:
                torch.cuda.current_stream().synchronize()

    def together(threads: ThreadPoolExecutor, lanes: int) -> None:
        list(threads.map(partial(lane, lanes=lanes), range(lanes)))

    def error(call: Callable[[], object]) -> float:
        run.synchronize()
        call()
        return max(float(each["certificate"]) for each in noted)

    flops = sum(step.flops for step, _, _ in inputs)
    with ThreadPoolExecutor(max(LANES)) as threads:
        for name, way in (("triangles", _by_triangles), ("inverse", _by_inverse)):
            calls = {f"{lanes} at once": partial(way, partial(together, threads, lanes)) for lanes in LANES}
            ways = {each: Way(call=call, error=partial(error, call), tolerance=TRUSTED) for each, call in calls.items()}
            run.compare(
                f"layer, {name}", ways, flops=flops, over="1 at once", wall=True, repeats=None if run.small else 5,
                matrices=len(inputs),
            )  # fmt: skip
