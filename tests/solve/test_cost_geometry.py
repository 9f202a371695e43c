import subprocess
import sys

import pytest

from streammerge.solve import cost_geometry

LOOKS = [
    ("weight_gram", {}, 1),
    ("model_stock", {}, 1),
    ("model_stock", {"filter_wise": True}, 0),
    ("nuslerp", {}, 1),
    ("nuslerp", {"nuslerp_row_wise": True}, 1),
    ("nuslerp", {"nuslerp_flatten": False}, 0),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, 1),
    ("norms", {}, 1),
    ("norms", {"k": 0.0}, 0),
    ("sce", {}, 1),
    ("sce", {"select_topk": 0.5}, 3),
    ("counts", {}, 1),
    ("quartiles", {}, 2),
]


@pytest.mark.parametrize(("name", "parameters", "looks"), LOOKS)
def test_a_price_counts_the_looks_that_the_parameters_ask_for(name, parameters, looks):
    cost = getattr(cost_geometry, name)((6, 5), 3, parameters, 4)
    assert (cost.passes, cost.looks, cost.workspace_bytes, cost.look_scope) == (1, looks, 0, "tensor")
    assert cost.flops > 0
    assert getattr(cost_geometry, name)((12, 5), 3, parameters, 4).flops == 2 * cost.flops


def test_pricing_loads_no_torch():
    code = "import sys, streammerge.solve.cost_geometry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
