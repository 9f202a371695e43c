"""GPU check: Cholesky factors, triangular solves and inverses, one at a time and several at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import torch
from gpu_run import Run, Way, relative_error
from torch import Tensor

from streammerge.solve.cholesky import LibraryCholesky

SIZES, SMALL_SIZES = (1024, 2048, 4096, 8192, 11008), (48, 96)
# right-hand rows and n: an attention matrix, a down and an up projection
SYSTEMS, SMALL_SYSTEMS = ((4096, 4096), (4096, 11008), (11008, 4096)), ((48, 64),)
BATCHES, SMALL_BATCHES = ((64, 768), (32, 1024), (16, 2048)), ((4, 32),)
SPECTRA, SMALL_SPECTRA = (2048, 4096), (48,)
STREAMS, AT_ONCE = (1, 2, 4), 8
PROBES = 32
# of the mean eigenvalue: with it a system is as a merge's default makes it, without as `exact` has it
RIDGE = 0.1
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-11}


def solver(run: Run) -> None:
    """What a merge's time goes to once its products are fast."""
    for rows, n in run.pick(SYSTEMS, SMALL_SYSTEMS):
        run.part(f"solve {rows}x{n}", _solve, rows, n, torch.float32)
    for n in run.pick(SIZES, SMALL_SIZES):
        for dtype in (torch.float32, torch.float64):
            run.part(f"cholesky n={n}", _factor, n, dtype)
    for n in run.pick(SIZES[:3], SMALL_SIZES[:1]):
        run.part(f"streams n={n}", _streams, n)
    rows, n = run.pick(SYSTEMS, SMALL_SYSTEMS)[0]
    run.part(f"solve in float64 {rows}x{n}", _solve, rows, n, torch.float64)
    for count, n in run.pick(BATCHES, SMALL_BATCHES):
        run.part(f"batch {count} of n={n}", _batch, count, n)
    for n in run.pick(SPECTRA, SMALL_SPECTRA):
        run.part(f"eigh n={n}", _spectrum, n, needs=run.pick(15.0, 2.0))


def _system(run: Run, n: int, ridge: float = RIDGE) -> Tensor:
    """A Gram in float64, of columns of different sizes, with a ridge."""
    x = run.normal(2 * n, n) * torch.logspace(0, -1.3, n, device=run.device)
    gram = x.double().mT @ x.double()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return gram


def _factor(run: Run, n: int, dtype: torch.dtype) -> None:
    exact = _system(run, n)
    matrix, probe = exact.to(dtype), run.normal(n, PROBES, dtype=torch.float64)
    image = exact @ probe

    def factor(upper: bool) -> Tensor:
        return torch.linalg.cholesky_ex(matrix, upper=upper)[0]

    def error(upper: bool) -> float:
        found = factor(upper).double()
        lower = found.mT if upper else found
        return relative_error(lower @ (lower.mT @ probe), image)

    ways = {
        name: Way(call=partial(factor, upper), error=partial(error, upper), tolerance=TOLERANCES[dtype])
        for name, upper in (("lower", False), ("upper", True))
    }
    run.compare(f"cholesky, {_name(dtype)}", ways, flops=n**3 // 3, shape=[n, n])


def _solve(run: Run, rows: int, n: int, dtype: torch.dtype) -> None:
    """X H = R in all ways there are, the engine's own two from H itself, the others from its factor."""
    wide = _system(run, n)
    wide_right = run.normal(rows, n, dtype=torch.float64)
    exact = torch.cholesky_solve(wide_right.mT, torch.linalg.cholesky_ex(wide)[0]).mT
    matrix, right = wide.to(dtype), wide_right.to(dtype)
    spare = torch.empty_like(right)
    lower = torch.linalg.cholesky_ex(matrix)[0]

    def by_triangles() -> Tensor:
        half = torch.linalg.solve_triangular(lower.mT, right, upper=True, left=False)
        return torch.linalg.solve_triangular(lower, half, upper=False, left=False)

    def by_library(by_inverse: bool) -> Tensor:
        return LibraryCholesky(matrix, by_inverse=by_inverse).solve_(spare)

    def inverse_error() -> float:
        return relative_error(right @ torch.cholesky_inverse(lower), exact)

    calls: dict[str, Callable[[], Tensor]] = {
        "two triangles": by_triangles,
        "cholesky_solve": lambda: torch.cholesky_solve(right.mT, lower).mT,
        "inverse and product": lambda: right @ torch.cholesky_inverse(lower),
        "factor, two triangles": partial(by_library, False),
        "factor, inverse and product": partial(by_library, True),
    }

    def error(call: Callable[[], Tensor]) -> float:
        spare.copy_(right)
        return relative_error(call(), exact)

    ways = {
        name: Way(
            call=call, error=partial(error, call), tolerance=TOLERANCES[dtype], prepare=lambda: spare.copy_(right)
        )
        for name, call in calls.items()
    }
    case, flops = f"solve, {_name(dtype)}", 2 * rows * n * n
    # the factor counts only where it is in the time
    for whole, baseline in ((0, "two triangles"), (n**3 // 3, "factor, two triangles")):
        these = {name: way for name, way in ways.items() if name.startswith("factor") == bool(whole)}
        run.compare(case, these, flops=flops + whole, over=baseline, wall=True, shape=[rows, n])
    alone = Way(call=lambda: torch.cholesky_inverse(lower), error=inverse_error, tolerance=TOLERANCES[dtype])
    run.compare(f"inverse, {_name(dtype)}", {"cholesky_inverse": alone}, flops=2 * n**3 // 3, shape=[n, n])


def _batch(run: Run, count: int, n: int) -> None:
    """Many small systems in one call, as a mixture of experts has them."""
    wide = torch.stack([_system(run, n) for _ in range(count)])
    matrices, probe = wide.float(), run.normal(n, PROBES, dtype=torch.float64)
    image = wide @ probe

    def error() -> float:
        lower = torch.linalg.cholesky_ex(matrices)[0].double()
        return relative_error(lower @ (lower.mT @ probe), image)

    way = Way(call=lambda: torch.linalg.cholesky_ex(matrices), error=error, tolerance=TOLERANCES[torch.float32])
    run.compare("cholesky, batch", {"cholesky_ex": way}, flops=count * n**3 // 3, shape=[count, n, n])


def _streams(run: Run, n: int) -> None:
    """Eight systems factored and solved by threads that have a stream each, as the engine does it."""
    wide = [_system(run, n) for _ in range(AT_ONCE)]
    matrices = [each.float() for each in wide]
    right = run.normal(n, n)
    exact = torch.cholesky_solve(right.double().mT, torch.linalg.cholesky_ex(wide[-1])[0]).mT
    del wide
    found: list[Tensor] = [right] * AT_ONCE

    def solve(lane: int, lanes: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if run.on_gpu else nullcontext():
            for number in range(lane, AT_ONCE, lanes):
                found[number] = LibraryCholesky(matrices[number]).solve_(right.clone())
            if run.on_gpu:
                torch.cuda.current_stream().synchronize()

    def together(threads: ThreadPoolExecutor, lanes: int) -> None:
        list(threads.map(partial(solve, lanes=lanes), range(lanes)))

    def error(call: Callable[[], None]) -> float:
        run.synchronize()
        call()
        run.synchronize()
        return relative_error(found[-1], exact)

    with ThreadPoolExecutor(max(STREAMS)) as threads:
        ways = {}
        for lanes in STREAMS:
            call = partial(together, threads, lanes)
            name = "1 stream" if lanes == 1 else f"{lanes} streams"
            ways[name] = Way(call=call, error=partial(error, call), tolerance=TOLERANCES[torch.float32])
        flops = AT_ONCE * (n**3 // 3 + 2 * n**3)
        run.compare("systems at once", ways, flops=flops, over="1 stream", wall=True, shape=[AT_ONCE, n, n])


def _spectrum(run: Run, n: int) -> None:
    matrix, probe = _system(run, n, ridge=0.0), run.normal(n, PROBES, dtype=torch.float64)

    def error() -> float:
        values, vectors = torch.linalg.eigh(matrix)
        return relative_error(vectors @ (values[:, None] * (vectors.mT @ probe)), matrix @ probe)

    way = Way(call=lambda: torch.linalg.eigh(matrix), error=error, tolerance=TOLERANCES[torch.float64])
    run.compare("eigh, float64", {"eigh": way}, wall=True, repeats=1, shape=[n, n])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
