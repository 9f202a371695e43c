import math

import pytest
import torch

from streammerge.delta import TensorDeltas
from streammerge.errors import MergeError
from streammerge.solve.panels import (
    PANEL,
    GramSums,
    gram_panels,
    gram_rows,
    panel_sums,
    per_row,
    row_sums,
    stacked_changes,
    symmetric,
    total,
)

SIZES = (1, 2, 63, PANEL - 1, PANEL, PANEL + 1, 5 * PANEL + 77, 40 * PANEL)


def exact(left, right):
    return math.fsum((left.double() * right.double()).view(-1).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_panel_sums_add_up_to_the_inner_product(size, dtype):
    torch.manual_seed(size)
    left, right = torch.randn(2, size, dtype=dtype)
    sums = panel_sums(left, right)
    assert (sums.dtype, len(sums)) == (torch.float64, -(-size // PANEL))
    # additions in pairs: the error grows with the logarithm of the length
    bound = 20 * 2.0**-53 * exact(left.abs(), right.abs())
    assert abs(total([sums], "x") - exact(left, right)) <= bound


@pytest.mark.parametrize("panels", [1, 2, 3, 7])
def test_sums_are_the_same_bits_however_a_tensor_is_cut(panels):
    torch.manual_seed(0)
    vectors = list(torch.randn(3, 11 * PANEL + 123))
    whole, cut = GramSums(), GramSums()
    whole.add([vector.view(-1, 5) for vector in vectors])
    for first in range(0, len(vectors[0]), panels * PANEL):
        cut.add([vector[first : first + panels * PANEL] for vector in vectors])
    assert torch.equal(whole.finish("x"), cut.finish("x"))


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize("columns", [1, 3, 300, 9000])
def test_row_sums_are_the_same_bits_however_many_rows_are_shown(rows, columns):
    torch.manual_seed(0)
    left, right = torch.randn(2, 130, columns)
    pieces = [row_sums(left[r : r + rows], right[r : r + rows]) for r in range(0, 130, rows)]
    found = row_sums(left, right)
    assert torch.equal(found, torch.cat(pieces))
    torch.testing.assert_close(found, (left.double() * right.double()).sum(1), rtol=1e-12, atol=1e-12)


def test_sums_are_the_same_bits_whatever_the_number_of_threads():
    left, right = torch.randn(2, 70 * PANEL + 5)
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        found.append(
            (panel_sums(left, right), row_sums(left[: 70 * PANEL].view(70, -1), left[: 70 * PANEL].view(70, -1)))
        )
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for each in found[1:] for a, b in zip(found[0], each, strict=True))


@pytest.mark.parametrize("size", [10, 3 * PANEL + 1])
def test_a_chunk_holds_any_number_of_panels(size, monkeypatch):
    left, right = torch.randn(2, size)
    found = []
    for chunk in (1, PANEL, 1 << 24):
        monkeypatch.setattr("streammerge.solve.panels._CHUNK", chunk)
        found.append(panel_sums(left, right))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("by_row", [False, True], ids=["panels", "rows"])
def test_the_gram_matrix_is_that_of_float64_and_exactly_symmetric(by_row):
    torch.manual_seed(0)
    vectors = torch.randn(4, 30, 40)
    sums = GramSums(by_row=by_row)
    sums.add(list(vectors))
    gram = sums.finish("x")
    assert torch.equal(gram, gram.T)
    wide = vectors.view(4, -1).double()
    torch.testing.assert_close(gram, wide @ wide.T, rtol=1e-12, atol=1e-12)


def test_equal_vectors_have_equal_inner_products():
    vector = torch.randn(3 * PANEL)
    sums = GramSums()
    sums.add([vector, vector.clone()])
    gram = sums.finish("x")
    assert gram[0, 0] == gram[0, 1] == gram[1, 1]


def test_pairs_of_many_tensors_become_gram_matrices_of_each_row():
    vectors = torch.randn(3, 6, 5)
    grams = symmetric(gram_rows(list(vectors)))
    assert grams.shape == (6, 3, 3)
    wide = vectors.double().transpose(0, 1)
    torch.testing.assert_close(grams, wide @ wide.mT)


@pytest.mark.parametrize(("shape", "sums"), [((), 1), ((5,), 1), ((4, 5), 4), ((2, 3, 5), 6), ((4, 0), 4), ((0, 5), 0)])
def test_rows_are_those_of_the_last_dimension(shape, sums):
    assert row_sums(torch.ones(shape), torch.ones(shape)).shape == (sums,)
    assert math.prod(per_row(shape)) == sums


def test_no_elements_have_no_panels():
    assert gram_panels([torch.empty(0), torch.empty(0)]).shape == (3, 0)
    assert total([], "x") == 0.0


def test_products_that_overflow_are_refused_with_the_tensors_name():
    huge = torch.full((3,), 1e200, dtype=torch.float64)
    sums = GramSums()
    sums.add([huge, -huge])
    with pytest.raises(MergeError, match=r"`layer\.weight`: a weight or a change is too large to square") as raised:
        sums.finish("layer.weight")
    assert raised.value.hint


def test_stacked_changes_keep_the_experts_order():
    base, *experts = torch.randn(4, 2, 3)
    changes = stacked_changes(TensorDeltas(base, experts))
    assert torch.equal(changes, torch.stack([expert - base for expert in experts]))
