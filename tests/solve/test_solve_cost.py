import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from streammerge.solve.cost import elementwise, form, may_escalate, normal_equations
from streammerge.solve.normal_equations import solve_normal_equations
from tests.solve.changes import CountingDeltas, experts

SHAPES = [(96, 64), (64, 96), (40, 300), (90, 256), (300, 40), (32, 512), (1, 7), (7, 1)]


def used(deltas):
    """Most bytes that were held at once, beyond the inputs: the workspace's and the allocator's."""
    deltas.taken = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        solve_normal_equations(deltas, solver=deltas.solver, ridge=deltas.ridge)
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_pricing_loads_no_torch():
    code = "import sys, streammerge.solve.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_dual_system_is_chosen_where_it_is_regular_and_smaller():
    assert form(3, 100, 300) == "dual"
    assert form(3, 101, 300) == "primal"


@pytest.mark.parametrize("solver", ["ridge", "pinv", "exact"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["sft", "singular", "one_changed", "zero_columns"])
def test_a_solution_takes_no_more_workspace_and_passes_than_priced(shape, solver, kind):
    base, changed = experts("sft", *shape, 4)
    if kind == "singular":
        changed = [changed[0], changed[0], changed[0], changed[1]]
    elif kind == "one_changed":
        changed = [base, changed[1], base, changed[2]]
    elif kind == "zero_columns":
        for expert in changed:
            expert[:, ::2] = base[:, ::2]
    for dtype in (torch.bfloat16, torch.float64):
        deltas = CountingDeltas(base.to(dtype), [e.to(dtype) for e in changed])
        for ridge in (0.1, 1e-5):
            deltas.taken = deltas.passes = 0
            solve_normal_equations(deltas, solver=solver, ridge=ridge)
            priced = normal_equations(shape, 4, {"solver": solver, "ridge": ridge}, deltas.dtype.itemsize)
            assert deltas.taken <= priced.workspace_bytes - (8 << 20)
            if deltas.facts["escalation"] == "none":
                assert deltas.passes <= priced.passes


@pytest.mark.parametrize("solver", ["ridge", "pinv", "exact"])
@pytest.mark.parametrize("kind", ["sft", "low_rank", "singular"])
@pytest.mark.parametrize("shape", [(512, 512), (384, 640), (170, 512), (128, 600)], ids=str)
def test_all_memory_of_a_solution_lies_within_its_price(shape, solver, kind):
    base, changed = experts("low_rank" if kind == "low_rank" else "sft", *shape, 3)
    if kind == "singular":
        changed = [changed[0], changed[0], changed[1]]
    deltas = CountingDeltas(base, changed)
    deltas.solver, deltas.ridge = solver, 0.1
    priced = normal_equations(shape, 3, {"solver": solver}, 4)
    assert used(deltas) <= priced.workspace_bytes


def test_the_default_costs_four_matrices_and_two_grams_or_three_where_the_grams_are_larger():
    assert normal_equations((4096, 11008), 3, {}, 4).workspace_bytes <= 1.1 * (3 * 4096 * 11008 + 2 * 11008**2) * 4
    price = normal_equations((4096, 4096), 3, {}, 4)
    assert price.workspace_bytes <= 1.1 * 6 * 4096**2 * 4
    assert price.passes == 2
    # three half Grams, two products, a third of a cube, two triangular solutions: in cubes of 4096
    assert price.flops == pytest.approx((3 + 4 + 1 / 3 + 2) * 4096**3, rel=1e-6)


def test_float64_is_planned_for_only_where_float32_may_be_too_narrow():
    assert may_escalate("exact", 0.1, 4096, 4)
    assert may_escalate("ridge", 1e-3, 4096, 4)
    assert not may_escalate("ridge", 0.1, 16384, 4)
    assert not may_escalate("pinv", 0.1, 4096, 4)
    assert not may_escalate("exact", 0.1, 4096, 8)


def test_an_elementwise_method_needs_no_workspace():
    assert elementwise((10, 20), 3, {}, 4).workspace_bytes == 0
