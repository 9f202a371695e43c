import pytest
import torch

from streammerge_kernels.gram import add_gram_, add_lower_, gram_, mirror_

SIZES = [(1, 1), (3, 5), (7, 128), (64, 129), (100, 513), (40, 1300)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_a_gram_adds_to_what_is_there_as_accurately_as_a_full_product(rows, columns, dtype):
    torch.manual_seed(0)
    x = torch.randn(rows, columns, dtype=dtype)
    start = torch.randn(columns, columns, dtype=dtype)
    start = start + start.mT
    exact = start.double() + x.double().mT @ x.double()
    full = ((start + x.mT @ x).double() - exact).norm()
    ours = (mirror_(add_gram_(start.clone(), x)).double() - exact).norm()
    assert ours <= 2 * full + 1e-15 * exact.norm()


def test_a_gram_of_a_transposed_view_or_of_a_slice_is_that_of_its_copy():
    torch.manual_seed(0)
    wide = torch.randn(150, 700)
    for view in (wide.mT, wide[:, 3:640], wide[5:80]):
        out = mirror_(add_gram_(torch.zeros(view.shape[1], view.shape[1]), view))
        expected = view.double().mT @ view.double()
        assert (out.double() - expected).norm() <= 1e-6 * expected.norm()


def test_a_mirrored_gram_is_symmetric_to_the_bit():
    torch.manual_seed(0)
    gram = mirror_(add_gram_(torch.zeros(777, 777), torch.randn(33, 777)))
    assert torch.equal(gram, gram.mT)


def test_mirroring_reads_nothing_above_the_diagonal():
    matrix = torch.randn(300, 300)
    poisoned = matrix.tril() + torch.full((300, 300), torch.nan).triu(1)
    assert torch.equal(mirror_(poisoned), matrix.tril() + matrix.tril(-1).mT)


@pytest.mark.parametrize("n", [1, 512, 1300])
def test_lower_triangles_add_up_to_the_sum_once_mirrored(n):
    one, other = (mirror_(matrix) for matrix in torch.randn(2, n, n))
    assert torch.equal(mirror_(add_lower_(one.tril(), other.tril())), one + other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 5), (100, 513), (40, 1300)])
def test_a_gram_written_over_anything_is_the_one_that_is_added_to_zeros(rows, columns, dtype):
    x = torch.randn(rows, columns).to(dtype)
    held = torch.full((columns, columns), torch.nan)
    assert torch.equal(mirror_(gram_(held, x)), mirror_(add_gram_(torch.zeros(columns, columns), x)))
