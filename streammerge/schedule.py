"""In which order a plan's bytes are read: for looks at the whole model first, then step by step."""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import groupby

from streammerge.memory import block_elements, is_held
from streammerge.plan import Plan
from streammerge.readahead import Request
from streammerge.step import Step, stacked
from streammerge.streamed_deltas import Sources
from streammerge.thin_steps import ThinSources


class Schedule:
    """What a stream reads.

    skip      tensors that an earlier run finished: not merged again, though a look at the model sees them
    resident  every step's inputs are kept until it is merged, so that it reads them once

    `steps` are to be merged, those of a pool as one; `looks` are the passes before, each a number and a step.
    """

    def __init__(self, plan: Plan, skip: Container[str], *, resident: bool = False) -> None:
        self._memory, self._resident = plan.memory, resident
        pools = groupby(plan.steps, key=lambda step: step.pool or step.name)
        units = [stacked(tuple(parts)) for _, parts in pools]
        # a pool of which one matrix is missing is merged as a whole
        self.steps = [unit for unit in units if any(part.name not in skip for part in unit.parts or (unit,))]
        looking = {step.method for step in self.steps if step.looks_at_model}
        seen = [unit for unit in units if unit.looks_at_model and unit.method in looking]
        most = max((step.looks for step in seen), default=0)
        self.looks = [(number, step) for number in range(most) for step in seen if number < step.looks]

    @property
    def read_bytes(self) -> int:
        """Bytes of all requests."""
        looks = sum(self.look_sources(step).read_bytes for _, step in self.looks)
        return looks + sum(self.sources(step).read_bytes for step in self.steps)

    def sources(self, step: Step) -> Sources:
        """What is read to merge a step."""
        if step.thin:
            return ThinSources(step)
        looks = 0 if step.looks_at_model or self.is_held(step) else step.looks
        return Sources(step, resident=self._resident, passes=looks + step.passes)

    def look_sources(self, step: Step) -> Sources:
        """What is read for one look at a step that looks at the model."""
        return Sources(step, passes=1, again=True)

    def is_held(self, step: Step) -> bool:
        """Whether a step's runs are all kept while it looks at them and merges them."""
        return is_held(step, self._memory.slot_bytes, self._memory.input_slots)

    def block_elements(self, step: Step) -> int:
        """Elements of one block of a step."""
        return block_elements(step, self._memory.slot_bytes)

    def requests(self) -> Iterator[Request]:
        """Every run, in the order in which it will be taken."""
        for _, step in self.looks:
            yield from self.look_sources(step).requests(self.block_elements(step))
        for step in self.steps:
            yield from self.sources(step).requests(self.block_elements(step))
