from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge_kernels import magnitude, magnitude_triton
from tests.kernels.devices import DEVICE

BOTH = [pytest.param(magnitude, id="reference"), pytest.param(magnitude_triton, id="twin")]
KINDS = ["fine", "coarse", "bf16", "equal", "zero", "signs"]


def entries(shape, kind="fine"):
    torch.manual_seed(0)
    values = torch.randn(shape, device=DEVICE) * 1e-3
    if kind == "coarse":
        return (values * 4000).round() / 4096
    if kind == "bf16":
        return values.bfloat16().float()
    if kind == "equal":
        return torch.full(shape, 0.25, device=DEVICE)
    if kind == "signs":
        return torch.where(values > 0, 0.5, -0.5)
    return values * 0 if kind == "zero" else values


def cut(module, blocks, keep):
    select = magnitude.MagnitudeSelect(keep, DEVICE)
    for block in blocks:
        module.count_magnitudes_(select._counts, block)
    select.narrow()
    for block in blocks:
        module.count_magnitudes_(select._counts, block, prefix=select._prefix)
    return select.cut


def sorted_kept(values, keep):
    """The mask of the largest, of equal ones the first."""
    order = torch.sort(values.abs().view(-1), descending=True, stable=True).indices[:keep]
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=DEVICE)
    mask[order] = True
    return mask.view(values.shape)


@pytest.mark.parametrize("module", BOTH)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0, 1, 150, 999, 1000, 5000])
def test_exactly_the_largest_are_kept_and_of_equal_ones_the_first(keep, kind, module):
    values = entries((20, 50), kind)
    expected = torch.where(sorted_kept(values, keep), values, 0.0)
    assert torch.equal(module.trim_(values.clone(), cut(module, [values], keep)), expected)


@pytest.mark.parametrize("module", BOTH)
@pytest.mark.parametrize("kind", KINDS)
def test_a_threshold_is_the_kth_largest_magnitude(kind, module):
    values = entries((701,), kind)
    found = cut(module, [values], 70)
    largest = values.abs().sort(descending=True).values
    assert found.magnitude.item() == largest[69].item()
    assert found.ties.item() == int((largest[:70] == largest[69]).sum())
    assert found.ties.dtype == torch.int64
    assert found.ties.shape == found.pattern.shape == ()


@pytest.mark.parametrize("module", BOTH)
@given(cuts=st.lists(st.integers(0, 300), max_size=2), keep=st.integers(0, 301))
@settings(max_examples=5, deadline=None)
def test_many_tensors_are_trimmed_as_one(module, cuts, keep):
    values = entries((300,), "coarse")
    edges = [0, *sorted(cuts), 300]
    blocks = [values[a:b].clone() for a, b in pairwise(edges)]
    found = cut(module, blocks, keep)
    for block in blocks:
        module.trim_(block, found)
    assert torch.equal(torch.cat(blocks), torch.where(sorted_kept(values, keep), values, 0.0))
    assert found.ties.item() == 0 or keep > 300


@pytest.mark.parametrize("shape", [(1,), (5,), (33, 65), (3, 2048)], ids=str)
@pytest.mark.parametrize("kind", ["fine", "bf16"])
def test_histograms_of_the_twin_are_the_references(kind, shape):
    values = entries(shape, kind)
    start = torch.arange(magnitude.HIGH_BINS, device=DEVICE)
    high = magnitude.count_magnitudes_(start.clone(), values)
    assert (high - start).sum().item() == values.numel()
    assert torch.equal(magnitude_triton.count_magnitudes_(start.clone(), values), high)
    prefix = (high - start).argmax()
    low = [
        module.count_magnitudes_(
            torch.ones(magnitude.LOW_BINS, dtype=torch.int64, device=DEVICE), values, prefix=prefix
        )
        for module in (magnitude, magnitude_triton)
    ]
    assert torch.equal(*low)
    assert low[0].sum().item() - magnitude.LOW_BINS == (high - start)[prefix].item()


@pytest.mark.parametrize("module", BOTH)
def test_cuts_of_one_selection_count_their_ties_apart(module):
    values = entries((100,), "equal")
    select = magnitude.MagnitudeSelect(30, DEVICE)
    select.count(values)
    select.narrow()
    select.count(values)
    for _ in range(2):
        assert int(module.trim_(values.clone(), select.cut).count_nonzero()) == 30


@pytest.mark.parametrize("module", BOTH)
def test_infinities_and_nan_are_the_largest_and_stay(module):
    values = torch.tensor([1.0, -torch.inf, 2.0, torch.nan, 3.0], device=DEVICE)
    trimmed = module.trim_(values.clone(), cut(module, [values], 3))
    assert trimmed.isfinite().tolist() == [True, False, True, False, True]
    assert trimmed[::2].tolist() == [0.0, 0.0, 3.0]


@pytest.mark.parametrize("module", BOTH)
def test_views_are_counted_and_trimming_one_is_refused(module):
    values = entries((30, 40))
    counts = [
        module.count_magnitudes_(torch.zeros(1 << 15, dtype=torch.int64, device=DEVICE), v) for v in (values, values.mT)
    ]
    assert torch.equal(*counts)
    with pytest.raises(AssertionError, match="contiguous"):
        magnitude.trim_(values.mT, cut(module, [values], 5))


@pytest.mark.parametrize("module", BOTH)
def test_empty_blocks_add_nothing(module):
    empty = entries((0, 4))
    assert module.trim_(empty, cut(module, [empty, entries((3,)), empty], 2)).shape == (0, 4)


def test_long_tensors_are_counted_and_trimmed_as_their_parts(monkeypatch):
    values = entries((1000,), "coarse")
    whole = magnitude.trim_(values.clone(), cut(magnitude, [values], 333))
    monkeypatch.setattr(magnitude, "_CHUNK", 70)
    assert torch.equal(magnitude.trim_(values.clone(), cut(magnitude, [values], 333)), whole)


def test_a_selection_of_one_pass_has_no_cut():
    select = magnitude.MagnitudeSelect(3)
    with pytest.raises(AssertionError, match="one pass"):
        select.cut  # noqa: B018
