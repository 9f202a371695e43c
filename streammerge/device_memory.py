"""What a merge takes of an accelerator's memory, known before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.budget import format_bytes
from streammerge.errors import PlanError, quoted
from streammerge.memory import OUTPUT_BUFFERS, block_elements
from streammerge.step import COPY, Step

# steps that are on the device at once: one computes while the next one's inputs arrive and the last one's result leaves
MOST_AT_ONCE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemoryPlan:
    """The budget on the device, and the most that one step takes of it."""

    budget_bytes: int
    largest_step_bytes: int


def stays_whole(step: Step) -> bool:
    """Whether a step's inputs lie on the device together: a matrix, or a tensor looked at before it is merged."""
    return step.by_matrix or (step.looks > 0 and not step.looks_at_model)


def step_device_bytes(step: Step, slot_bytes: int) -> int:
    """What one step takes at once: its inputs as stored, the method's workspace, the result; of a stack, one matrix's.

    A step whose method streams by element is there block by block.
    """
    if step.method == COPY:
        return 0
    block = min(block_elements(step, slot_bytes), step.elements // step.matrices)
    if not step.by_matrix:
        there = step.elements if stays_whole(step) else block
        stored = there * step.element_bytes * (len(step.models) + 1)
        return stored + block * step.compute_bytes * step.block_buffers + step.device_bytes
    there = (step.read_bytes + step.write_bytes) // step.matrices
    return there + step.device_bytes + block * step.compute_bytes * OUTPUT_BUFFERS


def fit_device_memory(steps: Sequence[Step], budget_bytes: int, slot_bytes: int) -> DeviceMemoryPlan:
    """See that every step fits. Raises PlanError naming the one that does not."""
    largest = max(steps, key=lambda step: step_device_bytes(step, slot_bytes))
    needed = step_device_bytes(largest, slot_bytes)
    if needed > budget_bytes:
        raise PlanError(
            f"the largest step needs {format_bytes(needed)} of device memory, more than {format_bytes(budget_bytes)}: "
            f"{quoted(largest.name)} ({largest.method}, {len(largest.experts)} experts)",
            hint=f"Pass `--device-memory {-(-needed // (1 << 20))}MiB` if the device has it, or `--device cpu`.",
        )
    return DeviceMemoryPlan(budget_bytes=budget_bytes, largest_step_bytes=needed)
