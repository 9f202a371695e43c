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

PAPER = "paper's code"
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")


def sampled(size: str, seed: int = 0) -> list[str]:
    """One tensor of every matrix shape, each from a layer drawn at random."""
    draw = random.Random(seed)
    return [f"model.layers.{draw.randrange(SIZES[size].num_hidden_layers)}.{part}.weight" for part in PARTS]


def main() -> None:
    given = rows.arguments(__doc__).parse_args()
    models = ensure(given.work / given.size, Settings(size=given.size), experts=3)[:4]
    merged = merge_whole(given.work, models)
    lines: list[tuple[str, ...]] = []
    red: list[str] = []
    for name in sampled(given.size):
        base, *experts = (files.read_tensor(model, name) for model in models)
        command = files.read_tensor(merged, name).double() - base.double()
        deltas = truth.deltas64(base, experts)
        shape = "x".join(map(str, base.shape))
        for solver in truth.SOLVERS:
            errors, facts = compare(solver, name, base, experts, deltas, command)
            for way, error in errors.items():
                row = {"size": given.size, "tensor": name, "shape": list(base.shape), "experts": len(experts)}
                row |= {"solver": solver, "way": way, "relative_error": error}
                row |= {"tolerance": truth.TOLERANCES[solver], "threads": torch.get_num_threads(), "facts": facts}
                rows.append(given.results, "correctness", row)
                lines.append((shape, solver, way, f"{error:.1e}", f"{facts['certificate']:.1e}"))
                if way != PAPER and not error <= truth.TOLERANCES[solver]:
                    red.append(f"{shape} {solver}, {way}: {error:.1e}")
    shutil.rmtree(merged)
    print(rows.table(("shape", "solver", "way", "relative error", "certificate"), lines))
    if red:
        raise SystemExit(f"error: further than {truth.TOLERANCES}: {'; '.join(red)}")


def compare(
    solver: truth.Solver, name: str, base: Tensor, experts: list[Tensor], deltas: list[Tensor], command: Tensor
) -> tuple[dict[str, float], dict[str, float | int | str | bool]]:
    """Errors of every way to this solver's result, and what the method noted about its own."""
    formula = truth.formula64(solver, deltas)
    stream = TensorDeltas(base, experts, name=name)
    method = actmat(stream, solver=solver)
    errors = {"method": truth.relative_error(method, formula)}
    if solver == "ridge":
        errors["command"] = truth.relative_error(command, formula)
    if solver == "pinv":
        # what the paper's code gives is a second truth, no truer than ours
        paper = truth.paper32(base, experts)
        errors[PAPER] = truth.relative_error(paper, formula)
        errors["method to paper's code"] = truth.relative_error(method, paper)
    return errors, stream.facts


def merge_whole(work: Path, models: list[Path]) -> Path:
    """The whole model merged by the command with its defaults, in float32 so that rounding hides nothing."""
    base, *experts = models
    recipe = child.write_recipe(work / "correctness.yaml", "actmat", experts, base, out_dtype="float32")
    out = work / "correctness-out"
    child.merge(recipe, out)
    return out


if __name__ == "__main__":
    main()
