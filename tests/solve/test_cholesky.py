import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.solve.buffers import Buffers
from streammerge.solve.cholesky import LibraryCholesky, PanelCholesky


def buffers(dtype):
    return Buffers(TensorDeltas(None, [torch.zeros(1)]), dtype)


FACTORS = {
    "panels": lambda matrix, rows: PanelCholesky(matrix, rows, buffers(matrix.dtype)),
    "library": lambda matrix, rows: LibraryCholesky(matrix),
    "inverse": lambda matrix, rows: LibraryCholesky(matrix, by_inverse=True),
}
every_factor = pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)


@every_factor
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (5, 3), (2, 128), (300, 129), (50, 500)])
@pytest.mark.parametrize("decay", [0.0, 3.0], ids=["well_conditioned", "ill_conditioned"])
def test_a_solution_is_as_accurate_as_lapack(factor, rows, size, dtype, decay):
    torch.manual_seed(0)
    x = torch.randn(2 * size, size, dtype=torch.float64) * torch.logspace(0, -decay, size, dtype=torch.float64)
    matrix = (x.mT @ x).to(dtype)
    right = (torch.randn(rows, size, dtype=torch.float64) @ matrix.double()).to(dtype)
    true = torch.linalg.solve(matrix.double(), right.double(), left=False)
    lapack = torch.cholesky_solve(right.mT, torch.linalg.cholesky(matrix)).mT
    ours = factor(matrix.clone(), rows).solve_(right.clone())
    # an inverse, as its textbook bound says, loses more than two triangles where the matrix is ill conditioned
    allowed = 8 if factor is FACTORS["inverse"] else 2
    slack = 4 * torch.finfo(dtype).eps * true.norm()
    assert (ours.double() - true).norm() <= allowed * (lapack.double() - true).norm() + slack


def test_a_factor_reads_only_the_lower_triangle():
    matrix = torch.eye(200) * 4 + torch.full((200, 200), torch.nan).triu(1)
    factor = PanelCholesky(matrix, 1, buffers(torch.float32))
    assert factor.smallest_pivot == 4.0
    assert torch.equal(factor.solve_(torch.ones(1, 200)), torch.full((1, 200), 0.25))


@every_factor
def test_the_smallest_pivot_is_the_least_squared_diagonal(factor):
    assert factor(torch.diag(torch.tensor([4.0, 9.0, 0.25])), 1).smallest_pivot == 0.25


@every_factor
@pytest.mark.parametrize("position", [0, 150, 199])
@pytest.mark.parametrize("value", [-1.0, 0.0, torch.nan, torch.inf])
def test_an_indefinite_or_damaged_matrix_is_not_positive(factor, position, value):
    matrix = torch.eye(200)
    matrix[position, position] = value
    assert not factor(matrix, 1).positive
