import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.solve.cuts import CutSearch


def searched(tensors, keep, equals, block):
    """The cut of named tensors [n] that are shown in blocks."""
    search = CutSearch(lambda elements: keep, equals=equals, device=torch.device("cpu"))
    for number in range(3 if equals == "first" else 2):
        for name, values in tensors.items():
            for first in range(0, len(values), block):
                search.look(number, values[first : first + block].float(), name, first)
        search.finish(number)
    return search.cut


def kept(tensors, cut, block):
    """What the cut leaves, the last block first."""
    left = {}
    for name, values in tensors.items():
        out = values.clone()
        for first in reversed(range(0, len(out), block)):
            cut.keep_(out[first : first + block], name, first)
        left[name] = out
    return left


def sorted_reference(values, keep, equals):
    """Keep by a stable sort, which leaves the lowest index first among equals."""
    order = torch.sort(values.abs(), descending=True, stable=True).indices
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[order[:keep]] = True
    if equals == "all" and keep:
        mask |= values.abs() >= values.abs()[order[keep - 1]]
    return torch.where(mask, values, torch.zeros_like(values))


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    split=st.integers(0, 40),
    keep=st.integers(0, 45),
    block=st.integers(1, 17),
    equals=st.sampled_from(["first", "all"]),
)
@settings(max_examples=200, deadline=None)
def test_the_largest_magnitudes_are_kept_of_equals_the_first(values, split, keep, block, equals):
    whole = torch.tensor(values, dtype=torch.float32) / 8
    tensors = {name: part for name, part in (("b", whole[:split]), ("a", whole[split:])) if len(part)}
    left = kept(tensors, searched(tensors, keep, equals, block), block)
    expected = sorted_reference(whole, min(keep, len(whole)), equals)
    assert torch.equal(torch.cat(list(left.values())), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [1, 137, 999, 1000])
def test_magnitudes_of_any_size_are_told_apart(keep, dtype):
    torch.manual_seed(keep)
    values = (torch.randn(1000).sign() * torch.logspace(-44, 38, 1000)[torch.randperm(1000)]).to(dtype)
    cut = searched({"a": values}, keep, "first", 300)
    assert torch.equal(kept({"a": values}, cut, 77)["a"], sorted_reference(values, keep, "first"))


def test_float64_is_ranked_as_float32_holds_it():
    values = torch.tensor([1.0, 1.0 + 1e-12, 2.0], dtype=torch.float64)
    cut = searched({"a": values}, 2, "first", 3)
    assert kept({"a": values}, cut, 3)["a"].tolist() == [1.0, 0.0, 2.0]


def test_nothing_is_kept_of_nothing_wanted_and_zeros_stay_zeros():
    values = torch.tensor([3.0, -4.0, 0.0])
    assert not kept({"a": values}, searched({"a": values}, 0, "first", 2), 2)["a"].any()
    assert torch.equal(kept({"a": values}, searched({"a": values}, 3, "first", 2), 2)["a"], values)
    zeros = torch.zeros(5)
    assert not kept({"a": zeros}, searched({"a": zeros}, 2, "first", 2), 2)["a"].any()


def test_a_cut_is_known_after_all_passes_only():
    search = CutSearch(lambda elements: 1, equals="first", device=torch.device("cpu"))
    search.look(0, torch.ones(3), "a", 0)
    search.finish(0)
    with pytest.raises(AssertionError, match="not all passes"):
        _ = search.cut
