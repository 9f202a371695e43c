from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.budget import parse_bytes
from streammerge.checkpoint import DTYPE_BYTES, TensorEntry
from streammerge.errors import PlanError
from streammerge.memory import (
    FEWEST_OUTPUT_SLOTS,
    LARGE_RESERVE_BYTES,
    LARGEST_SLOT_BYTES,
    MATRIX_RESERVE_BYTES,
    MOST_INPUT_BYTES,
    MOST_INPUT_SLOTS,
    MOST_OUTPUT_SLOTS,
    OUTPUT_BYTES,
    RESERVE_BYTES,
    RESERVE_BYTES_PER_SIDE,
    SMALLEST_SLOT_BYTES,
    TAKEN_BYTES_PER_SIDE,
    MemoryPlan,
    block_elements,
    fit_memory,
    step_workspace_bytes,
)
from streammerge.rules import Role, TensorClass
from streammerge.step import Step

MIB = 1 << 20


def step(
    name: str,
    shape: tuple[int, ...],
    *,
    experts: int = 3,
    dtype: str = "BF16",
    out: str = "BF16",
    by_matrix: bool = False,
    base: bool = True,
    workspace: int = 0,
) -> Step:
    entry = TensorEntry(
        name, dtype, shape, "f", 0, DTYPE_BYTES[dtype] * TensorEntry("", "U8", shape, "", 0, 0).elements
    )
    return Step(
        name=name, role=Role(TensorClass.MATRIX), method="actmat" if by_matrix else "linear", arguments={},
        base=entry if base else None, experts=(entry,) * experts, models=tuple(range(experts + base)),
        dtype=out, by_matrix=by_matrix, passes=1, flops=0, workspace_bytes=workspace,
    )  # fmt: skip


dtypes = st.sampled_from(["BF16", "F16", "F32", "F64"])
element_steps = st.builds(
    step,
    st.just("w"),
    st.lists(st.integers(0, 5000), max_size=3).map(tuple),
    experts=st.integers(1, 20) | st.just(50),
    dtype=dtypes,
    out=dtypes,
    base=st.booleans(),
)
matrix_steps = st.builds(
    step,
    st.just("m"),
    st.tuples(st.integers(1, 200_000), st.integers(1, 200_000)),
    experts=st.integers(1, 20) | st.just(50),
    dtype=dtypes,
    out=dtypes,
    by_matrix=st.just(True),
    workspace=st.integers(0, 1 << 34),
)
some_steps = st.lists(element_steps | matrix_steps, min_size=1, max_size=6)
budgets = st.integers(0, 1 << 30) | st.integers(0, 1 << 38)


def models_of(one: Step) -> int:
    return len(one.experts) + (one.base is not None)


def most_input_slots(slot_bytes: int) -> int:
    return min(MOST_INPUT_SLOTS, MOST_INPUT_BYTES // slot_bytes)


def assert_sound(plan: MemoryPlan, steps: list[Step]) -> None:
    assert plan.peak_bytes <= plan.budget_bytes
    assert plan.slot_bytes % 64 == 0
    assert FEWEST_OUTPUT_SLOTS <= plan.output_slots <= MOST_OUTPUT_SLOTS
    assert plan.output_slots * plan.slot_bytes <= max(OUTPUT_BYTES, FEWEST_OUTPUT_SLOTS * plan.slot_bytes)
    # a block of every model at once, and the next one being read
    fewest = 2 * max(map(models_of, steps))
    assert fewest <= plan.input_slots <= max(fewest, most_input_slots(plan.slot_bytes))
    for each in steps:
        block = block_elements(each, plan.slot_bytes)
        assert block >= 1
        assert block * each.element_bytes <= plan.slot_bytes
        assert step_workspace_bytes(each, plan.slot_bytes) <= plan.workspace_bytes
        if each.by_matrix:
            assert block % each.shape[1] == 0


@given(some_steps, budgets)
def test_slots_for_whole_tensors_fit_wherever_usual_ones_do(steps: list[Step], budget: int) -> None:
    try:
        usual = fit_memory(steps, budget)
    except PlanError:
        with pytest.raises(PlanError):
            fit_memory(steps, budget, whole=True)
        return
    plan = fit_memory(steps, budget, whole=True)
    assert plan.slot_bytes >= usual.slot_bytes
    assert plan.peak_bytes <= budget
    if budget >= 1 << 37 and max(each.elements for each in steps) < 1 << 24:
        assert all(block_elements(each, plan.slot_bytes) >= each.elements for each in steps)


@given(some_steps, budgets)
def test_what_fits_fits_and_what_does_not_says_what_would(steps: list[Step], budget: int) -> None:
    try:
        plan = fit_memory(steps, budget)
    except PlanError as error:
        found = re.fullmatch(r"Pass `--memory (\d+MiB)` or more\.", error.hint or "")
        assert found
        enough = parse_bytes(found[1])
        assert enough > budget
        assert_sound(fit_memory(steps, enough), steps)
        return
    assert plan.budget_bytes == budget
    assert_sound(plan, steps)


@given(some_steps, budgets)
def test_more_memory_is_never_worse(steps: list[Step], budget: int) -> None:
    try:
        plan = fit_memory(steps, budget)
    except PlanError:
        return
    richer = fit_memory(steps, budget * 2)
    assert richer.slot_bytes >= plan.slot_bytes
    assert richer.input_slots * richer.slot_bytes >= plan.input_slots * plan.slot_bytes


def test_a_budget_too_small_names_the_tensor_and_what_it_takes() -> None:
    steps = [step("small", (10,)), step("lm_head.weight", (4096, 4096), by_matrix=True, workspace=500 * MIB, experts=4)]
    with pytest.raises(PlanError) as raised:
        fit_memory(steps, 300 * MIB)
    kept_base, blocks = 32 * MIB, 3 * 2 * 64 * 1024
    slots = (MOST_OUTPUT_SLOTS + 10) * 64 * 1024
    matrices = LARGE_RESERVE_BYTES + 4096 * RESERVE_BYTES_PER_SIDE
    assert matrices > MATRIX_RESERVE_BYTES
    needed = RESERVE_BYTES + matrices + 500 * MIB + kept_base + blocks + slots
    assert raised.value.message == (
        f"the largest step needs a budget of {needed / MIB:.1f} MiB, more than 300.0 MiB: "
        "`lm_head.weight` (actmat, 4 experts)"
    )
    assert raised.value.hint == f"Pass `--memory {-(-needed // MIB)}MiB` or more."
    assert fit_memory(steps, needed).peak_bytes == needed
    with pytest.raises(PlanError):
        fit_memory(steps, needed - 1)


def test_a_large_budget_is_spent_on_large_slots_and_long_read_ahead() -> None:
    plan = fit_memory([step("w", (4096, 4096))], 100 << 30)
    assert (plan.slot_bytes, plan.input_slots) == (LARGEST_SLOT_BYTES, most_input_slots(LARGEST_SLOT_BYTES))
    assert plan.peak_bytes < 1 << 30


def test_a_small_budget_makes_slots_smaller_before_it_refuses() -> None:
    plan = fit_memory([step("w", (4096, 4096), experts=20)], RESERVE_BYTES + 8 * MIB)
    assert SMALLEST_SLOT_BYTES <= plan.slot_bytes < LARGEST_SLOT_BYTES


def test_a_row_wider_than_the_largest_slot_gets_a_slot_that_holds_it() -> None:
    wide = step("w", (8, 3_000_001), by_matrix=True)
    plan = fit_memory([wide], 100 << 30)
    assert plan.slot_bytes >= 3_000_001 * 2 > LARGEST_SLOT_BYTES
    assert plan.slot_bytes % 64 == 0
    assert block_elements(wide, plan.slot_bytes) == 3_000_001


def test_the_widest_dtype_a_step_touches_sets_how_much_a_slot_holds() -> None:
    assert block_elements(step("w", (9999,)), 4096) == 2048
    assert block_elements(step("w", (9999,), out="F32"), 4096) == 1024
    assert block_elements(step("w", (9999,), dtype="F64"), 4096) == 512


def test_a_tensor_smaller_than_a_slot_takes_workspace_for_itself_alone() -> None:
    assert step_workspace_bytes(step("w", (10,)), LARGEST_SLOT_BYTES) == 10 * 4 * 6
    assert step_workspace_bytes(step("w", (10,), dtype="F64"), LARGEST_SLOT_BYTES) == 10 * 8 * 6
    assert step_workspace_bytes(step("w", (0,)), LARGEST_SLOT_BYTES) == 0


def test_a_matrix_keeps_its_base_in_memory() -> None:
    with_base = step("w", (64, 64), by_matrix=True, workspace=1000)
    assert step_workspace_bytes(with_base, LARGEST_SLOT_BYTES) == 1000 + 64 * 64 * 2 + 64 * 64 * 4 * 3
    without = step("w", (64, 64), by_matrix=True, workspace=1000, base=False)
    assert step_workspace_bytes(without, LARGEST_SLOT_BYTES) == 1000 + 64 * 64 * 4 * 3


def test_of_a_small_merge_less_is_expected_than_its_slots_and_reserve_could_hold():
    small, large = step("w", (64, 64)), step("w", (1 << 14, 1 << 14))
    most = most_input_slots(LARGEST_SLOT_BYTES)
    for one, filled in ((small, len(small.models) + 1), (large, most + OUTPUT_BYTES // LARGEST_SLOT_BYTES)):
        plan = fit_memory([one], parse_bytes("1GiB"))
        assert plan.input_slots == most
        expected = filled * plan.slot_bytes + plan.workspace_bytes
        assert plan.expected_bytes == expected < plan.peak_bytes


def test_of_the_reserve_more_is_expected_to_be_taken_the_larger_the_matrices():
    def spared(side: int) -> int:
        many = [step(f"w{i}", (side, side), by_matrix=True, workspace=100 * MIB) for i in range(1024)]
        plan = fit_memory(many, parse_bytes("4GiB"))
        return plan.peak_bytes - plan.expected_bytes

    reserve = RESERVE_BYTES + MATRIX_RESERVE_BYTES
    assert [spared(side) for side in (1024, 2048)] == [reserve - side * TAKEN_BYTES_PER_SIDE for side in (1024, 2048)]
    assert spared(1 << 13) == 0
