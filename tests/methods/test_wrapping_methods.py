import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from streammerge import methods
from streammerge.delta import TensorDeltas
from streammerge.methods.actmat import actmat
from streammerge.methods.inner import knots_cost, larv_cost, svc_cost
from streammerge.methods.iso_c import iso_c
from streammerge.methods.knots import knots
from streammerge.methods.larv import larv
from streammerge.methods.svc import svc
from tests.solve.changes import CountingDeltas, experts, relative_error

WRAPPERS = [knots, svc, larv]
SHAPES = [(9, 21), (40, 12), (16, 16)]
G1 = torch.tensor([[[2.0, 0, 0], [0, 1, 0]], [[0, 1, 0], [1, 0, 1]]])
SUM = {"rule": "task_arithmetic"}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    for name in ("ties", "iso_c", "tsv", "knots", "svc", "larv"):
        monkeypatch.setitem(methods.METHODS, name, f"streammerge.methods.{name}")


def merged(function, changes, base=None, **parameters):
    """A wrapping method of changes [t, out, in] from a base, zeros if none is given."""
    base = torch.zeros_like(changes[0]) if base is None else base
    deltas = TensorDeltas(base, [base + change for change in changes])
    return methods.describe(function.__name__).merge(deltas, **parameters)


def random(count, shape, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(size):
    return torch.linalg.qr(random(1, (size, size), seed=9)[0])[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", ["linear", "task_arithmetic"])
def test_knots_of_a_linear_rule_is_that_rule(shape, rule):
    changes = random(3, shape)
    expected = changes.mean(0) if rule == "linear" else changes.sum(0)
    assert relative_error(merged(knots, changes, rule=rule), expected) < 1e-12
    assert relative_error(merged(knots, changes.float(), rule=rule), expected) < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_knots_of_a_rule_that_turns_with_the_outputs_is_that_rule(shape):
    changes = random(2, shape)
    expected = merged(actmat, changes, ridge=0.01)
    result = merged(knots, changes, rule="actmat", rule_parameters={"ridge": 0.01})
    assert relative_error(result, expected) < 1e-9


def test_knots_around_iso_reaches_the_worked_example():
    result = merged(knots, G1.double(), rule="iso_c")
    expected = torch.tensor([[1.612372, 0.5, -0.612372], [0.295876, 0.908248, 1.520621]]).double()
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


def test_knots_around_iso_averages_over_the_rank_of_low_rank_changes():
    changes = random(2, (20, 2)) @ random(2, (2, 30), 1)
    result = merged(knots, changes, rule="iso_c")
    assert relative_error(result, merged(iso_c, changes) * 20 / 4) < 1e-9


@pytest.mark.parametrize("rank", [1, 3])
def test_knots_keeps_the_directions_that_exist(rank):
    changes = random(2, (30, rank)) @ random(2, (rank, 40), 1)
    deltas = TensorDeltas(torch.zeros(30, 40), list(changes.float()))
    knots(deltas, **SUM)
    assert deltas.facts["rank"] == 2 * rank


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_knots_of_untrimmed_ties_gives_back_one_expert_and_equal_ones(shape, count):
    change = random(1, shape)[0]
    result = merged(knots, change.expand(count, *shape), rule_parameters={"density": 1.0})
    assert relative_error(result, change) < 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_knots_of_untrimmed_ties_has_the_properties_of_its_basis(shape):
    changes, full = random(3, shape), {"rule": "ties", "rule_parameters": {"density": 1.0}}
    result = merged(knots, changes, **full)
    left, right = orthogonal(shape[0]), orthogonal(shape[1])
    assert relative_error(merged(knots, changes[[2, 0, 1]], **full), result) < 1e-8
    assert relative_error(merged(knots, changes * 1e-5, **full) * 1e5, result) < 1e-8
    assert relative_error(merged(knots, left @ changes, **full), left @ result) < 1e-8
    assert relative_error(merged(knots, changes @ right, **full), result @ right) > 1e-3
    idle = torch.cat([changes, torch.zeros(1, *shape)])
    assert relative_error(merged(knots, idle, **full), result) < 1e-8


def calibrated(changes, merged_change, alpha):
    """By full decompositions, direction by direction."""
    u, s, v = torch.linalg.svd(merged_change, full_matrices=False)
    for r in range(len(s)):
        whole = u[:, r] @ merged_change
        own = [u[:, r] @ change for change in changes]
        s[r] *= len(changes) / sum(max(alpha, float(whole @ a / (a @ a))) for a in own)
    return (u * s) @ v


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_calibration_weakens_each_direction_by_how_often_it_is_held(shape, alpha):
    changes = random(3, shape)
    result = merged(svc, changes, **SUM, alpha=alpha)
    assert relative_error(result, calibrated(changes, changes.sum(0), alpha)) < 1e-9
    narrow = changes.float()
    expected = calibrated(narrow.double(), narrow.double().sum(0), alpha)
    assert relative_error(merged(svc, narrow, **SUM, alpha=alpha), expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_calibration_gives_back_equal_experts_that_were_added(shape):
    change = random(1, shape)[0]
    assert relative_error(merged(svc, change.expand(4, *shape), **SUM), change) < 1e-10
    assert relative_error(merged(svc, change[None], **SUM), change) < 1e-12


def test_calibration_leaves_experts_that_do_not_meet_as_they_are():
    outputs, inputs, own = orthogonal(24), orthogonal(30), [slice(8 * t, 8 * t + 8) for t in range(3)]
    parts = [outputs[:, part] @ random(1, (8, 8), t)[0] @ inputs[part] for t, part in enumerate(own)]
    assert relative_error(merged(svc, torch.stack(parts), **SUM), sum(parts)) < 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_calibration_follows_turns_scale_and_order_and_ignores_idle_experts(shape):
    changes = random(3, shape)
    result = merged(svc, changes, **SUM)
    left, right = orthogonal(shape[0]), orthogonal(shape[1])
    assert relative_error(merged(svc, left @ changes @ right, **SUM), left @ result @ right) < 1e-8
    assert relative_error(merged(svc, changes * 1e-6, **SUM) * 1e6, result) < 1e-8
    assert relative_error(merged(svc, changes[[1, 2, 0]], **SUM), result) < 1e-8
    assert relative_error(merged(svc, torch.cat([changes, torch.zeros(2, *shape)]), **SUM), result) < 1e-8


@pytest.mark.parametrize("function", WRAPPERS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (1, 5), (5, 1)], ids=str)
def test_where_no_expert_changed_anything_nothing_changes(function, shape):
    assert not merged(function, torch.zeros(3, *shape), torch.ones(shape), **SUM).any()


@pytest.mark.parametrize("function", WRAPPERS)
def test_a_rule_takes_its_parameters_by_name_or_by_keyword(function):
    changes = random(2, (8, 12))
    first = merged(function, changes, **SUM, rule_parameters={"lambda": 0.5, "weight": [1.0, 2]})
    second = merged(function, changes, **SUM, rule_parameters={"lambda_": 0.5, "weight": (1.0, 2.0)})
    assert torch.equal(first, second)


@pytest.mark.parametrize("function", WRAPPERS)
def test_a_wrapping_method_may_wrap_another(function):
    changes = random(2, (8, 12))
    within = {"rule": "linear", "rule_parameters": {"weight": 2.0}}
    result = merged(function, changes, rule="knots", rule_parameters=within)
    assert relative_error(result, merged(function, changes, rule="linear")) < 1e-9


FUSSY = '''
"""Rules that cannot be wrapped."""

from streammerge.methods import merge_method
from streammerge.solve.cost import Cost


def price(shape, experts, parameters, itemsize):
    return Cost(workspace_bytes=0, flops=0, passes=1, looks=1, look_scope="model")


@merge_method(needs_base=True, streams_by="element", beside="fisher")
def with_data(deltas): ...


@merge_method(needs_base=True, streams_by="element", cost="fussy_rules:price")
def with_model(deltas): ...
'''


@pytest.mark.parametrize("rule", ["with_data", "with_model"])
def test_a_rule_that_needs_more_than_the_matrix_is_refused(rule, tmp_path, monkeypatch):
    (tmp_path / "fussy_rules.py").write_text(FUSSY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(methods.METHODS, rule, "fussy_rules")
    found = methods.describe("knots").complaint((4, 4), 2, {"rule": rule})
    assert found
    assert f"cannot wrap `{rule}`" in found.message
    assert "another rule" in found.hint


def test_finding_and_pricing_a_rule_loads_no_torch():
    code = (
        "import sys; from streammerge.methods.inner import knots_cost, svc_cost, larv_cost; "
        "[p((8, 8), 2, {'rule': 'actmat'}, 4) for p in (knots_cost, svc_cost, larv_cost)]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def used(function, deltas, settings):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        methods.describe(function.__name__).merge(deltas, **settings)
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("shape", [(256, 256), (128, 384), (384, 128)], ids=str)
@pytest.mark.parametrize(("function", "price"), [(knots, knots_cost), (svc, svc_cost), (larv, larv_cost)])
@pytest.mark.parametrize("rule", ["task_arithmetic", "iso_c", "actmat"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_all_memory_of_a_wrapping_method_lies_within_its_price(function, price, rule, shape, dtype):
    base, changed = experts("sft", *shape, 3)
    deltas = CountingDeltas(base.to(dtype), [e.to(dtype) for e in changed])
    priced = price(shape, 3, {"rule": rule}, deltas.dtype.itemsize)
    assert used(function, deltas, {"rule": rule}) <= priced.workspace_bytes - (8 << 20)
    assert deltas.passes <= priced.looks + priced.passes
