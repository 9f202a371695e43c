import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from streammerge.delta import TensorDeltas
from streammerge.errors import MergeError
from streammerge.methods.fr import fr
from streammerge.methods.iso_c import iso_c
from streammerge.methods.iso_cts import iso_cts
from streammerge.methods.resmerge import resmerge
from streammerge.methods.tsv import tsv
from streammerge.solve import cost_spectral, polar
from streammerge.solve.buffers import Buffers
from tests.solve.changes import CountingDeltas, experts, relative_error

SHAPES = [(5, 21), (40, 12), (16, 16), (1, 7), (7, 1)]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def buffers(matrix):
    return Buffers(TensorDeltas(matrix, [matrix]), torch.float64)


def split(matrix, most):
    left, right = random(most, matrix.shape[0], seed=1), random(most, matrix.shape[1], seed=2)
    values = polar.truncated(matrix, left, right, buffers(matrix))
    return left[: len(values)], values, right[: len(values)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_truncated_decomposition_is_the_best_of_its_rank(shape):
    matrix = random(*shape)
    most = max(1, min(shape) // 2)
    left, values, right = split(matrix, most)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(values.flip(0), s[:most])
    torch.testing.assert_close((left.mT * values) @ right, (u[:, :most] * s[:most]) @ v[:most])
    torch.testing.assert_close(left @ left.mT, torch.eye(most, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(right @ right.mT, torch.eye(most, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_no_more_directions_are_given_than_a_matrix_has(shape, rank):
    matrix = random(shape[0], rank) @ random(rank, shape[1], seed=1)
    left, values, right = split(matrix, min(shape))
    assert len(values) == rank
    torch.testing.assert_close((left.mT * values) @ right, matrix, atol=1e-12, rtol=0)


def test_rounding_a_matrix_to_float32_leaves_its_rank():
    matrix = (random(300, 7) @ random(7, 200, seed=1)).float().double()
    assert len(split(matrix, 200)[1]) == 7


def test_a_floor_drops_what_lies_below_it():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    left, right = random(3, 3), random(3, 3)
    assert polar.truncated(matrix, left, right, buffers(matrix), floor=1.5).tolist() == pytest.approx([2, 3])


def test_products_of_polar_factors_are_those_of_full_decompositions():
    left, right, values = random(6, 20), random(6, 9, seed=1), random(6, seed=2).abs()
    factors = []
    for stack in (left, right):
        p, _, q = torch.linalg.svd(stack.mT, full_matrices=False)
        factors.append(p @ q)
    expected = (factors[0] * values) @ factors[1].mT
    out = torch.empty(20, 9, dtype=torch.float64)
    polar.polar_product(left, values, right, out, buffers(left))
    torch.testing.assert_close(out, expected)


def test_a_spectrum_down_to_a_hundred_thousandth_is_flattened_within_a_millionth():
    turn = torch.linalg.qr(random(200, 200))[0], torch.linalg.qr(random(200, 200, seed=1))[0]
    matrix = (turn[0] * torch.logspace(0, -4.9, 200, dtype=torch.float64)) @ turn[1]
    root = torch.empty(200, 200, dtype=torch.float64)
    polar.inverse_root(polar.gram(matrix, buffers(matrix)), polar.relative_cut(200, 200), root)
    assert relative_error(root @ matrix, turn[0] @ turn[1]) < 1e-6


def test_a_spectrum_that_does_not_converge_is_an_error_with_a_way_out(monkeypatch):
    def diverge(*_, **__):
        raise torch.linalg.LinAlgError("no")

    monkeypatch.setattr(torch.linalg, "eigh", diverge)
    with pytest.raises(MergeError, match="did not converge") as error:
        polar.eigen_(torch.eye(2, dtype=torch.float64))
    assert "another method" in error.value.hint


@pytest.mark.parametrize(
    ("size", "count", "fraction", "expected"),
    [(2, 2, 0.8, (2, 0)), (10, 2, 0.8, (8, 1)), (64, 3, 0.8, (52, 4)), (3, 2, 0.0, (1, 1)), (8, 2, 1.0, (8, 0))],
)
def test_directions_are_shared_out_as_the_paper_does_where_that_is_possible(size, count, fraction, expected):
    assert cost_spectral.shared_directions(size, count, fraction) == expected


def used(function, deltas):
    """Most bytes that were held at once, beyond the inputs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(deltas)
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("shape", [(256, 256), (128, 384), (384, 128)], ids=str)
@pytest.mark.parametrize(
    ("function", "price"),
    [
        (tsv, cost_spectral.tsv),
        (iso_c, cost_spectral.iso_c),
        (iso_cts, cost_spectral.iso_cts),
        (fr, cost_spectral.frequencies),
        (resmerge, cost_spectral.residual),
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_all_memory_of_a_spectral_method_lies_within_its_price(function, price, shape, dtype):
    base, changed = experts("sft", *shape, 3)
    deltas = CountingDeltas(base.to(dtype), [e.to(dtype) for e in changed])
    priced = price(shape, 3, {}, deltas.dtype.itemsize)
    # the constant part is for what libraries take
    room = priced.workspace_bytes - (8 << 20)
    assert used(function, deltas) <= room
    assert deltas.passes <= priced.passes
    assert math.isfinite(priced.flops)
    assert priced.device_bytes > priced.workspace_bytes
