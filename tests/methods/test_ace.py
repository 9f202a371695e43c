import math

import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.errors import MergeError
from streammerge.methods.ace import ace
from streammerge.solve import ace as solution
from streammerge.solve.cost_covariance import ace as price
from tests.solve.changes import CountingDeltas, experts, most_held, relative_error

WIDE = torch.tensor([[[2.0, 0, 0], [0, 1, 0]], [[0, 1, 0], [1, 0, 1]]]).double()
TALL = torch.tensor([[[1.0, 2], [3, 4], [5, 6]], [[2, -1], [0, 1], [1, 1]], [[0, 1], [1, 0], [-1, 2]]]).double()
# a dual, a tall, a wide primal and a nearly square system
SHAPES = [(6, 30, 3), (30, 11, 3), (12, 30, 3), (16, 16, 4)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def merged(changes, **parameters):
    return ace(TensorDeltas(torch.zeros_like(changes[0]), list(changes)), **parameters)


def random(count, rows, columns, *, unlike=False, seed=0):
    sizes = torch.logspace(0, 1 if unlike else 0.05, count, dtype=torch.float64)[:, None, None]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rows, columns, dtype=torch.float64, generator=generator) * sizes + 0.3 * sizes


def by_the_paper(changes, epsilon, k_frac=0.3, threshold=0.3):
    """The paper's five stages, as it writes them, with a general inverse."""
    count, rows, columns = changes.shape
    eye = torch.eye(columns, dtype=torch.float64)
    traces = changes.square().sum((1, 2))
    logs = (traces + 1e-12).log()
    flagged = bool(logs.var() / (logs.mean() ** 2 + 1e-12) > threshold)
    centered = changes - changes.mean(1, keepdim=True)
    grams = centered.mT @ centered
    q = grams.diagonal(dim1=1, dim2=2).sum(1) + 1e-12
    ridges = epsilon / q if flagged else torch.full((count,), epsilon).double()
    grams = grams / q[:, None, None] if flagged else grams
    prior = grams.sum(0).mean(0, keepdim=True) / (traces.mean() + 1e-12 if flagged else 1.0)
    shifted = grams + ridges[:, None, None] * eye
    before = (centered @ shifted).sum(0) @ torch.linalg.inv(shifted.sum(0) + prior.expand(columns, -1))
    if not flagged:
        return before
    rest = (changes @ (grams - shifted.mean(0))).sum(0)
    u, s, vh = torch.linalg.svd(rest + before, full_matrices=False)
    top = int(min(rows, columns) * k_frac)
    return before + s[:top].mean() * u[:, :top] @ vh[:top]


@pytest.mark.parametrize(
    ("changes", "spread", "expected"),
    [
        (WIDE, 0.071164, [[1.549947, 0.449974, -2.449895], [-1.549947, -0.449974, 2.449895]]),
        (TALL, 0.257495, [[-0.453432, -1.522058], [0.061274, -0.046569], [0.392157, 1.568627]]),
    ],
    ids=["wide", "tall"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_ace_reaches_the_worked_examples_of_the_paper_s_formula(changes, spread, expected, dtype):
    deltas = TensorDeltas(torch.zeros_like(changes[0], dtype=dtype), list(changes.to(dtype)))
    result = ace(deltas, compat="paper")
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), torch.tensor(expected).double(), atol=2e-6, rtol=0)
    assert deltas.facts["spread"] == pytest.approx(spread, abs=1e-6)
    assert not deltas.facts["refined"]


@every_shape
@pytest.mark.parametrize("unlike", [False, True], ids=["alike", "unlike"])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-2])
def test_compat_paper_is_the_paper_s_formula(shape, unlike, epsilon):
    changes = random(shape[2], *shape[:2], unlike=unlike) * 0.1
    truth = by_the_paper(changes, epsilon)
    deltas = TensorDeltas(torch.zeros_like(changes[0]), list(changes))
    assert relative_error(ace(deltas, epsilon=epsilon, compat="paper"), truth) <= 1e-6, deltas.facts
    forced = ace(deltas, epsilon=epsilon, compat="paper", threshold=0.0)
    assert relative_error(forced, by_the_paper(changes, epsilon, threshold=0.0)) <= 1e-6, deltas.facts
    assert deltas.facts["refined"]


@every_shape
def test_float32_deltas_are_merged_in_float64(shape):
    changes = random(shape[2], *shape[:2], unlike=True).float()
    assert relative_error(merged(changes), merged(changes.double())) <= 1e-6


@every_shape
@pytest.mark.parametrize("threshold", [0.0, 1e9], ids=["refined", "plain"])
def test_the_primal_and_the_dual_form_agree(shape, threshold, monkeypatch):
    changes = random(shape[2], *shape[:2], unlike=True)
    ours = merged(changes, threshold=threshold)
    monkeypatch.setattr(solution, "form", lambda experts, rows, columns: "primal")
    assert relative_error(merged(changes, threshold=threshold), ours) <= 1e-9


@every_shape
@pytest.mark.parametrize("unlike", [False, True], ids=["alike", "unlike"])
def test_in_units_of_the_mean_square_norm_ours_is_the_paper_s(shape, unlike):
    changes = random(shape[2], *shape[:2], unlike=unlike)
    unit = changes.square().sum((1, 2)).mean().sqrt()
    flagged = 0.0 if unlike else 1e9
    truth = by_the_paper(changes / unit, 1e-5, threshold=flagged) * unit
    assert relative_error(merged(changes, threshold=flagged), truth) <= 1e-6


@every_shape
@pytest.mark.parametrize("unlike", [False, True], ids=["alike", "unlike"])
def test_ours_scales_with_the_deltas_and_the_paper_s_does_not(shape, unlike):
    changes = random(shape[2], *shape[:2], unlike=unlike)
    for factor in (1e-6, 3.0, 1e5):
        assert relative_error(merged(changes * factor) / factor, merged(changes)) <= 1e-7
    paper = merged(changes, compat="paper")
    assert relative_error(merged(changes * 1e-4, compat="paper") / 1e-4, paper) > 1e-2


@every_shape
def test_experts_that_changed_nothing_are_ignored_by_ours_and_explode_the_paper_s(shape):
    changes = random(shape[2], *shape[:2])
    with_idle = torch.cat([changes[:1], torch.zeros_like(changes[:1]), changes[1:]])
    assert relative_error(merged(with_idle), merged(changes)) <= 1e-12
    exploded = merged(with_idle, compat="paper")
    assert exploded.norm() > 1e4 * changes.norm()
    assert relative_error(exploded, by_the_paper(with_idle, 1e-5)) <= 1e-6


def test_an_expert_that_nearly_changed_nothing_does_not_explode_either():
    changes = random(3, 12, 30)
    changes[1] *= 1e-8
    result = merged(changes)
    assert result.norm() <= 3 * changes.norm()


@pytest.mark.parametrize("idle", [0, 1])
def test_rows_changed_all_alike_leave_nothing_to_centre(idle):
    changes = random(3, 12, 8)
    constant = torch.ones(1, 12, 8).double() * torch.arange(8)
    with_constant = torch.cat([changes, constant, torch.zeros(idle, 12, 8).double()])
    assert relative_error(merged(with_constant, threshold=1e9), merged(with_constant[:4], threshold=1e9)) <= 1e-12
    # of one row, and of equal rows alone, the mean remains
    assert relative_error(merged(changes[:, :1]), changes[:, :1].mean(0)) <= 1e-12
    assert relative_error(merged(constant.expand(2, -1, -1)), constant[0]) <= 1e-12
    assert not merged(changes[:, :1], compat="paper").any()


def test_where_no_expert_changed_anything_the_delta_is_exactly_zero():
    for compat in ("none", "paper"):
        assert not ace(TensorDeltas(torch.ones(5, 7), [torch.ones(5, 7)] * 3), compat=compat).any()


@every_shape
def test_the_order_of_the_experts_does_not_matter(shape):
    changes = random(shape[2], *shape[:2], unlike=True)
    assert relative_error(merged(changes.flip(0)), merged(changes)) <= 1e-9


def test_one_expert_and_its_copies_do_not_come_back():
    change = random(1, 16, 12)
    assert relative_error(merged(change), change[0]) > 0.02
    assert relative_error(merged(change.expand(3, -1, -1)), change[0]) > 0.02


def test_ace_does_not_turn_with_its_outputs_or_inputs():
    changes = random(3, 12, 12)
    turn = torch.linalg.qr(random(1, 12, 12, seed=5)[0])[0]
    assert relative_error(merged(turn @ changes), turn @ merged(changes)) > 1e-3
    assert relative_error(merged(changes @ turn), merged(changes) @ turn) > 1e-3


def test_one_direction_at_least_is_refined():
    changes = random(2, 2, 3, unlike=True)
    assert merged(changes, threshold=0.0).isfinite().all()


def test_a_nan_is_an_error():
    changes = random(2, 5, 6)
    changes[1, 2, 3] = math.nan
    with pytest.raises(MergeError, match="expert 1 holds NaN at element 15"):
        merged(changes)


@pytest.mark.parametrize("threshold", [0.0, 1e9], ids=["refined", "plain"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (40, 300), (300, 40), (32, 512), (1, 7), (7, 1)], ids=str)
def test_ace_takes_no_more_workspace_than_priced(shape, threshold):
    base, changed = experts("sft", *shape, 4)
    for family in (changed, [base, changed[1], base, changed[2]]):
        for dtype in (torch.bfloat16, torch.float64):
            deltas = CountingDeltas(base.to(dtype), [e.to(dtype) for e in family])
            ace(deltas, threshold=threshold)
            priced = price(shape, 4, {}, deltas.dtype.itemsize)
            assert deltas.taken <= priced.workspace_bytes - (8 << 20)
            assert deltas.passes <= priced.passes + deltas.facts.get("refined", False)


@pytest.mark.parametrize("threshold", [0.0, 1e9], ids=["refined", "plain"])
@pytest.mark.parametrize("shape", [(384, 640), (128, 600), (640, 300)], ids=str)
def test_all_memory_of_ace_lies_within_its_price(shape, threshold):
    base, changed = experts("sft", *shape, 3)
    held = most_held(lambda: ace(CountingDeltas(base, changed), threshold=threshold))
    assert held <= price(shape, 3, {}, 4).workspace_bytes
