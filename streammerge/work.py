"""How much work a plan is, of the sorts that its time depends on."""

from __future__ import annotations

from collections.abc import Iterable

from streammerge.memory import MemoryPlan, is_held
from streammerge.rates import Work
from streammerge.step import Step

# forming and measuring a matrix's changes takes as long as about this many FLOPs of its products for each byte that is
# read: an estimate, from narrow matrices that merged at fewer FLOPs per second than wide ones; bench/growth.py tests it
FLOPS_PER_BYTE = 600


def work_of(steps: Iterable[Step], memory: MemoryPlan, write_bytes: int, *, resident: bool = False) -> Work:
    """All that is to be done. `resident` steps are read once, however many passes there are."""
    read = flops = touched = 0
    for step in steps:
        passed = passed_bytes(step, memory, resident=resident)
        read += passed
        if step.by_matrix and not step.thin:
            flops += step.flops + FLOPS_PER_BYTE * (passed + step.write_bytes)
        else:
            touched += passed + step.write_bytes
    return Work(read_bytes=read, write_bytes=write_bytes, matrix_flops=flops, element_bytes=touched)


def passed_bytes(step: Step, memory: MemoryPlan, *, resident: bool = False) -> int:
    """Bytes that a step reads, each as often as a pass asks for it."""
    if step.thin:
        return step.read_bytes
    # looks at the whole model are passes of their own, which read the origin, too
    apart = step.looks if step.looks_at_model else 0
    held = resident or is_held(step, memory.slot_bytes, memory.input_slots)
    passes = 1 if resident else step.passes + (0 if apart or held else step.looks)
    entry = step.base or step.experts[0]
    # a matrix's origin is kept from its first pass to its last
    origin = entry.stored_bytes * (1 if step.by_matrix else passes)
    return apart * step.read_bytes + origin + passes * (step.read_bytes - entry.stored_bytes)
