import subprocess
import sys

import pytest

from streammerge.solve import cost_geometry

PASSES = [
    ("weight_gram", {}, 2),
    ("model_stock", {}, 2),
    ("model_stock", {"filter_wise": True}, 1),
    ("nuslerp", {}, 2),
    ("nuslerp", {"nuslerp_row_wise": True}, 2),
    ("nuslerp", {"nuslerp_flatten": False}, 1),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, 2),
    ("norms", {}, 2),
    ("norms", {"k": 0.0}, 1),
    ("sce", {}, 2),
    ("sce", {"select_topk": 0.5}, 4),
    ("counts", {}, 2),
    ("quartiles", {}, 3),
]


@pytest.mark.parametrize(("name", "parameters", "passes"), PASSES)
def test_a_price_counts_the_looks_that_the_parameters_ask_for(name, parameters, passes):
    cost = getattr(cost_geometry, name)((6, 5), 3, parameters, 4)
    assert (cost.passes, cost.workspace_bytes, cost.look_scope) == (passes, 0, "tensor")
    assert cost.flops > 0
    assert getattr(cost_geometry, name)((12, 5), 3, parameters, 4).flops == 2 * cost.flops


def test_pricing_loads_no_torch():
    code = "import sys, streammerge.solve.cost_geometry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
