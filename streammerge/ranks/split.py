"""A plan's steps divided among processes by the time they are predicted to take: neighbours stay together."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Sequence
from itertools import accumulate, groupby

from streammerge.plan import Plan
from streammerge.rates import Rates, Work, load_rates
from streammerge.step import Step
from streammerge.work import work_of

# of a machine on which no merge was measured: what matters is their ratio
_NOMINAL, _NOMINAL_ON_DEVICE = Rates(1e9, 1e9, 1e11, 1e9), Rates(2e9, 1e9, 1e13, 2e9)


def rates_of(planned: Plan) -> Rates:
    """What to predict with: the rates of earlier merges here, or what is usual."""
    return load_rates(*planned.rates_keys) or (_NOMINAL if planned.device_memory is None else _NOMINAL_ON_DEVICE)


def shares(planned: Plan, done: Container[str], size: int, rates: Rates) -> list[frozenset[str]]:
    """The tensors that each of `size` processes writes; the same in all of them, as it depends on nothing else.

    done  tensors that an earlier run finished: their bytes are read and compared, which is work, too

    Each process gets steps that stand side by side in the plan, whose order is that of the base's files: it reads a run
    of each file, and two processes write to the same file only where their runs meet. Of all such divisions it is one
    whose longest share is shortest. A step, or a pool of steps, is never divided.
    """
    units = [list(steps) for _, steps in groupby(planned.steps, key=lambda step: step.pool or step.name)]
    ends = cut([_nanoseconds(planned, unit, done, rates) for unit in units], size)
    begins = [0, *ends[:-1]]
    return [
        frozenset(name for unit in units[begin:end] for step in unit for name, _, _ in step.outputs)
        for begin, end in zip(begins, ends, strict=True)
    ]


def cut(costs: Sequence[int], size: int) -> list[int]:
    """Where each of `size` runs of neighbours ends: the largest sum is as small as can be, the others near the mean.

    costs  whole numbers, none below 0
    """
    before = [0, *accumulate(costs)]
    low, high = max(costs, default=0), before[-1]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _fewest(before, middle)[0] <= size else (middle + 1, high)
    fewest = _fewest(before, low)
    ends: list[int] = []
    begin = 0
    for left in range(size, 0, -1):
        goal = before[begin] + (before[-1] - before[begin]) / left
        # the end next to the goal, of those that keep this run and the runs of all others below the bound
        most = bisect_right(before, before[begin] + low) - 1
        end = min(
            (each for each in range(begin, most + 1) if fewest[each] <= left - 1),
            key=lambda each: abs(before[each] - goal),
        )
        ends.append(end)
        begin = end
    return ends


def _fewest(before: Sequence[int], bound: int) -> list[int]:
    """From each place on, how many runs of at most `bound` there must be."""
    found = [0] * len(before)
    for begin in range(len(before) - 2, -1, -1):
        found[begin] = 1 + found[bisect_right(before, before[begin] + bound) - 1]
    return found


def _nanoseconds(planned: Plan, unit: Sequence[Step], done: Container[str], rates: Rates) -> int:
    # one step after another: what one reads beside its arithmetic does not make another's shorter
    return round(1e9 * sum(rates.seconds(_work(planned, step, done)) for step in unit))


def _work(planned: Plan, step: Step, done: Container[str]) -> Work:
    if all(name in done for name, _, _ in step.outputs):
        return Work(read_bytes=step.write_bytes, write_bytes=0, matrix_flops=0, element_bytes=0)
    return work_of([step], planned.memory, step.write_bytes, resident=planned.device_memory is not None)
