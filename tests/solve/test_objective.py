"""The objective that a covariance merge notes: of 8 rows, against float64 and all that it is."""

from __future__ import annotations

import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.methods import describe


def experts(rows, columns, count, scale=1e-3, rank=None):
    generator = torch.Generator().manual_seed(3)

    def change():
        if rank is None:
            return torch.randn(rows, columns, generator=generator)
        return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)

    return [scale * change() for _ in range(count)]


def objective(merged, changes, rows):
    """F(merged) / F(0) of some rows, in float64."""
    changes = [change.double() for change in changes]
    wrong = sum(((merged.double() - c)[rows] @ c.T).square().sum() for c in changes)
    return (wrong / sum((c[rows] @ c.T).square().sum() for c in changes)).item()


def effective_rank(changes):
    covariance = sum(change.double().T @ change.double() for change in changes)
    return (covariance.trace().square() / covariance.square().sum()).item()


@pytest.mark.parametrize(
    ("shape", "count", "arguments"),
    [
        ((96, 64), 3, {}),
        ((96, 64), 2, {"solver": "pinv"}),
        ((96, 64), 3, {"solver": "exact"}),
        ((24, 128), 3, {}),
        ((24, 128), 3, {"solver": "exact"}),
        ((5, 16), 2, {"anchor": "sum"}),
    ],
)
def test_it_is_the_objective_of_eight_rows_in_float64(shape, count, arguments):
    changes = experts(*shape, count)
    deltas = TensorDeltas(torch.zeros(*shape), changes)
    merged = describe("actmat").merge(deltas, **arguments)
    rows = torch.arange(min(8, shape[0])) * shape[0] // min(8, shape[0])
    assert deltas.facts["interference"] == pytest.approx(objective(merged, changes, rows), abs=2e-5)
    assert deltas.facts["effective_rank"] == pytest.approx(effective_rank(changes), rel=1e-3)


def test_eight_rows_tell_of_all():
    changes = experts(512, 128, 3)
    deltas = TensorDeltas(torch.zeros(512, 128), changes)
    merged = describe("actmat").merge(deltas)
    assert deltas.facts["interference"] == pytest.approx(objective(merged, changes, slice(None)), rel=0.1)


def test_experts_that_read_other_inputs_do_not_interfere():
    changes = [torch.zeros(32, 64) for _ in range(2)]
    changes[0][:, :30], changes[1][:, 30:] = torch.randn(32, 30), torch.randn(32, 34)
    deltas = TensorDeltas(torch.zeros(32, 64), changes)
    describe("actmat").merge(deltas, solver="exact")
    assert deltas.facts["interference"] == pytest.approx(0.0, abs=1e-5)


def test_equal_experts_do_not_interfere():
    change = experts(16, 16, 1)[0]
    deltas = TensorDeltas(torch.zeros(16, 16), [change, change])
    describe("actmat").merge(deltas)
    assert deltas.facts["interference"] == 0.0


def test_opposite_experts_leave_as_much_as_no_merge():
    change = experts(16, 16, 1)[0]
    deltas = TensorDeltas(torch.zeros(16, 16), [change, -change])
    describe("actmat").merge(deltas)
    assert deltas.facts["interference"] == pytest.approx(1.0, abs=1e-5)


def test_changes_too_small_to_square_twice_have_none():
    deltas = TensorDeltas(torch.zeros(16, 16), experts(16, 16, 2, scale=1e-12))
    describe("actmat").merge(deltas)
    assert "interference" not in deltas.facts


@pytest.mark.parametrize(("method", "arguments"), [("actmat", {"weight_exponent": 1.0}), ("tact", {})])
def test_another_objective_has_none(method, arguments):
    deltas = TensorDeltas(torch.zeros(16, 16), experts(16, 16, 2))
    describe(method).merge(deltas, **arguments)
    assert "interference" not in deltas.facts
