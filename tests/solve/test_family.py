"""Weights, anchors, filters and trimmed covariances: by definition, in both forms, packed and dense."""

import itertools

import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.solve import normal_equations
from streammerge.solve.normal_equations import solve_normal_equations
from streammerge.solve.packed import packed_survey
from tests.solve.changes import experts, relative_error
from tests.solve.family import reference
from tests.solve.test_packed import PackedDeltas

# a dual, a tall and a nearly square system
SHAPES = [(12, 60, 3), (48, 20, 3), (25, 70, 3)]
SOLVERS = ["ridge", "pinv", "exact", "top_k", "flow"]
OPTIONS = [
    {"solver": solver, "anchor": anchor, "weight_exponent": exponent}
    for solver, anchor, exponent in itertools.product(SOLVERS, ["mean", "base", "sum"], [0.0, 0.5, 1.0])
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))


def changes(rows, columns, count, seed=0):
    """Changes of unlike norms with a decaying spectrum, [count, rows, columns] float64."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -1.5, columns, dtype=torch.float64)
    sizes = torch.logspace(0, 1, count, dtype=torch.float64)[:, None, None]
    return torch.randn(count, rows, columns, generator=g, dtype=torch.float64) * spread * sizes


def solved(each, make=TensorDeltas, **options):
    deltas = make(torch.zeros_like(each[0]), list(each))
    return solve_normal_equations(deltas, **options), deltas.facts


@every_option
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_option_is_its_definition_in_float64(shape, options):
    each = changes(*shape)
    result, facts = solved(each, **options)
    assert relative_error(result, reference(each, **options)) <= 1e-9, facts
    assert facts["certificate"] <= 1e-9


@every_option
def test_the_primal_and_the_dual_form_of_every_option_agree(options, monkeypatch):
    each = changes(12, 60, 3)
    dual, facts = solved(each, **options)
    assert facts["form"] == "dual"
    monkeypatch.setattr(normal_equations, "form", lambda experts, rows, columns: "primal")
    primal, facts = solved(each, **options)
    assert facts["form"] == "primal"
    assert relative_error(primal, dual) <= 1e-9


@every_option
@pytest.mark.parametrize("shape", [(96, 160, 3), (40, 160, 3)], ids=["primal", "dual"])
def test_float32_reaches_every_option_s_float64(shape, options):
    base, changed = experts("sft", *shape)
    result = solve_normal_equations(TensorDeltas(base, changed), **options)
    wide = torch.stack([e.double() - base.double() for e in changed])
    assert relative_error(result, reference(wide, **options)) <= 1e-3


@every_option
@pytest.mark.parametrize("shape", [(96, 160, 3), (40, 160, 3)], ids=["primal", "dual"])
def test_packed_deltas_reach_every_option_s_float64(shape, options):
    base, changed = experts("sft", *shape)
    deltas = PackedDeltas(base, changed)
    result = solve_normal_equations(deltas, **options)
    wide = torch.stack([e.double() - base.double() for e in changed])
    assert relative_error(result, reference(wide, **options)) <= 2e-3
    if packed_survey(PackedDeltas(base, changed), options["solver"]) and deltas.facts["escalation"] == "none":
        assert deltas.passes == 0


@pytest.mark.parametrize("shape", [(48, 20, 3), (30, 25, 3)], ids=str)
def test_packed_weights_count_by_the_left_gram_too(shape, monkeypatch):
    from streammerge.solve import packed

    base, changed = experts("sft", *shape)
    right = solve_normal_equations(PackedDeltas(base, changed), solver="ridge", weight_exponent=1.0)
    whole = packed.packed_primal
    monkeypatch.setattr(normal_equations, "packed_primal", lambda *a, **k: whole(*a, **k, left=True))
    left = solve_normal_equations(PackedDeltas(base, changed), solver="ridge", weight_exponent=1.0)
    assert relative_error(left, right) <= 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("anchor", ["mean", "base", "sum"])
@pytest.mark.parametrize("shaped", [{"density": 0.3}, {"center": True}, {"density": 0.6, "center": True}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_covariances_of_shaped_changes_are_those_of_the_definition(shape, shaped, anchor, solver):
    each = changes(*shape)
    factors = each.clone()
    keep = round(shaped.get("density", 1.0) * each[0].numel())
    for factor in factors.flatten(1):
        factor[factor.abs().argsort(descending=True)[keep:]] = 0
    if "center" in shaped:
        factors -= factors.mean(1, keepdim=True)
    options = {"solver": solver, "anchor": anchor, "weight_exponent": 0.5}
    result, facts = solved(each, **options, **shaped)
    assert relative_error(result, reference(each, factors=factors, **options)) <= 1e-8, facts


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_forms_agree_on_trimmed_covariances(solver, monkeypatch):
    each = changes(12, 60, 3)
    dual, facts = solved(each, solver=solver, density=0.5)
    assert facts["form"] == "dual"
    monkeypatch.setattr(normal_equations, "form", lambda experts, rows, columns: "primal")
    primal, facts = solved(each, solver=solver, density=0.5)
    assert facts["form"] == "primal"
    assert relative_error(primal, dual) <= 1e-9


@pytest.mark.parametrize("shape", [(60, 30), (12, 60)], ids=["primal", "dual"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_density_one_is_the_untrimmed_rule_bit_for_bit(shape, solver):
    each = changes(*shape, 3)
    assert torch.equal(solved(each, solver=solver, density=1.0)[0], solved(each, solver=solver)[0])


def test_exponent_zero_of_equal_norms_and_of_any_is_the_plain_rule():
    each = changes(30, 20, 3)
    plain, _ = solved(each, solver="ridge")
    assert torch.equal(solved(each, solver="ridge", weight_exponent=0.0)[0], plain)
    equal = each / each.flatten(1).norm(dim=1)[:, None, None]
    weighted, _ = solved(equal, solver="ridge", weight_exponent=1.0)
    assert relative_error(weighted, solved(equal, solver="ridge")[0]) <= 1e-12


@pytest.mark.parametrize("anchor", ["mean", "base", "sum"])
def test_a_flow_of_no_time_stays_at_its_anchor_and_one_of_much_ends_in_the_minimum(anchor):
    each = changes(40, 12, 3)
    start = {"mean": each.mean(0), "base": torch.zeros(40, 12), "sum": each.sum(0)}[anchor].double()
    still, _ = solved(each, solver="flow", anchor=anchor, top_k=1.0, time=1e-9)
    assert (still - start).norm() <= 1e-7 * each.norm()
    ended, _ = solved(each, solver="flow", anchor=anchor, top_k=1.0, time=1e9)
    assert relative_error(ended, solved(each, solver="exact")[0]) <= 1e-9


@pytest.mark.parametrize("rank", [1, 3])
def test_the_participation_ratio_of_equal_eigenvalues_is_their_number(rank):
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(20, rank, dtype=torch.float64, generator=g))[0]
    rows = torch.linalg.qr(torch.randn(30, rank, dtype=torch.float64, generator=g))[0]
    for dtype in (torch.float32, torch.float64):
        _, facts = solved((rows @ basis.mT).to(dtype)[None], solver="top_k", anchor="base")
        assert facts["kept_rank"] == rank


@pytest.mark.parametrize("share", [0.05, 0.65, 1.0])
def test_top_k_keeps_its_share_of_the_columns_rounded_up(share):
    _, facts = solved(changes(40, 30, 3), solver="top_k", top_k=share)
    assert facts["kept_rank"] == -(-round(30 * share * 100) // 100)


@pytest.mark.parametrize("solver", ["top_k", "flow"])
def test_spectral_filters_of_low_rank_changes_do_not_divide_by_rounding(solver):
    g = torch.Generator().manual_seed(3)
    each = torch.stack([torch.randn(60, 2, generator=g) @ torch.randn(2, 40, generator=g) for _ in range(3)])
    for share in (0.0, 1.0):
        result, _ = solved(each, solver=solver, top_k=share, time=30.0)
        truth = reference(each.double(), solver=solver, top_k=share, time=30.0)
        assert relative_error(result, truth) <= 1e-3
