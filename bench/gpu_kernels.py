"""GPU check: every kernel against torch's way, the vendor's product and the rate of a copy."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from gpu_machine import SHAPES, SMALL_SHAPES, full_product
from gpu_run import Run, Way, relative_error
from torch import Tensor

from streammerge_kernels.apply import Applied
from streammerge_kernels.choice import choose
from streammerge_kernels.delta_pack import SCALE, Packed, delta_pack
from streammerge_kernels.gram import add_gram_, mirror_
from streammerge_kernels.magnitude import HIGH_BINS, LOW_BINS, Cut, MagnitudeSelect
from streammerge_kernels.moment import add_moment_

EXPERTS = 3
WEIGHTS = (0.5, 0.3, 0.4)
GRAM_SIZES, SMALL_GRAM_SIZES = (1024, 2048, 4096, 8192, 11008), (80, 128)
# the longest is three experts' stacked rows
BIAS_DEPTHS, SMALL_BIAS_DEPTHS = (4096, 12288, 33024), (256,)
BIAS_SIZES, SMALL_BIAS_SIZES = (1024, 4096), (64,)
ELEMENTS, SMALL_ELEMENTS = 11008 * 4096, 3000
# float32 products and sums; the same with sums that tensor cores cut short
TOLERANCE, CUT_TOLERANCE = 1e-5, 1e-4
SAMPLED = 64
DENSITY = 0.2


def kernels(run: Run) -> None:
    """All of them, the products that decide a merge's time first."""
    for rows, columns in run.pick(SHAPES, SMALL_SHAPES):
        run.part(f"delta_pack {rows}x{columns}", _delta_pack, rows, columns)
    for n in run.pick(GRAM_SIZES, SMALL_GRAM_SIZES):
        for transposed in (False, True):
            run.part(f"gram n={n}", _gram, n, run.pick(4096, 64), transposed)
        run.part(f"mirror n={n}", _mirror, n)
    for rows, columns in run.pick(SHAPES, SMALL_SHAPES):
        run.part(f"moment {rows}x{columns}", _moment, rows, columns, rows < columns)
    for n in run.pick(BIAS_SIZES, SMALL_BIAS_SIZES):
        for depth in run.pick(BIAS_DEPTHS, SMALL_BIAS_DEPTHS):
            run.part(f"bias n={n} k={depth}", _bias, n, depth)
    for rows, columns in run.pick(SHAPES, SMALL_SHAPES):
        run.part(f"fused {rows}x{columns}", _fused, rows, columns)
    elements = run.pick(ELEMENTS, SMALL_ELEMENTS)
    for rounding in ("nearest", "stochastic"):
        run.part(f"apply {rounding}", _apply, elements, rounding)
    for function in (_weighted_sum, _elect, _magnitude, _trim, _drop):
        run.part(function.__name__.strip("_"), function, elements)


def implementations(op: str) -> dict[str, ModuleType]:
    """The reference and the twin, which is called directly: on the CPU it runs interpreted."""
    return {
        way: importlib.import_module(f"streammerge_kernels.{op}{ending}")
        for way, ending in (("torch", ""), ("triton", "_triton"))
    }


def chosen(way: str, function: Callable[[], Any]) -> Callable[[], Any]:
    """The function with every op in it from torch, from Triton, or as the table says."""

    def run() -> Any:
        with choose(way):  # type: ignore[arg-type]
            return function()

    return run


@contextmanager
def tiled(tiles: Any) -> Iterator[None]:
    """Products cut as `tiles` says, whatever their size."""
    table = importlib.import_module("streammerge_kernels.product_triton").TILES
    before = dict(table)
    table.update(dict.fromkeys(table, (tiles, tiles)))
    try:
        yield
    finally:
        table.update(before)


def tilings(run: Run) -> dict[str, Any]:
    """The table's two tilings for this device, and both without the second sum."""
    table = importlib.import_module("streammerge_kernels.product_triton").TILES
    capability = torch.cuda.get_device_capability(run.device) if run.on_gpu else (9, 0)
    narrow, wide = table[max(each for each in table if each <= capability[0] * 10 + capability[1])]
    found = {"narrow": narrow} if narrow == wide else {"narrow": narrow, "wide": wide}
    endless = {f"{name}, one sum": replace(tiles, promote=1 << 20) for name, tiles in found.items()}
    return found | endless


def with_tiles(tiles: Any, function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with tiled(tiles):
            return function()

    return run


def _delta_pack(run: Run, rows: int, columns: int) -> None:
    base, experts = run.experts("sft", rows, columns, EXPERTS)
    out = torch.empty(experts.shape, dtype=torch.float16, device=run.device)
    change = experts.float() - base.float()
    squares = change.double().square_().sum(1)
    wanted = (change * SCALE).half()

    def error(call: Callable[[], Packed]) -> float:
        out.fill_(torch.nan)
        packed = call()
        exact = (
            torch.equal(packed.values, wanted)
            and torch.equal(packed.changed, (change != 0).sum((1, 2)))
            and torch.equal(packed.inexact, (wanted.float() != change * SCALE).sum((1, 2)))
            and torch.equal(packed.largest, change.abs().amax((1, 2)))
        )
        return relative_error(packed.column_squares, squares) if exact else float("inf")

    ways = {}
    for way, module in implementations("delta_pack").items():
        call = chosen(way, partial(module.delta_pack, base, experts, out=out))
        ways[way] = Way(call=call, error=partial(error, call), tolerance=TOLERANCE)
    nbytes = base.nbytes + experts.nbytes + out.nbytes
    run.compare("delta_pack", ways, nbytes=nbytes, over="torch", shape=list(experts.shape))


def _gram(run: Run, n: int, k: int, transposed: bool) -> None:
    """XᵀX, or with `transposed` D Dᵀ for X = Dᵀ: the same work from the other layout."""
    stored = run.normal(*((n, k) if transposed else (k, n)), scale=2.0, dtype=torch.float16)
    x = stored.mT if transposed else stored
    exact = (x.double().mT @ x.double()).tril_()
    out = torch.zeros(n, n, device=run.device)

    def error(call: Callable[[], Any]) -> float:
        out.zero_()
        return relative_error(call().tril(), exact)

    modules = implementations("gram")
    calls = {"cublas": lambda: full_product(x.mT, x)}
    calls |= {way: chosen(way, partial(module.add_gram_, out, x)) for way, module in modules.items()}
    for name, tiles in tilings(run).items():
        calls[name] = with_tiles(tiles, calls["triton"])
    ways = {
        name: Way(
            call=call, error=partial(error, call), tolerance=CUT_TOLERANCE if name.endswith("one sum") else TOLERANCE
        )
        for name, call in calls.items()
    }
    # what is needed, which is half of what the vendor's product does
    flops = k * n * (n + 1)
    run.compare("gram, D Dᵀ" if transposed else "gram", ways, flops=flops, over="cublas", shape=[k, n])


def _mirror(run: Run, n: int) -> None:
    out = run.normal(n, n)
    wanted = out.tril() + out.tril(-1).mT

    def error(call: Callable[[], Tensor]) -> float:
        out.copy_(wanted.tril() + torch.full_like(out, torch.nan).triu(1))
        return 0.0 if torch.equal(call(), wanted) else float("inf")

    ways = {}
    for way, module in implementations("gram").items():
        call = chosen(way, partial(module.mirror_, out))
        ways[way] = Way(call=call, error=partial(error, call), tolerance=0.0)
    # one triangle read, the other written
    run.compare("mirror", ways, nbytes=out.nbytes, over="torch", shape=[n, n])


def _moment(run: Run, rows: int, columns: int, left: bool) -> None:
    """D (DᵀD), or with `left` (D Dᵀ) D; also in plain float32, and with the Gram rounded to one float16."""
    base, experts = run.experts("sft", rows, columns, 1)
    x = delta_pack(base, experts).values[0]
    n = rows if left else columns
    gram = mirror_(add_gram_(torch.zeros(n, n, device=run.device), x.mT if left else x))
    operands = (gram, x) if left else (x, gram)
    exact = operands[0][:SAMPLED].double() @ operands[1].double()
    out = torch.zeros(rows, columns, device=run.device)

    def error(call: Callable[[], Tensor]) -> float:
        out.zero_()
        return relative_error(call()[:SAMPLED], exact)

    scale = 2.0**14 / gram.abs().amax()
    single = ((gram * scale).half(), x) if left else (x, (gram * scale).half())
    calls = {
        "float32": lambda: out.addmm_(*(operand.float() for operand in operands)),
        "cublas, one float16": lambda: full_product(*single).div_(scale),
    }
    for way, module in implementations("moment").items():
        calls[way] = chosen(way, partial(module.add_moment_, out, x, gram, left=left))
    tolerances = {"cublas, one float16": 1e-2}
    ways = {
        name: Way(call=call, error=partial(error, call), tolerance=tolerances.get(name, TOLERANCE))
        for name, call in calls.items()
    }
    run.compare("moment, left" if left else "moment", ways, flops=2 * rows * columns * n, over="float32",
                shape=[rows, columns])  # fmt: skip


def _bias(run: Run, n: int, depth: int) -> None:
    """How much too small the sums of squares on a Gram's diagonal come out, from sums of `depth` terms."""
    x = run.normal(depth, n, scale=2.0, dtype=torch.float16)
    exact = x.double().square_().sum(0)
    modules = implementations("gram")

    def of(way: str) -> Tensor:
        return chosen(way, partial(modules[way].add_gram_, torch.zeros(n, n, device=run.device), x))()

    calls = {way: partial(of, way) for way in modules}
    calls |= {name: with_tiles(tiles, calls["triton"]) for name, tiles in tilings(run).items()}
    for way, call in calls.items():
        found = call().diagonal().double()
        error = relative_error(found, exact)
        tolerance = CUT_TOLERANCE if way.endswith("one sum") else TOLERANCE
        bias = float(((found - exact) / exact).mean())
        outcome = "green" if error <= tolerance else "red"
        run.row("bias", outcome, way=way, shape=[depth, n], bias=bias, error=error, tolerance=tolerance)


def _fused(run: Run, rows: int, columns: int) -> None:
    """Gram and moment of one expert from its stored bytes, and the same in the three steps of the engine."""
    base, experts = run.experts("sft", rows, columns, 1)
    gram, own = (torch.zeros(columns, columns, device=run.device) for _ in range(2))
    moment = torch.zeros(rows, columns, device=run.device)
    packed = torch.empty(rows, columns, dtype=torch.float16, device=run.device)
    change = ((experts[0].float() - base.float()) * SCALE).half().double()
    exact = change.mT @ change
    # of the same rows that are compared
    target = change[:SAMPLED] @ exact

    def in_steps() -> None:
        delta = delta_pack(base, experts, out=packed[None]).values[0]
        mirror_(add_gram_(own.zero_(), delta))
        gram.add_(own)
        add_moment_(moment, delta, own)

    def error(call: Callable[[], object]) -> float:
        gram.zero_(), moment.zero_(), own.fill_(torch.nan), packed.fill_(torch.nan)
        call()
        return max(relative_error(gram.tril(), exact.tril()), relative_error(moment[:SAMPLED], target))

    calls = {"steps": in_steps}
    for way, module in implementations("fused").items():
        if way == "triton":
            fused = partial(module.add_gram_and_moment_, gram, moment, base, experts[0], scratch=own, packed=packed)
            calls["fused"] = chosen("table", fused)
    ways = {name: Way(call=call, error=partial(error, call), tolerance=TOLERANCE) for name, call in calls.items()}
    flops = rows * columns * (columns + 1) + 2 * rows * columns**2
    run.compare("gram and moment from stored weights", ways, flops=flops, over="steps", shape=[rows, columns])


def _apply(run: Run, elements: int, rounding: str) -> None:
    base = run.normal(elements, scale=0.02, dtype=torch.bfloat16)
    merged = run.normal(elements, scale=5e-4)
    spare = merged.clone()
    out = torch.empty(elements, dtype=torch.bfloat16, device=run.device)
    modules = implementations("apply")
    exact = base.double() + merged.double()
    options = {"rounding": rounding, "seed": 1, "name": "w", "first_index": 0}
    calls = {way: chosen(way, partial(module.apply_, base, spare, out, **options)) for way, module in modules.items()}
    spare.copy_(merged)
    out.fill_(torch.nan)
    calls["torch"]()
    reference = out.clone()

    def error(call: Callable[[], Applied]) -> float:
        spare.copy_(merged)
        out.fill_(torch.nan)
        applied = call()
        # a step of bf16's, or half of one; the sum itself is rounded to float32 before
        step = exact.abs() * (2.0 ** (-7 if rounding == "stochastic" else -8) * (1 + 1e-5))
        right = (
            torch.equal(out, reference)
            and bool(((out.double() - exact).abs() <= step).all())
            and int(applied.changed) == int((out != base).sum())
            and int(applied.non_finite) == 0
        )
        lost = (out.double() - exact).square().sum()
        squares = merged.double().square().sum()
        off = max(
            float((applied.lost_squares - lost).abs() / lost), float((applied.merged_squares / squares - 1).abs())
        )
        return off if right else float("inf")

    ways = {
        # the reference leaves the sum in `merged`
        way: Way(call=call, error=partial(error, call), tolerance=1e-4, prepare=lambda: spare.copy_(merged))
        for way, call in calls.items()
    }
    nbytes = base.nbytes + merged.nbytes + out.nbytes
    run.compare(f"apply, {rounding}", ways, nbytes=nbytes, over="torch", shape=[elements])


def _weighted_sum(run: Run, elements: int) -> None:
    base, experts = run.experts("sft", 1, elements, EXPERTS)
    out = torch.empty(base.shape, device=run.device)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, device=run.device)
    exact = torch.einsum("t,trc->rc", weights, experts.double() - base.double())

    def error(call: Callable[[], Tensor]) -> float:
        out.fill_(torch.nan)
        return relative_error(call(), exact)

    ways = {}
    for way, module in implementations("weighted_sum").items():
        call = chosen(way, partial(module.weighted_sum, base, experts, WEIGHTS, out=out))
        ways[way] = Way(call=call, error=partial(error, call), tolerance=1e-6)
    nbytes = base.nbytes + experts.nbytes + out.nbytes
    run.compare("weighted_sum", ways, nbytes=nbytes, over="torch", shape=[EXPERTS, elements])


def _elect(run: Run, elements: int) -> None:
    deltas = run.normal(EXPERTS, elements)
    shares = torch.tensor(WEIGHTS, device=run.device)[:, None]
    products = deltas * shares
    # added in order, as signs near zero hang on it
    vote = products[0] + products[1] + products[2]
    agrees = products * torch.where(vote >= 0, 1.0, -1.0) > 0
    exact = torch.where(agrees, products, 0).double().sum(0) / torch.where(agrees, shares, 0).double().sum(0).clamp(
        1e-9
    )
    ways = {}
    for way, module in implementations("elect").items():
        call = chosen(way, partial(module.elect, deltas, WEIGHTS))
        error = partial(lambda call: relative_error(call(), exact), call)
        ways[way] = Way(call=call, error=error, tolerance=1e-6)
    nbytes = deltas.nbytes + deltas[0].nbytes
    run.compare("elect", ways, nbytes=nbytes, over="torch", shape=[EXPERTS, elements])


def _magnitude(run: Run, elements: int) -> None:
    """Both histograms from which the exact cut is read."""
    values = run.normal(elements, scale=5e-4)
    pattern = values.view(torch.int32) & 0x7FFFFFFF
    high = torch.bincount(pattern >> 16, minlength=HIGH_BINS)
    prefix = high.argmax()
    low = torch.bincount(pattern[(pattern >> 16) == prefix] & 0xFFFF, minlength=LOW_BINS)
    for name, wanted, given in (("high bits", high, None), ("low bits", low, prefix)):
        counts = torch.zeros_like(wanted)

        def error(call: Callable[[], Tensor], counts: Tensor = counts, wanted: Tensor = wanted) -> float:
            counts.zero_()
            return float((call() != wanted).sum())

        ways = {}
        for way, module in implementations("magnitude").items():
            call = chosen(way, partial(module.count_magnitudes_, counts, values, prefix=given))
            ways[way] = Way(call=call, error=partial(error, call), tolerance=0.0)
        run.compare(f"magnitudes, {name}", ways, nbytes=values.nbytes, over="torch", shape=[elements])


def _trim(run: Run, elements: int) -> None:
    keep = int(DENSITY * elements)
    original = run.normal(elements, scale=5e-4)
    select = MagnitudeSelect(keep, run.device)
    select.count(original)
    select.narrow()
    select.count(original)
    cut = select.cut
    values, ties = original.clone(), cut.ties.clone()
    exact = torch.zeros_like(original)
    largest = original.abs().topk(keep).indices
    exact[largest] = original[largest]

    def restore() -> None:
        values.copy_(original)
        ties.copy_(cut.ties)

    def error(call: Callable[[], Tensor]) -> float:
        restore()
        # of equal magnitudes either may be kept by topk
        found = call()
        same = torch.equal(found.abs().sort().values, exact.abs().sort().values)
        return 0.0 if same and int((found != 0).sum()) == keep else float("inf")

    ways = {}
    for way, module in implementations("magnitude").items():
        call = chosen(way, partial(module.trim_, values, Cut(cut.pattern, ties)))
        ways[way] = Way(call=call, error=partial(error, call), tolerance=0.0, prepare=restore)
    run.compare("trim", ways, nbytes=2 * values.nbytes, over="torch", shape=[elements])


def _drop(run: Run, elements: int) -> None:
    out = torch.empty(elements, dtype=torch.bool, device=run.device)
    options = {"density": DENSITY, "seed": 1, "name": "w", "expert": "e", "device": run.device, "out": out}
    modules = implementations("drop")
    calls = {way: chosen(way, partial(module.keep_mask, out.shape, **options)) for way, module in modules.items()}
    reference = calls["torch"]().clone()
    spread = (DENSITY * (1 - DENSITY) / elements) ** 0.5

    def error(call: Callable[[], Tensor]) -> float:
        out.zero_()
        kept = call()
        # in standard deviations of the share that is kept
        off = abs(float(kept.double().mean()) - DENSITY) / spread
        return off if torch.equal(kept, reference) else float("inf")

    ways = {way: Way(call=call, error=partial(error, call), tolerance=6.0) for way, call in calls.items()}
    run.compare("drop", ways, nbytes=out.nbytes, over="torch", shape=[elements])
