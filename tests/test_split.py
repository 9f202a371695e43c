"""Steps divided among processes: none twice, none left out, the longest share as short as neighbours allow."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import streammerge
from streammerge.ranks.share import neighbours
from streammerge.ranks.split import cut, rates_of, shares
from streammerge.rates import Rates
from tests.models import recipe_of

RATES = Rates(1e9, 1e9, 1e9, 1e9)


@given(costs=st.lists(st.integers(0, 50), max_size=9), size=st.integers(1, 5))
def test_no_other_division_into_runs_has_a_shorter_longest_run(costs, size):
    ends = cut(costs, size)
    assert len(ends) == size
    assert ends == sorted(ends)
    assert ends[-1] == len(costs)
    longest = max(sum(costs[begin:end]) for begin, end in itertools.pairwise([0, *ends]))
    others = itertools.combinations_with_replacement(range(len(costs) + 1), size - 1)
    assert longest == min(
        max(sum(costs[begin:end]) for begin, end in itertools.pairwise([0, *inner, len(costs)])) for inner in others
    )


def test_runs_are_as_even_as_their_bound_allows():
    ends = cut([1] * 10, 4)
    assert sorted(end - begin for begin, end in itertools.pairwise([0, *ends])) == [2, 2, 3, 3]
    assert cut([7, 1, 1, 1, 1, 1, 1, 1], 2) == [1, 8]
    assert cut([1, 1, 1, 9], 2) == [3, 4]


def test_twenty_thousand_steps_are_divided_at_once():
    costs = [1 + (number * 7919) % 1000 for number in range(20_000)]
    ends = cut(costs, 64)
    sums = [sum(costs[begin:end]) for begin, end in itertools.pairwise([0, *ends])]
    assert max(sums) - sum(costs) / 64 < 1000
    assert min(sums) > sum(costs) / 64 - 2000


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_every_tensor_is_in_one_share_and_pools_stay_whole(family, size):
    planned = streammerge.plan(recipe_of(family, "actmat", parameters={"pool": "inputs"}))
    found = shares(planned, (), size, RATES)
    assert len(found) == size
    assert sorted(name for share in found for name in share) == sorted(planned.layout.placements)
    pools = {step.pool for step in planned.steps if step.pool}
    assert pools
    for pool in pools:
        members = {step.name for step in planned.steps if step.pool == pool}
        assert any(members <= share for share in found)
    order = [step.name for step in planned.steps]
    places = [sorted(map(order.index, share)) for share in found if share]
    assert [place for share in places for place in share] == list(range(len(order)))


def test_what_an_earlier_run_finished_counts_as_little_as_reading_it(family):
    planned = streammerge.plan(recipe_of(family, "actmat"))
    order = [step.name for step in planned.steps]
    first, second = shares(planned, order[: len(order) // 2], 2, Rates(1e12, 1e12, 1e6, 1e6))
    assert set(order[: len(order) // 2]) < first
    left = [
        sum(step.flops for step in planned.steps[len(order) // 2 :] if step.name in each) for each in (first, second)
    ]
    assert max(left) < 0.8 * sum(left)


def test_shares_do_not_depend_on_the_machine_but_by_the_rates_that_are_told(family, monkeypatch, tmp_path):
    planned = streammerge.plan(recipe_of(family, "actmat"))
    usual = rates_of(planned)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = shares(planned, (), 3, usual)
    (tmp_path / "streammerge").mkdir()
    (tmp_path / "streammerge" / "rates.json").write_text(
        '{"matrix": {"read_bytes_per_second": 1, "write_bytes_per_second": 1, "flops_per_second": 1e15, '
        '"element_bytes_per_second": 1e15}}'
    )
    assert rates_of(planned) != usual
    assert shares(planned, (), 3, usual) == before


def test_neighbours_are_the_tensors_on_both_sides_of_a_border(family):
    planned = streammerge.plan(recipe_of(family, "linear"), max_shard_size="1GB")
    order = [step.name for step in planned.steps]
    half = frozenset(order[:10]), frozenset(order[10:])
    found = neighbours(planned.layout, half)
    assert set(order[9:11]) <= set(found)
    assert neighbours(planned.layout, [frozenset(order), frozenset()]) == []
