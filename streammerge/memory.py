"""How the memory budget is spent: input slots, output slots, workspace, reserve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.budget import format_bytes
from streammerge.derived import DerivedEntry, scratch_bytes
from streammerge.errors import PlanError, quoted
from streammerge.solve.cost import PANEL_ELEMENTS as PANEL
from streammerge.step import Step, matrices_of

# large enough for the bus to an accelerator to run at its rate, and for as much to be read ahead as it computes on
STAGED_SLOT_BYTES, STAGED_INPUT_BYTES = 8 << 20, 1 << 30
# so large that handing a run from thread to thread costs next to nothing
LARGEST_SLOT_BYTES = 4 << 20
SMALLEST_SLOT_BYTES = 64 << 10
MOST_INPUT_SLOTS, MOST_INPUT_BYTES = 256, 256 << 20
# element methods merge a block in pieces, several at a time. Their size is a multiple of PANEL: where it is smaller,
# threads wait for Python
PIECE_ELEMENTS, MOST_PIECES = 1 << 18, 4
FEWEST_OUTPUT_SLOTS, MOST_OUTPUT_SLOTS, OUTPUT_BYTES = 8, 32, 32 << 20
# what Python and thread stacks take, and the matrix libraries for compiled kernels and packed operands: bench/memory.py
RESERVE_BYTES = 64 << 20
MATRIX_RESERVE_BYTES = 128 << 20
# or, where that is more, so much and so much again for each column or row of the longest side: bench/growth.py
LARGE_RESERVE_BYTES, RESERVE_BYTES_PER_SIDE = 64 << 20, 20 << 10
# what merges of matrices take of their reserve for each column or row of the longest side, until all is taken; others
# take next to nothing of it: an estimate, which bench/growth.py tests; no budget depends on it
TAKEN_BYTES_PER_SIDE = 40 << 10
# a matrix is rounded and written block by block: sum, and two temporaries
OUTPUT_BUFFERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The budget, cut up. All slots have `slot_bytes`; input slots are how far reading runs ahead.

    untouched_bytes  of the peak, what is there for other merges than this one: slots that it has too few bytes to
                     fill, and reserve
    """

    budget_bytes: int
    slot_bytes: int
    input_slots: int
    output_slots: int
    workspace_bytes: int
    reserve_bytes: int
    untouched_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most that will be taken at once."""
        slots = (self.input_slots + self.output_slots) * self.slot_bytes
        return slots + self.workspace_bytes + self.reserve_bytes

    @property
    def expected_bytes(self) -> int:
        """About how much that will turn out to be."""
        return self.peak_bytes - self.untouched_bytes


def block_elements(step: Step, slot_bytes: int) -> int:
    """Elements of one block: what a slot holds, in whole rows where the step needs them, else in whole panels."""
    elements = max(slot_bytes // step.element_bytes, 1)
    if step.by_matrix or step.by_row:
        return elements // step.columns * step.columns
    return elements // PANEL * PANEL or elements


def piece_elements(step: Step) -> int:
    """Elements of one piece of a block, in whole rows where the step needs them."""
    return max(PIECE_ELEMENTS // step.columns, 1) * step.columns if step.by_row else PIECE_ELEMENTS


def piece_workspace_bytes(step: Step, slot_bytes: int) -> int:
    """What a thread that merges a piece of an element method's block takes beside the slots."""
    elements = min(piece_elements(step), block_elements(step, slot_bytes), step.elements // step.matrices)
    return elements * step.compute_bytes * step.block_buffers


def is_held(step: Step, slot_bytes: int, input_slots: int) -> bool:
    """Whether a step's inputs fit the slots beside as many that read ahead, so that looking costs no reading."""
    if not step.looks or step.looks_at_model:
        return False
    blocks = -(-step.elements // max(block_elements(step, slot_bytes), 1))
    return blocks * len(step.models) <= input_slots // 2


def step_workspace_bytes(step: Step, slot_bytes: int) -> int:
    """What a step takes beside the slots."""
    block = min(block_elements(step, slot_bytes), step.elements // step.matrices) * step.compute_bytes
    if not step.by_matrix:
        piece = piece_workspace_bytes(step, slot_bytes)
        return piece and min(-(-block * step.block_buffers // piece), MOST_PIECES) * piece
    if step.thin:
        return block * OUTPUT_BUFFERS
    kept_base = step.base.nbytes // step.matrices if step.base else 0
    return step.workspace_bytes + kept_base + block * OUTPUT_BUFFERS


def fit_memory(steps: Sequence[Step], budget_bytes: int, *, staged: bool = False, whole: bool = False) -> MemoryPlan:
    """Cut the budget so that every step fits. Raises PlanError naming the step that cannot.

    staged  slots only: workspace lies in an accelerator's memory
    whole   slots that hold a whole tensor, or as much of it as the budget allows, though they leave the cache
    """
    # a multiple of 64, so that every slot is aligned for any dtype
    slot_bytes = max(STAGED_SLOT_BYTES if staged else LARGEST_SLOT_BYTES, -(-_widest_row_bytes(steps) // 64) * 64)
    # doubled, so that halving comes by the usual size
    while whole and slot_bytes < _largest_tensor_bytes(steps):
        slot_bytes *= 2
    while True:
        plan, largest = _cut(steps, budget_bytes, slot_bytes, staged)
        if plan is not None:
            return plan
        smaller = slot_bytes // 128 * 64
        if smaller < max(SMALLEST_SLOT_BYTES, _widest_row_bytes(steps)):
            break
        slot_bytes = smaller
    needed = _needed_bytes(steps, slot_bytes, staged)
    raise PlanError(
        f"the largest step needs a budget of {format_bytes(needed)}, more than {format_bytes(budget_bytes)}: "
        f"{quoted(largest.name)} ({largest.method}, {len(largest.experts)} experts)",
        hint=f"Pass `--memory {-(-needed // (1 << 20))}MiB` or more.",
    )


def _cut(steps: Sequence[Step], budget_bytes: int, slot_bytes: int, staged: bool) -> tuple[MemoryPlan | None, Step]:
    largest = max(steps, key=lambda step: step_workspace_bytes(step, slot_bytes))
    workspace = 0 if staged else step_workspace_bytes(largest, slot_bytes)
    reserve = _reserve_bytes(steps, slot_bytes, staged)
    left = budget_bytes - reserve - workspace - _output_slots(slot_bytes) * slot_bytes
    fewest = _fewest_slots(steps)
    most = min((STAGED_INPUT_BYTES if staged else MOST_INPUT_BYTES) // slot_bytes, MOST_INPUT_SLOTS)
    kept = 0 if staged else max((_kept_bytes(step, slot_bytes) for step in steps), default=0)
    input_slots = min(max(most, fewest), left // (slot_bytes + kept))
    if input_slots < fewest:
        return None, largest
    plan = MemoryPlan(
        budget_bytes=budget_bytes,
        slot_bytes=slot_bytes,
        input_slots=input_slots,
        output_slots=_output_slots(slot_bytes),
        workspace_bytes=workspace,
        reserve_bytes=reserve + input_slots * kept,
        untouched_bytes=_untouched_bytes(steps, slot_bytes, input_slots, staged),
    )
    return plan, largest


def _untouched_bytes(steps: Sequence[Step], slot_bytes: int, input_slots: int, staged: bool) -> int:
    # the slots are used in turn, so that each is filled once before any is filled again
    filled = sum(_runs(step, slot_bytes) for step in steps)
    written = sum(-(-step.elements // max(block_elements(step, slot_bytes), 1)) for step in steps)
    output_slots = _output_slots(slot_bytes)
    slots = input_slots - min(filled, input_slots) + output_slots - min(written, output_slots)
    if staged:
        return slots * slot_bytes
    longest, reserve = _longest_side(steps), RESERVE_BYTES + _matrix_reserve_bytes(steps)
    return slots * slot_bytes + max(reserve - longest * TAKEN_BYTES_PER_SIDE, 0)


def _runs(step: Step, slot_bytes: int) -> int:
    """How many runs a step reads, at least: those of one pass."""
    return -(-step.elements // max(block_elements(step, slot_bytes), 1)) * len(step.models)


def _kept_bytes(step: Step, slot_bytes: int) -> int:
    """What looks keep for each input slot: half of the slots hold a tensor between its look and its merge."""
    if not step.kept_bytes or step.looks_at_model:
        return 0
    return -(-block_elements(step, slot_bytes) * len(step.experts) * step.kept_bytes // (2 * len(step.models)))


def _reserve_bytes(steps: Sequence[Step], slot_bytes: int, staged: bool) -> int:
    # the thread that reads ahead computes one run, and another that is read out of turn may be computed meanwhile
    deriving = 2 * max((_scratch_bytes(step, slot_bytes) for step in steps), default=0)
    quantising = max((step.scheme.quantising_bytes for step in steps if step.scheme), default=0)
    # taken from the allocator, which gives it back, and not at the same time as what other steps take there
    thin = max((step.workspace_bytes for step in steps if step.thin), default=0)
    return RESERVE_BYTES + (0 if staged else _matrix_reserve_bytes(steps)) + deriving + quantising + thin


def _matrix_reserve_bytes(steps: Sequence[Step]) -> int:
    longest = _longest_side(steps)
    return max(MATRIX_RESERVE_BYTES, LARGE_RESERVE_BYTES + longest * RESERVE_BYTES_PER_SIDE) if longest else 0


def _longest_side(steps: Sequence[Step]) -> int:
    return max((max(step.shape[-2:]) for step in steps if step.by_matrix), default=0)


def _scratch_bytes(step: Step, slot_bytes: int) -> int:
    """What computing a run of the step's derived inputs takes."""
    block = block_elements(step, slot_bytes)
    if step.thin:
        return scratch_bytes(step.base, block) if step.base else 0
    if not any(isinstance(entry, DerivedEntry) for entry in (*step.experts, step.base)):
        return 0
    first = next(matrices_of(step))
    return max((scratch_bytes(entry, block) for entry in (*first.experts, first.base) if entry), default=0)


def _output_slots(slot_bytes: int) -> int:
    return max(FEWEST_OUTPUT_SLOTS, min(OUTPUT_BYTES // slot_bytes, MOST_OUTPUT_SLOTS))


def _fewest_slots(steps: Sequence[Step]) -> int:
    # an element-wise block of every model at once, and the next block being read meanwhile
    return 2 * max((len(step.experts) + (step.base is not None) for step in steps), default=1)


def _widest_row_bytes(steps: Sequence[Step]) -> int:
    return max((step.columns * step.element_bytes for step in steps if step.by_matrix or step.by_row), default=1)


def _largest_tensor_bytes(steps: Sequence[Step]) -> int:
    return max((-(-step.elements // PANEL) * PANEL * step.element_bytes for step in steps), default=1)


def _needed_bytes(steps: Sequence[Step], slot_bytes: int, staged: bool) -> int:
    workspace = 0 if staged else max(step_workspace_bytes(step, slot_bytes) for step in steps)
    slots = _output_slots(slot_bytes) + _fewest_slots(steps)
    kept = 0 if staged else max((_kept_bytes(step, slot_bytes) for step in steps), default=0)
    return _reserve_bytes(steps, slot_bytes, staged) + workspace + slots * slot_bytes + _fewest_slots(steps) * kept
