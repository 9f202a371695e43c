"""The system from packed deltas is the system from dense ones."""

import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.errors import MergeError
from streammerge.solve import normal_equations
from streammerge.solve.buffers import Buffers
from streammerge.solve.normal_equations import solve_normal_equations
from streammerge.solve.packed import packed_primal, packed_survey
from streammerge.solve.survey import survey
from streammerge_kernels.delta_pack import SCALE, delta_pack
from tests.solve.changes import KINDS, exact, experts, relative_error, with_ridge

SHAPES = [(160, 160, 3), (240, 100, 3), (96, 264, 3), (64, 256, 4), (80, 256, 3), (20, 150, 5)]


class PackedDeltas(TensorDeltas):
    """Deltas as a device gives them; `passes` counts how often they were asked for one by one."""

    passes = 0

    def __init__(self, base, changed):
        super().__init__(base, changed, name="layer.weight")
        self._pair = base, torch.stack(changed)

    def packed(self):
        return delta_pack(*self._pair)

    def __iter__(self):
        self.passes += 1
        return super().__iter__()

    def empty(self, *shape, dtype=None):
        buffer = super().empty(*shape, dtype=dtype)
        return buffer.fill_(torch.nan if buffer.dtype.is_floating_point else 0)


def solved(base, changed, solver, ridge=0.1):
    deltas = PackedDeltas(base, changed)
    return solve_normal_equations(deltas, solver=solver, ridge=ridge), deltas


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_solver_stays_within_its_promise_of_float64(shape, kind):
    base, changed = experts(kind, *shape)
    for solver, ridge in (("ridge", 0.1), ("ridge", 1e-2), ("exact", 0.0)):
        result, deltas = solved(base, changed, solver, ridge)
        reference = exact(base, changed) if solver == "exact" else with_ridge(base, changed, ridge)
        assert relative_error(result, reference) <= 1e-3, (solver, ridge, deltas.facts)
        # one by one only where packing would lose too much, or float32 was found too narrow
        dense = packed_survey(PackedDeltas(base, changed), solver) is None
        assert (deltas.passes > 0) == (dense or deltas.facts["escalation"] != "none"), (solver, ridge, deltas.facts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_solver_takes_every_kind_of_bfloat16_expert_packed(kind):
    _, deltas = solved(*experts(kind, 96, 264, 3), "ridge")
    assert deltas.passes == 0


@pytest.mark.parametrize("kind", ["sft", "rl", "low_rank"])
@pytest.mark.parametrize("shape", [(160, 160, 3), (64, 256, 4)], ids=str)
def test_pinv_cuts_where_the_dense_one_cuts(shape, kind):
    base, changed = experts(kind, *shape)
    result, _ = solved(base, changed, "pinv")
    assert relative_error(result, exact(base, changed, cut=shape[1] * 2.0**-23)) <= 2e-3


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("shape", [(96, 264, 3), (100, 72, 2), (1, 40, 2), (40, 1, 2)], ids=str)
def test_the_packed_system_is_the_definition(shape, left):
    base, changed = experts("sft", *shape)
    deltas = PackedDeltas(base, changed)
    packed, seen = packed_survey(deltas, "ridge")
    energy = seen.energy / shape[1]
    system = packed_primal(packed, seen, Buffers(deltas, torch.float32), ridge_lambda=energy * SCALE**2, left=left)
    changes = torch.stack([e.double() - base.double() for e in changed])
    covariances = changes.mT @ changes
    assert relative_error(system.gram, covariances.sum(0) * SCALE**2) <= 3e-5
    target = (changes @ covariances).sum(0) + energy * changes.mean(0)
    assert relative_error(system.right, target * SCALE**3) <= 3e-4


def test_the_packed_survey_sees_what_the_dense_one_sees():
    base, changed = experts("rl", 60, 90, 3)
    changed = [changed[0], base.clone(), changed[1], changed[2]]
    for expert in changed:
        expert[:, 7] = base[:, 7]
    deltas = PackedDeltas(base, changed)
    buffers = Buffers(deltas, torch.float32)
    dense = survey(
        deltas, lambda used: buffers.take(f"slot{used > 0}", torch.float32, 60, 90), buffers, count_columns=True
    )
    _, packed = packed_survey(deltas, "exact")
    assert (packed.used, packed.identical, packed.columns) == (dense.used, dense.identical, dense.columns)
    assert packed.energy == pytest.approx(dense.energy, rel=1e-6)


@pytest.mark.parametrize("solver", ["ridge", "exact"])
def test_identical_experts_come_back_exactly(solver):
    base, (one,) = experts("sft", 50, 70, 1)
    result, deltas = solved(base, [one, base, one.clone()], solver)
    assert torch.equal(result, one.float() - base.float())
    assert deltas.facts["form"] == "none"


def test_experts_that_differ_only_below_packing_are_not_taken_for_one():
    base, (one,) = experts("sft", 50, 70, 1)
    one = one.float()
    other = one.clone()
    other[3, 4] = torch.nextafter(one[3, 4], torch.tensor(1.0))
    packed, seen = packed_survey(PackedDeltas(base, [one, other]), "ridge")
    assert torch.equal(packed.values[0], packed.values[1])
    assert not seen.identical


@pytest.mark.parametrize("shape", [(50, 70, 2), (20, 70, 2)], ids=["primal", "dual"])
def test_an_unchanged_family_stays_zero_and_a_zero_expert_counts_for_nothing(shape):
    base, changed = experts("sft", *shape)
    result, _ = solved(base, [base.clone(), base.clone()], "ridge")
    assert not result.any()
    with_zero, _ = solved(base, [changed[0], base.clone(), changed[1]], "ridge")
    without, _ = solved(base, changed, "ridge")
    assert torch.equal(with_zero, without)


@pytest.mark.parametrize("scale", [20.0, 1e-9], ids=["overflow", "underflow"])
@pytest.mark.parametrize("solver", ["ridge", "exact"])
def test_changes_that_do_not_fit_the_working_format_take_the_dense_way(scale, solver):
    torch.manual_seed(0)
    base, *changed = torch.randn(3, 60, 40) * scale
    base.zero_()
    result, deltas = solved(base, changed, solver)
    assert deltas.passes > 0
    reference = exact(base, changed) if solver == "exact" else with_ridge(base, changed, 0.1)
    assert relative_error(result, reference) <= 1e-4


def test_float32_changes_are_packed_for_ridge_and_dense_without_it():
    torch.manual_seed(0)
    base, *changed = torch.randn(4, 60, 40) * 1e-3
    assert packed_survey(PackedDeltas(base, changed), "ridge") is not None
    assert packed_survey(PackedDeltas(base, changed), "exact") is None


def test_a_system_that_stays_indefinite_is_refused(monkeypatch):
    base, changed = experts("sft", 50, 70, 2)
    monkeypatch.setattr(normal_equations._Solution, "_lambda", lambda self, seen: -seen.energy)
    with pytest.raises(MergeError, match="not positive definite"):
        solved(base, changed, "ridge")
