"""The deltas of one step whose inputs lie in an accelerator's memory, as stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from streammerge.delta import Delta, Deltas
from streammerge.outcome import refuse_non_finite
from streammerge.step import Step
from streammerge.streamed_deltas import compute_dtype
from streammerge_kernels.delta_pack import Packed, delta_pack
from streammerge_kernels.weighted_sum import result_dtype, weighted_sum


class DeviceDeltas(Deltas):
    """A block of a tensor, or a whole matrix [out, in]; a matrix stored [in, out] is seen transposed.

    origin   W_0 as stored: the base's run or, without a base, the first expert's
    moving   the other experts' runs, all that are not the origin; a function where they are not kept,
             which reads one again

    `non_finite` counts what `refuse_non_finite` let pass, as the recipe asked.

    Asynchronous like torch itself, but for `refuse_non_finite` and `add_squared_norms`.
    """

    def __init__(
        self,
        step: Step,
        origin: Tensor,
        moving: Sequence[Tensor] | Callable[[int], Tensor],
        *,
        first_element: int = 0,
        seed: int = 0,
        beside: Callable[[int], Tensor | None] | None = None,
    ) -> None:
        self.name = step.label
        self.first_element, self.seed, self._beside = first_element, seed, beside
        self.based = step.base is not None
        self._transposed = step.by_matrix and step.role.transposed
        self.shape = tuple(self._seen(origin).shape)
        self.whole = self.shape if step.by_matrix else step.shape
        self.dtype = compute_dtype(step)
        self.device = origin.device
        self.experts = len(step.experts)
        self.facts = {}
        self.origin = origin
        self._step, self._moving = step, moving
        self.non_finite = 0
        self._measured: dict[int, Tensor] = {}
        self._delta: Tensor | None = None

    def __iter__(self) -> Iterator[Delta]:
        for index in range(self.experts):
            yield _DeviceDelta(self, index)

    def base(self) -> Tensor:
        return self._seen(self.origin).to(self.dtype)

    def beside(self, index: int) -> Tensor | None:
        found = self._beside(index) if self._beside else None
        if found is None or self._step.by_matrix:
            return None if found is None else found.to(self.device)
        return found.to(self.device, self.dtype).view(self.shape)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def weighted_sum(self, weights: Sequence[float]) -> Tensor:
        if self._transposed or callable(self._moving) or not len(self._moving):
            return super().weighted_sum(weights)
        if result_dtype(self.origin, self._moving) != self.dtype:
            # of float32 inputs to a float64 output: the kernel knows only the inputs
            return super().weighted_sum(weights)
        self._measure_all()
        moving = range(self.experts - len(self._moving), self.experts)
        return weighted_sum(self.origin, self._moving, [weights[index] for index in moving])

    def packed(self) -> Packed | None:
        # the origin's own delta is zero, and float64 has no working format
        if self._step.base is None or self.dtype == torch.float64 or not self._step.by_matrix:
            return None
        values = self.empty(self.experts, *self.shape, dtype=torch.float16)
        base = self._seen(self.origin)
        if isinstance(self._moving, Tensor):
            packed = delta_pack(base, self._moving.mT if self._transposed else self._moving, out=values)
        else:
            packed = _joined(
                values,
                [
                    delta_pack(base, self._seen(self._stored(index))[None], out=values[index : index + 1])
                    for index in range(self.experts)
                ],
            )
        if self._step.parts:
            # the sums of columns go over all parts
            self._measure_all()
        for index, squared in enumerate(packed.column_squares.sum(1)):
            self._measured.setdefault(index, squared.sqrt().view(1))
        return packed

    def form(self, index: int, out: Tensor | None) -> Tensor:
        """Expert `index`'s delta in `out`, or in the stream's one buffer."""
        if out is None:
            if self._delta is None:
                self._delta = self.empty(*self.shape)
            out = self._delta
        if index < self.experts - self._moving_count:
            return out.zero_()
        out.copy_(self._seen(self._stored(index))).sub_(self._seen(self.origin))
        if index not in self._measured:
            # a part's rows are those of the matrix as seen: stacked ones are never transposed
            rows = [part.shape[0] for part in self._step.parts]
            parts = torch.split(out, rows) if rows else (out,)
            self._measured[index] = torch.stack([torch.linalg.vector_norm(part) for part in parts])
        return out

    def refuse_non_finite(self, names: Sequence[str], first_element: int) -> None:
        """Raise MergeError at the first NaN or infinity of the inputs; waits for the device.

        names          what messages call the step's models
        first_element  where in the flattened tensor this block begins
        """
        count = len(self._step.models)
        largest = [torch.linalg.vector_norm(run.detach(), math.inf).double() for run in self._runs()]
        for number, value in enumerate(torch.stack(largest).tolist()):
            if not math.isfinite(value):
                run = (self.origin if number == 0 else self._stored(number + self.experts - count)).cpu()
                parts = self._step.parts or (self._step,)
                rows = [part.shape[0] for part in parts] if self._step.parts else [len(run)]
                for part, values in zip(parts, torch.split(run, rows), strict=True):
                    model = names[self._step.models[number]]
                    self.non_finite += refuse_non_finite(values, part, model, first_element)

    def add_squared_norms(self, squares: list[list[float]]) -> None:
        """Add ‖W_t - W_0‖² of each delta that was formed to `squares`, by part and expert; waits for the device."""
        if self._measured:
            norms = torch.stack([norm.double() for norm in self._measured.values()]).tolist()
            for index, parts in zip(self._measured, norms, strict=True):
                for number, norm in enumerate(parts):
                    squares[number][index] += norm * norm

    @property
    def _moving_count(self) -> int:
        return len(self._step.models) - 1

    def _runs(self) -> Iterator[Tensor]:
        yield self.origin
        for index in range(self.experts - self._moving_count, self.experts):
            yield self._stored(index)

    def _stored(self, index: int) -> Tensor:
        number = index - (self.experts - self._moving_count)
        return self._moving(number) if callable(self._moving) else self._moving[number]

    def _seen(self, stored: Tensor) -> Tensor:
        return stored.mT if self._transposed else stored

    def _measure_all(self) -> None:
        for delta in self:
            if delta.index not in self._measured:
                delta.dense()


class _DeviceDelta(Delta):
    def __init__(self, deltas: DeviceDeltas, index: int) -> None:
        self.index, self.first_element = index, deltas.first_element
        self._deltas = deltas

    def dense(self, out: Tensor | None = None) -> Tensor:
        return self._deltas.form(self.index, out)


def _joined(values: Tensor, parts: Sequence[Packed]) -> Packed:
    return Packed(
        values=values,
        column_squares=torch.cat([part.column_squares for part in parts]),
        largest=torch.cat([part.largest for part in parts]),
        changed=torch.cat([part.changed for part in parts]),
        inexact=torch.cat([part.inexact for part in parts]),
        lost_squares=torch.cat([part.lost_squares for part in parts]),
    )
