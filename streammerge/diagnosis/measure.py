"""One tensor's findings, block by block: sums that come out the same however the tensor was cut."""

from __future__ import annotations

import math
from concurrent.futures import Executor

import torch
from torch import Tensor

from streammerge.delta import Delta
from streammerge.diagnosis.result import Findings, pairs
from streammerge.diagnosis.sketch import RowSketches, sketched
from streammerge.rules import TensorClass
from streammerge.solve.panels import GramSums
from streammerge.step import Step
from streammerge.streamed_deltas import ElementDeltas, compute_dtype
from streammerge.torch_dtypes import TORCH_DTYPES


class TensorMeasure:
    """What is summed of a tensor; the last of the step's models may be finished merges, `merged` of them."""

    def __init__(self, step: Step, *, merged: int, seed: int) -> None:
        self._step, self._models, self._experts = step, len(step.experts), len(step.experts) - merged
        self._dtype = TORCH_DTYPES[step.dtype]
        self._grams = GramSums()
        self._zeros, self._lost = [0] * self._models, [0] * self._models
        self._mean_changed = self._mean_lost = 0
        self._sketches = (
            RowSketches(
                step.name, (step.shape[0], step.shape[1]), self._models,
                transposed=step.role.transposed, seed=seed, dtype=compute_dtype(step),
            )
            if is_matrix(step)
            else None
        )  # fmt: skip

    def add(self, deltas: ElementDeltas, workers: Executor) -> None:
        """See the next block."""
        base = deltas.base().view(-1)

        def count(delta: Delta, change: Tensor) -> tuple[int, int]:
            first = delta.first_element - deltas.first_element
            own = base[first : first + change.numel()]
            return change.numel() - int(torch.count_nonzero(change)), self._vanishing(own, change.view(-1))

        changes, counts = deltas.each(count)
        for index, pieces in enumerate(counts):
            self._zeros[index] += sum(zeros for zeros, _ in pieces)
            self._lost[index] += sum(lost for _, lost in pieces)
        mean = deltas.zeros(*deltas.shape)
        for change in changes[: self._experts]:
            mean.add_(change)
        mean.div_(self._experts)
        self._mean_changed += int(torch.count_nonzero(mean))
        self._mean_lost += self._vanishing(base, mean.view(-1))
        self._grams.add([base, *(change.view(-1) for change in changes[: self._experts])])
        if self._sketches:
            self._sketches.add(changes, workers)

    def finish(self, workers: Executor) -> Findings:
        """The findings, after the last block."""
        step, experts = self._step, self._experts
        gram = self._grams.finish(step.name)
        squared = [gram[t + 1, t + 1].item() for t in range(experts)]
        matrix = None
        if self._sketches:
            matrix = sketched(self._sketches.finish(workers), squared, self._sketches.rows, experts)
        return Findings(
            name=step.name,
            kind=step.role.kind.value,
            shape=step.shape,
            dtype=step.dtype,
            base_norm=math.sqrt(gram[0, 0].item()),
            expert_norms=tuple(math.sqrt(each) for each in squared),
            cosines=tuple(_cosine(gram[s + 1, t + 1].item(), squared[s], squared[t]) for s, t in pairs(experts)),
            zeros=tuple(zeros / step.elements for zeros in self._zeros[:experts]),
            below_half_ulp=tuple(
                lost / max(step.elements - zeros, 1)
                for zeros, lost in zip(self._zeros[:experts], self._lost, strict=False)
            ),
            mean_lost=self._mean_lost / max(self._mean_changed, 1),
            matrix=matrix,
        )

    def _vanishing(self, base: Tensor, change: Tensor) -> int:
        """Changed entries for which base + change is the base again in the output's dtype."""
        same = (base + change).to(self._dtype) == base.to(self._dtype)
        return int(torch.count_nonzero(same & (change != 0)))


def is_matrix(step: Step) -> bool:
    """Whether a step's tensor is the weight of a linear layer."""
    return step.role.kind in (TensorClass.MATRIX, TensorClass.ROUTER) and len(step.shape) == 2


def _cosine(product: float, first: float, second: float) -> float | None:
    size = math.sqrt(first) * math.sqrt(second)
    return min(max(product / size, -1.0), 1.0) if size else None
