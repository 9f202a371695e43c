import hashlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge_kernels.round import draws, key, philox, round_to

NARROW = [torch.bfloat16, torch.float16]


def stochastic(values, dtype, *, seed=0, name="w", first_index=0, out=None):
    return round_to(values, dtype, rounding="stochastic", seed=seed, name=name, first_index=first_index, out=out)


def test_philox_gives_the_published_words():
    def words(counter, words):
        return [f"{int(w):08x}" for w in philox(torch.tensor([counter]), words)]

    assert words(0, (0, 0)) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_the_upper_counter_word_and_both_key_words_count():
    def first(counter, words):
        return int(philox(torch.tensor([counter]), words)[0])

    results = {first(0, (0, 0)), first(1 << 32, (0, 0)), first(0, (1, 0)), first(0, (0, 1))}
    assert len(results) == 4


def test_an_element_takes_its_half_of_its_block_wherever_a_run_starts():
    words = [int(w) for w in philox(torch.tensor([1]), (3, 4))]
    expected = [half for w in words for half in (w & 0xFFFF, w >> 16)]
    assert draws((3, 4), 8, 8).tolist() == expected
    assert draws((3, 4), 11, 3).tolist() == expected[3:6]


def test_a_key_depends_on_seed_and_name_only():
    assert key(1, "a") == key(1, "a")
    assert len({key(1, "a"), key(2, "a"), key(1, "b"), key(-1, "a")}) == 4


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [(torch.bfloat16, "2b52cf42a0a04541"), (torch.float16, "a497c3c523548304")],
    ids=["bf16", "fp16"],
)
def test_rounding_draws_the_same_bits_on_every_machine(dtype, digest):
    values = torch.arange(1, 4097, dtype=torch.float32) / 4099
    rounded = stochastic(values, dtype, seed=7, name="model.layers.0.mlp.down_proj.weight")
    assert hashlib.sha256(rounded.view(torch.int16).numpy().tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
@given(cuts=st.lists(st.integers(0, 1000), max_size=5), first=st.integers(0, 2**34))
@settings(max_examples=25, deadline=None)
def test_stochastic_rounding_does_not_depend_on_how_a_tensor_is_cut(dtype, cuts, first):
    values = torch.linspace(-2, 3, 1000)
    whole = stochastic(values, dtype, first_index=first)
    edges = [0, *sorted(cuts), 1000]
    parts = [stochastic(values[a:b], dtype, first_index=first + a) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
def test_a_tensor_longer_than_a_chunk_is_rounded_as_its_parts(dtype):
    values = torch.linspace(0.1, 0.2, 70_001)
    whole = stochastic(values, dtype, first_index=5)
    assert torch.equal(whole[50_000:], stochastic(values[50_000:], dtype, first_index=50_005))


@pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
@pytest.mark.parametrize("value", [1.0 + 2.0**-11 / 3, -0.3, 3.1e-5, 1e-7, -70.03, 5e-6])
def test_stochastic_rounding_keeps_the_mean(dtype, value):
    count = 1 << 17
    exact = torch.full((), value, dtype=torch.float32)
    rounded = stochastic(exact.expand(count).contiguous(), dtype).double()
    low, high = rounded.min().item(), rounded.max().item()
    assert low <= exact.item() <= high
    spacing = high - low
    assert abs(rounded.mean().item() - exact.item()) < 4 * 0.5 * spacing / count**0.5


@pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
@given(value=st.floats(-60000, 60000, width=32), index=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_stochastic_rounding_goes_to_one_of_the_two_neighbours(dtype, value, index):
    exact = torch.tensor([value])
    rounded = stochastic(exact, dtype, first_index=index)
    nearest = exact.to(dtype)
    if nearest.float() == exact:
        assert torch.equal(rounded, nearest)
    else:
        assert rounded.item() in (nearest.item(), _neighbour(nearest, exact).item())


def _neighbour(nearest, exact):
    """The value of the narrow dtype on the other side of `exact`."""
    bits = nearest.view(torch.int16)
    candidates = torch.cat([(bits + 1).view(nearest.dtype), (bits - 1).view(nearest.dtype)])
    if nearest.item() == 0:
        tiny = torch.tensor([1], dtype=torch.int16).view(nearest.dtype)
        candidates = torch.cat([tiny, -tiny])
    above = exact > nearest.float()
    return candidates[(candidates.float() > nearest.float()) == above][0]


@pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
def test_every_value_the_dtype_can_hold_stays_infinities_and_nan_too(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    rounded = stochastic(every.float(), dtype)
    same = (rounded.view(torch.int16) == every.view(torch.int16)) | (rounded.isnan() & every.isnan())
    assert same.all()


def test_nearest_rounds_ties_to_even_and_writes_where_it_is_told():
    values = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8], dtype=torch.float64)
    out = torch.empty(2, dtype=torch.bfloat16)
    returned = round_to(values, torch.bfloat16, rounding="nearest", seed=0, name="w", first_index=0, out=out)
    assert returned is out
    assert out.tolist() == [1.0, 1 + 2.0**-6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_wide_outputs_are_cast_plainly(dtype):
    values = torch.randn(9, dtype=torch.float64)
    assert torch.equal(stochastic(values, dtype), values.to(dtype))


def test_float64_and_empty_inputs_are_rounded_too():
    values = torch.full((1000,), 1 + 2.0**-10, dtype=torch.float64)
    assert set(stochastic(values, torch.bfloat16).tolist()) == {1.0, 1 + 2.0**-7}
    assert stochastic(torch.empty(0, 3), torch.bfloat16).shape == (0, 3)
