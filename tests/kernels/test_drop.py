import hashlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge_kernels import drop, drop_triton
from streammerge_kernels.round import key, philox
from tests.kernels.devices import DEVICE

KEY = {"seed": 5, "name": "model.layers.3.self_attn.q_proj.weight", "expert": "math"}


def kept(shape, density=0.5, *, module=drop, **options):
    return module.keep_mask(shape, density=density, device=DEVICE, **{**KEY, **options})


@pytest.mark.parametrize("density", [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0], ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (33, 65), (3, 5000)], ids=str)
def test_the_twin_keeps_the_same_entries(shape, density):
    out = torch.empty(shape, dtype=torch.uint8, device=DEVICE).fill_(1).view(torch.bool)
    returned = kept(shape, density, module=drop_triton, out=out)
    assert returned is out
    assert torch.equal(out, kept(shape, density))


@pytest.mark.parametrize("first_index", [1, 6, 8, 2**31 - 3, 2**34 + 7])
def test_the_twin_counts_from_where_a_run_lies(first_index):
    assert torch.equal(kept((900,), first_index=first_index, module=drop_triton), kept((900,), first_index=first_index))


@given(cuts=st.lists(st.integers(0, 500), max_size=4), first=st.integers(0, 2**34))
@settings(max_examples=20, deadline=None)
def test_a_mask_does_not_depend_on_how_a_tensor_is_cut(cuts, first):
    whole = kept((500,), first_index=first)
    edges = [0, *sorted(cuts), 500]
    assert torch.equal(torch.cat([kept((b - a,), first_index=first + a) for a, b in pairwise(edges)]), whole)


def test_a_mask_longer_than_a_chunk_is_that_of_its_parts(monkeypatch):
    whole = kept((1000,), first_index=3)
    monkeypatch.setattr(drop, "_CHUNK", 70)
    assert torch.equal(kept((1000,), first_index=3), whole)


def test_an_element_takes_its_word_of_its_block():
    words = philox(torch.tensor([2]), drop.drop_key(*KEY.values()))
    expected = [int(word) < 0.3 * 2**32 for word in words]
    assert kept((4,), 0.3, first_index=8).tolist() == expected


def test_masks_are_the_same_on_every_machine():
    mask = kept((4096,), 0.5).cpu().numpy().tobytes()
    assert hashlib.sha256(mask).hexdigest()[:16] == "44e9ed81b5b03fd6"


@pytest.mark.parametrize("module", [drop, drop_triton], ids=["reference", "twin"])
def test_no_density_keeps_nothing_and_full_density_everything(module):
    assert not kept((3, 333), 0.0, module=module).any()
    assert kept((3, 333), 1.0, module=module).all()


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_as_many_are_kept_as_the_density_says(density):
    count = 1 << 17
    share = kept((count,), density).double().mean().item()
    assert abs(share - density) < 4 * (density * (1 - density) / count) ** 0.5


def test_seed_tensor_and_expert_each_give_another_mask():
    masks = [kept((200,)), kept((200,), seed=6), kept((200,), name="other"), kept((200,), expert="code")]
    assert len({tuple(mask.tolist()) for mask in masks}) == 4


def test_masks_and_rounding_share_no_key():
    assert drop.drop_key(0, "w", "math") != key(0, "w")
    assert drop.drop_key(0, "b", "a") != drop.drop_key(0, "", "ab")


def test_a_larger_density_keeps_what_a_smaller_kept():
    few, many = kept((500,), 0.2), kept((500,), 0.6)
    assert bool((many >= few).all())


@pytest.mark.parametrize("module", [drop, drop_triton], ids=["reference", "twin"])
def test_an_empty_mask_is_nothing(module):
    assert kept((0, 3), module=module).shape == (0, 3)


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")], ids=str)
def test_a_density_outside_0_to_1_is_refused(density):
    with pytest.raises(AssertionError, match="expected 0 to 1"):
        kept((3,), density)
