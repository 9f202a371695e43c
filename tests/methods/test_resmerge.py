import itertools

import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.methods.resmerge import resmerge
from tests.solve.changes import relative_error

SHAPES = [(9, 21), (40, 12), (16, 16)]
SCORED, OTHER = "model.layers.0.self_attn.q_proj.weight", "model.proj.weight"


def merged(changes, name=SCORED, **parameters):
    """ResMerge of changes [t, out, in] from a base of zeros."""
    return resmerge(TensorDeltas(torch.zeros_like(changes[0]), list(changes), name=name), **parameters)


def random(count, shape, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def related(count, shape, seed=0):
    """Changes that agree enough for a consensus."""
    return random(1, shape, seed + 99) + 0.5 * random(count, shape, seed)


def cosine(a, b):
    return (a * b).sum() / a.norm() / b.norm()


def by_definition(changes, scored=True, rank=1, ratio=0.2):
    """As the paper says it, pair by pair."""
    u, s, v = torch.linalg.svd(changes, full_matrices=False)
    heads = (u[:, :, :rank] * s[:, None, :rank]) @ v[:, :rank]
    residuals = changes - heads
    units = torch.stack([r / r.norm() for r in residuals])
    direction = units.sum(0) / units.sum(0).norm()
    coherence = torch.stack([cosine(unit, direction) for unit in units]).mean()
    pairs = list(itertools.combinations(range(len(changes)), 2))
    pairwise = torch.stack([cosine(residuals[a], residuals[b]) for a, b in pairs]).mean() if pairs else 1.0
    beta = 1.0 - 0.3 * 0.5 * ((pairwise + 1) / 2 + (coherence + 1) / 2) * scored
    if coherence <= len(changes) ** -0.5:
        backbone = residuals.mean(0)
    else:
        backbone = direction * coherence**beta * torch.stack([r.norm() for r in residuals]).mean()
    gate = torch.stack([cosine(heads[a], heads[b]).clamp(min=0) for a, b in pairs]).mean() if pairs else 1.0
    return backbone + ratio * gate * backbone.norm() * heads.mean(0) / heads.mean(0).norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", [SCORED, OTHER], ids=["scored", "other"])
def test_resmerge_is_what_its_definition_says(shape, count, name):
    changes = related(count, shape)
    expected = by_definition(changes, scored=name == SCORED)
    assert relative_error(merged(changes, name), expected) < 1e-11
    narrow = merged(changes.float(), name)
    assert narrow.dtype == torch.float32
    assert relative_error(narrow, expected) < 1e-5


@pytest.mark.parametrize("rank", [2, 4])
def test_heads_may_have_several_directions(rank):
    changes = related(3, (12, 15))
    expected = by_definition(changes, rank=rank, ratio=0.5)
    assert relative_error(merged(changes, head_rank=rank, head_ratio=0.5), expected) < 1e-11


def test_residuals_that_oppose_each_other_are_averaged():
    change = random(1, (9, 12))[0]
    changes = torch.stack([change, -0.5 * change])
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    residual = change - s[0] * torch.outer(u[:, 0], v[0])
    # the heads oppose each other too, so nothing of them comes back
    assert relative_error(merged(changes), 0.25 * residual) < 1e-12


def test_of_one_expert_the_head_comes_back_at_a_fifth_of_the_residual():
    change = random(1, (9, 12))[0]
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    direction = torch.outer(u[:, 0], v[0])
    residual = change - s[0] * direction
    expected = residual + 0.2 * residual.norm() * direction
    assert relative_error(merged(change[None]), expected) < 1e-12
    assert relative_error(merged(change.expand(3, 9, 12)), expected) < 1e-12
    assert relative_error(expected, change) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_changes_that_are_all_head_vanish(dtype):
    changes = (random(2, (9, 1)) @ random(2, (1, 12), 5)).to(dtype)
    assert not merged(changes).any()


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (1, 6), (6, 1)], ids=str)
def test_where_no_expert_changed_anything_nothing_changes(shape):
    assert not merged(torch.zeros(3, *shape)).any()


def test_resmerge_scales_and_turns_with_the_deltas_whatever_their_order():
    changes = related(3, (9, 12))
    result = merged(changes)
    left, right = (torch.linalg.qr(random(1, (n, n), 7)[0])[0] for n in (9, 12))
    assert relative_error(merged(changes * 1e-6) * 1e6, result) < 1e-10
    assert relative_error(merged(left @ changes @ right), left @ result @ right) < 1e-10
    assert relative_error(merged(changes[[2, 0, 1]]), result) < 1e-10


def test_an_expert_that_changed_nothing_is_ignored():
    changes = related(3, (9, 12))
    with_idle = torch.cat([torch.zeros(1, 9, 12), changes])
    assert relative_error(merged(with_idle), merged(changes)) < 1e-12


def test_the_report_says_how_far_experts_agree():
    deltas = TensorDeltas(torch.zeros(9, 12), list(related(3, (9, 12))))
    resmerge(deltas)
    assert 0.5 < deltas.facts["coherence"] <= 1.0
    assert 0.0 <= deltas.facts["head_agreement"] <= 1.0
