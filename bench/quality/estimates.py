"""Guesses at an expert's input covariances, of weights alone, stored as `streammerge capture` stores real ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .encoder import EPOCHS

Weights = Mapping[str, Tensor]
_LAYER = re.compile(r"(?<=layer\.)\d+")


def own(base: Weights, ends: Sequence[Weights], name: str) -> Tensor:
    """DᵀD, as ACTMat has it."""
    change = ends[-1][name].double() - base[name].double()
    return change.T @ change


def by_epoch(base: Weights, ends: Sequence[Weights], name: str) -> Tensor:
    """Σ DₑᵀDₑ over the changes of each epoch: what one epoch takes back of another still shows what was seen."""
    steps = [end[name].double() - start[name].double() for start, end in zip((base, *ends), ends, strict=False)]
    return torch.stack([step.T @ step for step in steps]).sum(0)


def with_neighbours(base: Weights, ends: Sequence[Weights], name: str) -> Tensor:
    """DᵀD, half of it, and a half of the same matrix's of the layers before and after, at the same trace."""
    at = _LAYER.search(name)
    mine = own(base, ends, name)
    if at is None:
        return mine
    around = [_LAYER.sub(str(int(at[0]) + step), name) for step in (-1, 1)]
    others = [own(base, ends, other) for other in around if other in base]
    if not others or not mine.any():
        return mine
    return 0.5 * mine + 0.5 / len(others) * sum(
        (other * (mine.trace() / other.trace()) for other in others if other.any()), torch.zeros_like(mine)
    )


ESTIMATES: Mapping[str, Callable[[Weights, Sequence[Weights], str], Tensor]] = {
    "own": own,
    "epochs": by_epoch,
    "neighbours": with_neighbours,
}


def write(estimate: str, base: Path, expert: Path, folder: Path) -> None:
    """Fill the new folder with an estimate for every matrix of the expert's layers, [in, in] float32."""
    weights = load_file(base / "model.safetensors")
    epochs = [load_file(path) for path in sorted((expert / EPOCHS).glob("*.safetensors"))]
    ends = [*epochs, load_file(expert / "model.safetensors")]
    names = [name for name, weight in weights.items() if weight.ndim == 2 and "embeddings" not in name]
    found = {name: ESTIMATES[estimate](weights, ends, name) for name in names if _has_layer(name)}
    # a matrix without changes has no say
    found |= {name: torch.zeros(weights[name].shape[1], weights[name].shape[1]) for name in names if name not in found}
    folder.mkdir(parents=True)
    save_file({name: matrix.float().contiguous() for name, matrix in found.items()}, folder / "model.safetensors")
    config = {"streammerge": {"kind": "covariance", "model": str(expert), "estimate": estimate}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _has_layer(name: str) -> bool:
    return _LAYER.search(name) is not None
