"""Low-rank changes merged by their factors: what the dense solution gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge import methods
from streammerge.delta import TensorDeltas
from streammerge.errors import MergeError
from streammerge.solve.cost_thin import THIN_ROWS, thin_cost
from streammerge.solve.thin import Factors, ThinDeltas
from streammerge.thin_steps import ThinChange
from tests.solve.changes import relative_error

SETTINGS = [
    {"solver": solver, "anchor": anchor, "weight_exponent": exponent, "top_k": 0.2, "time": 3.0}
    for solver, anchor, exponent in itertools.product(
        ["ridge", "pinv", "exact", "top_k", "flow"], ["auto", "mean", "base", "sum"], [0.0, 0.5, 1.0]
    )
]


def factors(rows, columns, ranks, seed=0, spread=10.0):
    """One change of each rank; each `spread` times smaller than the one before."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [Factors(normal(rows, r) * spread**-n, normal(r, columns)) for n, r in enumerate(ranks)]


def thin(experts, method="actmat", dtype=torch.float64, **parameters):
    shape = (experts[0].left.shape[0], experts[0].right.shape[1])
    deltas = ThinDeltas(name="w", shape=shape, experts=experts, dtype=dtype)
    merged = methods.describe(method).load_thin()(deltas, **parameters)
    assert merged.rank <= sum(each.rank for each in experts)
    return merged.left @ merged.right, deltas.facts


def dense(experts, method="actmat", dtype=torch.float64, **parameters):
    changes = [(each.left @ each.right).to(dtype) for each in experts]
    deltas = TensorDeltas(torch.zeros_like(changes[0]), changes)
    return methods.describe(method).merge(deltas, **parameters)


@pytest.mark.parametrize("parameters", SETTINGS, ids=lambda p: f"{p['solver']}-{p['anchor']}-{p['weight_exponent']}")
@pytest.mark.parametrize(
    ("shape", "ranks"), [((20, 30), (3, 4, 5)), ((50, 24), (2, 0, 6)), ((6, 40), (9, 3, 2)), ((12, 20), (4,))]
)
def test_thin_and_dense_agree_for_every_setting(shape, ranks, parameters):
    experts = factors(*shape, ranks)
    assert relative_error(thin(experts, **parameters)[0], dense(experts, **parameters)) < 1e-9


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("wudi", {}), ("wudi", {"solver": "pinv", "lambda_": 0.5}), ("swudi", {}), ("swudi", {"anchor": "base"}),
        ("aswudi", {"lambda_": 2.0}), ("linear", {"weight": (1.0, 2.0, 0.5)}), ("linear", {"weight": 3.0}),
        ("task_arithmetic", {"weight": (1.0, -2.0, 0.5), "lambda_": 0.3}), ("task_arithmetic", {"normalize": True}),
    ],
)  # fmt: skip
def test_the_methods_around_it_agree_too(method, parameters):
    experts = factors(20, 30, (3, 4, 5), spread=1.5)
    assert relative_error(thin(experts, method, **parameters)[0], dense(experts, method, **parameters)) < 1e-9


@given(
    rows=st.integers(1, 24),
    columns=st.integers(2, 40),
    ranks=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    ridge=st.floats(1e-3, 10.0),
    exponent=st.sampled_from([0.0, 0.3, 1.0]),
    anchor=st.sampled_from(["mean", "base", "sum"]),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=150)
def test_thin_is_dense_for_any_shape_and_ranks(rows, columns, ranks, ridge, exponent, anchor, seed):
    experts = factors(rows, columns, ranks, seed, spread=2.0)
    parameters = {"ridge": ridge, "weight_exponent": exponent, "anchor": anchor}
    expected = dense(experts, **parameters)
    found, _ = thin(experts, **parameters)
    assert (found - expected).norm() <= 1e-9 * (expected.norm() + 1e-30)
    changes = TensorDeltas(torch.zeros(rows, columns), [(each.left @ each.right).float() for each in experts])
    single = methods.describe("actmat").merge(changes, **parameters).double()
    # a small ridge leaves float32 fewer digits, as the solver itself says
    allowed = max(1e-4, 5 * changes.facts["certificate"])
    assert (found - single).norm() <= allowed * (expected.norm() + 1e-30)


def test_factors_may_be_ill_conditioned_deficient_or_zero():
    experts = factors(30, 40, (6, 6, 6), spread=1.0)
    steep = 10.0 ** -torch.arange(0.0, 12.0, 2.0, dtype=torch.float64)
    # ten orders of magnitude apart in A and undone in B
    experts[0] = Factors(experts[0].left / steep, experts[0].right * steep[:, None])
    # one column twice, one row zero
    experts[1].left[:, 1] = experts[1].left[:, 0]
    experts[1].right[2] = 0.0
    # as training begins
    experts[2].left.zero_()
    for parameters in ({}, {"solver": "pinv"}):
        assert relative_error(thin(experts, **parameters)[0], dense(experts, **parameters)) < 1e-7


def test_experts_that_changed_nothing_count_for_nothing():
    experts = factors(20, 30, (3, 4), spread=1.0)
    idle = [
        Factors(torch.zeros(20, 2).double(), torch.randn(2, 30).double()),
        Factors(torch.zeros(20, 0).double(), torch.zeros(0, 30).double()),
    ]
    assert torch.equal(thin([*experts, *idle])[0], thin(experts)[0])
    merged, facts = thin(idle)
    assert not merged.any()
    assert facts["solver"] == "none"


def test_one_expert_or_several_equal_ones_come_back_as_they_are():
    (only,) = factors(20, 30, (3,))
    for experts in ([only], [only, only]):
        merged, facts = thin(experts)
        assert torch.equal(merged, only.left @ only.right)
        assert facts["form"] == "none"


def test_orthogonal_inputs_without_a_ridge_sum():
    basis = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    experts = [
        Factors(each.left, basis[n * 5 : n * 5 + 3]) for n, each in enumerate(factors(20, 30, (3, 3, 3), spread=1.0))
    ]
    total = sum(each.left @ each.right for each in experts)
    assert relative_error(thin(experts, solver="exact")[0], total) < 1e-12


def test_the_certificate_bounds_the_error():
    experts = factors(30, 60, (8, 8, 8), spread=30.0)
    for parameters in ({"solver": "exact"}, {"ridge": 1e-6}):
        merged, facts = thin(experts, **parameters)
        assert relative_error(merged, dense(experts, **parameters)) <= max(facts["certificate"], 1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_a_change_that_has_no_norm_is_refused(bad):
    experts = factors(20, 30, (3, 4))
    experts[1].left[0, 0] = bad
    with pytest.raises(MergeError, match="expert 1 is not finite, or too large to square"):
        thin(experts)


@pytest.mark.parametrize("parameters", [{"pool": "inputs"}, {"iterations": 10}])
def test_settings_without_a_thin_form_have_no_price(parameters):
    assert thin_cost((64, 64), (4, 4), {}, 4) is not None
    assert thin_cost((64, 64), (4, 4), parameters, 4) is None
    assert thin_cost((64, 64), (40, 24), {}, 4) is None
    # a factor with more columns than the matrix has rows counts for as many
    assert thin_cost((8, 64), (40, 24), {}, 4) is not None


@pytest.mark.parametrize("transposed", [False, True])
def test_the_rows_of_a_change_do_not_depend_on_how_they_are_asked_for(transposed):
    rows, columns = 3 * THIN_ROWS + 7, 33
    (merged,) = factors(*((columns, rows) if transposed else (rows, columns)), (5,))
    whole = ThinChange(merged, torch.float32, transposed=transposed).rows(0, rows)
    pieces = ThinChange(merged, torch.float32, transposed=transposed)
    cut = [pieces.rows(first, min(first + 50, rows)) for first in range(0, rows, 50)]
    assert torch.equal(torch.cat(cut), whole)
    expected = merged.left @ merged.right
    torch.testing.assert_close(whole.double(), expected.mT if transposed else expected, rtol=1e-5, atol=1e-5)
