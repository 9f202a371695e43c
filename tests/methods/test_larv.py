"""LARV: where each matrix stands in the model, what that makes of its changes, and the same however it is streamed."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from streammerge import methods, stream
from streammerge.delta import TensorDeltas
from streammerge.methods.inner import larv_cost
from streammerge.solve.larv import LarvLook, standardised
from tests.blocks import model_merged_by_blocks
from tests.models import llama_tensors
from tests.solve.changes import CountingDeltas, experts, most_held, relative_error
from tests.stored import MemoryStorage, streamed, streamed_tensors
from tests.test_device_stream import engine, planned

SHAPES = [(9, 21), (40, 12), (16, 16)]
SUM = {"rule": "task_arithmetic"}
LINEAR = [name for name, tensor in llama_tensors().items() if "_proj" in name]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def merged(base, changes, **parameters):
    """A model of one matrix, and what was noted of it."""
    deltas = TensorDeltas(base, [base + change for change in changes])
    return methods.describe("larv").merge(deltas, **parameters), deltas.facts


def effective_rank(matrix):
    shares = torch.linalg.svdvals(matrix) ** 2
    shares = shares / shares.sum()
    return math.exp(torch.special.entr(shares).sum())


def conflict_of(base, total):
    turned = base @ total.mT if base.shape[0] <= base.shape[1] else base.mT @ total
    return ((turned - turned.mT).norm() / turned.norm() / 2).item()


def scales(base, changed, contrast=0.0, conflict=0.0, low=0.9, high=1.1):
    """By full decompositions: each matrix's scale."""
    totals = {name: sum(e[name].double() - base[name].double() for e in changed) for name in base}
    found = [(effective_rank(base[n].double()) / effective_rank(t), conflict_of(base[n].double(), t))
             for n, t in totals.items()]  # fmt: skip
    values = torch.tensor(found, dtype=torch.float64)
    z = (values - values.mean(0)) / values.std(0, unbiased=False)
    return {
        name: high if e > contrast and c <= conflict else low if c > conflict and e <= contrast else 1.0
        for name, (e, c) in zip(base, z.tolist(), strict=True)
    }


def model():
    """Llama tensors and three experts: matrices change along the base, in its first direction, across it, at random."""
    base = llama_tensors()
    changed = [{name: t.clone() for name, t in base.items()} for _ in range(3)]
    for number, (name, before) in enumerate((n, base[n].double()) for n in LINEAR):
        left, values, right = torch.linalg.svd(before, full_matrices=False)
        first = values[0] * torch.outer(left[:, 0], right[0])
        for index, expert in enumerate(changed):
            noise = 0.002 * random(*before.shape, seed=10 * number + index)
            turn = random(before.shape[1], before.shape[1], seed=10 * number + index + 5)
            along, across = 0.05 * before + 0.1 * noise, 0.05 * before @ (turn - turn.mT)
            kinds = along, (0.3 + 0.1 * index) * first, across, noise
            expert[name] = (before + kinds[number % 4]).to(base[name].dtype)
    return base, changed


def storage_of(base, changed):
    return MemoryStorage({"base": base, **{f"expert{i}": expert for i, expert in enumerate(changed)}})


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0, 4.0], [4.0, 2.0, 1.0, 3.0]], ids=["sorted", "mixed"])
def test_values_are_standardised_by_the_mean_and_the_population_deviation(values):
    # mean 5/2, variance 5/4
    assert standardised(values) == pytest.approx([(v - 2.5) / math.sqrt(1.25) for v in values], rel=1e-15)


def test_one_value_and_values_that_are_alike_stand_at_zero():
    assert standardised([]) == []
    assert standardised([0.3]) == [0.0]
    assert standardised([0.1] * 7) == [0.0] * 7
    assert standardised([1e-17, 3e-17, 2e-17]) == [0.0] * 3


@given(st.lists(st.floats(0.0, 100.0), min_size=2, max_size=30), st.randoms())
@example([0.0, 1e-8], None)
def test_what_is_standardised_has_mean_zero_and_deviation_one_in_any_order(values, shuffler):
    found = standardised(values)
    if any(found):
        assert statistics.fmean(found) == pytest.approx(0.0, abs=1e-6)
        assert statistics.pstdev(found) == pytest.approx(1.0, rel=1e-6)
    else:
        assert max(values) - min(values) <= 1e-6
    if shuffler is not None:
        order = list(range(len(values)))
        shuffler.shuffle(order)
        assert standardised([values[i] for i in order]) == [found[i] for i in order]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contrast_and_conflict_are_reported(shape):
    base, changes = random(*shape, seed=5), random(3, *shape)
    result, facts = merged(base, changes, **SUM)
    total = changes.sum(0)
    assert facts["contrast"] == pytest.approx(effective_rank(base) / effective_rank(total))
    assert facts["conflict"] == pytest.approx(conflict_of(base, total))
    assert (facts["contrast_z"], facts["conflict_z"], facts["scale"]) == (0.0, 0.0, 1.0)
    assert relative_error(result, total) < 1e-12


def test_conflict_is_zero_for_a_stretch_and_one_for_a_turn():
    base = random(12, 12)
    turn = random(12, 12, seed=1)
    assert merged(base, [0.1 * base], **SUM)[1]["conflict"] < 1e-12
    assert merged(base, [(turn - turn.mT) @ torch.linalg.inv(base).mT], **SUM)[1]["conflict"] == pytest.approx(1.0)
    assert merged(base, [0.1 * base], **SUM)[1]["contrast"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "settings",
    [{}, {"contrast": 0.5, "conflict": -0.5}, {"contrast": -1.0}, {"low": 0.5, "high": 3.0}, {"conflict": 1.2}],
    ids=str,
)
def test_each_matrix_is_scaled_by_where_it_stands_in_the_model(settings):
    base, changed = model()
    base, changed = {n: base[n] for n in LINEAR}, [{n: e[n] for n in LINEAR} for e in changed]
    wanted = scales(base, changed, **settings)
    assert len(set(wanted.values())) >= 2
    found = model_merged_by_blocks("larv", base, changed, 64, **SUM, **settings)
    for name in LINEAR:
        total = sum(expert[name].double() - base[name].double() for expert in changed)
        assert relative_error(found[name], wanted[name] * total) < 1e-6, name


def test_all_three_tiers_occur_by_default():
    base, changed = model()
    base, changed = {n: base[n] for n in LINEAR}, [{n: e[n] for n in LINEAR} for e in changed]
    assert set(scales(base, changed).values()) == {0.9, 1.0, 1.1}


def test_a_matrix_without_a_base_or_a_change_is_left_as_it_is_and_does_not_count():
    names = ["a", "b", "c"]
    base = {name: random(8, 12, seed=i) for i, name in enumerate(names)}
    changed = [{name: base[name] + random(8, 12, seed=9 + i) for i, name in enumerate(names)}]
    more = {**base, "still": random(8, 12, seed=7), "new": torch.zeros(8, 12, dtype=torch.float64)}
    with_more = [{**changed[0], "still": more["still"], "new": random(8, 12, seed=8)}]
    few = model_merged_by_blocks("larv", base, changed, 64, **SUM)
    many = model_merged_by_blocks("larv", more, with_more, 64, **SUM)
    assert all(torch.equal(few[name], many[name]) for name in names)
    assert torch.equal(many["new"], with_more[0]["new"])
    assert not many["still"].any()


def test_a_model_of_one_matrix_is_merged_by_the_rule_alone():
    base, changes = random(12, 15), random(3, 12, 15, seed=4)
    deltas = TensorDeltas(base, [base + change for change in changes])
    wanted = methods.describe("actmat").merge(deltas)
    assert torch.equal(merged(base, changes, rule="actmat")[0], wanted)


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (1.0, 1.0)])
def test_changes_are_scaled_before_the_rule_sees_them(low, high):
    base, changes = random(12, 15), random(1, 12, 15, seed=4)
    # any z is above it
    above = {"contrast": -1.0, "low": low, "high": high}
    assert relative_error(merged(base, changes, rule="actmat", **above)[0], high * changes[0]) < 1e-9
    above = {"conflict": -1.0, "low": low, "high": high}
    assert relative_error(merged(base, changes, rule="actmat", **above)[0], low * changes[0]) < 1e-9


@pytest.mark.parametrize("contrast", [-1.0, 0.0], ids=["scaled", "as_it_is"])
@pytest.mark.parametrize("parameters", [{}, {"density": 0.5}], ids=["plain", "looks"])
def test_a_rule_takes_its_own_look_at_the_matrix(parameters, contrast):
    base, changes = random(12, 15), random(3, 12, 15, seed=4)
    high = 1.1 if contrast < 0 else 1.0
    scaled = TensorDeltas(base, [base + high * change for change in changes])
    wanted = methods.describe("ties").merge(scaled, **parameters)
    result, _ = merged(base, changes, rule="ties", rule_parameters=parameters, contrast=contrast)
    assert relative_error(result, wanted) < 1e-9


def test_nothing_depends_on_the_size_or_the_order_of_the_changes():
    base = {name: random(9, 21, seed=i) for i, name in enumerate("abcd")}
    changes = [{name: random(9, 21, seed=9 + 4 * t + i) for i, name in enumerate(base)} for t in range(3)]

    def of(order, size):
        changed = [{n: base[n] + size * changes[t][n] for n in base} for t in order]
        return model_merged_by_blocks("larv", base, changed, 64, **SUM)

    first = of([0, 1, 2], 1.0)
    for order, size in (([1, 2, 0], 1.0), ([0, 1, 2], 1e-3)):
        other = of(order, size)
        assert all(relative_error(other[name] / size, first[name]) < 1e-9 for name in base)


def test_scaling_without_a_look_is_a_mistake():
    with pytest.raises(AssertionError, match="takes a look"):
        methods.describe("larv").load()(TensorDeltas(torch.ones(2, 2), [torch.zeros(2, 2)]))


@pytest.mark.parametrize("shape", [(256, 256), (128, 384), (384, 128)], ids=str)
@pytest.mark.parametrize("rule", ["task_arithmetic", "iso_c", "actmat", "ties"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_look_and_scaled_merge_each_lie_within_the_price(rule, shape, dtype):
    base, changed = experts("sft", *shape, 3)
    deltas = CountingDeltas(base.to(dtype), [e.to(dtype) for e in changed])
    settings = {"rule": rule, "rule_parameters": {"density": 0.5} if rule == "ties" else None, "contrast": -1.0}
    price = larv_cost(shape, 3, settings, deltas.dtype.itemsize)
    # a trim's counts of magnitudes are part of what is small beside a matrix
    allowed = price.workspace_bytes - (0 if rule == "ties" else 8 << 20)
    deltas.seen = LarvLook(deltas)
    assert most_held(lambda: deltas.seen.look(0, deltas)) <= price.workspace_bytes - (8 << 20)
    assert deltas.passes == price.looks == 1
    deltas.seen.finish(0)
    larv = methods.describe("larv").load()
    assert most_held(lambda: larv(deltas, **settings)) <= allowed
    assert deltas.facts["scale"] == 1.1
    assert deltas.passes <= price.looks + price.passes


@pytest.mark.parametrize("device_bytes", [None, 1 << 30], ids=["cpu", "device"])
def test_a_streamed_model_is_what_all_its_matrices_in_memory_give(device_bytes):
    base, changed = model()
    storage = storage_of(base, changed)
    plan = planned(storage, "larv", parameters=SUM, out_dtype="float32", device_bytes=device_bytes, slot_bytes=256)
    data, outcomes = streamed(engine(plan)(plan, storage))
    assert {name for name, outcome in outcomes.items() if outcome.method == "larv"} == set(LINEAR)
    few = {n: base[n] for n in LINEAR}, [{n: e[n] for n in LINEAR} for e in changed]
    wanted, exact = model_merged_by_blocks("larv", *few, 64, **SUM), scales(*few)
    for name in LINEAR:
        assert outcomes[name].facts["scale"] == exact[name]
        found = torch.frombuffer(bytearray(data[name]), dtype=torch.float32).view(base[name].shape)
        assert torch.equal(found, base[name].float() + wanted[name])
    z = torch.tensor([[outcomes[n].facts[f"{d}_z"] for n in LINEAR] for d in ("contrast", "conflict")])
    assert torch.allclose(z.mean(1), torch.zeros(2), atol=1e-6)
    assert torch.allclose(z.std(1, unbiased=False), torch.ones(2))


@pytest.mark.parametrize("rule", ["task_arithmetic", "ties"])
def test_the_bytes_depend_neither_on_slots_nor_on_threads_nor_on_the_engine(rule, monkeypatch):
    storage = storage_of(*model())
    parameters = {"rule": rule, "rule_parameters": {"density": 0.5} if rule == "ties" else {}}
    results = []
    for slot_bytes, threads, device_bytes in (
        (128, 1, None), (1 << 14, 2, None), (4 << 20, 2, None), (128, 2, 1 << 30), (4 << 20, 1, 1 << 30),
    ):  # fmt: skip
        monkeypatch.setattr(stream, "thread_limit", lambda count=threads: count)
        plan = planned(storage, "larv", parameters=parameters, slot_bytes=slot_bytes, device_bytes=device_bytes)
        results.append(streamed_tensors(plan, storage))
    assert all(torch.equal(other[name], results[0][name]) for other in results[1:] for name in results[0])


@pytest.mark.parametrize("device_bytes", [None, 1 << 30], ids=["cpu", "device"])
def test_what_an_earlier_run_finished_still_counts(device_bytes):
    storage = storage_of(*model())
    plan = planned(storage, "larv", parameters=SUM, slot_bytes=256, device_bytes=device_bytes)
    whole, _ = streamed(engine(plan)(plan, storage))
    for count in (1, 7, len(whole) - 4):
        done = set(list(whole)[:count])
        rest, _ = streamed(engine(plan)(plan, storage, skip=done))
        assert rest == {name: data for name, data in whole.items() if name not in done}
