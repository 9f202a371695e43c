"""No option of the covariance family takes more than it is priced at."""

import itertools

import pytest
import torch

from streammerge.solve.cost import normal_equations as price
from streammerge.solve.normal_equations import solve_normal_equations
from tests.solve.changes import CountingDeltas, experts, most_held

SOLVERS = ["ridge", "pinv", "exact", "top_k", "flow"]
PRICED = [(64, 96), (40, 300), (300, 40), (32, 512), (1, 7), (7, 1)]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", PRICED, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"anchor": "sum", "weight_exponent": 1.0},
        {"anchor": "base", "weight_exponent": 0.5},
        {"density": 0.5, "weight_exponent": 1.0},
        {"density": 0.5, "anchor": "base"},
        {"center": True, "anchor": "sum"},
    ],
    ids=str,
)
def test_no_option_takes_more_workspace_and_passes_than_priced(shape, options, solver):
    base, changed = experts("sft", *shape, 4)
    families = [
        changed, [base, changed[1], base, changed[2]], [changed[0], changed[0], changed[0], changed[1]],
        [base, base, changed[2], base],
    ]  # fmt: skip
    for family, dtype in itertools.product(families, (torch.bfloat16, torch.float64)):
        deltas = CountingDeltas(base.to(dtype), [e.to(dtype) for e in family])
        solve_normal_equations(deltas, solver=solver, **options)
        priced = price(shape, 4, {"solver": solver, **options}, deltas.dtype.itemsize)
        searched = (16 << 20) if "density" in options else 0
        assert deltas.taken <= priced.workspace_bytes - (8 << 20) - searched
        if deltas.facts.get("escalation") == "none":
            assert deltas.passes <= priced.passes


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("options", [{"anchor": "sum", "weight_exponent": 1.0}, {"density": 0.5}], ids=str)
@pytest.mark.parametrize("shape", [(384, 640), (128, 600)], ids=["primal", "dual"])
def test_all_memory_of_an_option_lies_within_its_price(shape, options, solver):
    base, changed = experts("sft", *shape, 3)
    deltas = CountingDeltas(base, changed)
    held = most_held(lambda: solve_normal_equations(deltas, solver=solver, **options))
    assert held <= price(shape, 3, {"solver": solver, **options}, 4).workspace_bytes
