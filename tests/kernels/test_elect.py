import pytest
import torch

from streammerge_kernels import elect, elect_triton
from streammerge_kernels.magnitude import MagnitudeSelect, trim_
from tests.kernels.devices import DEVICE

BOTH = [pytest.param(elect, id="reference"), pytest.param(elect_triton, id="twin")]
WEIGHTS = [0.3, 0.9, 1 / 3, 0.5]


def deltas(shape, experts):
    """Multiples of 2⁻¹⁰, which add up exactly: many votes are 0, and many entries are."""
    torch.manual_seed(experts)
    return (torch.randn(experts, *shape, device=DEVICE) * 2).round() / 1024


def plainly(changes, weights, *, majority="mass", zero=1.0, normalize=True):
    """Entry by entry, in float64 from the rounded products."""
    weights = torch.tensor(weights, device=DEVICE).view(-1, *[1] * (changes.ndim - 1))
    products = (changes * weights).double()
    votes = (products if majority == "mass" else products.sign()).sum(0)
    elected = torch.where(votes == 0, float(zero), votes.sign())
    agrees = products.sign() == torch.where(elected == 0, torch.nan, elected)
    total = (products * agrees).sum(0)
    divisor = (weights.double() * agrees).sum(0)
    return total / torch.where(divisor == 0, 1.0, divisor) if normalize else total


def trimmed(change, keep):
    change = torch.tensor(change, device=DEVICE)
    select = MagnitudeSelect(keep, DEVICE)
    for turn in range(2):
        select.count(change)
        if turn == 0:
            select.narrow()
    return trim_(change, select.cut)


@pytest.mark.parametrize("normalize", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("zero", [1, 0, -1], ids=["plus", "none", "minus"])
@pytest.mark.parametrize("majority", ["mass", "count"])
@pytest.mark.parametrize("experts", [1, 2, 3, 4])
def test_what_agrees_with_the_vote_is_merged(experts, majority, zero, normalize):
    options = {"majority": majority, "zero": zero, "normalize": normalize}
    changes = deltas((13, 50), experts)
    # a power of 2: float32's votes are then 0 exactly where float64's are
    weights = [0.25] * experts
    truth = plainly(changes, weights, **options)
    ours = elect.elect(changes, weights, **options)
    assert (ours.double() - truth).abs().max() <= 1e-6 * truth.abs().max()
    assert torch.equal(elect_triton.elect(changes, weights, **options), ours)


@pytest.mark.parametrize("shape", [(1,), (7,), (33, 65), (3, 1024)], ids=str)
def test_the_twin_gives_the_references_bits_for_uneven_weights(shape):
    changes = deltas(shape, 4)
    assert torch.equal(elect_triton.elect(changes, WEIGHTS), elect.elect(changes, WEIGHTS))
    for majority in ("mass", "count"):
        balance = elect_triton.vote_balance(changes, WEIGHTS, majority=majority)
        assert balance.dtype == torch.int64
        assert balance.item() == elect.vote_balance(changes, WEIGHTS, majority=majority).item()


@pytest.mark.parametrize("module", BOTH)
def test_opposite_changes_of_one_weight_cancel_exactly(module):
    change = torch.full((5,), 1 / 3, device=DEVICE)
    pair = torch.stack([change, -change])
    # fused, the vote would be what rounding left of 0.3 / 3, and elect its sign
    assert not module.elect(pair, [0.3, 0.3], zero=0).any()
    assert module.vote_balance(pair, [0.3, 0.3]).item() == 0


@pytest.mark.parametrize("module", BOTH)
@pytest.mark.parametrize(
    ("first", "second", "keep", "expected"),
    [
        ([2.0, 1.0], [-3.0, 4.0], 2, [-3.0, 2.5]),
        ([0.1, 5.0, 0.2, 4.0], [6.0, 0.3, 7.0, 0.4], 2, [6.0, 5.0, 7.0, 4.0]),
        ([0.1, 5.0], [0.2, 6.0], 1, [0.0, 5.5]),
    ],
)
def test_ties_of_the_papers_code_gives_its_own_tests_values(first, second, keep, expected, module):
    changes = torch.stack([trimmed(first, keep), trimmed(second, keep)])
    assert module.elect(changes, [1.0, 1.0], zero=0).tolist() == expected


@pytest.mark.parametrize("module", BOTH)
def test_ties_of_mergekit_by_hand(module):
    first = trimmed([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], 3)
    second = trimmed([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]], 3)
    assert module.elect(torch.stack([first, second]), [1.0, 1.0]).tolist() == [[2.0, 1.0, 0.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("module", BOTH)
def test_where_a_vote_is_zero_the_whole_models_balance_decides(module):
    changes = torch.tensor([[-1.0, -2.0, 1.0], [1.0, -2.0, 1.0]], device=DEVICE)
    balance = module.vote_balance(changes, [1.0, 1.0]) + module.vote_balance(-changes[:, 1:], [1.0, 1.0])
    assert balance.item() == 0
    for total, expected in ((balance - 3, -1.0), (balance + 2, 1.0), (balance, 0.0)):
        assert module.elect(changes, [1.0, 1.0], zero=total.sign()).tolist() == [expected, -2.0, 1.0]


@pytest.mark.parametrize("module", BOTH)
def test_counts_and_masses_elect_differently(module):
    changes = torch.tensor([[3.0], [-1.0], [-1.0]], device=DEVICE)
    assert module.elect(changes, [1.0] * 3).tolist() == [3.0]
    assert module.elect(changes, [1.0] * 3, majority="count").tolist() == [-1.0]
    assert module.elect(changes, [1.0] * 3, majority="count", normalize=False).tolist() == [-2.0]


@pytest.mark.parametrize("module", BOTH)
def test_nan_stays_and_changes_no_other_entry(module):
    changes = deltas((40,), 3)
    expected = module.elect(changes, [1.0] * 3)
    changes[1, 7] = torch.nan
    merged = module.elect(changes, [1.0] * 3)
    assert merged.isnan().nonzero().tolist() == [[7]]
    merged[7] = expected[7]
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("module", BOTH)
def test_views_and_sequences_are_merged_as_their_stacked_copies(module):
    changes = deltas((30, 20), 3)
    expected = module.elect(changes.mT.contiguous(), WEIGHTS[:3])
    assert torch.equal(module.elect(changes.mT, WEIGHTS[:3]), expected)
    assert torch.equal(module.elect(list(changes.mT), WEIGHTS[:3]), expected)
    strided = changes[:, ::2, ::3]
    assert torch.equal(module.elect(strided, WEIGHTS[:3]), module.elect(strided.contiguous(), WEIGHTS[:3]))


@pytest.mark.parametrize("module", BOTH)
def test_empty_deltas_merge_to_nothing(module):
    changes = deltas((0, 4), 2)
    assert module.elect(changes, [1.0, 1.0]).shape == (0, 4)
    assert module.vote_balance(changes, [1.0, 1.0]).item() == 0


def test_long_deltas_are_merged_as_their_parts(monkeypatch):
    changes = deltas((1000,), 3)
    whole, balance = elect.elect(changes, WEIGHTS[:3]), elect.vote_balance(changes, WEIGHTS[:3])
    monkeypatch.setattr(elect, "_CHUNK", 64)
    assert torch.equal(elect.elect(changes, WEIGHTS[:3]), whole)
    assert elect.vote_balance(changes, WEIGHTS[:3]).item() == balance.item()


def test_weights_that_cancel_leave_the_sum():
    changes = torch.tensor([[1.0], [-1.0]], device=DEVICE)
    for module in (elect, elect_triton):
        assert module.elect(changes, [1.0, -1.0]).tolist() == [2.0]
