"""nearswap, arcee_fusion and passthrough: one model, beside a base or alone."""

import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.methods.arcee_fusion import arcee_fusion
from streammerge.methods.nearswap import nearswap
from streammerge.methods.passthrough import passthrough
from streammerge.solve.outliers import narrow_scores, scores
from streammerge.solve.panels import PANEL
from tests.blocks import described, merged_by_blocks

WIDE = torch.float64


def merged(method, base, expert, **parameters):
    """The merged delta."""
    return described(method).merge(TensorDeltas(base, [expert]), **parameters)


def importances(base, expert):
    """|D| · KL(softmax(W_1) ‖ softmax(W_0)) by rows, in float64."""
    new, old = (torch.softmax(each.double(), -1) + 1e-8 for each in (expert, base))
    divergence = (new * (new / old).log()).sum(-1, keepdim=True)
    return (expert.double() - base.double()).abs() * divergence


def standing_out(base, expert):
    found = importances(base, expert)
    ordered = found.view(-1).sort().values
    lower, median, upper = (ordered[q * (len(ordered) - 1) // 4] for q in (1, 2, 3))
    return found >= median + 1.5 * (upper - lower)


def test_nearswap_moves_no_weight_by_more_than_t():
    change = torch.tensor([0, 1e-3, -1e-3, 0.5, -0.5, 0.1, -2e-4], dtype=WIDE)
    base = torch.zeros(7, dtype=WIDE)
    expected = torch.tensor([0, 1e-3, -1e-3, 0.1, -0.1, 0.1, -2e-4], dtype=WIDE)
    torch.testing.assert_close(merged(nearswap, base, change, t=0.1), expected, atol=0, rtol=0)
    for t in (0.0, -0.1):
        assert not merged(nearswap, base, change, t=t).any()
    assert torch.equal(merged(nearswap, base, change, t=1.0), change)
    assert merged(nearswap, base, change).abs().max() == 1e-4


def test_nearswap_weighs_the_models_by_their_distance():
    torch.manual_seed(0)
    base, expert = torch.randn(2, 5, 6, dtype=WIDE)
    share = (0.3 / (base - expert).abs()).clamp(0, 1)
    expected = share * expert + (1 - share) * base
    torch.testing.assert_close(base + merged(nearswap, base, expert, t=0.3), expected, atol=1e-14, rtol=0)
    narrow = merged(nearswap, base.float(), expert.float(), t=0.3)
    torch.testing.assert_close(base + narrow.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("base", [True, False], ids=["base", "no_base"])
def test_passthrough_is_the_model_scaled(base):
    torch.manual_seed(0)
    origin, expert = torch.randn(2, 30, 20).bfloat16()
    deltas = TensorDeltas(origin if base else None, [expert])
    assert torch.equal((deltas.base() + described(passthrough).merge(deltas)).bfloat16(), expert)
    for scale in (0.5, 0.0, [-1.5]):
        factor = scale[0] if isinstance(scale, list) else scale
        found = deltas.base() + described(passthrough).merge(deltas, scale=scale)
        torch.testing.assert_close(found, factor * expert.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(20))
def test_arcee_fusion_takes_over_what_stands_out(seed):
    torch.manual_seed(seed)
    shape = [(3, 5), (8,), (2, 3, 4), (1, 101), (40, 25), (1,)][seed % 6]
    base = torch.randn(shape, dtype=WIDE)
    expert = base + 0.3 * torch.randn(shape, dtype=WIDE) * (torch.rand(shape) < (0.4 if seed % 4 == 0 else 1))
    found = merged(arcee_fusion, base, expert)
    assert torch.equal(found, torch.where(standing_out(base, expert), expert - base, 0.0))
    narrow = merged(arcee_fusion, base.float(), expert.float())
    assert (narrow.double() - found).abs().gt(1e-5).sum() <= 1


def test_arcee_fusion_of_small_changes_follows_the_definition_not_rounding():
    torch.manual_seed(0)
    base = torch.randn(64, 256) * 0.02
    expert = base + 1e-4 * torch.randn(64, 256)
    found = merged(arcee_fusion, base, expert) != 0
    assert torch.equal(found, standing_out(base, expert))
    # in float32, as mergekit computes it, divergences are rounding: half of them negative
    new, old = (torch.softmax(each, -1) + 1e-8 for each in (expert, base))
    rounded = (new * (new / old).log()).sum(-1)
    assert 0.2 < (rounded < 0).float().mean() < 0.8


@pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("shape", [(3, 5), (64, 256), (2, 3, 40), (31,), (1,)], ids=str)
def test_as_mergekit_rounding_in_float32_decides_and_divergences_may_be_negative(step, shape):
    torch.manual_seed(0)
    base = torch.randn(shape) * 0.02
    expert = base + step * torch.randn(shape)
    change = expert - base
    new, old = (torch.softmax(each, -1) + 1e-8 for each in (base + change, base))
    rounded = change.abs() * (new * (new / old).log()).sum(-1, keepdim=True)
    ordered = rounded.flatten().sort().values.double()
    lower, median, upper = (ordered[place * (len(ordered) - 1) // 4] for place in (1, 2, 3))
    expected = torch.where(rounded.double() >= median + 1.5 * (upper - lower), change, 0.0)
    assert torch.equal(merged(arcee_fusion, base, expert, compat="mergekit"), expected)
    assert (step > 1e-4 or len(base) < 64) or lower < 0.0


def test_as_mergekit_importances_are_the_same_bits_however_many_rows_are_scored(monkeypatch):
    torch.manual_seed(0)
    base, change = torch.randn(7, 40_000) * 0.02, torch.randn(7, 40_000) * 1e-3
    expert = base + change
    whole = narrow_scores(TensorDeltas(base, [expert]))
    for rows in (1, 3):
        part = [narrow_scores(TensorDeltas(base[r : r + rows], [expert[r : r + rows]])) for r in range(0, 7, rows)]
        assert torch.equal(whole, torch.cat(part))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(whole, narrow_scores(TensorDeltas(base, [expert])))
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr("streammerge.solve.outliers._CHUNK", 1 << 20)
    assert torch.equal(whole, narrow_scores(TensorDeltas(base, [expert])))


def test_arcee_fusion_of_equal_models_and_of_few_changes():
    base = torch.randn(6, 8)
    assert not merged(arcee_fusion, base, base).any()
    # most importances are zero, and so is the threshold: all that changed is taken over
    expert = base.clone()
    expert[0, :3] += 0.5
    assert torch.equal(merged(arcee_fusion, base, expert), expert - base)


def test_importances_are_the_same_bits_however_many_rows_are_scored(monkeypatch):
    torch.manual_seed(0)
    base, change = torch.randn(60, 333) * 0.02, torch.randn(60, 333) * 1e-3
    whole = scores(TensorDeltas(base, [base + change]))
    for rows in (1, 7):
        part = [scores(TensorDeltas(base[r : r + rows], [(base + change)[r : r + rows]])) for r in range(0, 60, rows)]
        assert torch.equal(whole, torch.cat(part))
    monkeypatch.setattr("streammerge.solve.outliers._CHUNK", 1000)
    assert torch.equal(whole, scores(TensorDeltas(base, [base + change])))


@pytest.mark.parametrize("method", [nearswap, arcee_fusion, passthrough])
def test_the_bytes_do_not_depend_on_the_blocks(method):
    torch.manual_seed(0)
    base, change = torch.randn(2, 173, 250)
    expert = base + 1e-2 * change
    whole = merged(method, base, expert)
    for block in (PANEL, 3 * PANEL):
        assert torch.equal(whole, merged_by_blocks(method, base, [expert], block, backwards=True))


@pytest.mark.parametrize("step", [1e-2, 1e-5])
def test_as_mergekit_the_bytes_do_not_depend_on_the_blocks_either(step):
    torch.manual_seed(0)
    base, change = torch.randn(2, 173, 250)
    expert = base + step * change
    whole = merged(arcee_fusion, base, expert, compat="mergekit")
    for block in (1, PANEL, 3 * PANEL):
        cut = merged_by_blocks(arcee_fusion, base, [expert], block, backwards=True, compat="mergekit")
        assert torch.equal(whole, cut)
