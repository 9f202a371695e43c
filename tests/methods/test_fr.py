import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.methods.fr import fr
from tests.solve.changes import relative_error

SHAPES = [(9, 21), (40, 12), (16, 16), (7, 7), (1, 6), (5, 1), (1, 1)]


def merged(changes, **parameters):
    """FR-Merging of changes [t, out, in] from a base of zeros."""
    return fr(TensorDeltas(torch.zeros_like(changes[0]), list(changes)), **parameters)


def random(count, shape, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filtered(change, radius):
    """By the full complex spectrum."""
    rows, columns = change.shape
    i = torch.arange(rows).double()[:, None] - rows / 2
    j = torch.arange(columns).double() - columns / 2
    keep = (i**2 + j**2).sqrt() <= radius * min(rows, columns)
    return torch.fft.ifft2(torch.fft.fft2(change) * keep)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("radius", [0.0, 0.3, 0.6, 0.7, 0.9])
def test_fr_adds_what_the_full_spectrum_keeps(shape, radius):
    changes = random(3, shape)
    parts = torch.stack([filtered(change, radius) for change in changes])
    assert parts.imag.abs().max() < 1e-12
    expected = 0.7 * parts.real.sum(0)
    torch.testing.assert_close(merged(changes, radius=radius), expected, atol=1e-12, rtol=0)
    narrow = merged(changes.float(), radius=radius)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), expected, atol=2e-6, rtol=0)


def test_the_lowest_frequencies_go_first():
    constant = torch.ones(1, 8, 8)
    assert not merged(constant).any()
    checks = torch.tensor([[1.0, -1.0]]).repeat(8, 4) * torch.tensor([1.0, -1.0]).repeat(4)[:, None]
    torch.testing.assert_close(merged(checks[None], radius=0.1, lambda_=1.0), checks)


def test_a_square_matrix_is_added_untouched_from_a_radius_of_0_7072():
    changes = random(2, (16, 16))
    deltas = TensorDeltas(torch.zeros(16, 16), list(changes))
    assert torch.equal(fr(deltas, radius=0.7072, lambda_=1.0), changes[0] + changes[1])
    assert deltas.facts["filtered"] is False
    assert not torch.equal(merged(changes, radius=0.7, lambda_=1.0), changes[0] + changes[1])


def test_weights_are_applied_and_may_be_normalized():
    changes = random(2, (9, 12))
    singles = [merged(change[None], lambda_=1.0) for change in changes]
    torch.testing.assert_close(merged(changes, weight=[3.0, -1.0], lambda_=0.5), 1.5 * singles[0] - 0.5 * singles[1])
    mean = merged(changes, weight=[3.0, 1.0], normalize=True, lambda_=1.0)
    torch.testing.assert_close(mean, 0.75 * singles[0] + 0.25 * singles[1])


def test_fr_scales_with_the_deltas_ignores_the_order_and_experts_that_changed_nothing():
    changes = random(3, (9, 12))
    result = merged(changes)
    assert relative_error(merged(changes * 1e-5) * 1e5, result) < 1e-12
    assert relative_error(merged(changes[[2, 0, 1]]), result) < 1e-12
    assert torch.equal(merged(torch.cat([changes, torch.zeros(1, 9, 12)])), result)


def test_fr_does_not_turn_with_its_outputs_and_does_not_give_back_an_expert():
    change = random(1, (12, 12))
    turn = torch.linalg.qr(random(1, (12, 12), 3)[0])[0]
    assert relative_error(merged(turn @ change), turn @ merged(change)) > 0.01
    assert relative_error(merged(change, radius=0.5, lambda_=1.0), change[0]) > 0.01
