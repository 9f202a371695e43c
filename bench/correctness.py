"""Compare merged changes with float64, one tensor of every shape: the command's model and the method itself.

python bench/correctness.py
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import child
import files
import rows
import torch
import truth
from generate import Settings, ensure
from llama import SIZES
from torch import Tensor

from streammerge.delta import TensorDeltas
from streammerge.methods.actmat import actmat

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")


def sampled(size: str, seed: int = 0) -> list[str]:
    """One tensor of every matrix shape, each from a layer drawn at random."""
    draw = random.Random(seed)
    return [f"model.layers.{draw.randrange(SIZES[size].num_hidden_layers)}.{part}.weight" for part in PARTS]


def main() -> None:
    parser = rows.arguments(__doc__)
    given = parser.parse_args()
    models = ensure(given.work / given.size, Settings(size=given.size), experts=3)[:4]
    merged = merge_whole(given.work, models)
    lines: list[tuple[object, ...]] = []
    worst: dict[str, float] = {}
    for name in sampled(given.size):
        base, *experts = (files.read_tensor(model, name) for model in models)
        deltas = truth.deltas64(base, experts)
        for regulariser in truth.REGULARISERS:
            formula = truth.formula64(regulariser, deltas)
            found: dict[str, Tensor] = {}
            facts: dict[str, object] = {}
            if regulariser == "ridge":
                found["command"] = files.read_tensor(merged, name).double() - base.double()
            stream = TensorDeltas(base, experts, name=name)
            found["method"] = actmat(stream, regulariser=regulariser)
            facts |= stream.facts
            if regulariser == "pinv":
                # the second truth: what the paper's code gives, which is no truer than ours
                found["paper's code"] = truth.paper32(base, experts)
                facts["method_against_paper"] = truth.relative_error(found["method"], found["paper's code"])
            for way, change in found.items():
                error = truth.relative_error(change, formula)
                row = {
                    "size": given.size,
                    "tensor": name,
                    "shape": list(base.shape),
                    "experts": len(experts),
                    "regulariser": regulariser,
                    "way": way,
                    "relative_error": error,
                    "tolerance": truth.TOLERANCES[regulariser],
                    "threads": torch.get_num_threads(),
                    "facts": facts,
                }
                rows.append(given.results, "correctness", row)
                lines.append(("x".join(map(str, base.shape)), regulariser, way, f"{error:.1e}"))
                if way != "paper's code":
                    worst[regulariser] = max(worst.get(regulariser, 0.0), error)
            if regulariser == "pinv":
                against = float(str(facts["method_against_paper"]))
                lines.append((lines[-1][0], regulariser, "method against paper's code", f"{against:.1e}"))
                worst[regulariser] = max(worst[regulariser], against)
    shutil.rmtree(merged)
    print(rows.table(("shape", "regulariser", "way", "relative error"), lines))
    red = {name: error for name, error in worst.items() if not error <= truth.TOLERANCES[name]}
    if red:
        raise SystemExit(f"error: further from float64 than {truth.TOLERANCES}: {red}")


def merge_whole(work: Path, models: list[Path]) -> Path:
    """The whole model merged by the command with its defaults, in float32 so that rounding hides nothing."""
    base, *experts = models
    recipe = child.write_recipe(work / "correctness.yaml", "actmat", experts, base, out_dtype="float32")
    out = work / "correctness-out"
    shutil.rmtree(out, ignore_errors=True)
    child.merge(recipe, out)
    return out


if __name__ == "__main__":
    main()
