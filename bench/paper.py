"""A whole model by the paper's formula as its code computes it, restated: for `peers.py`.

python bench/paper.py OUT BASE EXPERT…
"""

from __future__ import annotations

import sys
from pathlib import Path

import files
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from truth import paper32

# what has a longer side is averaged, as is all that is no matrix; of a real model's tables that is so
LONGEST = 20000
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def state(model: Path) -> dict[str, Tensor]:
    """All of a model's tensors."""
    return {name: tensor for file in files.weight_files([model]) for name, tensor in load_file(file).items()}


def merged(name: str, base: Tensor, experts: list[Tensor]) -> Tensor:
    """One tensor's merge, in the base's dtype."""
    if base.ndim == 2 and max(base.shape) < LONGEST and name not in TABLES:
        change = paper32(base, experts)
    else:
        change = torch.stack([expert.float() - base.float() for expert in experts]).mean(0)
    return (base.float() + change).to(base.dtype)


def main() -> None:
    out, base, *experts = map(Path, sys.argv[1:])
    origin, *others = (state(model) for model in (base, *experts))
    result = {name: merged(name, tensor, [other[name] for other in others]) for name, tensor in origin.items()}
    out.mkdir()
    save_file(result, out / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
