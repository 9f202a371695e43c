from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from streammerge_kernels import matmul


def test_products_inside_are_true_float32():
    with matmul.fast_matmul():
        assert matmul.product_error(200, 3000, 333) < 1e-5


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no such switch")
def test_the_global_setting_is_put_back_also_after_an_error():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    with pytest.raises(KeyError), matmul.fast_matmul():
        raise KeyError
    assert settings.fp32_precision == before


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no such switch")
def test_where_products_come_out_inaccurate_nothing_is_switched(monkeypatch):
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    monkeypatch.setattr(matmul, "product_error", lambda *shape: 3e-3)
    matmul.is_accurate.cache_clear()
    try:
        with matmul.fast_matmul() as fast:
            assert not fast
            assert settings.fp32_precision == before
    finally:
        matmul.is_accurate.cache_clear()


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no such switch")
def test_blocks_on_several_threads_put_the_setting_back_when_the_last_is_left():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision

    def many(_: int) -> set[str]:
        seen = set()
        for _ in range(2000):
            with matmul.fast_matmul():
                seen.add(settings.fp32_precision)
        return seen

    with matmul.fast_matmul():
        inside = settings.fp32_precision
    with ThreadPoolExecutor(4) as threads:
        assert set().union(*threads.map(many, range(4))) == {inside}
    assert settings.fp32_precision == before
