"""slerp, nuslerp, multislerp and karcher: what they have in common, and each by itself."""

import math

import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.methods.karcher import karcher
from streammerge.methods.multislerp import multislerp
from streammerge.methods.nuslerp import nuslerp
from streammerge.methods.slerp import slerp
from streammerge.solve.panels import PANEL
from tests.blocks import described, merged_by_blocks

WIDE = torch.float64
G1 = [[[2.0, 0, 0], [0, 1, 0]], [[0.0, 1, 0], [1, 0, 1]]]
G2 = [[[1.0, 2], [3, 4], [5, 6]], [[2.0, -1], [0, 1], [1, 1]], [[0.0, 1], [1, 0], [-1, 2]]]
COLUMNS = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
ROWS = {"nuslerp_flatten": False}


class Based(TensorDeltas):
    """Deltas that say whether there is a base model."""

    def __init__(self, base, experts):
        super().__init__(base, experts)
        self.based = base is not None


def merged(method, base, experts, dtype=WIDE, **parameters):
    """The merged weights, in the dtype of the arithmetic."""
    experts = [torch.as_tensor(expert, dtype=dtype) for expert in experts]
    deltas = Based(None if base is None else torch.as_tensor(base, dtype=dtype), experts)
    return deltas.base() + described(method).merge(deltas, **parameters)


def interpolated(a, b, t, dim):
    """slerp by the textbook, along dimensions."""
    norms = a.norm(dim=dim, keepdim=True) * b.norm(dim=dim, keepdim=True)
    angle = torch.acos((a * b).sum(dim, keepdim=True) / norms)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def spherical(vectors, weights):
    units = [vector / vector.norm() for vector in vectors]
    direction = sum(w * unit for w, unit in zip(weights, units, strict=True))
    return direction / direction.norm() * sum(w * v.norm() for w, v in zip(weights, vectors, strict=True))


def close(found, expected, atol=1e-13):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=WIDE), atol=atol, rtol=1e-12)


def test_golden_values():
    slerped = [[1.414214, 0.707107, 0], [0.707107, 0.707107, 0.707107]]
    averaged = [[1.254829, 0.809989, 0], [0.809989, 0.627415, 0.809989]]
    third = [[1.461062, 1.176759], [2.288748, 3.400738], [4.163654, 4.92657]]
    karcher_of_three = [[1.836189, 0.509377], [1.538424, 1.694764], [1.043963, 3.883989]]
    close(merged(slerp, G1[0], G1[1:]), slerped, 1e-6)
    close(merged(nuslerp, None, G1), slerped, 1e-6)
    close(merged(karcher, None, G1), averaged, 1e-6)
    close(merged(multislerp, None, G1), averaged, 1e-6)
    close(merged(slerp, G2[0], G2[1:2], t=0.3), third, 1e-6)
    close(merged(nuslerp, None, G2[:2], weight=[0.7, 0.3]), third, 1e-6)
    close(merged(karcher, None, G2), karcher_of_three, 1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.4, -0.2])
@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 4)], ids=str)
def test_slerp_follows_the_arc_and_beyond(shape, t):
    torch.manual_seed(0)
    base, expert = torch.randn(2, *shape, dtype=WIDE)
    expected = interpolated(base.view(-1), expert.view(-1), t, 0).view(shape)
    close(merged(slerp, base, [expert], t=t), expected)
    narrow = merged(slerp, base.float(), [expert.float()], torch.float32, t=t)
    torch.testing.assert_close(narrow.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 0.0316])
def test_slerp_is_straight_between_nearly_parallel_weights(angle):
    base, expert = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)], dtype=WIDE)
    close(merged(slerp, base, [expert], t=0.3), 0.7 * base.double() + 0.3 * expert)
    beyond = torch.tensor([math.cos(0.0317), math.sin(0.0317)], dtype=WIDE)
    assert merged(slerp, base, [beyond], t=0.3).norm().item() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("angle", [1e-7, 1e-4, 0.02, 1.0, 3.0])
def test_nuslerp_keeps_the_length_at_any_angle(angle):
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)], dtype=WIDE)
    expected = [math.cos(0.25 * angle), math.sin(0.25 * angle)]
    close(merged(nuslerp, None, [first, second], weight=[3.0, 1.0]), expected)
    base = torch.tensor([5.0, -7.0], dtype=WIDE)
    close(merged(nuslerp, base, [base + first, base + second], weight=[3.0, 1.0]) - base, expected, 1e-7)


def test_opposites_have_no_arc():
    for method, more in ((slerp, {"t": 0.25}), (nuslerp, {"weight": [3.0, 1.0]})):
        for vector in torch.randn(5, 3, dtype=WIDE), torch.tensor([[1e-3]]), torch.full((9, 1), 1 / 3):
            base, experts = (vector, [-2 * vector]) if method is slerp else (None, [vector, -2 * vector])
            close(merged(method, base, experts, **more), 0.25 * vector.double())


@pytest.mark.parametrize("shape", [(7,), (5, 6), (1, 9), (9, 1), (4, 3, 5)], ids=str)
@pytest.mark.parametrize(("grain", "dim"), [({}, None), (ROWS, -1), (COLUMNS, 0)], ids=["tensor", "rows", "columns"])
@pytest.mark.parametrize("based", [False, True], ids=["weights", "changes"])
def test_nuslerp_turns_weights_or_changes_by_the_tensor_row_or_column(based, grain, dim, shape):
    torch.manual_seed(0)
    # all positive: rows and columns of one element then are parallel, never opposite
    first, second, base = torch.rand(3, *shape, dtype=WIDE) + 0.1
    flat = dim is None or len(shape) == 1
    expected = (
        interpolated(first.view(-1), second.view(-1), 0.75, 0).view(shape)
        if flat
        else interpolated(first, second, 0.75, dim).nan_to_num()
    )
    if not flat and shape[dim] == 1:
        expected = 0.25 * first + 0.75 * second
    experts = [base + first, base + second] if based else [first, second]
    found = merged(nuslerp, base if based else None, experts, weight=[0.5, 1.5], **grain)
    close(found - base if based else found, expected, 1e-7)


@pytest.mark.parametrize("grain", [{}, ROWS, COLUMNS], ids=["tensor", "rows", "columns"])
def test_a_change_of_zero_has_no_angle_and_is_met_straight(grain):
    base, change = torch.randn(2, 4, 5, dtype=WIDE)
    for experts, share in (([base, base + change], 0.75), ([base + change, base], 0.25)):
        close(merged(nuslerp, base, experts, weight=[1.0, 3.0], **grain), base + share * change)
        theirs = merged(nuslerp, base, experts, weight=[1.0, 3.0], compat="mergekit", **grain)
        close(theirs, base + math.sin(share * math.pi / 2) * change)
    assert torch.equal(merged(nuslerp, base, [base, base], **grain), base)


def test_a_tensor_of_zeros_has_no_angle_and_is_met_straight():
    zero, expert = torch.zeros(4), torch.randn(4, dtype=WIDE)
    for base, other in ((zero, expert), (expert, zero)):
        close(merged(slerp, base, [other], t=0.3), 0.7 * base + 0.3 * other)
        theirs = merged(slerp, base, [other], t=0.3, compat="mergekit")
        close(theirs, math.sin(0.35 * math.pi) * base + math.sin(0.15 * math.pi) * other)
    assert not merged(slerp, zero, [zero]).any()


def test_without_being_told_nuslerp_and_multislerp_see_a_base_by_the_first_change():
    first, second, base = torch.randn(3, 4, 5, dtype=WIDE)
    for method in (nuslerp, multislerp):
        for told, found in ((base, base), (None, None)):
            deltas = TensorDeltas(told, [first, second])
            expected = merged(method, found, [first, second])
            assert torch.equal(deltas.base() + described(method).merge(deltas), expected)


def test_weights_that_cancel_meet_in_the_middle():
    for weights in ([1.0, -1.0], [0.0, 0.0]):
        assert torch.equal(merged(nuslerp, None, G1, weight=weights), merged(nuslerp, None, G1))


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "as_given"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 3.0, 1.0], [1.0, -2.0, 0.3]], ids=str)
def test_multislerp_is_the_mean_direction_times_the_mean_length(weights, normalize):
    torch.manual_seed(0)
    base, *changes = torch.randn(4, 5, 6, dtype=WIDE) * torch.tensor([1.0, 1.0, 0.1, 4.0]).view(4, 1, 1)
    share = [w / sum(weights) for w in weights] if normalize else weights
    parameters = {"weight": weights, "normalize_weights": normalize}
    close(merged(multislerp, None, changes, **parameters), spherical(changes, share))
    experts = [base + change for change in changes]
    close(merged(multislerp, base, experts, **parameters) - base, spherical(changes, share))
    narrow = merged(multislerp, base.float(), [e.float() for e in experts], torch.float32, **parameters)
    torch.testing.assert_close(narrow.double() - base, spherical(changes, share), atol=2e-5, rtol=0)


def test_changes_of_zero_lower_the_length_only():
    base, first, second = torch.randn(3, 4, 5, dtype=WIDE)
    found = merged(multislerp, base, [base, base + first, base + second]) - base
    close(found, spherical([first, second], [1 / 3, 1 / 3]))
    close(merged(karcher, None, [base * 0, first, second]), merged(karcher, None, [first, second]) * 2 / 3)
    assert torch.equal(merged(multislerp, base, [base, base]), base)
    assert not merged(multislerp, None, [base * 0, base * 0]).any()
    assert not merged(karcher, None, [base * 0, base * 0]).any()


def test_directions_that_cancel_leave_the_plain_mean_or_the_first():
    vector, base = torch.randn(2, 4, 5, dtype=WIDE)
    close(merged(multislerp, None, [vector, -2 * vector]), -0.5 * vector)
    close(merged(multislerp, base, [base + vector, base - vector]), base)
    close(merged(karcher, None, [vector, -2 * vector]), 1.5 * vector)


def test_karcher_minimises_the_sum_of_squared_angles():
    torch.manual_seed(0)
    experts = torch.randn(4, 6, 5, dtype=WIDE) + 0.5
    found = merged(karcher, None, experts, max_iter=200, tol=1e-13)
    flat = experts.view(4, -1)

    def spread(point):
        return torch.acos(torch.cosine_similarity(point.view(1, -1), flat)).square().sum()

    assert found.norm().item() == pytest.approx(flat.norm(dim=1).mean().item())
    for _ in range(20):
        assert spread(found + 1e-3 * torch.randn_like(found)) > spread(found)
    unit = found.view(-1) / found.norm()
    angles = torch.acos(torch.cosine_similarity(unit, flat))
    tangents = flat / flat.norm(dim=1, keepdim=True) - torch.cos(angles)[:, None] * unit
    assert (angles / torch.sin(angles) @ tangents).norm() < 1e-9


def test_karcher_stops_after_the_steps_it_was_given():
    start = merged(karcher, None, G2, max_iter=0)
    close(start, spherical([torch.tensor(each, dtype=WIDE) for each in G2], [1 / 3] * 3))
    end = merged(karcher, None, G2, max_iter=100, tol=1e-12)
    errors = [(merged(karcher, None, G2, max_iter=n, tol=1e-12) - end).norm().item() for n in (0, 1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(merged(karcher, None, G2, tol=4.0), start)


def test_karcher_does_not_mind_a_base():
    torch.manual_seed(0)
    base, *experts = torch.randn(4, 5, 6, dtype=WIDE)
    close(merged(karcher, base, experts), merged(karcher, None, experts))


@pytest.mark.parametrize("method", [karcher, multislerp, nuslerp, slerp])
def test_small_changes_of_large_weights_keep_their_digits(method):
    torch.manual_seed(0)
    base = torch.randn(40, 30, dtype=WIDE)
    changes = 1e-6 * torch.randn(2, 40, 30, dtype=WIDE)
    if method is slerp:
        found, expected = merged(method, base, [base + changes[1]], t=0.5) - base, changes[1] / 2
    else:
        found, expected = merged(method, None, [base + c for c in changes]) - base, changes.mean(0)
    # of second order in the angle is the difference from the mean
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("method", [karcher, multislerp, nuslerp])
@pytest.mark.parametrize("based", [False, True], ids=["weights", "changes"])
def test_permutation_scale_and_rotations(method, based):
    torch.manual_seed(0)
    base, *experts = torch.randn(4 if method is not nuslerp else 3, 6, 6, dtype=WIDE)
    base = base if based else None
    expected = merged(method, base, experts)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=WIDE))

    def through(function):
        return merged(method, base if base is None else function(base), [function(expert) for expert in experts])

    close(merged(method, base, experts[::-1]), expected)
    close(through(lambda x: x * 1e-20) * 1e20, expected)
    close(turn.T @ through(lambda x: turn @ x), expected)
    close(through(lambda x: x @ turn) @ turn.T, expected)


@pytest.mark.parametrize("method", [karcher, multislerp, nuslerp])
@pytest.mark.parametrize("based", [False, True], ids=["weights", "changes"])
def test_equal_experts_come_back_bit_for_bit(method, based):
    base = torch.randn(40, 30).bfloat16()
    expert = (base.float() + 0.01 * torch.randn(40, 30)).bfloat16()
    for copies in (2,) if method is nuslerp else (1, 2, 3):
        deltas = Based(base if based else None, [expert] * copies)
        found = deltas.base() + described(method).merge(deltas)
        assert torch.equal(found.bfloat16(), expert)


def test_slerp_ends_in_its_models_bit_for_bit():
    base = torch.randn(40, 30).bfloat16()
    expert = torch.randn(40, 30).bfloat16()
    for t, end in ((0.0, base), (1.0, expert)):
        deltas = TensorDeltas(base, [expert])
        assert torch.equal((base.float() + described(slerp).merge(deltas, t=t)).bfloat16(), end)


CUTS = [
    (slerp, 1, {"t": 0.3}),
    (karcher, 3, {}),
    (multislerp, 3, {"weight": [1.0, 2.0, 0.5]}),
    (nuslerp, 2, {}),
    (nuslerp, 2, ROWS),
    (nuslerp, 2, COLUMNS),
]


@pytest.mark.parametrize(("method", "count", "parameters"), CUTS)
@pytest.mark.parametrize("shape", [(5 * PANEL + 77,), (173, 250), (6, 25, 280)], ids=str)
@pytest.mark.parametrize("panels", [1, 3])
def test_the_bytes_do_not_depend_on_the_blocks(method, count, parameters, shape, panels):
    torch.manual_seed(0)
    base, *experts = torch.randn(count + 1, *shape)
    for origin in (base, None) if method is not slerp else (base,):
        whole = described(method).merge(TensorDeltas(origin, experts), **parameters)
        cut = merged_by_blocks(method, origin, experts, panels * PANEL, backwards=True, **parameters)
        assert torch.equal(whole, cut)


def test_tensors_of_one_element_and_of_none_dimensions_are_merged():
    for shape in ((), (1,), (1, 1)):
        base, first, second = torch.tensor([1.0, 2.0, 4.0], dtype=WIDE).view(3, *shape)
        close(merged(slerp, base, [first], t=0.5), torch.full(shape, 1.5))
        for grain in ({}, ROWS, COLUMNS):
            close(merged(nuslerp, None, [first, second], **grain), torch.full(shape, 3.0))
        close(merged(karcher, None, [first, second]), torch.full(shape, 3.0))
        close(merged(multislerp, base, [first, second]), torch.full(shape, 3.0))
