import pytest
import torch

from streammerge.solve import largest_entries
from streammerge.solve.largest_entries import keep_largest_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("chunk", [7, 1 << 18])
@pytest.mark.parametrize("keep", [1, 2, 49, 50, 99, 100, 500])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
def test_the_largest_magnitudes_stay_and_of_equal_ones_the_first(kind, keep, chunk, dtype, monkeypatch):
    monkeypatch.setattr(largest_entries, "_CHUNK", chunk)
    values = torch.randn(10, 10, dtype=dtype, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        values = (values * 2).round() / 2
    elif kind == "zeros":
        values[3:] = 0
    order = values.flatten().abs().argsort(descending=True, stable=True)[:keep]
    expected = torch.zeros(100, dtype=dtype)
    expected[order] = values.flatten()[order]
    assert torch.equal(keep_largest_(values.clone(), keep).flatten(), expected)


def test_float64_is_told_apart_where_float32_is_not():
    values = torch.tensor([1.0, 1.0 + 2.0**-40, 1.0 - 2.0**-40], dtype=torch.float64)
    assert keep_largest_(values.clone(), 1).tolist() == [0.0, 1.0 + 2.0**-40, 0.0]
