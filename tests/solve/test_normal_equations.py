import pytest
import torch

from streammerge.errors import MergeError
from streammerge.solve import normal_equations
from streammerge.solve.normal_equations import solve_normal_equations
from tests.solve.changes import KINDS, CountingDeltas, exact, experts, relative_error, with_ridge

# square, tall, T·out/in = 1.09 and 1.10 beside the interpolation peak, on it, and duals
SHAPES = [(320, 320, 3), (480, 200, 3), (192, 528, 3), (188, 512, 3), (128, 512, 4), (160, 512, 3), (40, 300, 5)]
EPS32 = 2.0**-23


def solved(base, changed, solver, ridge=0.1):
    deltas = CountingDeltas(base, changed, name="layer.weight")
    return solve_normal_equations(deltas, solver=solver, ridge=ridge), deltas.facts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_solver_stays_within_its_promise_of_float64(shape, kind):
    base, changed = experts(kind, *shape)
    for solver, ridge in (("ridge", 0.1), ("ridge", 1e-5), ("exact", 0.0)):
        result, facts = solved(base, changed, solver, ridge)
        reference = exact(base, changed) if solver == "exact" else with_ridge(base, changed, ridge)
        error = relative_error(result, reference)
        assert error <= 1e-3, (solver, ridge, facts)
        assert error <= 3 * facts["certificate"] + 1e-6, (solver, ridge, facts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pinv_is_what_the_paper_s_code_computes(shape, kind):
    base, changed = experts(kind, *shape)
    changes = torch.stack([e.float() - base.float() for e in changed])
    covariances = changes.mT @ changes
    paper = (changes @ covariances).sum(0) @ torch.linalg.pinv(covariances.sum(0))
    result, facts = solved(base, changed, "pinv")
    reference = exact(base, changed, cut=shape[1] * EPS32)
    assert relative_error(result, reference) <= 2e-3
    # where eigenvalues crowd at the cut, the paper's float32 itself is off by more
    assert relative_error(result, paper) <= max(1e-2, 1.1 * relative_error(paper, reference))
    assert facts["kept_rank"] <= min(shape[1], shape[0] * shape[2])


def test_pinv_keeps_the_rank_of_merged_adapters():
    torch.manual_seed(0)
    changed = [torch.randn(300, 8) @ torch.randn(8, 200) for _ in range(3)]
    result, facts = solved(torch.zeros(300, 200), changed, "pinv")
    assert facts["kept_rank"] == 24
    assert relative_error(result, exact(torch.zeros(300, 200), changed, cut=200 * EPS32)) <= 1e-5


@pytest.mark.parametrize("kind", ["sft", "rl", "outlier_columns"])
def test_the_dual_and_the_primal_form_agree(kind, monkeypatch):
    base, changed = experts(kind, 60, 300, 3)
    dual, facts = solved(base, changed, "ridge")
    assert facts["form"] == "dual"
    monkeypatch.setattr(normal_equations, "form", lambda experts, rows, columns: "primal")
    primal, facts = solved(base, changed, "ridge")
    assert facts["form"] == "primal"
    assert relative_error(primal, dual) <= 5e-5
    wide = [e.double() for e in changed]
    primal, _ = solved(base.double(), wide, "ridge")
    monkeypatch.undo()
    dual, _ = solved(base.double(), wide, "ridge")
    assert relative_error(primal, dual) <= 1e-12


@pytest.mark.parametrize("solver", ["ridge", "pinv", "exact"])
@pytest.mark.parametrize("shape", [(70, 50, 3), (20, 90, 3)], ids=str)
def test_float64_checkpoints_are_solved_in_float64(shape, solver):
    torch.manual_seed(0)
    base, *changed = torch.randn(shape[2] + 1, *shape[:2], dtype=torch.float64)
    result, _ = solved(base, changed, solver)
    reference = with_ridge(base, changed, 0.1) if solver == "ridge" else exact(base, changed)
    assert result.dtype == torch.float64
    assert relative_error(result, reference) <= 1e-11


@pytest.mark.parametrize("solver", ["ridge", "pinv", "exact"])
@pytest.mark.parametrize("shape", [(64, 48), (20, 100)], ids=str)
def test_deltas_too_small_to_square_are_merged_like_large_ones(shape, solver):
    torch.manual_seed(0)
    changed = list(torch.randn(3, *shape))
    large, _ = solved(torch.zeros(shape), changed, solver)
    small, _ = solved(torch.zeros(shape), [e * 2.0**-90 for e in changed], solver)
    assert torch.equal(small, large * 2.0**-90)


def test_experts_that_leave_a_singular_matrix_are_solved_by_its_spectrum():
    torch.manual_seed(0)
    first, second = torch.randn(2, 40, 100)
    changed = [first, first, second]
    result, facts = solved(torch.zeros(40, 100), changed, "exact")
    assert facts["escalation"] == "float64, spectrum cut"
    assert facts["kept_rank"] == 80
    assert relative_error(result, exact(torch.zeros(40, 100), changed)) <= 1e-6


@pytest.mark.parametrize("solver", ["ridge", "exact"])
@pytest.mark.parametrize(("rows", "form"), [(60, "primal"), (12, "dual")])
def test_columns_that_no_expert_changed_stay_the_base_s(rows, form, solver):
    base, changed = experts("sft", rows, 96, 3)
    for expert in changed:
        expert[:, 10:50] = base[:, 10:50]
    result, facts = solved(base, changed, solver)
    assert not result[:, 10:50].any()
    assert facts["form"] == form
    reference = with_ridge(base, changed, 0.1) if solver == "ridge" else exact(base, changed)
    assert relative_error(result, reference) <= 1e-4


def test_the_exact_solver_counts_changed_columns_before_it_goes_dual():
    base, changed = experts("sft", 30, 100, 3)
    for expert in changed:
        expert[:, 80:] = base[:, 80:]
    result, facts = solved(base, changed, "exact")
    assert facts["form"] == "primal"
    assert relative_error(result, exact(base, changed)) <= 1e-3


def test_experts_without_a_change_do_not_count_towards_the_form():
    base, changed = experts("sft", 60, 150, 2)
    result, facts = solved(base, [base, *changed, base.clone()], "ridge")
    assert facts["form"] == "dual"
    assert relative_error(result, with_ridge(base, changed, 0.1)) <= 1e-5


@pytest.mark.parametrize("ridge", [1e-7, 1e-9])
def test_a_ridge_too_small_for_float32_is_solved_in_float64(ridge):
    base, changed = experts("low_rank", 200, 128, 3)
    result, facts = solved(base, changed, "ridge", ridge)
    assert facts["escalation"] == "float64"
    assert relative_error(result, with_ridge(base, changed, ridge)) <= 1e-5


def test_a_ridge_too_small_for_float64_is_an_error_not_a_larger_ridge():
    torch.manual_seed(0)
    changed = [torch.randn(50, 1) @ torch.randn(1, 50) for _ in range(3)]
    with pytest.raises(MergeError, match=r"`layer.weight`.*ridge 1e-40 is not positive definite") as raised:
        solved(torch.zeros(50, 50), changed, "ridge", 1e-40)
    assert "Raise `ridge`" in raised.value.hint


@pytest.mark.parametrize("solver", ["ridge", "pinv", "exact"])
@pytest.mark.parametrize("shape", [(64, 48), (10, 100)], ids=str)
def test_a_nan_is_an_error_not_a_result(shape, solver):
    base, changed = experts("sft", *shape, 3)
    changed[1][3, 4] = torch.nan
    with pytest.raises(MergeError, match=rf"expert 1 holds NaN at element {3 * shape[1] + 4}"):
        solved(base, changed, solver)


@pytest.mark.parametrize("solver", ["ridge", "pinv", "exact"])
def test_transposed_views_are_solved_as_their_copies(solver):
    base, changed = experts("sft", 40, 70, 3)
    views = [e.mT for e in changed]
    result, _ = solved(base.mT, views, solver)
    copies, _ = solved(base.mT.contiguous(), [v.contiguous() for v in views], solver)
    assert torch.equal(result, copies)


def test_a_passing_solution_notes_what_ran():
    base, changed = experts("sft", 64, 48, 3)
    _, facts = solved(base, changed, "ridge")
    energy = sum(((e.double() - base.double()) ** 2).sum().item() for e in changed)
    assert facts["ridge_lambda"] == pytest.approx(0.1 * energy / 48, rel=1e-12)
    assert (facts["solver"], facts["form"], facts["escalation"]) == ("ridge", "primal", "none")
    assert 0 < facts["certificate"] < 1e-4
    _, facts = solved(base, changed, "exact")
    assert facts["kept_rank"] == 48


def test_the_experts_are_read_once_in_the_dual_form_and_twice_in_the_primal():
    for rows, passes in ((20, 1), (60, 2)):
        deltas = CountingDeltas(*experts("sft", rows, 64, 3))
        solve_normal_equations(deltas, solver="ridge", ridge=0.1)
        assert deltas.passes == passes


def test_where_only_one_changed_a_second_pass_is_not_made():
    base, changed = experts("sft", 60, 64, 1)
    deltas = CountingDeltas(base, [base, *changed])
    assert torch.equal(solve_normal_equations(deltas, solver="ridge", ridge=0.1), changed[0].float() - base.float())
    assert deltas.passes == 1


@pytest.mark.parametrize("size", [40, 300])
@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_a_ridge_planned_for_in_float32_alone_is_solved_in_float32(size, noise):
    torch.manual_seed(0)
    direction = torch.randn(1, size)
    changed = [torch.randn(size, 1) @ direction + noise * torch.randn(size, size) for _ in range(3)]
    _, facts = solved(torch.zeros(size, size), changed, "ridge", 8.01 * size * EPS32)
    assert facts["escalation"] == "none"


@pytest.mark.parametrize("solver", ["ridge", "exact"])
@pytest.mark.parametrize("shape", [(96, 160, 3), (40, 160, 3)], ids=str)
def test_a_solution_does_not_depend_on_the_number_of_threads(shape, solver):
    base, changed = experts("sft", *shape)
    torch.set_num_threads(2)
    two, _ = solved(base, changed, solver)
    torch.set_num_threads(1)
    one, _ = solved(base, changed, solver)
    assert torch.equal(one, two)
