"""Merged weights on their way to the writer, stored in 8-bit floats again: bands of rows to codes and scales."""

from __future__ import annotations

import math
import queue
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from streammerge.fp8 import CODE_BUFFERS, Scheme
from streammerge.outcome import Block, Outcome
from streammerge.plan import Plan
from streammerge.readahead import bytes_of
from streammerge.torch_dtypes import TORCH_DTYPES

_Buffers = queue.SimpleQueue[Tensor]


def quantised(plan: Plan, blocks: Iterable[Block]) -> Iterator[Block]:
    """The blocks, those of steps with a `scheme` as codes, each tensor's scales just before its last codes.

    A block of codes has the scale max |w| / (largest code), rounded to the scales' dtype, or up to a power of two; each
    code is the nearest to its weight over the scale. The report's `quantization_loss` of a tensor is the norm of what
    its codes lose over the norm of its weights.
    """
    schemes = {step.name: step.scheme for step in plan.steps if step.scheme}
    largest = max((scheme.band_elements for scheme in schemes.values()), default=0)
    buffers: _Buffers = queue.SimpleQueue()
    for _ in range(CODE_BUFFERS if schemes else 0):
        buffers.put(torch.empty(largest, dtype=torch.uint8))
    tensor: _Tensor | None = None
    for block in blocks:
        scheme = schemes.get(block.name)
        if scheme is None:
            yield block
            continue
        if block.offset == 0:
            tensor = _Tensor(scheme, buffers)
        assert tensor is not None, f"{block.name} does not begin at its first byte"
        yield from tensor.take(block)


class _Tensor:
    """One tensor, gathered band by band."""

    def __init__(self, scheme: Scheme, buffers: _Buffers) -> None:
        self._scheme, self._buffers = scheme, buffers
        self._width = scheme.codes.shape[-1] if scheme.codes.shape else 1
        self._band = torch.empty(scheme.band_elements)
        self._filled = self._done = 0
        self._scales: list[Tensor] = []
        self._lost = self._whole = 0.0

    def take(self, block: Block) -> Iterator[Block]:
        """What a block of float32 completes: bands of codes and, at the end, the scales."""
        merged = torch.frombuffer(block.data, dtype=torch.float32)
        while merged.numel():
            run = merged[: self._band.numel() - self._filled]
            self._band[self._filled : self._filled + run.numel()] = run
            self._filled += run.numel()
            merged = merged[run.numel() :]
            last = self._done + self._filled == self._scheme.codes.elements
            if last:
                codes = self._codes(block.name)
                yield self._all_scales()
                if block.outcome is not None:
                    loss = math.sqrt(self._lost / self._whole) if self._whole else 0.0
                    block.outcome.facts["quantization_loss"] = loss
                codes.outcome = block.outcome
                yield codes
            elif self._filled == self._band.numel():
                yield self._codes(block.name)
        block.release()

    def _codes(self, name: str) -> Block:
        dtype = TORCH_DTYPES[self._scheme.codes.dtype]
        values = self._band[: self._filled].view(-1, self._width)
        buffer = self._buffers.get()
        codes = buffer[: self._filled].view(dtype).view(values.shape)
        scales = scales_of(values, self._scheme)
        self._scales.append(scales)
        spread = _spread(scales, self._scheme, self._width)
        limit = torch.finfo(dtype).max
        meant = torch.div(values, spread).clamp_(-limit, limit)
        codes.copy_(meant)
        meant.copy_(codes).mul_(spread).sub_(values)
        self._lost += _squares(meant)
        self._whole += _squares(values)
        first, self._done, self._filled = self._done, self._done + self._filled, 0
        return Block(name, first, bytes_of(buffer)[: values.numel()], lambda: self._buffers.put(buffer))

    def _all_scales(self) -> Block:
        entry = self._scheme.scales
        stored = torch.cat([scales.reshape(-1) for scales in self._scales]).to(TORCH_DTYPES[entry.dtype])
        data = bytes_of(stored.view(torch.uint8))
        return Block(entry.name, 0, data, lambda: None, Outcome(entry.name, "quantize"))


def scales_of(values: Tensor, scheme: Scheme) -> Tensor:
    """The scales of a band.

    values   [rows, width] float32: the rows of one block, or rows that have a scale each
    Returns [blocks down, blocks across] float32, each a number that the scales' dtype holds.
    """
    blocks = values.abs()
    if scheme.rows > 1:
        blocks = blocks.amax(0, keepdim=True)
    across = -(-values.shape[1] // scheme.columns)
    if across > 1:
        blocks = torch.nn.functional.pad(blocks, (0, across * scheme.columns - values.shape[1]))
    largest = blocks.view(len(blocks), across, -1).amax(2)
    scales = largest / torch.finfo(TORCH_DTYPES[scheme.codes.dtype]).max
    dtype = TORCH_DTYPES[scheme.scales.dtype]
    if scheme.power_of_two:
        fraction, exponent = torch.frexp(scales)
        # a power of two has the fraction 1/2
        scales = torch.ldexp(torch.ones_like(scales), exponent - (fraction == 0.5).to(exponent.dtype))
    least = torch.finfo(dtype).tiny
    return torch.where(largest > 0, scales, 1.0).to(dtype).float().clamp_(min=least)


def _spread(scales: Tensor, scheme: Scheme, width: int) -> Tensor:
    return scales if scales.shape[1] == 1 else scales.repeat_interleave(scheme.columns, dim=1)[:, :width]


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
