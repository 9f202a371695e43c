"""One section of the GPU check under way: its rows, its time limit, its device's clock and random data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import gpu_rows
import torch
from torch import Tensor

# several times the L2 cache of any card; written between two runs, so that none finds its operands there
_FLUSH_BYTES = 256 << 20
# keeps the device busy while the host queues what is timed, about a millisecond: small launches leave no gaps then
_SLEEP_CYCLES = 2_000_000
_TIMED_SECONDS = 0.15
_FEWEST, _MOST = 3, 20
COPY_BYTES = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to compute something.

    call       what is timed
    error      computes it once and says how far off it is; runs first
    tolerance  the most that `error` may be: above it nothing is timed
    prepare    runs before each call, outside the clock: restores what `call` overwrites
    """

    call: Callable[[], object]
    error: Callable[[], float]
    tolerance: float
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Median and all times; `queued_seconds` is how long the host was busy with one call."""

    seconds: float
    every: list[float]
    queued_seconds: float


class Run:
    """What a section is given.

    results  the folder of gpu.jsonl, one row a line, each written out as it comes
    shared   a folder in memory, if the machine has one, that is deleted afterwards
    work     a folder on disk that is deleted afterwards
    """

    def __init__(
        self,
        section: str,
        *,
        results: Path,
        run: str,
        device: str,
        small: bool,
        seconds: float,
        shared: Path,
        work: Path,
    ) -> None:
        self.section, self.results, self.small = section, results, small
        self.shared, self.work = shared, work
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.red = False
        self._run, self._began, self._seconds = run, time.perf_counter(), seconds
        if self.on_gpu:
            torch.cuda.init()
            self.device = torch.device("cuda", self.device.index or 0)
            torch.cuda.set_device(self.device)
        torch.set_float32_matmul_precision("highest")
        self.generator = torch.Generator(self.device).manual_seed(0)

    @property
    def left_seconds(self) -> float:
        """Time until the section should have ended."""
        return self._seconds - (time.perf_counter() - self._began)

    def pick(self, full: object, small: object) -> object:
        """The sizes to measure at: `small` tries the script out."""
        return small if self.small else full

    def row(self, case: str, outcome: str, **facts: object) -> None:
        """Append one row: green, red, or skipped for want of time."""
        self.red |= outcome == "red"
        shared = {"device": self.device_name, "small": self.small}
        gpu_rows.append(self.results, self._run, self.section, case, outcome, **shared, **facts)

    @cached_property
    def device_name(self) -> str:
        """What rows call the device."""
        return torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"

    def part(self, case: str, function: Callable[..., object], *arguments: object, needs: float = 2.0) -> None:
        """Run a part whose failure, or the lack of `needs` seconds for it, is a row and stops no other part."""
        if self.left_seconds < needs:
            self.row(case, "skipped", error=f"{self.left_seconds:.0f} s left, {needs:.0f} s needed")
            return
        with self._caught(case):
            function(self, *arguments)
        if self.on_gpu:
            torch.cuda.empty_cache()

    def compare(
        self,
        case: str,
        ways: Mapping[str, Way],
        *,
        nbytes: int = 0,
        flops: int = 0,
        over: str | None = None,
        wall: bool = False,
        repeats: int | None = None,
        **facts: object,
    ) -> dict[str, Timing]:
        """Check each way, time those that are right, and append a row for each.

        nbytes   least bytes through device memory: also written as a share of the copy's rate
        flops    operations of the result, however many a way takes
        over     the way that the others' speed is compared with; it comes first
        wall     by the host's clock, for ways that wait for the device
        repeats  how often each is timed, instead of as often as a fraction of a second allows
        """
        taken: dict[str, Timing] = {}
        for name, way in ways.items():
            if self.left_seconds < 2.0:
                self.row(case, "skipped", way=name, **facts)
                continue
            with self._caught(case, way=name, **facts):
                error = way.error()
                if not error <= way.tolerance:
                    self.row(case, "red", way=name, error=error, tolerance=way.tolerance, **facts)
                    continue
                timing = taken[name] = self.seconds_of(way.call, prepare=way.prepare, wall=wall, repeats=repeats)
                figures: dict[str, object] = {"seconds": timing.seconds}
                if nbytes:
                    rate = nbytes / timing.seconds / 1e9
                    # what the host waits for is no question of the device's memory
                    figures |= {"gb_per_s": rate} | ({} if wall else {"share_of_copy": rate / self.copy_gb_per_s})
                if flops:
                    figures["tflop_per_s"] = flops / timing.seconds / 1e12
                if over in taken:
                    figures[f"times_{over}"] = taken[over].seconds / timing.seconds
                figures |= {"queued_seconds": timing.queued_seconds, "all_seconds": timing.every}
                self.row(case, "green", way=name, error=error, tolerance=way.tolerance, **figures, **facts)
        return taken

    def seconds_of(
        self,
        call: Callable[[], object],
        *,
        prepare: Callable[[], object] | None = None,
        wall: bool = False,
        repeats: int | None = None,
    ) -> Timing:
        """Time a call that has run before: once to warm up, then several times from a cold L2 cache."""
        estimate, queued = self._once(call, prepare, wall)
        if repeats is None:
            repeats = 2 if self.small else min(max(int(_TIMED_SECONDS / max(estimate, 1e-6)), _FEWEST), _MOST)
        if estimate > 1.0:
            # long enough to need no second look
            return Timing(seconds=estimate, every=[estimate], queued_seconds=queued)
        every = [self._once(call, prepare, wall) for _ in range(repeats)]
        seconds = [taken for taken, _ in every]
        return Timing(seconds=median(seconds), every=seconds, queued_seconds=median(queued for _, queued in every))

    def _once(
        self, call: Callable[[], object], prepare: Callable[[], object] | None, wall: bool
    ) -> tuple[float, float]:
        if prepare:
            prepare()
        if not self.on_gpu:
            began = time.perf_counter()
            call()
            taken = time.perf_counter() - began
            return taken, taken
        self._flush.zero_()
        if wall:
            torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            queued = time.perf_counter() - began
            torch.cuda.synchronize()
            return time.perf_counter() - began, queued
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_SLEEP_CYCLES)
        start.record()
        began = time.perf_counter()
        call()
        queued = time.perf_counter() - began
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, queued

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    @cached_property
    def copy_gb_per_s(self) -> float:
        """The device's memory rate: bytes read and written by a copy, in 1e9 bytes a second."""
        source = self.normal((COPY_BYTES if not self.small else 1 << 20) // 2, dtype=torch.bfloat16)
        target = torch.full_like(source, math.nan)
        target.copy_(source)
        assert torch.equal(source, target), "a copy differs from what was copied"
        return 2 * source.nbytes / self.seconds_of(lambda: target.copy_(source)).seconds / 1e9

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """New normal numbers on the device; no two calls give the same."""
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.mul_(scale).to(dtype)

    def experts(self, kind: str, rows: int, columns: int, count: int = 3) -> tuple[Tensor, Tensor]:
        """A bf16 base [rows, columns] and experts [count, rows, columns], changed as training changes them.

        sft  every entry, columns up to twenty times as much as others; rl  a tenth of the entries, and little
        """
        base = self.normal(rows, columns, scale=0.02, dtype=torch.bfloat16)
        stack = torch.empty(count, rows, columns, dtype=torch.bfloat16, device=self.device)
        for expert in stack:
            change = self.normal(rows, columns, scale=5e-4 if kind == "sft" else 2e-4)
            if kind == "sft":
                order = torch.randperm(columns, generator=self.generator, device=self.device)
                change *= torch.logspace(0, -1.3, columns, device=self.device)[order]
            else:
                change *= torch.rand(change.shape, generator=self.generator, device=self.device) < 0.1
            expert.copy_(change.add_(base))
        return base, stack

    @cached_property
    def _flush(self) -> Tensor:
        return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    @contextmanager
    def _caught(self, case: str, **facts: object) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it becomes a row
            self.row(case, "red", error=gpu_rows.told(error), **facts)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth|| in float64, on the device."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())
